"""`generate` in all its modes: a batch is as good as one at a time, and an image is encoded once."""

import re

import pytest
import torch
from every_base import text_config
from tiny import DEHVF_SIZES, TEXT_BACKBONES, tiny_config, tiny_inputs, tiny_model
from transformers import AutoModelForCausalLM, CompileConfig, set_seed

from dehvf import DehvfConfig, DehvfForConditionalGeneration


MODES = {
    "greedy": {},
    "sampling": {"do_sample": True, "top_k": 10},
    "beams": {"num_beams": 3},
    "several beams returned": {"num_beams": 3, "num_return_sequences": 3},
    "several samples returned": {"do_sample": True, "num_return_sequences": 2},
    "beam sampling": {"do_sample": True, "num_beams": 3},
}
modes = pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
backbones = pytest.mark.parametrize("model_type", TEXT_BACKBONES)


def generate(model, inputs, **kwargs):
    set_seed(0)
    return model.generate(**inputs, max_new_tokens=8, min_new_tokens=8, **kwargs)


def mixed_batch() -> tuple[dict, list[dict]]:
    """Three samples of different length, the second without an image: as a left-padded batch, and one by one."""
    whole, lengths = tiny_inputs(3, length=9), [9, 5, 7]
    singles = []
    for sample, length in enumerate(lengths):
        whole["attention_mask"][sample, : 9 - length] = 0
        whole["input_ids"][sample, : 9 - length] = 0
        single = {name: tensor[sample : sample + 1] for name, tensor in whole.items()}
        single.update({name: single[name][:, 9 - length :] for name in ("input_ids", "attention_mask")})
        singles.append(single)
    whole["image_mask"] = torch.tensor([True, False, True])
    del singles[1]["pixel_values"]
    return whole, singles


@backbones
@pytest.mark.parametrize("mode", [MODES["greedy"], MODES["beams"]], ids=["greedy", "beams"])
def test_a_batch_equals_one_at_a_time(model_type, mode):
    model = tiny_model(model_type)
    batch, singles = mixed_batch()
    together = generate(model, batch, **mode)[:, 9:]
    apart = [generate(model, single, **mode)[0, single["input_ids"].shape[1] :] for single in singles]
    assert torch.equal(together, torch.stack(apart))


@backbones
@modes
def test_cached_decoding_equals_uncached(model_type, mode):
    model = tiny_model(model_type)
    batch, _ = mixed_batch()
    cached = generate(model, batch, **mode)
    assert len(cached) == 3 * mode.get("num_return_sequences", 1)
    assert torch.equal(cached, generate(model, batch, use_cache=False, **mode))


@modes
def test_each_beam_sees_its_own_image(mode):
    model = tiny_model(seed=3)
    inputs = tiny_inputs(2)
    inputs["input_ids"][1] = inputs["input_ids"][0]  # same question, different images
    before = generate(model, inputs, **mode)
    half = len(before) // 2
    if not mode.get("do_sample"):
        assert not torch.equal(before[:half], before[half:])
    inputs["pixel_values"][1] = -3 * inputs["pixel_values"][1]
    after = generate(model, inputs, **mode)
    assert torch.equal(before[:half], after[:half]) or mode.get("do_sample")
    assert not torch.equal(before[half:], after[half:])


@modes
def test_the_encoder_runs_once_per_image(mode):
    model = tiny_model()
    rows = []
    model.model.vision_tower.register_forward_pre_hook(lambda tower, args: rows.append(len(args[0])))
    batch, _ = mixed_batch()
    generate(model, batch, **mode)
    assert rows == [2], "one run, over the two images of three samples"


@modes
def test_memory_replaces_pixels(mode):
    model = tiny_model()
    inputs = tiny_inputs(2)
    expected = generate(model, inputs, **mode)
    memory = model.get_image_features(inputs.pop("pixel_values")).pooler_output
    assert torch.equal(generate(model, inputs, visual_memory=memory, **mode), expected)


def test_one_image_answers_a_batch_of_questions():
    model = tiny_model()
    inputs = tiny_inputs(3)
    memory = model.get_image_features(inputs.pop("pixel_values")[:1]).pooler_output
    expected = generate(model, inputs, visual_memory=memory[[0, 0, 0]], num_beams=2)
    assert torch.equal(generate(model, inputs, visual_memory=memory, num_beams=2), expected)


def test_saved_memory_answers_in_another_model_with_the_same_adapters(tmp_path):
    inputs = tiny_inputs(2)
    expected = generate(tiny_model(), inputs)
    first, second = tiny_model(), tiny_model()
    memory = first.get_image_features(inputs.pop("pixel_values")).pooler_output
    first.save_visual_memory(memory, tmp_path / "memory.safetensors")
    loaded = second.load_visual_memory(tmp_path / "memory.safetensors")
    assert torch.equal(loaded, memory)
    assert torch.equal(generate(second, inputs, visual_memory=loaded), expected)


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda: tiny_model(seed=1), "adapters is .*the vision encoder has other weights"),
        (lambda: one_step_later(tiny_model()), r"adapters is [0-9a-f]{64} in torch.float32, here [^;]*\. Encode"),
        (lambda: with_another_encoder(tiny_model()), "^the vision encoder has other weights. Encode"),
        (lambda: tiny_model(image_size=20, num_memory_slots=30), "image size is 16 with patches of 4, here 20"),
        (lambda: tiny_model(layer_mapping="random"), "^layer_mapping is hierarchical, here random. Encode"),
        (lambda: tiny_model(fuser_num_heads=2), "^fuser_num_heads is 4, here 2. Encode"),
        (lambda: tiny_model(fuser_hidden_act="relu"), "^fuser_hidden_act is gelu, here relu. Encode"),
        (lambda: tiny_model(vision_adapter_scale=1.0), "^vision_adapter_scale is 0.1, here 1.0. Encode"),
        (lambda: tiny_model().to(torch.bfloat16), "adapters is .* in torch.float32, here .* in torch.bfloat16"),
    ],
    ids=[
        "another model",
        "other adapters",
        "another encoder",
        "another image size",
        "other layers",
        "other heads",
        "another activation",
        "another scale",
        "other precision",
    ],
)
def test_memory_of_another_model_is_refused(change, reason, tmp_path):
    model = tiny_model()
    memory = model.get_image_features(tiny_inputs()["pixel_values"]).pooler_output
    model.save_visual_memory(memory, tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="was not encoded by this model: ") as error:
        change().load_visual_memory(tmp_path / "memory.safetensors")
    assert re.search(reason, str(error.value).split("by this model: ")[1]), error.value


def one_step_later(model):
    with torch.no_grad():
        model.model.memory_slots.key.add_(1e-3)
    return model


def with_another_encoder(model):
    """As after LoRA was merged into it: norms and biases are the same."""
    with torch.no_grad():
        for name, parameter in model.model.vision_tower.named_parameters():
            if "proj.weight" in name:
                parameter.mul_(1.02)
    return model


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_saved_memory_is_taken_where_the_bases_have_another_precision(dtype, tmp_path):
    first, second = tiny_model(), tiny_model()
    for model in (first, second):
        torch.manual_seed(0)
        for parameter in model.model.vision_tower.parameters():
            torch.nn.init.normal_(parameter)
    memory = first.get_image_features(tiny_inputs()["pixel_values"]).pooler_output
    first.save_visual_memory(memory, tmp_path / "memory.safetensors")
    for base in (second.model.vision_tower, second.model.language_model, second.lm_head):
        base.to(dtype)
    assert torch.equal(second.load_visual_memory(tmp_path / "memory.safetensors"), memory)


def test_only_visual_memory_is_saved_as_such(tmp_path):
    with pytest.raises(ValueError, match="`visual_memory` has the shape"):
        tiny_model().save_visual_memory(torch.zeros(1, 2, 3), tmp_path / "memory.safetensors")
    with pytest.raises(ValueError, match="has the dtype torch.float64. Convert it to one of"):
        model = tiny_model().double()
        memory = model.get_image_features(tiny_inputs()["pixel_values"].double())
        model.save_visual_memory(memory, tmp_path / "memory.safetensors")
    model = tiny_model(visual_prompts="none")
    memory = model.get_image_features(tiny_inputs()["pixel_values"])
    for use in (
        lambda: model.save_visual_memory(memory, tmp_path / "memory.safetensors"),
        lambda: model.join_visual_memories([[memory]]),
    ):
        with pytest.raises(ValueError, match='no visual memory with `visual_prompts="none"`'):
            use()


def test_a_question_that_the_fuser_reads_is_the_same_in_a_batch_and_alone():
    """Padding is no part of it."""
    model = tiny_model(fuser_query="layer+instruction")
    whole, singles = mixed_batch()
    expected = torch.cat([generate(model, single)[:, -8:] for single in singles])
    assert torch.equal(generate(model, whole)[:, -8:], expected)


def test_text_without_an_image_generates():
    model = tiny_model()
    inputs = tiny_inputs(2)
    del inputs["pixel_values"]
    assert generate(model, inputs).shape == (2, 15)


def test_static_cache_and_chunked_prefill_give_the_same_tokens():
    model = tiny_model()
    batch, _ = mixed_batch()
    expected = generate(model, batch)
    assert torch.equal(generate(model, batch, cache_implementation="static", disable_compile=True), expected)
    assert torch.equal(generate(model, batch, prefill_chunk_size=4), expected)


@pytest.mark.usefixtures("nothing_compiled")
@pytest.mark.parametrize("model_type", ["llama", "phi"])
def test_decoding_is_compiled_once_and_in_one_graph(model_type):
    graphs = []

    def compiler(graph, inputs, **options):
        graphs.append(graph)
        return graph.forward

    model = tiny_model(model_type)
    compiled = {"cache_implementation": "static", "compile_config": CompileConfig(backend=compiler, fullgraph=True)}
    compiled["compile_config"]._compile_all_devices = True  # by itself `generate` compiles on a GPU alone
    for seed in range(2):
        inputs = tiny_inputs(2, length=9, seed=seed)
        assert torch.equal(generate(model, inputs, **compiled), generate(model, inputs))
        assert len(graphs) == 1


@pytest.mark.parametrize("assistant", ["a language model", "another model that sees"])
def test_assisted_decoding_gives_the_same_tokens(assistant):
    """The assistant drafts from the text alone."""
    model, inputs = tiny_model(), tiny_inputs(1)
    expected = generate(model, inputs)
    sees = assistant == "another model that sees"
    other = tiny_model(seed=1) if sees else AutoModelForCausalLM.from_config(model.config.text_config).eval()
    assert torch.equal(generate(model, inputs, assistant_model=other), expected)


@pytest.mark.parametrize("text_type", ["bamba", "falcon_h1", "olmo_hybrid", "qwen3_5_text", "recurrent_gemma"])
def test_assisted_decoding_is_refused_if_the_state_cannot_be_rolled_back(text_type):
    config = DehvfConfig(text_config=text_config(text_type), vision_config=tiny_config().vision_config, **DEHVF_SIZES)
    with pytest.raises(ValueError, match="assisted generation is not supported with stateful models"):
        DehvfForConditionalGeneration(config).generate(**tiny_inputs(1), prompt_lookup_num_tokens=2)


def test_a_cache_is_dropped_where_the_rotary_embeddings_change():
    """As `Phi3ForCausalLM` does it, where a text becomes longer than the original context."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [3.0] * 4, "rope_theta": 10000.0}
    text = text_config("phi3")
    text.original_max_position_embeddings = 10
    text.rope_parameters = {**rope, "factor": 8.0, "original_max_position_embeddings": 10}
    torch.manual_seed(0)
    causal_lm = AutoModelForCausalLM.from_config(text).eval()
    config = DehvfConfig(text_config=text, vision_config=tiny_config().vision_config, **DEHVF_SIZES)
    model = DehvfForConditionalGeneration(config, causal_lm=causal_lm).eval()
    inputs, options = tiny_inputs(), {"return_dict_in_generate": True, "output_logits": True}
    cached, uncached = (generate(model, inputs, **options, use_cache=use_cache).logits for use_cache in (True, False))
    torch.testing.assert_close(cached, uncached)
    with model.disable_adapter():
        found = generate(model, inputs, **options).logits
    del inputs["pixel_values"]
    torch.testing.assert_close(found, generate(causal_lm, inputs, **options).logits)


def test_pixels_and_memory_together_are_refused():
    model = tiny_model()
    inputs = tiny_inputs(2)
    with pytest.raises(ValueError, match="Give one of them"):
        model.generate(**inputs, visual_memory=model.get_image_features(inputs["pixel_values"]).pooler_output)


def test_a_typo_in_a_generate_argument_is_refused():
    with pytest.raises(ValueError, match="pixel_valeus"):
        tiny_model().generate(**tiny_inputs(1), pixel_valeus=torch.zeros(1))


def test_calls_that_would_use_another_adapter_than_the_given_one_are_refused():
    model, inputs = tiny_model(), tiny_inputs(2)
    with pytest.raises(ValueError, match="`guidance_scale=2.0` runs the model a second time.*set_adapter"):
        model.generate(**inputs, guidance_scale=2.0, adapter_names=["__base__", "default"])
    with model.disable_adapter(), pytest.raises(ValueError, match="in another thread.*Call `generate` inside"):
        model.generate_batch(inputs["input_ids"].tolist())


def test_disabled_adapters_generate_without_encoding_images():
    model = tiny_model()
    batch, _ = mixed_batch()
    with model.disable_adapter():
        blind = generate(model, batch)
        del batch["pixel_values"], batch["image_mask"]
        assert torch.equal(blind, generate(model, batch))
