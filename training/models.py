# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loads the processor and the model that the arguments describe."""

import dataclasses
from pathlib import Path

from transformers import BitsAndBytesConfig

from baselines import METHODS as BASELINES
from baselines import build
from dehvf import DehvfForConditionalGeneration, DehvfProcessor, processing
from training.arguments import BASES, DEHVF_METHODS


def load_processor(model_args, adapter_args):
    """Raises `OSError` if there is no tokenizer or image processor."""
    bases = (model_args.vision_model, model_args.text_model)
    chat_template = read_chat_template(model_args.chat_template)
    try:
        if model_args.adapter is not None:
            return DehvfProcessor.from_pretrained(model_args.adapter, revision=model_args.adapter_revision)
        options = {"chat_template": chat_template, "image_size": adapter_args.image_size}
        return DehvfProcessor.from_vision_text_pretrained(*bases, **base_revisions(model_args), **options)
    except OSError as error:
        places = bases if model_args.adapter is None else (model_args.adapter,)
        raise OSError(
            f"No tokenizer and image processor could be loaded from {' and '.join(places)}. Each must be a folder "
            f"that exists, or a repository on the Hub.\n{error}"
        ) from error


def read_chat_template(place: str | None) -> str | None:
    if place is None:
        return None
    if place == "plain":
        return processing.CHAT_TEMPLATE
    return Path(place).read_text(encoding="utf-8")


def base_revisions(model_args) -> dict[str, str | None]:
    return {name: getattr(model_args, name) for name in ("vision_model_revision", "text_model_revision")}


def load_model(model_args, adapter_args, baseline_args):
    """New adapters or a new baseline on the bases; or saved adapters, whose config then names the bases."""
    bases = (model_args.vision_model, model_args.text_model)
    options = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if model_args.load_in_4bit or model_args.load_in_8bit:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model_args.load_in_4bit,
            load_in_8bit=model_args.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=None if model_args.dtype == "auto" else model_args.dtype,
        )
    if model_args.method in BASELINES:
        options |= base_revisions(model_args) | dataclasses.asdict(baseline_args)
        options["image_size"] = adapter_args.image_size
        return build(model_args.method, *bases, **options)
    if model_args.adapter is None:
        ids = {f"{base}_model_id": getattr(model_args, f"{base}_model_id") for base in BASES}
        options |= base_revisions(model_args) | ids | dataclasses.asdict(adapter_args)
        return DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **options)
    model = DehvfForConditionalGeneration.from_pretrained(
        model_args.adapter,
        revision=model_args.adapter_revision,
        vision_model=model_args.vision_model,
        text_model=model_args.text_model,
        **options,
    )
    for base in BASES:
        if getattr(model_args, f"{base}_model") is None:
            setattr(model_args, f"{base}_model", getattr(model.config, f"{base}_model_id"))
        if getattr(model_args, f"{base}_model_id") is not None:  # the saved config may name a local copy
            setattr(model.config, f"{base}_model_id", getattr(model_args, f"{base}_model_id"))
        if getattr(model_args, f"{base}_model_revision") is not None:
            setattr(model.config, f"{base}_model_revision", getattr(model_args, f"{base}_model_revision"))
    return model


def method_of(config, asked: str) -> str:
    """The name of the method; saved adapters have it in their config, not in the arguments."""
    fits = [
        name
        for name, values in DEHVF_METHODS.items()
        if values and all(getattr(config, key, None) == value for key, value in values.items())
    ]
    return asked if asked in BASELINES or not fits else fits[0]
