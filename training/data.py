# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Rows -> token ids -> batches."""

import inspect
import itertools
import multiprocessing
from dataclasses import dataclass, field
from importlib import import_module

import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image
from transformers.utils import logging


logger = logging.get_logger("train")


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

    def __init__(self, task, name: str, processor, arguments, training: bool):
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

    def __init__(self, task, name: str, processor, arguments, shuffle_seed: int | None):
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


def load_rows(task, name: str, arguments):
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
