"""Speed and memory: all methods are timed with the same weights and inputs, and bytes are those of tensors."""

import dataclasses
import json
import mmap
import os
import sys
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from tiny import ROOT, tiny_config, tiny_model
from transformers import AutoModel, AutoModelForCausalLM
from transformers.utils import SAFE_WEIGHTS_NAME

from benchmarks import injection, memory, operations, speed


TINY = speed.PRESETS["tiny"]
SIDE, TOKENS = TINY.patches_per_side[0], TINY.text_tokens[0]
METHODS = (speed.TEXT_ONLY, speed.DEHVF, speed.MEMVP, speed.LLAVA, speed.MERGED)


@pytest.fixture
def models():
    text = speed.random_base(AutoModelForCausalLM, speed.make_config(TINY, SIDE).text_config, TINY)
    return speed.build_all(METHODS, TINY, SIDE, text)


def run_main(module, tmp_path, monkeypatch, *words):
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["benchmark", *words])
    module.main()


# --- speed ---


def test_all_methods_share_the_frozen_weights(models):
    weights = {}
    for name, model in models.items():
        frozen = {p.data_ptr(): p for p in model.parameters() if not p.requires_grad and p.ndim > 1}
        weights[name] = {pointer for pointer, parameter in frozen.items() if parameter.numel() >= 32 * 32}
    # Untrained LoRA modules do not change the weights, even if they are merged
    assert weights[speed.DEHVF] == weights[speed.MEMVP] == weights[speed.LLAVA] > weights[speed.TEXT_ONLY]
    assert weights[speed.MERGED] >= weights[speed.LLAVA]
    ids = torch.tensor([[3, 4, 5]])
    expected = models[speed.TEXT_ONLY](ids).logits
    for name in (speed.LLAVA, speed.MERGED):
        torch.testing.assert_close(models[name](ids).logits, expected)
    for name in (speed.DEHVF, speed.MEMVP):
        with models[name].disable_adapter():
            assert torch.equal(models[name](ids).logits, expected)
    implementations = {
        module.config._attn_implementation
        for model in models.values()
        for module in model.modules()
        if type(module).__name__.endswith("Attention")
    }
    assert implementations == {"sdpa"}


def test_all_methods_get_the_same_text_and_images(models):
    inputs = {name: speed.make_inputs(model, TINY, SIDE, 2, TOKENS) for name, model in models.items()}
    ids = inputs[speed.TEXT_ONLY]["input_ids"]
    assert "pixel_values" not in inputs[speed.TEXT_ONLY]
    for name in METHODS[1:]:
        assert torch.equal(inputs[name]["input_ids"][:, -TOKENS:], ids)
        assert torch.equal(inputs[name]["pixel_values"], inputs[speed.DEHVF]["pixel_values"])
        assert (inputs[name]["labels"] != -100).sum() == ids.numel()
    assert inputs[speed.DEHVF]["input_ids"].shape == (2, TOKENS)
    assert inputs[speed.LLAVA]["input_ids"].shape == (2, SIDE**2 + TOKENS)


def test_a_step_changes_trained_parameters_only(models):
    for name in (speed.DEHVF, speed.MEMVP, speed.LLAVA):
        model = models[name]
        before = {key: parameter.clone() for key, parameter in model.named_parameters()}
        trained = {key for key, parameter in model.named_parameters() if parameter.requires_grad}
        optimizer = torch.optim.AdamW(parameter for parameter in model.parameters() if parameter.requires_grad)
        speed.training_step(model, optimizer, speed.make_inputs(model, TINY, SIDE, 2, TOKENS), lambda: 0.0)
        changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
        assert changed and changed <= trained


def test_training_text_alone_runs_backward_to_the_input_embeddings(models):
    model, embedded = models[speed.TEXT_ONLY], []
    model.get_input_embeddings().register_forward_hook(lambda *arguments: embedded.append(arguments[-1]))
    speed.training_step(model, None, speed.make_inputs(model, TINY, SIDE, 2, TOKENS), lambda: 0.0)
    assert embedded[0].grad.any() and all(parameter.grad is None for parameter in model.parameters())


def test_an_answer_has_the_requested_length_and_is_timed_per_token(models):
    times = iter(range(100))
    for model in models.values():
        inputs = speed.make_inputs(model, TINY, SIDE, 2, TOKENS)
        seconds = speed.answer(model, inputs, 4, lambda: float(next(times)))
        # The clock advances by one at each call: at the start, after each of four tokens, and at the end
        assert seconds == {"first token": 1, "further token": 1, "whole answer": 5}


def test_jobs_alternate_in_an_order_that_is_reversed_every_round():
    order = []

    def job(name):
        order.append(name)
        return {"seconds": float(len(order))}

    samples = speed.interleave({name: partial(job, name) for name in "ab"}, 0)
    assert "".join(order) == "ab" + "abba" * 3 + "ab"
    assert samples["a"]["seconds"][:2] == [3, 6] and len(samples["b"]["seconds"]) == speed.ROUNDS == 7


def test_the_median_of_the_rounds_ratios_is_compared_with_the_target():
    groups = {"group": {"ours": {"time": [2.0, 30.0, 1.0]}, "theirs": {"time": [1.0, 10.0, 1.0]}}}
    places = ("", "group", "time", "ours", "theirs")
    found = speed.compare(speed.Comparison(*places, at_least={"small": 2}), groups, "small")
    assert (found["ratio"], found["least"], found["greatest"], found["met"]) == (2, 1, 3, True)
    other = speed.Comparison(*places, at_most={"small": 1.9, "llama-7b": 2.1})
    assert [speed.compare(other, groups, name)["met"] for name in ("small", "llama-7b", "tiny")] == [False, True, None]


def test_quadratic_growth_is_not_called_linear():
    def growth(power):
        seconds = iter([1 + patches**power / 1e6 for patches in (9, 16, 25)])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(speed, "interleave", lambda jobs, _: {n: {"prefill": [next(seconds)]} for n in jobs})
            text = speed.random_base(AutoModelForCausalLM, speed.make_config(TINY, SIDE).text_config, TINY)
            return speed.measure_growth(text, TINY, lambda: 0.0)

    linear, steep = growth(1), growth(4)
    assert linear["is_linear"] and linear["seconds_per_patch"] == pytest.approx(1e-6)
    assert not steep["is_linear"]


def test_in_small_the_encoder_has_the_same_share_of_operations_as_at_7b():
    def share(config):
        language = operations.total(operations.language_model(config.text_config, 64))
        return operations.vision_encoder(config.vision_config) / language

    small, large = (speed.make_config(speed.PRESETS[name], 16) for name in ("small", "llama-7b"))
    assert (small.text_config.hidden_size, small.text_config.num_hidden_layers) == (1024, 16)
    assert share(small) == pytest.approx(share(large), rel=0.01)


def test_the_tiny_preset_runs_end_to_end_and_reports_every_ratio(tmp_path, monkeypatch):
    run_main(speed, tmp_path, monkeypatch, "--preset", "tiny", "--clock", "cpu", "--threads", "1")
    report = json.loads((tmp_path / "speed-tiny.json").read_text())
    assert len(report["comparisons"]) == len(speed.COMPARISONS) and report["threads"] == 1
    for found, comparison in zip(report["comparisons"], speed.COMPARISONS):
        assert (found["method"], found["reference"]) == (comparison.method, comparison.reference)
        assert 0 < found["least"] <= found["ratio"] <= found["greatest"]
    for group in report["groups"].values():
        for measures in group.values():
            assert all(len(samples) >= speed.ROUNDS for samples in measures.values())
    points = {(point["patches"], point["text_tokens"]) for point in report["sweep"]}
    assert points == {(9, 4), (9, 6), (16, 4), (16, 6)} and list(report["growth"]["samples"]) == ["9", "16", "25"]
    assert report["machine"]["versions"].keys() >= {"Python", "torch", "transformers", "peft"}
    assert report["machine"]["cores"] and report["machine"]["processor"] and report["machine"]["threads"] == 1
    table = (tmp_path / "speed-tiny.md").read_text()
    assert "`llama-7b` and `llama-13b`, which need one CUDA device" in table and "ms per batch for each 100" in table
    assert not any(row["met"] is not None for row in report["comparisons"]), "`tiny` has no targets"
    assert (tmp_path / "speed-tiny.png").stat().st_size > 10_000


@pytest.mark.extended
def test_bfloat16_can_be_measured():
    preset = dataclasses.replace(TINY, dtype=torch.bfloat16)
    report = speed.measure("llama-7b", preset, "wall")
    targets = {
        row["what"]: row["at_least"] or row["at_most"] for row in report["comparisons"] if row["met"] is not None
    }
    assert targets["decoding step"] == 1.05 and "prefill, language side" not in targets


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests a machine without CUDA")
@pytest.mark.parametrize("preset", ["llama-7b", "llama-13b"])
def test_a_preset_for_gpus_is_refused_without_one(preset, tmp_path, monkeypatch):
    with pytest.raises(SystemExit, match=f"`{preset}` needs one CUDA device .* `--preset small`"):
        run_main(speed, tmp_path, monkeypatch, "--preset", preset)


@pytest.mark.parametrize("preset, trained", [("llama-7b", 4_163_783), ("llama-13b", 5_770_951)])
def test_the_presets_for_gpus_have_the_sizes_of_the_paper(preset, trained):
    config = speed.make_config(speed.PRESETS[preset], 16)
    with operations.meta_device():
        model = operations.build_dehvf(config)
    assert sum(parameter.numel() for parameter in model.adapter_state_dict().values()) == trained


# --- memory ---


@pytest.mark.parametrize("values", [{}, {"visual_prompts": "keys"}, {"num_key_value_heads": 1, "head_dim": 16}])
def test_closed_forms_are_the_bytes_of_tensors(values):
    model = tiny_model(**values)
    config = model.config
    encoded = memory.encoded_image(model)
    assert memory.visual_memory(config) * encoded.element_size() == encoded.nbytes
    text = AutoModelForCausalLM.from_config(config.text_config)
    assert 4 * memory.kv_cache(config.text_config, 11) == memory.bytes_of(memory.cached_tensors(text, 11))
    memories = model.model.active.layer_memories(encoded, torch.float32)
    features = [part for one in memories for part in (one.key_features, one.value_features) if part is not None]
    materialised = [part @ memories[0].key_matrix[config.num_memory_slots :] for part in features]
    assert 4 * memory.materialised_memory(config) == memory.bytes_of(materialised)


def test_at_7b_an_image_takes_4_million_bytes_and_134_million_in_llavas_cache():
    found = memory.measure(operations.SHAPES["LLaMA-7B, 256 visual tokens, 320 slots"])["image"]
    assert found["visual memory"] == {"closed_form": 4_227_072, "tensors": 4_227_072}
    assert found["KV cache"] == {"closed_form": 134_217_728, "tensors": 134_217_728}
    assert found["materialised memory"]["closed_form"] == 134_217_728


def test_a_checkpoint_has_the_reported_number_of_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(operations, "load_config", lambda *shape: tiny_config())
    found = memory.measure(())["checkpoint"]
    config = tiny_config()
    tiny_model().save_pretrained(tmp_path)
    assert found["DEHVF"] == memory.bytes_of(load_file(tmp_path / SAFE_WEIGHTS_NAME).values())
    text = AutoModelForCausalLM.from_config(config.text_config)
    vision = AutoModel.from_config(config.vision_config)
    assert 2 * found["language model"] == memory.bytes_of(text.parameters())  # in float32 here
    assert 2 * found["vision encoder"] == memory.bytes_of(vision.parameters())


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs Linux's /proc")
def test_the_peak_growth_is_the_memory_that_a_job_holds_at_once():
    def hold(megabytes):
        # Not a tensor, which could reuse memory that other tests have freed, without growth of the resident set
        with mmap.mmap(-1, megabytes * 2**20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as pages:
            pages[:: mmap.PAGESIZE] = bytes(len(pages) // mmap.PAGESIZE)

    hold(256)  # an earlier peak does not count
    # Several times, since the growth is underestimated if the system reclaims pages of this process meanwhile
    growth = max(memory.growth_at_peak(lambda: [hold(64), hold(128)]) for _ in range(10))
    assert growth == pytest.approx(128 * 2**20, rel=0.1)


@pytest.mark.extended
def test_the_report_has_bytes_of_images_checkpoints_and_training(tmp_path, monkeypatch):
    tiny = tiny_config()
    monkeypatch.setattr(operations, "load_config", lambda *shape: tiny)
    monkeypatch.setattr(operations, "SHAPES", {"tiny": ()})
    monkeypatch.setattr(memory, "PEAK_METHODS", (speed.DEHVF,))
    monkeypatch.setattr(memory, "PEAK_RUNS", 1)
    monkeypatch.setattr(memory, "LOADED_LAYERS", 2)
    run_main(memory, tmp_path, monkeypatch, "--preset", "tiny")
    report = json.loads((tmp_path / "memory-tiny.json").read_text())
    image = report["shapes"]["tiny"]["image"]
    assert image["visual memory"]["tensors"] == image["visual memory"]["closed_form"] > 0
    peaks = report["training_peaks"]
    assert peaks is None or peaks[speed.DEHVF][0] > 0
    table = (tmp_path / "memory-tiny.md").read_text()
    assert "| tiny | 0.0 | 0.0 | 0.0 |" in table
    assert ("Not measured" in table) == (peaks is None)
    assert (tmp_path / "memory-tiny.png").stat().st_size > 10_000


# --- forms of injection ---


@torch.no_grad()
def test_naive_injection_gives_the_same_logits_with_full_keys_and_values():
    model = tiny_model(memory_form="factored").double()
    config, ids = model.config, torch.tensor([[3, 4, 5, 6]])
    visual_memory = memory.encoded_image(model)
    factored = model.model.active.layer_memories(visual_memory, torch.float64)
    naive = injection.naive_memories(model, visual_memory)
    expected = model(ids, visual_memory=visual_memory).logits
    torch.testing.assert_close(model(ids, layer_memories=naive).logits, expected)
    assert not torch.allclose(model(ids).logits, expected), "the image matters"
    assert injection.bytes_of_image(factored) == visual_memory.nbytes
    text = config.text_config
    size = 2 * text.num_hidden_layers * config.num_memory_slots * text.hidden_size
    assert injection.bytes_of_image(naive) == 8 * size
    seconds = injection.read(model, naive, ids)
    assert seconds.keys() == {"prompt", "further token"} and min(seconds.values()) > 0


@pytest.mark.extended
def test_the_report_compares_the_forms_of_injection(tmp_path, monkeypatch):
    run_main(injection, tmp_path, monkeypatch, "--preset", "tiny")
    report = json.loads((tmp_path / "injection-tiny.json").read_text())
    assert report["reading"]["bytes"].keys() == {"naive", "materialised", "factored"}
    assert report["reading"]["samples"].keys() == report["reading"]["bytes"].keys()
    assert report["training"].keys() == {"materialised", "factored"}
    table = (tmp_path / "injection-tiny.md").read_text()
    assert "| naive | 0.0 |" in table and "| naive, materialised | " in table
    assert (tmp_path / "injection-tiny.png").stat().st_size > 10_000


def test_tensors_saved_by_autograd_count_once_and_weights_do_not_count():
    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(8, 8))

        def forward(self, given):
            hidden = given @ self.weight  # saves `given`, 3 x 8 values
            return SimpleNamespace(loss=(hidden * hidden).sum())  # saves `hidden` twice, 3 x 8 values

    assert memory.kept_for_backward(Model(), {"given": torch.ones(3, 8)}) == 4 * (3 * 8 + 3 * 8)


def test_the_estimate_for_training_at_7b_counts_its_bases_and_adapters():
    shape = operations.SHAPES["LLaMA-7B, 256 visual tokens, 320 slots"]
    needs = memory.training_needs(operations.load_config(*shape))
    assert needs["bases"] == 2 * (6_738_415_616 + 303_179_776)  # LLaMA-7B and CLIP ViT-L/14's image side
    assert needs["adapters"] == 16 * 4_163_783
    assert needs["activations, checkpointed"] < needs["activations"] / 4
    per_gpu = {engine: bases(needs, 8) for engine, bases in memory.BASES_PER_GPU.items()}
    assert per_gpu["one GPU, DDP, ZeRO-1, ZeRO-2"] == needs["bases"]
    assert per_gpu["ZeRO-3"] == needs["bases"] // 8 + 2 * 10**9


def test_the_page_on_training_has_the_estimated_table():
    _, printed = memory.estimate_table().split("\n\n")
    assert printed in (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
