# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
An OpenAI-compatible server for one DEHVF adapter. Needs `pip install -r requirements-app.txt`.

    python demo/serve.py outputs/digits --trust-remote-code --port 8000

This is the application of `transformers serve`, which loads and lists the model, with handlers that check requests
before they reach the model. It answers `/v1/chat/completions`, `/v1/responses`, `/v1/models` and `/health`, and
refuses the other endpoints of `transformers serve`, some of which load any model that a client names. docs/serving.md
explains access and limits.
"""

import hashlib
import socket
import sys
import threading
import uuid
import weakref
from collections import OrderedDict
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
from starlette.exceptions import HTTPException
from transformers import AutoModelForImageTextToText
from transformers.cli.serving.model_manager import ModelManager
from transformers.cli.serving.server import build_server
from transformers.cli.serving.utils import GenerationState
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from demo.client_images import ImageReader  # noqa: E402
from demo.engine import Engine  # noqa: E402
from demo.guard import ONE_MODEL, Guard, server_error  # noqa: E402
from demo.openai_api import (  # noqa: E402
    UNSUPPORTED_IN_CHATS,
    UNSUPPORTED_IN_RESPONSES,
    ChatRequest,
    ChatWriter,
    Request,
    RequestError,
    ResponsesRequest,
    ResponsesWriter,
    event,
    parse,
    shorten,
)
from training.flags import check_is_pinned, check_place  # noqa: E402


SHUTDOWN_SECONDS = 120  # time limit for answers in progress after SIGTERM
# What loading raises for a wrong flag or folder, a missing package or device, or too little memory. torch without CUDA
# raises `AssertionError` for `--device cuda`
LOADING_FAULTS = (AssertionError, ImportError, OSError, RuntimeError, ValueError)


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
        keys = {row: (weakref.ref(adapter), hashlib.sha256(pixels[row].tobytes()).digest()) for row in rows}
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


# --- endpoints ---


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
            job.is_cancelled = True  # in case the client has disconnected
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
            job.is_cancelled = True  # in case the client has disconnected


# --- the application ---


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
    engine_class: type[Engine] = Engine,
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
        engine_class: `Engine` or a subclass of it.

    Raises:
        ValueError: if the generation config of the model has a setting that is not supported.
    """
    name = manager.force_model
    model, processor = manager.load_model_and_processor(manager.process_model_name(name))
    engine = engine_class(model, processor, reader, max_context_tokens, max_batch_size)
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
    # As many images in base64 as a request may have, and a large amount of text
    max_body_bytes = max(1, engine.max_images) * reader.max_bytes * 4 // 3 + 2**20
    app.add_middleware(Guard, hosts=hosts, origins=origins, max_requests=max_requests, max_body_bytes=max_body_bytes)
    if origins:
        allowed = {"allow_origins": origins, "allow_methods": ["GET", "POST"], "allow_headers": ["*"]}
        # Chromium asks for the latter before a public page may call a server on this machine or in its network
        app.add_middleware(CORSMiddleware, **allowed, allow_private_network=True)
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


def check_port(host: str, port: int):
    """Raises `ValueError` if a server cannot listen on the port, before a model is loaded."""
    try:
        with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind((host, port))
    except OSError as error:
        raise ValueError(
            f"The server cannot listen on port {port} of {host}: {error.strerror}. Choose another port with `--port`, "
            "or 0 for any free one."
        ) from error


def main(
    adapter: Annotated[str, typer.Argument(help="Folder or Hub id of the adapter, the only model that is served.")],
    revision: Annotated[str | None, typer.Option(help="Commit of an adapter on the Hub, in 40 hex digits.")] = None,
    trust_remote_code: Annotated[bool, typer.Option(help="Run the code in the adapter's repository.")] = False,
    device: Annotated[str, typer.Option(help="For example `auto`, `cuda:0`, `cpu`.")] = "auto",
    dtype: Annotated[str, typer.Option(help="dtype of the model; `auto` is the dtype in its files.")] = "auto",
    attn_implementation: Annotated[str | None, typer.Option(help="For example `sdpa`.")] = None,
    quantization: Annotated[str | None, typer.Option(help="`bnb-4bit` or `bnb-8bit`.")] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; `0.0.0.0` for all.")] = "localhost",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0 for any free one.")] = 8000,
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
        check_is_pinned(adapter, revision)
        check_port(host, port)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error
    register()
    options = {"device": device, "dtype": dtype, "attn_implementation": attn_implementation}
    options |= {"quantization": quantization, "trust_remote_code": trust_remote_code}
    name = adapter if revision is None else f"{adapter}@{revision}"
    hosts = ["localhost", host, *hosts]
    try:
        manager = ModelManager(**options, force_model=name)
        model, _ = manager.load_model_and_processor(manager.process_model_name(name))
        if model.config.model_type != "dehvf":
            raise ValueError(
                f"{adapter} is a model of the type {model.config.model_type!r}, not a DEHVF adapter. Give a folder "
                "that `train.py` has saved, or its Hub id."
            )
        app = build(manager, reader, hosts, origins, max_context_tokens, max_requests, max_batch_size)
    except LOADING_FAULTS as error:
        message = str(error).replace("trust_remote_code=True", "--trust-remote-code")  # as this command names it
        raise typer.BadParameter(message) from error
    uvicorn.run(app, host=host, port=port, timeout_graceful_shutdown=SHUTDOWN_SECONDS)


if __name__ == "__main__":
    typer.run(main)
