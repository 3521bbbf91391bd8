# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The arguments of a run: their dataclasses, recipes and checks."""

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
import yaml
from transformers import HfArgumentParser, TrainingArguments

from baselines import METHODS as BASELINES
from baselines import BaselineArguments
from dehvf import DehvfConfig
from dehvf import modeling as hub
from tasks import NAMES
from training.engines import ENGINE_OF_ONE, name_engine


ROOT = Path(__file__).parents[1]
DEFAULT_RECIPE = ROOT / "recipes" / "digits.yaml"
KEYS = ("vision", "text")  # how the bases are told apart in names of arguments
# What `--method` says -> values of `DehvfConfig`. The baselines that are no case of DEHVF stand in `baselines/`.
DEHVF_METHODS = {
    "dehvf": {},
    "memvp": {"layer_fusion": "penultimate"},
    "igva": {"fuser_query": "instruction"},
    "layer+instruction": {"fuser_query": "layer+instruction"},
}


@dataclass
class DataArguments:
    """What is learned."""

    task: Literal[NAMES] = field(default="digits", metadata={"help": "File in tasks/ that reads and scores the data."})
    data_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the data, if not the task's own."}
    )
    max_prompt_length: int = field(
        default=512, metadata={"help": "Longest prompt in tokens. A longer one loses the end of its context."}
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Take so many rows of each split, for a quick try: the first (digits: a shorter course)."},
    )
    only_images: bool = field(default=False, metadata={"help": "Leave rows without an image out of the train split."})
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the train split as it comes, without a copy on disk. Needs --max_steps."},
    )


@dataclass
class ModelArguments:
    """The method and the frozen bases."""

    method: Literal[(*DEHVF_METHODS, *BASELINES)] = field(
        default="dehvf", metadata={"help": "What is trained: DEHVF, a setting of it, or a baseline of the paper."}
    )
    adapter: str | None = field(
        default=None,
        metadata={
            "help": "Hub id or folder of DEHVF adapters to start from, with their own config; "
            "--num_train_epochs 0 evaluates them as they are."
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
        default=None, metadata={"help": "Hub id of the vision encoder, if --vision_model is a folder with a copy."}
    )
    text_model_id: str | None = field(
        default=None, metadata={"help": "Hub id of the language model, if --text_model is a folder with a copy."}
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the frozen bases; adapters are float32."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})
    load_in_4bit: bool = field(
        default=False,
        metadata={"help": "Keep the language model in 4 bits (NF4), and compute in --dtype. Needs bitsandbytes."},
    )
    load_in_8bit: bool = field(
        default=False,
        metadata={
            "help": "Keep the language model in 8 bits (LLM.int8; --dtype float16 suits it). Needs bitsandbytes."
        },
    )


def adapter_arguments() -> type:
    """The numbers and switches of `DehvfConfig` as a dataclass, so that each default stands there alone."""
    own = {name: hint for name, hint in DehvfConfig.__annotations__.items() if "model_" not in name}
    for name in ("vision_config", "text_config", "tie_word_embeddings", "merged_base"):
        del own[name]
    help_text = {"help": f"See {DehvfConfig.__name__}."}
    return dataclasses.make_dataclass(
        "AdapterArguments",
        [
            (
                name,
                float if hint == float | int else hint,
                field(default=getattr(DehvfConfig, name), metadata=help_text),
            )
            for name, hint in own.items()
        ],
    )


@dataclass
class DehvfTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` and two more. Other defaults than there: `remove_unused_columns` (the collator
    makes the model's inputs), `ddp_find_unused_parameters` (each adapter gets a gradient at each step), `report_to`,
    `use_cpu`, true where there is nothing else, and those that let a run go on as if it had not been cut off.
    `logging_nan_inf_filter` is off, since a loss that is no number stops the run. `hub_strategy` has one value alone.
    """

    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate per 256 samples, the paper's convention: rate x total batch / 256."},
    )
    early_stopping_patience: int | None = field(
        default=None,
        metadata={"help": "Stop after so many evaluations in a row without a better score. Keeps the best adapters."},
    )
    resume_from_checkpoint: str | None = field(
        default="auto",
        metadata={
            "help": "auto: go on with a run in --output_dir that was cut off; never: replace it; or one of its "
            "checkpoints to go on from."
        },
    )
    restore_callback_states_from_checkpoint: bool = field(
        default=True, metadata={"help": "Keep true: early stopping counts on where it was."}
    )
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "Not needed."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep false: rows are needed whole."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not needed."})
    hub_strategy: str = field(default="end", metadata={"help": "Keep: adapters are pushed once, with their results."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "tensorboard, trackio, ..."})
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "Train on the CPU."})


def parse_arguments(arguments: list[str]):
    """Reads `[recipe.yaml] [--flag value ...]`. Flags override the recipe; an unknown key ends the run."""
    parser = HfArgumentParser(
        [DataArguments, ModelArguments, adapter_arguments(), BaselineArguments, DehvfTrainingArguments],
        description=__doc__,
        usage="accelerate launch train.py [recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
    )
    recipe = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    flags = ["--output_dir", f"outputs/{recipe.stem}"]
    values = read_recipe(recipe)
    if "--learning_rate" in arguments:
        values.pop("base_learning_rate", None)
    for key, value in values.items():
        if f"--{key}" not in parser._option_string_actions:
            known = [name.removeprefix("--") for name in parser._option_string_actions]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else " `train.py --help` lists all."
            raise ValueError(f"{recipe}: unknown key `{key}`.{hint}")
        words = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *map(str, words)]
    parsed = parser.parse_args_into_dataclasses([*flags, *arguments], look_for_args_file=False)
    _, model_args, adapter_args, _, _ = parsed
    if "--adapter" in arguments:  # their config names their bases, and a recipe's are those of other adapters
        for name in ("vision_model", "text_model"):
            if f"--{name}" not in arguments:
                setattr(model_args, name, None)
    for name, value in DEHVF_METHODS.get(model_args.method, {}).items():
        if getattr(adapter_args, name) not in (value, type(adapter_args)().__dict__[name]):
            raise ValueError(
                f"`--method {model_args.method}` means `--{name} {value}`, but `{getattr(adapter_args, name)}` was "
                "given. Leave one of them out."
            )
        setattr(adapter_args, name, value)
    return recipe, *parsed


def read_recipe(recipe: Path) -> dict:
    """The values of a recipe, on top of those of its `base`; a `null` takes one of these back."""
    if not recipe.is_file():
        raise ValueError(f"There is no recipe {recipe}. There are: {', '.join(map(str, recipes()))}.")
    values = yaml.safe_load(recipe.read_text()) or {}
    base = values.pop("base", None)
    values = values if base is None else read_recipe(recipe.parent / base) | values
    return {name: value for name, value in values.items() if value is not None}


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.yaml"))


def check_arguments(flags: list[str], data_args, model_args, adapter_args, training_args):
    """What would otherwise come out late, or never."""
    if training_args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        raise ValueError(
            "`--early_stopping_patience` waits for a better score on the validation split, so it needs "
            "`--load_best_model_at_end true` and, for both, `--eval_strategy epoch --save_strategy epoch` or `steps`."
        )
    given = {flag.removeprefix("--").split("=")[0] for flag in flags if flag.startswith("--")}
    if {"learning_rate", "base_learning_rate"} <= given:
        raise ValueError("`--learning_rate` and `--base_learning_rate` were given. Leave one of them out.")
    plugin = training_args.deepspeed_plugin
    engine = name_engine(training_args)
    if training_args.num_train_epochs <= 0 and engine not in (ENGINE_OF_ONE, "DeepSpeed ZeRO-3"):
        raise ValueError(
            f"`--num_train_epochs 0` only evaluates, which {engine} cannot. Leave it out, or take ZeRO-3 where a base "
            "has to be divided: `--deepspeed launch/zero3.json`."
        )
    if model_args.method in BASELINES and engine in ("FSDP", "DeepSpeed ZeRO-3"):
        raise ValueError(
            f"`--method {model_args.method}` was given, but {engine} divides the bases, which the baselines do not "
            "support. Take DDP, or `--deepspeed ds_config.json` (ZeRO-2)."
        )
    if training_args.save_on_each_node:
        raise ValueError(
            "`--save_on_each_node` was given, but all machines see one `--output_dir`, into which one process writes. "
            "Leave it out."
        )
    flags_of_half = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")
    for flag in (flag for flag in flags_of_half if plugin is not None and getattr(training_args, flag)):
        dtype = "bfloat16" if flag.startswith("bf16") else "float16"
        raise ValueError(
            f"`--{flag}` and `--deepspeed` were given, but DeepSpeed casts the adapters too, whose small steps are "
            f"lost in {dtype}. Leave `--{flag}` out: `--dtype {dtype}` loads the frozen bases in half precision, "
            "and the adapters stay float32."
        )
    if data_args.streaming and training_args.max_steps <= 0:
        raise ValueError(
            "A stream does not tell how many rows it has, so `--streaming` needs `--max_steps`: rows x epochs / batch."
        )
    if model_args.method in BASELINES and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            "`--load_in_4bit` and `--load_in_8bit` go with DEHVF and its settings, but `--method "
            f"{model_args.method}` was given beside it. Leave one of them out."
        )
    if model_args.adapter is not None and model_args.method != "dehvf":
        raise ValueError(
            f"`--adapter` takes DEHVF adapters, whose config says which setting they are; `--method "
            f"{model_args.method}` was given beside it. Leave one of them out."
        )
    if model_args.adapter is not None and (own := sorted(given & vars(adapter_args).keys())):
        raise ValueError(
            f"The config of `--adapter {model_args.adapter}` says what it is, and `--{own[0]}` was given beside it. "
            "Leave it out."
        )
    if training_args.push_to_hub:
        check_push(model_args, training_args)


def check_push(model_args, training_args):
    """What the Hub, or those who read there, would refuse after training."""
    if training_args.hub_strategy != "end":
        raise ValueError(
            f"`--hub_strategy {training_args.hub_strategy.value}` was given, but adapters are pushed once, with their "
            "results. Leave it out."
        )
    if model_args.method in BASELINES:
        raise ValueError(
            f"`--push_to_hub` is for adapters that `from_pretrained` loads, which those of `--method "
            f"{model_args.method}` are not. Leave it out."
        )
    places = {key: getattr(model_args, f"{key}_model") for key in KEYS}
    if model_args.adapter is not None:
        config = DehvfConfig.from_pretrained(model_args.adapter, revision=model_args.adapter_revision)
        places = {key: getattr(config, f"{key}_model_id") for key in KEYS}
    hub.check_hub_ids(**{key: getattr(model_args, f"{key}_model_id") or place for key, place in places.items()})


def complete_arguments(task, data_args, training_args):
    """Sets what follows from other arguments."""
    if training_args.base_learning_rate is not None:
        devices = training_args.gradient_accumulation_steps * training_args.world_size
        batch_size = training_args.per_device_train_batch_size * devices
        training_args.learning_rate = training_args.base_learning_rate * batch_size / 256
    if data_args.streaming:  # a batch without images cannot be cut into parts beside one with them
        training_args.accelerator_config.dispatch_batches = False
    if training_args.load_best_model_at_end and training_args.metric_for_best_model in (None, "loss"):
        training_args.metric_for_best_model, training_args.greater_is_better = task.CARD["score"], True
