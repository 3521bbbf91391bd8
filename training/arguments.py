# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The arguments of `train.py`: their dataclasses, how they are parsed, and the checks before anything is loaded.

`python -m training.arguments` writes docs/flags.txt, which lists them.
"""

import dataclasses
import json
import math
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentTypeError
from collections.abc import Collection
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Literal, get_args

import torch
from transformers import HfArgumentParser, TrainingArguments, get_scheduler
from transformers.hf_argparser import HfArg
from transformers.trainer_pt_utils import AcceleratorConfig

from baselines import METHODS as BASELINES
from baselines import BaselineArguments
from dehvf import DehvfConfig, hub
from tasks import NAMES
from training.engines import ENGINE_OF_ONE, name_engine, name_precision
from training.flags import HELP_FILE, check_has_commits, find_recipe, read_command, read_yaml, without_partners


DESCRIPTION = (
    "Trains adapters on frozen bases, evaluates them on the test split and saves them with a model card. The values "
    "of the recipe, recipes/digits.yaml if none is given, replace the defaults below."
)
BASES = ("vision", "text")
# `--method` -> values of `DehvfConfig`. The methods in `baselines/` are not variants of DEHVF.
DEHVF_METHODS = {
    "dehvf": {},
    "memvp": {"layer_fusion": "penultimate"},
    "dehvf-instruction": {"fuser_query": "instruction"},
    "layer+instruction": {"fuser_query": "layer+instruction"},
}
# Schedules whose learning rate depends on a score of the validation split
SCORE_SCHEDULES = ("reduce_lr_on_plateau", "greedy")


# --- dataclasses ---


@dataclass
class DataArguments:
    """The task and its data."""

    task: Literal[NAMES] = HfArg(
        default="digits", help="Name of a file in tasks/, which reads the data and scores the answers."
    )
    data_path: str | None = HfArg(
        default=None, help="Hub id, folder or file of the data, for tasks without a default."
    )
    columns: str | None = HfArg(
        default=None,
        help="Columns of your own data that have other names: question=prompt,answer=label. Use `image=none` for data "
        "without images.",
    )
    holdout: float | None = HfArg(
        default=None,
        help="Fraction of your own train split, such as 0.05, to use as the test split if there is none; as many rows "
        "become the validation split if there is none. The rows are the same in every run, and those that share "
        "an image are in one split.",
    )
    captions: str | None = HfArg(
        default=None,
        help='scienceqa: file with captions of the images, {"captions": {"<number>": "<text>"}}, which are added to '
        "the context in evaluation.",
    )
    max_prompt_length: int = HfArg(
        default=512, help="Maximum number of tokens of a prompt. In longer ones the end of the context is removed."
    )
    max_new_tokens: int | None = HfArg(
        default=None, help="Maximum number of tokens of an answer in evaluation. Tasks have defaults."
    )
    max_samples: int | None = HfArg(
        default=None, help="Use only the first rows of each split (digits: smaller splits), for a quick test."
    )
    only_images: bool = HfArg(default=False, help="Remove rows without an image from the train split.")
    streaming: bool = HfArg(
        default=False, help="Read the train split row by row, without a copy on disk. Needs --max_steps."
    )


@dataclass
class ModelArguments:
    """The method and the frozen bases."""

    method: Literal[(*DEHVF_METHODS, *BASELINES)] = HfArg(
        default="dehvf", help="The method to train: DEHVF, a variant of it, or a baseline."
    )
    adapter: str | None = HfArg(
        default=None,
        help="Hub id or folder of DEHVF adapters to start from, with their config, or folder of the baseline that "
        "--method names. Use --num_train_epochs 0 to evaluate them without training.",
    )
    adapter_revision: str | None = HfArg(default=None, help="Commit of the adapters.")
    vision_model: str | None = HfArg(
        default="openai/clip-vit-large-patch14", help="Hub id or folder of the vision encoder."
    )
    text_model: str | None = HfArg(default="huggyllama/llama-7b", help="Hub id or folder of the language model.")
    vision_model_revision: str | None = HfArg(default=None, help="Commit of the vision encoder.")
    text_model_revision: str | None = HfArg(default=None, help="Commit of the language model.")
    vision_model_id: str | None = HfArg(
        default=None, help="Hub id of the vision encoder, if --vision_model is a local copy."
    )
    text_model_id: str | None = HfArg(
        default=None, help="Hub id of the language model, if --text_model is a local copy."
    )
    chat_template: str | None = HfArg(
        default=None,
        help="File with a Jinja chat template that replaces the tokenizer's, or `plain`: the prompt, then `Response:` "
        "on a separate line, without a system message. It is saved with the processor.",
    )
    image_fit: Literal["crop", "squash", "pad"] | None = HfArg(
        default=None,
        help="How to make an image square: `crop` its centre, `squash` it, or `pad` it with the mean colour. By "
        "default the image processor of the encoder decides. It is saved with the processor.",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = HfArg(
        default="auto", help="dtype of the frozen bases. Adapters are float32."
    )
    attn_implementation: str | None = HfArg(default=None, help="eager, sdpa, flash_attention_2, ...")
    load_in_4bit: bool = HfArg(
        default=False, help="Load the language model in 4 bits (NF4) and compute in --dtype. Needs bitsandbytes."
    )
    load_in_8bit: bool = HfArg(
        default=False, help="Load the language model in 8 bits (LLM.int8), with --dtype float16. Needs bitsandbytes."
    )


@dataclass
class DehvfTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` with three more fields and other defaults: the collator makes the model's inputs,
    so no column is removed; every adapter gets a gradient at every step; a run resumes exactly; a NaN loss stops it.
    [`check_training_arguments`] refuses arguments that would have no effect or a wrong one.
    """

    output_dir: str | None = HfArg(  # `%(default).0s` hides the default
        default=None, help="Folder of the run. By default outputs/ and the name of the recipe.%(default).0s"
    )
    base_learning_rate: float | None = HfArg(
        default=None, help="Learning rate per 256 samples, as in the paper: learning rate = this x total batch / 256."
    )
    fuser_lr_ratio: float = HfArg(
        default=0.1,
        help="Learning rate of the fuser and its query network, as a ratio to that of the other parts (ours: at 1 the "
        "fusion weights became constant in some runs).",
    )
    early_stopping_patience: int | None = HfArg(
        default=None, help="Stop after this number of evaluations without a better score, and keep the best adapters."
    )
    metric_for_best_model: str | None = HfArg(
        default="score", help="`score` (as in the model card), another score of the task, or eval_loss."
    )
    # The help texts of flags that must keep their values are those of `KEPT`
    do_train: bool = True
    do_predict: bool = True
    do_eval: bool = HfArg(default=False, help="Not supported: `--eval_strategy` evaluates the validation split.")
    resume_from_checkpoint: str | None = HfArg(
        default="auto",
        help="`auto`: resume an interrupted run in --output_dir; `never`: replace it; or the path of a checkpoint in "
        "--output_dir to resume from.",
    )
    restore_callback_states_from_checkpoint: bool = True
    logging_nan_inf_filter: bool = False
    remove_unused_columns: bool = False
    ddp_find_unused_parameters: bool | None = HfArg(
        default=False, help="Keep false: every trained parameter gets a gradient at every step."
    )
    hub_strategy: str = "end"
    report_to: None | str | list[str] = HfArg(
        default="none", help="tensorboard, trackio, ..., or several, separated by commas."
    )
    use_cpu: bool = HfArg(  # the default depends on the machine
        default=not torch.accelerator.is_available(),
        help="Train on the CPU. By default true if there is no accelerator.%(default).0s",
    )

    def __post_init__(self):
        if isinstance(self.report_to, str):
            self.report_to = self.report_to.split(",")
        super().__post_init__()


def adapter_arguments() -> type:
    """The fields of `DehvfConfig` as a dataclass. Their defaults and descriptions are taken from `DehvfConfig`."""
    own = {name: hint for name, hint in DehvfConfig.__annotations__.items() if "model_" not in name}
    for name in ("vision_config", "text_config", "tie_word_embeddings", "merged_base"):
        del own[name]
    descriptions = describe_fields(DehvfConfig.__doc__)
    # What argparse calls to read a value
    readers = {float | int: float, DehvfConfig.__annotations__["layer_mapping"]: read_layer_mapping}
    fields = [
        (name, readers.get(hint, hint), HfArg(default=getattr(DehvfConfig, name), help=descriptions[name]))
        for name, hint in own.items()
    ]
    return dataclasses.make_dataclass("AdapterArguments", fields)


def read_layer_mapping(text: str) -> str | list:
    """Reads `hierarchical`, `random` or a JSON list of lists."""
    if text in (names := get_args(get_args(DehvfConfig.__annotations__["layer_mapping"])[0])):
        return text
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ArgumentTypeError(
            f"{text!r} is neither {' nor '.join(names)} nor JSON. Give one of these, or lists such as '[[0, 1], "
            "[2]]', one for each language layer."
        ) from error


def describe_fields(docstring: str) -> dict[str, str]:
    """The text of each field in a docstring with entries of the form "name (type): text"."""
    entry = r"^ *(\w+(?:, \w+)*) \(`[^)]*\):(.*?)(?=^ *\w+(?:, \w+)* \(`|^ *$|\Z)"
    found = re.findall(entry, docstring, re.MULTILINE | re.DOTALL)
    texts = {name: " ".join(text.split()).replace("%", "%%") for names, text in found for name in names.split(", ")}
    return {name: text[0].upper() + text[1:] for name, text in texts.items()}


# --- reading ---


def make_parser() -> HfArgumentParser:
    parser = HfArgumentParser(
        [DataArguments, ModelArguments, adapter_arguments(), BaselineArguments, DehvfTrainingArguments],
        description=DESCRIPTION,
        usage="accelerate launch train.py [recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
    )
    for action in parser._actions:
        if action.dest in KEPT:
            action.help = f"Keep the default: {KEPT[action.dest][1]}."
    return parser


def make_help() -> str:
    """The content of `HELP_FILE`."""
    parser = make_parser()
    parser.formatter_class = partial(ArgumentDefaultsHelpFormatter, width=80)
    python = ".".join(map(str, sys.version_info[:2]))  # whose versions format help differently
    title = f"`train.py --help` with Python {python} and transformers {version('transformers')}"
    return f"{title}\n\n{parser.format_help()}"


def parse_arguments(arguments: list[str]):
    """
    Reads `[recipe.yaml] [--flag value ...]`. Flags override the recipe.

    Returns:
        The recipe, and an object of each dataclass: data, model, adapters, baselines, training.

    Raises:
        ValueError: as in [`read_command`]; or if a flag has too many values, or contradicts `--method`.
        SystemExit: if a value has the wrong type or is none of the choices.
    """
    parser = make_parser()
    recipe, values, flags = read_command(arguments)
    values = without_adapter_values(without_partners(values, flags), flags)
    words = [f"--output_dir=outputs/{recipe.stem}"]
    for name, value in values.items():
        if isinstance(value, dict) and name == "columns":
            value = [f"{field}={'none' if column is None else column}" for field, column in value.items()]
        if isinstance(value, dict) or isinstance(value, list) and name == "layer_mapping":
            value = json.dumps(value)
        elif isinstance(value, list) and name in ("columns", "report_to"):
            value = ",".join(map(str, value)) or ("none" if name == "report_to" else [])
        elements = value if isinstance(value, list) else [value]
        words += [f"--{name}", *map(str, elements)] if elements else []
    given = arguments[1:] if find_recipe(arguments) else arguments
    words += given
    try:
        *parsed, unused = parser.parse_args_into_dataclasses(
            words, return_remaining_strings=True, look_for_args_file=False
        )
    except json.JSONDecodeError as error:  # of the fields that are dicts
        raise ValueError(
            f"{error.doc!r} is not valid JSON ({error.msg}). Write names and texts in double quotes, such as "
            "'{\"min_lr\": 1e-5}'. The file of `--deepspeed` must not have comments."
        ) from error
    if unused and re.match("--?[a-z]", unused[0]):  # such as `--no_name` of a flag that is false by default
        raise ValueError(f"The command: unknown argument `{unused[0]}`. `train.py --help` lists all arguments.")
    if unused:
        takes_none = re.compile("--no[_-]").match
        follows_value = (not before.startswith("--") or "=" in before or takes_none(before) for before in words)
        end = next(number for number, is_free in enumerate(follows_value, 1) if is_free and words[number] == unused[0])
        flag = next(word for word in reversed(words[:end]) if word.startswith("--")).partition("=")[0]
        extra = " ".join(map(repr, unused))
        if takes_none(flag):
            raise ValueError(f"`{flag}` takes no value. Remove {extra}.")
        raise ValueError(f"`{flag}` takes one value. Remove {extra}, or put a value with spaces in quotes.")
    _, model_args, adapter_args, _, _ = parsed
    if model_args.adapter is not None and model_args.method not in BASELINES:
        # The config of the adapters contains their bases. The bases in a recipe are for new adapters, or for adapters
        # that the recipe names
        named = flags if "adapter" in flags else {**values, **flags}
        for name in ("vision_model", "text_model"):
            if name not in named:
                setattr(model_args, name, None)
    set_method(model_args, adapter_args, flags)
    return recipe, *parsed


def without_adapter_values(values: dict, flags: Collection[str]) -> dict:
    """
    Values of a recipe without those that the adapters of a command define, since these values are for new adapters. A
    baseline has to be named with its sizes, and `max_images` may be increased.
    """
    if "adapter" not in flags:
        return values
    defined = {field.name for field in dataclasses.fields(adapter_arguments())} | {"chat_template", "image_fit"}
    defined.remove("max_images")
    if values.get("method") in BASELINES:
        defined.remove("image_size")
    elif values.get("method") in DEHVF_METHODS:
        defined.add("method")
    return {name: value for name, value in values.items() if name not in defined}


def set_method(model_args, adapter_args, flags: Collection[str]):
    """Sets the values of `DehvfConfig` for `--method`. Raises `ValueError` if another value was given."""
    for name, value in DEHVF_METHODS.get(model_args.method, {}).items():
        given = getattr(adapter_args, name)
        if given != value and (name in flags or given != getattr(DehvfConfig, name)):
            raise ValueError(
                f"`--method {model_args.method}` means `--{name} {value}`, but `{given}` was given. Remove one."
            )
        setattr(adapter_args, name, value)


def complete_arguments(task, data_args, training_args):
    """Sets arguments that follow from others. Raises `ValueError` as [`check_schedule`]."""
    if training_args.base_learning_rate is not None:
        batches = training_args.gradient_accumulation_steps * training_args.world_size
        batch_size = training_args.per_device_train_batch_size * batches
        training_args.learning_rate = training_args.base_learning_rate * batch_size / 256
    if data_args.max_new_tokens is None:
        data_args.max_new_tokens = task.MAX_NEW_TOKENS
    if data_args.streaming:  # accelerate cannot split batches with and without images in the same way
        training_args.accelerator_config.dispatch_batches = False
    follows_score = training_args.lr_scheduler_type in SCORE_SCHEDULES
    if training_args.metric_for_best_model == "score":
        if training_args.load_best_model_at_end or training_args.save_strategy == "best" or follows_score:
            training_args.metric_for_best_model = task.CARD["score"]
        else:
            training_args.metric_for_best_model = training_args.greater_is_better = None
    if follows_score:  # these two schedules would treat a higher score as worse
        mode = {"mode": "max" if training_args.greater_is_better else "min"}
        training_args.lr_scheduler_kwargs = mode | (training_args.lr_scheduler_kwargs or {})
    check_schedule(training_args)


# --- checks ---

# Optimizers, and the `--optim_args` that each of them reads
OPTIMIZERS = {
    **{"adamw_torch": (), "adamw_torch_fused": (), "adafactor": (), "sgd": ("momentum", "dampening", "nesterov")},
    **{"adagrad": ("lr_decay", "eps"), "rmsprop": ("momentum", "alpha", "eps", "centered")},
}
# Fields of `TrainingArguments` that must keep a value, and why
KEPT = {
    "accelerator_config": (AcceleratorConfig(), "the learning rate and resuming depend on how rows are distributed"),
    "auto_find_batch_size": (False, "the learning rate and the checkpoints depend on the batch size"),
    "batch_eval_metrics": (False, "the task scores the whole split at once"),
    "bf16_full_eval": (False, "it would cast the adapters too; `--dtype bfloat16` casts the frozen bases alone"),
    "dataloader_in_order": (True, "a run whose rows are in another order each time cannot be resumed"),
    "debug": ([], "a loss or gradient that is NaN or Inf stops the run anyway, and names the rows"),
    "do_predict": (True, "the test split is always evaluated"),
    "do_train": (True, "`--num_train_epochs 0` evaluates without training"),
    "eval_do_concat_batches": (True, "the task scores the whole split at once"),
    "eval_use_gather_object": (False, "answers are gathered as tensors"),
    "fp16_full_eval": (False, "it would cast the adapters too; `--dtype float16` casts the frozen bases alone"),
    "hub_always_push": (False, "adapters are pushed once, with their results"),
    "hub_strategy": ("end", "adapters are pushed once, with their results"),
    "include_for_metrics": ([], "the scores of a task depend on the answers only"),
    "label_names": (None, "the labels are always `labels`"),
    "length_column_name": ("length", "lengths are counted in tokens"),
    "liger_kernel_config": (None, "Liger kernels support certain model types only, and `dehvf` is not one of them"),
    "logging_nan_inf_filter": (False, "a loss that is NaN or Inf stops the run"),
    "optim_target_modules": (None, "no supported optimizer reads it"),
    "parallelism_config": (None, "frozen bases are sharded by DeepSpeed ZeRO-3 or FSDP2"),
    "prediction_loss_only": (False, "evaluation generates answers and computes no loss"),
    "remove_unused_columns": (False, "the collator needs all columns"),
    "restore_callback_states_from_checkpoint": (True, "a resumed run would forget when its score last improved"),
    "use_cache": (False, "training reads whole rows, and generation always uses a cache"),
    "use_liger_kernel": (False, "Liger kernels support certain model types only, and `dehvf` is not one of them"),
}
# The lowest value of numbers for which a lower one would fail late or have another meaning
LOWEST = {
    **dict.fromkeys(("learning_rate", "base_learning_rate", "fuser_lr_ratio", "weight_decay", "max_grad_norm"), 0),
    **dict.fromkeys(
        ("num_train_epochs", "warmup_steps", "eval_delay", "label_smoothing_factor", "seed", "data_seed"), 0
    ),
    **dict.fromkeys(("neftune_noise_alpha", "dataloader_num_workers", "adam_beta1", "adam_beta2", "adam_epsilon"), 0),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"), 1),
    **dict.fromkeys(("save_total_limit", "eval_accumulation_steps", "early_stopping_patience"), 1),
}


def check_arguments(flags: list[str], data_args, model_args, adapter_args, training_args):
    """
    Raises `ValueError` for arguments that exclude each other, would fail late or have no effect.

    Args:
        flags: the words of the command. The keys of a recipe that is named there count as flags, those of its base do
            not.
    """
    of_command = {word.removeprefix("--").split("=")[0].replace("-", "_") for word in flags if word.startswith("--")}
    given, values = of_command, {}
    if recipe := find_recipe(flags):
        values = without_adapter_values(without_partners(read_yaml(recipe), given), given)
        given = given | {name for name, value in values.items() if value is not None}
    # A command may override what a key of its recipe needs
    check_ignored(of_command, model_args, adapter_args, training_args)
    method, is_baseline = model_args.method, model_args.method in BASELINES
    check_training_arguments(given, training_args)
    for name in ("max_prompt_length", "max_new_tokens", "max_samples"):
        if (value := getattr(data_args, name)) is not None and value < 1:
            raise ValueError(f"`--{name} {value}` was given. It must be at least 1.")
    if {"learning_rate", "base_learning_rate"} <= given:
        raise ValueError("`--learning_rate` and `--base_learning_rate` were both given. Remove one of them.")
    if training_args.early_stopping_patience is not None and not training_args.load_best_model_at_end:
        raise ValueError(
            "`--early_stopping_patience` needs `--load_best_model_at_end true` and the same `--eval_strategy` and "
            "`--save_strategy`, `epoch` or `steps`."
        )
    if data_args.streaming and training_args.max_steps <= 0 and training_args.num_train_epochs > 0:
        raise ValueError(
            "`--streaming` needs `--max_steps`, since the number of rows is unknown. Set it to rows x epochs / total "
            "batch size."
        )
    if data_args.streaming and training_args.train_sampling_strategy == "group_by_length":
        raise ValueError(
            "`--train_sampling_strategy group_by_length` needs the lengths of all rows, and `--streaming` reads one "
            "row after another. Remove one of them."
        )
    for size in dataclasses.fields(BaselineArguments):
        readers = size.metadata["help"].partition(":")[0]
        if size.name in given and method not in readers.split(", "):
            raise ValueError(
                f"`--{size.name}` has no effect with `--method {method}`. It is for {readers}. Remove it."
            )
    if is_baseline:  # the recipe may be of another method
        of_method = given if values.get("method") == method else of_command
        of_dehvf = {*vars(adapter_args), "fuser_lr_ratio"} - {"image_size", "max_images", "image_tiles"}
        if unread := sorted(of_method & of_dehvf):
            raise ValueError(
                f"`--{unread[0]}` has no effect with `--method {method}`. It is for {', '.join(DEHVF_METHODS)}. "
                "Remove it."
            )
    if is_baseline and (model_args.load_in_4bit or model_args.load_in_8bit):
        raise ValueError(
            f"`--method {method}` does not support `--load_in_4bit` and `--load_in_8bit`. Remove one of them."
        )
    several = [name for name in ("max_images", "image_tiles") if getattr(adapter_args, name) not in (1, None)]
    if several and is_baseline and method not in ("llava", "llava-lora"):
        raise ValueError(
            f"`--method {method}` reads one image of a row, but `--{several[0]}` was given. Remove it, or use "
            "`--method` dehvf, llava or llava-lora."
        )
    if model_args.adapter is not None:
        values = {*vars(adapter_args), "chat_template", "image_fit"}
        if adapter_args.max_images > 1:  # the only value that may be increased
            values -= {"max_images"}
        if is_baseline:  # whose config is not read, but compared
            values -= {"image_size"}
        own = ["method"] if method in DEHVF_METHODS and method != "dehvf" else sorted(given & values)
        if own:
            names = " and ".join(f"`--{name}`" for name in own)
            were, them = ("was", "it") if len(own) == 1 else ("were", "them")
            where = "the command" if of_command.issuperset(own) else f"{recipe} and the command"
            raise ValueError(
                f"{names} {were} given, but `--adapter {model_args.adapter}` already defines {them}. Remove {them} "
                f"from {where}."
            )
    check_engine(is_baseline, method, training_args)
    if training_args.push_to_hub:
        check_push(model_args, training_args)


def check_training_arguments(given: Collection[str], training_args):
    """Raises `ValueError` for values of `TrainingArguments` that have no effect or a wrong one, or fail late."""
    values = vars(training_args)
    if not values["output_dir"].strip():
        raise ValueError("`--output_dir` is empty. Give the name of a folder.")
    for name, (kept, reason) in KEPT.items():
        if values[name] != kept:
            value = getattr(values[name], "value", values[name])
            raise ValueError(f"`--{name} {value}` is not supported: {reason}. Remove it.")
    for name, lowest in LOWEST.items():
        if values[name] is not None and not lowest <= values[name] < math.inf:
            raise ValueError(f"`--{name} {values[name]}` was given. It must be a finite number of at least {lowest}.")
    for name in ("label_smoothing_factor", "adam_beta1", "adam_beta2"):
        if values[name] >= 1:
            raise ValueError(f"`--{name} {values[name]}` was given. It must be below 1.")
    if values["max_steps"] < 1 and values["max_steps"] != -1:
        raise ValueError(
            f"`--max_steps {values['max_steps']}` was given. Give a positive number, or `--num_train_epochs 0` to "
            "evaluate without training."
        )
    if {"max_steps", "num_train_epochs"} <= given and values["num_train_epochs"] == 0:
        raise ValueError("`--num_train_epochs 0` does not train, so `--max_steps` has no effect. Remove one of them.")
    if values["warmup_steps"] > 1 and values["warmup_steps"] % 1:
        raise ValueError(
            f"`--warmup_steps {values['warmup_steps']}` was given. Give a whole number of steps, or a fraction "
            "of all steps below 1."
        )
    if values["train_sampling_strategy"] == "batch_rebalance":
        raise ValueError(
            "`--train_sampling_strategy batch_rebalance` is not supported: it does not read `--seed`. Use "
            "`group_by_length`."
        )
    if "do_eval" in given or values["do_eval"] != (values["eval_strategy"] != "no"):
        raise ValueError(
            "`--do_eval` is not supported: the validation split is evaluated if `--eval_strategy` is `steps` or "
            "`epoch`. Remove it."
        )
    if name_precision(training_args) == "fp16" and training_args.device.type == "cpu":
        what = "`--fp16`" if values["fp16"] else "`mixed_precision: fp16` of accelerate"
        raise ValueError(f"{what} has no effect on a CPU. Remove it, or use `--bf16 true`.")
    check_optimizer(training_args)
    check_needs(given, training_args)


def check_optimizer(training_args):
    """Raises `ValueError` for an optimizer that is not supported or does not read the given `optim_args`."""
    name = training_args.optim.value
    if name not in OPTIMIZERS:
        raise ValueError(
            f"`--optim {name}` is not supported: it is not tested, and would save little with so few trained "
            f"parameters. Use one of {', '.join(OPTIMIZERS)}."
        )
    for pair in training_args.optim_args.split(",") if training_args.optim_args else ():
        key, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(
                f"`--optim_args {training_args.optim_args}` was given. Write it as `name=value,name=value`."
            )
        if key.strip() not in OPTIMIZERS[name]:
            known = ", ".join(OPTIMIZERS[name]) or "nothing"
            raise ValueError(f"`--optim {name}` does not read `{key}` of `--optim_args`. It reads {known}.")
        if key.strip() not in ("nesterov", "centered"):
            try:
                float(value)
            except ValueError:
                given = f"`--optim_args {training_args.optim_args}` was given"
                raise ValueError(f"{given}. `{key}` must be a number.") from None


def check_schedule(training_args):
    """Raises `ValueError` if the learning rate schedule needs other `lr_scheduler_kwargs`."""
    name, kwargs = training_args.lr_scheduler_type, training_args.lr_scheduler_kwargs or {}
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=training_args.learning_rate)
    try:
        get_scheduler(name, optimizer, 1, 10, scheduler_specific_kwargs=dict(kwargs))
    except Exception as error:  # of many kinds
        raise ValueError(
            f"`--lr_scheduler_type {getattr(name, 'value', name)}` cannot be used with `--lr_scheduler_kwargs "
            f"{json.dumps(kwargs)}`: {error}. Give the values that it needs, or another schedule."
        ) from error


def check_needs(given: Collection[str], training_args):
    """Raises `ValueError` for flags that have no effect, or fail late, without another flag."""
    values, kinds = vars(training_args), ("logging", "eval", "save")
    by_steps = {kind: values[f"{kind}_strategy"] == "steps" for kind in kinds}
    for kind in kinds:
        if by_steps[kind] and not 0 < values[f"{kind}_steps"] < math.inf:
            raise ValueError(
                f"`--{kind}_steps {values[f'{kind}_steps']}` was given. Give a positive number of steps, or a "
                "fraction of all steps below 1."
            )
    evaluates = ("--eval_strategy steps` or `epoch", values["eval_strategy"] != "no")
    has_workers = ("--dataloader_num_workers 1` or more", values["dataloader_num_workers"] > 0)
    pushes = ("--push_to_hub true", values["push_to_hub"])
    needs = {
        **{  # a strategy that is given together with it is deliberate
            f"{kind}_steps": (f"--{kind}_strategy steps", by_steps[kind] or f"{kind}_strategy" in given)
            for kind in kinds
        },
        **dict.fromkeys(("eval_delay", "eval_on_start", "greater_is_better", "metric_for_best_model"), evaluates),
        "load_best_model_at_end": evaluates,
        **dict.fromkeys(("dataloader_multiprocessing_context", "dataloader_persistent_workers"), has_workers),
        **dict.fromkeys(("hub_model_id", "hub_private_repo", "hub_revision"), pushes),
        **({"save_strategy": evaluates} if values["save_strategy"] == "best" else {}),
    }
    refuse_useless(given, needs)


def refuse_useless(given: Collection[str], needs: dict[str, tuple[str, bool]]):
    """Raises `ValueError` for given flags without effect. `needs`: flag -> what it needs, and whether that is met."""
    for name, (needed, is_met) in needs.items():
        if name in given and not is_met:
            raise ValueError(f"`--{name}` has no effect without `{needed}`. Add that, or remove `--{name}`.")


def check_ignored(given: Collection[str], model_args, adapter_args, training_args):
    """Raises `ValueError` for flags of a command that have no effect with its other values."""
    saves = training_args.save_strategy != "no" or training_args.enable_jit_checkpoint
    uses_adam = "adamw" in training_args.optim.value
    needs = {
        "adapter_revision": ("--adapter", model_args.adapter is not None),
        "fsdp_config": ("--fsdp", bool(training_args.fsdp)),
        "layer_mapping_seed": ("--layer_mapping random", adapter_args.layer_mapping == "random"),
        "num_groups": ("--layer_mapping hierarchical` or `random", isinstance(adapter_args.layer_mapping, str)),
        **dict.fromkeys(("save_total_limit", "save_only_model"), ("--save_strategy steps` or `epoch", saves)),
        **dict.fromkeys(("adam_beta1", "adam_beta2", "adam_epsilon"), ("--optim adamw_torch", uses_adam)),
    }
    refuse_useless(given, needs)
    if "adapter_revision" in given:
        check_has_commits(model_args.adapter, model_args.adapter_revision, "`--adapter_revision`")
    for name in ("eval_strategy", "save_strategy"):
        if name in given and getattr(training_args, name) != "no" and training_args.num_train_epochs <= 0:
            raise ValueError(f"`--{name}` has no effect with `--num_train_epochs 0`, which does not train. Remove it.")
    schedule = training_args.lr_scheduler_type
    if "warmup_steps" in given and training_args.warmup_steps and schedule in ("constant", *SCORE_SCHEDULES):
        name = getattr(schedule, "value", schedule)
        raise ValueError(f"`--lr_scheduler_type {name}` has no warm-up. Remove `--warmup_steps`, or use another one.")


def check_engine(is_baseline: bool, method: str, training_args):
    """Raises `ValueError` for arguments that DeepSpeed or FSDP does not support."""
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
    if training_args.deepspeed_plugin is not None:
        config = training_args.deepspeed_plugin.hf_ds_config.config
        if own := [name for name in ("optimizer", "scheduler") if name in config]:
            raise ValueError(
                f"The DeepSpeed config has `{own[0]}`, but train.py makes the optimizer and the scheduler, with the "
                "learning rate of the recipe. Remove it from the config."
            )
    flags = ("bf16", "fp16", "bf16_full_eval", "fp16_full_eval")
    halves = [f"--{flag}" for flag in flags if getattr(training_args, flag)]
    if (precision := name_precision(training_args)) in ("bf16", "fp16"):
        halves.append(f"mixed_precision: {precision}")  # of accelerate or DeepSpeed
    if halves and training_args.deepspeed_plugin is not None:
        dtype = "bfloat16" if "bf16" in halves[0] else "float16"
        raise ValueError(
            f"`{halves[0]}` was given with DeepSpeed, which would cast the adapters to {dtype} and lose their small "
            f"updates. Use `--dtype {dtype}` instead: it casts the frozen bases, and adapters stay float32."
        )


def check_push(model_args, training_args):
    """Raises `ValueError` for adapters that others could not load from the Hub."""
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


if __name__ == "__main__":
    HELP_FILE.write_text(make_help(), encoding="utf-8")
