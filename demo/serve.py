# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
An OpenAI-compatible server for DEHVF adapters. Needs `pip install -r requirements-app.txt`.

    python demo/serve.py outputs/digits --trust-remote-code --port 8000

This is `transformers serve` with all its endpoints and flags (see `--help`) and two additions. `transformers serve`
(5.23.0) looks for a model's class in `transformers` only, even with `--trust-remote-code`, and fails with "module
transformers has no attribute DehvfForConditionalGeneration". And it encodes an image again for every question; here
the visual memories of the last images are cached.

Run it for clients that you trust: `transformers serve` fetches the image URLs that a client sends and opens local
files that it names.
"""

import hashlib
import threading
from collections import OrderedDict

import torch
import transformers
from transformers import AutoModelForImageTextToText
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


class MemoryCache:
    """
    What the images that were used last were encoded to. Safe to share between threads.

    Args:
        num_images: how many to keep. The least recently used one is dropped first.
    """

    def __init__(self, num_images: int):
        self.num_images = num_images
        self._outputs = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key):
        """The entry under this key, or `None`."""
        with self._lock:
            if key in self._outputs:
                self._outputs.move_to_end(key)
            return self._outputs.get(key)

    def put(self, key, output):
        with self._lock:
            self._outputs[key] = output
            if len(self._outputs) > self.num_images:
                self._outputs.popitem(last=False)


def remember_images(model, num_images: int = 64):
    """
    Caches the visual memories of single images, so that another question about an image does not run the encoder.
    At 7B in bf16 the memory of an image takes 4.2 MB.

    Args:
        model: `DehvfForConditionalGeneration`. Its adapters must not be trained afterwards.
        num_images: how many images to keep.

    Returns:
        The same model.
    """
    cache, encode = MemoryCache(num_images), model.model._encode

    def encode_or_look_up(adapter, pixel_values, image_mask, instruction, **kwargs):
        is_single = len(pixel_values) == 1 and (image_mask is None or image_mask.all())
        # A fuser that reads the question makes a memory for this question alone
        if kwargs or not is_single or adapter.config.reads_instruction or torch.is_grad_enabled():
            return encode(adapter, pixel_values, image_mask, instruction, **kwargs)
        key = adapter, hashlib.sha256(pixel_values.float().cpu().numpy().tobytes()).digest()
        output = cache.get(key)
        if output is None:
            memory = encode(adapter, pixel_values, None, None).pooler_output
            output = BaseModelOutputWithPooling(pooler_output=memory)
            cache.put(key, output)
        return output

    model.model._encode = encode_or_look_up
    return model


class AutoModelWithCache:
    """What the server finds under the name of the class that `transformers` does not have."""

    @staticmethod
    def from_pretrained(*args, **kwargs):
        return remember_images(AutoModelForImageTextToText.from_pretrained(*args, **kwargs))


def register():
    """Tells `transformers serve` how to load DEHVF and that it takes images."""
    name = "DehvfForConditionalGeneration"
    setattr(transformers, name, AutoModelWithCache)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dehvf"] = name


if __name__ == "__main__":
    import typer
    from transformers.cli.serve import Serve

    register()
    typer.run(Serve)
