"""Bases that are large for the machine: in 4 and 8 bits, offloaded to the disk, and loaded without a second copy."""

import json
import os
import sys

import pytest
import torch
from safetensors import safe_open
from tiny import DEHVF_SIZES, ROOT, DehvfForConditionalGeneration, relative_error, run, save_tiny_bases, tiny_inputs
from transformers import AutoModel, BitsAndBytesConfig
from transformers.quantizers import quantizer_bnb_4bit

import train
from benchmarks import memory


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
INT8 = BitsAndBytesConfig(load_in_8bit=True)
# Widths that are multiples of 64, the block of NF4, as in large models
WIDE = {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4, "intermediate_size": 128}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `vision`, `text` and `adapter`, and the logits of the model as it was saved."""
    folder = tmp_path_factory.mktemp("saved")
    vision, text = save_tiny_bases(folder, **WIDE)
    torch.manual_seed(2)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    torch.nn.init.normal_(model.model.memory_slots.value)
    for adapter in model.model.vision_adapters:
        torch.nn.init.normal_(adapter.up.weight, std=0.02)
    model.save_pretrained(folder / "adapter")
    return folder, logits_of(model)


def load(folder, **kwargs):
    return AutoModel.from_pretrained(folder / "adapter", trust_remote_code=True, **kwargs)


@torch.no_grad()
def logits_of(model) -> torch.Tensor:
    return model(**tiny_inputs()).logits


def gradients_of(model) -> dict[str, torch.Tensor]:
    """Of the adapters, each of which must learn something."""
    inputs = tiny_inputs()
    model.zero_grad()
    torch.manual_seed(0)  # of dropout
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert gradients.keys() == model.adapter_state_dict().keys()
    for name, gradient in gradients.items():
        assert gradient is not None and gradient.any() and gradient.isfinite().all(), name
    return gradients


def check_quantised(model, dtype: torch.dtype):
    """All that a quantised model has to be able to do, whatever the bits."""
    adapters = model.adapter_state_dict()
    assert {tensor.dtype for tensor in adapters.values()} == {torch.float32}
    for name, parameter in model.model.language_model.named_parameters():
        assert parameter.dtype == (dtype if name.endswith("proj.weight") else torch.float32), name
    assert model.generate(**tiny_inputs(), max_new_tokens=3).shape == (2, 10)
    gradients_of(model.train())


# --- 4 and 8 bits ---


@pytest.mark.parametrize(
    "quantization, dtype, tolerance", [(NF4, torch.uint8, 0.4), (INT8, torch.int8, 0.05)], ids=["4 bits", "8 bits"]
)
def test_a_quantised_base_trains_generates_and_comes_back(saved, tmp_path, quantization, dtype, tolerance):
    folder, expected = saved
    model = load(folder, quantization_config=quantization)
    logits = logits_of(model)
    # Each weight loses 1 part in 10 (4 bits), which random ones pass on; unrelated logits would differ by 1.4
    assert 0 < relative_error(logits, expected) < tolerance
    check_quantised(model, dtype)
    model.save_pretrained(tmp_path / "adapter")
    assert {path.name for path in tmp_path.glob("*/*.safetensors")} == {"model.safetensors"}
    assert (tmp_path / "adapter" / "model.safetensors").stat().st_size < 100_000
    assert torch.equal(logits_of(load(tmp_path, quantization_config=quantization)), logits)
    assert torch.equal(logits_of(load(tmp_path)), expected), "the bits can be left off again"
    new = DehvfForConditionalGeneration.from_vision_text_pretrained(
        folder / "vision", folder / "text", quantization_config=quantization, **DEHVF_SIZES
    )
    torch.nn.init.normal_(new.model.memory_slots.value)  # or it is silent, and the rest gets no gradient
    for adapter in new.model.vision_adapters:
        torch.nn.init.normal_(adapter.up.weight)
    check_quantised(new, dtype)


def test_logits_in_4_bits_are_those_of_the_rounded_weights(saved):
    import bitsandbytes

    folder, _ = saved
    model, rounded = load(folder, quantization_config=NF4), load(folder)
    modules = dict(rounded.named_modules())
    for name, module in model.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            weight = bitsandbytes.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
            modules[name].weight.data.copy_(weight)
    torch.testing.assert_close(logits_of(model), logits_of(rounded), atol=1e-4, rtol=1e-4)
    expected = gradients_of(rounded)
    for name, gradient in gradients_of(model).items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-4, rtol=1e-3, msg=name)


def test_an_evaluation_leaves_the_gradients_in_4_bits_as_they_were(saved):
    """bitsandbytes has a format for inference on CPUs with AVX512-BF16 that has no backward."""
    model = load(saved[0], quantization_config=NF4)
    expected = gradients_of(model.train())
    logits_of(model.eval())
    model.generate(**tiny_inputs(), max_new_tokens=2)
    for name, gradient in gradients_of(model.train()).items():
        assert torch.equal(gradient, expected[name]), name


def test_a_missing_bitsandbytes_is_named(saved, monkeypatch):
    monkeypatch.setattr(quantizer_bnb_4bit, "is_bitsandbytes_available", lambda: False)
    with pytest.raises(ImportError, match="pip install -U bitsandbytes"):
        load(saved[0], quantization_config=NF4)


@pytest.mark.parametrize("bits", ["4bit", pytest.param("8bit", marks=pytest.mark.extended)])
def test_training_with_a_quantised_language_model(saved, tmp_path, bits):
    folder, output = saved[0], tmp_path / "output"
    flags = {
        **{"task": "vqa", "data_path": ROOT / "examples" / "vqa", "output_dir": output, **DEHVF_SIZES},
        **{"vision_model": folder / "vision", "text_model": folder / "text", f"load_in_{bits}": True},
        **{"per_device_train_batch_size": 5, "max_steps": 2, "learning_rate": 0.01},
        **{"max_new_tokens": 8},  # the stand-in reads 128 tokens
    }
    train.main([str(word) for name, value in flags.items() for word in (f"--{name}", value)])
    with safe_open(output / "model.safetensors", framework="pt") as file:
        assert "sha256" in file.metadata(), "the Trainer saves as everybody does"
    results = json.loads((output / "results.json").read_text())
    assert results["size"] == len((output / "predictions.jsonl").read_text().splitlines())
    values = AutoModel.from_pretrained(output, trust_remote_code=True).model.memory_slots.value
    assert values.dtype == torch.float32 and values.any(), "which were zero before training"


# --- placed and converted ---


@pytest.mark.parametrize(
    "device_map",
    [
        "auto",
        {"": "disk"},
        {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu"}
        | {"lm_head": "disk"},
    ],
    ids=["auto", "all on disk", "embeddings on disk"],
)
def test_adapters_and_vision_tower_are_where_an_offloaded_base_computes(saved, tmp_path, device_map):
    folder, expected = saved
    model = load(folder, device_map=device_map, offload_folder=tmp_path / "offload")
    placed = [*model.model.vision_tower.parameters(), *model.adapter_state_dict().values()]
    assert {parameter.device.type for parameter in placed} == {"cpu"}
    torch.testing.assert_close(logits_of(model), expected)
    gradients_of(model.train())
    model.save_pretrained(tmp_path / "adapter")
    torch.testing.assert_close(logits_of(load(tmp_path)), expected)


def test_adapters_may_be_bfloat16(saved, tmp_path):
    folder, expected = saved
    model = load(folder, dtype=torch.bfloat16).to(torch.bfloat16)
    assert relative_error(logits_of(model).float(), expected) < 0.05
    assert {gradient.dtype for gradient in gradients_of(model.train()).values()} == {torch.bfloat16}
    model.save_pretrained(tmp_path / "adapter")
    again = load(tmp_path, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in again.adapter_state_dict().values()} == {torch.float32}
    for name, tensor in model.adapter_state_dict().items():
        assert torch.equal(again.adapter_state_dict()[name], tensor.float()), name


# --- host memory ---


@pytest.mark.slow
@pytest.mark.skipif(not os.access(memory.PROC / "clear_refs", os.W_OK), reason="needs Linux's account of memory")
def test_a_sharded_base_is_never_in_memory_twice(tmp_path):
    num_bytes = memory.save_sharded_base(tmp_path, num_layers=2)
    assert num_bytes > 190e6 and len([*tmp_path.glob("text/*.safetensors")]) > 1
    growth = json.loads(run(sys.executable, "-m", "benchmarks.memory", "--loading-of", tmp_path))
    for name in ("`from_pretrained`", "`from_vision_text_pretrained`"):
        # Rows of the embeddings that no token asks for are never read
        assert 0.7 < growth[name]["peak"] / num_bytes < 1.15, name
    converted = growth["`from_pretrained`, converted to bfloat16"]
    assert converted["after"] < 0.7 * num_bytes, "the shards stay mapped"
