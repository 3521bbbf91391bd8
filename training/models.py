# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The processor, the splits and the model that the arguments describe."""

import dataclasses

from transformers import BitsAndBytesConfig

from baselines import METHODS as BASELINES
from baselines import build
from dehvf import DehvfForConditionalGeneration, DehvfProcessor
from training.arguments import DEHVF_METHODS, KEYS
from training.data import Split, StreamedSplit


def load(task, data_args, model_args, adapter_args, baseline_args, training_args):
    """Returns the processor, the splits by name (data before models: its faults come out sooner) and the model."""
    bases = (model_args.vision_model, model_args.text_model)
    revisions = {name: getattr(model_args, name) for name in ("vision_model_revision", "text_model_revision")}
    places = bases if model_args.adapter is None else (model_args.adapter,)
    try:
        if model_args.adapter is None:
            processor = DehvfProcessor.from_vision_text_pretrained(*bases, **revisions)
        else:
            processor = DehvfProcessor.from_pretrained(model_args.adapter, revision=model_args.adapter_revision)
    except OSError as error:
        raise OSError(
            f"No tokenizer and image processor could be loaded from {' and '.join(places)}. A folder must exist; "
            f"anything else is looked for on the Hub.\n{error}"
        ) from error
    splits = {}
    if training_args.num_train_epochs > 0:
        if data_args.streaming:
            sequential = training_args.train_sampling_strategy == "sequential"
            seed = None if sequential else training_args.seed
            splits["train"] = StreamedSplit(task, "train", processor, data_args, seed)
        else:
            splits["train"] = Split(task, "train", processor, data_args, training=True)
    for name in ("test",) if training_args.eval_strategy == "no" else ("validation", "test"):
        splits[name] = Split(task, name, processor, data_args, training=False)
    loading = {"dtype": model_args.dtype, "attn_implementation": model_args.attn_implementation}
    if model_args.load_in_4bit or model_args.load_in_8bit:
        loading["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=model_args.load_in_4bit,
            load_in_8bit=model_args.load_in_8bit,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=None if model_args.dtype == "auto" else model_args.dtype,
        )
    if model_args.method in BASELINES:
        values = dataclasses.asdict(baseline_args)
        model = build(model_args.method, *bases, **loading, **revisions, **values)
    elif model_args.adapter is None:
        values = dataclasses.asdict(adapter_args)
        ids = {name: getattr(model_args, name) for name in ("vision_model_id", "text_model_id")}
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(
            *bases, **loading, **revisions, **ids, **values
        )
    else:
        model = DehvfForConditionalGeneration.from_pretrained(
            model_args.adapter,
            revision=model_args.adapter_revision,
            vision_model=model_args.vision_model,
            text_model=model_args.text_model,
            **loading,
        )
        for key in KEYS:
            if getattr(model_args, f"{key}_model") is None:
                setattr(model_args, f"{key}_model", getattr(model.config, f"{key}_model_id"))
            if getattr(model_args, f"{key}_model_id") is not None:  # these adapters may have known it by its folder
                for name in (f"{key}_model_id", f"{key}_model_revision"):
                    setattr(model.config, name, getattr(model_args, name))
    return processor, splits, model


def count_parameters(model) -> tuple[int, int]:
    """Trained and all; under ZeRO-3 a parameter's own size is zero and `ds_numel` tells."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def method_of(config, asked: str) -> str:
    """What is trained, or was: with `--adapter` its config tells."""
    fits = [
        name
        for name, values in DEHVF_METHODS.items()
        if values and all(getattr(config, key, None) == value for key, value in values.items())
    ]
    return asked if asked in BASELINES or not fits else fits[0]
