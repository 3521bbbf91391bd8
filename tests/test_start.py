"""What a new adapter starts from, for every parameter, however the model is made."""

import re

import pytest
import torch
from tiny import ROOT, DehvfForConditionalGeneration, save_tiny_bases, tiny_config, tiny_inputs
from transformers import AutoModel


# Wide enough for a standard deviation to be measured
SIZES = {"layer_embedding_size": 64, "fuser_hidden_size": 64, "projector_hidden_size": 64, "initializer_range": 0.02}
NORMAL, ZERO, ONE = (0.0, 0.02), (0.0, 0.0), (1.0, 0.0)
# Pattern of a parameter's name -> mean and standard deviation of its values
START = {
    r"memory_slots\.key": NORMAL,
    r"memory_slots\.value": ZERO,
    r"projector\.(down|up)\.weight": NORMAL,
    r"projector\.(down|up)\.bias": ZERO,
    r"vision_adapters\.\d+\.down\.weight": NORMAL,
    r"vision_adapters\.\d+\.up\.weight": ZERO,
    r"fuser_query\.(layer|position)_embedding": (0.0, 1.0),
    r"fuser_query\.tokens": (0.0, 1.0),
    r"fuser_query\.(linear_1|linear_2|instruction_proj)\.(weight|bias)": "as nn.Linear",
    r"fuser\.(in_proj|head)\.(weight|bias)": "as nn.Linear",
    r"fuser\.blocks\.\d+\.(q_proj|k_proj|v_proj|out_proj|linear_1|linear_2)\.(weight|bias)": "as nn.Linear",
    r"fuser\.blocks\.\d+\.(attention_norm|ffn_norm)\.weight": ONE,
    r"fuser\.blocks\.\d+\.(attention_norm|ffn_norm)\.bias": ZERO,
}


def check_start(adapter: dict[str, torch.Tensor]):
    assert adapter
    for name, tensor in adapter.items():
        (expected,) = [start for pattern, start in START.items() if re.fullmatch(rf"model\.{pattern}", name)]
        if expected == "as nn.Linear":
            fan_in = adapter[name.replace(".bias", ".weight")].shape[1]
            expected = 0.0, (3 * fan_in) ** -0.5
        mean, std = expected
        values, tolerance = tensor.double(), 5 * std / tensor.numel() ** 0.5
        assert abs(values.mean() - mean) <= tolerance, name
        assert abs(values.std(unbiased=False) - std) <= tolerance, name
        if std == 0:
            assert (tensor == mean).all(), name


def new(way: str, folder, **values):
    if way == "from_vision_text_pretrained":
        return DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(folder), **values)
    config = tiny_config(**values)
    if way == "from_config":
        config.name_or_path = str(ROOT)  # where its code is
        return AutoModel.from_config(config, trust_remote_code=True)
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(config)
    model.to_empty(device="cpu")
    model.init_weights()
    return model


@pytest.mark.parametrize("fuser_query", ["network", "tokens", "layer+instruction"])
@pytest.mark.parametrize("way", ["from_vision_text_pretrained", "from_config", "meta"])
def test_each_parameter_of_a_new_adapter_has_its_start(way, fuser_query, tmp_path):
    model = new(way, tmp_path, fuser_query=fuser_query, num_memory_slots=64, **SIZES)
    check_start(model.adapter_state_dict())
    with torch.no_grad():
        pixel_values = tiny_inputs()["pixel_values"]
        adapted = model.model.active.hierarchical_features(model.model.vision_tower, pixel_values)[2]
        assert torch.equal(adapted.last_hidden_state, model.model.vision_tower(pixel_values).last_hidden_state)


@pytest.mark.parametrize("way", ["from_vision_text_pretrained", "from_config", "meta"])
def test_the_projector_can_start_by_xavier(way, tmp_path):
    adapter = new(way, tmp_path, num_memory_slots=64, projector_initializer="xavier", **SIZES).adapter_state_dict()
    for name in ("down", "up"):
        weight = adapter[f"model.projector.{name}.weight"]
        bound = (6 / sum(weight.shape)) ** 0.5
        assert 0.9 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.1)
        assert not adapter[f"model.projector.{name}.bias"].any()


@pytest.mark.parametrize("way", ["from_vision_text_pretrained", "from_config", "meta"])
def test_a_memory_that_starts_at_zero_leaves_the_language_model_unchanged(way, tmp_path):
    model = new(way, tmp_path, num_memory_slots=64, projector_initializer="zero", **SIZES).eval()
    adapter = model.adapter_state_dict()
    assert not adapter.pop("model.projector.up.weight").any()
    check_start(adapter)
    inputs = tiny_inputs()
    logits = model(**inputs).logits
    text_alone = model.model.language_model(inputs["input_ids"], attention_mask=inputs.get("attention_mask"))
    assert torch.equal(logits, model.lm_head(text_alone.last_hidden_state))
    model.train()(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert model.model.projector.up.weight.grad.any()


def test_the_table_has_no_row_for_a_parameter_that_does_not_exist():
    names = set()
    for fuser_query in ("network", "tokens", "layer+instruction"):
        names |= DehvfForConditionalGeneration(tiny_config(fuser_query=fuser_query)).adapter_state_dict().keys()
    for pattern in START:
        assert any(re.fullmatch(rf"model\.{pattern}", name) for name in names), pattern
