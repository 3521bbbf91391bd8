# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Checks who may call which endpoint of `serve.py`, and limits the number, the size and the duration of requests. Refused
requests get an error in OpenAI's format.
"""

import asyncio
import ipaddress
import logging
import uuid
from contextlib import suppress
from urllib.parse import urlsplit

from fastapi.responses import JSONResponse

from demo.openai_api import RequestError, error_body, shorten


logger = logging.getLogger("uvicorn.error")  # uvicorn's log, without accesses

# The endpoints. All others are refused, including those that later releases of `transformers serve` add.
ENDPOINTS = {("POST", "/v1/chat/completions"), ("POST", "/v1/responses"), ("GET", "/v1/models"), ("GET", "/health")}
ONE_MODEL = "/v1/models/"  # followed by the name of a model
AVAILABLE = sorted(" ".join(endpoint) for endpoint in {*ENDPOINTS, ("GET", ONE_MODEL + "{model}")})
# Time limits for the body of a request and for reading a piece of an answer, so that slow clients do not block others
UPLOAD_SECONDS = READ_SECONDS = 60


def server_error(error: Exception) -> dict:
    """The body of the response to an internal error. The details are only written to the log, under the same id."""
    identifier = uuid.uuid4().hex
    logger.error("Error %s", identifier, exc_info=error)
    message = f"Internal error. The server's log has the details under {identifier}. Send this id to its operator."
    return error_body(message, "server_error", code="internal_error")


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
            try:
                self._check(scope)
            except RequestError:
                await self._discard_body(receive)
                raise
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
                f"{scope['method']} {shorten(scope['path'])} is not served. Available: {', '.join(AVAILABLE)}.",
                status=403,
                code="endpoint_not_allowed",
            )
        if scope["method"] == "POST" and self.num_requests >= self.max_requests:
            raise RequestError(
                f"The server already has {self.max_requests} requests, its maximum. Try again later.",
                status=429,
                code="too_many_requests",
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

    async def _discard_body(self, receive):
        """Many clients do not read the answer before they have sent everything."""
        with suppress(TimeoutError):
            async with asyncio.timeout(UPLOAD_SECONDS):
                while (await receive()).get("more_body", False):
                    pass

    async def _read_body(self, receive) -> bytes:
        body, num_bytes, more = bytearray(), 0, True
        try:
            async with asyncio.timeout(UPLOAD_SECONDS):
                while more:
                    message = await receive()
                    num_bytes += len(message.get("body", b""))
                    if num_bytes <= self.max_body_bytes:  # the rest is read too, see `_discard_body`
                        body += message.get("body", b"")
                    more = message.get("more_body", False)
        except TimeoutError as error:
            raise RequestError(
                f"The request did not arrive within {UPLOAD_SECONDS} seconds. Send a smaller one.", status=408
            ) from error
        if num_bytes > self.max_body_bytes:
            raise RequestError(
                f"The request has {num_bytes} bytes. This server accepts up to {self.max_body_bytes}, which includes "
                "images that are repeated in several messages. Send smaller images, a shorter text or fewer messages, "
                "or start the server with a larger `--max-image-bytes`.",
                status=413,
                code="request_too_large",
            )
        return bytes(body)
