# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loads the processor and the model that the arguments describe."""

import dataclasses
from pathlib import Path

from transformers import AutoConfig, BitsAndBytesConfig

from baselines import METHODS as BASELINES
from baselines import build
from dehvf import DehvfConfig, DehvfForConditionalGeneration, DehvfProcessor, processing
from training.arguments import BASES, DEHVF_METHODS
from training.chats import ChatTokenizer


def load_processor(model_args, adapter_args):
    """
    Loads the processor and checks its tokenizer, see [`check_tokenizer`].

    Raises:
        OSError: if there is no tokenizer or image processor.
        ValueError: if the tokenizer does not fit the language model, or `max_images` is lower than in saved adapters.
    """
    bases = (model_args.vision_model, model_args.text_model)
    chat_template = model_args.chat_template
    if chat_template == "plain":
        chat_template = processing.CHAT_TEMPLATE
    elif chat_template is not None:
        chat_template = Path(chat_template).read_text(encoding="utf-8-sig")
    try:
        if model_args.adapter is not None:
            source = {"revision": model_args.adapter_revision}
            saved, _ = DehvfConfig.get_config_dict(model_args.adapter, **source)
            if model_args.method not in BASELINES and (method := saved.get("method")) in BASELINES:
                raise ValueError(
                    f"`--adapter {model_args.adapter}` has the baseline {method}. Give also `--method {method}` and "
                    "the bases and sizes with which it was trained."
                )
            kind = AutoConfig if model_args.method in BASELINES else DehvfConfig
            config = kind.from_pretrained(model_args.adapter, **source)
            processor = DehvfProcessor.from_pretrained(model_args.adapter, **source)
            if 1 < adapter_args.max_images < processor.max_images:
                raise ValueError(
                    f"`--max_images {adapter_args.max_images}` was given, but the adapter {model_args.adapter} reads "
                    f"{processor.max_images} images of a sample. Give a larger number, or leave it out."
                )
            processor.max_images = max(processor.max_images, adapter_args.max_images)
        else:
            options = {"chat_template": chat_template, "image_fit": model_args.image_fit}
            options |= {name: getattr(adapter_args, name) for name in ("image_size", "max_images", "image_tiles")}
            revisions = base_revisions(model_args)
            processor = DehvfProcessor.from_vision_text_pretrained(*bases, **revisions, **options)
            config = AutoConfig.from_pretrained(bases[1], revision=revisions["text_model_revision"])
    except OSError as error:
        places = bases if model_args.adapter is None else (model_args.adapter,)
        raise OSError(
            f"No tokenizer and image processor could be loaded from {' and '.join(places)}. Each must be a folder "
            f"that exists, or a repository on the Hub.\n{error}"
        ) from error
    check_tokenizer(processor.tokenizer, config.get_text_config())
    return processor


def check_tokenizer(tokenizer, config):
    """
    Sets the maximum length of the language model, which some tokenizers do not contain.

    Args:
        config: the config of the language model.

    Raises:
        ValueError: if the tokenizer has no fast version, no end-of-sequence token, or a token beyond the embeddings.
    """
    if not tokenizer.is_fast:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} ({type(tokenizer).__name__}) is not a fast one, and training "
            "needs the position of each token in the text. Use a language model whose tokenizer has a tokenizer.json."
        )
    tokenizer.model_max_length = getattr(config, "max_position_embeddings", None) or tokenizer.model_max_length
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} has no end-of-sequence token, with which each answer ends. Set "
            "`eos_token` in its tokenizer_config.json."
        )
    if tokenizer.pad_token_id >= config.vocab_size:  # an added padding token; any other token works as well
        tokenizer.pad_token = tokenizer.eos_token
    ends = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.unk_token}
    # Such as <image>, which is not used here
    spare = {token.content for token in tokenizer.added_tokens_decoder.values()} - ends
    beyond = [token for token, index in tokenizer.get_vocab().items() if index >= config.vocab_size]
    if needed := sorted(set(beyond) - spare):
        raise ValueError(
            f"The tokenizer {tokenizer.name_or_path} has {len(needed)} tokens, such as {needed[0]!r}, beyond the "
            f"{config.vocab_size} embeddings of the language model. Use the tokenizer of the model, or call "
            "`resize_token_embeddings` and save the model."
        )


def base_revisions(model_args) -> dict[str, str | None]:
    return {name: getattr(model_args, name) for name in ("vision_model_revision", "text_model_revision")}


def load_model(model_args, adapter_args, baseline_args):
    """
    Creates new adapters or a new baseline on the bases, or loads saved adapters, whose config contains the bases and
    which may get embeddings for more images.
    """
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
        model = build(model_args.method, *bases, **options)
        if model_args.adapter is not None:
            model.load_trained(model_args.adapter)
        return model
    if model_args.adapter is None:
        ids = {f"{base}_model_id": getattr(model_args, f"{base}_model_id") for base in BASES}
        options |= base_revisions(model_args) | ids | dataclasses.asdict(adapter_args)
        return DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **options)
    if adapter_args.max_images > 1:
        options["max_images"] = adapter_args.max_images
    options |= {"vision_model": model_args.vision_model, "text_model": model_args.text_model}
    options["revision"] = model_args.adapter_revision
    for base in BASES:
        place, revision = (getattr(model_args, f"{base}_model{end}") for end in ("", "_revision"))
        # The revision of a folder is only recorded, see below
        if revision is not None and not (place and Path(place).is_dir()):
            options |= {f"{base}_model_revision": revision} | ({f"{base}_model_id": place} if place else {})
    model = DehvfForConditionalGeneration.from_pretrained(model_args.adapter, **options)
    for base in BASES:
        if getattr(model_args, f"{base}_model") is None:
            setattr(model_args, f"{base}_model", getattr(model.config, f"{base}_model_id"))
        for name in (f"{base}_model_id", f"{base}_model_revision"):  # the saved config may name a local copy
            if (given := getattr(model_args, name)) is not None:
                setattr(model.config, name, given)
    return model


def end_at_turns(model, processor):
    """
    Makes generation end at the token with which the chat template ends an answer, and which is therefore learned. That
    of a base language model, whose tokenizer has a chat template, may be another one. It is saved with the adapters.
    """
    token, ends = ChatTokenizer(processor).end_of_turn(), model.generation_config.eos_token_id
    ends = [] if ends is None else ends if isinstance(ends, list) else [ends]
    if token is not None and token not in ends:
        model.generation_config.eos_token_id = [*ends, token]


def method_of(config, asked: str) -> str:
    """The name of the method, which for saved adapters follows from their config instead of the arguments."""
    # Without adaptive weights, the fuser does not read the instruction, whatever `fuser_query` says
    reads = getattr(config, "reads_instruction", False)
    fits = [
        name
        for name, values in DEHVF_METHODS.items()
        if values and (reads or "fuser_query" not in values)
        if all(getattr(config, key, None) == value for key, value in values.items())
    ]
    return asked if asked in BASELINES or not fits else fits[0]
