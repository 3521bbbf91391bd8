# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains adapters on frozen bases, evaluates them on the test split and saves them with a model card.

    accelerate launch train.py                                          # recipes/digits.yaml, minutes on a CPU
    accelerate launch train.py --visual_prompts none --output_dir outputs/digits-blind
    accelerate launch train.py --method llava-lora --output_dir outputs/digits-llava-lora
    accelerate launch train.py --adapter outputs/digits --num_train_epochs 0 --output_dir outputs/digits-again
    accelerate launch train.py recipes/scienceqa-llama7b.yaml --per_device_train_batch_size 2
    accelerate launch --num_processes 2 --use_deepspeed train.py --deepspeed ds_config.json
    accelerate launch train.py recipes/scienceqa-llama7b.yaml --push_to_hub true --hub_model_id org/dehvf-llama7b

A recipe is a YAML file of the flags that `--help` lists, and perhaps `base:`, a recipe beside it whose values it
changes; flags override both. `--output_dir` gets `run.json` (arguments, config, versions), the adapters
(`model.safetensors` and the files to load them), `README.md` (the card), `predictions.jsonl` and `results.json`.
A run that was cut off goes on from its last complete checkpoint when the same command is started again.
"""

import dataclasses
import difflib
import gc
import inspect
import itertools
import json
import multiprocessing
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
import yaml
from accelerate.utils import broadcast_object_list
from accelerate.utils.other import get_free_port
from datasets import Dataset
from datasets import Image as ImageFeature
from huggingface_hub import EvalResult, upload_folder
from PIL import Image
from transformers import BitsAndBytesConfig, EarlyStoppingCallback, HfArgumentParser, TrainingArguments, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, extract_commit_hash, logging

from baselines import METHODS as BASELINES
from baselines import BaselineArguments, build
from tasks import NAMES, get_task, print_scores, score_folder
from trainer import (
    ENGINE_OF_ONE,
    RESULTS_FILE,
    RUN_FILE,
    AnswerTrainer,
    describe_arguments,
    digest,
    find_start,
    name_engine,
    write_json,
)


ROOT = Path(__file__).parent
DEFAULT_RECIPE = ROOT / "recipes" / "digits.yaml"
KEYS = ("vision", "text")  # how the bases are told apart in names of arguments
# What `--method` says -> values of `DehvfConfig`. The baselines that are no case of DEHVF stand in `baselines/`.
DEHVF_METHODS = {
    "dehvf": {},
    "memvp": {"layer_fusion": "penultimate"},
    "igva": {"fuser_query": "instruction"},
    "layer+instruction": {"fuser_query": "layer+instruction"},
}
# What of a run's folder goes to the Hub: no checkpoints, no pickled arguments, and nothing of data that may be private
PUSHED_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model", "*_dehvf.py", "README.md"]
KEPT_FILES = ["*/*", "run.json", "example.txt"]
logger = logging.get_logger("train")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: data, bases, adapters, training
# ---------------------------------------------------------------------------------------------------------------------


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
    config_class = get_class_from_dynamic_module("configuration_dehvf.DehvfConfig", str(ROOT))
    own = {name: hint for name, hint in config_class.__annotations__.items() if "model_" not in name}
    for name in ("vision_config", "text_config", "tie_word_embeddings", "merged_base"):
        del own[name]
    help_text = {"help": f"See {config_class.__name__}."}
    return dataclasses.make_dataclass(
        "AdapterArguments",
        [
            (
                name,
                float if hint == float | int else hint,
                field(default=getattr(config_class, name), metadata=help_text),
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


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows -> token ids -> batches
# ---------------------------------------------------------------------------------------------------------------------


def count_one(counter):
    """For a `multiprocessing.Value`, which the workers of a data loader share."""
    with counter.get_lock():
        counter.value += 1


class RowEncoder:
    """
    A row's texts as token ids. A training row is prompt, answer and end of sequence, with labels on the last two; a
    row to evaluate is prompt and answer prefix, with the tokens that its options begin with. `instruction_length` is
    the number of tokens of the prompt. `num_shortened` counts the prompts that lost the end of their context, in the
    workers of a data loader too, to which the encoder may be sent.

    Raises:
        ValueError: if a row has no answer, is too long without context, its options begin with the same token, or the
            task finds a fault.
    """

    def __init__(self, task, split: str, processor, max_prompt_length: int, training: bool):
        self.task_name, self.split, self.processor = task.__name__, split, processor
        self.max_prompt_length, self.training = max_prompt_length, training
        self._num_shortened = multiprocessing.Value("i", 0)
        self.option_tokens = {}

    @property
    def task(self):
        return import_module(self.task_name)  # a module cannot be sent to a worker

    @property
    def num_shortened(self) -> int:
        return self._num_shortened.value

    def __call__(self, row: dict, index: int) -> dict:
        try:
            answer = self.task.answer(row)  # also to evaluate, since a task finds out here what is wrong with a row
        except ValueError as error:
            raise ValueError(f"Row {index} of the {self.split} split: {error}") from error
        tokenizer, prompt = self.processor.tokenizer, self._prompt(row, index)
        text = f"{prompt} {answer}" if self.training else prompt + self.task.ANSWER_PREFIX
        # Encoded in one piece, as the model will meet it, and split where the prompt ends
        encoded = tokenizer(text, return_offsets_mapping=True)
        tokens = encoded.input_ids
        is_answer = [start >= len(prompt) and end > start for start, end in encoded.offset_mapping]
        instruction_length = is_answer.index(True) if any(is_answer) else len(tokens)
        if not self.training:
            options = [self._option_token(text, tokens, option) for option in self.task.options(row) or []]
            if len(set(options)) < len(options):
                raise ValueError(
                    f"Row {index} of the {self.split} split has options that begin with the same token: "
                    f"{self.task.options(row)}. Their likelihood cannot be compared. Give letters."
                )
            return {"input_ids": tokens, "instruction_length": instruction_length, "options": options}
        if not answer.strip() or not any(is_answer):
            raise ValueError(f"Row {index} of the {self.split} split has no answer to learn: {row}")
        labels = [token if learned else -100 for token, learned in zip(tokens, is_answer)]
        end = tokenizer.eos_token_id
        return {
            "input_ids": [*tokens, end],
            "instruction_length": instruction_length,
            "labels": [*labels, end],
        }

    def _prompt(self, row: dict, index: int) -> str:
        tokenizer, task = self.processor.tokenizer, self.task
        context = task.context(row)
        prompt = render(self.processor, task.prompt(row, context))
        excess = len(tokenizer(prompt).input_ids) - self.max_prompt_length
        if excess > 0:
            offsets = tokenizer(context, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
            # A cut can leave a word in more tokens than it had, hence perhaps once more
            while excess > 0 and offsets:
                offsets = offsets[:-excess]
                context = context[: offsets[-1][1]] if offsets else ""
                prompt = render(self.processor, task.prompt(row, context))
                excess = len(tokenizer(prompt).input_ids) - self.max_prompt_length
            count_one(self._num_shortened)
        if excess > 0:
            raise ValueError(
                f"Row {index} of the {self.split} split has {excess + self.max_prompt_length} tokens without any "
                f"context, more than `max_prompt_length={self.max_prompt_length}`. Raise the limit: question, options "
                "and answer are never cut."
            )
        return prompt

    def _option_token(self, text: str, tokens: list[int], option: str) -> int:
        if option not in self.option_tokens:  # letters mean the same tokens in every row
            self.option_tokens[option] = self.processor.tokenizer(text + option).input_ids[len(tokens)]
        return self.option_tokens[option]


class Split(torch.utils.data.Dataset):
    """
    A split of a task, encoded. Texts are encoded here and now, so that what is wrong with them comes out before
    training; images are decoded when a batch needs them.

    An image that cannot be read is an error in evaluation; in training the next row stands in for it, and
    `num_unreadable` counts.

    Raises:
        ValueError: if the split is empty or lacks a column, or as in [`RowEncoder`].
    """

    def __init__(self, task, name: str, processor, arguments: DataArguments, training: bool):
        self.name, self.training = name, training
        self.rows = load_rows(task, name, arguments)
        if arguments.streaming:  # splits to evaluate are small, and scored as a whole
            self.rows = Dataset.from_list(list(self.rows), features=self.rows.features)
        self._num_unreadable = multiprocessing.Value("i", 0)
        self.encoder = RowEncoder(task, name, processor, arguments.max_prompt_length, training)
        if not training:
            self._check_images()
        texts = self.rows.remove_columns("image")
        self.encoded = [self.encoder(row, index) for index, row in enumerate(texts)]
        if self.num_shortened:
            logger.warning(
                f"{self.num_shortened} of {len(self)} prompts of the {name} split were longer than "
                f"{arguments.max_prompt_length} tokens and lost the end of their context."
            )

    def _check_images(self):
        """What cannot be read would otherwise come out after training."""
        faults = []
        for index, image in enumerate(self.rows["image"]):
            try:
                read_image(image)
            except Exception as error:  # PIL raises many kinds
                faults.append(f"row {index}: {error}")
        if faults:
            raise ValueError(
                f"{len(faults)} images of the {self.name} split cannot be read: {'; '.join(faults[:10])}. Replace "
                "them, or leave these rows out of the split that is evaluated."
            )

    @property
    def num_shortened(self) -> int:
        return self.encoder.num_shortened

    @property
    def num_unreadable(self) -> int:
        return self._num_unreadable.value

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):  # or `list(split)` would never end
            raise IndexError(f"Row {index} was asked for, but the {self.name} split has {len(self)} rows.")
        for row in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = read_image(self.rows[row]["image"])
            except Exception as error:  # PIL raises many kinds
                message = f"The image in row {row} of the {self.name} split cannot be read: {error}"
                if not self.training:
                    raise ValueError(message) from error
                count_one(self._num_unreadable)
                logger.warning(f"{message}. The next row stands in.")
                continue
            return {"index": row, "image": image, **self.encoded[row]}
        raise ValueError(f"No image of the {self.name} split can be read.")


class StreamedSplit(torch.utils.data.IterableDataset):
    """A train split that is read and encoded row by row; what is wrong with a row comes out when it is reached."""

    def __init__(self, task, name: str, processor, arguments: DataArguments, shuffle_seed: int | None):
        self.rows = load_rows(task, name, arguments)
        if shuffle_seed is not None:
            self.rows = self.rows.shuffle(seed=shuffle_seed, buffer_size=1000)
        self._num_unreadable = multiprocessing.Value("i", 0)
        self.encoder = RowEncoder(task, name, processor, arguments.max_prompt_length, training=True)

    num_shortened, num_unreadable = Split.num_shortened, Split.num_unreadable

    def __iter__(self):
        """Pass after pass: the Trainer takes a stream for one epoch of --max_steps, and skips in it to go on."""
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            num_rows, num_good = 0, 0
            for index, row in enumerate(self.rows):
                num_rows += 1
                try:
                    image = read_image(row.pop("image"))
                except Exception as error:
                    count_one(self._num_unreadable)
                    logger.warning(f"Image {index} of the stream cannot be read: {error}. Its row is left out.")
                    continue
                num_good += 1
                yield {"index": index, "image": image, **self.encoder(row, index)}
            if not num_rows:  # of a loader's worker for which there is no shard
                return
            if not num_good:
                raise ValueError("No image of the stream can be read.")


def load_rows(task, name: str, arguments: DataArguments):
    """The rows of a split as the task gives them, images undecoded."""
    limit = arguments.max_samples
    makes_any_size = "max_samples" in inspect.signature(task.load).parameters
    sizes = {"max_samples": limit} if makes_any_size else {}
    rows = task.load(name, arguments.data_path, streaming=arguments.streaming, **sizes)
    if limit is not None and not makes_any_size:
        rows = rows.take(min(limit, len(rows)) if not arguments.streaming else limit)
    if missing := [column for column in task.COLUMNS if column not in rows.column_names]:
        raise ValueError(
            f"The {name} split of `{arguments.task}` lacks the columns {missing}. It has {rows.column_names}."
        )
    rows = rows.cast_column("image", ImageFeature(decode=False))
    if arguments.only_images and name == "train":
        rows = rows.filter(lambda row: row["image"] is not None)
    if next(iter(rows), None) is None:
        raise ValueError(f"The {name} split of `{arguments.task}` is empty.")
    return rows


def render(processor, prompt: str) -> str:
    return processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)


def read_image(image: dict | None) -> Image.Image | None:
    """As `datasets` decodes it: the right way up, and from wherever its path leads."""
    return None if image is None else ImageFeature().decode_example(image).convert("RGB")


@dataclass
class Collator:
    """
    Rows of a [`Split`] -> a batch, padded on the left. Two rows of 3 and 2 tokens, the second with an image:

        input_ids      (2, 3)          attention_mask [[1, 1, 1], [0, 1, 1]]
        pixel_values   (2, 3, 64, 64)  image_mask     [False, True]

    and `index` (2,), the rows' numbers. In training also `labels` (2, 3), -100 on padding and prompt; in evaluation
    `options` (2, 4), the tokens that the options begin with, -1 where there is none.

    Args:
        image_tokens: what a model without DEHVF takes in its text for an image, put behind the first token.
        instruction_mask: whether to mark the user's tokens, (2, 3), for a fuser that reads them.
    """

    processor: object
    image_tokens: list[int] = field(default_factory=list)
    instruction_mask: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = [row["image"] for row in rows]
        added = [self.image_tokens if image is not None else [] for image in images]
        tokens = [[*row["input_ids"][:1], *new, *row["input_ids"][1:]] for row, new in zip(rows, added)]
        batch = dict(self.processor.tokenizer.pad({"input_ids": tokens}, return_tensors="pt"))
        batch["index"] = torch.tensor([row["index"] for row in rows])
        length = batch["input_ids"].shape[1]

        def pad(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[filler] * (length - len(row)) + row for row in values])

        if self.instruction_mask:
            lengths = [row["instruction_length"] for row in rows]
            rest = [len(row["input_ids"]) - read for row, read in zip(rows, lengths)]
            batch["instruction_mask"] = pad([[1] * read + [0] * left for read, left in zip(lengths, rest)], 0)
        if "labels" in rows[0]:
            batch["labels"] = pad([[-100] * len(new) + row["labels"] for row, new in zip(rows, added)], -100)
        else:
            width = max(1, *(len(row["options"]) for row in rows))
            batch["options"] = torch.tensor([row["options"] + [-1] * (width - len(row["options"])) for row in rows])
        if any(image is not None for image in images):
            batch.update(self.processor(images=images, return_tensors="pt"))
        return batch


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


def make_records(task, processor, split: Split, output) -> list[dict]:
    """The lines of `predictions.jsonl`: each row of the split once, with what `AnswerTrainer` predicted for it."""
    tokens, choices = output.predictions
    tokens = torch.as_tensor(tokens)
    tokens = tokens.masked_fill(tokens == -100, processor.tokenizer.pad_token_id)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    answers = dict(sorted(zip(output.label_ids.tolist(), zip(texts, choices.tolist()))))
    if list(answers) != list(range(len(split))):
        raise ValueError(f"{len(answers)} answers came back for the {len(split)} rows of the {split.name} split.")
    records = []
    for index, row in enumerate(split.rows):
        has_image = row.pop("image") is not None
        prediction, choice = answers[index]
        records.append(
            {
                **row,
                "index": index,
                "prediction": prediction,
                "choice": choice if split.encoded[index]["options"] else None,
                "expected": task.answer(row),
                "has_image": has_image,
            }
        )
    return records


def from_modeling(name: str):
    """A class or function of modeling_dehvf.py."""
    return get_class_from_dynamic_module(f"modeling_dehvf.{name}", str(ROOT))


def write_card(folder: Path, name: str, results: dict, code: str | None):
    """The card of a run, see `make_card`. What is known of it alone: its data, scores and command."""
    scores, config = results["scores"], results["config"]
    task = get_task(results["task"])
    path = (results["data_path"] or "").partition(":")[0]
    dataset = path if path and from_modeling("is_hub_id")(path) else getattr(task, "DATASET", None)
    result = EvalResult(
        task_type=task.CARD["task_type"],
        dataset_type=dataset or results["task"],
        dataset_name=results["task"],
        dataset_split=results["split"],
        metric_type=task.CARD["metric_type"],
        metric_value=round(scores[task.CARD["score"]], 2),
    )
    bases = {
        config.get(f"{key}_model_id", results[f"{key}_model"]): config.get(f"{key}_model_revision")
        for key in ("text", "vision")
    }
    table = "\n".join(f"| {kind} | {value:.2f} |" for kind, value in scores.items() if value is not None)
    sections = (
        f"## Test split of `{results['task']}`, {results['size']} rows\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Recipe\n\n```bash\n{results['command']}\n```\n\n"
    )
    card = from_modeling("make_card")(
        name,
        results["method"],
        bases,
        results["trained_parameters"],
        code,
        results["versions"],
        results["adapter_sha256"][SAFE_WEIGHTS_NAME],
        sections,
        datasets=[dataset] if dataset else None,
        model_name=name,
        eval_results=[result],
    )
    card.save(folder / "README.md")


def example_code(folder: Path) -> str:
    """Lines of Python that load what was trained and ask about an image of the test split."""
    return f"""\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = {str(folder)!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = open(folder + "/example.txt").read()
inputs = processor(images=Image.open(folder + "/example.png"), text=question, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
print(question + processor.batch_decode(answer, skip_special_tokens=True)[0])
"""


def write_example(folder: Path, task, processor, split: Split) -> bool:
    """The first question of a split that has an image, for `example_code`."""
    for index, row in enumerate(split.rows):
        if row["image"] is not None:
            split[index]["image"].save(folder / "example.png")
            (folder / "example.txt").write_text(render(processor, task.prompt(row, task.context(row))))
            return True
    return False


def count_parameters(model) -> tuple[int, int]:
    """Trained and all; under ZeRO-3 a parameter's own size is zero and `ds_numel` tells."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def load(task, data_args, model_args, adapter_args, baseline_args, training_args):
    """Returns the processor, the splits by name (data before models: its faults come out sooner) and the model."""
    with training_args.main_process_first(desc="load the remote code"):  # its cache is not made for several writers
        model_class = from_modeling("DehvfForConditionalGeneration")
        processor_class = get_class_from_dynamic_module("processing_dehvf.DehvfProcessor", str(ROOT))
    bases = (model_args.vision_model, model_args.text_model)
    revisions = {name: getattr(model_args, name) for name in ("vision_model_revision", "text_model_revision")}
    places = bases if model_args.adapter is None else (model_args.adapter,)
    try:
        if model_args.adapter is None:
            processor = processor_class.from_vision_text_pretrained(*bases, **revisions)
        else:
            processor = processor_class.from_pretrained(model_args.adapter, revision=model_args.adapter_revision)
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
        model = model_class.from_vision_text_pretrained(*bases, **loading, **revisions, **ids, **values)
    else:
        model = model_class.from_pretrained(
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
    with training_args.main_process_first(desc="load the remote code"):
        check_hub_ids, config_class = from_modeling("check_hub_ids"), from_modeling("DehvfConfig")
    if model_args.adapter is not None:
        config = config_class.from_pretrained(model_args.adapter, revision=model_args.adapter_revision)
        places = {key: getattr(config, f"{key}_model_id") for key in KEYS}
    check_hub_ids(**{key: getattr(model_args, f"{key}_model_id") or place for key, place in places.items()})


def commit_of(location: str | None, revision: str | None) -> str | None:
    """The commit that adapters were loaded at; `None` for a folder, which has none."""
    if location is None or Path(location).is_dir():
        return None
    return extract_commit_hash(cached_file(location, CONFIG_NAME, revision=revision), None)


def base_revision(config, key: str, location: str) -> str | None:
    """The commit of a base, if the config speaks of the place that it was loaded from."""
    known = getattr(config, f"{key}_model_id") == location
    return getattr(config, f"{key}_model_revision") if known else None


def method_of(config, asked: str) -> str:
    """What is trained, or was: with `--adapter` its config tells."""
    fits = [
        name
        for name, values in DEHVF_METHODS.items()
        if values and all(getattr(config, key, None) == value for key, value in values.items())
    ]
    return asked if asked in BASELINES or not fits else fits[0]


def command_of(recipe: Path, flags: list[str]) -> str:
    """The command of a run as anybody may read it."""
    recipe = recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe
    command = shlex.join(["accelerate", "launch", "train.py", str(recipe), *flags])
    return re.sub(r"--hub[-_]token[= ]\S+", "--hub_token ...", command)


def commit_of_this_code() -> str | None:
    """`None` outside of a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_code() -> dict:
    """The versions that run, and the commit of this repository."""
    packages = "torch transformers accelerate datasets peft deepspeed bitsandbytes pycocoevalcap".split()
    return {
        "versions": {name: version(name) for name in packages if find_spec(name)},
        "commit": commit_of_this_code(),
    }


def choose_start(training_args, *other_arguments) -> tuple[dict, Path | None]:
    """See [`find_start`]. The main process looks for all, since they have to agree."""
    run = {
        "arguments": describe_arguments(training_args, *other_arguments),
        "engine": name_engine(training_args),
        "processes": training_args.world_size,
        **describe_code(),
    }
    folder, asked = Path(training_args.output_dir), training_args.resume_from_checkpoint or "auto"
    start = [None]
    if training_args.process_index == 0:
        try:
            start = [find_start(folder, asked, run)]
        except ValueError as error:
            start = [error]
    (start,) = broadcast_object_list(start)
    if isinstance(start, ValueError):
        raise start
    return start


def describe_run(task, processor, model, split: Split, data_args, model_args, training_args, folder: Path) -> dict:
    """All that a reader needs to repeat or to doubt a result."""
    weights = [*folder.glob("*.safetensors")]
    return {
        "task": data_args.task,
        "data_path": data_args.data_path,
        "split": split.name,
        "size": len(split),
        "template": render(processor, task.prompt(split.rows[0], "{context}")) + task.ANSWER_PREFIX,
        "decoding": f"greedy, max_new_tokens={task.MAX_NEW_TOKENS}",
        "seed": training_args.seed,
        "data_seed": training_args.data_seed,
        "learning_rate": training_args.learning_rate,
        "adapter": model_args.adapter,
        "adapter_revision": commit_of(model_args.adapter, model_args.adapter_revision),
        "adapter_sha256": {file.name: digest(file) for file in weights},
        "vision_model": model_args.vision_model,
        "vision_model_revision": base_revision(model.config, "vision", model_args.vision_model),
        "text_model": model_args.text_model,
        "text_model_revision": base_revision(model.config, "text", model_args.text_model),
        "config": model.config.to_diff_dict(),
        **describe_code(),
    }


def report(folder: Path, task, processor, split: Split):
    """Scores the predictions in a folder, writes its card and says how to use what is there."""
    results = score_folder(folder)
    print_scores(results)
    usable = results["method"] in DEHVF_METHODS and write_example(folder, task, processor, split)
    code = example_code(folder) if usable else None
    write_card(folder, folder.name, results, code)
    if usable:
        print(f"\nTo ask the result about an image:\n\n{code}")


def evaluate(trainer: AnswerTrainer, task, splits: dict[str, Split], facts: dict, data_args, model_args):
    """Saves the adapters, lets them answer the test split, and reports."""
    training_args, processor, split = trainer.args, trainer.processing_class, splits["test"]
    folder = Path(training_args.output_dir)
    trainer.save_model()
    facts["shortened_prompts"] = {name: split.num_shortened for name, split in splits.items()}
    trainer.compute_metrics = None  # it scores the validation split
    output = trainer.predict(split)
    if training_args.process_index == 0:
        # Before scoring, so that no generated answer is lost to a fault there; `python -m tasks score` repeats it
        records = make_records(task, processor, split, output)
        lines = [json.dumps(record, default=str) + "\n" for record in records]
        (folder / "predictions.jsonl").write_text("".join(lines))
        facts |= describe_run(task, processor, trainer.model, split, data_args, model_args, training_args, folder)
        write_json(folder / RESULTS_FILE, facts)
        report(folder, task, processor, split)


def open_repository(training_args) -> str | None:
    """
    The repository to push to, if any. It is made now, so that what the Hub refuses comes out before training. The
    Trainer is not to push: it would before there are results, and its pickled arguments too.
    """
    asked, training_args.push_to_hub = training_args.push_to_hub, False
    if not asked or training_args.process_index != 0:
        return None
    name = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
    private, token = training_args.hub_private_repo, training_args.hub_token
    return from_modeling("open_repository")(name, private, token, training_args.hub_revision)


def push(folder: Path, repo_id: str, training_args):
    """Puts adapters, card and results of a run that is complete into their repository, in one commit."""
    results = json.loads((folder / RESULTS_FILE).read_text())
    write_card(folder, repo_id.split("/")[-1], results, from_modeling("example_code")(repo_id))
    try:
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload DEHVF adapters",
            token=training_args.hub_token,
            revision=training_args.hub_revision,
            allow_patterns=PUSHED_FILES,
            ignore_patterns=KEPT_FILES,
        )
    except Exception as error:
        words = ["hf", "upload", repo_id, str(folder), "."]
        words += [word for pattern in PUSHED_FILES for word in ("--include", pattern)]
        words += [word for pattern in KEPT_FILES for word in ("--exclude", pattern)]
        error.add_note(f"The run is complete, in {folder}. To repeat the push alone:\n\n{shlex.join(words)}")
        raise
    print(f"\nPushed: {commit.commit_url}")


def warn_of_compiler_locks():
    """torch waits without a word for whoever compiles DeepSpeed's operators, even if that process was killed."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
    for lock in Path(folder).glob("**/lock"):
        logger.warning(f"{lock} says that DeepSpeed is being compiled. If nothing is, remove it: it was left behind.")


def start_engine(training_args):
    """DeepSpeed, where it is asked for, and the threads of a CPU."""
    if training_args.deepspeed_plugin is not None:
        import deepspeed

        if "RANK" not in os.environ:
            # `accelerate launch` sets these for several processes alone; without them DeepSpeed asks for MPI
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **places)
        warn_of_compiler_locks()
        # accelerate does so on accelerators alone. ZeRO-3 needs it before the bases, which it divides as they load
        deepspeed.init_distributed(auto_mpi_discovery=False)
    if training_args.use_cpu:  # `accelerate launch` leaves each process a single thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // training_args.world_size))


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


def main(arguments: list[str]):
    recipe, data_args, model_args, adapter_args, baseline_args, training_args = parse_arguments(arguments)
    check_arguments(arguments, data_args, model_args, adapter_args, training_args)
    start_engine(training_args)
    set_seed(training_args.seed)
    task = get_task(data_args.task)
    complete_arguments(task, data_args, training_args)
    if hasattr(task, "check_scorer"):  # before hours of training, and not after them
        task.check_scorer()
    main_process, folder = training_args.process_index == 0, Path(training_args.output_dir)
    run, checkpoint = choose_start(training_args, data_args, model_args, adapter_args, baseline_args)
    repository = open_repository(training_args)
    if training_args.run_name is None:  # for `report_to`: the same when the run goes on, and no other run's
        training_args.run_name = f"{folder.name}-{run['run'][:8]}"
    processor, splits, model = load(task, data_args, model_args, adapter_args, baseline_args, training_args)
    trained, total = count_parameters(model)
    method = method_of(model.config, model_args.method)
    if main_process:
        rate = f"learning rate {training_args.learning_rate:g}"
        print(f"recipe {recipe}, method {method}, {rate}, {training_args.world_size} processes")
        print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)")
        if checkpoint is not None:
            print(f"going on from {checkpoint}")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, {**run, "recipe": recipe, "config": model.config.to_diff_dict()})

    def compute_metrics(output):
        records = make_records(task, processor, splits["validation"], output)
        return task.score(records, len(splits["validation"]))

    trainer = AnswerTrainer(
        model=model,
        args=training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=Collator(
            processor, getattr(model, "image_tokens", []), getattr(model.config, "reads_instruction", False)
        ),
        processing_class=processor,
        compute_metrics=compute_metrics,
        max_new_tokens=task.MAX_NEW_TOKENS,
        run=run,
    )
    if training_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training_args.early_stopping_patience))
    facts = {"run": run["run"], "method": method, "trained_parameters": trained}
    if "train" in splits:
        training = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        facts["train_seconds"] = run["train_seconds"] + training.metrics["train_runtime"]
        # Each process reads rows of its own, but the whole of a stream
        times = torch.tensor(splits["train"].num_unreadable, device=training_args.device)
        facts["unreadable_image_reads"] = int(times if data_args.streaming else trainer.accelerator.reduce(times))
    if "train" not in splits or trainer.is_complete():
        facts["command"] = command_of(recipe, arguments)
        evaluate(trainer, task, splits, facts, data_args, model_args)
        if main_process and repository is not None:
            push(folder, repository, training_args)
    elif main_process:
        print(f"\nStopped at step {trainer.state.global_step}. The same command goes on from the last checkpoint.")
    if torch.distributed.is_initialized():
        # Before the group: a trainer under DDP that outlived it was seen to hang, now and then, when it was freed
        del trainer
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
