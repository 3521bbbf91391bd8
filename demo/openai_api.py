# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The part of OpenAI's API that `serve.py` supports: the fields of requests, the format of answers, and the format of
errors.

A field that would change the answer is either supported or refused with status 400, so that no client gets an answer
to a request other than the one it sent.
"""

import json
import reprlib
import time
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

from fastapi.responses import JSONResponse
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator


MAX_MESSAGE_LENGTH = 1000
MAX_CHOICES = 16
MAX_FIELDS = 100  # of an object in a request
MAX_PARTS = 10_000  # messages and parts of a request: checking millions of them would stall other clients for seconds


class RequestError(Exception):
    """
    An error of the client.

    Args:
        message: what was given, what is required and what to change.
        status: HTTP status, 400 to 499.
        param: the faulty field of the request.
        code: a short name of the error, for programs.
    """

    def __init__(self, message: str, status: int = 400, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status = status
        self.body = error_body(message, "invalid_request_error", param, code)

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status)


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict:
    # It may contain input of the client, which can be long and have characters that exist in JSON but not in UTF-8
    message, param = (
        text and text[:MAX_MESSAGE_LENGTH].encode("utf-8", "backslashreplace").decode() for text in (message, param)
    )
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def shorten(value) -> str:
    """Shortens input of a client for a message."""
    short = reprlib.Repr()
    short.maxstring = short.maxother = 100
    return short.repr(value)


# --- requests ---


def check_characters(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("it contains half of a surrogate pair, which is not a character") from error
    return text


Text = Annotated[str, AfterValidator(check_characters)]
MetadataName, MetadataValue = Annotated[Text, Field(max_length=64)], Annotated[Text, Field(max_length=512)]


class Part(BaseModel):
    """
    A part of a request. Unknown fields, such as `images` of a message, are refused unless they are `null`. Fields that
    are hints, and fields that clients copy from answers, are ignored.
    """

    model_config = ConfigDict(strict=True, extra="forbid")
    ignored: ClassVar[set[str]] = {"detail", "annotations", "logprobs", "cache_control", "prompt_cache_breakpoint"}

    @model_validator(mode="before")
    @classmethod
    def leave_out(cls, given):
        if not isinstance(given, dict):
            return given
        if len(given) > MAX_FIELDS:  # an error for each of millions of fields would take long
            raise ValueError(f"it has {len(given)} fields, most of which this server does not know. Remove them")
        return {
            name: value
            for name, value in given.items()
            if name in cls.model_fields or value is not None and name not in cls.ignored
        }


class TextPart(Part):
    type: Literal["text", "input_text", "output_text"]
    text: Text


class Address(Part):
    url: str


class ImagePart(Part):
    type: Literal["image_url"]
    image_url: Address

    @field_validator("image_url", mode="before")
    @classmethod
    def is_object(cls, given):
        if isinstance(given, str):
            raise ValueError('a part of the type `image_url` has an object here, {"url": "data:image/png;base64,..."}')
        return given

    @property
    def url(self) -> str:
        return self.image_url.url


class InputImagePart(Part):
    type: Literal["input_image"]
    image_url: str

    @property
    def url(self) -> str:
        return self.image_url


# Validation of a list stops at the first error: a large body could otherwise have millions of errors
Parts = Annotated[
    list[Annotated[TextPart | ImagePart | InputImagePart, Field(discriminator="type")]], Field(fail_fast=True)
]


class Message(Part):
    ignored: ClassVar[set[str]] = {"id", "name", "status", "phase", "annotations", "cache_control"}
    ignored |= {"reasoning", "reasoning_content"}

    role: Literal["system", "developer", "user", "assistant"]
    type: Literal["message", "text"] | None = None  # "text" is what lm-eval sends
    content: Text | Parts | None = None
    tool_calls: list | None = Field(None, max_length=0)

    @model_validator(mode="after")
    def has_content(self):
        if self.content in (None, []) and self.role != "assistant":
            raise ValueError(
                f"a message of the role {self.role!r} needs `content`, a string or a list of one or more parts"
            )
        return self

    @property
    def parts(self) -> list:
        if isinstance(self.content, list):
            return self.content
        return [TextPart(type="text", text=self.content or "")]

    def text_message(self) -> dict:
        """The message without its images, as chat templates expect it."""
        parts = [{"type": "text", "text": part.text} for part in self.parts if isinstance(part, TextPart)]
        # OpenAI has renamed the role, chat templates have not
        return {"role": "system" if self.role == "developer" else self.role, "content": parts}

    def image_urls(self) -> list[str]:
        return [part.url for part in self.parts if not isinstance(part, TextPart)]


class Request(BaseModel):
    """What both endpoints read."""

    model_config = ConfigDict(strict=True)

    model: str | None = None
    stream: bool | None = None
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    # Administrative fields of OpenAI, which do not change an answer
    user: str | None = None
    metadata: dict[MetadataName, MetadataValue] | None = Field(None, max_length=16)
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: dict | None = None
    parallel_tool_calls: bool | None = None


class StreamOptions(Part):
    ignored: ClassVar[set[str]] = {"include_obfuscation"}

    include_usage: bool | None = None


class ChatRequest(Request):
    messages: list[Message] = Field(min_length=1, fail_fast=True)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    stop: list[Annotated[str, Field(min_length=1)]] = Field([], max_length=4, fail_fast=True)
    stream_options: StreamOptions | None = None
    n: int | None = Field(None, ge=1, le=MAX_CHOICES)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=20)

    @field_validator("max_completion_tokens")
    @classmethod
    def agrees_with_max_tokens(cls, number, info):
        if None not in (number, older := info.data.get("max_tokens")) and number != older:
            raise ValueError(f"it differs from `max_tokens`, {older}. Give one of them")
        return number

    @field_validator("top_logprobs")
    @classmethod
    def needs_logprobs(cls, number, info):
        if number and not info.data.get("logprobs"):
            raise ValueError("it needs `logprobs`, true")
        return number

    @field_validator("stop", mode="before")
    @classmethod
    def to_list(cls, stop):
        return [] if stop is None else [stop] if isinstance(stop, str) else stop

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_completion_tokens or self.max_tokens

    @property
    def num_choices(self) -> int:
        return self.n or 1


class ResponsesRequest(Request):
    input: list[Message] = Field(min_length=1, fail_fast=True)
    instructions: Text | None = None
    max_output_tokens: int | None = Field(None, ge=1)
    stream_options: StreamOptions | None = None
    # Fields of chat completions only
    stop: ClassVar[list[str]] = []
    num_choices: ClassVar[int] = 1
    logprobs: ClassVar[bool] = False

    @field_validator("input", mode="before")
    @classmethod
    def to_messages(cls, given):
        """Turns a text, or parts without a role, into one message of the user."""
        has_parts = isinstance(given, list) and all(isinstance(item, dict) and "role" not in item for item in given)
        return [{"role": "user", "content": given}] if isinstance(given, str) or given and has_parts else given

    @property
    def messages(self) -> list[Message]:
        system = [] if self.instructions is None else [Message(role="system", content=self.instructions)]
        return system + self.input

    @property
    def max_new_tokens(self) -> int | None:
        return self.max_output_tokens


# Fields of unsupported features, and the values that turn them off. `None` always does, also inside of objects.
UNSUPPORTED_IN_CHATS = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logit_bias": ({},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "web_search_options": (),
    "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    "store": (False,),
}
UNSUPPORTED_IN_RESPONSES = {
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "max_tool_calls": (),
    "include": ([],),
    "top_logprobs": (0,),
    "previous_response_id": (),
    "conversation": (),
    "prompt": (),
    "background": (False,),
    "store": (False,),
    "text": (
        {},
        {"format": {"type": "text"}},
        {"verbosity": "medium"},
        {"format": {"type": "text"}, "verbosity": "medium"},
    ),
    "truncation": ("disabled",),
    "reasoning": ({}, {"effort": "none"}),
}


# In plainer words than pydantic's, which name its classes
FAULTS = {
    "extra_forbidden": "this server does not know this field here. Leave it out",
    "model_type": "Input should be an object",
    "model_attributes_type": "Input should be an object",
}


def count_parts(messages) -> int:
    """The number of messages and of their parts, before their types are checked."""
    if not isinstance(messages, list):
        return 0
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    return len(messages) + sum(len(content) for content in contents if isinstance(content, list))


def without_nulls(value, depth: int = 2):
    """A value without the nulls in its objects, as deep as those of `UNSUPPORTED_IN_RESPONSES` are."""
    if depth == 0 or not isinstance(value, dict):
        return value
    return {name: without_nulls(part, depth - 1) for name, part in value.items() if part is not None}


def parse(request_class: type[Request], unsupported: dict[str, tuple], body: dict[str, Any]) -> Request:
    """Checks a request. Raises `RequestError` for unknown fields, wrong types or values, and unsupported features."""
    for name, value in body.items():
        if value is None or name in request_class.model_fields:
            continue
        if name not in unsupported:
            raise RequestError(
                f"`{name}` is {shorten(value)}, but this server does not know this field. Remove it.",
                param=name,
                code="unknown_parameter",
            )
        if without_nulls(value) not in (neutral := unsupported[name]):
            instead = f" or give {' or '.join(map(json.dumps, neutral))}" if neutral else ""
            raise RequestError(
                f"`{name}` is {shorten(value)}, which this server does not support. Remove it{instead}.",
                param=name,
                code="unsupported_parameter",
            )
    for name in ("messages", "input"):
        if (num_parts := count_parts(body.get(name))) > MAX_PARTS:
            raise RequestError(
                f"`{name}` has {num_parts} messages and parts. This server reads up to {MAX_PARTS}. Send fewer, or "
                "put their texts together.",
                param=name,
                code="too_many_parts",
            )
    try:
        return request_class.model_validate(body)
    except ValidationError as error:
        # Of the alternatives of a union, the client meant the one that matched furthest
        fault = max(error.errors(include_url=False), key=lambda fault: len(fault["loc"]))
        # Without the names of types, and without the type of a part after its number, which are not fields
        loc = [part for part in fault["loc"] if "[" not in str(part)]
        if len(loc) > 5 and loc[2] == "content":
            del loc[4]
        name = ".".join(map(str, loc))
        given = "is missing" if fault["type"] == "missing" else f"is {shorten(fault['input'])}"
        message = FAULTS.get(fault["type"], fault["msg"].removeprefix("Value error, "))
        param = str(fault["loc"][0]) if fault["loc"] else None
        raise RequestError(f"`{name}` {given}: {message}.", param=param, code="invalid_value") from error


def find_images(messages: list[Message], max_images: int) -> list[str]:
    """
    The addresses of the images of a chat, in order, each image of earlier messages once. If there are more than
    `max_images`, images that are repeated in a message are removed too.

    Raises:
        RequestError: if there are more than `max_images` different ones.
    """
    urls = []
    for message in messages:
        # The same data may be written with other line breaks
        own = ["".join(url.split()) if url.startswith("data:") else url for url in message.image_urls()]
        urls += [url for url in own if url not in urls]
    if len(urls) > max_images:
        urls = list(dict.fromkeys(urls))
    if len(urls) > max_images:
        places = [index for index, message in enumerate(messages) if message.image_urls()]
        number = "an image" if len(urls) == 1 else f"{len(urls)} different images"
        limit = {0: "no images", 1: "one image"}.get(max_images, f"{max_images} images")
        fewer = "fewer images (each may be repeated in several turns), or ask about the others in separate requests"
        raise RequestError(
            f"The request has {number} (in messages {', '.join(map(str, places))}, counted from "
            f"0), but the model reads {limit} for each request. Send {fewer if max_images else 'the text alone'}.",
            param="messages",
            code="too_many_images",
        )
    return urls


# --- answers ---


class Token(NamedTuple):
    """A token of an answer, its log-likelihood, and the log-likelihoods of the most likely alternatives."""

    text: str
    logprob: float
    alternatives: list[tuple[str, float]]


class Piece(NamedTuple):
    """A new piece of an answer. It contains the tokens if the request asks for log-likelihoods."""

    index: int
    text: str
    tokens: list[Token]


def event(data: dict | str) -> str:
    """One server-sent event."""
    return f"data: {data if isinstance(data, str) else json.dumps(data)}\n\n"


class ChatWriter:
    """Formats the answers of a job for `/v1/chat/completions`."""

    def __init__(self, request: ChatRequest, model: str, identifier: str):
        self.request = request
        self.base = {"id": f"chatcmpl-{identifier}", "created": int(time.time()), "model": model}
        self.has_usage = request.stream_options is not None and request.stream_options.include_usage

    def whole(self, job) -> dict:
        choices = [
            {
                "index": answer.index,
                "message": {"role": "assistant", "content": answer.text, "refusal": None},
                "logprobs": self._logprobs(answer.tokens()),
                "finish_reason": answer.finish_reason,
            }
            for answer in job.answers
        ]
        return {**self.base, "object": "chat.completion", "choices": choices, "usage": self._usage(job)}

    def first(self) -> list[str]:
        return [self._chunk(index, {"role": "assistant", "content": ""}) for index in range(self.request.num_choices)]

    def piece(self, piece: Piece) -> list[str]:
        return [self._chunk(piece.index, {"content": piece.text}, self._logprobs(piece.tokens))]

    def last(self, job) -> list[str]:
        events = [self._chunk(answer.index, {}, reason=answer.finish_reason) for answer in job.answers]
        if self.has_usage:
            chunk = {**self.base, "object": "chat.completion.chunk", "choices": [], "usage": self._usage(job)}
            events.append(event(chunk))
        return [*events, event("[DONE]")]

    def _chunk(self, index: int, delta: dict, logprobs: dict | None = None, reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        usage = {"usage": None} if self.has_usage else {}  # as in OpenAI's API, until the last chunk
        return event({**self.base, "object": "chat.completion.chunk", "choices": [choice], **usage})

    def _logprobs(self, tokens: list[Token]) -> dict | None:
        if not self.request.logprobs:
            return None
        content = [
            {
                **self._logprob(token.text, token.logprob),
                "top_logprobs": [self._logprob(*alternative) for alternative in token.alternatives],
            }
            for token in tokens
        ]
        return {"content": content, "refusal": None}

    @staticmethod
    def _logprob(text: str, logprob: float) -> dict:
        # A part of a character has no bytes here, since its decoded text has other bytes
        known = "\N{REPLACEMENT CHARACTER}" not in text
        # JSON has no infinity; OpenAI's lowest value stands for an impossible token
        return {"token": text, "bytes": list(text.encode()) if known else None, "logprob": max(logprob, -9999.0)}

    @staticmethod
    def _usage(job) -> dict:
        return {
            "prompt_tokens": job.num_prompt_tokens,
            "completion_tokens": job.num_tokens,
            "total_tokens": job.num_prompt_tokens + job.num_tokens,
        }


class ResponsesWriter:
    """Formats an answer for `/v1/responses`."""

    def __init__(self, request: ResponsesRequest, model: str, identifier: str):
        self.item_id, self.num_events = f"msg_{identifier}", 0
        self.base = {
            "id": f"resp_{identifier}",
            "object": "response",
            "created_at": int(time.time()),
            "model": model,
            "error": None,
            "incomplete_details": None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "temperature": request.temperature,
            "top_p": request.top_p,
            "tools": [],
            "tool_choice": "auto",
            "parallel_tool_calls": False,
        }

    def whole(self, job) -> dict:
        (answer,) = job.answers
        is_cut = answer.finish_reason == "length"
        return {
            **self.base,
            "status": "incomplete" if is_cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if is_cut else None,
            "output": [self._item(answer.text, "incomplete" if is_cut else "completed")],
            "usage": {
                "input_tokens": job.num_prompt_tokens,
                "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
                "output_tokens": job.num_tokens,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": job.num_prompt_tokens + job.num_tokens,
            },
        }

    def first(self) -> list[str]:
        response = {**self.base, "status": "in_progress", "output": []}
        return [
            self._event("response.created", response=response),
            self._event("response.in_progress", response=response),
            self._event(
                "response.output_item.added", output_index=0, item={**self._item("", "in_progress"), "content": []}
            ),
            self._event("response.content_part.added", **self._place, part=self._part("")),
        ]

    def piece(self, piece: Piece) -> list[str]:
        return [self._event("response.output_text.delta", **self._place, delta=piece.text, logprobs=[])]

    def last(self, job) -> list[str]:
        response, text = self.whole(job), job.answers[0].text
        return [
            self._event("response.output_text.done", **self._place, text=text, logprobs=[]),
            self._event("response.content_part.done", **self._place, part=self._part(text)),
            self._event("response.output_item.done", output_index=0, item=response["output"][0]),
            self._event(f"response.{response['status']}", response=response),
        ]

    @property
    def _place(self) -> dict:
        return {"item_id": self.item_id, "output_index": 0, "content_index": 0}

    @staticmethod
    def _part(text: str) -> dict:
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}

    def _item(self, text: str, status: str) -> dict:
        content = [self._part(text)]
        return {"id": self.item_id, "type": "message", "role": "assistant", "status": status, "content": content}

    def _event(self, name: str, **values) -> str:
        data = {"type": name, "sequence_number": self.num_events, **values}
        self.num_events += 1
        return f"event: {name}\n{event(data)}"
