"""Calls share nothing: threads on one model, each with an image, an adapter or no adapter of its own."""

import threading
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext

import pytest
import torch
from tiny import (
    DEHVF_SIZES,
    DehvfForConditionalGeneration,
    save_tiny_bases,
    tiny_inputs,
    tiny_tokenizer,
)
from transformers import TextIteratorStreamer


WIDE = {"hidden_size": 512, "intermediate_size": 1024, "head_dim": 64, "num_attention_heads": 8}
NUM_THREADS, NUM_IMAGES, NUM_TOKENS = 8, 10, 4


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """Wide enough for a wrong image to show, with the adapters `default` and `other`, and the folder of a third."""
    folder = tmp_path_factory.mktemp("threads")
    bases = save_tiny_bases(folder, **WIDE)
    for seed, name in enumerate(("default", "other", "third")):
        torch.manual_seed(seed)
        sizes = {**DEHVF_SIZES, "num_memory_slots": 20 + seed, "num_groups": 1 + seed}
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **sizes)
        for tensor in model.adapter_state_dict().values():
            torch.nn.init.normal_(tensor, std=0.2)
        model.save_pretrained(folder / name)
    model = DehvfForConditionalGeneration.from_pretrained(folder / "default")
    model.load_adapter(folder / "other", "other")
    model.third = folder / "third"
    return model


def make_requests(model) -> list:
    """Functions that compute the logits or the tokens of one request."""
    tokenizer = tiny_tokenizer()
    generation = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}

    def stream(**inputs):
        streamer = TextIteratorStreamer(tokenizer, timeout=60)
        thread = threading.Thread(target=model.generate, kwargs={**inputs, **generation, "streamer": streamer})
        thread.start()
        text = "".join(streamer)
        thread.join()
        return torch.tensor(tokenizer(text)["input_ids"])

    verbs = {
        "logits": lambda **inputs: model(**inputs).logits,
        "tokens": lambda **inputs: model.generate(**inputs, **generation),
        "stream": stream,
    }

    def make(verb, context, inputs):
        def request():
            with torch.no_grad(), context():
                return verbs[verb](**inputs)

        return request

    requests = []
    for seed in range(NUM_IMAGES):
        inputs = tiny_inputs(1, seed=seed)
        text = {name: tensor for name, tensor in inputs.items() if name != "pixel_values"}
        named = [{**inputs, "adapter_names": [name]} for name in ("default", "other", "__base__")]
        for verb in verbs:
            requests += [make(verb, nullcontext, own) for own in named]
            requests.append(make(verb, nullcontext, {**text, "adapter_names": ["other"]}))
        for verb in ("logits", "tokens"):
            requests.append(make(verb, model.disable_adapter, inputs))
    return requests


def count_differences(requests, alone, num_requests: int) -> int:
    def differs(number):
        own = number % len(requests)
        found, expected = requests[own](), alone[own]
        if found.dtype.is_floating_point:
            return not torch.allclose(found, expected, atol=1e-5, rtol=1e-5)
        return not torch.equal(found, expected)

    with ThreadPoolExecutor(NUM_THREADS) as pool:
        return sum(pool.map(differs, range(num_requests)))


@pytest.mark.slow
@pytest.mark.parametrize(
    "adapters_change, num_requests",
    [
        pytest.param(False, 300, id="alone", marks=pytest.mark.extended),
        pytest.param(True, 200, id="while adapters are switched"),
        pytest.param(True, 2000, id="2,000 requests", marks=pytest.mark.extended),
    ],
)
def test_concurrent_requests_do_not_affect_each_other(model, adapters_change, num_requests):
    requests = make_requests(model)
    alone = [request() for request in requests]
    assert len({tuple(tensor.flatten().tolist()) for tensor in alone}) > len(alone) / 3, "requests do differ"
    stop, switches = threading.Event(), []

    def switch():
        while not stop.is_set():
            for step in (
                lambda: model.load_adapter(model.third, "third"),
                lambda: model.set_adapter("third"),
                lambda: model.set_adapter("other"),
                lambda: model.delete_adapter("third"),
                lambda: model.set_adapter("default"),
            ):
                step()
                switches.append(model.active_adapters())

    thread = threading.Thread(target=switch) if adapters_change else None
    if thread:
        thread.start()
    try:
        assert count_differences(requests, alone, num_requests) == 0
    finally:
        stop.set()
        if thread:
            thread.join()
            assert len(switches) > num_requests / 20
    assert model.active_adapters() == ["default"]


@torch.no_grad()
def test_an_adapter_that_is_disabled_in_one_thread_works_in_another(model):
    inputs = tiny_inputs(1)
    expected = model(**inputs).logits
    with ThreadPoolExecutor(1) as pool, model.disable_adapter():
        with_adapter = pool.submit(lambda: model(**inputs).logits.detach()).result()
        without = model(**inputs).logits
    torch.testing.assert_close(with_adapter, expected)
    torch.testing.assert_close(model(**inputs).logits, expected)
    assert not torch.allclose(without, expected, atol=1e-3)


def test_contexts_that_disable_an_adapter_may_overlap(model):
    """As those of two coroutines or generators of one thread do."""
    first, second = model.disable_adapter(), model.disable_adapter()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert model.model.is_disabled
    second.__exit__(None, None, None)
    assert not model.model.is_disabled


def test_a_context_may_end_in_another_thread(model):
    """As that of a generator whose parts are made by the threads of a web server."""
    inputs = {name: tensor[:1] for name, tensor in tiny_inputs().items()}
    expected = model(**inputs).logits

    def answers():
        with model.disable_adapter():
            yield model(**inputs).logits
            yield None

    with ThreadPoolExecutor(1) as first, ThreadPoolExecutor(1) as second:
        generator = answers()
        assert not torch.equal(first.submit(next, generator).result(), expected)
        second.submit(next, generator).result()
        second.submit(generator.close).result()
        for pool in (first, second):
            assert torch.equal(pool.submit(model, **inputs).result().logits, expected)


def test_replicas_of_data_parallel_are_disabled_too(model):
    with model.disable_adapter():
        replica = model.model._replicate_for_data_parallel()
    assert replica.is_disabled and not model.model.is_disabled
    assert not model.model._replicate_for_data_parallel().is_disabled
