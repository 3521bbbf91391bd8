# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rows -> token ids -> batches.

Texts are encoded once, before training, into a memory-mapped file. Images are decoded when a batch needs them.
"""

import inspect
import itertools
import json
import multiprocessing
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

import datasets
import torch
from datasets import Dataset, Features, List, Value
from datasets import Image as ImageFeature
from datasets.fingerprint import Hasher
from datasets.utils.file_utils import xopen
from PIL import Image
from transformers.utils import logging

import dehvf
from training.flags import ROOT


ENCODED = {"input_ids": List(Value("int32")), "instruction_length": Value("int32"), "shortened": Value("bool")}
logger = logging.get_logger("train")


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


def load_rows(task, name: str, arguments):
    """
    The rows of a split as the task gives them, with undecoded images.

    Raises:
        ValueError: if the split is empty or lacks a column, or if the task does not read `columns` or `holdout`.
    """
    limit, taken = arguments.max_samples, inspect.signature(task.load).parameters
    makes_any_size = "max_samples" in taken
    given = {option: getattr(arguments, option) for option in ("columns", "holdout")}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given.keys() - taken:
        raise ValueError(f"`--task {arguments.task}` does not read `--{option}`. Remove it, or use `vqa` or `chat`.")
    sizes = {"max_samples": limit} if makes_any_size else {}
    rows = task.load(name, arguments.data_path, streaming=arguments.streaming, **given, **sizes)
    if limit is not None and not makes_any_size:
        rows = rows.take(limit if arguments.streaming else min(limit, len(rows)))
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


def read_image(image) -> Image.Image | None:
    """The RGB image of an entry of an image column, decoded or not, as the processor reads it; `None` for none."""
    if image is None:
        return None
    if (
        isinstance(image, dict) and image["bytes"] is None and "://" in image["path"]
    ):  # of a streamed data set, perhaps inside an archive
        with xopen(image["path"], "rb") as file:
            image = {"bytes": file.read(), "path": image["path"]}
    return dehvf.images.read_image(image)


# ---------------------------------------------------------------------------------------------------------------------
# Token ids
# ---------------------------------------------------------------------------------------------------------------------


def render(processor, prompt: str) -> str:
    """The chat text with `prompt` as the user's message, up to where the answer begins."""
    return processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)


def tokenize(tokenizer, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    """Token ids, and where each begins and ends in the text. BOS occurs once, even if the chat template has it."""
    has_bos = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not has_bos, return_offsets_mapping=True)
    return encoded.input_ids, encoded.offset_mapping


class RowEncoder:
    """
    A row's texts as token ids:

        input_ids             to train: prompt, answer and EOS; to evaluate: prompt and answer prefix
        instruction_length    number of tokens of the prompt
        options               to evaluate: the first token of each option
        shortened             whether the end of the context was removed

    Raises:
        ValueError: if a row has no answer, is too long without context, two options begin with the same token, or the
            task refuses it. The message names the row and the split.
    """

    def __init__(self, task, split: str, processor, max_prompt_length: int, training: bool):
        self.task_name, self.split, self.processor = task.__name__, split, processor
        self.max_prompt_length, self.training = max_prompt_length, training
        self.option_tokens = {}

    @property
    def task(self):
        return import_module(self.task_name)  # modules cannot be pickled for the workers of a data loader

    @property
    def tokenizer(self):
        return self.processor.tokenizer

    def __call__(self, row: dict, index: int) -> dict:
        try:
            return self._encode(dict(row))
        except ValueError as error:
            raise ValueError(f"Row {index} of the {self.split} split: {error}") from error

    def _encode(self, row: dict) -> dict:
        answer = self.task.answer(row)  # also to evaluate, since the task checks the row here
        following = f" {answer}" if self.training else self.task.ANSWER_PREFIX
        text, tokens, length, shortened = self._fit(row, following)
        encoded = {"input_ids": tokens, "instruction_length": length, "shortened": shortened}
        if not self.training:
            return {**encoded, "options": self._option_tokens(row, text, len(tokens))}
        if not answer.strip() or length == len(tokens):
            raise ValueError(f"it has no answer to learn: {row}")
        return {**encoded, "input_ids": [*tokens, self.tokenizer.eos_token_id]}

    def _fit(self, row: dict, following: str) -> tuple[str, list[int], int, bool]:
        """
        The text of prompt and `following`, its tokens, the number of tokens of the prompt, and whether the context was
        shortened for it.
        """
        context, offsets, shortened = self.task.context(row), None, False
        while True:
            # Encoded in one piece, as the model will read it, and split where the prompt ends
            prompt = render(self.processor, self.task.prompt(row, context))
            tokens, places = tokenize(self.tokenizer, prompt + following)
            length = next((number for number, (start, _) in enumerate(places) if start >= len(prompt)), len(tokens))
            excess = length - self.max_prompt_length
            if excess <= 0:
                return prompt + following, tokens, length, shortened
            if offsets is None:
                offsets = self.tokenizer(context, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
            if not offsets:
                raise ValueError(
                    f"it has {length} tokens without any context, more than `max_prompt_length="
                    f"{self.max_prompt_length}`. Raise the limit: question, options and answer are never shortened."
                )
            # A cut can split a word into more tokens than it had, so this may take several rounds
            offsets, shortened = offsets[:-excess], True
            context = context[: offsets[-1][1]] if offsets else ""

    def _option_tokens(self, row: dict, text: str, length: int) -> list[int]:
        options = self.task.options(row) or []
        for option in options:
            if option not in self.option_tokens:  # letters have the same tokens in every row
                self.option_tokens[option] = tokenize(self.tokenizer, text + option)[0][length]
        tokens = [self.option_tokens[option] for option in options]
        if len(set(tokens)) < len(tokens):
            raise ValueError(
                f"it has options that begin with the same token: {options}. Their likelihood cannot be compared. Give "
                "letters."
            )
        return tokens

    def fingerprint(self, rows: Dataset) -> str:
        """Of everything that the encoded rows depend on."""
        tokenizer = json.loads(self.tokenizer.backend_tokenizer.to_str())
        tokenizer |= {"padding": None, "truncation": None, "eos": self.tokenizer.eos_token_id}
        sources = [Path(__file__), *sorted((ROOT / "tasks").glob("*.py"))]
        facts = (self.task_name, self.split, self.training, self.max_prompt_length, self.processor.chat_template)
        code = [file.read_text(encoding="utf-8") for file in sources]
        return Hasher.hash([rows._fingerprint, *facts, json.dumps(tokenizer), *code])

    def encode(self, rows: Dataset) -> Dataset:
        """Encodes all rows into a file in the cache of `datasets`, or reads what an earlier run has written there."""
        fingerprint = self.fingerprint(rows)
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "dehvf"
        folder.mkdir(parents=True, exist_ok=True)
        return rows.map(
            self,
            with_indices=True,
            remove_columns=rows.column_names,
            features=Features(ENCODED if self.training else {**ENCODED, "options": List(Value("int32"))}),
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
            desc=f"Encoding the {self.split} split",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


class Counter:
    """Counts in all workers of a data loader."""

    def __init__(self):
        self._counted = multiprocessing.Value("i", 0)

    def add_one(self):
        with self._counted.get_lock():
            self._counted.value += 1

    def __int__(self):
        return self._counted.value


def add_labels(encoded: dict) -> dict:
    """A training row with its labels: -100 on the prompt."""
    tokens, length = encoded["input_ids"], encoded["instruction_length"]
    return {**encoded, "labels": [-100] * length + tokens[length:]}


class Split(torch.utils.data.Dataset):
    """
    A split of a task, encoded. An image that cannot be read is an error if the split is evaluated; in training it is
    counted in `unreadable_images`, and the next row is used instead.

    Raises:
        ValueError: as [`load_rows`] and [`RowEncoder`]; or if an image of a split to evaluate cannot be read.
    """

    def __init__(self, task, name: str, processor, arguments, training: bool):
        self.name, self.training, self.unreadable_images = name, training, Counter()
        self.rows = load_rows(task, name, arguments)
        if arguments.streaming:  # splits to evaluate are small
            self.rows = Dataset.from_list(list(self.rows), features=self.rows.features)
        self.images = self.rows.select_columns("image")
        if not training:
            self._check_images()
        encoder = RowEncoder(task, name, processor, arguments.max_prompt_length, training)
        self.encoded = encoder.encode(self.rows.remove_columns("image"))
        self.num_shortened = int(self.encoded.with_format("numpy")["shortened"][:].sum())
        if self.num_shortened:
            logger.warning(
                f"{self.num_shortened} of {len(self)} prompts of the {name} split were longer than "
                f"{arguments.max_prompt_length} tokens, and the end of their context was removed."
            )

    def _check_images(self):
        faults = []
        for index, row in enumerate(self.images):
            try:
                read_image(row["image"])
            except Exception as error:  # Pillow raises many kinds
                faults.append(f"row {index}: {error}")
        if faults:
            raise ValueError(
                f"{len(faults)} images of the {self.name} split cannot be read: {'; '.join(faults[:10])}. Replace "
                "them, or remove these rows from the split."
            )

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):  # or iteration would never end
            raise IndexError(f"Row {index} was requested, but the {self.name} split has {len(self)} rows.")
        for row in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = read_image(self.images[row]["image"])
            except Exception as error:
                message = f"The image in row {row} of the {self.name} split cannot be read: {error}"
                if not self.training:
                    raise ValueError(message) from error
                self.unreadable_images.add_one()
                logger.warning(f"{message}. The next row is used instead.")
                continue
            encoded = self.encoded[row]
            return {"index": row, "image": image, **(add_labels(encoded) if self.training else encoded)}
        raise ValueError(f"No image of the {self.name} split can be read.")


class StreamedSplit(torch.utils.data.IterableDataset):
    """A train split that is read and encoded row by row. Rows with an unreadable image are skipped and counted."""

    def __init__(self, task, name: str, processor, arguments, shuffle_seed: int | None):
        self.rows = load_rows(task, name, arguments)
        if shuffle_seed is not None:
            self.rows = self.rows.shuffle(seed=shuffle_seed, buffer_size=1000)
        self.unreadable_images, self._shortened = Counter(), Counter()
        self.encoder = RowEncoder(task, name, processor, arguments.max_prompt_length, training=True)

    @property
    def num_shortened(self) -> int:
        return int(self._shortened)

    def __iter__(self):
        """Repeats the rows without end: for the Trainer, a stream is one epoch of `max_steps`."""
        for epoch in itertools.count():
            self.rows.set_epoch(epoch)
            num_rows, num_good = 0, 0
            for index, row in enumerate(self.rows):
                num_rows += 1
                try:
                    image = read_image(row.pop("image"))
                except Exception as error:
                    self.unreadable_images.add_one()
                    logger.warning(f"Image {index} of the stream cannot be read: {error}. Its row is skipped.")
                    continue
                num_good += 1
                encoded = self.encoder(row, index)
                if encoded["shortened"]:
                    self._shortened.add_one()
                yield {"index": index, "image": image, **add_labels(encoded)}
            if not num_rows:  # this worker has no shard
                return
            if not num_good:
                raise ValueError("No image of the stream can be read.")


def load_splits(task, processor, data_args, training_args) -> dict[str, Split | StreamedSplit]:
    """The splits that a run needs, by name. The main process encodes them, and the others read the result."""
    splits = {}
    with training_args.main_process_first(desc="encode the data"):
        if training_args.num_train_epochs > 0 and data_args.streaming:
            seed = None if training_args.train_sampling_strategy == "sequential" else training_args.seed
            splits["train"] = StreamedSplit(task, "train", processor, data_args, seed)
        elif training_args.num_train_epochs > 0:
            splits["train"] = Split(task, "train", processor, data_args, training=True)
        for name in ("test",) if training_args.eval_strategy == "no" else ("validation", "test"):
            splits[name] = Split(task, name, processor, data_args, training=False)
    return splits


# ---------------------------------------------------------------------------------------------------------------------
# Batches
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Collator:
    """
    Rows of a [`Split`] -> a batch, padded on the left. Two rows of 3 and 2 tokens, the second with an image:

        input_ids      (2, 3)          attention_mask [[1, 1, 1], [0, 1, 1]]
        pixel_values   (2, 3, 64, 64)  image_mask     [False, True]

    and `index` (2,), the indices of the rows. In training also `labels` (2, 3), -100 on padding and prompt; in
    evaluation `options` (2, 4), the first tokens of the options, -1 where there is none.

    Args:
        image_tokens: placeholders of an image, inserted after the first token. Baselines need them, DEHVF does not.
        instruction_mask: whether to add `instruction_mask` (2, 3), 1 on the tokens of the prompt, for a fuser that
            reads the instruction.
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
