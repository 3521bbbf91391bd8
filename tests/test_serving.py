"""Streamers, `transformers serve` with an OpenAI client, and the cache of images."""

import base64
import io
import runpy
import socket
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import transformers
from PIL import Image
from tiny import (
    DEHVF_SIZES,
    ROOT,
    DehvfForConditionalGeneration,
    save_tiny_bases,
    tiny_inputs,
    tiny_model,
    tiny_processor,
)
from transformers import TextIteratorStreamer, TextStreamer
from transformers.cli.serving.model_manager import Modality, ModelManager
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from demo import serve


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
    [({}, 2, [True, False]), ({}, 1, [False]), ({"fuser_query": "instruction"}, 1, None)],
    ids=["batch", "no image", "memory of one question"],
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
    assert mask == [False] or len(calls) == 2


def test_nothing_is_cached_that_a_gradient_goes_through():
    model = serve.remember_images(tiny_model()).train()
    for _ in range(2):
        model(**tiny_inputs(1), labels=tiny_inputs(1)["input_ids"]).loss.backward()


# --- the server ---


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


def test_the_command_hands_its_flags_to_transformers_serve(adapter, registered, monkeypatch):
    uvicorn, _ = pytest.importorskip("uvicorn"), pytest.importorskip("openai")
    served = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: served.append(self.config.port))
    monkeypatch.setattr(sys, "argv", ["serve.py", adapter, "--trust-remote-code", "--device", "cpu", "--port", "8123"])
    with pytest.raises(SystemExit, match="0"):
        runpy.run_path(str(ROOT / "demo" / "serve.py"), run_name="__main__")
    assert served == [8123]


class Server:
    """A running server, a client of it, and the model that it loaded."""

    def __init__(self, adapter: str, port: int):
        import openai
        from transformers.cli.serve import Serve

        self.adapter = adapter
        self.serve = Serve(adapter, trust_remote_code=True, device="cpu", port=port, non_blocking=True)
        while not self.serve.server.started:
            assert self.serve._thread.is_alive()
            time.sleep(0.05)
        self.model, self.processor = self.serve._model_manager.load_model_and_processor(
            ModelManager.process_model_name(adapter)
        )
        self.client = openai.OpenAI(base_url=f"http://localhost:{port}/v1", api_key="none", max_retries=0)

    def ask(self, picture: Image.Image | None = None, question: str = QUESTION, **options):
        """What an OpenAI client sends: the image as a data URL, then the question."""
        content = [{"type": "text", "text": question}]
        if picture is not None:
            file = io.BytesIO()
            picture.save(file, "PNG")
            url = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
            content.insert(0, {"type": "image_url", "image_url": {"url": url}})
        return self.client.chat.completions.create(
            model=self.adapter,
            messages=[{"role": "user", "content": content}],
            max_completion_tokens=MAX_NEW_TOKENS,
            **options,
        )

    def expected(self, picture: Image.Image | None = None, question: str = QUESTION) -> str:
        """The answer of the model itself, read from the folder without the server."""
        inputs = self.processor(images=picture, text=f"{question}\nResponse:", return_tensors="pt")
        model = DehvfForConditionalGeneration.from_pretrained(self.adapter)
        tokens = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS)[0, inputs["input_ids"].shape[1] :]
        return self.processor.decode(tokens, skip_special_tokens=True)


@pytest.fixture(scope="module")
def server(adapter, registered):
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    server = Server(adapter, port)
    yield server
    server.serve.kill_server()


def test_an_openai_client_is_answered_about_its_image(server):
    pictures = (*map(image, range(6)), None)
    answers = [server.ask(picture).choices[0].message.content for picture in pictures]
    assert answers == [server.expected(picture) for picture in pictures]
    assert len(set(answers)) >= 3


def test_a_streamed_answer_comes_in_pieces(server):
    pieces = [chunk.choices[0].delta.content for chunk in server.ask(image(0), stream=True)]
    pieces = [piece for piece in pieces if piece]
    assert len(pieces) > 1
    assert "".join(pieces) == server.expected(image(0))


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
