"""Streamers, the cache of images, and the server with an OpenAI client."""

import asyncio
import base64
import copy
import io
import itertools
import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from tiny import (
    DEHVF_SIZES,
    ROOT,
    DehvfForConditionalGeneration,
    DehvfProcessor,
    save_tiny_bases,
    tiny_image_processor,
    tiny_inputs,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from transformers import TextIteratorStreamer, TextStreamer
from transformers.cli.serving.model_manager import Modality, ModelManager
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


for package in ("fastapi", "httpx", "openai", "uvicorn"):
    pytest.importorskip(package, reason="pip install -r requirements-app.txt")
import httpx  # noqa: E402
import openai  # noqa: E402
import uvicorn  # noqa: E402
from fastapi.responses import JSONResponse  # noqa: E402
from fastapi.routing import APIRoute  # noqa: E402
from fastapi.testclient import TestClient  # noqa: E402
from openai.types.chat import ChatCompletion, ChatCompletionChunk  # noqa: E402
from openai.types.responses import Response  # noqa: E402
from transformers.cli.serving.server import build_server  # noqa: E402

from benchmarks.serving import SingleModelManager  # noqa: E402
from demo import serve  # noqa: E402
from demo.client_images import START_OF_SCAN, ImageReader, is_public  # noqa: E402
from demo.engine import Batch, Engine, Job, stack_images  # noqa: E402
from demo.guard import ENDPOINTS, Guard  # noqa: E402
from demo.openai_api import ChatRequest, ChatWriter, RequestError, ResponsesRequest, parse  # noqa: E402


QUESTION = "what is that?"
MAX_NEW_TOKENS = 8


def image(seed: int) -> Image.Image:
    pixels = torch.randint(0, 256, (20, 30, 3), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)
    return Image.fromarray(pixels.numpy())


def count_encoder(model) -> list:
    calls = []
    model.model.vision_tower.register_forward_hook(lambda *args: calls.append(1))
    return calls


# --- streamers ---


def test_a_streamer_prints_the_answer_alone(capsys):
    model, processor = tiny_model(), tiny_processor()
    inputs = processor(images=image(0), text=QUESTION, return_tensors="pt")
    streamer = TextStreamer(processor.tokenizer, skip_prompt=True)
    tokens = model.generate(**inputs, streamer=streamer, max_new_tokens=MAX_NEW_TOKENS)
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :])
    assert answer and capsys.readouterr().out == answer + "\n"


def test_an_iterator_gives_the_answer_as_it_grows():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor(images=image(0), text=QUESTION, return_tensors="pt")
    streamer = TextIteratorStreamer(processor.tokenizer, skip_prompt=True, timeout=60)
    with ThreadPoolExecutor(1) as thread:
        tokens = thread.submit(model.generate, **inputs, streamer=streamer, max_new_tokens=MAX_NEW_TOKENS)
        pieces = list(streamer)
    assert len(pieces) > 1
    assert "".join(pieces) == processor.decode(tokens.result()[0, inputs["input_ids"].shape[1] :])


# --- cached images ---


@torch.no_grad()
def test_cached_images_give_the_same_answers_and_are_encoded_once():
    model, caching = tiny_model(), serve.remember_images(tiny_model(), num_images=2)
    calls = count_encoder(caching)
    for seed, expected in ((0, 1), (1, 2), (0, 2), (2, 3), (0, 3), (1, 4)):  # the least recently used one is dropped
        inputs = tiny_inputs(1, seed=seed)
        left, right = (asked.generate(**inputs, max_new_tokens=4) for asked in (model, caching))
        assert torch.equal(left, right)
        assert len(calls) == expected, seed


def test_threads_share_the_cache_and_get_their_own_images():
    model, caching = tiny_model(), serve.remember_images(tiny_model(), num_images=3)
    batches = [tiny_inputs(1, seed=seed % 5) for seed in range(60)]

    def encode(asked, inputs):
        with torch.no_grad():
            return asked.get_image_features(inputs["pixel_values"]).pooler_output

    with ThreadPoolExecutor(8) as threads:
        together = list(threads.map(lambda inputs: encode(caching, inputs), batches))
    assert all(torch.equal(given, encode(model, inputs)) for given, inputs in zip(together, batches))


@torch.no_grad()
def test_each_adapter_has_memories_of_its_own(tmp_path):
    tiny_model(seed=1).save_pretrained(tmp_path / "other")
    tiny_model(seed=2).save_pretrained(tmp_path / "new")
    caching, model = serve.remember_images(tiny_model()), tiny_model()
    calls = count_encoder(caching)
    pixels = tiny_inputs(1)["pixel_values"]

    def check(name):
        for loaded in (caching, model):
            loaded.set_adapter(name)
        assert torch.equal(*(loaded.get_image_features(pixels).pooler_output for loaded in (caching, model)))

    for loaded in (caching, model):
        loaded.load_adapter(tmp_path / "other", "other")
    for name in ("default", "other", "default", "other"):
        check(name)
    assert len(calls) == 2
    for loaded in (caching, model):
        loaded.delete_adapter("default")
        loaded.load_adapter(tmp_path / "new", "default")
    check("default")  # other weights under a name that was used before


@torch.no_grad()
@pytest.mark.parametrize(
    "values, batch_size, mask",
    [({}, 1, [False]), ({"fuser_query": "instruction"}, 1, None), ({"visual_prompts": "none"}, 1, None)],
    ids=["no image", "memory of one question", "no memory"],
)
def test_what_cannot_be_reused_is_encoded_each_time(values, batch_size, mask):
    model, caching = tiny_model(**values), serve.remember_images(tiny_model(**values))
    calls = count_encoder(caching)
    inputs = tiny_inputs(batch_size)
    if mask is not None:
        inputs["image_mask"] = torch.tensor(mask)
    for tokens in (inputs["input_ids"], inputs["input_ids"].flip(-1)):
        given = {**inputs, "input_ids": tokens}
        torch.testing.assert_close(caching(**given).logits, model(**given).logits)
    assert len(calls) == (0 if "visual_prompts" in values else 2)


@torch.no_grad()
def test_of_a_batch_what_is_new_is_encoded():
    model, caching = tiny_model(), serve.remember_images(tiny_model(), num_images=4)
    sizes = []
    caching.model.vision_tower.register_forward_pre_hook(
        lambda tower, given, named: sizes.append(len(given[0])), with_kwargs=True
    )
    inputs = tiny_inputs(6)
    for rows, mask, expected in (
        ([0, 1, 2], [True, False, True], [2]),  # row 1 has no image
        ([2, 0, 2], [True, True, True], []),
        ([3, 2, 1, 3], [True, True, True, True], [2]),  # the same image twice
        ([4, 5, 4], [False, True, False], [1]),
    ):
        sizes.clear()
        given = {**{name: tensor[rows] for name, tensor in inputs.items()}, "image_mask": torch.tensor(mask)}
        torch.testing.assert_close(caching(**given).logits, model(**given).logits)
        assert sizes == expected


@torch.no_grad()
def test_a_copy_of_a_model_that_remembers_images_uses_its_own_encoder():
    model, inputs = serve.remember_images(tiny_model()), tiny_inputs(1)
    expected = model(**inputs).logits
    copied = copy.deepcopy(model)
    for parameter in copied.adapter_state_dict().values():
        parameter.mul_(2)
    plain = tiny_model()
    plain.load_state_dict(copied.state_dict())
    torch.testing.assert_close(copied(**inputs).logits, plain(**inputs).logits)
    assert torch.equal(model(**inputs).logits, expected)


def test_nothing_is_cached_that_a_gradient_goes_through():
    model = serve.remember_images(tiny_model()).train()
    for _ in range(2):
        model(**tiny_inputs(1), labels=tiny_inputs(1)["input_ids"]).loss.backward()


# --- the command ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("served")
    vision, text = save_tiny_bases(folder)
    torch.manual_seed(2)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    model.generation_config.suppress_tokens = [0, 1, 2, 3]  # of which nothing would be seen
    model.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


@pytest.fixture(scope="module")
def registered():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(transformers, "DehvfForConditionalGeneration", None, raising=False)
        patch.setitem(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, "dehvf", "undone by the context")
        serve.register()
        yield


def test_transformers_serve_alone_does_not_find_the_class(adapter):
    """When this fails, a release of `transformers` may do without `serve.register`. Before any test that registers."""
    manager = ModelManager(device="cpu", trust_remote_code=True)
    with pytest.raises(AttributeError, match="transformers has no attribute DehvfForConditionalGeneration"):
        manager.load_model_and_processor(ModelManager.process_model_name(adapter))


def test_a_registered_class_is_loaded_with_its_remote_code_and_takes_images(adapter, registered):
    manager = ModelManager(device="cpu", trust_remote_code=True, force_model=adapter)
    model, processor = manager.load_model_and_processor(ModelManager.process_model_name(adapter))
    assert type(model).__name__ == "DehvfForConditionalGeneration"
    assert manager.get_model_modality(model, processor) == Modality.VLM
    with pytest.raises(ValueError, match="trust_remote_code"):
        ModelManager(device="cpu").load_model_and_processor(ModelManager.process_model_name(adapter))


def command(monkeypatch, *flags):
    """Runs the command up to the point where it would listen. Returns the arguments of uvicorn."""
    served = []

    def run(self, **kwargs):
        served.append(self.config)
        self.started = True

    monkeypatch.setattr(uvicorn.Server, "run", run)
    monkeypatch.setattr(sys, "argv", ["serve.py", *map(str, flags)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "demo" / "serve.py"), run_name="__main__")
    return ended.value.code, served


def test_the_command_serves_with_its_flags(adapter, registered, monkeypatch, tmp_path):
    flags = ["--trust-remote-code", "--device", "cpu", "--port", "8123", "--host", "127.0.0.1"]
    flags += ["--allow-host", "DEHVF.example.org", "--allow-origin", "https://Chat.example.org:443"]
    flags += ["--allow-image-host", "images.example.org", "--allow-image-folder", tmp_path, "--max-requests", "3"]
    code, (config,) = command(monkeypatch, adapter + "/", *flags)
    assert (code, config.port, config.host) == (0, 8123, "127.0.0.1")
    cors, guard = (middleware.kwargs for middleware in config.app.user_middleware[:2])
    assert cors["allow_origins"] == guard["origins"] == ["https://chat.example.org"]
    assert guard["hosts"] == ["localhost", "127.0.0.1", "dehvf.example.org"]
    assert guard["max_requests"] == 3


ADAPTER, DAMAGED = "an adapter", "a damaged adapter"


@pytest.mark.parametrize(
    "flags, words",
    [
        (["nothing", "--allow-image-host", "https://a.org/images"], "neither a name nor a name and a port"),
        (["nothing", "--allow-image-host", "*"], "neither a name nor a name and a port"),
        (["nothing", "--allow-image-folder", "nothing"], "does not exist"),
        (["nothing", "--allow-origin", "*"], "not a scheme and host"),
        (["nothing", "--allow-origin", "https://a.org/page"], "not a scheme and host"),
        (["nothing", "--allow-host", "a.org:8000"], "not a name alone"),
        (["nothing", "--allow-host", "https://a.org"], "not a name alone"),
        ([ROOT / "assets" / "language_model", "--device", "cpu"], "model of the type 'llama', not a DEHVF adapter"),
        (["/nothing"], "`adapter /nothing`: there is no such folder"),
        (["org/name"], "no `--revision` was given"),
        (["org/name", "--revision", "main"], "`--revision main` was given"),
        ([ADAPTER, "--revision", "main"], "is a folder, which has no commits, so the revision main has no effect"),
        ([ADAPTER, "--port", "USED"], "cannot listen on port"),
        (["nothing", "--port", "99999"], "should be less than or equal to 65535"),
        ([ADAPTER], "pass the argument `--trust-remote-code`"),
        ([ADAPTER, "--trust-remote-code", "--dtype", "nonsense"], "Unsupported dtype: 'nonsense'"),
        ([ADAPTER, "--trust-remote-code", "--device", "nonsense"], "but found nonsense"),
        ([ADAPTER, "--trust-remote-code", "--device", "cuda:99"], "Invalid value: "),
        ([ADAPTER, "--trust-remote-code", "--quantization", "nonsense"], "quantization method: 'nonsense'"),
        ([ADAPTER, "--trust-remote-code", "--attn-implementation", "nonsense"], "implementation: 'nonsense'"),
        ([ROOT / "examples" / "vqa"], "Unrecognized processing class"),
        ([DAMAGED, "--trust-remote-code"], "is damaged and cannot be read"),
    ],
)
def test_the_command_refuses_wrong_flags_without_a_traceback(flags, words, adapter, monkeypatch, tmp_path, capsys):
    if DAMAGED in flags:
        shutil.copytree(adapter, tmp_path / "damaged")
        (tmp_path / "damaged" / "model.safetensors").write_text("a")
    used = socket.create_server(("127.0.0.1", 0))
    places = {ADAPTER: adapter, DAMAGED: tmp_path / "damaged", "USED": str(used.getsockname()[1])}
    flags = [places.get(flag, flag) for flag in flags]
    code, served = command(monkeypatch, *flags)
    assert code == 2 and not served
    assert words in " ".join(capsys.readouterr().err.replace("│", " ").split())


# --- the images of clients ---


def png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


def data_url(data: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(data).decode()


class ImageHost:
    """A web server with an image, and what a hostile one does. `seen` has the paths that were asked for."""

    def __init__(self):
        host, self.seen, self.released = self, [], threading.Event()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                host.seen.append(self.path)
                host.answer(self)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.name = f"127.0.0.1:{self.server.server_port}"
        self.data = png(image(1))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def answer(self, handler):
        name = handler.path.strip("/")
        elsewhere = f"http://localhost:{self.server.server_port}/image"
        places = {"moved": "/image", "out": elsewhere, "circle": "/circle", "file": "file:///etc/passwd"}
        if name == "hang":
            self.released.wait(600)
        if name in places:
            handler.send_response(302)
            handler.send_header("Location", places[name])
        else:
            handler.send_response(404 if name == "missing" else 200)
        if name in ("image", "long"):
            handler.send_header("Content-Length", str(len(self.data) if name == "image" else 10**9))
        handler.end_headers()
        try:
            handler.wfile.write(self.data if name == "image" else b"0" * 300_000 if name == "endless" else b"no image")
        except OSError:  # the client has read enough
            pass


@pytest.fixture(scope="module")
def image_host():
    host = ImageHost()
    yield host
    host.released.set()
    host.server.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder of images, beside a secret, with links out of it."""
    folder = tmp_path_factory.mktemp("images") / "allowed"
    folder.mkdir()
    (folder / "an image.png").write_bytes(png(image(1)))
    (folder.parent / "secret.png").write_bytes(png(image(2)))
    (folder / "link.png").symlink_to(folder.parent / "secret.png")
    (folder / "circle.png").symlink_to(folder / "circle.png")
    (folder / "large.png").write_bytes(b"0" * 300_000)
    return folder


@pytest.fixture(scope="module")
def reader(image_host, folder):
    return ImageReader([image_host.name, "named.test"], [folder], 200_000, 10_000, max_seconds=5)


def read(reader, url):
    return reader.decode(asyncio.run(reader.read(url)))


@pytest.mark.parametrize(
    "url",
    [
        "{data}",
        "{escaped}",
        "http://{host}/image",
        "http://{host}/moved",
        "file://{folder}/an%20image.png",
        "file://localhost{folder}/an%20image.png",
    ],
)
def test_an_image_is_read_from_where_it_may(url, reader, image_host, folder):
    data = data_url(png(image(1)))
    escaped = data.replace("+", "%2B").replace("=", "%3D")
    url = url.format(data=data, escaped=escaped, host=image_host.name, folder=folder)
    assert read(reader, url).tobytes() == image(1).tobytes()


NO_HOST, NO_FILE = "fetches no images", "does not name a file in the folders"


@pytest.mark.parametrize(
    "url, words",
    [
        ("http://localhost:{port}/image", NO_HOST),  # a name that was not listed, of an address that was
        ("http://127.0.0.1/image", NO_HOST),  # another port
        ("https://{host}@example.org/image", NO_HOST),
        ("http://user@{host}/image", NO_HOST),
        ("http://{host}/out", NO_HOST),
        ("http://{host}/file", NO_HOST),
        ("http://{host}/circle", "more than 3 redirects"),
        ("http://{host}/missing", "not be fetched: status 404"),
        ("http://{host}/text", "are not a PNG, JPEG, WEBP, GIF file"),
        ("http://{host}/long", "has at least 1000000000 bytes. This server reads up to 200000"),
        ("http://{host}/endless", "This server reads up to 200000"),
        ("http://{host}:0:0/", "cannot be fetched"),
        ("http://xn--/", "cannot be fetched"),
        ("http://\ud800/", "cannot be fetched"),
        ("http://127.0.0.1:\x00/", "cannot be fetched"),
        ("http:", NO_HOST),
        ("http://named.test/image", "an address that is not public"),
        ("file://{folder}/../secret.png", NO_FILE),
        ("file://{folder}/%2e%2e/secret.png", NO_FILE),
        ("file://{folder}/link.png", NO_FILE),
        ("file://{folder}/circle.png", NO_FILE),
        ("file://{folder}/nothing.png", NO_FILE),
        ("file://{folder}/%00", NO_FILE),
        ("file://{folder}/" + 300 * "a", NO_FILE),
        ("file://{folder}", NO_FILE),
        ("file://example.org{folder}/an%20image.png", NO_FILE),
        ("file:///etc/passwd", NO_FILE),
        ("file://{folder}/large.png", "has at least 300000 bytes"),
        ("{folder}/an image.png", "is not a URL that this server reads"),
        ("ftp://{host}/image", "is not a URL that this server reads"),
        ("data:image/png,abc", "is not a base64 data URL"),
        ("data:image/png;base64,a?b", "is not valid base64"),
        ("data:image/png;base64," + 400_000 * "a", "This server reads up to 200000"),
    ],
)
def test_an_image_is_not_read_from_elsewhere_nor_without_limit(url, words, reader, image_host, folder, monkeypatch):
    look_up = socket.getaddrinfo

    def getaddrinfo(host, *args, **kwargs):
        return look_up("10.1.2.3" if host == "named.test" else host, *args, **kwargs)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    url = url.format(host=image_host.name, port=image_host.server.server_port, folder=folder)
    image_host.seen.clear()
    with pytest.raises(RequestError, match=re.escape(words)) as refused:
        read(reader, url)
    assert refused.value.status == 400
    assert "/image" not in image_host.seen


@pytest.mark.parametrize(
    "host, urls",
    [
        (
            "127.0.0.1",
            ["http://127.0.0.1/a", "http://127.0.0.1:80/a", "https://127.0.0.1/a", "https://127.0.0.1:443/a"],
        ),
        ("127.0.0.1:80", ["http://127.0.0.1/a", "http://127.0.0.1:80/a", "https://127.0.0.1:80/a"]),
        ("127.0.0.1:443", ["https://127.0.0.1/a", "https://127.0.0.1:443/a", "http://127.0.0.1:443/a"]),
        ("127.0.0.1:8080", ["http://127.0.0.1:8080/a", "https://127.0.0.1:8080/a"]),
    ],
)
def test_a_host_is_allowed_with_its_port(host, urls):
    for scheme, port in itertools.product(("http", "https"), ("", ":80", ":443", ":8080")):
        url = f"{scheme}://127.0.0.1{port}/a"
        if url in urls:
            assert asyncio.run(ImageReader([host])._resolve(httpx.URL(url))) == ["127.0.0.1"]
        else:
            with pytest.raises(RequestError, match=NO_HOST):
                asyncio.run(ImageReader([host])._resolve(httpx.URL(url)))


@pytest.mark.parametrize(
    "address, expected",
    [
        ("8.8.8.8", True),
        ("2606:4700::1", True),
        *((address, False) for address in ("127.0.0.1", "10.0.0.1", "172.16.0.1", "192.168.1.1", "169.254.169.254")),
        *((address, False) for address in ("0.0.0.0", "100.64.0.1", "224.0.0.1", "::1", "fe80::1%eth0", "fd00::1")),
        *((address, False) for address in ("::ffff:127.0.0.1", "64:ff9b::a00:1", "2002:7f00:1::")),
        *((address, False) for address in ("64:ff9b:1::a00:1", "::127.0.0.1", "::ffff:0:127.0.0.1", "fec0::1")),
    ],
)
def test_which_addresses_are_public(address, expected):
    assert is_public(address) == expected


def test_the_address_that_was_checked_is_the_one_that_is_called(image_host, monkeypatch):
    """Or a name server could give a public address first, and that of this machine when the name is asked again."""
    name = image_host.name.replace("127.0.0.1", "named.test")
    answers = iter(["127.0.0.1"])
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *args, **kwargs: look_up(next(answers), *args, **kwargs))
    monkeypatch.setattr("demo.client_images.is_public", lambda address: True)
    assert asyncio.run(ImageReader([name]).read(f"http://{name}/image")) == image_host.data


def test_a_private_address_is_reached_on_its_listed_port_only(image_host, monkeypatch):
    look_up = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda _, *args, **kwargs: look_up("127.0.0.1", *args, **kwargs))
    name = image_host.name.replace("127.0.0.1", "named.test")
    assert asyncio.run(ImageReader([name, image_host.name]).read(f"http://{name}/image")) == image_host.data
    with pytest.raises(RequestError, match="has an address that is not public"):
        read(ImageReader([name, "127.0.0.1:1"]), f"http://{name}/image")


def test_name_servers_that_hang_delay_requests_for_their_hosts_only(monkeypatch):
    released = threading.Event()
    monkeypatch.setattr(socket, "getaddrinfo", lambda *args, **kwargs: released.wait(60))
    reader = ImageReader(["slow.test"], max_seconds=0.2)

    async def check():
        waiting = [reader.read("http://slow.test/image") for _ in range(20)]
        for fault in await asyncio.gather(*waiting, return_exceptions=True):
            assert "was not fetched within 0.2 seconds" in str(fault)
        async with asyncio.timeout(30):
            assert (await reader.load(data_url(png(image(1))))).tobytes() == image(1).tobytes()
            await asyncio.to_thread(bool)  # where texts are read

    try:
        asyncio.run(check())
    finally:
        released.set()


def test_an_exception_without_a_message_is_named(reader, image_host, monkeypatch):
    async def hang_up(self, *args, **kwargs):  # as the client says it where a host hangs up before TLS is agreed on
        raise httpx.ConnectError("")

    monkeypatch.setattr(httpx.AsyncClient, "send", hang_up)
    with pytest.raises(RequestError, match="cannot be fetched: ConnectError. Check the address"):
        read(reader, f"https://{image_host.name}/image")


@pytest.mark.parametrize(
    "write",
    [
        lambda text: text,
        lambda text: "\r\n".join(text[start : start + 76] for start in range(0, len(text), 76)),
        lambda text: "".join(f"%{ord(character):02X}" for character in text),
    ],
    ids=["plain", "in lines", "percent-encoded"],
)
def test_the_size_of_an_image_in_a_data_url_is_that_of_its_file(write):
    data = 3 * bytes(range(256)) + b"a"
    head, encoded = data_url(data).split(",")
    url = f"{head},{write(encoded)}"
    assert asyncio.run(ImageReader(max_bytes=len(data)).read(url)) == data
    with pytest.raises(RequestError, match=f"at least {len(data)} bytes. This server reads up to {len(data) - 3}"):
        asyncio.run(ImageReader(max_bytes=len(data) - 3).read(url))


def noisy(*size: int) -> bytes:
    return png(Image.fromarray(np.zeros((*size, 3), np.uint8)))


@pytest.mark.parametrize(
    "data, words",
    [
        (noisy(200, 100), "has 100 x 200 = 20000 pixels. This server reads up to 10000"),
        (png(image(1))[:300], "cannot be read: "),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "are not a PNG, JPEG, WEBP, GIF file"),
        (b"", "its 0 bytes are not a PNG"),
    ],
)
def test_images_of_other_sizes_are_refused(data, words, reader):
    with pytest.raises(RequestError, match=re.escape(words)):
        reader.decode(data)


@pytest.mark.parametrize("with_second_image", [False, True], ids=["JPEG", "MPO"])
def test_a_jpeg_of_many_scans_is_refused_before_it_is_decoded(with_second_image, reader, monkeypatch):
    picture, file = image(1).resize((100, 90)), io.BytesIO()
    # Pillow names the format of a JPEG that refers to a second image MPO
    others = {"format": "MPO", "save_all": True, "append_images": [image(2)]} if with_second_image else {}
    picture.save(file, **{"format": "JPEG", "progressive": True, **others})
    data = file.getvalue()
    assert reader.decode(data).size == (100, 90)
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    end = data.index(b"\xff\xd9")  # of the first image
    start = data.rindex(START_OF_SCAN, 0, end)
    with pytest.raises(RequestError, match="is a JPEG with .* scans of 100 x 90 pixels.* as a baseline JPEG"):
        reader.decode(data[:end] + data[start:end] * 50 + data[end:])


def test_a_file_that_takes_long_to_decode_is_refused(reader, monkeypatch):
    file = io.BytesIO()
    image(1).save(file, "GIF")
    start = file.getvalue().index(b",", 13 + 3 * 256)  # of the first frame
    comment = b"!\xfe" + 300_000 * b"\1a" + b"\0"  # in parts of one byte, which Pillow joins one by one
    monkeypatch.setattr("demo.client_images.DECODE_SECONDS", 0.05)
    assert reader.decode(file.getvalue()).size == image(1).size
    with pytest.raises(RequestError, match="cannot be read: it takes more than 0.05 seconds to decode. Save it again"):
        reader.decode(file.getvalue()[:start] + comment + file.getvalue()[start:])


@pytest.mark.parametrize("place", ["JPEG", "PNG", "after the pixels of a PNG", "text of a PNG", "WEBP"])
def test_long_exif_data_are_refused_before_they_are_read(place, reader, monkeypatch):
    """Of a megabyte, Pillow can make gigabytes: each entry is a copy of what it points to, which may be everything."""
    exif, file = b"Exif\0\0" + bytes(50_000), io.BytesIO()
    if place == "JPEG":  # in several parts
        image(1).save(file, "JPEG", exif=exif)
        data = file.getvalue()
        part = data[data.index(b"\xff\xe1") :][: len(exif) + 4]
        data = data[:2] + 3 * part + data[2:]
    elif place == "WEBP":
        image(1).save(file, "WEBP", exif=exif + bytes(100_000))
        data = file.getvalue()
    else:
        text = PngInfo()
        text.add_text("Raw profile type exif", "exif\n150000\n" + (exif + bytes(100_000)).hex(), zip=True)
        image(1).save(file, "PNG", **({"pnginfo": text} if place.startswith("text") else {}))
        data = file.getvalue()
        chunk = b"eXIf" + bytes(150_000)
        chunk = len(chunk[4:]).to_bytes(4) + chunk + zlib.crc32(chunk).to_bytes(4)
        end = data.index(b"IDAT" if place == "PNG" else b"IEND") - 4
        data = data if place.startswith("text") else data[:end] + chunk + data[end:]
    monkeypatch.setattr("PIL.Image.Exif.load", lambda *args: pytest.fail("read"))
    with pytest.raises(RequestError, match=r"has at least \d+ bytes of EXIF data. This server reads up to 65536"):
        reader.decode(data)


def test_pixels_are_counted_before_they_are_decoded(reader, monkeypatch):
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("decoded"))
    with pytest.raises(RequestError, match="20000 pixels"):
        reader.decode(noisy(200, 100))


@pytest.mark.parametrize(
    "size, max_pixels, pillows_limit, words",
    [
        ((1000, 1000), 2_000_000, 500_000, None),
        ((1000, 1000), 100_000, 500_000, "has 1000 x 1000 = 1000000 pixels. This server reads up to 100000"),
        ((3000, 1000), 100_000, 500_000, "The image has more pixels than the 100000 that this server reads"),
        ((300, 1), 100_000, Image.MAX_IMAGE_PIXELS, None),
        ((400, 1), 100_000, Image.MAX_IMAGE_PIXELS, "whose longer side is up to 300 times the shorter one"),
    ],
)
def test_the_limits_of_an_image_are_those_of_the_server(size, max_pixels, pillows_limit, words, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", pillows_limit)
    reader, data = ImageReader(max_pixels=max_pixels), noisy(*reversed(size))
    if words is None:
        assert reader.decode(data).size == size
    else:
        with pytest.raises(RequestError, match=words):
            reader.decode(data)


# --- the server ---


PICTURE = image(2)  # about which the tiny model says something varied


def run_server(app) -> tuple[uvicorn.Server, threading.Thread]:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_config=None))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.05)
    return server, thread


class Server:
    """A running server, a client of it, and the model that it loaded."""

    def __init__(self, adapter: str, reader: ImageReader):
        self.adapter = adapter
        self.manager = ModelManager(device="cpu", trust_remote_code=True, force_model=adapter)
        self.model, self.processor = self.manager.load_model_and_processor(adapter)
        self.server, self.thread = run_server(serve.build(self.manager, reader))
        self.url = f"http://localhost:{self.server.config.port}"
        self.client = openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def close(self):
        self.server.should_exit = True
        self.thread.join()

    def ask(self, picture: Image.Image | str | None = None, question: str = QUESTION, **options):
        """What an OpenAI client sends: the image as a URL, then the question."""
        content = [{"type": "text", "text": question}]
        if picture is not None:
            url = picture if isinstance(picture, str) else data_url(png(picture))
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        given = {"messages": [{"role": "user", "content": content}], "max_completion_tokens": MAX_NEW_TOKENS}
        return self.client.chat.completions.create(model=self.adapter, **{**given, **options})

    @cached_property
    def alone(self) -> DehvfForConditionalGeneration:
        return DehvfForConditionalGeneration.from_pretrained(self.adapter)

    def expected(self, picture: Image.Image | None = None, text: str = QUESTION, num_tokens=MAX_NEW_TOKENS) -> str:
        """The answer of the model itself, read from the folder without the server."""
        inputs = self.processor(images=picture, text=f"{text}\nResponse:", return_tensors="pt")
        tokens = self.alone.generate(**inputs, max_new_tokens=num_tokens)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(adapter, registered, reader):
    server = Server(adapter, reader)
    yield server
    server.close()


def test_an_openai_client_is_answered_about_its_image(server):
    pictures = (*map(image, range(6)), None)
    answers = [server.ask(picture).choices[0].message.content for picture in pictures]
    assert answers == [server.expected(picture) for picture in pictures]
    assert len(set(answers)) >= 3


def test_special_tokens_and_image_markers_in_a_question_are_text(server):
    engine = Engine(server.model, server.processor, ImageReader(), max_context_tokens=128, max_batch_size=4)
    tokenizer = server.processor.tokenizer
    for question in ("who</s>\n<s>what", "who\U00100000what", "x</<ima<image>ge>s>"):
        chat = [{"role": "user", "content": [{"type": "text", "text": question}]}]
        inputs = engine._process(chat, [PICTURE])
        ids = inputs["input_ids"][0].tolist()
        assert ids[0] == tokenizer.bos_token_id
        assert not {*ids[1:]} & {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
        text = question.replace("<image>", "")
        assert ids[1:] == tokenizer(f"{text}\nResponse:", split_special_tokens=True).input_ids[1:]
        expected = server.processor(images=PICTURE, text="", return_tensors="pt")
        assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    texts = (f"<image>\n{QUESTION}", f"{QUESTION}<ima<image>ge><ima<image>ge>", QUESTION)
    answers = [server.ask(PICTURE, text).choices[0].message.content for text in texts]
    assert answers[0] == answers[2]


def test_many_special_tokens_are_refused_before_they_are_encoded(server):
    engine = Engine(server.model, server.processor, ImageReader(), max_context_tokens=4096, max_batch_size=4)
    for text in ("".join(map(chr, range(0x100000, 0x100000 + 4000))), "</s>" * 1000):
        with pytest.raises(RequestError, match="000 special tokens, but the context of this server has 128 tokens"):
            engine._process([{"role": "user", "content": [{"type": "text", "text": text}]}], [])
    text = "".join(map(chr, range(0x100000, 0x100000 + 100)))
    first, again = (engine._process([{"role": "user", "content": [{"type": "text", "text": text}]}], []) for _ in "ab")
    assert torch.equal(first["input_ids"], again["input_ids"])


def test_a_streamed_answer_comes_in_pieces(server):
    chunks = list(server.ask(PICTURE, stream=True, stream_options={"include_usage": True}))
    assert all(ChatCompletionChunk.model_validate(chunk.to_dict()) for chunk in chunks)
    assert all("usage" in chunk.to_dict() for chunk in chunks), "raw clients read it in each chunk"
    *chunks, last = chunks
    pieces = [piece for chunk in chunks if (piece := chunk.choices[0].delta.content)]
    assert len(pieces) > 1
    assert "".join(pieces) == server.expected(PICTURE)
    assert chunks[-1].choices[0].finish_reason == "length" and not last.choices
    assert last.usage == server.ask(PICTURE).usage


def test_a_second_question_about_an_image_does_not_run_the_encoder(server):
    calls = count_encoder(server.model)
    for picture, question, expected in ((8, "who?", 1), (9, "who?", 2), (8, "what?", 2), (9, "where?", 2)):
        answer = server.ask(image(picture), question).choices[0].message.content
        assert answer == server.expected(image(picture), question)
        assert len(calls) == expected


def test_clients_at_the_same_time_get_their_own_answers(server):
    with ThreadPoolExecutor(4) as clients:
        answers = list(clients.map(lambda seed: server.ask(image(seed)).choices[0].message.content, range(4)))
    assert answers == [server.expected(image(seed)) for seed in range(4)]


# --- who can reach what ---


@pytest.mark.parametrize("path", ["/load_model", "/reset", "/v1/completions", "/v1/systemone"])
def test_a_client_can_load_and_unload_nothing(path, server, tmp_path):
    other = str(tmp_path)
    response = httpx.post(server.url + path, json={"model": other, "prompt": "a"})
    message = response.json()["error"]["message"]
    assert response.status_code == 403 and "is not served. Available: GET /health, GET /v1/models, " in message
    assert "GET /v1/models/{model}, POST /v1/chat/completions" in message
    with pytest.raises(openai.NotFoundError, match="This server has no model") as refused:
        server.client.chat.completions.create(model=other, messages=[{"role": "user", "content": "a"}])
    assert refused.value.code == "model_not_found"
    assert list(server.manager.loaded_models) == [server.adapter]


@pytest.mark.parametrize(
    "method, path, headers, status, code",
    [
        ("GET", "/health", {}, 200, None),
        ("GET", "/health", {"Host": "127.0.0.1:8000"}, 200, None),
        ("GET", "/health", {"Host": "[::1]:8000"}, 200, None),
        ("GET", "/health", {"Host": "localhost", "Origin": "http://localhost"}, 200, None),
        ("GET", "/health", {"Host": "attacker.example:8000"}, 403, "host_not_allowed"),
        ("GET", "/health", {"Host": "localhost.attacker.example"}, 403, "host_not_allowed"),
        ("GET", "/health", {"Host": "[localhost"}, 403, "host_not_allowed"),
        ("GET", "/health", {"Host": ""}, 403, "host_not_allowed"),
        ("GET", "/v1/models", {"Origin": "https://attacker.example"}, 403, "origin_not_allowed"),
        ("GET", "/v1/models", {"Origin": "null"}, 403, "origin_not_allowed"),
        ("GET", "/v1/models", {"Origin": "http://["}, 403, "origin_not_allowed"),
        ("OPTIONS", "/v1/responses", {"Origin": "https://attacker.example"}, 403, "origin_not_allowed"),
        ("OPTIONS", "/v1/models", {}, 403, "endpoint_not_allowed"),
        ("POST", "/v1/audio/transcriptions", {}, 403, "endpoint_not_allowed"),
        ("GET", "/docs", {}, 403, "endpoint_not_allowed"),
        ("GET", "/openapi.json", {}, 403, "endpoint_not_allowed"),
        ("GET", "/v1/chat/completions", {}, 403, "endpoint_not_allowed"),
    ],
)
def test_names_origins_and_endpoints_that_are_not_allowed(method, path, headers, status, code, server):
    response = httpx.request(method, server.url + path, headers=headers)
    assert response.status_code == status
    assert code is None or response.json()["error"]["code"] == code
    assert "access-control-allow-origin" not in response.headers


def test_web_pages_of_named_origins_may_ask(server, reader):
    origins = ["https://chat.example.org"]
    client = TestClient(serve.build(server.manager, reader, origins=origins), base_url="http://localhost")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization"}
    asks |= {"Access-Control-Request-Private-Network": "true"}
    for origin, allowed in ((origins[0], True), ("https://attacker.example", False)):
        answers = (
            client.options("/v1/chat/completions", headers={"Origin": origin, **asks}),
            client.get("/v1/models", headers={"Origin": origin}),
        )
        assert [answer.is_success for answer in answers] == [allowed, allowed]
        assert [answer.headers.get("access-control-allow-origin") == origin for answer in answers] == [allowed] * 2


def test_every_route_of_transformers_serve_is_known():
    """When this fails, `transformers serve` has a new endpoint: decide whether it is to be answered."""
    handlers = "chat completion response transcription systemone".split()
    app = build_server(None, **{f"{name}_handler": None for name in handlers}, generation_state=None)
    paths = {route.path for route in app.routes if isinstance(route, APIRoute)}
    refused = {"/load_model", "/reset", "/v1/completions", "/v1/systemone", "/v1/audio/transcriptions"}
    assert paths == refused | {path for _, path in ENDPOINTS}


def call(guard, body: bytes = b"", more=()):
    """Posts to a middleware. Returns the status and what was answered."""
    messages = iter([{"type": "http.request", "body": body, "more_body": bool(more)}, *more])
    sent = []

    async def receive():
        return next(messages, None) or await asyncio.sleep(600)

    async def send(message):
        sent.append(message)

    headers = [(b"host", b"localhost")]
    scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": headers}

    async def go():
        await guard(scope, receive, send)
        return sent[0]["status"], sent[1]["body"].decode()

    return go()


def test_requests_beyond_the_limit_get_429():
    async def check():
        released = asyncio.Event()

        async def app(scope, receive, send):
            await released.wait()
            await JSONResponse({})(scope, receive, send)

        guard = Guard(app, ["localhost"], [], max_requests=2, max_body_bytes=100)
        first = [asyncio.create_task(call(guard)) for _ in range(2)]
        await asyncio.sleep(0)
        async with asyncio.timeout(60):
            status, body = await call(guard)
        assert status == 429 and "already has 2 requests" in body
        released.set()
        assert [status for status, _ in await asyncio.gather(*first)] == [200, 200]
        assert (await call(guard))[0] == 200

    asyncio.run(check())


@pytest.mark.parametrize("arrives", [True, False], ids=["whole body", "part of the body"])
@pytest.mark.parametrize(
    "path, headers, status",
    [
        ("/v1/embeddings", {b"host": b"localhost"}, 403),
        ("/v1/responses", {b"host": b"attacker.example"}, 403),
        ("/v1/responses", {b"host": b"localhost", b"origin": b"https://attacker.example"}, 403),
        ("/v1/responses", {b"host": b"localhost"}, 429),
    ],
)
def test_a_refusal_is_sent_after_the_body_for_clients_that_read_late(path, headers, status, arrives, monkeypatch):
    messages = [{"type": "http.request", "body": b"0", "more_body": more or not arrives} for more in (True, False)]
    sent = []

    async def receive():
        return messages.pop(0) if messages else await asyncio.sleep(600)

    async def send(message):
        assert not messages
        sent.append(message)

    monkeypatch.setattr("demo.guard.UPLOAD_SECONDS", 60 if arrives else 0.1)
    guard = Guard(None, ["localhost"], [], max_requests=0, max_body_bytes=100)
    scope = {"type": "http", "method": "POST", "path": path, "headers": [*headers.items()]}
    asyncio.run(guard(scope, receive, send))
    assert sent[0]["status"] == status


def test_a_body_beyond_the_limit_is_not_kept():
    async def app(scope, receive, send):
        message = await receive()
        await JSONResponse(len(message["body"]))(scope, receive, send)

    guard = Guard(app, ["localhost"], [], max_requests=2, max_body_bytes=100)
    assert asyncio.run(call(guard, b"0" * 100)) == (200, "100")
    piece = {"type": "http.request", "body": bytes(2**20), "more_body": True}
    tracemalloc.start()
    status, body = asyncio.run(call(guard, more=[piece] * 20 + [{**piece, "more_body": False}]))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert status == 413 and f"has {21 * 2**20} bytes. This server accepts up to 100" in body
    assert peak < 10 * 2**20


def test_a_body_that_does_not_arrive_is_not_waited_for(monkeypatch):
    async def receive():
        await asyncio.sleep(600)

    async def check():
        sent = []

        async def send(message):
            sent.append(message)

        guard = Guard(None, ["localhost"], [], max_requests=1, max_body_bytes=100)
        scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": [(b"host", b"localhost")]}
        await guard(scope, receive, send)
        return sent[0]["status"], guard.num_requests

    monkeypatch.setattr("demo.guard.UPLOAD_SECONDS", 0.1)
    assert asyncio.run(check()) == (408, 0)


def test_a_client_that_does_not_read_its_answer_is_not_waited_for(monkeypatch):
    async def check():
        async def send(message):
            await asyncio.sleep(600)

        async def receive():
            return next(messages, None) or await asyncio.sleep(600)

        messages = iter([{"type": "http.request", "body": b""}])
        guard = Guard(JSONResponse({}), ["localhost"], [], max_requests=1, max_body_bytes=100)
        scope = {"type": "http", "method": "POST", "path": "/v1/responses", "headers": [(b"host", b"localhost")]}
        async with asyncio.timeout(60):
            await guard(scope, receive, send)
        return guard.num_requests

    monkeypatch.setattr("demo.guard.READ_SECONDS", 0.1)
    assert asyncio.run(check()) == 0


# --- OpenAI's contract ---


def turn(role: str, *parts) -> dict:
    """A turn of texts and images."""
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image_url", "image_url": {"url": data_url(png(part))}}
        for part in parts
    ]
    return {"role": role, "content": content}


def test_the_served_model_is_listed(server):
    (model,) = server.client.models.list()
    assert model.id == server.adapter
    assert server.client.models.retrieve(server.adapter) == model
    for name in ("other", "", server.adapter + "/config.json"):
        response = httpx.get(f"{server.url}/v1/models/{name}")
        assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")
    assert httpx.post(f"{server.url}/v1/models/{server.adapter}").status_code == 403


def in_responses_form(message: dict) -> dict:
    forms = {
        "text": lambda part: {"type": "input_text", "text": part["text"]},
        "image_url": lambda part: {"type": "input_image", "image_url": part["image_url"]["url"], "detail": "auto"},
    }
    return {**message, "content": [forms[part["type"]](part) for part in message["content"]]}


@pytest.mark.parametrize(
    "messages, text",
    [
        ([turn("user", PICTURE, "a"), turn("assistant", "b"), turn("user", PICTURE, "c")], "a\nResponse: b</s>\nc"),
        ([turn("user", "a"), turn("assistant", "b"), turn("user", "c", PICTURE)], "a\nResponse: b</s>\nc"),
        ([turn("user", PICTURE, PICTURE, "a")], "a"),
        ([turn("system", "be"), turn("user", PICTURE, "a")], "be\na"),
        ([turn("developer", "be"), turn("user", PICTURE, "a", "b")], "be\na\nb"),
    ],
    ids=["in two turns", "in a later turn", "twice in a turn", "after a system turn", "after a developer turn"],
)
def test_a_chat_is_read_with_its_image(messages, text, server, monkeypatch):
    seen, generate = [], server.model.generate
    monkeypatch.setattr(server.model, "generate", lambda **kwargs: seen.append(kwargs) or generate(**kwargs))
    server.ask(messages=messages)
    items = list(map(in_responses_form, messages))
    server.client.responses.create(model=server.adapter, input=items, max_output_tokens=MAX_NEW_TOKENS)
    expected = server.processor(images=PICTURE, text=f"{text}\nResponse:", return_tensors="pt")
    assert len(seen) == 2
    for given, name in itertools.product(seen, expected):
        assert torch.equal(given[name], expected[name]), name


def test_an_adapter_of_several_images_reads_those_of_a_request_in_their_order(reader):
    processor, other = DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), max_images=2), image(1)
    engine = Engine(tiny_model(max_images=2), processor, reader, max_context_tokens=128, max_batch_size=4)

    def prepare(*messages):
        return asyncio.run(engine.prepare(parse(ChatRequest, {}, {"messages": list(messages)})))[0]

    before = turn("user", PICTURE, "a"), turn("assistant", "b")
    for messages, pictures in (
        ((*before, turn("user", other, "c")), [PICTURE, other]),
        ((turn("user", other, PICTURE, "a"),), [other, PICTURE]),
        ((turn("user", PICTURE, PICTURE, "a"),), [PICTURE, PICTURE]),
        ((*before, turn("user", PICTURE, other, "c")), [PICTURE, other]),
        ((*before, turn("user", PICTURE, "c")), [PICTURE]),
        ((*before, turn("user", PICTURE, "c"), turn("assistant", "d"), turn("user", PICTURE, "e")), [PICTURE]),
    ):
        inputs, expected = prepare(*messages), processor(images=[pictures], return_tensors="pt")
        assert all(torch.equal(inputs[name], expected[name]) for name in expected)
    with pytest.raises(
        RequestError, match=r"3 different images \(in messages 0, 2, .* reads 2 images for each request"
    ):
        prepare(*before, turn("user", other, image(7), "c"))


@pytest.mark.parametrize("max_images, status", [(1, 413), (2, 200)])
def test_a_request_may_have_each_image_of_the_adapter_at_its_largest_size(max_images, status):
    processor = DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), max_images=max_images)
    files = [png(Image.effect_noise((1100, 1100), sigma)) for sigma in (60, 90)]
    reader = ImageReader(max_bytes=max(map(len, files)))
    manager = SingleModelManager("tiny", tiny_model(max_images=max_images), processor)
    client = TestClient(serve.build(manager, reader), base_url="http://localhost")
    content = [{"type": "image_url", "image_url": {"url": data_url(file)}} for file in files]
    body = {"model": "tiny", "messages": [{"role": "user", "content": content}], "max_tokens": 1}
    response = client.post("/v1/chat/completions", json=body)
    assert response.status_code == status, response.text
    assert status == 200 or "larger `--max-image-bytes`" in response.json()["error"]["message"]


def test_an_adapter_without_visual_memory_refuses_images(reader):
    engine = Engine(tiny_model(visual_prompts="none"), tiny_processor(), reader, 128, 4)
    request = ChatRequest(messages=[turn("user", PICTURE, "a")])
    with pytest.raises(
        RequestError, match="has an image .* the model reads no images for each request. Send the text alone"
    ):
        asyncio.run(engine.prepare(request))
    assert asyncio.run(engine.prepare(ChatRequest(messages=[turn("user", "a")])))


def test_a_fuser_that_reads_the_question_gets_it_without_earlier_answers(reader):
    processor = tiny_processor()
    engine = Engine(tiny_model(fuser_query="instruction"), processor, reader, 128, 4)
    chats = [
        [turn("user", "what?")],
        [
            turn("assistant", "hello"),
            turn("user", "what?"),
            turn("assistant", " Response: </s>"),
            turn("user", "why?"),
        ],
    ]

    async def inputs_of_both():
        jobs = []
        for chat in chats:
            request = ChatRequest(messages=chat)
            jobs.append(engine.start(request, *await engine.prepare(request)))
            jobs[-1].is_cancelled = True
        return Batch(jobs).inputs()

    options = {"return_dict": True, "return_tensors": "pt", "padding": True, "return_assistant_tokens_mask": True}
    plain = json.loads(json.dumps(chats).replace("</s>", "<|s>"))  # which the tokenizer reads in as many tokens
    expected = processor.apply_chat_template(plain, add_generation_prompt=True, tokenize=True, **options)
    found = asyncio.run(inputs_of_both())
    assert torch.equal(found["attention_mask"], expected["attention_mask"])
    is_question = expected["attention_mask"] - expected["assistant_masks"]
    assert torch.equal(found["instruction_mask"].long(), is_question) and not is_question[1].all()

    changed = "{{ message['content'][1:] if message['role'] == 'assistant' else message['content'] }}"
    processor.chat_template = f"{{% for message in messages %}}{changed}{{% endfor %}}"
    with pytest.raises(RequestError, match="does not show where they are. Leave the messages of the assistant out"):
        asyncio.run(engine.prepare(ChatRequest(messages=chats[1])))


def test_blank_tiles_of_small_images_stay_masked():
    processor = DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), max_images=2, image_tiles="2x2")
    small, large = Image.new("RGB", (9, 9), "red"), image(1).resize((64, 64))
    samples = [[small, large], [small, small], [large], []]
    rows = [processor(images=[sample], text="?", return_tensors="pt") for sample in samples]
    expected, stacked = processor(images=samples, return_tensors="pt"), stack_images(rows)
    assert torch.equal(stacked["image_mask"], expected["image_mask"])
    has_image = expected["image_mask"]
    assert torch.equal(stacked["pixel_values"][has_image], expected["pixel_values"][has_image])


def test_samples_with_different_numbers_of_images_share_a_batch_and_each_image_is_encoded_once(monkeypatch):
    processor, model = DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), max_images=2), tiny_model(max_images=2)
    pictures = [PICTURE, image(1), image(7)]
    samples = [pictures[:2], [], pictures[2:], [pictures[1], pictures[0]]]
    rows = [processor(images=[sample], text="?", return_tensors="pt") for sample in samples]
    for chosen in ([0, 1, 2, 3], [1, 2], [1]):
        expected = processor(images=[samples[row] for row in chosen], return_tensors="pt")
        stacked = stack_images([rows[row] for row in chosen])
        assert stacked.keys() == expected.keys()
        assert all(torch.equal(stacked[name], expected[name]) for name in expected)

    stacked = stack_images(rows)
    with torch.no_grad():
        expected, encoded = model.get_image_features(**stacked).pooler_output, []
        serve.remember_images(model)
        encode = model.model.active.__class__.encode
        monkeypatch.setattr(
            model.model.active.__class__,
            "encode",
            lambda self, tower, pixels, *args, **kwargs: (
                encoded.append(len(pixels)) or encode(self, tower, pixels, *args, **kwargs)
            ),
        )
        for _ in range(2):
            torch.testing.assert_close(model.get_image_features(**stacked).pooler_output, expected)
    assert encoded == [3]


def test_an_answer_says_how_it_ended(server):
    text = server.expected(PICTURE)
    assert text == "cjj222cc"
    completion = server.ask(PICTURE)
    ChatCompletion.model_validate(completion.to_dict())
    assert completion.choices[0].finish_reason == "length"
    num_prompt_tokens = len(QUESTION) + len(" Response:") + 1  # a token per character, and that of the beginning
    usage = completion.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (num_prompt_tokens, MAX_NEW_TOKENS)
    assert usage.total_tokens == num_prompt_tokens + MAX_NEW_TOKENS
    for stop, expected in (("j2", "cj"), (["cc", "22"], "cjj"), ("x", text), (10**6 * "c", text)):
        for stream in (False, True):
            answer = server.ask(PICTURE, stop=stop, stream=stream)
            if stream:
                chunks = list(answer)
                content = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
                reason = chunks[-1].choices[0].finish_reason
            else:
                content, reason = answer.choices[0].message.content, answer.choices[0].finish_reason
            assert (content, reason) == (expected, "length" if expected == text else "stop")


def test_an_answer_ends_with_the_end_token(server, monkeypatch):
    tokens = server.processor.tokenizer(server.expected(PICTURE))["input_ids"][1:]
    place = next(place for place in range(1, len(tokens)) if tokens[place] not in tokens[:place])
    monkeypatch.setattr(server.model.generation_config, "eos_token_id", tokens[place])

    def reason(num_tokens):
        return server.ask(PICTURE, max_completion_tokens=num_tokens).choices[0].finish_reason

    # Also where it is the last token that was asked for
    assert [reason(place + number) for number in range(3)] == ["length", "stop", "stop"]


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_ends_with_the_time_of_the_generation_config(stream, server, monkeypatch):
    monkeypatch.setattr(server.model.generation_config, "max_time", 1e-9)
    texts, _ = contents(server.ask(PICTURE, n=2, stream=stream, timeout=60), stream)
    assert texts == dict.fromkeys(range(2), server.expected(PICTURE, num_tokens=1))


def test_sampling_parameters_are_applied(server):
    def answers(num=3, **options):
        return {server.ask(PICTURE, **options).choices[0].message.content for _ in range(num)}

    greedy = {server.expected(PICTURE)}
    for options in ({}, {"temperature": 0, "top_p": 0.5}, {"temperature": 1e-40}, {"top_p": 1e-6}):
        assert answers(**options) == greedy, options
    assert answers(temperature=2, top_p=1e-6) == greedy
    assert len(answers(temperature=2)) > 1 and len(answers(top_p=1)) > 1
    seeded = [answers(temperature=2, seed=seed) for seed in range(3)]
    assert all(len(same) == 1 for same in seeded) and len(set.union(*seeded)) > 1
    # A seed is that of one request alone
    assert len(set.union(*(answers(seed=0) and answers(temperature=2, num=1) for _ in range(3)))) > 1


def contents(answer, stream: bool) -> tuple[dict[int, str], dict[int, list]]:
    """The text and the likelihoods of the tokens of each choice."""
    texts, tokens = {}, {}
    for chunk in answer if stream else [answer]:
        kind = ChatCompletionChunk if stream else ChatCompletion
        kind.model_validate(chunk.to_dict())
        for choice in chunk.choices:
            text = (choice.delta if stream else choice.message).content or ""
            texts[choice.index] = texts.get(choice.index, "") + text
            tokens.setdefault(choice.index, []).extend(choice.logprobs.content if choice.logprobs else [])
    return texts, tokens


@pytest.mark.parametrize("stream", [False, True])
def test_several_choices_are_given(stream, server):
    texts, _ = contents(server.ask(PICTURE, n=2, stream=stream), stream)
    assert texts == dict.fromkeys(range(2), server.expected(PICTURE))
    options = {"n": 3, "temperature": 2, "seed": 0}
    texts, _ = contents(server.ask(PICTURE, stream=stream, **options), stream)
    assert list(texts) == [0, 1, 2] and len(set(texts.values())) > 1
    assert texts == contents(server.ask(PICTURE, **options), False)[0]
    assert server.ask(PICTURE, n=3, max_completion_tokens=4).usage.completion_tokens == 12


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "options, num_tokens",
    [({}, MAX_NEW_TOKENS), ({"temperature": 2, "seed": 0}, MAX_NEW_TOKENS), ({"stop": "j2"}, 2), ({"n": 2}, 8)],
    ids=["greedy", "sampled", "stopped", "choices"],
)
def test_likelihoods_of_tokens_are_those_of_the_model(stream, options, num_tokens, server):
    texts, tokens = contents(server.ask(PICTURE, logprobs=True, top_logprobs=3, stream=stream, **options), stream)
    model, processor = DehvfForConditionalGeneration.from_pretrained(server.adapter), server.processor
    for index, text in texts.items():
        assert len(text) == num_tokens
        assert [token.token for token in tokens[index]] == list(text)  # a token per character
        inputs = processor(images=PICTURE, text=f"{QUESTION}\nResponse:{text}", return_tensors="pt")
        with torch.no_grad():
            logits = model(**inputs).logits[0, -num_tokens - 1 : -1]
        logits[:, model.generation_config.suppress_tokens] = -torch.inf
        expected = logits.log_softmax(-1)
        for token, row, own in zip(tokens[index], expected, inputs["input_ids"][0, -num_tokens:]):
            best = row.topk(3)
            assert token.logprob == pytest.approx(row[own].item(), abs=1e-4)
            assert [other.logprob for other in token.top_logprobs] == pytest.approx(best.values.tolist(), abs=1e-4)
            assert [other.token for other in token.top_logprobs] == list(map(processor.tokenizer.decode, best.indices))
            assert bytes(token.bytes).decode() == token.token
    (plain,) = server.ask(PICTURE, logprobs=True).choices
    assert all(token.top_logprobs == [] for token in plain.logprobs.content)
    assert server.ask(PICTURE).choices[0].logprobs is None


@pytest.mark.parametrize(
    "num_tokens, expected",
    [(4, [("a", 1), ("é", 2), ("b", 1)]), (3, [("a", 1), ("é", 2)]), (2, [("a", 1)])],
    ids=["whole", "ends with it", "ends in it"],
)
def test_parts_of_a_character_are_sent_together(num_tokens, expected):
    """Here a token is a byte, and the character has two."""

    class Bytes:
        def decode(self, ids, **kwargs):
            return bytes(ids).decode(errors="replace")

    async def pieces():
        request = ChatRequest(messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=1)
        job = Job(request, {"input_ids": torch.zeros(1, 1)}, num_tokens, {}, None, Bytes(), [0], word=b"a")
        for token in "aéb".encode()[:num_tokens]:
            job.answers[0].add(token, torch.zeros(256).log_softmax(-1))
        job.put(None)
        return [piece async for piece in job.pieces()], ChatWriter(request, "", "").whole(job)

    given, whole = asyncio.run(pieces())
    assert [(piece.text, len(piece.tokens)) for piece in given] == expected
    (choice,), text = whole["choices"], "".join(text for text, _ in expected)
    assert choice["message"]["content"] == text and whole["usage"]["completion_tokens"] == num_tokens
    tokens = choice["logprobs"]["content"]
    assert [token["bytes"] for token in tokens] == [[97], None, None, [98]][: len(text.encode())]


def test_tokens_keep_the_spaces_that_sentencepiece_removes_from_decoded_texts():
    class Words:
        words = ["a", " red", " he", "n"]

        def decode(self, ids, **kwargs):
            return "".join(self.words[token] for token in ids).removeprefix(" ")

    async def answer():
        request = ChatRequest(messages=[{"role": "user", "content": "a"}], logprobs=True, top_logprobs=4)
        job = Job(request, {"input_ids": torch.zeros(1, 1)}, 3, {}, None, Words(), [], word=[0])
        for token in (1, 2, 3):
            job.answers[0].add(token, torch.zeros(4).log_softmax(-1))
        return job.answers[0]

    found = asyncio.run(answer())
    assert found.text == "red hen" and [token.text for token in found.tokens()] == ["red", " he", "n"]
    assert {text for text, _ in found.tokens()[1].alternatives} == {"a", " red", " he", "n"}


@pytest.mark.parametrize("given", ["text", "parts", "instructions"])
def test_responses_are_given_whole_unless_streaming_is_asked_for(given, server):
    parts = [
        {"type": "input_image", "image_url": data_url(png(PICTURE)), "detail": "auto"},
        {"type": "input_text", "text": QUESTION},
    ]
    options = {
        "text": {"input": QUESTION},
        "parts": {"input": [{"role": "user", "content": parts}]},
        "instructions": {"input": QUESTION, "instructions": "be"},
    }[given]
    expected = {
        "text": (None, QUESTION),
        "parts": (PICTURE, QUESTION),
        "instructions": (None, f"be\n{QUESTION}"),
    }[given]
    options |= {"model": server.adapter, "max_output_tokens": MAX_NEW_TOKENS}
    response = server.client.responses.create(**options)
    Response.model_validate(response.to_dict())
    assert response.output_text == server.expected(*expected)
    assert response.status == "incomplete" and response.incomplete_details.reason == "max_output_tokens"
    assert response.usage.output_tokens == MAX_NEW_TOKENS

    with server.client.responses.stream(**options) as stream:  # checks the order of events
        events = list(stream)
    deltas = [event.delta for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 1 and "".join(deltas) == response.output_text
    assert events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))


TOO_MANY = [turn("user", PICTURE, "a"), turn("user", image(1), "b")]


@pytest.mark.parametrize(
    "options, words",
    [
        ({"messages": []}, "`messages` is []: List should have at least 1 item"),
        ({"messages": TOO_MANY}, "has 2 different images (in messages 0, 1"),
        ({"messages": [{"role": "user"}]}, "a message of the role 'user' needs `content`"),
        ({"messages": [{"role": "tool", "content": "a", "tool_call_id": "b"}]}, "is 'tool'"),
        ({"messages": [{"role": "user", "content": [{"type": "video_url"}]}]}, "'video_url'"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": 5}}]}]}, "is 5"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            "`messages.0.content.0.image_url` is missing",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]},
            "`messages.0.content.0.image_url` is 'data:,': a part of the type `image_url` has an object here",
        ),
        # Images in the forms of other servers, which must not be left out silently
        (
            {"messages": [{"role": "user", "content": "a", "images": ["aaaa"]}]},
            "`messages.0.images` is ['aaaa']: this server does not know this field",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "a", "image_url": {"url": "b"}}]}]},
            "`messages.0.content.0.image_url` is {'url': 'b'}: this server does not know this field",
        ),
        (
            {"messages": [turn("user", "a"), {"role": "assistant", "function_call": {"name": "f"}}]},
            "`messages.1.function_call` is",
        ),
        ({"messages": [{"role": "user", "content": []}]}, "needs `content`, a string or a list of one or more parts"),
        (
            {"messages": [{"role": "user", "content": ["a"]}]},
            "`messages.0.content.0` is 'a': Input should be an object",
        ),
        # As `extra_body`, since the client itself would look through them for seconds
        (
            {"extra_body": {"messages": 5001 * [turn("user", "a")]}},
            "has 10002 messages and parts. This server reads up to 10000",
        ),
        ({"messages": [{"role": "user", "content": 5000 * "a"}]}, "have 5000 characters, but the context"),
        (
            {"messages": [{"role": "user", "content": 130 * "a"}]},
            "have 141 tokens and 8 for the answer are asked for, but the context of this server has 128",
        ),
        ({"max_completion_tokens": 120}, "tokens and 120 for the answer are asked for"),
        ({"max_completion_tokens": 0}, "`max_completion_tokens` is 0: Input should be greater than or equal to 1"),
        ({"max_tokens": -1, "max_completion_tokens": None}, "`max_tokens` is -1"),
        (
            {"max_tokens": 5, "max_completion_tokens": 6},
            "`max_completion_tokens` is 6: it differs from `max_tokens`",
        ),
        ({"temperature": -1}, "`temperature` is -1: Input should be greater than or equal to 0"),
        ({"temperature": "hot"}, "`temperature` is 'hot'"),
        ({"top_p": 0}, "`top_p` is 0"),
        ({"seed": 2**70}, "`seed` is"),
        ({"stop": ["a"] * 5}, "`stop` is"),
        ({"stop": ""}, "`stop.0` is ''"),
        ({"stop": [1]}, "`stop.0` is 1"),
        ({"stop": 0}, "`stop` is 0"),
        ({"n": 0}, "`n` is 0: Input should be greater than or equal to 1"),
        ({"n": 17}, "`n` is 17: Input should be less than or equal to 16"),
        ({"top_logprobs": 2}, "`top_logprobs` is 2: it needs `logprobs`, true"),
        ({"logprobs": True, "top_logprobs": 21}, "`top_logprobs` is 21"),
        ({"logit_bias": {"5": 100}}, "`logit_bias` is"),
        ({"metadata": {str(number): "a" for number in range(17)}}, "`metadata` is"),
        ({"metadata": {"a": 1}}, "`metadata.a` is 1"),
        ({"metadata": {"a": "b" * 513}}, "`metadata.a` is"),
        ({"messages": [{"role": "user", "content": "a", **{str(n): n for n in range(200)}}]}, "it has 202 fields"),
        ({"frequency_penalty": 1}, "`frequency_penalty` is 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "`tools` is"),
        ({"response_format": {"type": "json_object"}}, "`response_format` is"),
        (
            {"extra_body": {"chat_template": "{{ 1 }}"}},
            "`chat_template` is '{{ 1 }}', but this server does not know this field",
        ),
        ({"picture": "data:image/png;base64,a?b"}, "is not valid base64"),
        ({"picture": "http://169.254.169.254/latest"}, "fetches no images"),
        ({"picture": "/etc/passwd"}, "is not a URL that this server reads"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_a_client_is_an_error_in_words(options, words, stream, server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.ask(stream=stream, **options)
    assert words in refused.value.body["message"]
    assert refused.value.type == "invalid_request_error"


@pytest.mark.parametrize(
    "options, words",
    [
        ({"input": []}, "`input` is []"),
        ({"input": 5}, "`input` is 5"),
        ({"input": [5]}, "`input.0` is 5"),
        (
            {"input": [{"type": "function_call_output", "call_id": "a", "output": "b"}, {"role": "user"}]},
            "`input.0.role`",
        ),
        ({"previous_response_id": "resp_1"}, "`previous_response_id` is 'resp_1', which this server does not support"),
        ({"include": ["message.output_text.logprobs"]}, "`include` is"),
        ({"max_output_tokens": 0}, "`max_output_tokens` is 0"),
        ({"reasoning": {"effort": "low", "summary": None}}, "`reasoning` is {'effort': 'low', 'summary': None}"),
        ({"extra_body": {"input": 10_001 * [{"type": "input_text", "text": "a"}]}}, "has 10001 messages and parts"),
        ({"input": [{"role": "user", "content": "a", "type": "reasoning"}]}, "`input.0.type` is 'reasoning'"),
        ({"extra_body": {"stop": "a"}}, "`stop` is 'a', but this server does not know this field"),
        ({"extra_body": {"n": 2}}, "`n` is 2, but this server does not know this field"),
    ],
)
def test_a_fault_of_a_client_is_an_error_in_responses_too(options, words, server):
    with pytest.raises(openai.BadRequestError) as refused:
        server.client.responses.create(**{"model": server.adapter, "input": "a", **options})
    assert words in refused.value.body["message"]


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"{", b"[]", b"5", b"[" * 100_000, b"\xff\xfe", b'{"messages": NaN}', b'{"model": "\\ud800"}'),
        *(b'{"\\ud800": 1}', b'{"input": ' + 900 * b"[" + 900 * b"]" + b"}"),
        *(b'{"messages": [{"role": "user", "content": "\\ud800"}]}', b'{"input": "\\ud800"}'),
        b'{"messages": [{"role": "user", "content": [{"type": "\\ud800"}]}]}',
    ],
)
def test_a_body_that_is_no_json_object_is_an_error_in_words(body, server):
    for path in ("/v1/chat/completions", "/v1/responses"):
        response = httpx.post(server.url + path, content=body, headers={"Content-Type": "application/json"})
        assert response.status_code == 400 and response.json()["error"]["message"], body
        assert response.json()["error"]["type"] == "invalid_request_error"


@pytest.mark.parametrize(
    "field, value",
    [
        ("messages", 1000 * [0]),
        ("messages", [{"role": "user", "content": 1000 * [{"type": 5}]}]),
        ("stop", 1000 * [0]),
        ("input", 1000 * ["a"]),
    ],
)
def test_errors_are_not_collected_without_limit(field, value):
    request_class = ResponsesRequest if field == "input" else ChatRequest
    with pytest.raises(RequestError) as refused:
        parse(
            request_class, {}, {"messages": [turn("user", "a")], field: value} if field != "input" else {field: value}
        )
    assert refused.value.__cause__.error_count() < 10


@pytest.mark.parametrize("size", [(1, 1), (3, 1), (1, 3), (4, 3), (50, 1)])
def test_small_images_are_read(size, server):
    assert server.ask(Image.new("RGB", size, "red")).choices[0].message.content


def test_values_that_equal_the_default_are_accepted(server):
    options = {"n": 1, "logprobs": False, "frequency_penalty": 0.0, "presence_penalty": 0, "tool_choice": "none"}
    options |= {
        "response_format": {"type": "text", "json_schema": None},
        **dict.fromkeys(("max_tokens", "max_completion_tokens"), MAX_NEW_TOKENS),
        "user": "me",
        "metadata": {"a": "b"},
        "top_p": 1,
        "temperature": 0,
        "extra_body": {"prompt_cache_options": {"mode": "implicit"}, "moderation": None},
    }
    message = server.ask(PICTURE, **options).choices[0].message
    assert message.content == server.expected(PICTURE)
    # What clients copy from an answer
    text = server.expected(text=f"{QUESTION}\nResponse: {message.content}</s>\n{QUESTION}")
    messages = [turn("user", QUESTION), message.model_dump(), {**turn("user", QUESTION), "name": "me", "type": "text"}]
    assert server.ask(messages=messages).choices[0].message.content == text

    ask = partial(server.client.responses.create, model=server.adapter, max_output_tokens=MAX_NEW_TOKENS)
    question = in_responses_form(turn("user", QUESTION))
    options = {
        "text": {"format": {"type": "text"}, "verbosity": "medium"},
        "metadata": {"a": "b"},
        "truncation": "disabled",
        "extra_body": {"prompt_cache_options": {"ttl": "30m"}, "context_management": None},
    }
    response = ask(input=[question], **options)
    assert response.output_text == server.expected() and response.metadata == {"a": "b"}
    text = server.expected(text=f"{QUESTION}\nResponse: {response.output_text}</s>\n{QUESTION}")
    assert ask(input=[question, *response.output, question]).output_text == text
    for off in (
        {"reasoning": {"effort": None, "summary": None}},
        {"reasoning": {"effort": "none", "summary": None}, "text": {"format": None, "verbosity": "medium"}},
        {"text": {"format": {"type": "text", "name": None}, "verbosity": None}},
    ):
        assert ask(input=[question], extra_body=off).output_text == server.expected()
    *_, last = ask(input=QUESTION, stream=True, stream_options={"include_obfuscation": False})
    assert last.response.output_text == server.expected()


def test_an_answer_without_a_limit_ends_with_the_context(server):
    messages = [{"role": "user", "content": 100 * "a"}]
    completion = server.ask(messages=messages, max_completion_tokens=None)
    assert completion.usage.total_tokens == 128


def test_a_template_that_refuses_a_chat_says_why(server, monkeypatch):
    template = "{{ raise_exception('No system turns, please') }}"
    monkeypatch.setattr(server.processor, "chat_template", template)
    with pytest.raises(openai.BadRequestError, match="does not take these messages: No system turns, please"):
        server.ask()


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
def test_a_message_that_the_template_leaves_out_is_refused(endpoint, server, monkeypatch):
    """As by the first template of Phi-3-mini."""
    template = "{% for message in messages if message['role'] != 'system' %}{{ message['content'] }}{% endfor %}"
    monkeypatch.setattr(server.processor, "chat_template", template)
    server.ask(messages=[turn("user", " hi </s> "), turn("assistant", "a"), turn("user", PICTURE)])
    message = "leaves out or changes the message 'Be </s>' of the role 'system'. Remove it, or put its text into"
    with pytest.raises(openai.BadRequestError, match=message):
        if endpoint == "chat":
            server.ask(messages=[turn("system", "Be </s>"), turn("user", "hi")])
        else:
            server.client.responses.create(model=server.adapter, input="hi", instructions="Be </s>")


def test_a_developer_turn_is_a_system_turn_to_the_template(server, monkeypatch):
    template = "{{ raise_exception(messages | map(attribute='role') | join(' ')) }}"
    monkeypatch.setattr(server.processor, "chat_template", template)
    roles = ("developer", "user", "assistant", "system")
    with pytest.raises(openai.BadRequestError, match="messages: system user assistant system"):
        server.ask(messages=[turn(role, "a") for role in roles])


@pytest.mark.parametrize("endpoint", ["chat", "responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_fault_of_the_server_has_an_id_that_is_in_the_log(endpoint, stream, server, monkeypatch, caplog):
    def fail(**kwargs):
        raise RuntimeError("a path that clients need not know")

    monkeypatch.setattr(server.model, "generate", fail)
    with pytest.raises(openai.APIError) as failed:
        if endpoint == "chat":
            list(server.ask(stream=stream))
        else:
            list(server.client.responses.create(model=server.adapter, input="a", stream=stream))
    assert stream or failed.value.status_code == 500
    message = failed.value.body["message"]
    (identifier,) = re.findall("[0-9a-f]{32}", message)
    assert "need not know" not in message
    assert f"Error {identifier}" in caplog.text and "RuntimeError: a path that clients need not know" in caplog.text


# --- several requests in one call of `generate` ---


class Held:
    """Holds the model in a first request, so that others wait. `sizes` has the rows of each call of `generate`."""

    def __init__(self, server, monkeypatch):
        self.server, self.sizes, generate = server, [], server.model.generate
        self.begun, self.released = threading.Event(), threading.Event()

        def count(**kwargs):
            self.sizes.append(len(kwargs["input_ids"]))
            self.begun.set()
            assert self.released.wait(60)
            return generate(**kwargs)

        monkeypatch.setattr(server.model, "generate", count)

    def ask_together(self, requests: list[tuple]) -> list:
        """What several clients get who ask while the model is held."""
        start, started = Engine.start, []

        def note(engine, *args):
            started.append(start(engine, *args))
            return started[-1]

        def ask(args, options):
            return contents(self.server.ask(*args, **options), options.get("stream"))

        with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(len(requests) + 1) as clients:
            patch.setattr(Engine, "start", note)
            first = clients.submit(self.server.ask)
            assert self.begun.wait(60)
            answers = []
            for number, request in enumerate(requests):  # they are to wait in this order
                answers.append(clients.submit(ask, *request))
                while len(started) < number + 2:
                    time.sleep(0.01)
            self.released.set()
            first.result()
            return [answer.result() for answer in answers]


def test_requests_that_wait_are_answered_together_and_as_alone(server, monkeypatch):
    requests = [
        ((PICTURE,), {}),
        ((), {"stream": True}),
        ((image(1), "who is that there?"), {"max_completion_tokens": 3}),
        ((PICTURE,), {"stop": "j2", "stream": True}),
        ((image(5), "where?"), {"logprobs": True, "temperature": 0}),
        ((image(1),), {"n": 2, "seed": 3, "max_completion_tokens": 20}),
    ]
    alone = [contents(server.ask(*args, **options), options.get("stream")) for args, options in requests]
    assert alone[0][0] == {0: server.expected(PICTURE)} and alone[1][0] == {0: server.expected()}
    assert alone[2][0] == {0: server.expected(image(1), "who is that there?", 3)}
    held = Held(server, monkeypatch)
    together = held.ask_together(requests)
    assert held.sizes == [1, 7]
    assert [texts for texts, _ in together] == [texts for texts, _ in alone]
    values = [[token.logprob for token in answers[4][1][0]] for answers in (together, alone)]
    assert values[0] == pytest.approx(values[1], abs=1e-4)


@pytest.mark.parametrize(
    "requests, config, sizes",
    [
        ([{}, {"temperature": 0}, {"seed": 1}, {"seed": 2}], {}, [4]),
        ([{}, {"temperature": 1}, {}, {"temperature": 1}], {}, [2, 2]),
        ([{"temperature": 1, "seed": 1}, {"temperature": 1, "seed": 1}, {"temperature": 1}], {}, [1, 1, 1]),
        ([{"n": 16}, {}, {"n": 3}, {"n": 16}], {}, [16, 4, 16]),
        # The third would make most of the batch padding
        ([{"question": 100 * "a"}, {"question": "a"}, {"question": "ab"}, {"question": 90 * "a"}], {}, [3, 1]),
        ([{"question": "abc"}, {"question": "ab"}, {"question": "xyz"}], {}, [3]),
        ([{"question": "abc"}, {"question": "ab"}, {"question": "xyz"}], {"repetition_penalty": 1.5}, [2, 1]),
        ([{"question": "abc"}, {"question": "ab"}, {"question": "xyz"}], {"encoder_repetition_penalty": 3.0}, [2, 1]),
        ([{"top_p": 0.5, "seed": 1}], {"temperature": 0.0}, [1]),
        ([{"max_completion_tokens": 3}, {}], {"forced_eos_token_id": 5}, [1, 1]),
        ([{"question": "abc"}, {"question": "ab"}], {"do_sample": True}, [2]),
        ([{"question": "abc", "seed": 1}, {"question": "ab", "seed": 1}], {"do_sample": True}, [1, 1]),
    ],
)
def test_which_requests_are_answered_together(requests, config, sizes, server, monkeypatch):
    for name, value in config.items():
        monkeypatch.setattr(server.model.generation_config, name, value)
    requests = [((None, options.pop("question", QUESTION)), options) for options in map(dict, requests)]
    alone = [contents(server.ask(*args, **options), False)[0] for args, options in requests]
    held = Held(server, monkeypatch)
    together = [texts for texts, _ in held.ask_together(requests)]
    assert held.sizes == [1, *sizes]
    for (_, options), *answers in zip(requests, together, alone):
        samples = config.get("do_sample") or options.get("temperature")
        assert answers[0] == answers[1] or samples and "seed" not in options


def test_settings_of_the_generation_config_work_or_are_refused(server, reader, monkeypatch):
    config = server.model.generation_config
    expected = server.expected()
    monkeypatch.setattr(config, "stop_strings", [expected[2:4]])
    monkeypatch.setattr(config, "num_return_sequences", 2)
    client = TestClient(serve.build(server.manager, reader), base_url="http://localhost")
    answer = client.post("/v1/responses", json={"input": QUESTION, "max_output_tokens": MAX_NEW_TOKENS}).json()
    assert answer["output"][0]["content"][0]["text"] == expected[: expected.index(expected[2:4])]
    for name, value in {"token_healing": True, "prompt_lookup_num_tokens": 4}.items():
        with monkeypatch.context() as context, pytest.raises(ValueError, match=f"sets `{name}`, which this server"):
            context.setattr(config, name, value)
            serve.build(server.manager, reader)


def test_a_client_that_leaves_ends_its_row_alone(server, monkeypatch):
    released, jobs, numbers = threading.Event(), [], []

    def leave(*args):
        assert released.wait(60)
        if len(jobs[0].answers[0].ids) == 3:
            jobs[0].is_cancelled = True
        numbers.append([len(job.answers[0].ids) for job in jobs])

    async def answers():
        engine = Engine(server.model, server.processor, ImageReader(), 128, 16)
        request = ChatRequest(messages=[turn("user", QUESTION)], max_tokens=MAX_NEW_TOKENS)
        inputs, number = await engine.prepare(request)
        first = engine.start(request, inputs, 1)  # during which the others come
        jobs.extend(engine.start(request, inputs, limit) for limit in (100, number, 100))
        jobs[2].is_cancelled = True
        released.set()
        for job in (first, jobs[1]):
            async for _ in job.pieces():
                pass

    hook = server.model.register_forward_pre_hook(leave)
    try:
        asyncio.run(answers())
    finally:
        hook.remove()
    assert jobs[1].answers[0].text == server.expected()
    assert server.expected().startswith(jobs[0].answers[0].text)
    assert [len(job.answers[0].ids) for job in jobs] == [3, MAX_NEW_TOKENS, 0]
    assert len(numbers) == 1 + MAX_NEW_TOKENS  # and not 100 forwards


# --- under load ---


def resident_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.parametrize("num_requests", [160, pytest.param(2000, marks=pytest.mark.extended)])
def test_many_clients_get_the_answers_that_one_would_get(num_requests, server):
    """Half of the answers are streamed, a tenth is cut off, and each image is asked about ten times."""
    num_images = num_requests // 10
    model = DehvfForConditionalGeneration.from_pretrained(server.adapter)
    expected = []
    for seed in range(num_images):
        inputs = server.processor(images=image(seed), text=f"{QUESTION}\nResponse:", return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=20)[0, inputs["input_ids"].shape[1] :]
        expected.append(server.processor.decode(tokens, skip_special_tokens=True))
    sizes = []

    def ask(number: int) -> bool:
        seed, stream, limit = number * 7 % num_images, number % 2 == 0, 4 + number % 16
        answer = server.ask(image(seed), max_completion_tokens=limit, stream=stream)
        if stream and number % 10 == 0:
            next(answer)
            answer.close()
            return True
        if number % 100 == 99:
            sizes.append(resident_bytes())
        (text,) = contents(answer, stream)[0].values()
        return text == expected[seed][:limit]

    with ThreadPoolExecutor(16) as clients:
        assert all(clients.map(ask, range(num_requests)))
    assert sizes[-1] - sizes[len(sizes) // 4] < 50e6


def test_a_tokenizer_is_used_by_one_thread_at_a_time(server, monkeypatch):
    """It holds the padding of the call in progress: another call that changes it fails with "Already borrowed"."""
    process, running, numbers = server.processor.apply_chat_template, [], []

    def count(*args, **kwargs):
        running.append(1)
        numbers.append(len(running))
        time.sleep(0.1)  # in which others would come
        running.pop()
        return process(*args, **kwargs)

    monkeypatch.setattr(server.processor, "apply_chat_template", count)
    with ThreadPoolExecutor(4) as clients:
        list(clients.map(lambda _: server.ask(max_completion_tokens=1), range(4)))
    assert numbers == [1, 1, 1, 1]


def test_a_slow_image_host_delays_no_other_request(server, image_host):
    with ThreadPoolExecutor(2) as clients:
        image_host.seen.clear()
        hanging = [clients.submit(server.ask, f"http://{image_host.name}/hang") for _ in range(2)]
        while image_host.seen.count("/hang") < 2:
            time.sleep(0.01)
        assert server.ask(PICTURE).choices[0].message.content == server.expected(PICTURE)
        assert not any(request.done() for request in hanging)
        for request in hanging:
            with pytest.raises(openai.BadRequestError, match="was not fetched within 5 seconds"):
                request.result()


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_whose_client_left_is_not_finished(stream, server, monkeypatch):
    started, numbers, generate = threading.Event(), [], server.model.generate

    def count(**kwargs):
        tokens = generate(**kwargs)
        numbers.append(tokens.shape[1] - kwargs["input_ids"].shape[1])
        return tokens

    def wait(*args):
        started.set()
        time.sleep(0.05)  # a model that takes its time

    monkeypatch.setattr(server.model, "generate", count)
    hook = server.model.register_forward_pre_hook(wait)
    body = {"messages": [turn("user", "a")], "max_tokens": 100, "stream": stream}
    with socket.create_connection(("localhost", server.server.config.port)) as client:
        data = json.dumps(body).encode()
        head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        client.sendall(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        assert started.wait(600)
    while not numbers:
        time.sleep(0.01)
    hook.remove()
    assert numbers[0] < 100


@pytest.mark.slow
def test_sigterm_finishes_running_requests(adapter, tmp_path):
    """In a process of its own, with a Hub cache that does not exist, and with models that are listed all the same."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    command = [sys.executable, ROOT / "demo" / "serve.py", adapter, "--trust-remote-code", "--device", "cpu"]
    environment = {**os.environ, "HF_HUB_CACHE": str(tmp_path / "none"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([*map(str, command), "--port", str(port)], env=environment, cwd=tmp_path)
    try:
        client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)
        while True:
            try:
                assert [model.id for model in client.models.list()] == [adapter]
                break
            except openai.APIConnectionError:
                assert process.poll() is None
                time.sleep(0.2)
        messages = [{"role": "user", "content": QUESTION}]
        options = {"model": adapter, "messages": messages, "max_tokens": 100, "seed": 0, "temperature": 1}
        expected = client.chat.completions.create(**options).choices[0].message.content
        streams = [client.chat.completions.create(stream=True, **options) for _ in range(3)]
        next(streams[0])
        process.send_signal(signal.SIGTERM)
        for stream in streams:
            answer = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
            assert answer == expected
        assert process.wait(60) in (0, -signal.SIGTERM)
    finally:
        process.kill()
