# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
An OpenAI-compatible server for one DEHVF adapter. Needs `pip install -r requirements-app.txt`.

    python demo/serve.py outputs/digits --trust-remote-code --port 8000

This is the application of `transformers serve`, which loads the model and lists it, with handlers that check what a
client sends before it reaches the model. It answers `/v1/chat/completions`, `/v1/responses`, `/v1/models` and
`/health`, and refuses the other endpoints of `transformers serve`, some of which load any model that a client names.
docs/serving.md says who can reach what.
"""

import asyncio
import hashlib
import ipaddress
import logging
import sys
import threading
import uuid
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
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
from starlette.exceptions import HTTPException
from transformers import AutoModelForImageTextToText, StoppingCriteria, StoppingCriteriaList
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
    Request,
    RequestError,
    ResponsesRequest,
    ResponsesWriter,
    error_body,
    event,
    find_images,
    parse,
    shorten,
)


logger = logging.getLogger("uvicorn.error")  # uvicorn's log of everything but accesses

# What is answered. Anything else is refused, also what a later release of `transformers serve` adds.
ENDPOINTS = {
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("GET", "/v1/models"),
    ("GET", "/health"),
}
DEFAULT_NEW_TOKENS = 1024  # as in `transformers serve`
# A token of more characters than this on average is not expected, so that longer texts need not be tokenized
MAX_CHARACTERS_PER_TOKEN = 32
MIN_TEMPERATURE = 1e-3  # below it the best token has all the probability, and scores divided by it overflow
UPLOAD_SECONDS = 60  # for the body of a request, so that clients that send slowly do not block the others


# --- the model ---


class MemoryCache:
    """
    What the images that were used last were encoded to. Safe to share between threads.

    Args:
        num_images: how many to keep. The least recently used one is dropped first.
    """

    def __init__(self, num_images: int):
        self.num_images = num_images
        self._outputs = OrderedDict()
        self._lock = threading.Lock()

    def get(self, key):
        """The entry under this key, or `None`."""
        with self._lock:
            if key in self._outputs:
                self._outputs.move_to_end(key)
            return self._outputs.get(key)

    def put(self, key, output):
        with self._lock:
            self._outputs[key] = output
            if len(self._outputs) > self.num_images:
                self._outputs.popitem(last=False)


def remember_images(model, num_images: int = 64):
    """
    Caches the visual memories of single images, so that another question about an image does not run the encoder.
    At 7B in bf16 the memory of an image takes 4.2 MB.

    Args:
        model: `DehvfForConditionalGeneration`. Its adapters must not be trained afterwards.
        num_images: how many images to keep.

    Returns:
        The same model.
    """
    cache, encode = MemoryCache(num_images), model.model._encode

    def encode_or_look_up(adapter, pixel_values, image_mask, instruction, **kwargs):
        is_single = len(pixel_values) == 1 and (image_mask is None or image_mask.all())
        # A fuser that reads the question makes a memory for this question alone
        if kwargs or not is_single or adapter.config.reads_instruction or torch.is_grad_enabled():
            return encode(adapter, pixel_values, image_mask, instruction, **kwargs)
        key = adapter, hashlib.sha256(pixel_values.float().cpu().numpy().tobytes()).digest()
        output = cache.get(key)
        if output is None:
            memory = encode(adapter, pixel_values, None, None).pooler_output
            output = BaseModelOutputWithPooling(pooler_output=memory)
            cache.put(key, output)
        return output

    model.model._encode = encode_or_look_up
    return model


class AutoModelWithCache:
    """What the server finds under the name of the class that `transformers` does not have."""

    @staticmethod
    def from_pretrained(*args, **kwargs):
        return remember_images(AutoModelForImageTextToText.from_pretrained(*args, **kwargs))


def register():
    """Tells `transformers serve` how to load DEHVF and that it takes images."""
    name = "DehvfForConditionalGeneration"
    setattr(transformers, name, AutoModelWithCache)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES["dehvf"] = name


# --- answers ---


class Answer(StoppingCriteria):
    """
    An answer that grows. `generate`, in its own thread, calls it with the tokens so far and stops when it says so;
    the event loop iterates over the new pieces of text.

    Args:
        tokenizer: what decodes the tokens.
        num_prompt_tokens: number of tokens before the answer.
        max_new_tokens: number of tokens after which `generate` stops.
        stops: texts before which the answer ends.
    """

    def __init__(self, tokenizer, num_prompt_tokens: int, max_new_tokens: int, stops: list[str]):
        self.tokenizer, self.stops = tokenizer, stops
        self.num_prompt_tokens, self.max_new_tokens = num_prompt_tokens, max_new_tokens
        self.num_tokens, self.text = 0, ""
        self.is_stopped = self.is_cancelled = self.has_ended = False
        self._num_sent, self._pieces, self._loop = 0, asyncio.Queue(), asyncio.get_running_loop()

    def __call__(self, input_ids, scores, **kwargs):
        tokens = input_ids[0, self.num_prompt_tokens :].tolist()
        self.num_tokens, self.text = len(tokens), self.tokenizer.decode(tokens, skip_special_tokens=True)
        found = [place for stop in self.stops if (place := self.text.find(stop)) >= 0]
        if found:
            self.text, self.is_stopped = self.text[: min(found)], True
        elif not self.text.endswith("\N{REPLACEMENT CHARACTER}"):  # of a character that is not complete
            self._send(len(self.text) - self._num_held_back())
        return torch.full(input_ids.shape[:1], self.is_stopped or self.is_cancelled, device=input_ids.device)

    def _num_held_back(self) -> int:
        """The length of the longest end of the text with which a stop may begin."""
        lengths = (length for stop in self.stops for length in range(len(stop)) if self.text.endswith(stop[:length]))
        return max(lengths, default=0)

    def _send(self, end: int):
        if end > self._num_sent:
            self._put(self.text[self._num_sent : end])
            self._num_sent = end

    def end(self, has_ended: bool):
        """Called after `generate`, with whether the last token was one that ends an answer."""
        self.has_ended = has_ended
        self._send(len(self.text))
        self._put(None)

    def fail(self, error: Exception):
        """Called when `generate` raised."""
        self._put(error)

    def _put(self, piece: str | Exception | None):
        self._loop.call_soon_threadsafe(self._pieces.put_nowait, piece)

    async def pieces(self):
        """The pieces of the text. Raises the error of `generate`."""
        while (piece := await self._pieces.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece

    @property
    def finish_reason(self) -> str:
        is_cut = self.num_tokens >= self.max_new_tokens and not self.is_stopped and not self.has_ended
        return "length" if is_cut else "stop"


class Engine:
    """
    Answers requests with one model, one after another in a thread of its own.

    Args:
        model: `DehvfForConditionalGeneration`.
        processor: `DehvfProcessor`.
        reader: what reads the images of clients.
        max_context_tokens: number of tokens of a chat and its answer. A model for fewer lowers it.
    """

    def __init__(self, model, processor, reader: ImageReader, max_context_tokens: int):
        self.model, self.processor, self.reader = model, processor, reader
        num_positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
        self.max_context_tokens = min(max_context_tokens, num_positions or max_context_tokens)
        self._tokenizing = threading.Lock()  # a tokenizer sets its padding for each call
        self._thread = ThreadPoolExecutor(1)

    async def prepare(self, request: Request):
        """
        The inputs of the model and the number of new tokens.

        Raises:
            RequestError: if an image cannot be read, or the chat does not suit the model's template or context.
        """
        urls = find_images(request.messages, self.processor.max_images)
        files = [await self.reader.read(url) for url in urls]
        chat = [message.text_message() for message in request.messages]
        inputs = await asyncio.to_thread(self._process, chat, files)
        num_prompt_tokens = inputs["input_ids"].shape[1]
        left = self.max_context_tokens - num_prompt_tokens
        max_new_tokens = request.max_new_tokens
        if left < (max_new_tokens or 1):
            asked = f" and {max_new_tokens} for the answer are asked for" if max_new_tokens else ""
            raise too_long(f"The messages have {num_prompt_tokens} tokens{asked}", self.max_context_tokens)
        default = self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        return inputs, max_new_tokens or min(left, default)

    def _process(self, chat: list[dict], files: list[bytes]):
        num_characters = sum(len(part["text"]) for message in chat for part in message["content"])
        if num_characters > MAX_CHARACTERS_PER_TOKEN * self.max_context_tokens:
            raise too_long(f"The messages have {num_characters} characters", self.max_context_tokens)
        # No image is a token, so their order alone matters
        chat[0]["content"] += [{"type": "image", "image": self.reader.decode(data)} for data in files]
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

    def start(self, request: Request, inputs, max_new_tokens: int) -> Answer:
        """An answer that the model gives after those that were started before."""
        tokenizer = self.processor.tokenizer
        answer = Answer(tokenizer, inputs["input_ids"].shape[1], max_new_tokens, request.stop)
        self._thread.submit(self._generate, answer, inputs, request.seed, self._sampling(request))
        return answer

    def _sampling(self, request: Request) -> dict:
        """The arguments of `generate`: the model's own where a request has neither `temperature` nor `top_p`."""
        if request.temperature is not None and request.temperature < MIN_TEMPERATURE:
            return {"do_sample": False}
        if request.temperature is None and request.top_p is None:
            return {}
        given = {"temperature": request.temperature, "top_p": request.top_p}
        # OpenAI's API samples from all tokens, `generate` by default from the best 50
        options = {"do_sample": True, "top_k": self.model.generation_config.top_k or 0}
        return {**options, **{name: value for name, value in given.items() if value is not None}}

    def _generate(self, answer: Answer, inputs, seed: int | None, options: dict):
        try:
            if answer.is_cancelled:  # while it waited
                return
            # The seed of one request does not make those that follow repeat themselves
            with torch.random.fork_rng(enabled=seed is not None):
                if seed is not None:
                    torch.manual_seed(seed)
                tokens = self.model.generate(
                    **inputs.to(self.model.device),
                    max_new_tokens=answer.max_new_tokens,
                    num_beams=1,  # beams have no first piece before the end
                    stopping_criteria=StoppingCriteriaList([answer]),
                    **options,
                )
            end_tokens = self.model.generation_config.eos_token_id
            answer.end(tokens[0, -1].item() in (end_tokens if isinstance(end_tokens, list) else [end_tokens]))
        except Exception as error:
            answer.fail(error)


def too_long(found: str, max_context_tokens: int) -> RequestError:
    return RequestError(
        f"{found}, but the context of this server has {max_context_tokens} tokens for messages and answer. Shorten "
        "the messages or ask for fewer tokens.",
        param="messages",
        code="context_length_exceeded",
    )


# --- endpoints ---


def server_error(error: Exception) -> dict:
    """The body that a client gets for a fault of ours. What happened is in the log alone, under the same id."""
    identifier = uuid.uuid4().hex
    logger.error("Error %s", identifier, exc_info=error)
    message = f"The server failed. Its log says why, under the id {identifier}. Send the id to whoever runs it."
    return error_body(message, "server_error", code="internal_error")


class Handler:
    """
    An endpoint that answers chats, in the form in which `transformers serve` calls it.

    Args:
        engine: what answers.
        model: the name under which the model is listed.
        request_class: the fields that are read.
        unsupported: the fields that are refused.
        writer_class: how the answer is written.
    """

    def __init__(self, engine: Engine, model: str, request_class, unsupported, writer_class):
        self.engine, self.model = engine, model
        self.request_class, self.unsupported, self.writer_class = request_class, unsupported, writer_class

    async def handle_request(self, body: dict, request_id: str) -> JSONResponse | StreamingResponse:
        request = parse(self.request_class, self.unsupported, body)
        if request.model not in (None, self.model):
            raise RequestError(
                f"The model {shorten(request.model)} does not exist here. Ask for {self.model!r}, the only one.",
                status=404,
                param="model",
                code="model_not_found",
            )
        inputs, max_new_tokens = await self.engine.prepare(request)
        writer = self.writer_class(request, self.model, uuid.uuid4().hex)
        if request.stream:
            return StreamingResponse(
                self._stream(writer, request, inputs, max_new_tokens), media_type="text/event-stream"
            )
        answer = self.engine.start(request, inputs, max_new_tokens)
        try:
            async for _ in answer.pieces():
                pass
        finally:
            answer.is_cancelled = True  # where the client left
        return JSONResponse(
            writer.whole(answer.text, answer.finish_reason, answer.num_prompt_tokens, answer.num_tokens)
        )

    async def _stream(self, writer, request: Request, inputs, max_new_tokens: int):
        answer = self.engine.start(request, inputs, max_new_tokens)
        try:
            for line in writer.first():
                yield line
            async for piece in answer.pieces():
                for line in writer.piece(piece):
                    yield line
            for line in writer.last(answer.text, answer.finish_reason, answer.num_prompt_tokens, answer.num_tokens):
                yield line
        except Exception as error:
            yield event(server_error(error))  # the status was sent before
        finally:
            answer.is_cancelled = True  # where the client left


# --- the application ---


class Guard:
    """
    ASGI middleware that lets through what `serve.py` answers, and turns every fault into an error in OpenAI's form.

    Args:
        app: the application behind it.
        hosts: names by which the server may be called.
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
        except Exception as error:
            if has_started:
                raise
            await JSONResponse(server_error(error), 500)(scope, receive, send)

    def _check(self, scope):
        headers = dict(scope["headers"])
        host, origin = (headers.get(name, b"").decode("latin-1") for name in (b"host", b"origin"))
        if not self._is_own_name(host):
            raise RequestError(
                f"The server was called by the name {shorten(host)}, which is not one of its own. Call it by its IP "
                "address or by `localhost`, or start it with `--allow-host` and this name.",
                status=403,
                code="host_not_allowed",
            )
        # A web page of another origin could not read the answer, but could have the server work
        if origin and origin not in {*self.origins, f"http://{host}", f"https://{host}"}:
            raise RequestError(
                f"Web pages of the origin {shorten(origin)} may not call this server. Start it with `--allow-origin` "
                "and this origin.",
                status=403,
                code="origin_not_allowed",
            )
        if (scope["method"], scope["path"]) not in ENDPOINTS:
            raise RequestError(
                f"{scope['method']} {shorten(scope['path'])} is not served. There are "
                f"{', '.join(' '.join(endpoint) for endpoint in sorted(ENDPOINTS))}.",
                status=403,
                code="endpoint_not_allowed",
            )

    def _is_own_name(self, host: str) -> bool:
        """An IP address too: only names can be made to lead to this server by a page that the browser loaded."""
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
                f"The server has {self.max_requests} requests at work, as many as it takes. Try again later.",
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
            await send(message)
            is_answered = message["type"] == "http.response.body" and not message.get("more_body", False)

        leaving = asyncio.create_task(receive())  # all that comes after the body
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
                    # What is too much is read on and dropped: many clients read no answer before they sent everything
                    if num_bytes <= self.max_body_bytes:
                        body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError(
                f"The request did not arrive within {UPLOAD_SECONDS} seconds. Send less.", status=408
            ) from error
        if num_bytes > self.max_body_bytes:
            raise RequestError(
                f"The request has {num_bytes} bytes. This server reads up to {self.max_body_bytes}. Send a smaller "
                "image or a shorter text.",
                status=413,
                code="request_too_large",
            )
        return bytes(body)


async def answer_error(request, error: RequestError) -> JSONResponse:
    return error.response()


async def answer_malformed(request, error: RequestValidationError | HTTPException) -> JSONResponse:
    message = (
        "The body of the request is not a JSON object. Send one, with the header `Content-Type: application/json`."
    )
    return RequestError(message, code="invalid_json").response()


def build(
    manager: ModelManager,
    reader: ImageReader,
    hosts: list[str] = ("localhost",),
    origins: list[str] = (),
    max_context_tokens: int = 4096,
    max_requests: int = 32,
) -> FastAPI:
    """
    The application of `transformers serve` for the model that `manager` was started with.

    Args:
        manager: has loaded the model.
        reader: reads the images of clients.
        hosts: names by which the server may be called, beside its IP addresses.
        origins: origins of web pages that may call it.
        max_context_tokens: number of tokens of messages and answer.
        max_requests: number of requests that are answered or wait at the same time.
    """
    name = manager.force_model
    engine = Engine(*manager.load_model_and_processor(manager.process_model_name(name)), reader, max_context_tokens)
    app = build_server(
        manager,
        chat_handler=Handler(engine, name, ChatRequest, UNSUPPORTED_IN_CHATS, ChatWriter),
        response_handler=Handler(engine, name, ResponsesRequest, UNSUPPORTED_IN_RESPONSES, ResponsesWriter),
        # Nothing reaches them
        completion_handler=None,
        transcription_handler=None,
        systemone_handler=None,
        generation_state=GenerationState(),
    )
    app.add_exception_handler(RequestError, answer_error)
    app.add_exception_handler(RequestValidationError, answer_malformed)
    app.add_exception_handler(HTTPException, answer_malformed)  # for JSON that is nested too deep
    # An image in base64, and as much text as anyone could mean
    max_body_bytes = reader.max_bytes * 4 // 3 + 2**20
    app.add_middleware(Guard, hosts=hosts, origins=origins, max_requests=max_requests, max_body_bytes=max_body_bytes)
    if origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["GET", "POST"], allow_headers=["*"])
    return app


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter, the only model that is served.")],
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code in the adapter's repository.")] = False,
    device: Annotated[str, typer.Option(help="For example `auto`, `cuda:0`, `cpu`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the model; `auto` is that of the files.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="For example `sdpa`.")] = None,
    quantization: Annotated[str | None, typer.Option(help="`bnb-4bit` or `bnb-8bit`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; `0.0.0.0` for all.")] = "localhost",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    allow_host: Annotated[
        list[str], typer.Option(help="A further name by which clients call the server. May be repeated.")
    ] = [],  # noqa: B006
    allow_origin: Annotated[
        list[str],
        typer.Option(help="Origin of web pages that may call it, as `https://chat.example.org`. May be repeated."),
    ] = [],  # noqa: B006
    allow_image_host: Annotated[
        list[str], typer.Option(help="Host, or host:port, from which images are fetched. May be repeated.")
    ] = [],  # noqa: B006
    allow_image_folder: Annotated[
        list[str], typer.Option(help="Folder below which `file:` URLs of images are read. May be repeated.")
    ] = [],  # noqa: B006
    max_image_bytes: Annotated[int, typer.Option(min=1, help="Size of an image file.")] = 20 * 2**20,
    max_image_pixels: Annotated[int, typer.Option(min=1, help="Width times height of an image.")] = 25_000_000,
    max_image_seconds: Annotated[float, typer.Option(min=0, help="Time for fetching an image.")] = 10.0,
    max_context_tokens: Annotated[int, typer.Option(min=2, help="Tokens of messages and answer.")] = 4096,
    max_requests: Annotated[int, typer.Option(min=1, help="Requests that are answered or wait.")] = 32,
):
    """Serves one DEHVF adapter with an OpenAI-compatible API. docs/serving.md says who can reach what."""
    for origin in allow_origin:
        parts = urlsplit(origin)
        if parts.scheme not in ("http", "https") or origin != f"{parts.scheme}://{parts.netloc}":
            raise typer.BadParameter(f"The origin {origin!r} is no scheme and host, such as https://chat.example.org.")
    try:
        reader = ImageReader(
            allow_image_host, allow_image_folder, max_image_bytes, max_image_pixels, max_image_seconds
        )
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    register()
    manager = ModelManager(
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        attn_implementation=attn_implementation,
        quantization=quantization,
        force_model=adapter,
    )
    hosts = ["localhost", host, *allow_host]
    app = build(manager, reader, hosts, allow_origin, max_context_tokens, max_requests)
    uvicorn.run(app, host=host, port=port)


if __name__ == "__main__":
    typer.run(main)
