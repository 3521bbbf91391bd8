# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Answers the requests of `serve.py` with one model. A separate thread calls `generate`, with several requests in one
batch if possible, and passes each answer on token by token.
"""

import asyncio
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from jinja2 import TemplateError
from PIL import Image
from torch.nn import functional as F

from dehvf import processing
from demo.client_images import ImageReader
from demo.openai_api import Piece, Request, RequestError, Token, find_images, shorten
from training.chats import ChatTokenizer, find_left_out


DEFAULT_NEW_TOKENS = 1024  # as in `transformers serve`
# Texts with more characters than this per allowed token are refused without tokenizing them
MAX_CHARACTERS_PER_TOKEN = 32
MIN_TEMPERATURE = 1e-3  # below this the best token has all the probability, and scores divided by it overflow
MAX_PADDING = 2  # maximum ratio of all tokens of a batch to those that are not padding
# Settings of a generation config that read the whole prompt, and the values that turn them off
READERS_OF_PROMPTS = {"repetition_penalty": (None, 1), "no_repeat_ngram_size": (None, 0), "min_length": (None, 0)}
READERS_OF_PROMPTS |= {"encoder_repetition_penalty": (None, 1), "encoder_no_repeat_ngram_size": (None, 0)}
# Settings that need arguments which this server does not pass, or that cannot be streamed
UNSUPPORTED_SETTINGS = ("token_healing", "penalty_alpha", "dola_layers", "constraints", "force_words_ids")
UNSUPPORTED_SETTINGS += ("prompt_lookup_num_tokens", "assistant_early_exit", "use_mtp")


class Answer:
    """An answer of a job, the choice with the number `index`, which is generated in the thread of the model."""

    def __init__(self, job: "Job", index: int):
        self.job, self.index = job, index
        self.ids, self.text, self.finish_reason = [], "", None
        self._tokens = []  # where the text of each token begins, and the token
        self._num_sent = self._num_tokens_sent = 0

    def add(self, token: int, logprobs: torch.Tensor | None):
        """Adds a token. `logprobs` are those of all tokens in its place, if the request asks for them."""
        job, replacement = self.job, "\N{REPLACEMENT CHARACTER}"  # for an incomplete character
        if logprobs is not None:
            described = job.describe(token, logprobs, is_first=not self.ids)
            self._tokens.append((len(self.text.rstrip(replacement)), described))
        self.ids.append(token)
        # Cleaning would change text that has been sent
        self.text = job.tokenizer.decode(self.ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        found = [place for stop in job.stop if (place := self.text.find(stop)) >= 0]
        if found:
            self.text = self.text[: min(found)]
        if found or token in job.end_tokens:
            self.end("stop")
        elif len(self.ids) >= job.max_new_tokens:
            self.end("length")
        elif not self.text.endswith(replacement):
            self._send(len(self.text) - self._num_held_back())

    def end(self, reason: str):
        self.finish_reason = reason
        if reason == "length":  # which may have been reached in the middle of a character
            self.text = self.text.rstrip("\N{REPLACEMENT CHARACTER}")
        self._send(len(self.text))

    def tokens(self, end: int | None = None) -> list[Token]:
        """The tokens whose text begins before this place, by default the end of the text."""
        return [token for start, token in self._tokens if start < (len(self.text) if end is None else end)]

    def _num_held_back(self) -> int:
        """The length of the longest suffix of the text that may be the beginning of a stop string."""
        longest = len(self.text) + 1  # a stop may be much longer than the text
        beginnings = (stop[:length] for stop in self.job.stop for length in range(min(len(stop), longest)))
        return max((len(beginning) for beginning in beginnings if self.text.endswith(beginning)), default=0)

    def _send(self, end: int):
        if end > self._num_sent:
            tokens = self.tokens(end)
            self.job.put(Piece(self.index, self.text[self._num_sent : end], tokens[self._num_tokens_sent :]))
            self._num_sent, self._num_tokens_sent = end, len(tokens)


@dataclass(eq=False)
class Job:
    """A request that is being answered. The event loop iterates over the new pieces of its answers."""

    request: Request
    inputs: dict  # of the model, for one row
    max_new_tokens: int  # of an answer
    options: dict  # arguments of `generate`
    seed: int | None  # if the answer is sampled
    tokenizer: object
    end_tokens: list[int]
    stop: Sequence[str] = ()  # texts before which an answer ends
    word: Sequence[int] = ()  # the tokens of "a"
    is_cancelled: bool = False

    def __post_init__(self):
        self.answers = [Answer(self, index) for index in range(self.request.num_choices)]
        self._pieces, self._loop = asyncio.Queue(), asyncio.get_running_loop()

    @property
    def num_prompt_tokens(self) -> int:
        return self.inputs["input_ids"].shape[1]

    @property
    def num_tokens(self) -> int:
        """Of all answers."""
        return sum(len(answer.ids) for answer in self.answers)

    @property
    def is_done(self) -> bool:
        return all(answer.finish_reason is not None for answer in self.answers)

    def describe(self, token: int, logprobs: torch.Tensor, is_first: bool) -> Token:
        """A token in the form for clients, with the most likely alternatives."""
        best = logprobs.topk(self.request.top_logprobs or 0)
        # SentencePiece tokenizers remove the space before a text that they decode, so others are decoded after a word
        before = [] if is_first else self.word

        def decode(other: int) -> str:
            text = self.tokenizer.decode([*before, other], clean_up_tokenization_spaces=False)
            return text.removeprefix("a") if before else text

        alternatives = [(decode(other), value) for value, other in zip(best.values.tolist(), best.indices.tolist())]
        return Token(decode(token), logprobs[token].item(), alternatives)

    def put(self, piece: Piece | Exception | None):
        """A piece of an answer; the error of the model; or `None`, after the last piece of the last answer."""
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def pieces(self):
        """The pieces of all answers. Raises the error of `generate`."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece


def stack_images(rows: list[dict]) -> dict[str, torch.Tensor]:
    """`pixel_values` and `image_mask` of samples that were processed one by one and may have any number of images."""
    images = {index: row["pixel_values"].flatten(0, -4) for index, row in enumerate(rows) if "pixel_values" in row}
    if not images:
        return {}
    most, shape = max(map(len, images.values())), next(iter(images.values())).shape[1:]
    pixel_values, image_mask = torch.zeros(len(rows), most, *shape), torch.zeros(len(rows), most, dtype=torch.bool)
    for index, own in images.items():
        # Tiles of a small image are blank, and masked wherever another image follows
        pixel_values[index, : len(own)] = own
        image_mask[index, : len(own)] = rows[index]["image_mask"].flatten() if "image_mask" in rows[index] else True
    if most == 1:
        return {"pixel_values": pixel_values[:, 0], "image_mask": image_mask[:, 0]}
    return {"pixel_values": pixel_values, "image_mask": image_mask}


class Batch:
    """The answers of one call of `generate`, one per row, with its stopping criterion and logits processor."""

    def __init__(self, jobs: list[Job]):
        self.jobs, self.answers = jobs, [answer for job in jobs for answer in job.answers]
        self.logprobs = [None] * len(self.answers)

    def inputs(self) -> dict[str, torch.Tensor]:
        """Combines the inputs of the jobs for one call, padded on the left."""
        rows, tokenizer = [answer.job.inputs for answer in self.answers], self.jobs[0].tokenizer
        length = max(job.num_prompt_tokens for job in self.jobs)
        inputs = {}
        for name in (*tokenizer.model_input_names, "instruction_mask"):
            if name in rows[0]:
                value = tokenizer.pad_token_id if name == "input_ids" else 0
                padded = [F.pad(row[name], (length - row[name].shape[1], 0), value=value) for row in rows]
                inputs[name] = torch.cat(padded)
        return inputs | stack_images(rows)

    def keep_logprobs(self, input_ids, scores: torch.Tensor) -> torch.Tensor:
        """Keeps the logprobs of the model, before temperature and `top_p` are applied."""
        for row, answer in enumerate(self.answers):
            if answer.job.request.logprobs and answer.finish_reason is None:
                self.logprobs[row] = scores[row].float().log_softmax(-1)
        return scores

    def grow(self, input_ids: torch.Tensor, scores, **kwargs) -> torch.Tensor:
        """Passes its new token to each answer. Returns which rows are done, also because their clients left."""
        for answer, token, logprobs in zip(self.answers, input_ids[:, -1].tolist(), self.logprobs):
            job = answer.job
            if answer.finish_reason is None and not job.is_cancelled:
                answer.add(token, logprobs)
                if job.is_done:
                    job.put(None)
        is_done = [answer.finish_reason is not None or answer.job.is_cancelled for answer in self.answers]
        return torch.tensor(is_done, device=input_ids.device)


class Engine:
    """
    Answers requests with one model in a separate thread. Each call of `generate` answers the request that has waited
    longest, together with later requests that need the same options and would not be mostly padding.

    Args:
        model: `DehvfForConditionalGeneration`.
        processor: `DehvfProcessor`.
        reader: reads the images of clients.
        max_context_tokens: maximum number of tokens of a chat and its answer, unless that of the model is lower.
        max_batch_size: maximum number of answers in a call. A request for more choices gets a separate call.
    """

    def __init__(self, model, processor, reader: ImageReader, max_context_tokens: int, max_batch_size: int):
        self.model, self.processor, self.reader, self.max_batch_size = model, processor, reader, max_batch_size
        has_memory = getattr(model.config, "visual_prompts", None) != "none"
        self.max_images = processor.max_images if has_memory else 0
        config = model.generation_config
        if unsupported := [name for name in UNSUPPORTED_SETTINGS if getattr(config, name, None)]:
            raise ValueError(
                f"The model's generation_config.json sets `{unsupported[0]}`, which this server does not support. "
                "Remove it."
            )
        # Each answer looks for them itself, as for those of its request
        stop_strings, config.stop_strings = getattr(config, "stop_strings", None) or [], None
        self.stop = [stop_strings] if isinstance(stop_strings, str) else stop_strings
        config.num_return_sequences = 1  # requests have `n`
        num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_context_tokens = min(max_context_tokens, num_positions or max_context_tokens)
        self._chats = ChatTokenizer(processor)
        self._word = processor.tokenizer("a", add_special_tokens=False).input_ids
        self._tokenizing = threading.Lock()  # a tokenizer changes its padding in each call
        self._thread, self._waiting, self._queueing = ThreadPoolExecutor(1), [], threading.Lock()

    async def prepare(self, request: Request):
        """Inputs of the model and the maximum of new tokens. Raises `RequestError` if images or chat do not fit."""
        urls = find_images(request.messages, self.max_images)
        images = [await self.reader.load(url) for url in urls]
        chat = [message.text_message() for message in request.messages]
        inputs = await asyncio.to_thread(self._process, chat, images)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        left = self.max_context_tokens - num_prompt_tokens
        max_new_tokens = request.max_new_tokens
        if left < (max_new_tokens or 1):
            asked = f" and {max_new_tokens} for the answer are asked for" if max_new_tokens else ""
            raise too_long(f"The messages have {num_prompt_tokens} tokens{asked}", self.max_context_tokens)
        default = self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        return inputs, max_new_tokens or min(left, default)

    def _process(self, chat: list[dict], images: list[Image.Image]):
        num_characters = sum(len(part["text"]) for message in chat for part in message["content"])
        if num_characters > MAX_CHARACTERS_PER_TOKEN * self.max_context_tokens:
            raise too_long(f"The messages have {num_characters} characters", self.max_context_tokens)
        if images:  # there are no image tokens
            for part in (part for message in chat for part in message["content"]):
                part["text"], _ = processing.remove_image_markers(part["text"])
        try:
            with self._tokenizing:
                return self._encode(chat, images)
        except TemplateError as error:
            raise refused(
                f"The model's chat template does not take these messages: {error}. Change their roles or their order."
            ) from error

    def _encode(self, chat: list[dict], images: list[Image.Image]) -> dict[str, torch.Tensor]:
        """
        The inputs of the model. Special tokens in a message are encoded as ordinary text, as in training.

        Raises:
            RequestError: if the chat template leaves out or changes a message that is not the assistant's, or, for a
                model that reads the question, does not show where the assistant's messages are.
        """
        chats = self._chats
        chats.forget()  # the special tokens of other clients
        chat = [{**message, "content": "\n".join(part["text"] for part in message["content"])} for message in chat]
        num_special = sum(len(chats.pattern.findall(message["content"])) for message in chat)
        if num_special > self.max_context_tokens:
            raise too_long(f"The messages have {num_special} special tokens", self.max_context_tokens)
        protected = [{**message, "content": chats.protect(message["content"])} for message in chat]
        text = self.processor.apply_chat_template(protected, add_generation_prompt=True)
        if (index := find_left_out(protected, text)) is not None:
            raise refused(
                f"The model's chat template leaves out or changes the message {shorten(chat[index]['content'])} of "
                f"the role {chat[index]['role']!r}. Remove it, or put its text into a message of the user."
            )
        ids, places = chats.encode(text)
        input_ids = torch.tensor([ids])
        inputs = {"input_ids": input_ids, "attention_mask": torch.ones_like(input_ids)}
        # A chat that is too long, which `prepare` refuses, may have thousands of answers to compare with each token
        if getattr(self.model.config, "reads_instruction", False) and len(ids) < self.max_context_tokens:
            try:
                spans = chats.find_answers(chat, text)
            except ValueError as error:
                raise refused(
                    "The model was trained to read the question without earlier answers, and its chat template does "
                    "not show where they are. Leave the messages of the assistant out."
                ) from error
            is_answer = [any(begin <= start < end for begin, end in spans) for start, _ in places]
            inputs["instruction_mask"] = ~torch.tensor([is_answer])
        return {**inputs, **(self.processor(images=[images], return_tensors="pt") if images else {})}

    def start(self, request: Request, inputs, max_new_tokens: int) -> Job:
        """A job that starts after the earlier jobs or together with them."""
        options, config = self._sampling(request), self.model.generation_config
        seed = request.seed if options.get("do_sample", config.do_sample) else None
        end_tokens = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        stop = [*request.stop, *self.stop]
        tokenizer = self.processor.tokenizer
        job = Job(request, inputs, max_new_tokens, options, seed, tokenizer, end_tokens, stop, self._word)
        with self._queueing:
            self._waiting.append(job)
        self._thread.submit(self._answer_next)
        return job

    def _sampling(self, request: Request) -> dict:
        """
        The arguments of `generate`; none, so that the generation config applies, if a request has neither
        `temperature` nor `top_p`.
        """
        config = self.model.generation_config
        if request.temperature is not None and request.temperature < MIN_TEMPERATURE:
            return {"do_sample": False} if config.do_sample else {}
        if request.temperature is None and request.top_p is None:
            return {}
        given = {"temperature": request.temperature, "top_p": request.top_p}
        # OpenAI's API samples from all tokens, `generate` by default from the best 50
        options = {"do_sample": True, "top_k": config.top_k or 0, "temperature": config.temperature or 1.0}
        return {**options, **{name: value for name, value in given.items() if value is not None}}

    def _answer_next(self):
        if not (jobs := self._take()):  # they have been answered together with others
            return
        batch, seed = Batch(jobs), jobs[0].seed
        asks_logprobs = any(job.request.logprobs for job in jobs)
        try:
            # The seed of a request must not affect the requests after it
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                self.model.generate(
                    **{name: tensor.to(self.model.device) for name, tensor in batch.inputs().items()},
                    max_new_tokens=max(job.max_new_tokens for job in jobs),
                    num_beams=1,  # with beams there are no pieces before the end
                    stopping_criteria=[batch.grow],
                    logits_processor=[batch.keep_logprobs] if asks_logprobs else [],
                    **jobs[0].options,
                )
        except Exception as error:
            for job in jobs:
                job.put(error)
            return
        # Their clients left, or a limit of the generation config came first, such as `max_time`
        for job in (job for job in jobs if not job.is_done):
            for answer in (answer for answer in job.answers if answer.finish_reason is None):
                answer.end("length")
            job.put(None)

    def _take(self) -> list[Job]:
        """Takes the job that has waited longest out of the queue, and the jobs to answer with it."""
        with self._queueing:
            jobs, left = [], []
            for job in self._waiting:
                if not job.is_cancelled:  # its client has not disconnected meanwhile
                    (jobs if not jobs or self._fits(jobs, job) else left).append(job)
            self._waiting = left
        return jobs

    def _fits(self, jobs: list[Job], job: Job) -> bool:
        """Whether a job can be answered in the same call of `generate` as others, with the same result as alone."""
        first, together, config = jobs[0], [*jobs, job], self.model.generation_config
        if job.options != first.options or job.seed is not None or first.seed is not None:
            return False
        lengths = [job.num_prompt_tokens for job in together for _ in job.answers]
        # `generate` forces this token in the last place of the longest answer
        if config.forced_eos_token_id is not None and job.max_new_tokens != first.max_new_tokens:
            return False
        # Some settings of a generation config count the padding before a prompt as a part of it
        if any(getattr(config, name, None) not in neutral for name, neutral in READERS_OF_PROMPTS.items()):
            return len(set(lengths)) == 1 and len(lengths) <= self.max_batch_size
        return len(lengths) <= self.max_batch_size and len(lengths) * max(lengths) <= MAX_PADDING * sum(lengths)


def refused(message: str) -> RequestError:
    return RequestError(message, param="messages", code="invalid_messages")


def too_long(found: str, max_context_tokens: int) -> RequestError:
    return RequestError(
        f"{found}, but the context of this server has {max_context_tokens} tokens for messages and answer. Shorten "
        "the messages or ask for fewer tokens.",
        param="messages",
        code="context_length_exceeded",
    )
