"""
Every causal language model of transformers, and its vision encoders: those that work equal a reference, the others are
refused by name.
"""

import re

import pytest
import torch
from every_base import (
    REASONS,
    TEXT_TYPES,
    VISION_TYPES,
    find,
    split_page,
    tables,
    text_config,
    vision_config,
    working_types,
)
from tiny import DEHVF_SIZES, relative_error, tiny_inputs, tiny_text_config, tiny_vision_config
from torch import nn
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from dehvf import DehvfConfig, DehvfForConditionalGeneration


WORKING_TEXT, WORKING_VISION = working_types("text"), working_types("vision")
# Tokens before the patches, as the papers of these encoders have them
PREFIX_TOKENS = {
    **{"clip_vision_model": 1, "siglip_vision_model": 0, "ijepa": 0, "vit": 1, "beit": 1, "deit": 2, "dinov2": 1},
    **{"dinov2_with_registers": 5, "dinov3_vit": 5},
}


@pytest.fixture(scope="module")
def vision_folder(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("vision")
    AutoModel.from_config(tiny_vision_config("clip_vision_model", num_hidden_layers=2)).save_pretrained(folder)
    return folder


def fill(model):
    """Random numbers for all that is trained, since parts that start at zero would hide a wrong term."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.2)
    return model


def model_on(text_type: str, vision_type: str) -> DehvfForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {**DEHVF_SIZES, "num_memory_slots": 40}
    config = DehvfConfig(vision_config=vision_config(vision_type), text_config=text_config(text_type), **sizes)
    return fill(DehvfForConditionalGeneration(config).eval())


def test_enough_types_work():
    assert len(WORKING_TEXT) >= 40
    assert len(WORKING_VISION) >= 8
    assert PREFIX_TOKENS.keys() <= set(WORKING_VISION)


def test_the_page_lists_what_the_rule_says():
    assert split_page()[1] == tables().strip(), "docs/bases.md is not up to date: python tests/every_base.py"


@pytest.mark.parametrize(
    ("kind", "model_type"),
    [
        *(("text", name) for name in TEXT_TYPES if name not in WORKING_TEXT),
        *(("vision", name) for name in VISION_TYPES if name not in WORKING_VISION),
    ],
)
def test_a_type_that_does_not_work_is_refused_by_name(kind, model_type):
    message = str(find(kind, model_type))
    assert f"`{model_type}` (`{kind}_config`)" in message and f"Give another `{kind}_model`" in message
    assert any(reason in message for reason in REASONS), message


@torch.no_grad()
@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "linear", "factor": 2.0},
        {"rope_type": "dynamic", "factor": 2.0},
        {"rope_type": "yarn", "factor": 2.0},
        {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        {"rope_type": "longrope", "factor": 2.0, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4},
    ],
    ids=lambda rope: rope["rope_type"],
)
def test_rotary_embeddings_may_be_scaled_in_any_way(rope):
    rope |= {"rope_theta": 10000.0, "original_max_position_embeddings": 64}
    config = tiny_text_config(rope_parameters=rope)
    model = DehvfForConditionalGeneration(
        DehvfConfig(text_config=config, vision_config=tiny_vision_config("clip_vision_model"), **DEHVF_SIZES)
    ).eval()
    assert model.config.text_config.rope_parameters["rope_type"] == rope["rope_type"]
    inputs = tiny_inputs(length=70)
    with model.disable_adapter():
        found = model(**inputs).logits
    base = model.model.language_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
    assert torch.equal(found, model.lm_head(base.last_hidden_state))


@torch.no_grad()
@pytest.mark.parametrize("model_type", WORKING_TEXT)
def test_a_language_model_is_extended(model_type, vision_folder, tmp_path):
    torch.manual_seed(0)
    config = text_config(model_type)
    config.initializer_range = 0.2  # so that logits differ enough to be compared
    for name in vars(config):  # not the default values, which may have no effect; MPT ignores its own
        if re.match(r"logits?_(scal|soft_cap)|final_logit_|lm_head_multiplier", name):
            setattr(config, name, 3.0)
    base = AutoModelForCausalLM.from_config(config).eval()
    base.save_pretrained(tmp_path / "text")
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(
        vision_folder, tmp_path / "text", **DEHVF_SIZES, memory_form="factored"
    )
    inputs = tiny_inputs()
    outputs = fill(model)(**inputs)

    without = base(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, without)
    assert relative_error(outputs.logits, without) > 0.1

    expected = logits_of_wider_ffns(model, inputs, outputs.visual_memory)
    assert relative_error(outputs.logits, expected) <= 1e-5

    options = {"max_new_tokens": 4, "min_new_tokens": 4, "return_dict_in_generate": True, "output_logits": True}
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    for cache in ("dynamic", "static"):
        expected = base.generate(**text, **options, cache_implementation=cache)
        with model.disable_adapter():
            found = model.generate(**inputs, **options, cache_implementation=cache)
        assert torch.equal(torch.stack(found.logits), torch.stack(expected.logits))
    cached, uncached = (model.generate(**inputs, **options, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(cached.sequences, uncached.sequences)
    assert relative_error(torch.stack(cached.logits), torch.stack(uncached.logits)) <= 1e-5

    model.save_pretrained(tmp_path / "adapters")
    again = DehvfForConditionalGeneration.from_pretrained(tmp_path / "adapters")
    assert torch.equal(again(**inputs).logits, outputs.logits)


def logits_of_wider_ffns(model, inputs, visual_memory) -> torch.Tensor:
    """
    The logits of the stock language model, the last matrix of each FFN of which has the values beside its columns and
    reads `phi(x K^T)` beside its hidden units: slots are hidden units with a gate of one.
    """
    dehvf, hooks = model.model, []
    slots = dehvf.memory_slots.key, dehvf.memory_slots.value
    visual = model.config.visual_scale * visual_memory @ dehvf.projector.up().T  # B D P n h
    visual = F.pad(visual, (0, 0, 0, len(slots[0]) - visual.shape[3]))
    for index, ffn in enumerate(dehvf.text_layout.ffns(dehvf.language_model)):
        keys, values = (slots[position] + visual[:, index, position] for position in (0, 1))  # B S h
        last = [part for part in ffn.modules() if getattr(part, "weight", torch.empty(0)).dim() == 2][-1]
        state = {}

        def read(ffn, args, state=state):
            state["x"] = args[0]

        def widen(last, args, output, ffn=ffn, state=state, keys=keys, values=values):
            matrix = last.weight.T if isinstance(last, nn.Linear) else last.weight  # f h; GPT-2 has it transposed
            matrix = torch.cat((matrix.expand(len(values), -1, -1), model.config.memory_scale * values), dim=1)
            units = torch.cat((args[0], getattr(ffn, ffn.activation_name)(state["x"] @ keys.mT)), dim=-1)
            return units @ matrix + (0 if last.bias is None else last.bias)

        hooks += [ffn.register_forward_pre_hook(read), last.register_forward_hook(widen)]
    with model.disable_adapter():
        logits = model(**inputs).logits
    for hook in hooks:
        hook.remove()
    return logits


@torch.no_grad()
@pytest.mark.parametrize("model_type", WORKING_VISION)
def test_a_vision_encoder_is_extended(model_type):
    model = model_on("llama", model_type)
    tower, layout, adapter = model.model.vision_tower, model.model.active.vision_layout, model.model.active
    pixel_values = tiny_inputs()["pixel_values"]
    layers = tower.get_submodule(layout.layers)

    alone = AutoModel.from_config(model.config.vision_config).eval()
    alone.load_state_dict(tower.state_dict())
    assert torch.equal(tower(pixel_values).last_hidden_state, alone(pixel_values).last_hidden_state)

    states = states_with_adapters(
        alone.get_submodule(layout.layers), layout, adapter.vision_adapters, alone, pixel_values
    )
    norm = nn.Identity() if layout.norm is None else alone.get_submodule(layout.norm)
    features = [norm(state) for state in states]
    class_features, patches, _ = adapter.hierarchical_features(tower, pixel_values)
    prefix = layout.num_prefix_tokens
    assert prefix == PREFIX_TOKENS.get(model_type, prefix)
    for index, feature in enumerate(features):
        expected = feature[:, 0] if prefix else feature.mean(dim=1)
        torch.testing.assert_close(class_features[:, index], expected, atol=1e-5, rtol=1e-5)
        expected = adapter.projector.down(feature[:, prefix:])
        torch.testing.assert_close(patches[:, index], expected, atol=1e-5, rtol=1e-5)
    assert len(features) == len(layers) == patches.shape[1]

    assert_tokens_are_patches(tower, layers, prefix, pixel_values)


@torch.no_grad()
@pytest.mark.parametrize("vision_type", WORKING_VISION)
def test_a_frozen_encoder_adds_no_noise_in_training(vision_type):
    config = vision_config(vision_type)
    for name in vars(config):
        if "dropout" in name or name.startswith("pos_embed_"):
            setattr(config, name, 0.5)
    config = DehvfConfig(vision_config=config, text_config=text_config("llama"), num_memory_slots=40)
    tower, pixel_values = AutoModel.from_config(config.vision_config).train(), tiny_inputs()["pixel_values"]
    assert torch.equal(*(tower(pixel_values).last_hidden_state for _ in range(2)))


def states_with_adapters(layers, layout, adapters, tower, pixel_values) -> list[torch.Tensor]:
    """What each layer of a stock encoder gives where hooks add the adapters to its FFNs."""
    states, hooks = [], []
    first, last = (layout.ffn, layout.ffn) if isinstance(layout.ffn, str) else layout.ffn
    for layer, adapter in zip(layers, adapters):
        given = []
        hooks += [
            layer.get_submodule(first).register_forward_pre_hook(lambda _, args, given=given: given.append(args[0])),
            layer.get_submodule(last).register_forward_hook(
                lambda _, args, output, given=given, adapter=adapter: output + adapter(given.pop())
            ),
            layer.register_forward_hook(
                lambda _, args, output: states.append(output[0] if isinstance(output, tuple) else output)
            ),
        ]
    tower(pixel_values)
    for hook in hooks:
        hook.remove()
    return states


def assert_tokens_are_patches(tower, layers, prefix: int, pixel_values):
    """The first layer's token `prefix + i` depends on the pixels of patch i, and no other token does."""
    embedded = []
    hook = layers[0].register_forward_pre_hook(
        lambda _, args, kwargs: embedded.append((*args, *kwargs.values())[0]), with_kwargs=True
    )
    for patch in (None, 0, 6, 15):
        changed = pixel_values.clone()
        if patch is not None:
            row, column = 4 * (patch // 4), 4 * (patch % 4)
            changed[:, :, row : row + 4, column : column + 4] += 1
        tower(changed)
    hook.remove()
    for patch, tokens in zip((0, 6, 15), embedded[1:]):
        differing = (tokens - embedded[0]).abs().amax(dim=(0, 2)).nonzero().flatten().tolist()
        assert differing == [prefix + patch]


@torch.no_grad()
@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize(
    ("text_type", "vision_type"),
    [
        ("gpt2", "data2vec-vision"),
        pytest.param("mpt", "dinov3_vit", marks=pytest.mark.extended),
        pytest.param("granite", "vit", marks=pytest.mark.extended),
    ],
)
def test_layers_of_other_layouts_are_traced_in_one_graph(text_type, vision_type):
    model, inputs = model_on(text_type, vision_type), tiny_inputs()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs).logits, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("text_type", ["gpt2", "gpt_bigcode", "gptj"])
def test_attentions_are_those_of_the_language_model(text_type):
    model, inputs = model_on(text_type, "vit"), tiny_inputs()
    model.set_attn_implementation("eager")
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    expected = model.model.language_model(**text, output_attentions=True).attentions
    with model.disable_adapter():
        found = model(**inputs, output_attentions=True).attentions
    assert len(found) == 4 and all(torch.equal(*pair) for pair in zip(found, expected))
    assert len(model(**inputs, output_attentions=True).attentions) == 4


@torch.no_grad()
@pytest.mark.parametrize("text_type", ["gpt2", "gpt_neo", "ctrl", "llama"])
def test_padding_does_not_change_the_logits(text_type):
    model, inputs = model_on(text_type, "vit"), tiny_inputs(1)
    ids, labels = inputs["input_ids"], inputs["input_ids"].clone()
    labels[:, 0] = -100  # which padding would predict
    expected = model(**inputs, labels=labels)
    mask = torch.ones_like(ids)
    for padding in ((3, 0), (0, 3)):
        padded = {"input_ids": F.pad(ids, padding), "attention_mask": F.pad(mask, padding)}
        outputs = model(**{**inputs, **padded}, labels=F.pad(labels, padding, value=-100))
        torch.testing.assert_close(outputs.logits[padded["attention_mask"] == 1], expected.logits[0])
        torch.testing.assert_close(outputs.loss, expected.loss)
        if padding[0]:  # and if it continues from a cache, as in a loop written by hand
            first = model(**{**inputs, **{name: tensor[:, :-1] for name, tensor in padded.items()}}, use_cache=True)
            cache = "cache" if "cache" in first else "past_key_values"  # depending on the release
            last = {**inputs, **padded, "input_ids": ids[:, -1:], cache: first[cache]}
            torch.testing.assert_close(model(**last).logits[0, -1], expected.logits[0, -1])


@pytest.mark.parametrize("vision_type", ["dpt", "dinov2_with_registers", "data2vec-vision"])
def test_checkpointing_gives_the_same_gradients_on_other_layouts(vision_type):
    gradients = []
    for checkpoints in (False, True):
        model, inputs = model_on("gpt2", vision_type).train(), tiny_inputs()
        if checkpoints:
            model.activation_checkpointing_enable()
        torch.manual_seed(0)
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
        gradients.append({name: part.grad for name, part in model.named_parameters() if part.requires_grad})
    assert all(gradient.any() for gradient in gradients[0].values())
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, atol=1e-6, rtol=1e-5, msg=name)


@pytest.mark.parametrize("vision_type", ["aimv2_vision_model"])
def test_an_encoder_that_does_not_interpolate_takes_its_own_image_size_alone(vision_type):
    values = {"text_config": text_config("llama"), **DEHVF_SIZES, "num_memory_slots": 40}
    config = DehvfConfig(vision_config=vision_config(vision_type), image_size=24, **values)
    with pytest.raises(ValueError, match=f"`{vision_type}` .`vision_config`.*does not run on images of 24 pixels"):
        DehvfForConditionalGeneration(config)


@torch.no_grad()
@pytest.mark.parametrize("vision_type", WORKING_VISION)
def test_encoders_in_bfloat16_take_the_pixels_of_a_processor(vision_type):
    model, pixel_values = model_on("llama", vision_type).model, tiny_inputs()["pixel_values"]
    expected = model.get_image_features(pixel_values).pooler_output, model.get_fusion_weights(pixel_values)
    model.vision_tower.bfloat16()
    found = model.get_image_features(pixel_values).pooler_output, model.get_fusion_weights(pixel_values)
    assert all(relative_error(*pair) < 0.05 for pair in zip(found, expected))


@torch.no_grad()
@pytest.mark.parametrize(
    "vision_type", ["beit", "data2vec-vision", "dinov2_with_registers", "dinov3_vit", "ijepa", "vit"]
)
def test_encoders_take_images_of_another_size(vision_type):
    values = {"text_config": text_config("llama"), **DEHVF_SIZES, "num_memory_slots": 40}
    config = DehvfConfig(vision_config=vision_config(vision_type), image_size=24, **values)
    memory = DehvfForConditionalGeneration(config).get_image_features(tiny_inputs(image_size=24)["pixel_values"])
    assert memory.pooler_output.shape[3] == 36


@pytest.mark.parametrize("model_type", ["bloom", "mpt"])
def test_adapters_for_each_sample_work_under_autocast(model_type):
    """The FFNs of these models add the residual, so their output is float32."""
    model = model_on(model_type, "clip_vision_model")
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model(**tiny_inputs(2), adapter_names=["default", "__base__"])
