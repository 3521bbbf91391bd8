"""Operations: the closed forms equal torch's count, on tiny models and on the models of 7B without weights."""

import json
import math
import sys

import pytest
import torch
from tiny import tiny_config, tiny_model
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import operations


# Groups that do not divide the vision layers, as many slots as patches, attention narrower or wider than the model
TINY = [
    {},
    {"num_groups": 4, "num_memory_slots": 16, "projector_hidden_size": 5, "vision_adapter_size": 3},
    {"hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 5, "head_dim": 16, "num_key_value_heads": 1},
]


@pytest.mark.parametrize("sizes", TINY)
@pytest.mark.parametrize("text_tokens", [1, 9])
def test_the_closed_forms_equal_the_count_of_torch_on_tiny_models(sizes, text_tokens):
    config = tiny_config(**sizes)
    assert operations.count(operations.build_dehvf(config), text_tokens) == operations.dehvf(config, text_tokens)
    counted = operations.count(operations.build_llava(config), text_tokens, config.num_patches)
    assert counted == operations.llava(config, text_tokens)


@pytest.mark.parametrize("patches_per_side, slots", [(16, 320), pytest.param(24, 576, marks=pytest.mark.extended)])
def test_the_closed_forms_equal_the_count_of_torch_at_7b(patches_per_side, slots):
    config = operations.load_config(operations.LLAMA_7B, patches_per_side, slots)
    with operations.meta_device():
        model = operations.build_dehvf(config)
        assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
        assert operations.count(model, 32) == operations.dehvf(config, 32)
        counted = operations.count(operations.build_llava(config), 32, config.num_patches)
    assert counted == operations.llava(config, 32)


@torch.no_grad()
@pytest.mark.parametrize("sizes", TINY)
def test_the_materialised_lookup_gives_the_same_result_with_the_operations_of_its_closed_form(sizes):
    tokens, model = 9, tiny_model(**sizes)
    config = model.config
    hidden = torch.randn(1, tokens, config.text_config.hidden_size)
    visual_memory = model.get_image_features(torch.randn(1, 3, 16, 16)).pooler_output
    memories = model.model.active.layer_memories(visual_memory, torch.float32)
    expected = [layer.mlp.lookup(hidden, memory) for layer, memory in zip(model.model.language_model.layers, memories)]

    slots = config.num_memory_slots
    basis = memories[0].key_matrix[slots:]

    def materialise(features, slots):
        visual = features @ basis
        return F.pad(visual, (0, 0, 0, slots.shape[0] - visual.shape[1])) + slots

    with FlopCounterMode(display=False) as counter:
        found = []
        for memory in memories:
            keys = materialise(memory.key_features, memory.key_matrix[:slots])
            values = materialise(memory.value_features, memory.value_matrix.T[:slots])
            found.append(F.silu(hidden @ keys.transpose(1, 2)) @ values)
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)
    assert counter.get_total_flops() == operations.materialised_lookup(config, tokens)


@pytest.mark.parametrize("shape", operations.SHAPES.values())
def test_the_materialised_lookup_has_fewer_operations_above_the_break_even(shape):
    config = operations.load_config(*shape)
    tokens = math.floor(operations.break_even(config))
    assert operations.memory_lookup(config, tokens) <= operations.materialised_lookup(config, tokens)
    assert operations.memory_lookup(config, tokens + 1) > operations.materialised_lookup(config, tokens + 1)


def test_at_576_visual_tokens_the_share_of_llava_is_below_that_of_the_paper():
    sides = operations.language_sides(operations.load_config(operations.LLAMA_7B, 24, 576))
    assert 100 * sides["text alone"] / sides["LLaVA-1.5"] == pytest.approx(5.14, abs=0.01)
    assert 100 * sides["DEHVF"] / sides["LLaVA-1.5"] <= 5.4
    assert sides["text alone"] < sides["DEHVF"] < sides["DEHVF, materialised"] < sides["LLaVA-1.5"]


def test_the_report_has_the_count_of_torch_for_every_part(tmp_path, monkeypatch):
    tiny = tiny_config(memory_form="factored")
    monkeypatch.setattr(operations, "RESULTS", tmp_path)
    monkeypatch.setattr(operations, "load_config", lambda *shape: tiny)
    monkeypatch.setattr(operations, "SHAPES", {"tiny": ()})
    monkeypatch.setattr(sys, "argv", ["operations"])
    operations.main()
    report = json.loads((tmp_path / "operations.json").read_text())
    assert report["command"] == "python -m benchmarks.operations" and "torch" in report["machine"]["versions"]
    parts = report["shapes"]["tiny"]["operations"]
    for name, closed in (("DEHVF", operations.dehvf(tiny, 32)), ("LLaVA-1.5", operations.llava(tiny, 32))):
        assert parts[name] == {part: {"closed_form": number, "torch": number} for part, number in closed.items()}
    table = (tmp_path / "operations.md").read_text()
    assert "| memory lookup | 0.001 | 0.001 | 0.000 % | – | – | – |" in table
    assert (tmp_path / "operations.png").stat().st_size > 10_000
