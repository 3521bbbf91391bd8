# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
An OpenAI-compatible server for DEHVF adapters. Needs `pip install -r requirements-app.txt`.

    python serve.py outputs/digits --trust-remote-code --port 8000

It is `transformers serve`, with all its endpoints and flags (`--help`), and two things that this lacks. As of release
5.23.0 it looks for a model's class in `transformers` alone, whatever `--trust-remote-code` says ("module transformers
has no attribute DehvfForConditionalGeneration"). And it keeps nothing of an image, so each question would encode it
again; here the visual memories of the last images are kept across requests.

Like `transformers serve` it fetches the address of an image that a client names, and opens the file if it names one of
this machine: it is for clients that you trust.
"""

import hashlib
from collections import OrderedDict

import torch
import transformers
from transformers import AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def remember_images(model, num_images: int = 64):
    """
    Lets a model keep the visual memories of the images that it was last asked about one by one, so that a further
    question about one of them does not run the encoder. At 7B in bf16 an image takes 4.2 MB.

    Args:
        model: `DehvfForConditionalGeneration`, whose adapters have to stay as they are.
        num_images: how many to keep; the one that was asked about longest ago goes first.

    Returns:
        The model.
    """
    inner, memories = model.model, OrderedDict()
    encode = inner.get_image_features

    def get_image_features(pixel_values, image_mask=None, instruction=None):
        # Where the fuser reads the question, an image's memory is that question's alone
        one = len(pixel_values) == 1 and (image_mask is None or image_mask.all())
        if not one or inner.config.reads_instruction or torch.is_grad_enabled():
            return encode(pixel_values, image_mask, instruction)
        pixels = hashlib.sha256(pixel_values.float().cpu().numpy().tobytes()).digest()
        key = inner.memory_slots, pixels  # the module stands for the active adapters, whatever they are called
        memory = memories.pop(key, None)
        if memory is None:
            memory = encode(pixel_values)
        memories[key] = memory  # now the last one
        if len(memories) > num_images:
            memories.popitem(last=False)
        return memory

    vars(inner)["get_image_features"] = get_image_features
    return model


class AutoModelThatRemembers:
    """What the server finds under the name of a class that `transformers` does not have."""

    @staticmethod
    def from_pretrained(*args, **kwargs):
        return remember_images(AutoModelForImageTextToText.from_pretrained(*args, **kwargs))


def register():
    """Tells `transformers serve` how DEHVF is loaded, and that it takes images."""
    name = "DehvfForConditionalGeneration"
    setattr(transformers, name, AutoModelThatRemembers)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dehvf"] = name


if __name__ == "__main__":
    import typer
    from transformers.cli.serve import Serve

    register()
    typer.run(Serve)
