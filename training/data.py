# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Rows -> splits -> batches.

Texts are encoded once, before training, into a memory-mapped file. Images are decoded when a batch needs them.
"""

import hashlib
import inspect
import itertools
import multiprocessing
import os
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from logging import NOTSET, WARNING, disable
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers.utils import logging

from dehvf import configuration
from tasks import ADDED_COLUMNS, NAMES, get_task
from tasks._reader import filter_rows
from tasks._values import IMAGE_FEATURES, list_images, read_image
from training.chats import prints_date
from training.encoding import RowEncoder


LOSS = ("loss", "eval_loss")  # values of `metric_for_best_model`
logger = logging.get_logger("train")


# --- rows ---


def load_rows(task, name: str, arguments):
    """
    Rows of a split, images undecoded.

    Raises:
        ValueError: if the split is empty, lacks a column or has one of `ADDED_COLUMNS`, or the task does not have an
            option that was given.
    """
    limit, taken = arguments.max_samples, inspect.signature(task.load).parameters
    makes_any_size = "max_samples" in taken
    given = {option: getattr(arguments, option) for option in ("columns", "holdout", "captions")}
    given = {option: value for option, value in given.items() if value is not None}
    for option in given.keys() - taken:
        readers = [other for other in NAMES if option in inspect.signature(get_task(other).load).parameters]
        raise ValueError(
            f"`--task {arguments.task}` does not read `--{option}`. Remove it, or use {' or '.join(readers)}."
        )
    sizes = {"max_samples": limit} if makes_any_size else {}
    rows = task.load(name, arguments.data_path, streaming=arguments.streaming, **given, **sizes)
    if missing := [column for column in task.COLUMNS if column not in rows.column_names]:
        raise ValueError(
            f"The {name} split of `{arguments.task}` lacks the columns {missing}. It has {rows.column_names}."
        )
    if taken_names := [column for column in rows.column_names if column in ADDED_COLUMNS]:
        raise ValueError(
            f"The {name} split of `{arguments.task}` has the column `{taken_names[0]}`, which predictions.jsonl uses "
            "for something else. Rename it."
        )
    rows = rows.cast_column("image", ImageFeature(decode=False))
    if arguments.only_images and name == "train":
        rows = filter_rows(rows, lambda row: row["image"] is not None)
    if limit is not None and not makes_any_size:
        rows = rows.take(limit if arguments.streaming else min(limit, len(rows)))
    if next(iter(rows), None) is None:
        raise ValueError(f"The {name} split of `{arguments.task}` is empty.")
    return rows


def read_images(row: dict) -> Image.Image | list[Image.Image] | None:
    """Reads the images of a row for the processor: one image, a list of several, or `None`."""
    images = [read_image(image) for image in list_images(row)]
    return images if len(images) > 1 else images[0] if images else None


# --- splits ---


class Counter:
    """A counter that is shared by all workers of a data loader."""

    def __init__(self):
        self._counted = multiprocessing.Value("i", 0)

    def add_one(self):
        with self._counted.get_lock():
            self._counted.value += 1

    def __int__(self):
        return self._counted.value


def add_labels(encoded: dict) -> dict:
    """Adds the labels to a training row: -100 for tokens that are not part of an answer."""
    pairs = zip(encoded["input_ids"], encoded["is_answer"])
    return {**encoded, "labels": [token if is_answer else -100 for token, is_answer in pairs]}


class Split(torch.utils.data.Dataset):
    """
    An encoded split of a task. In a split for evaluation, an image that cannot be read is an error; in training it is
    counted in `unreadable_images`, and the next row is used instead. For a loss in evaluation, `with_loss` adds each
    row in the form for training, as `answered`. Without `check_images`, images are first read when a batch needs them.

    Raises:
        ValueError: as [`load_rows`] and [`RowEncoder`]; if a row has more images than the processor reads; or if, in a
            split for evaluation, an image cannot be read or an answer could exceed the length of the language model.
    """

    def __init__(
        self, task, name: str, processor, arguments, training: bool, with_loss: bool = False, check_images: bool = True
    ):
        self.name, self.training, self.unreadable_images = name, training, Counter()
        self.rows = load_rows(task, name, arguments)
        if arguments.streaming:  # splits for evaluation are small
            self.rows = Dataset.from_list(list(self.rows), features=self.rows.features)
        columns = [column for column in IMAGE_FEATURES if column in self.rows.column_names]
        self.images = self.rows.select_columns(columns)
        self._check_numbers(processor.max_images)
        if not training and check_images:
            self._check_images()
        texts, limit = self.rows.remove_columns(columns), arguments.max_prompt_length
        self.encoded = RowEncoder(task, name, processor, limit, training).encode(texts)
        self.answered = RowEncoder(task, name, processor, limit, training=True).encode(texts) if with_loss else None
        if not training and arguments.max_new_tokens is not None:
            self.check_lengths(processor, arguments.max_new_tokens)
        self.num_shortened = int(self.encoded.with_format("numpy")["shortened"][:].sum())
        if self.num_shortened:
            logger.warning(
                f"{self.num_shortened} of {len(self)} prompts of the {name} split were longer than "
                f"{arguments.max_prompt_length} tokens, and the end of their context was removed."
            )

    def _check_numbers(self, max_images: int):
        if "images" not in self.images.column_names:
            return
        batches = self.images.select_columns("images").with_format("arrow").iter(1000)
        numbers = [number or 0 for batch in batches for number in pc.list_value_length(batch["images"]).to_pylist()]
        if (most := max(numbers, default=0)) > max_images:
            raise ValueError(
                f"Row {numbers.index(most)} of the {self.name} split has {most} images, but the adapter reads at most "
                f"{max_images}. Train one with `--max_images {most}`, or remove such rows."
            )

    def _check_images(self):
        faults, read = [], set()
        for index, row in enumerate(self.images):
            for image in list_images(row):
                is_file = image["bytes"] is None
                if is_file and image["path"] in read:  # several questions refer to the same picture
                    continue
                try:
                    read_image(image)
                except Exception as error:  # Pillow raises many kinds
                    faults.append(f"row {index}: {str(error).rstrip('.')}")
                if is_file:
                    read.add(image["path"])
        if faults:
            raise ValueError(
                f"{len(faults)} images of the {self.name} split cannot be read: {'; '.join(faults[:10])}. Replace "
                "them, or remove these rows from the split."
            )

    def check_lengths(self, processor, max_new_tokens: int, image_tokens: int = 0):
        """
        Raises `ValueError` if a row, with `image_tokens` for each image and tile, and with a new answer in evaluation,
        is longer than the language model reads.
        """
        limit, (rows, columns) = processor.tokenizer.model_max_length, configuration.read_tiles(processor.image_tiles)
        added = image_tokens * (1 + rows * columns) * self._count_images() if image_tokens else 0
        new = 0 if self.training else max_new_tokens
        for part, more in ((self.encoded, new), (self.answered, 0)):
            if part is None:
                continue
            lengths = pc.list_value_length(part.with_format("arrow")["input_ids"][:]).to_numpy() + added
            row = int(lengths.argmax())
            if lengths[row] + more > limit:
                images = f" with the {image_tokens} of each image or tile" if image_tokens else ""
                answer = f", and its answer may have {more}, together" if more else ","
                raise ValueError(
                    f"Row {row} of the {self.name} split has {lengths[row]} tokens{images}{answer} more than the "
                    f"{limit} that the language model reads. Lower `--max_new_tokens` or `--max_prompt_length`, or "
                    "leave the row out."
                )

    def _count_images(self) -> np.ndarray:
        numbers = []
        for batch in self.images.with_format("arrow").iter(1000):
            own = batch["image"].is_valid().to_numpy().astype(int)
            if "images" in batch.column_names:
                own = np.maximum(own, pc.fill_null(pc.list_value_length(batch["images"]), 0).to_numpy())
            numbers.append(own)
        return np.concatenate(numbers)

    def digest(self) -> str:
        """SHA-256 of the tokens of all rows, and of the paths and sizes of their images."""
        sha256 = hashlib.sha256()
        for chunk in self.encoded.data.column("input_ids").chunks:
            for buffer in chunk.buffers():
                sha256.update(buffer or b"")
        for batch in self.images.with_format("arrow").iter(1000):
            for column in batch.columns:
                if pa.types.is_list(column.type):
                    sha256.update(repr(pc.list_value_length(column).to_pylist()).encode())
                    column = pc.list_flatten(column)
                places, contents = (pc.struct_field(column, name) for name in ("path", "bytes"))
                lengths, places = pc.binary_length(contents).to_pylist(), places.to_pylist()
                is_file = [length is None and os.path.isfile(place or "") for place, length in zip(places, lengths)]
                # The same file has another relative path in another working directory
                places = [os.path.abspath(place) if there else place for place, there in zip(places, is_file)]
                sizes = [os.path.getsize(place) if there else None for place, there in zip(places, is_file)]
                sha256.update(repr((places, lengths, sizes)).encode())
        return sha256.hexdigest()

    def digest_scored(self) -> str:
        """SHA-256 of what decides on the scores and the loss of a split for evaluation, such as its answers."""
        sha256, texts = hashlib.sha256(), self.rows.remove_columns(self.images.column_names)
        for part in (texts, self.encoded, self.answered):
            for batch in part.with_format("arrow").iter(1000) if part is not None else ():
                sha256.update(repr(batch.to_pylist()).encode())
        return sha256.hexdigest()

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):  # otherwise iteration would never end
            raise IndexError(f"Row {index} was requested, but the {self.name} split has {len(self)} rows.")
        for row in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = read_images(self.images[row])
            except Exception as error:
                message = f"Row {row} of the {self.name} split: {error}"
                if not self.training:
                    raise ValueError(message) from error
                self.unreadable_images.add_one()
                logger.warning(f"{message} The next row is used instead.")
                continue
            encoded = add_labels(self.encoded[row]) if self.training else self.encoded[row]
            if self.answered is not None:
                encoded["answered"] = add_labels(self.answered[row])
            return {"index": row, "image": image, **encoded}
        raise ValueError(f"No image of the {self.name} split can be read.")


class StreamedSplit(torch.utils.data.IterableDataset):
    """A train split that is read and encoded row by row. Rows with unreadable images are skipped and counted."""

    def __init__(self, task, name: str, processor, arguments, shuffle_seed: int | None):
        self.rows, self.shuffle_seed = load_rows(task, name, arguments), shuffle_seed
        self.unreadable_images, self._shortened = Counter(), Counter()
        self.encoder = RowEncoder(task, name, processor, arguments.max_prompt_length, training=True)

    @property
    def num_shortened(self) -> int:
        return int(self._shortened)

    def __iter__(self):
        """Repeats the rows endlessly: for the Trainer, a stream is one epoch of `max_steps`."""
        worker = torch.utils.data.get_worker_info()
        worker_id, num_workers = (worker.id, worker.num_workers) if worker else (0, 1)
        for epoch in itertools.count():
            rows, num_rows, num_good = self.rows, 0, 0
            if self.shuffle_seed is not None:  # not by `set_epoch`, which sets the epoch of all workers
                generator = np.random.default_rng((self.shuffle_seed, epoch))
                rows = rows.shuffle(generator=generator, buffer_size=1000)
            # By `iter`, each worker sees the rows of all files. If it repeated the files that `datasets` assigns to
            # it, rows of small files would come more often.
            for index, batch in enumerate(rows.iter(batch_size=1)):
                if index % num_workers != worker_id:
                    continue
                num_rows += 1
                row = {name: values[0] for name, values in batch.items()}
                try:
                    image = read_images(row)
                except Exception as error:
                    self.unreadable_images.add_one()
                    logger.warning(f"Row {index} of the stream: {error} It is skipped.")
                    continue
                num_good += 1
                encoded = self.encoder({name: row[name] for name in row if name not in IMAGE_FEATURES}, index)
                if encoded["shortened"]:
                    self._shortened.add_one()
                yield {"index": index, "image": image, **add_labels(encoded)}
            if not num_rows:  # there are fewer rows than workers
                return
            if not num_good:
                raise ValueError("No image of the stream can be read.")


def load_splits(task, processor, data_args, training_args) -> dict[str, Split | StreamedSplit]:
    """
    The splits that a run needs, by name. The main process encodes the texts and checks the images; the other processes
    read its result.
    """
    splits, is_main = {}, training_args.process_index == 0
    try:
        Path(datasets.config.HF_DATASETS_CACHE).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            f"The folder for encoded rows cannot be created: {error}. Set the environment variable HF_DATASETS_CACHE "
            "to a folder that you can write to."
        ) from error
    quiet = nullcontext if is_main else without_warnings  # the main process has already warned
    with quiet(), training_args.main_process_first(desc="encode the data"):
        if prints_date(processor):
            logger.warning(
                "The chat template prints the current date, so prompts differ from day to day, and this run cannot "
                "be resumed on another day. To fix the date, train with `--chat_template FILE`, a copy of the "
                "template with a date in place of `strftime_now`."
            )
        if training_args.num_train_epochs > 0 and data_args.streaming:
            seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
            shuffle_seed = None if training_args.train_sampling_strategy == "sequential" else seed
            splits["train"] = StreamedSplit(task, "train", processor, data_args, shuffle_seed)
        elif training_args.num_train_epochs > 0:
            splits["train"] = Split(task, "train", processor, data_args, training=True)
        if training_args.eval_strategy != "no":
            with_loss = training_args.metric_for_best_model in LOSS
            splits["validation"] = Split(
                task, "validation", processor, data_args, training=False, with_loss=with_loss, check_images=is_main
            )
        splits["test"] = Split(task, "test", processor, data_args, training=False, check_images=is_main)
    return splits


@contextmanager
def without_warnings():
    """Silences all loggers of this process up to the level of warnings."""
    disable(WARNING)
    try:
        yield
    finally:
        disable(NOTSET)


def digest_rows(splits: dict[str, Split | StreamedSplit]) -> str:
    """The digests of the rows that a run learns from or chooses its best checkpoint by, except those of a stream."""
    digests = [split.digest() for name, split in splits.items() if name != "test" and isinstance(split, Split)]
    if "validation" in splits:  # last, as checkpoints of earlier versions lack it
        digests.append(splits["validation"].digest_scored())
    return " ".join(digests)


# --- batches ---


@dataclass
class Collator:
    """
    Collates rows of a [`Split`] into a batch, padded on the left. For two rows of 3 and 2 tokens, the second with an
    image:

        input_ids      (2, 3)          attention_mask [[1, 1, 1], [0, 1, 1]]
        pixel_values   (2, 3, 64, 64)  image_mask     [False, True]

    and `index` (2,), the indices of the rows. In training also `labels` (2, 3), -100 for padding and prompt; in
    evaluation `options` (2, 4, 1), the tokens of the options, padded with -1, and, for a loss, `answered` with the
    texts as in training. If a row has several images, `pixel_values` (2, 3, 3, 64, 64) and `image_mask` (2, 3) are
    padded to the same number of images for all rows.

    Args:
        image_tokens: placeholder tokens of each image, which are inserted after the first token. Only baselines need
            them.
        instruction_mask: whether to add `instruction_mask` (2, 3), 1 for tokens that are neither an answer nor a
            placeholder, for methods that read the instruction.
    """

    processor: object
    image_tokens: list[int] = field(default_factory=list)
    instruction_mask: bool = False

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        images = self.processor(images=[row["image"] for row in rows], return_tensors="pt")
        if images:  # always with a mask, so that all batches have the same inputs
            images.setdefault("image_mask", torch.ones(images["pixel_values"].shape[:-3], dtype=torch.bool))
        numbers = images["image_mask"].view(len(rows), -1).sum(dim=1).tolist() if images else [0] * len(rows)
        batch = {**self._pad_texts(rows, numbers), "index": torch.tensor([row["index"] for row in rows])}
        if "answered" in rows[0]:
            batch["answered"] = self._pad_texts([row["answered"] for row in rows], numbers)
        if "labels" not in rows[0]:
            width = max(1, *(len(row["options"]) for row in rows))
            depth = max([1, *(len(option) for row in rows for option in row["options"])])
            options = torch.full((len(rows), width, depth), -1)
            for index, row in enumerate(rows):
                for number, option in enumerate(row["options"]):
                    options[index, number, : len(option)] = torch.tensor(option)
            batch["options"] = options
        return {**batch, **images}

    def _pad_texts(self, rows: list[dict], numbers: list[int]) -> dict[str, torch.Tensor]:
        """Pads the texts, with placeholders for the given number of images in each."""
        added = [self.image_tokens * number for number in numbers]
        tokens = [[*row["input_ids"][:1], *new, *row["input_ids"][1:]] for row, new in zip(rows, added)]
        batch = dict(self.processor.tokenizer.pad({"input_ids": tokens}, return_tensors="pt"))
        length, limit = batch["input_ids"].shape[1], self.processor.tokenizer.model_max_length
        if self.image_tokens and length > limit:  # in a stream, whose rows are not known before
            raise ValueError(
                f"A row has {length} tokens with the {len(self.image_tokens)} of each image or tile, more than the "
                f"{limit} that the language model reads. Shorten it or leave it out."
            )

        def pad(values: list[list[int]], filler: int) -> torch.Tensor:
            return torch.tensor([[filler] * (length - len(row)) + row for row in values])

        if self.instruction_mask:
            masks = [[int(not answer) for answer in row["is_answer"]] for row in rows]
            masks = [[*mask[:1], *[0] * len(new), *mask[1:]] for mask, new in zip(masks, added)]
            batch["instruction_mask"] = pad(masks, 0)
        if "labels" in rows[0]:
            batch["labels"] = pad([[-100] * len(new) + row["labels"] for row, new in zip(rows, added)], -100)
        return batch
