# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
An OpenAI-compatible server for one DEHVF adapter. Needs `pip install -r requirements-app.txt`.

    python demo/serve.py outputs/digits --trust-remote-code --port 8000

This is the application of `transformers serve`, which loads and lists the model, with handlers that check requests
before they reach the model. It answers `/v1/chat/completions`, `/v1/responses`, `/v1/models` and `/health`, and
refuses the other endpoints of `transformers serve`, some of which load any model that a client names. docs/serving.md
explains access and limits.
"""

import asyncio
import hashlib
import ipaddress
import logging
import sys
import threading
import uuid
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import MethodType
from typing import Annotated
from urllib.parse import urlsplit

import torch
import transformers
import typer
import uvicorn
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, StreamingResponse
from jinja2 import TemplateError
from PIL import Image
from starlette.exceptions import HTTPException
from torch.nn import functional as F
from transformers import AutoModelForImageTextToText
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.client_images import ImageReader  # noqa: E402
from demo.openai_api import (  # noqa: E402
    UNSUPPORTED_IN_CHATS,
    UNSUPPORTED_IN_RESPONSES,
    ChatRequest,
    ChatWriter,
    Piece,
    Request,
    RequestError,
    ResponsesRequest,
    ResponsesWriter,
    Token,
    error_body,
    event,
    find_images,
    parse,
    shorten,
)
from training.flags import check_place  # noqa: E402


logger = logging.getLogger("uvicorn.error")  # uvicorn's log, without accesses

# The endpoints. All others are refused, including those that later releases of `transformers serve` add.
ENDPOINTS = {("POST", "/v1/chat/completions"), ("POST", "/v1/responses"), ("GET", "/v1/models"), ("GET", "/health")}
ONE_MODEL = "/v1/models/"  # followed by the name of a model
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
SHUTDOWN_SECONDS = 120  # time limit for answers in progress after SIGTERM
# Time limits for the body of a request and for reading a piece of an answer, so that slow clients do not block others
UPLOAD_SECONDS = READ_SECONDS = 60


# --- the model ---


def remember_images(model, num_images: int = 64):
    """
    Caches the visual memories of images, so that further questions about an image do not run the encoder. Images of a
    batch that are not cached are encoded together. At 7B in bf16, the memory of an image takes 4.2 MB. Threads can
    share the cache.

    Args:
        model: `DehvfForConditionalGeneration`. Its adapters must not be trained afterwards.
        num_images: maximum number of cached images. The least recently used ones are removed first.

    Returns:
        The same model.
    """
    cache, lock, encode = OrderedDict(), threading.Lock(), type(model.model)._encode

    def encode_or_look_up(self, adapter, pixel_values, image_mask, instruction, **kwargs):
        if pixel_values.ndim == 5:  # samples with several images: calls this function for each image
            return encode(self, adapter, pixel_values, image_mask, instruction, **kwargs)
        num_rows, config = len(pixel_values), adapter.config
        rows = range(num_rows) if image_mask is None else image_mask.nonzero().flatten().tolist()
        # If the fuser reads the question, the memory is for this question only
        is_reusable = config.visual_prompts != "none" and not config.reads_instruction
        if kwargs or not rows or not is_reusable or torch.is_grad_enabled():
            return encode(self, adapter, pixel_values, image_mask, instruction, **kwargs)
        pixels = pixel_values.float().cpu().numpy()
        keys = {row: (adapter, hashlib.sha256(pixels[row].tobytes()).digest()) for row in rows}
        with lock:
            memories = {key: cache[key] for key in keys.values() if key in cache}
        new = {key: row for row, key in keys.items() if key not in memories}
        if new:
            encoded = encode(self, adapter, pixel_values[list(new.values())], None, None).pooler_output
            # Copies, since a slice would keep the whole tensor in memory
            memories |= {key: memory[None].clone() for key, memory in zip(new, encoded)}
        with lock:
            for key, memory in memories.items():
                cache[key] = memory
                cache.move_to_end(key)
            while len(cache) > num_images:
                cache.popitem(last=False)
        blank = None if len(rows) == num_rows else torch.zeros_like(memories[keys[rows[0]]])
        memory = [memories[keys[row]] if row in keys else blank for row in range(num_rows)]
        return BaseModelOutputWithPooling(pooler_output=memory[0] if num_rows == 1 else torch.cat(memory))

    # A method, so that `copy.deepcopy` binds it to the copy
    model.model._encode = MethodType(encode_or_look_up, model.model)
    return model


class AutoModelWithCache:
    """Loader that the server finds under the class name that `transformers` does not have."""

    @staticmethod
    def from_pretrained(*args, **kwargs):
        return remember_images(AutoModelForImageTextToText.from_pretrained(*args, **kwargs))


def register():
    """Registers DEHVF with `transformers serve` as a model that reads images."""
    name = "DehvfForConditionalGeneration"
    setattr(transformers, name, AutoModelWithCache)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dehvf"] = name


# --- answers ---


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
            self._tokens.append((len(self.text.rstrip(replacement)), job.describe(token, logprobs)))
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

    def describe(self, token: int, logprobs: torch.Tensor) -> Token:
        """A token in the form for clients, with the most likely alternatives."""
        best = logprobs.topk(self.request.top_logprobs or 0)
        decode = self.tokenizer.decode
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
    masks = [row["image_mask"].flatten() if "image_mask" in row else torch.zeros(0, dtype=torch.bool) for row in rows]
    if not (most := max(map(len, masks))):
        return {}
    shape = next(row["pixel_values"].shape[-3:] for row in rows if "pixel_values" in row)
    pixel_values, image_mask = torch.zeros(len(rows), most, *shape), torch.zeros(len(rows), most, dtype=torch.bool)
    for index, (row, mask) in enumerate(zip(rows, masks)):
        if len(mask):
            pixel_values[index, : len(mask)] = row["pixel_values"].view(-1, *shape)
            image_mask[index, : len(mask)] = mask
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
        for name in tokenizer.model_input_names:
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
        self._tokenizing = threading.Lock()  # a tokenizer changes its padding in each call
        self._thread, self._waiting, self._queueing = ThreadPoolExecutor(1), [], threading.Lock()

    async def prepare(self, request: Request):
        """Inputs of the model and the maximum of new tokens. Raises `RequestError` if images or chat do not fit."""
        urls = find_images(request.messages, self.processor.max_images)
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
        # There are no image tokens, so only the order of the images matters
        chat[0]["content"] += [{"type": "image", "image": image} for image in images]
        try:
            with self._tokenizing:
                return self.processor.apply_chat_template(
                    chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
                )
        except TemplateError as error:
            raise RequestError(
                f"The model's chat template does not take these messages: {error}. Change their roles or their order.",
                param="messages",
                code="invalid_messages",
            ) from error

    def start(self, request: Request, inputs, max_new_tokens: int) -> Job:
        """A job that starts after the earlier jobs or together with them."""
        options, config = self._sampling(request), self.model.generation_config
        seed = request.seed if options.get("do_sample", config.do_sample) else None
        end_tokens = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
        stop = [*request.stop, *self.stop]
        job = Job(request, inputs, max_new_tokens, options, seed, self.processor.tokenizer, end_tokens, stop)
        with self._queueing:
            self._waiting.append(job)
        self._thread.submit(self._answer_next)
        return job

    def _sampling(self, request: Request) -> dict:
        """The arguments of `generate`: the model's own where a request has neither `temperature` nor `top_p`."""
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


def too_long(found: str, max_context_tokens: int) -> RequestError:
    return RequestError(
        f"{found}, but the context of this server has {max_context_tokens} tokens for messages and answer. Shorten "
        "the messages or ask for fewer tokens.",
        param="messages",
        code="context_length_exceeded",
    )


# --- endpoints ---


def server_error(error: Exception) -> dict:
    """The body of the response to an internal error. The details are only written to the log, under the same id."""
    identifier = uuid.uuid4().hex
    logger.error("Error %s", identifier, exc_info=error)
    message = f"Internal error. The server's log has the details under {identifier}. Send this id to its operator."
    return error_body(message, "server_error", code="internal_error")


def unknown_model(given: str, model: str) -> RequestError:
    return RequestError(
        f"This server has no model {shorten(given)}. Use {model!r}, the only one.",
        status=404,
        param="model",
        code="model_not_found",
    )


@dataclass(eq=False)
class Handler:
    """An endpoint that answers chats, with the interface of handlers in `transformers serve`."""

    engine: Engine
    model: str  # the name under which it is listed
    request_class: type[Request]  # the fields that are read
    unsupported: dict[str, tuple]  # the fields that are refused
    writer_class: type  # how the answer is written

    async def handle_request(self, body: dict, request_id: str) -> JSONResponse | StreamingResponse:
        request = parse(self.request_class, self.unsupported, body)
        if request.model not in (None, self.model):
            raise unknown_model(request.model, self.model)
        inputs, max_new_tokens = await self.engine.prepare(request)
        writer = self.writer_class(request, self.model, uuid.uuid4().hex)
        if request.stream:
            pieces = self._stream(writer, request, inputs, max_new_tokens)
            return StreamingResponse(pieces, media_type="text/event-stream")
        job = self.engine.start(request, inputs, max_new_tokens)
        try:
            async for _ in job.pieces():
                pass
        finally:
            job.is_cancelled = True  # where the client left
        return JSONResponse(writer.whole(job))

    async def _stream(self, writer, request: Request, inputs, max_new_tokens: int):
        job = self.engine.start(request, inputs, max_new_tokens)
        try:
            for line in writer.first():
                yield line
            async for piece in job.pieces():
                for line in writer.piece(piece):
                    yield line
            for line in writer.last(job):
                yield line
        except Exception as error:
            yield event(server_error(error))  # the status has already been sent
        finally:
            job.is_cancelled = True  # where the client left


# --- the application ---


class Guard:
    """
    ASGI middleware that only passes on supported requests, and turns every exception into an error in OpenAI's format.

    Args:
        app: the application behind it.
        hosts: host names by which the server may be called.
        origins: origins of web pages that may call it.
        max_requests: number of requests that are answered or wait at the same time.
        max_body_bytes: size of the body of a request.
    """

    def __init__(self, app, hosts: list[str], origins: list[str], max_requests: int, max_body_bytes: int):
        self.app, self.hosts, self.origins = app, {host.lower() for host in hosts}, set(origins)
        self.max_requests, self.max_body_bytes, self.num_requests = max_requests, max_body_bytes, 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        has_started = False

        async def send_and_note(message):
            nonlocal has_started
            has_started = True
            await send(message)

        try:
            self._check(scope)
            if scope["method"] == "POST":
                await self._answer(scope, receive, send_and_note)
            else:
                await self.app(scope, receive, send_and_note)
        except RequestError as error:
            await error.response()(scope, receive, send)
        except ConnectionError as error:  # returning closes the connection
            logger.warning("%s", error)
        except Exception as error:
            if has_started:
                raise
            await JSONResponse(server_error(error), 500)(scope, receive, send)

    def _check(self, scope):
        headers = dict(scope["headers"])
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if not self._is_own_name(host):
            raise RequestError(
                f"The server was called by the name {shorten(host)}, which is not one of its names. Call it by its "
                "IP address or by `localhost`, or start it with `--allow-host` and this name without its port.",
                status=403,
                code="host_not_allowed",
            )
        # A web page of another origin could not read the answer, but could keep the server busy
        if origin and origin not in {*self.origins, f"http://{host}", f"https://{host}"}:
            raise RequestError(
                f"Web pages of the origin {shorten(origin)} may not call this server. Start it with `--allow-origin` "
                "and this origin.",
                status=403,
                code="origin_not_allowed",
            )
        asks_for_model = scope["method"] == "GET" and scope["path"].startswith(ONE_MODEL)
        if not asks_for_model and (scope["method"], scope["path"]) not in ENDPOINTS:
            raise RequestError(
                f"{scope['method']} {shorten(scope['path'])} is not served. Available: "
                f"{', '.join(' '.join(endpoint) for endpoint in sorted(ENDPOINTS))}.",
                status=403,
                code="endpoint_not_allowed",
            )

    def _is_own_name(self, host: str) -> bool:
        """IP addresses are allowed too: a web page can only redirect names to this server (DNS rebinding)."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
            if name in self.hosts:
                return True
            ipaddress.ip_address(name)
            return True
        except ValueError:
            return False

    async def _answer(self, scope, receive, send):
        if self.num_requests >= self.max_requests:
            raise RequestError(
                f"The server already has {self.max_requests} requests, its maximum. Try again later.",
                status=429,
                code="too_many_requests",
            )
        self.num_requests += 1
        try:
            await self._run(scope, await self._read_body(receive), receive, send)
        finally:
            self.num_requests -= 1

    async def _run(self, scope, body: bytes, receive, send):
        """Runs the application until it has answered or the client has left."""
        messages, is_answered = [{"type": "http.request", "body": body, "more_body": False}], False

        async def receive_body():
            return messages.pop() if messages else await asyncio.shield(leaving)

        async def send_and_note(message):
            nonlocal is_answered
            try:
                async with asyncio.timeout(READ_SECONDS):
                    await send(message)
            except TimeoutError as error:
                raise ConnectionError(f"A client did not read its answer for {READ_SECONDS} seconds") from error
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        leaving = asyncio.create_task(receive())  # everything after the body
        answering = asyncio.create_task(self.app(scope, receive_body, send_and_note))
        try:
            await asyncio.wait({leaving, answering}, return_when=asyncio.FIRST_COMPLETED)
            if answering.done() or is_answered:
                await answering
        finally:
            for task in (leaving, answering):
                task.cancel()
            await asyncio.wait({leaving, answering})

    async def _read_body(self, receive) -> bytes:
        body, num_bytes, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                while more:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    # The rest is read and discarded: many clients do not read the answer before they have sent
                    # everything
                    if num_bytes <= self.max_body_bytes:
                        body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError(
                f"The request did not arrive within {UPLOAD_SECONDS} seconds. Send a smaller one.", status=408
            ) from error
        if num_bytes > self.max_body_bytes:
            raise RequestError(
                f"The request has {num_bytes} bytes. This server accepts up to {self.max_body_bytes}. Send a smaller "
                "image or a shorter text.",
                status=413,
                code="request_too_large",
            )
        return bytes(body)


async def answer_malformed(request, error: RequestValidationError | HTTPException) -> JSONResponse:
    message = "The body of the request is not a JSON object. Send one, with `Content-Type: application/json`."
    return RequestError(message, code="invalid_json").response()


def build(
    manager: ModelManager,
    reader: ImageReader,
    hosts: list[str] = ("localhost",),
    origins: list[str] = (),
    max_context_tokens: int = 4096,
    max_requests: int = 32,
    max_batch_size: int = 16,
) -> FastAPI:
    """
    The application of `transformers serve` for the model that `manager` was started with.

    Args:
        manager: manager that has loaded the model.
        reader: reads the images of clients.
        hosts: names by which the server may be called, in addition to its IP addresses.
        origins: origins of web pages that may call it.
        max_context_tokens: maximum number of tokens of messages and answer.
        max_requests: number of requests that are answered or wait at the same time.
        max_batch_size: maximum number of answers in one call of `generate`.

    Raises:
        ValueError: if the generation config of the model has a setting that is not supported.
    """
    name = manager.force_model
    model, processor = manager.load_model_and_processor(manager.process_model_name(name))
    engine = Engine(model, processor, reader, max_context_tokens, max_batch_size)
    app = build_server(
        manager,
        chat_handler=Handler(engine, name, ChatRequest, UNSUPPORTED_IN_CHATS, ChatWriter),
        response_handler=Handler(engine, name, ResponsesRequest, UNSUPPORTED_IN_RESPONSES, ResponsesWriter),
        # No request reaches them
        completion_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=GenerationState(),
    )

    @app.get(ONE_MODEL + "{asked:path}")
    def one_model(asked: str):
        if asked != name:
            raise unknown_model(asked, name)
        return JSONResponse(manager.list_models()[0])

    app.add_exception_handler(RequestError, lambda request, error: error.response())
    app.add_exception_handler(RequestValidationError, answer_malformed)
    app.add_exception_handler(HTTPException, answer_malformed)  # for JSON that is nested too deep
    # An image in base64, and a large amount of text
    max_body_bytes = reader.max_bytes * 4 // 3 + 2**20
    app.add_middleware(Guard, hosts=hosts, origins=origins, max_requests=max_requests, max_body_bytes=max_body_bytes)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def check_origin(origin: str) -> str:
    """An origin as browsers write it. Raises `ValueError` if it has another form."""
    default_ports = {"http": ":80", "https": ":443"}
    try:
        url = urlsplit(origin.lower())
        is_origin = url.port != 0 and url.hostname and url.scheme in default_ports  # reading a wrong port raises
    except ValueError:
        is_origin = False
    if not is_origin or origin.lower() != f"{url.scheme}://{url.netloc}" or {"@", "*"} & {*origin}:
        raise ValueError(f"The origin {origin!r} is not a scheme and host like https://chat.example.org.")
    return origin.lower().removesuffix(default_ports[url.scheme])


def check_host(name: str) -> str:
    """The name in lower case. Raises `ValueError` if it is not a host name alone."""
    try:
        is_name = urlsplit(f"//{name}").hostname == name.lower()  # which has no port
    except ValueError:
        is_name = False
    if not is_name or "*" in name:
        raise ValueError(f"The host {name!r} is not a name alone, such as chat.example.org, without scheme and port.")
    return name.lower()


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter, the only model that is served.")],
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code in the adapter's repository.")] = False,
    device: Annotated[str, typer.Option(help="For example `auto`, `cuda:0`, `cpu`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of the model; `auto` is the dtype in its files.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="For example `sdpa`.")] = None,
    quantization: Annotated[str | None, typer.Option(help="`bnb-4bit` or `bnb-8bit`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; `0.0.0.0` for all.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    allow_host: Annotated[
        list[str], typer.Option(help="Another host name of this server, used by clients. May be repeated.")
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str],
        typer.Option(help="Origin of web pages that may call it: `https://chat.example.org`. May be repeated."),
    ] = [],  # noqa: B006
    allow_image_host: Annotated[
        list[str], typer.Option(help="Host, or host:port, from which images may be fetched. May be repeated.")
    ] = [],  # noqa: B006
    allow_image_folder: Annotated[
        list[str], typer.Option(help="Folder from which images at `file:` URLs may be read. May be repeated.")
    ] = [],  # noqa: B006
    max_image_bytes: Annotated[int, typer.Option(min=1, help="Maximum size of an image file.")] = 20 * 2**20,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Maximum width times height.")] = 25_000_000,
    max_image_seconds: Annotated[float, typer.Option(min=0, help="Maximum time to fetch an image.")] = 10.0,
    max_context_tokens: Annotated[int, typer.Option(min=2, help="Maximum tokens of messages and answer.")] = 4096,
    max_requests: Annotated[int, typer.Option(min=1, help="Maximum requests in progress or waiting.")] = 32,
    max_batch_size: Annotated[int, typer.Option(min=1, help="Maximum answers in one batch.")] = 16,
):
    """Serves one DEHVF adapter with an OpenAI-compatible API. docs/serving.md explains access and limits."""
    adapter = adapter.rstrip("/") or adapter
    try:
        origins, hosts = [check_origin(origin) for origin in allow_origin], [check_host(name) for name in allow_host]
        check_place("adapter", adapter)
        reader = ImageReader(
            allow_image_host, allow_image_folder, max_image_bytes, max_image_pixels, max_image_seconds
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    register()
    options = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    options |= {"quantization": quantization, "trust_remote_code": trust_remote_code}
    manager = ModelManager(**options, force_model=adapter)
    hosts = ["localhost", host, *hosts]
    try:
        model, _ = manager.load_model_and_processor(manager.process_model_name(adapter))
        if model.config.model_type != "dehvf":
            raise ValueError(
                f"{adapter} is a model of the type {model.config.model_type!r}, not a DEHVF adapter. Give a folder "
                "that `train.py` has saved, or its Hub id."
            )
        app = build(manager, reader, hosts, origins, max_context_tokens, max_requests, max_batch_size)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=SHUTDOWN_SECONDS)


if __name__ == "__main__":
    typer.run(main)
