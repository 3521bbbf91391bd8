"""The baselines of `baselines/`: what they train, what their images do, and the sizes that they claim."""

import copy
import dataclasses
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from peft import AdaptionPromptConfig, AdaptionPromptModel
from safetensors.torch import load_file
from tiny import (
    IMAGE_SIZE,
    NUM_TEXT_LAYERS,
    PATCH_SIZE,
    VISION_BACKBONES,
    VISION_SIZES,
    VOCAB_SIZE,
    save_tiny_bases,
    vision_parts,
)
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    Trainer,
    TrainingArguments,
)

import baselines
from baselines import BaselineArguments, assemble, build
from dehvf import DehvfConfig
from training.arguments import DehvfTrainingArguments
from training.trainer import AnswerTrainer


METHODS = ("llava", "llava-lora", "lavin", "llama-adapter", "llama-adapter-v2", "adem-vl", "igva")
all_methods = pytest.mark.parametrize("method", METHODS)
all_encoders = pytest.mark.parametrize(
    ("vision_type", "image_size"),
    [
        ("clip_vision_model", None),
        pytest.param("clip_vision_model", 24, marks=pytest.mark.extended),
        pytest.param("siglip_vision_model", 24, marks=pytest.mark.extended),
        ("dinov2", 24),
    ],
)
NO_DROPOUT = {"lora_dropout": 0.0, "lavin_adapter_dropout": 0.0, "adem_adapter_dropout": 0.0}


@pytest.fixture(scope="module")
def bases_with(tmp_path_factory):
    """The folders of tiny bases for each type of vision encoder."""
    return {name: save_tiny_bases(tmp_path_factory.mktemp(name), vision_type=name) for name in VISION_BACKBONES}


@pytest.fixture(scope="module")
def bases(bases_with):
    return bases_with["clip_vision_model"]


@pytest.fixture(scope="module")
def make(bases_with):
    """New baselines on tiny bases; `random=True` fills what starts at zero and would hide the rest."""

    def make(method, random=True, seed=0, vision_type="clip_vision_model", **values):
        torch.manual_seed(seed)
        model = build(method, *bases_with[vision_type], **{**NO_DROPOUT, **values})
        for parameter in trained(model).values():
            if random and not parameter.any():
                torch.nn.init.normal_(parameter, std=0.5)
        return model

    return make


def trained(model):
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_batch(model, rows, labels=False):
    """
    Rows of token ids and image (or `None`) as the collator of `train.py` makes a batch of them: placeholders after
    the first token, padded on the left.
    """
    rows = [(ids[:1] + (getattr(model, "image_tokens", []) if i is not None else []) + ids[1:], i) for ids, i in rows]
    length = max(len(ids) for ids, _ in rows)
    batch = {
        "input_ids": torch.tensor([[0] * (length - len(ids)) + ids for ids, _ in rows]),
        "attention_mask": torch.tensor([[0] * (length - len(ids)) + [1] * len(ids) for ids, _ in rows]),
    }
    if labels:
        batch["labels"] = batch["input_ids"].clone()
        batch["labels"][:, :-2] = -100
    images = [image for _, image in rows if image is not None]
    if images:
        blank = torch.zeros_like(images[0])
        batch["pixel_values"] = torch.stack([blank if image is None else image for _, image in rows])
        batch["image_mask"] = torch.tensor([image is not None for _, image in rows])
    return batch


def picture(seed=0, image_size=None):
    size = image_size or IMAGE_SIZE
    return torch.randn(3, size, size, generator=torch.Generator().manual_seed(seed))


def rows_of(image_size):
    pictures = (picture(seed, image_size) for seed in (1, 2))
    return list(zip(([1, 5, 6, 7, 8, 9], [1, 20, 21, 22], [1, 30, 31, 32, 33]), (None, *pictures)))


ROWS = rows_of(IMAGE_SIZE)
generate = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True, "output_logits": True}


def last_logits(model, rows):
    with torch.no_grad():
        return model(**make_batch(model, rows)).logits[:, -1]


@all_methods
def test_the_help_of_a_size_names_the_methods_that_read_it(bases, method, monkeypatch):
    """`train.py` refuses it with others."""
    read = set()

    class Recorded(BaselineArguments):
        def __getattribute__(self, name):
            read.add(name)
            return super().__getattribute__(name)

    monkeypatch.setattr(baselines, "BaselineArguments", Recorded)
    build(method, *bases)
    sizes = {size.name: size.metadata["help"].partition(":")[0] for size in dataclasses.fields(BaselineArguments)}
    assert read & sizes.keys() == {name for name, readers in sizes.items() if method in readers.split(", ")}


# --- what is trained ---


@all_methods
@all_encoders
def test_steps_lower_the_loss_and_change_each_trained_parameter_and_nothing_frozen(
    make, method, vision_type, image_size
):
    model = make(method, random=False, vision_type=vision_type, image_size=image_size).train()
    before, losses = copy.deepcopy(model.state_dict()), []
    optimizer = torch.optim.Adam(trained(model).values(), lr=1e-2)
    for _ in range(3):  # zeros hide what stands before them from the first step
        optimizer.zero_grad()
        losses.append(model(**make_batch(model, rows_of(image_size), labels=True)).loss)
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    # Softmax takes no notice of a bias that all keys share, so its gradient is zero but for rounding
    expected = {name for name in trained(model) if not name.endswith("k_proj.bias")}
    assert expected <= changed <= trained(model).keys()


@all_methods
def test_a_training_batch_without_images_gives_each_trained_parameter_a_gradient(make, method):
    model = make(method).train()
    model(**make_batch(model, ROWS[:1], labels=True)).loss.backward()
    assert all(parameter.grad is not None for parameter in trained(model).values())


@all_methods
def test_the_blank_of_a_training_batch_without_images_has_no_effect(make, method):
    model = make(method)
    expected = last_logits(model, ROWS[:1])
    torch.testing.assert_close(last_logits(model.train(), ROWS[:1]), expected)


@all_methods
def test_checkpointing_leaves_gradients_as_they_are(make, method):
    gradients, runs = [], {False: [], True: []}
    for checkpointing in (False, True):
        model = make(method).train()
        if checkpointing:
            model.activation_checkpointing_enable()
        counted = model.model.language_model.layers[0].mlp
        counted.register_forward_pre_hook(lambda *_, calls=runs[checkpointing]: calls.append(1))
        model(**make_batch(model, ROWS, labels=True)).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in trained(model).items()})
    torch.testing.assert_close(*gradients)
    assert len(runs[True]) == 2 * len(runs[False])  # each layer runs again


@all_methods
def test_reentrant_checkpointing_is_refused(make, method):
    with pytest.raises(ValueError, match="use_reentrant"):
        make(method).activation_checkpointing_enable({"use_reentrant": True})


@all_methods
def test_adapters_are_fp32_on_bases_of_any_dtype(make, method):
    model = make(method, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in trained(model).values()} == {torch.float32}
    assert {p.dtype for p in model.parameters() if not p.requires_grad} == {torch.bfloat16}
    model.train()(**make_batch(model, ROWS, labels=True)).loss.backward()
    assert all(parameter.grad.isfinite().all() for parameter in trained(model).values())


@all_methods
def test_both_bases_get_the_requested_attention(make, method):
    model = make(method, attn_implementation="eager")
    bases = (model.model.vision_tower, model.model.language_model, model)
    assert {base.config._attn_implementation for base in bases} == {"eager"}
    torch.testing.assert_close(last_logits(model, ROWS), last_logits(make(method), ROWS))


# --- what images do ---


@all_methods
def test_a_new_baseline_is_its_language_model_for_text(make, bases, method):
    batch = make_batch(None, ROWS[:1])
    expected = AutoModelForCausalLM.from_pretrained(bases[1])(**batch).logits
    assert torch.equal(make(method, random=False)(**batch).logits, expected)


@all_methods
def test_weight_decay_is_for_matrices_only(make, method, tmp_path):
    model = make(method)
    arguments = DehvfTrainingArguments(str(tmp_path), learning_rate=0.01, weight_decay=0.1)
    optimizer = AnswerTrainer(model=model, args=arguments, max_new_tokens=1, run={}).create_optimizer()
    decayed = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    found = {(parameter.ndim > 1, decayed[id(parameter)]) for parameter in trained(model).values()}
    assert (True, 0.1) in found and found <= {(True, 0.1), (False, 0.0)}


@pytest.mark.parametrize("method", ["llama-adapter", "llama-adapter-v2"])
def test_a_new_llama_adapter_is_its_language_model_for_images_too(make, bases, method):
    model = make(method, random=False)
    text = AutoModelForCausalLM.from_pretrained(bases[1])
    batch = make_batch(model, ROWS[1:2])
    expected = text(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert torch.equal(model(**batch).logits, expected)


@all_methods
def test_the_image_matters(make, method):
    model = make(method)
    first, second = (last_logits(model, [([1, 20, 21, 22], picture(seed))]) for seed in (1, 2))
    assert (first - second).abs().max() > 1e-3


@all_methods
def test_rows_of_a_mixed_padded_batch_are_as_alone(make, method):
    model = make(method)
    expected = torch.cat([last_logits(model, [row]) for row in ROWS])
    torch.testing.assert_close(last_logits(model, ROWS), expected, atol=1e-4, rtol=1e-4)


@all_methods
def test_without_a_mask_all_samples_have_images(make, method):
    model = make(method)
    batch = make_batch(model, ROWS[1:])
    expected = model(**batch).logits
    del batch["image_mask"]
    assert torch.equal(model(**batch).logits, expected)


@all_methods
def test_the_head_reads_contiguous_hidden_states(make, method):
    model, contiguous = make(method), []
    batch = make_batch(model, ROWS)
    expected = model(**batch).logits[:, -2:]
    model.lm_head.register_forward_pre_hook(lambda _, arguments: contiguous.append(arguments[0].is_contiguous()))
    torch.testing.assert_close(model(**batch, logits_to_keep=2).logits, expected)
    assert contiguous == [True]


@pytest.mark.parametrize("method", ["llava", "llava-lora", "lavin", "adem-vl", "igva"])
def test_placeholders_that_do_not_fit_the_images_are_an_error(make, method):
    model = make(method)
    batch = make_batch(model, ROWS)
    batch["input_ids"][1, -1] = model.image_tokens[0]
    with pytest.raises(ValueError, match="do not match"):
        model(**batch)


def test_the_tokens_of_an_image_are_all_patches_or_six_or_one_or_none(make):
    for size in (IMAGE_SIZE, 24):
        num_patches = (size // PATCH_SIZE) ** 2
        expected = {"llava": num_patches, "llava-lora": num_patches, "lavin": 6, "adem-vl": 1, "igva": num_patches}
        for method, number in expected.items():
            assert make(method, image_size=size).image_tokens == [VOCAB_SIZE] * number
    assert not any(hasattr(make(method), "image_tokens") for method in ("llama-adapter", "llama-adapter-v2"))


@pytest.mark.parametrize("method", ["lavin", "llama-adapter"])
@pytest.mark.parametrize("vision_type", VISION_BACKBONES)
def test_the_class_tokens_of_an_image_are_means_over_patches_where_the_encoder_has_none(make, method, vision_type):
    model, pixel_values = make(method, vision_type=vision_type), picture()[None]
    projector = model.model.multi_modal_projector
    states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    states = torch.cat([states[layer] for layer in model.config.vision_feature_layer], dim=-1)
    features = states.mean(dim=1) if vision_type == "siglip_vision_model" else states[:, 0]
    hidden = projector.down(features.view(1, -1, projector.down.in_features))
    expected = projector.up(torch.nn.functional.silu(hidden))
    torch.testing.assert_close(model.image_features(pixel_values), expected)


# --- generation ---


@all_methods
@all_encoders
def test_cached_generation_equals_uncached_and_encodes_once(make, method, vision_type, image_size):
    model = make(method, vision_type=vision_type, image_size=image_size)
    batch, runs = make_batch(model, rows_of(image_size)), []
    model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))
    cached = model.generate(**batch, **generate)
    assert len(runs) == 1
    uncached = model.generate(**batch, **generate, use_cache=False)
    assert torch.equal(cached.sequences, uncached.sequences)
    torch.testing.assert_close(cached.logits, uncached.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(cached.sequences[:, : batch["input_ids"].shape[1]], batch["input_ids"])
    assert cached.logits[0].shape[-1] == VOCAB_SIZE  # so that no placeholder can be generated


@all_methods
@pytest.mark.parametrize("num_beams", [1, 2])
def test_a_batch_generates_what_its_rows_generate(make, method, num_beams):
    model = make(method)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "num_beams": num_beams}
    together = model.generate(**make_batch(model, ROWS), **options)[:, -4:]
    alone = [model.generate(**make_batch(model, [row]), **options)[:, -4:] for row in ROWS]
    assert torch.equal(together, torch.cat(alone))


# --- saving ---


@all_methods
def test_trainer_saves_the_trained_tensors_alone_and_they_load_back(make, method, tmp_path):
    model = make(method)
    arguments = TrainingArguments(
        tmp_path, max_steps=1, use_cpu=True, remove_unused_columns=False, save_strategy="no", report_to="none"
    )
    data, collate = [ROWS[0], ROWS[1]], partial(make_batch, model, labels=True)
    trainer = Trainer(model, arguments, data_collator=collate, train_dataset=data)
    trainer.train()
    trainer.save_model()
    assert load_file(tmp_path / "model.safetensors").keys() == trained(model).keys()
    modes = {(tmp_path / name).stat().st_mode for name in ("model.safetensors", "config.json")}
    assert len(modes) == 1, "other users can read both"
    loaded = make(method, seed=1)
    assert not torch.equal(last_logits(loaded, ROWS), last_logits(model.eval(), ROWS))
    loaded.load_trained(tmp_path)
    assert torch.equal(last_logits(loaded, ROWS), last_logits(model, ROWS))
    other = make(next(name for name in METHODS if name != method))
    with pytest.raises(ValueError, match="Build the model with the method and values"):
        other.load_trained(tmp_path)


@all_methods
def test_the_config_says_what_was_built_from_what(make, bases, method, tmp_path):
    values = make(method, lora_rank=4, image_size=24).config.to_diff_dict()
    assert (values["method"], values["lora_rank"], values["image_size"]) == (method, 4, 24)
    assert [values["vision_model_id"], values["text_model_id"]] == [str(base) for base in bases]


# --- facts of one method ---


def test_merging_lora_leaves_the_logits(make):
    model = make("llava-lora")
    expected = last_logits(model, ROWS)
    model.model.language_model = model.model.language_model.merge_and_unload()
    assert not any("lora" in name for name, _ in model.named_parameters())
    torch.testing.assert_close(last_logits(model, ROWS), expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("modality", [0, 1])
def test_lavin_routes_as_with_the_modality_token_in_the_sequence(make, modality):
    model = make("lavin")
    language_model = model.model.language_model
    text = model.get_input_embeddings()(torch.tensor([[1, 5, 6, 7]]))
    expected = language_model(inputs_embeds=text, routing=model.routing(torch.tensor([modality]), 1))
    # Without `routing` each adapter looks at its own first token, as in LaVIN's code; the others do not see that token
    sequence = torch.cat((model.modality_embedding.weight[modality].view(1, 1, -1), text), dim=1)
    mask = torch.ones(5, 5, dtype=torch.bool).tril()
    mask[1:, 0] = False
    found = language_model(inputs_embeds=sequence, attention_mask=mask[None, None])
    torch.testing.assert_close(found.last_hidden_state[:, 1:], expected.last_hidden_state, atol=1e-4, rtol=1e-4)


def test_lavin_routes_text_and_images_differently(make):
    weights = make("lavin").routing(torch.tensor([True, False, True]), 3)
    assert weights.shape == (3, NUM_TEXT_LAYERS, 2)
    assert torch.equal(weights[0], weights[2]) and not torch.allclose(weights[0], weights[1])


@pytest.mark.parametrize("vision_type", VISION_BACKBONES)
def test_lavin_routes_an_image_by_its_class_token_or_the_mean_over_its_patches(make, vision_type):
    model = make("lavin", vision_type=vision_type)
    layer, inputs = vision_parts(model.model)[0][0], []
    adapter = next(module.adapter for module in layer.children() if hasattr(module, "adapter"))
    for module in (adapter, adapter.router):
        module.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    model.image_features(picture()[None])
    expected = inputs[0].mean(dim=1) if vision_type == "siglip_vision_model" else inputs[0][:, 0]
    assert torch.equal(inputs[1], expected)


def test_llama_adapter_without_images_is_the_adaption_prompt_of_peft(make, bases):
    """But for the gate, which there is one number a layer without tanh."""
    model = make("llama-adapter")
    config = AdaptionPromptConfig(adapter_len=10, adapter_layers=NUM_TEXT_LAYERS - 2, task_type="CAUSAL_LM")
    text = AdaptionPromptModel(AutoModelForCausalLM.from_pretrained(bases[1]), {"default": config}, "default").eval()
    parameters = {name.split("layers.")[-1]: p for name, p in trained(model).items() if "adaption" in name}
    names = [name for name, parameter in text.named_parameters() if parameter.requires_grad]
    assert len(names) == len(parameters)
    of_peft = {}
    for name in names:
        of_peft[name] = parameter = parameters[name.split("layers.")[-1]].data
        if "gate" in name:
            parameter[:] = parameter[0]  # all heads alike
            of_peft[name] = parameter[0, 0].tanh()
    text.load_state_dict(of_peft, strict=False)
    batch = make_batch(model, ROWS[:1])
    logits = model(**batch).logits
    torch.testing.assert_close(logits, text(**batch).logits)
    gate = next(parameters[name] for name in parameters if "gate" in name)
    with torch.no_grad():
        gate[1] += 1
    assert not torch.allclose(model(**batch).logits, logits, atol=1e-3), "each head has its own"


def llama_adapter_v2_logits(model, bases, row):
    """
    Of the last token of one row: the formulas of arXiv 2304.15010, layer by layer on the stock bases, with the visual
    network of OpenGVLab/LLaMA-Adapter (llama_adapter_v2_multimodal7b/llama/llama_adapter.py).
    """
    weights = {name: parameter.double() for name, parameter in trained(model).items()}
    gelu, silu, layer_norm = (getattr(torch.nn.functional, name) for name in ("gelu", "silu", "layer_norm"))
    vision, text = (
        auto_class.from_pretrained(base, dtype=torch.float64)
        for auto_class, base in zip((AutoModel, AutoModelForCausalLM), bases)
    )

    def affine(name, inputs):
        return inputs @ weights[f"{name}weight"].T + weights[f"{name}bias"]

    def norm(name, inputs):
        return layer_norm(inputs, inputs.shape[-1:], weights[f"{name}weight"], weights[f"{name}bias"])

    def attend(queries, keys, values):
        return (queries @ keys.T / keys.shape[-1] ** 0.5).softmax(dim=-1) @ values

    def visual_prompts(image):
        arguments = {} if vision.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
        tokens = vision(image[None].double(), output_hidden_states=True, **arguments).hidden_states[-1]
        tokens = vision_parts(SimpleNamespace(vision_tower=vision))[1](tokens)[0]
        queries = weights["prompter.queries"]
        states = torch.cat((queries, norm("prompter.down_norm.", affine("prompter.down.", tokens))))
        for index in range(2):
            block = f"prompter.blocks.{index}"
            parts = affine(f"{block}.self_attn.in_proj_", norm(f"{block}.norm1.", states)).chunk(3, dim=-1)
            heads = zip(*(part.split(6, dim=-1) for part in parts))
            read = torch.cat([attend(*head) for head in heads], dim=-1)
            states = states + affine(f"{block}.self_attn.out_proj.", read)
            hidden = gelu(affine(f"{block}.linear1.", norm(f"{block}.norm2.", states)))
            states = states + affine(f"{block}.linear2.", hidden)
        return norm("prompter.up_norm.", affine("prompter.up.", states[: len(queries)]))

    def rms_norm(name, inputs):
        name = f"model.language_model.{name}.norm.weight"
        scale = (inputs.pow(2).mean(dim=-1, keepdim=True) + text.config.rms_norm_eps).rsqrt()
        return weights[name] * inputs * scale

    def linear(name, inputs):
        layer, _, child = name.rpartition(".")
        weight = text.model.get_submodule(name).weight
        inner = f"{layer}.model.{child}" if "self_attn" in layer else name
        scale, added = (weights[f"model.language_model.{inner}.{part}"] for part in ("scale", "bias"))
        return scale * (inputs @ weight.T + added)

    ids, image = row
    states = text.get_input_embeddings()(torch.tensor(ids))
    angles = torch.outer(torch.arange(len(ids)).double(), 10000 ** -(torch.arange(0, 8, 2).double() / 8))
    cosines, sines = angles.cos().repeat(1, 2), angles.sin().repeat(1, 2)
    causal = torch.full((len(ids), len(ids)), -torch.inf).triu(1)
    for index in range(NUM_TEXT_LAYERS):
        layer = f"layers.{index}"
        name = f"model.language_model.{layer}.self_attn.adaption_"
        inputs = rms_norm(f"{layer}.input_layernorm", states)
        if index == 0:
            prompts = None if image is None else visual_prompts(image)
        else:
            prompts = weights[f"{name}prompt"][0]
        read = []
        for head in range(4):
            own, shared = slice(8 * head, 8 * head + 8), slice(8 * (head // 2), 8 * (head // 2) + 8)  # 2 heads a key
            query, key, value = (
                linear(f"{layer}.self_attn.{part}_proj", inputs)[:, place]
                for part, place in (("q", own), ("k", shared), ("v", shared))
            )
            query, key = (
                part * cosines + torch.cat((-part[:, 4:], part[:, :4]), dim=-1) * sines for part in (query, key)
            )
            found = (query @ key.T / 8**0.5 + causal).softmax(dim=-1) @ value
            if prompts is not None:
                key, value = (linear(f"{layer}.self_attn.{part}_proj", prompts)[:, shared] for part in "kv")
                found = found + weights[f"{name}gate"][head, 0, 0].tanh() * attend(query, key, value)
            read.append(found)
        states = states + linear(f"{layer}.self_attn.o_proj", torch.cat(read, dim=-1))
        inputs = rms_norm(f"{layer}.post_attention_layernorm", states)
        gate, up = (linear(f"{layer}.mlp.{part}_proj", inputs) for part in ("gate", "up"))
        states = states + linear(f"{layer}.mlp.down_proj", silu(gate) * up)
    return text.lm_head(rms_norm("norm", states))[-1]


@all_encoders
def test_llama_adapter_v2_is_what_its_paper_says(make, bases_with, vision_type, image_size):
    sizes = {"adapter_v2_size": 12, "adapter_v2_heads": 2, "adapter_v2_layers": 2, "adapter_v2_prompts": 3}
    model = make("llama-adapter-v2", vision_type=vision_type, image_size=image_size, dtype=torch.float64, **sizes)
    model.double()
    for parameter in trained(model).values():  # scales and norms start at one
        torch.nn.init.normal_(parameter, mean=float(parameter.eq(1).all()), std=0.5)
    rows = rows_of(image_size)
    with torch.no_grad():
        expected = torch.stack([llama_adapter_v2_logits(model, bases_with[vision_type], row) for row in rows])
    rows = [(ids, image if image is None else image.double()) for ids, image in rows]
    torch.testing.assert_close(last_logits(model, rows), expected, atol=1e-6, rtol=1e-6)


def adem_vl_logits(model, bases, row):
    """
    Of the last token of one row: the formulas of Hao840/ADEM-VL at cec09b8 (adem/adapter.py, adem/model.py,
    clip/model.py), with the values of its README, token by token on the stock bases.
    """
    weights = {name: parameter.double() for name, parameter in trained(model).items()}
    silu, gelu = torch.nn.functional.silu, torch.nn.functional.gelu
    vision, text = (
        auto_class.from_pretrained(base, dtype=torch.float64)
        for auto_class, base in zip((AutoModel, AutoModelForCausalLM), bases)
    )

    def project(name, inputs):
        down, down_bias, up, up_bias = (
            weights[f"{name}_projector.{part}"] for part in ("down.weight", "down.bias", "up.weight", "up.bias")
        )
        return silu(inputs @ down.T + down_bias) @ up.T + up_bias

    def read(states, keys, values):
        added = torch.zeros_like(states)
        for position, state in enumerate(states[0]):
            scores = torch.stack([silu(state) @ key for key in keys])
            scores[scores < scores.sort().values[int(0.1 * len(scores))]] = 0
            added[0, position] = 0.1 * scores @ values
        return added

    ids, image = row
    embeds = text.get_input_embeddings()(torch.tensor(ids))
    patch_embeds = 0
    if image is not None:
        layers, norm = vision_parts(SimpleNamespace(vision_tower=vision))
        for index, layer in enumerate(layers[:-1]):
            down, up = (weights[f"vision_adapters.{index}.{part}.weight"] for part in ("down", "up"))
            layer.mlp.register_forward_hook(
                lambda _, states, output, down=down, up=up: output + 0.1 * gelu(states[0] @ down.T) @ up.T
            )
        arguments = {} if vision.config.model_type == "dinov2" else {"interpolate_pos_encoding": True}
        hidden_states = vision(image[None].double(), output_hidden_states=True, **arguments).hidden_states
        patches = norm(hidden_states[-2])[0]
        if vision.config.model_type == "siglip_vision_model":
            class_token, patches = patches.mean(dim=0), [*patches]
        else:
            class_token, *patches = patches
        size = image.shape[-1] // PATCH_SIZE
        corners = [2 * size * i + 2 * j for i in range(size // 2) for j in range(size // 2)]
        coarse = [sum(patches[corner + k] for k in (0, 1, size, size + 1)) / 4 for corner in corners]
        patch_embeds = 0.01 * project("patch", torch.stack(patches + coarse))
        embeds = torch.cat((embeds[:1], project("class", class_token)[None], embeds[1:]))
    keys, values = silu(patch_embeds + weights["key_embedding"]), patch_embeds + weights["value_embedding"]
    for layer in text.model.layers:
        layer.mlp.register_forward_hook(lambda _, states, output: output + read(states[0], keys, values))
    return text(inputs_embeds=embeds[None]).logits[0, -1]


@all_encoders
def test_adem_vl_is_what_its_authors_compute(make, bases_with, vision_type, image_size):
    model = make("adem-vl", vision_type=vision_type, image_size=image_size, dtype=torch.float64).double()
    rows = rows_of(image_size)
    with torch.no_grad():
        expected = torch.stack([adem_vl_logits(model, bases_with[vision_type], row) for row in rows])
    rows = [(ids, image if image is None else image.double()) for ids, image in rows]
    torch.testing.assert_close(last_logits(model, rows), expected, atol=1e-6, rtol=1e-6)


@all_encoders
def test_igva_makes_image_tokens_as_its_authors_do(make, bases_with, vision_type, image_size):
    """Their `encode_images` and `Aggregator`, whose `QueryTransformer` has PyTorch's own attention."""
    model = make("igva", vision_type=vision_type, image_size=image_size, igva_hidden_size=8)
    aggregator, (ids, image) = model.aggregator, rows_of(image_size)[1]
    vision = AutoModel.from_pretrained(bases_with[vision_type][0])
    arguments = {} if vision_type == "dinov2" else {"interpolate_pos_encoding": True}
    states = vision(image[None], output_hidden_states=True, **arguments).hidden_states
    groups = [torch.stack([states[layer] for layer in group]).mean(0)[0] for group in ([1, 2], [3, 4], [5], [6])]
    base, first = states[-2][0], int(vision_type != "siglip_vision_model")
    class_tokens = torch.stack([group[0] if first else group.mean(dim=0) for group in groups])
    query = model.get_input_embeddings()(torch.tensor(ids)).mean(dim=0) @ aggregator.instruction_proj.weight.T
    query = (query + aggregator.instruction_proj.bias)[None]
    features = class_tokens @ aggregator.class_proj.weight.T + aggregator.class_proj.bias
    for block in aggregator.blocks:
        attention = torch.nn.MultiheadAttention(8, 4)
        projections = (block.q_proj, block.k_proj, block.v_proj)
        with torch.no_grad():
            attention.in_proj_weight.copy_(torch.cat([linear.weight for linear in projections]))
            attention.in_proj_bias.copy_(torch.cat([linear.bias for linear in projections]))
            attention.out_proj.load_state_dict(block.out_proj.state_dict())
        query = block.attention_norm(query + attention(query, features, features)[0])
        query = block.ffn_norm(query + block.linear_2(block.linear_1(query).relu()))
    weights = aggregator.head(query)[0].softmax(dim=-1)
    fused = sum(weight * group[first:] for weight, group in zip(weights, groups))
    projector = model.model.multi_modal_projector
    hidden = torch.cat((base[first:], fused), dim=-1) @ projector.down.weight.T + projector.down.bias
    expected = torch.nn.functional.gelu(hidden) @ projector.up.weight.T + projector.up.bias
    batch = make_batch(model, [(ids, image)])
    instruction = model.instruction(batch["input_ids"], batch["attention_mask"], None)
    found = model.image_features(batch["pixel_values"], batch["image_mask"], instruction)
    torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)


def test_igva_reads_the_question_and_neither_the_image_nor_the_answer(make):
    model = make("igva")
    batch = make_batch(model, ROWS, labels=True)
    seen = []
    model.image_features = lambda pixels, mask, instruction: seen.append(instruction) or torch.zeros(2, 16, 32)
    model(**batch)
    embeddings = model.get_input_embeddings()
    questions = [ids[: len(ids) - 2] for ids, _ in ROWS]  # `make_batch` takes two tokens for the answer
    expected = torch.stack([embeddings(torch.tensor(ids)).mean(dim=0) for ids in questions])
    torch.testing.assert_close(seen[0], expected)


@pytest.mark.parametrize(
    ("method", "values", "message"),
    [
        ("llama-adapter", {"adaption_prompt_layers": 5}, "1 to 4"),
        ("llama-adapter-v2", {"adaption_prompt_layers": 4}, "1 to 3"),
        ("llama-adapter-v2", {"adapter_v2_heads": 5}, "not a multiple of `adapter_v2_heads`, 5"),
        ("llama-adapter", {"adaption_image_layers": 7}, "1 to 6"),
        ("adem-vl", {"adem_pool_sizes": [1, 3]}, "divisors of 4"),
        ("adem-vl", {"image_size": 20}, "divisors of 5"),
        ("lavin", {"image_size": 19}, "`image_size` is 19, .* The nearest is 20"),
        ("igva", {"igva_num_groups": 7}, "`igva_num_groups` is 7, .* Give 1 to 6"),
        ("igva", {"igva_num_heads": 3}, "not a multiple of `igva_num_heads`, 3"),
        ("igva", {"igva_num_heads": 0}, "`igva_num_heads` is 0, but must be at least 1"),
        ("llama-adapter", {"adaption_prompt_length": 0}, "`adaption_prompt_length` is 0, but must be at least 1"),
        ("llama-adapter-v2", {"adapter_v2_prompts": 0}, "`adapter_v2_prompts` is 0, but must be at least 1"),
        ("llama-adapter-v2", {"adapter_v2_heads": 0}, "`adapter_v2_heads` is 0, but must be at least 1"),
        ("lavin", {"lavin_temperature": 0.0}, "`lavin_temperature` is 0.0, but must be more than 0"),
        ("lavin", {"lavin_adapter_size": 7}, "`lavin_adapter_size` is 7, but must be even"),
        ("llava-lora", {"lora_dropout": 1.0}, r"`lora_dropout` is 1.0, but must lie in \[0, 1\)"),
        ("adem-vl", {"adem_drop_ratio": 1.0}, r"`adem_drop_ratio` is 1.0, but must lie in \[0, 1\)"),
        ("adem-vl", {"adem_image_scale": float("nan")}, "`adem_image_scale` is nan, but must be a finite number"),
    ],
)
def test_values_that_the_method_or_the_bases_do_not_allow_are_refused(make, method, values, message):
    with pytest.raises(ValueError, match=message):
        make(method, **values)


def test_an_unknown_method_is_refused_by_name(make):
    with pytest.raises(ValueError, match="There is no baseline `lora`"):
        make("lora")


@all_methods
def test_mistral_can_be_adapted_and_gpt2_is_refused(method):
    vision = AutoModel.from_config(CLIPVisionConfig(**VISION_SIZES))
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
    text = AutoModelForCausalLM.from_config(MistralConfig(vocab_size=VOCAB_SIZE, num_key_value_heads=2, **sizes))
    model = assemble(method, vision, text, BaselineArguments()).eval()
    assert last_logits(model, ROWS).isfinite().all()
    other = AutoModelForCausalLM.from_config(GPT2Config(n_embd=32, n_layer=3, n_head=4, vocab_size=VOCAB_SIZE))
    with pytest.raises(ValueError, match="not `gpt2`"):
        assemble(method, vision, other, BaselineArguments())


# --- sizes ---


@pytest.mark.parametrize(
    ("method", "count", "paper"),
    [
        ("llava", 6_738_415_616 + 20_979_712, 6.76e9),  # LLaMA-7B and the projector: no count is given
        ("llava-lora", 4_403_240, 4.4e6),
        ("lavin", 3_781_296, 3.8e6),
        ("llama-adapter", 1_758_208, 1.8e6),
        ("llama-adapter-v2", 13_742_816, 14e6),
        ("adem-vl", 4_530_432 - 2 * 12 * 1024, 4.53e6),  # its authors count an adapter that they never run
        ("igva", 4_194_304 + 30_455_812 + 25_174_016, 59.8e6),  # LoRA, aggregator, projector: no count is given
    ],
)
def test_at_7b_as_many_parameters_are_trained_as_in_the_paper(method, count, paper):
    with torch.device("meta"):
        vision = AutoModel.from_config(DehvfConfig().vision_config)
        text = AutoModelForCausalLM.from_config(LlamaConfig())
    model = assemble(method, vision, text, BaselineArguments())
    assert sum(parameter.numel() for parameter in trained(model).values()) == count
    assert abs(count / paper - 1) < 0.03
