# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Encodes the texts of a row into token ids with the chat template of the tokenizer."""

import json
from datetime import date
from functools import cached_property
from importlib import import_module
from pathlib import Path

from datasets import Dataset, Features, List, Value
from datasets.fingerprint import Hasher

from tasks._reader import map_rows
from training.chats import ChatTokenizer, prints_date
from training.flags import ROOT


ENCODED = {"input_ids": List(Value("int32")), "is_answer": List(Value("bool")), "shortened": Value("bool")}
OPTIONS = {"options": List(List(Value("int32")))}


def messages_before_answer(task, row: dict, context: str) -> list[dict]:
    """The messages of a row that its answer follows."""
    if hasattr(task, "messages"):
        return task.messages(row)[:-1]
    return [{"role": "user", "content": task.prompt(row, context)}]


class RowEncoder:
    """
    Encodes the texts of a row into token ids:

        input_ids    to train: prompt, answer and EOS; to evaluate: prompt and answer prefix
        is_answer    which of them are the answer, the prefix, or an earlier answer of a chat
        options      to evaluate: the tokens of each option
        shortened    whether the end of the context was removed

    In a chat, all messages of the assistant are answers to train on, and the last one is the answer to evaluate.

    Raises:
        ValueError: if a row has no answer, is too long (even without its context, or for the language model), has two
            options with the same tokens, or is refused by the task. The message contains the row and the split.
    """

    def __init__(self, task, split: str, processor, max_prompt_length: int, training: bool):
        self.task_name, self.split, self.processor = task.__name__, split, processor
        self.max_prompt_length, self.training = max_prompt_length, training
        self.option_tokens = {}

    @property
    def task(self):
        return import_module(self.task_name)  # not stored: data loader workers cannot pickle modules

    @cached_property
    def chat(self) -> ChatTokenizer:
        return ChatTokenizer(self.processor)

    def __call__(self, row: dict, index: int) -> dict:
        try:
            return self._encode(dict(row))
        except ValueError as error:
            raise ValueError(f"Row {index} of the {self.split} split: {error}") from error

    def _encode(self, row: dict) -> dict:
        answer = self.task.answer(row).strip()  # also in evaluation, since the task checks the row here
        if self.training and not answer:
            raise ValueError(f"it has no answer to learn: {row}")
        answer = answer if self.training else self.task.ANSWER_PREFIX.strip()
        text, tokens, is_answer, shortened = self._fit(row, answer)
        if len(tokens) > self.processor.tokenizer.model_max_length:
            raise ValueError(
                f"it has {len(tokens)} tokens, more than the {self.processor.tokenizer.model_max_length} that the "
                "language model reads. Shorten it or leave it out."
            )
        encoded = {"input_ids": tokens, "is_answer": is_answer, "shortened": shortened}
        return encoded if self.training else {**encoded, "options": self._option_tokens(row, text, len(tokens))}

    def _fit(self, row: dict, answer: str) -> tuple[str, list[int], list[bool], bool]:
        """The text of prompt and answer, its tokens, a mask of the answer's tokens, and whether it was shortened."""
        # Protected, so that it is cut at the end of one of its own tokens
        context, offsets, shortened = self.chat.protect(self.task.context(row)), None, False
        while True:
            # Encoded in one piece, as the model will read it, and split at the end of the prompt
            text, spans = self._render(row, self.chat.restore(context), answer)
            tokens, places = self.chat.encode(text)
            is_answer = [any(begin <= start < end for begin, end in spans) for start, _ in places]
            if self.training and any(self._joins(text, tokens, places, begin) for begin, _ in spans):
                raise ValueError(
                    "the tokenizer joins the end of the generation prompt with the beginning of the answer into one "
                    "token, which generation could not produce, or encodes it differently than without an answer. "
                    "Give a chat template whose generation prompt does not end with a space or an empty line, such as "
                    "`--chat_template plain`."
                )
            if self.training and tokens[-1] not in self.chat.special_ids:
                # The template does not end a turn with a token
                tokens, is_answer = [*tokens, self.processor.tokenizer.eos_token_id], [*is_answer, True]
            length = sum(start < spans[-1][0] for start, _ in places)
            excess = length - self.max_prompt_length
            if excess <= 0:
                return text, tokens, is_answer, shortened
            if offsets is None:
                offsets = [(begin, end) for begin, end in self.chat.encode(context)[1] if begin < end]
            if not offsets:
                raise ValueError(
                    f"it has {length} tokens without any context, more than `max_prompt_length="
                    f"{self.max_prompt_length}`. Raise the limit: question, options and answer are never shortened."
                )
            # A cut can split a word into more tokens than it had, so this may take several rounds
            offsets, shortened = offsets[:-excess], True
            context = context[: offsets[-1][1]] if offsets else ""

    def _joins(self, text: str, tokens: list[int], places: list[tuple[int, int]], begin: int) -> bool:
        """Whether an answer that begins at a place shares a token with the text before it, or changes its tokens."""
        if any(start < begin < stop for start, stop in places):
            return True
        if not text[begin - 1 : begin].isspace():
            return False
        prompt, _ = self.chat.encode(text[:begin])  # some tokenizers leave a space before a word out of its place
        return tokens[: len(prompt)] != prompt

    def _render(self, row: dict, context: str, answer: str) -> tuple[str, list[tuple[int, int]]]:
        messages = messages_before_answer(self.task, row, context)
        if self.training:
            return self.chat.render_answers([*messages, {"role": "assistant", "content": answer}])
        prompt = self.chat.render(messages, add_generation_prompt=True)
        if not answer:
            return prompt, [*self.chat.find_answers(messages, prompt), (len(prompt), len(prompt))]
        # Without the end of the turn
        text, (*earlier, (begin, _)) = self.chat.render_answers([*messages, {"role": "assistant", "content": answer}])
        text = text[: text.index(answer, begin) + len(answer)]
        return text, [*earlier, (begin, len(text))]

    def _option_tokens(self, row: dict, text: str, length: int) -> list[list[int]]:
        options = self.task.options(row) or []
        for option in options:
            if option not in self.option_tokens:  # options that are letters have the same tokens in every row
                self.option_tokens[option] = self.chat.encode(text + self.chat.protect(option))[0][length:]
        tokens = [self.option_tokens[option] for option in options]
        if len(set(map(tuple, tokens))) < len(tokens):
            raise ValueError(f"it has options with the same tokens: {options}. Give each option once.")
        return tokens

    def fingerprint(self, rows: Dataset) -> str:
        """Fingerprint of everything that the encoded rows depend on."""
        tokenizer = self.processor.tokenizer
        backend = json.loads(tokenizer.backend_tokenizer.to_str()) | {"padding": None, "truncation": None}
        special = tokenizer.special_tokens_map, tokenizer.all_special_tokens  # which a chat template may print
        sources = [Path(__file__), ROOT / "training" / "chats.py", ROOT / "processing_dehvf.py"]
        sources += sorted((ROOT / "tasks").glob("*.py"))
        facts = (self.task_name, self.split, self.training, self.max_prompt_length, self.processor.chat_template)
        facts += (special, tokenizer.model_max_length, str(date.today()) if prints_date(self.processor) else None)
        code = [file.read_text(encoding="utf-8") for file in sources]
        return Hasher.hash([rows._fingerprint, *facts, json.dumps(backend), *code])

    def encode(self, rows: Dataset) -> Dataset:
        """Encodes all rows into a file in the cache of `datasets`, or reads what an earlier run has written there."""
        features = Features(ENCODED if self.training else {**ENCODED, **OPTIONS})
        return map_rows(rows, self, features, self.fingerprint(rows), f"Encoding the {self.split} split")
