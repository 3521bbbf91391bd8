# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The arguments of `train.py`: their dataclasses, how they are read, and what is refused before anything is loaded."""

import dataclasses
import json
import re
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments

from baselines import METHODS as BASELINES
from baselines import BaselineArguments
from dehvf import DehvfConfig, hub
from tasks import NAMES
from training.engines import ENGINE_OF_ONE, name_engine
from training.flags import read_command


DESCRIPTION = "Trains adapters on frozen bases, evaluates them on the test split and saves them with a model card."
BASES = ("vision", "text")
# `--method` -> values of `DehvfConfig`. The baselines in `baselines/` are no settings of DEHVF.
DEHVF_METHODS = {
    "dehvf": {},
    "memvp": {"layer_fusion": "penultimate"},
    "igva": {"fuser_query": "instruction"},
    "layer+instruction": {"fuser_query": "layer+instruction"},
}


# ---------------------------------------------------------------------------------------------------------------------
# Dataclasses
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments:
    """The task and its data."""

    task: Literal[NAMES] = field(
        default="digits", metadata={"help": "The file in tasks/ that reads and scores the data."}
    )
    data_path: str | None = field(
        default=None, metadata={"help": "Hub id, folder or file of the data, where the task does not know it."}
    )
    columns: str | None = field(
        default=None,
        metadata={
            "help": "Columns of your own data with other names: question=prompt,answer=label. `image=none` for data "
            "without images."
        },
    )
    holdout: float | None = field(
        default=None,
        metadata={
            "help": "Share of the rows of your own train split, such as 0.05, to take as the test split if there is "
            "none, and once more as the validation split. They are the same rows in every run."
        },
    )
    max_prompt_length: int = field(
        default=512,
        metadata={"help": "Longest prompt in tokens. Longer prompts lose the end of their context."},
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Use only the first rows of each split (digits: make smaller splits), for a quick test."},
    )
    only_images: bool = field(default=False, metadata={"help": "Remove rows without an image from the train split."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the train split row by row, without a copy on disk. Needs --max_steps."},
    )


@dataclass
class ModelArguments:
    """The method and the frozen bases."""

    method: Literal[(*DEHVF_METHODS, *BASELINES)] = field(
        default="dehvf", metadata={"help": "What is trained: DEHVF, a setting of it, or a baseline."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of DEHVF adapters to start from, with their config. --num_train_epochs 0 "
            "evaluates them as they are."
        },
    )
    adapter_revision: str | None = field(default=None, metadata={"help": "Commit of the adapters."})
    vision_model: str | None = field(
        default="openai/clip-vit-large-patch14", metadata={"help": "Hub id or folder of the vision encoder."}
    )
    text_model: str | None = field(
        default="huggyllama/llama-7b", metadata={"help": "Hub id or folder of the language model."}
    )
    vision_model_revision: str | None = field(default=None, metadata={"help": "Commit of the vision encoder."})
    text_model_revision: str | None = field(default=None, metadata={"help": "Commit of the language model."})
    vision_model_id: str | None = field(
        default=None, metadata={"help": "Hub id of the vision encoder, if --vision_model is a local copy."}
    )
    text_model_id: str | None = field(
        default=None, metadata={"help": "Hub id of the language model, if --text_model is a local copy."}
    )
    chat_template: str | None = field(
        default=None,
        metadata={
            "help": "File with a Jinja chat template in place of the tokenizer's, or `plain`: the prompt, then "
            "`Response:` on a line of its own, without a system message. It is saved with the processor."
        },
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the frozen bases. Adapters are float32."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Load the language model in 4 bits (NF4) and compute in --dtype. Needs bitsandbytes."},
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={"help": "Load the language model in 8 bits (LLM.int8), with --dtype float16. Needs bitsandbytes."},
    )


@dataclass
class DehvfTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with three more fields and other defaults: the collator makes the model's inputs,
    so no column is removed; every adapter gets a gradient at every step; a run resumes exactly; a NaN loss stops it.
    """

    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate per 256 samples, as in the paper: learning rate = this x total batch / 256."},
    )
    fuser_lr_ratio: float = field(
        default=1.0,
        metadata={"help": "Learning rate of the fuser and its query network, as a ratio to that of the other parts."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better score. Keeps the best adapters."},
    )
    resume_from_checkpoint: str | None = field(
        default="auto",
        metadata={
            "help": "auto: resume an interrupted run in --output_dir; never: replace it; or the checkpoint in "
            "--output_dir to resume from."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Keep true, so that early stopping resumes."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not used."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep false: all columns are needed."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not used."})
    hub_strategy: str = field(default="end", metadata={"help": "Keep: adapters are pushed once, with their results."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "tensorboard, trackio, ..."})
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "Train on the CPU."})


def adapter_arguments() -> type:
    """The numbers and switches of `DehvfConfig` as a dataclass: their defaults and descriptions stand there alone."""
    own = {name: hint for name, hint in DehvfConfig.__annotations__.items() if "model_" not in name}
    for name in ("vision_config", "text_config", "tie_word_embeddings", "merged_base"):
        del own[name]
    descriptions = describe_fields(DehvfConfig.__doc__)
    return dataclasses.make_dataclass(
        "AdapterArguments",
        [
            (
                name,
                float if hint == float | int else hint,  # argparse calls the type
                field(default=getattr(DehvfConfig, name), metadata={"help": descriptions[name]}),
            )
            for name, hint in own.items()
        ],
    )


def describe_fields(docstring: str) -> dict[str, str]:
    """The text of each field in a docstring with entries of the form "name (type): text"."""
    entry = r"^ *(\w+(?:, \w+)*) \(`[^)]*\):(.*?)(?=^ *\w+(?:, \w+)* \(`|^ *$|\Z)"
    found = re.findall(entry, docstring, re.MULTILINE | re.DOTALL)
    texts = {name: " ".join(text.split()).replace("%", "%%") for names, text in found for name in names.split(", ")}
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Reading
# ---------------------------------------------------------------------------------------------------------------------


def parse_arguments(arguments: list[str]):
    """
    Reads `[recipe.yaml] [--flag value ...]`. Flags override the recipe.

    Returns:
        The recipe, and an object of each dataclass: data, model, adapters, baselines, training.

    Raises:
        ValueError: as [`read_command`]; or if a flag contradicts `--method`.
        SystemExit: if a value has the wrong type or is none of the choices.
    """
    parser = HfArgumentParser(
        [DataArguments, ModelArguments, adapter_arguments(), BaselineArguments, DehvfTrainingArguments],
        description=DESCRIPTION,
        usage="accelerate launch train.py [recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
    )
    recipe, values, flags = read_command(arguments)
    if "learning_rate" in flags:
        values.pop("base_learning_rate", None)
    words = [f"--output_dir=outputs/{recipe.stem}"]
    for name, value in values.items():
        elements = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        words += [f"--{name}", *map(str, elements)]
    given = arguments if not arguments or arguments[0].startswith("-") else arguments[1:]
    parsed = parser.parse_args_into_dataclasses([*words, *given], look_for_args_file=False)
    _, model_args, adapter_args, _, _ = parsed
    if "adapter" in flags:  # the config of the adapters names their bases, the recipe's are for new adapters
        for name in ("vision_model", "text_model"):
            if name not in flags:
                setattr(model_args, name, None)
    set_method(model_args, adapter_args, flags)
    return recipe, *parsed


def set_method(model_args, adapter_args, flags: Collection[str]):
    """Sets the values of `DehvfConfig` that `--method` stands for. Raises `ValueError` if another was given."""
    for name, value in DEHVF_METHODS.get(model_args.method, {}).items():
        given = getattr(adapter_args, name)
        if given != value and (name in flags or given != getattr(DehvfConfig, name)):
            raise ValueError(
                f"`--method {model_args.method}` means `--{name} {value}`, but `{given}` was given. Remove one."
            )
        setattr(adapter_args, name, value)


def complete_arguments(task, data_args, training_args):
    """Sets what follows from other arguments."""
    if training_args.base_learning_rate is not None:
        batches = training_args.gradient_accumulation_steps * training_args.world_size
        batch_size = training_args.per_device_train_batch_size * batches
        training_args.learning_rate = training_args.base_learning_rate * batch_size / 256
    if data_args.streaming:  # accelerate cannot split a batch without images like one with images
        training_args.accelerator_config.dispatch_batches = False
    if training_args.load_best_model_at_end and training_args.metric_for_best_model in (None, "loss"):
        training_args.metric_for_best_model, training_args.greater_is_better = task.CARD["score"], True


# ---------------------------------------------------------------------------------------------------------------------
# Checks
# ---------------------------------------------------------------------------------------------------------------------


def check_arguments(flags: list[str], data_args, model_args, adapter_args, training_args):
    """
    Raises `ValueError` for arguments that exclude each other, which would fail late or have no effect.

    Args:
        flags: the words of the command.
    """
    given = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in flags if word.startswith("--")}
    method, is_baseline = model_args.method, model_args.method in BASELINES
    if {"learning_rate", "base_learning_rate"} <= given:
        raise ValueError("`--learning_rate` and `--base_learning_rate` were both given. Remove one of them.")
    if training_args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        raise ValueError(
            "`--early_stopping_patience` needs `--load_best_model_at_end true` and the same `--eval_strategy` and "
            "`--save_strategy`, `epoch` or `steps`."
        )
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(
            "`--streaming` needs `--max_steps`, since the number of rows is unknown: rows x epochs / total batch size."
        )
    if is_baseline and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            f"`--method {method}` does not support `--load_in_4bit` and `--load_in_8bit`. Remove one of them."
        )
    if model_args.adapter is not None:
        own = ["method"] if method != "dehvf" else sorted(given & {*vars(adapter_args), "chat_template"})
        if own:
            raise ValueError(
                f"`--{own[0]}` was given with `--adapter {model_args.adapter}`, which defines it itself. Remove one."
            )
    check_engine(is_baseline, method, training_args)
    if training_args.push_to_hub:
        check_push(model_args, training_args)


def check_engine(is_baseline: bool, method: str, training_args):
    """Raises `ValueError` for what DeepSpeed or FSDP cannot do."""
    engine = name_engine(training_args)
    if training_args.num_train_epochs <= 0 and engine not in (ENGINE_OF_ONE, "DeepSpeed ZeRO-3"):
        raise ValueError(
            f"`--num_train_epochs 0` only evaluates, which {engine} does not support. Use a single process or DDP, "
            "or `--deepspeed launch/zero3.json` for bases that do not fit on one device."
        )
    if is_baseline and engine in ("FSDP", "DeepSpeed ZeRO-3"):
        raise ValueError(
            f"`--method {method}` does not support {engine}, which shards the bases. Use DDP, or `--deepspeed "
            "ds_config.json` (ZeRO-2)."
        )
    halves = [flag for flag in ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval") if getattr(training_args, flag)]
    if halves and training_args.deepspeed_plugin is not None:
        dtype = "bfloat16" if halves[0].startswith("bf16") else "float16"
        raise ValueError(
            f"`--{halves[0]}` was given with `--deepspeed`, which would cast the adapters to {dtype} and lose their "
            f"small updates. Use `--dtype {dtype}` instead: it casts the frozen bases, and adapters stay float32."
        )


def check_push(model_args, training_args):
    """Raises `ValueError` for adapters that others could not load from the Hub."""
    if training_args.hub_strategy != "end":
        raise ValueError(
            f"`--hub_strategy {training_args.hub_strategy.value}` is not supported: adapters are pushed once, with "
            "their results. Remove it."
        )
    if model_args.method in BASELINES:
        raise ValueError(
            f"`--push_to_hub` does not support `--method {model_args.method}`, which `from_pretrained` cannot load. "
            "Remove it."
        )
    places = {base: getattr(model_args, f"{base}_model") for base in BASES}
    if model_args.adapter is not None:
        config = DehvfConfig.from_pretrained(model_args.adapter, revision=model_args.adapter_revision)
        places = {base: getattr(config, f"{base}_model_id") for base in BASES}
    hub.check_hub_ids(**{base: getattr(model_args, f"{base}_model_id") or place for base, place in places.items()})
