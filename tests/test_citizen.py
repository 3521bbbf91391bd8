"""What `torch`, `transformers`, `peft` and `accelerate` do with any model, done with this one."""

import copy
import io
import json
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import peft
import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model, load_checkpoint_in_model
from accelerate.utils import send_to_device
from peft import LoraConfig, get_peft_model
from tiny import (
    DEHVF_SIZES,
    ROOT,
    VISION_BACKBONES,
    VISION_SIZES,
    DehvfConfig,
    DehvfForConditionalGeneration,
    relative_error,
    save_tiny_bases,
    tiny_config,
    tiny_inputs,
    tiny_model,
    tiny_processor,
    tiny_text_config,
)
from torch.export import Dim
from torch.utils._pytree import tree_map
from transformers import AutoConfig, AutoModel, BitsAndBytesConfig, Trainer, TrainingArguments
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from dehvf import DehvfModel


NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
WIDE = {"hidden_size": 64, "head_dim": 16, "num_key_value_heads": 4, "intermediate_size": 128}
MASK = torch.tensor([True, False])


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A folder with `vision`, `text` and `adapter`."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(folder, **WIDE), **DEHVF_SIZES)
    randomise(model)
    model.save_pretrained(folder / "adapter")
    tiny_processor().save_pretrained(folder / "adapter")
    return folder


def load(saved, **kwargs):
    return AutoModel.from_pretrained(saved / "adapter", trust_remote_code=True, **kwargs)


def randomise(model):
    """Else the parts that start at zero would hide a wrong term."""
    for parameter in model.adapter_state_dict().values():
        torch.nn.init.normal_(parameter, std=0.3)


def shallow_model(**values):
    """Two layers in each base, without dropout: what `torch` compiles in seconds."""
    torch.manual_seed(0)
    config = DehvfConfig(
        text_config=tiny_text_config(num_hidden_layers=2),
        vision_config=AutoConfig.for_model("clip_vision_model", **{**VISION_SIZES, "num_hidden_layers": 2}),
        **{**DEHVF_SIZES, "fuser_num_layers": 1, "memory_dropout": 0.0, "vision_adapter_dropout": 0.0, **values},
    )
    model = DehvfForConditionalGeneration(config).eval()
    randomise(model)
    return model


@torch.no_grad()
def logits_of(model, **kwargs) -> torch.Tensor:
    return model(**tiny_inputs(), **kwargs).logits


def close(found: torch.Tensor, expected: torch.Tensor):
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def train_two_steps(model, folder, resume=None, **kwargs) -> torch.Tensor:
    """With a plain `Trainer`, every other row without an image. Returns the losses."""
    rows = [{name: value[0] for name, value in tiny_inputs(1, seed=seed).items()} for seed in range(4)]
    rows = [{**row, "image_mask": MASK[seed % 2], "labels": row["input_ids"]} for seed, row in enumerate(rows)]
    arguments = TrainingArguments(
        folder, max_steps=2, per_device_train_batch_size=2, learning_rate=0.01, logging_steps=1, use_cpu=True, **kwargs
    )
    trainer = Trainer(model, arguments, train_dataset=rows)
    trainer.train(resume_from_checkpoint=resume)
    return torch.tensor([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])


def test_a_plain_trainer_smooths_the_labels_of_the_next_tokens(tmp_path):
    model = tiny_model(memory_dropout=0.0, vision_adapter_dropout=0.0)
    expected = train_two_steps(copy.deepcopy(model), tmp_path / "plain")
    close(train_two_steps(model, tmp_path / "smoothed", label_smoothing_factor=1e-9), expected)


def test_a_plain_trainer_resumes_without_a_warning_about_frozen_weights(tmp_path, monkeypatch):
    model, messages = tiny_model(memory_dropout=0.0, vision_adapter_dropout=0.0), []
    monkeypatch.setattr("transformers.trainer.logger.warning", messages.append)
    again = copy.deepcopy(model)
    expected = train_two_steps(model, tmp_path, save_strategy="steps", save_steps=1)
    losses = train_two_steps(again, tmp_path, resume=str(tmp_path / "checkpoint-1"))
    assert torch.equal(losses, expected) and not [message for message in messages if "missing keys" in message]


# --- torch ---


def calls(model) -> dict[str, dict]:
    inputs = tiny_inputs()
    text = {name: value for name, value in inputs.items() if name != "pixel_values"}
    memory = model.get_image_features(inputs["pixel_values"])
    return {
        "image": inputs,
        "some without an image": {**inputs, "image_mask": MASK},
        "memory": {**text, "visual_memory": memory},
        "memory as a tensor": {**text, "visual_memory": memory.pooler_output},
        "text": text,
        "mixed": {**inputs, "adapter_names": ["default", "__base__"]},
    }


@pytest.mark.parametrize(
    "kinds",
    [
        ("image", "memory", "text"),
        pytest.param(("some without an image", "memory as a tensor", "mixed"), marks=pytest.mark.extended),
    ],
)
@torch.no_grad()
def test_each_kind_of_call_is_one_graph(kinds):
    model = shallow_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")  # inductor takes half a minute for each graph
    inputs = calls(model)
    for kind in kinds:
        torch.testing.assert_close(compiled(**inputs[kind]).logits, model(**inputs[kind]).logits, msg=kind)


@torch.no_grad()
def test_a_compiled_model_can_be_disabled():
    def compile_and_disable():  # in a thread in which nothing was disabled before
        with torch.no_grad():
            compiled(**tiny_inputs())
            with model.disable_adapter():
                return compiled(**tiny_inputs()).logits

    model = shallow_model()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(compile_and_disable).result()
    with model.disable_adapter():
        torch.testing.assert_close(found, model(**tiny_inputs()).logits)
    assert not torch.allclose(found, model(**tiny_inputs()).logits, atol=1e-3)


@pytest.mark.slow
@pytest.mark.extended
@pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning")  # that inductor imports
def test_training_compiled_by_inductor_is_as_without(tmp_path):
    model, compiled = shallow_model(), shallow_model()
    expected = train_two_steps(model, tmp_path / "eager")
    close(train_two_steps(compiled, tmp_path / "compiled", torch_compile=True), expected)
    for name, tensor in compiled.adapter_state_dict().items():
        torch.testing.assert_close(tensor, model.adapter_state_dict()[name], atol=1e-4, rtol=1e-3, msg=name)


@torch.no_grad()
@pytest.mark.parametrize("num_images", [1, 2])
def test_an_exported_model_serves_any_number_of_samples_and_tokens(num_images):
    model = shallow_model(max_images=num_images).double()  # float32 rounds by as much as the tolerance
    model.model.language_model.config.use_cache = False
    samples, tokens = Dim("samples", max=16), Dim("tokens", min=2, max=100)
    shapes = {"input_ids": {0: samples, 1: tokens}, "pixel_values": {0: samples}, "image_mask": {0: samples}}
    shapes["attention_mask"] = {0: samples, 1: tokens}

    def inputs(batch_size, length):
        given = {**tiny_inputs(batch_size, length), "image_mask": torch.arange(batch_size) > 0}
        given["pixel_values"] = given["pixel_values"].double()
        if num_images == 2:
            given["pixel_values"] = torch.stack((given["pixel_values"], given["pixel_values"].flip(0)), dim=1)
            given["image_mask"] = torch.stack((torch.ones_like(given["image_mask"]), given["image_mask"]), dim=1)
        return {name: given[name] for name in shapes}

    exported = torch.export.export(model, (), inputs(2, 7), dynamic_shapes=shapes).module()
    for size in ((2, 7), (3, 5), (4, 60)):
        close(exported(**inputs(*size)).logits, model(**inputs(*size)).logits)


def save_and_load(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), save_and_load])
def test_a_copy_of_a_model_that_was_used_is_independent(clone):
    model, names = tiny_model(), ["default", "default"]
    expected = logits_of(model)
    copied = clone(model)
    assert torch.equal(logits_of(copied), expected)
    assert torch.equal(logits_of(copied, adapter_names=names), logits_of(model, adapter_names=names))
    copied.model.vision_adapters[0].up.weight.data.add_(1)
    assert not torch.equal(logits_of(copied), expected) and torch.equal(logits_of(model), expected)


def test_a_pickle_loads_in_a_new_process(tmp_path):
    model = tiny_model()
    torch.save((model, tiny_inputs(), logits_of(model)), tmp_path / "model.pt")
    code = (
        "import torch; from transformers.dynamic_module_utils import init_hf_modules; init_hf_modules()\n"
        "model, inputs, expected = torch.load('model.pt', weights_only=False)\n"
        "assert torch.equal(model(**inputs).logits, expected)"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)


@pytest.mark.parametrize("text_type", ["llama", "gemma2", "phi"])
@pytest.mark.parametrize("vision_type", VISION_BACKBONES)
def test_base_models_from_the_meta_device_start_as_those_built_at_once(text_type, vision_type):
    expected = DehvfForConditionalGeneration(tiny_config(text_type, vision_type))
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(tiny_config(text_type, vision_type))
    model.to_empty(device="cpu")
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data.fill_(77)
    model.init_weights()
    for (name, buffer), other in zip(model.named_buffers(), expected.buffers()):
        assert torch.equal(buffer, other), name
    for (name, parameter), other in zip(model.named_parameters(), expected.parameters()):
        assert not (parameter == 77).any() and parameter.requires_grad == other.requires_grad, name
        if parameter.numel() > 500:
            assert parameter.std().item() == pytest.approx(other.std().item(), rel=0.2, abs=1e-5), name


# --- modules that are replaced ---


@pytest.mark.parametrize("replace", ["set_submodule", "register_module"])
def test_a_module_that_is_replaced_is_used_and_saved(replace):
    model = tiny_model()
    for name in ("vision_adapters.0", "fuser", "projector", "memory_slots"):
        before, other = logits_of(model), copy.deepcopy(model.model.get_submodule(name))
        for parameter in other.parameters():
            torch.nn.init.normal_(parameter)
        parent, _, child = name.rpartition(".")
        if replace == "set_submodule":
            model.model.set_submodule(name, other)
        else:
            model.model.get_submodule(parent).register_module(child, other)
        found = logits_of(model)
        assert not torch.allclose(found, before), name
        close(logits_of(model, adapter_names=["default", "default"]), found)
    tensors = model.adapter_state_dict()
    assert torch.equal(tensors["model.vision_adapters.0.up.weight"], model.model.vision_adapters[0].up.weight)
    assert torch.equal(tensors["model.memory_slots.key"], other.key)


@pytest.mark.parametrize(
    "name",
    ["model", *(pytest.param(f"model.{part}", marks=pytest.mark.extended) for part in ("fuser", "language_model"))],
)
def test_a_model_with_a_compiled_part_is_saved_as_without(name, saved, tmp_path, caplog):
    model = load(saved)
    expected, part = logits_of(model), model.get_submodule(name)
    model.set_submodule(name, torch.compile(part, backend="eager"))
    close(logits_of(model), expected)
    with caplog.at_level("WARNING"):
        model.save_pretrained(tmp_path / "adapter", state_dict=model.state_dict())
    assert "changed" not in caplog.text
    close(logits_of(load(tmp_path)), expected)


@pytest.mark.parametrize("name", ["language_model", "vision_tower"])
def test_a_base_model_that_is_replaced_is_extended(name):
    model = tiny_model()
    expected, own = logits_of(model), model.model.get_submodule(name)
    other = AutoModel.from_config(own.config).eval()
    other.load_state_dict(own.state_dict())
    setattr(model.model, name, other)
    close(logits_of(model), expected)


# --- peft ---

peft_warns = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning")


@peft_warns
@pytest.mark.parametrize(
    "values",
    [
        {"target_modules": "all-linear"},
        *({"target_modules": ["q_proj"], "modules_to_save": [name]} for name in ("vision_adapters.0", "fuser", "up")),
        {"target_modules": ["q_proj"], "modules_to_save": ["projector", "memory_slots", "fuser_query"]},
    ],
    ids=str,
)
def test_peft_trains_saves_and_merges_on_top(values, tmp_path):
    model = tiny_model()
    before = logits_of(model)
    wrapped = get_peft_model(model, LoraConfig(**values))
    close(logits_of(wrapped), before)
    wrapped(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss.backward()
    for name, parameter in wrapped.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, name
            if "lora_A" not in name:  # each gets its share, so none may be a copy that nothing reads
                parameter.data.add_(0.1)
                assert not torch.allclose(logits_of(wrapped), before), name
                parameter.data.add_(-0.1)
            parameter.data.add_(0.1)
    after = logits_of(wrapped)
    with wrapped.disable_adapter():
        close(logits_of(wrapped), before)
    wrapped.save_pretrained(tmp_path)
    close(logits_of(peft.PeftModel.from_pretrained(tiny_model(), tmp_path)), after)
    merged = wrapped.merge_and_unload()
    assert type(merged) is DehvfForConditionalGeneration
    close(logits_of(merged), after)


@peft_warns
def test_an_adapter_that_is_wrapped_is_not_saved_as_what_could_not_be_loaded(tmp_path):
    model = tiny_model()
    get_peft_model(model, LoraConfig(target_modules="all-linear"))
    with pytest.raises(ValueError, match="do not match its config.*such as model.*save with `peft`"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_what_cannot_be_done_is_refused_before_anything_changes(capsys):
    model = tiny_model()
    names = [name for name, _ in model.named_modules()]
    for one in (model, model.model):
        with pytest.raises(ValueError, match=r"LoraConfig.*get_peft_model\(model, config\)"):
            one.add_adapter(LoraConfig(target_modules="all-linear"))
        with pytest.raises(ValueError, match="cannot be merged.*merge_base=True"):
            one.merge_and_unload()
    assert [name for name, _ in model.named_modules()] == names
    model.print_trainable_parameters()
    trained = sum(tensor.numel() for tensor in model.adapter_state_dict().values())
    assert capsys.readouterr().out.startswith(f"trainable params: {trained:,d} || all params: ")


# --- 4 bits ---


def test_a_model_in_4_bits_says_so_and_is_not_cast(saved):
    model = load(saved, quantization_config=NF4)
    assert (model.is_quantized, model.is_loaded_in_4bit, model.quantization_method) == (True, True, "bitsandbytes")
    assert model.hf_quantizer.quantization_config.load_in_4bit
    for cast in (model.half, lambda: model.to(torch.bfloat16)):
        with pytest.raises(ValueError, match="model"):
            cast()
    close(logits_of(copy.deepcopy(model)), logits_of(model))


@pytest.mark.parametrize("name", ["model.layers.0", "model.language_model.layers.0"])
@pytest.mark.parametrize("make", [BitsAndBytesConfig, lambda **values: BitsAndBytesConfig(**values).to_dict()])
def test_modules_that_are_not_quantized_may_be_named_as_in_the_loaded_model(saved, make, name):
    given = make(load_in_4bit=True, llm_int8_skip_modules=[name, "lm_head"])
    model = load(saved, quantization_config=given)
    is_4bit = [type(layer.mlp.up_proj).__name__ == "Linear4bit" for layer in model.model.language_model.layers]
    assert is_4bit == [False] + [True] * (len(is_4bit) - 1)
    assert name in (given if isinstance(given, dict) else vars(given))["llm_int8_skip_modules"]


@peft_warns
def test_qlora_on_top_of_a_model_in_4_bits(saved):
    model = peft.prepare_model_for_kbit_training(load(saved, quantization_config=NF4))
    assert not any(parameter.requires_grad for parameter in model.parameters()), "peft freezes the adapter as well"
    config = LoraConfig(target_modules=["q_proj", "down_proj"], modules_to_save=["fuser"], init_lora_weights=False)
    wrapped = get_peft_model(model, config).train()
    layer = wrapped.base_model.model.model.language_model.layers[0]
    assert type(layer.mlp.down_proj).__name__ == type(layer.self_attn.q_proj).__name__ == "Linear4bit"
    wrapped(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in wrapped.parameters() if parameter.requires_grad)
    expected = logits_of(wrapped.eval())
    # Merged weights are rounded to 4 bits; unrelated logits would differ by 1.4
    assert relative_error(logits_of(wrapped.merge_and_unload()), expected) < 0.4


def test_quantization_is_chosen_at_each_load_and_dequantizing_keeps_the_weights(saved, tmp_path):
    model = load(saved, quantization_config=NF4)
    expected = logits_of(model)
    model.save_pretrained(tmp_path / "adapter")
    close(logits_of(load(tmp_path)), logits_of(load(saved)))
    model.save_pretrained(tmp_path / "merged" / "adapter", merge_base=True)
    merged = load(tmp_path / "merged")
    assert merged.is_quantized and torch.equal(logits_of(merged), expected)
    full = model.dequantize()
    assert not full.is_quantized
    close(logits_of(full), expected)
    full.save_pretrained(tmp_path / "full" / "adapter", merge_base=True)
    assert torch.equal(logits_of(load(tmp_path / "full")), logits_of(full))
    assert "quantization_config" not in json.loads((tmp_path / "full/adapter/text_model/config.json").read_text())


def test_base_models_whose_quantization_cannot_be_saved_are_not_merged(saved, tmp_path, monkeypatch):
    model = load(saved, quantization_config=NF4)
    monkeypatch.setattr(type(model.hf_quantizer), "is_serializable", lambda self: False)
    with pytest.raises(
        ValueError, match="The language model is quantized with bitsandbytes and cannot be saved in this form"
    ):
        model.save_pretrained(tmp_path / "merged", merge_base=True)
    assert not (tmp_path / "merged").exists()


def test_a_plain_trainer_trains_the_adapter_on_4_bits(saved, tmp_path):
    model = load(saved, quantization_config=NF4)
    before = copy.deepcopy(model.state_dict())
    train_two_steps(model, tmp_path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]) == (name not in model.adapter_state_dict()), name


# --- loading ---


@pytest.mark.parametrize("asked", [{"text_config": "eager", "vision_config": "sdpa"}, {"vision_config": "eager"}])
@pytest.mark.parametrize("way", ["class", "AutoModel", "new", "from_config", "set_attn_implementation"])
def test_attention_is_chosen_for_each_base_model(saved, asked, way):
    if way == "class":
        model = DehvfForConditionalGeneration.from_pretrained(saved / "adapter", attn_implementation=asked)
    elif way == "AutoModel":
        model = load(saved, attn_implementation=asked)
    elif way == "new":
        places = saved / "vision", saved / "text"
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(
            *places, attn_implementation=asked, **DEHVF_SIZES
        )
    elif way == "from_config":
        config = AutoConfig.from_pretrained(saved / "adapter", trust_remote_code=True)
        model = AutoModel.from_config(config, trust_remote_code=True, attn_implementation=asked)
    else:
        model = load(saved)
        model.set_attn_implementation(asked)
    bases = {"text_config": model.model.language_model.layers[0], "vision_config": model.model.vision_tower.encoder}
    bases["vision_config"] = bases["vision_config"].layers[0]
    for name, layer in bases.items():
        assert layer.self_attn.config._attn_implementation == asked.get(name, "sdpa")


@pytest.mark.parametrize("way", ["AutoModel", "new", "from_config"])
def test_attention_for_an_unknown_base_model_is_refused(saved, way):
    asked = {"language_config": "eager"}
    with pytest.raises(ValueError, match="`attn_implementation` has the key 'language_config'.*'text_config'"):
        if way == "AutoModel":
            load(saved, attn_implementation=asked)
        elif way == "new":
            places = saved / "vision", saved / "text"
            DehvfForConditionalGeneration.from_vision_text_pretrained(*places, attn_implementation=asked)
        else:
            config = AutoConfig.from_pretrained(saved / "adapter", trust_remote_code=True)
            AutoModel.from_config(config, trust_remote_code=True, attn_implementation=asked)


def test_the_model_without_a_head_loads_and_saves_the_same_adapter(saved, tmp_path):
    whole, body = load(saved), DehvfModel.from_pretrained(saved / "adapter")
    tensors = dict((*body.named_parameters(), *body.named_buffers()))
    for name, tensor in (*whole.model.named_parameters(), *whole.model.named_buffers()):
        assert torch.equal(tensors.pop(name), tensor), name
    assert not tensors
    body.save_pretrained(tmp_path / "adapter")
    assert torch.equal(logits_of(load(tmp_path)), logits_of(whole))


def test_classes_are_the_same_from_whichever_file_they_are_loaded(saved):
    configs = {
        get_class_from_dynamic_module(f"{file}_dehvf.DehvfConfig", str(place))
        for file in ("configuration", "modeling")
        for place in (ROOT, saved / "adapter")
    }
    assert configs == {DehvfConfig}
    config = AutoConfig.from_pretrained(saved / "adapter", trust_remote_code=True)
    assert type(config) is type(load(saved).config) is DehvfConfig


# --- where things are ---


def test_offloaded_and_dispatched_models_give_the_same(tmp_path):
    inputs, model = tiny_inputs(), tiny_model()
    expected, tokens = logits_of(model), model.generate(**inputs, max_new_tokens=3)
    device_map = {f"model.{name}": "cpu" for name, _ in model.model.named_children()}
    device_map |= {"model.language_model": "disk", "lm_head": "cpu"}
    for moved in (
        dispatch_model(tiny_model(), device_map, main_device="cpu", offload_dir=tmp_path / "dispatched"),
        cpu_offload(tiny_model(), "cpu"),
        disk_offload(tiny_model(), tmp_path / "offloaded", "cpu"),
    ):
        close(logits_of(moved), expected)
        assert torch.equal(moved.generate(**inputs, max_new_tokens=3), tokens)


def test_an_adapter_that_is_offloaded_is_saved(tmp_path):
    model = tiny_model()
    expected, memory = model.adapter_state_dict(), model.get_image_features(tiny_inputs()["pixel_values"])
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    disk_offload(model, tmp_path / "offloaded", "cpu")
    model.save_pretrained(tmp_path / "saved")
    model.save_visual_memory(memory, tmp_path / "memory.safetensors")
    found = tiny_model(seed=1)
    load_checkpoint_in_model(found, tmp_path / "saved")
    for tensors in (found.adapter_state_dict(), model.adapter_state_dict()):
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], tensor) for name, tensor in expected.items())
    assert torch.equal(tiny_model().load_visual_memory(tmp_path / "memory.safetensors"), memory.pooler_output)
    with pytest.raises(ValueError, match="The active adapter is offloaded"):
        model.load_adapter(tmp_path / "saved", "other")


def test_what_layers_read_moves_between_devices():
    """As the hooks of `accelerate` and FSDP move the arguments of a layer."""
    model, inputs = tiny_model(), tiny_inputs()
    embeds = model.get_input_embeddings()(inputs["input_ids"])
    arguments = embeds, inputs["attention_mask"], inputs["pixel_values"], None, None
    for names in (None, ["default", "__base__"]):
        memories, _ = model.model.read_images(*arguments, names)
        for moved in (send_to_device(memories, "meta"), tree_map(to_meta, memories)):
            for memory, there in zip(memories, moved):
                assert type(memory) is type(there)
                (memory,), (there,) = (getattr(one, "memories", (one,)) for one in (memory, there))
                assert there.key_features.is_meta and there.value_matrix.is_meta
                assert (there.form, there.scale, there.dropout) == (memory.form, memory.scale, memory.dropout)


def to_meta(value):
    return value.to("meta") if isinstance(value, torch.Tensor) else value


def test_checkpointing_is_not_reentrant_unless_asked_for():
    model = tiny_model().train()
    model.activation_checkpointing_enable({"preserve_rng_state": True})
    model(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)


# --- what is said ---


def test_an_image_without_a_text_is_refused():
    with pytest.raises(ValueError, match="`input_ids`.*`get_image_features"):
        tiny_model()(pixel_values=tiny_inputs()["pixel_values"])


def test_a_variant_that_a_base_model_lacks_is_named(saved):
    with pytest.raises(OSError, match=r"language model .*model\.fp16\.safetensors"):
        load(saved, variant="fp16")


@pytest.mark.parametrize("key", ["vision", "text"])
@pytest.mark.parametrize("trust", [False, True])
def test_a_base_model_with_remote_code_is_refused_and_not_run(saved, tmp_path, key, trust):
    auto_map = {"AutoConfig": "configuration_other.OtherConfig", "AutoModel": "modeling_other.Other"}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "other", "auto_map": auto_map}))
    (tmp_path / "configuration_other.py").write_text("raise SystemExit('it was run')")
    places = {"vision": saved / "vision", "text": saved / "text", key: tmp_path}
    with pytest.raises(ValueError, match="is a model with remote code, which DEHVF cannot extend"):
        DehvfForConditionalGeneration.from_vision_text_pretrained(*places.values(), trust_remote_code=trust)


def test_code_beside_a_stock_base_model_is_not_run(saved, tmp_path):
    shutil.copytree(saved / "text", tmp_path / "text")
    config = json.loads((saved / "text" / "config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_other.Other"}
    (tmp_path / "text" / "config.json").write_text(json.dumps(config))
    (tmp_path / "text" / "modeling_other.py").write_text("raise SystemExit('it was run')")
    DehvfForConditionalGeneration.from_vision_text_pretrained(
        saved / "vision", tmp_path / "text", trust_remote_code=True, **DEHVF_SIZES
    )
