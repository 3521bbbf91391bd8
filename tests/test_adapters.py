"""Several adapters on the same bases: switched, mixed in a batch, saved, deleted."""

import json
import shutil

import pytest
import torch
from tiny import DehvfForConditionalGeneration, DehvfProcessor, cache_name, save_tiny_bases, tiny_inputs


# Different in size, switches and numbers, so that nothing of one can pass for the other's
CONFIGS = {
    "first": {"num_memory_slots": 20, "visual_scale": 1.0, "memory_scale": 0.5},
    "second": {"num_memory_slots": 31, "projector_hidden_size": 6, "visual_prompts": "keys", "num_groups": 3},
    "blind": {"visual_prompts": "none", "memory_scale": 0.3},
    "asking": {"fuser_query": "instruction", "layer_fusion": "adaptive", "memory_form": "materialised"},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    bases = save_tiny_bases(root)
    for seed, (name, values) in enumerate(CONFIGS.items()):
        torch.manual_seed(seed)
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **values)
        for parameter in model.adapter_state_dict().values():
            torch.nn.init.normal_(parameter, std=0.3)
        model.save_pretrained(root / name)
    return {name: root / name for name in CONFIGS}


@pytest.fixture
def model(folders):
    """`first` by the name `default`, and all others on its bases."""
    model = DehvfForConditionalGeneration.from_pretrained(folders["first"])
    for name in ("second", "blind", "asking"):
        model.load_adapter(folders[name], name)
    return model


@pytest.fixture
def messages(monkeypatch):
    """What the model warns of."""
    messages = []
    logger = DehvfForConditionalGeneration.load_adapter.__globals__["logger"]
    monkeypatch.setattr(logger, "warning", messages.append)
    return messages


def alone(folders, name):
    return DehvfForConditionalGeneration.from_pretrained(folders["first" if name == "default" else name])


@torch.no_grad()
def test_switched_adapters_give_the_logits_of_a_model_of_their_own(model, folders):
    inputs, bases = tiny_inputs(), {id(p) for p in model.parameters() if not p.requires_grad}
    for name in ("second", "blind", "asking", "default", "second"):
        model.set_adapter(name)
        assert model.active_adapters() == [name]
        assert torch.equal(model(**inputs).logits, alone(folders, name)(**inputs).logits)
        assert {id(p) for p in model.parameters() if not p.requires_grad} == bases, "the bases were loaded again"


def test_each_adapter_keeps_its_generation_config(folders, tmp_path):
    first = alone(folders, "first")
    first.generation_config.eos_token_id, first.generation_config.max_new_tokens = [2, 7], 3
    first.save_pretrained(tmp_path / "short")
    model = alone(folders, "second")
    model.load_adapter(tmp_path / "short", "short")
    before = model.generation_config.to_dict()
    model.set_adapter("short")
    assert model.generate(**tiny_inputs()).shape[1] <= tiny_inputs()["input_ids"].shape[1] + 3
    model.save_pretrained(tmp_path / "saved")
    saved = DehvfForConditionalGeneration.from_pretrained(tmp_path / "saved").generation_config
    assert (saved.eos_token_id, saved.max_new_tokens) == ([2, 7], 3)
    model.set_adapter("default")
    assert model.generation_config.to_dict() == before
    model.generation_config.max_new_tokens = 9
    model.set_adapter("default")
    assert model.generation_config.max_new_tokens == 9
    (tmp_path / "short" / "generation_config.json").unlink()
    model.load_adapter(tmp_path / "short", "plain")
    for name in ("short", "plain"):
        model.set_adapter(name)
    assert model.generation_config.eos_token_id != [2, 7], "that of the language model"
    model.set_adapter("default")
    with pytest.raises(ValueError, match="'default' is active"):
        model.delete_adapter(["short", "default"])
    model.delete_adapter("short")
    assert "short" not in model.generation_configs


NAMES = ["second", "default", "__base__", "asking", "blind", "default"]


def mixed_batch() -> dict:
    return {**tiny_inputs(len(NAMES)), "image_mask": torch.tensor([1, 1, 1, 1, 1, 0], dtype=torch.bool)}


def one_by_one(folders, inputs, compute) -> torch.Tensor:
    rows = []
    for row, name in enumerate(NAMES):
        own = {key: tensor[[row]] for key, tensor in inputs.items()}
        if name == "__base__":
            with (own_model := alone(folders, "first")).disable_adapter():
                rows.append(compute(own_model, own))
        else:
            rows.append(compute(alone(folders, name), own))
    return torch.cat(rows)


@torch.no_grad()
def test_each_sample_of_a_batch_may_have_adapters_of_its_own(model, folders):
    inputs = mixed_batch()
    expected = one_by_one(folders, inputs, lambda own_model, own: own_model(**own).logits)
    torch.testing.assert_close(model(**inputs, adapter_names=NAMES).logits, expected, atol=1e-5, rtol=1e-5)
    assert model.active_adapters() == ["default"]


@torch.no_grad()
def test_with_labels_an_answer_is_no_part_of_the_question_that_named_adapters_read(model, folders):
    inputs = {**tiny_inputs(2), "labels": tiny_inputs(2)["input_ids"].clone()}
    inputs["labels"][:, :4] = -100
    logits = model(**inputs, adapter_names=["asking", "asking"]).logits
    torch.testing.assert_close(logits, alone(folders, "asking")(**inputs).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("mode", [{}, {"num_beams": 3, "num_return_sequences": 2}])
def test_generation_keeps_each_samples_adapters(model, folders, mode):
    inputs, mode = mixed_batch(), {**mode, "max_new_tokens": 6, "min_new_tokens": 6}
    expected = one_by_one(folders, inputs, lambda own_model, own: own_model.generate(**own, **mode))
    assert torch.equal(model.generate(**inputs, adapter_names=NAMES, **mode), expected)


def test_the_active_adapters_are_trained_and_saved(model, folders, tmp_path):
    model.set_adapter("second")
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == alone(folders, "second").adapter_state_dict().keys() == model.adapter_state_dict().keys()
    model.train()(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters() if parameter.requires_grad)
    model.eval().save_pretrained(tmp_path)
    found, expected = (DehvfForConditionalGeneration.from_pretrained(path) for path in (tmp_path, folders["second"]))
    assert found.config.visual_prompts == "keys"
    assert all(torch.equal(found.adapter_state_dict()[name], p) for name, p in expected.adapter_state_dict().items())


def test_switched_adapters_have_the_dtype_of_those_before(model):
    model.to(torch.bfloat16)
    model.set_adapter("second")
    assert {tensor.dtype for tensor in model.adapter_state_dict().values()} == {torch.bfloat16}


def test_adapters_stay_off_until_the_outer_context_ends(model):
    inputs = tiny_inputs()
    with model.disable_adapter():
        expected = model(**inputs).logits
        with model.disable_adapter():
            pass
        assert torch.equal(model(**inputs).logits, expected)
    assert not torch.equal(model(**inputs).logits, expected)


def test_adapters_for_a_base_with_another_id_warn_and_are_saved_with_the_loaded_base(
    model, folders, tmp_path, messages
):
    shutil.copytree(folders["second"], tmp_path / "second")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    (tmp_path / "second" / "config.json").write_text(json.dumps({**config, "text_model_id": "org/other"}))
    model.load_adapter(tmp_path / "second", "other")
    assert "the text model org/other (commit None), but this model has" in messages[0] and len(messages) == 1
    model.set_adapter("other")
    model.save_pretrained(tmp_path / "saved")
    assert json.loads((tmp_path / "saved" / "config.json").read_text())["text_model_id"] == config["text_model_id"]


def test_adapters_for_another_commit_of_a_base_warn(model, folders, tmp_path, messages):
    shutil.copytree(folders["second"], tmp_path / "second")
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    (tmp_path / "second" / "config.json").write_text(json.dumps({**config, "text_model_revision": "b" * 40}))
    model.load_adapter(tmp_path / "second", "no commit is known here")
    assert not messages
    model.config.text_model_revision = "a" * 40
    model.load_adapter(tmp_path / "second", "other")
    assert f"(commit {'b' * 40}), but this model has" in messages[0] and len(messages) == 1


def test_deleted_adapters_are_gone_and_their_name_is_free(model, folders):
    model.delete_adapter("second")
    with pytest.raises(ValueError, match="'second'.*default, blind, asking"):
        model.set_adapter("second")
    model.load_adapter(folders["blind"], "second")
    with pytest.raises(ValueError, match="active"):
        model.delete_adapter("default")
    with pytest.raises(ValueError, match="'third'"):
        model.delete_adapter(["second", "third"])
    model.delete_adapter(["second", "asking"])
    assert "second" not in model.base_model.adapters


def test_adapters_that_cannot_be_loaded_are_refused_and_nothing_changes(model, folders, tmp_path):
    for name in ("default", "blind", "__base__"):
        with pytest.raises(ValueError, match="taken"):
            model.load_adapter(folders["second"], name)
    for name in (None, "", ["second"]):
        with pytest.raises(ValueError, match="`adapter_name` is .*Give a name, a string"):
            model.load_adapter(folders["second"], name)
    with pytest.raises(OSError):
        model.load_adapter(tmp_path, "nothing")
    bases = save_tiny_bases(tmp_path, vocab_size=70)
    DehvfForConditionalGeneration.from_vision_text_pretrained(*bases).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="vocab_size=70"):
        model.load_adapter(tmp_path / "other", "other")
    assert model.model.adapter_names == ["default", "second", "blind", "asking"]


def test_an_adapter_may_be_switched_between_forward_and_backward(model):
    model.set_adapter("second")
    model.model.config.vision_adapter_dropout = 0.5
    model.train().activation_checkpointing_enable()
    loss = model(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss
    model.set_adapter("default")
    loss.backward()  # recomputes the layers with `second`, in training mode
    assert all(module.training for adapter in model.model.adapters.values() for module in adapter.modules().values())
    model.eval()
    assert not any(m.training for adapter in model.model.adapters.values() for m in adapter.modules().values())


def test_an_adapter_that_was_switched_in_the_inner_model_is_not_saved_with_the_config_of_another(model, tmp_path):
    model.base_model.set_adapter("second")
    with pytest.raises(ValueError, match=r"base_model.set_adapter.*Call `model.set_adapter\('second'\)`"):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_call_that_continues_from_a_cache_needs_the_instruction_of_the_adapters_that_are_named(model):
    inputs = tiny_inputs(2)
    for active, named in (("asking", "second"), ("second", "asking")):
        model.set_adapter(active)
        first = {**inputs, "input_ids": inputs["input_ids"][:, :5], "attention_mask": inputs["attention_mask"][:, :5]}
        cache = model(**first, adapter_names=[named] * 2, use_cache=True).past_key_values
        rest = {**inputs, "input_ids": inputs["input_ids"][:, 5:], cache_name(model): cache}
        if named == "second":
            expected = model(**inputs, adapter_names=[named] * 2).logits[:, 5:]
            torch.testing.assert_close(model(**rest, adapter_names=[named] * 2).logits, expected, atol=1e-4, rtol=1e-4)
        else:
            with pytest.raises(ValueError, match="reads the user's text, but a call with a filled cache"):
                model(**rest, adapter_names=[named] * 2)


def test_wrong_names_in_a_batch_are_refused_and_the_active_adapters_stay(model):
    inputs = tiny_inputs(2)
    with pytest.raises(ValueError, match="3 names for 2 texts"):
        model(**inputs, adapter_names=["default"] * 3)
    with pytest.raises(ValueError, match="'third'"):
        model(**inputs, adapter_names=["second", "third"])
    memory = model.get_image_features(inputs.pop("pixel_values"))
    with pytest.raises(ValueError, match="Give one of them"):
        model(**inputs, visual_memory=memory, adapter_names=["second", "default"])
    with pytest.raises(ValueError, match="inference"):
        model.train()(**inputs, adapter_names=["second", "default"])
    assert model.active_adapters() == ["default"]


@pytest.mark.parametrize(
    "call, error, message",
    [
        (lambda model: model.set_adapter(["second", "blind"]), ValueError, "One adapter is active at a time. Got"),
        (lambda model: model.load_adapter("folder", "third", revison="x"), TypeError, "no argument `revison`"),
        (lambda model: model.disable_adapters(), ValueError, "in a block, `with model.disable_adapter"),
        (lambda model: model.enable_adapters(), ValueError, "always enabled, except in a block"),
        (lambda model: model.get_adapter_state_dict(), ValueError, "`model.adapter_state_dict.*active adapter"),
    ],
)
def test_methods_of_transformers_that_do_not_apply_name_ours(model, call, error, message):
    with pytest.raises(error, match=message):
        call(model)
    model.set_adapter(["second"])
    assert model.active_adapters() == ["second"]


def test_an_adapter_is_saved_with_its_own_processor(folders, tmp_path):
    processor = DehvfProcessor.from_pretrained(folders["second"], image_fit="pad")
    shutil.copytree(folders["second"], tmp_path / "padded")
    processor.save_pretrained(tmp_path / "padded")
    model = DehvfForConditionalGeneration.from_pretrained(folders["first"])
    model.load_adapter(tmp_path / "padded", "padded")
    for name, image_fit in (("padded", "pad"), ("default", None)):
        model.set_adapter(name)
        model.save_pretrained(tmp_path / name / "again")
        assert DehvfProcessor.from_pretrained(tmp_path / name / "again").image_fit == image_fit
