"""Samples with several images: the model, the processor, training data and `generate`."""

import pytest
import torch
from test_modeling import ablations, reference_logits, reference_memory
from tiny import IMAGE_SIZE, NUM_PATCHES, tiny_inputs, tiny_model


MAX_IMAGES = 3


def several_inputs(image_mask: list[list[int]], dtype=torch.float32) -> dict[str, torch.Tensor]:
    """Random inputs for samples that have the images which a row of `image_mask` marks."""
    image_mask = torch.tensor(image_mask, dtype=torch.bool)
    inputs = tiny_inputs(len(image_mask))
    images = torch.randn(*image_mask.shape, 3, IMAGE_SIZE, IMAGE_SIZE, generator=torch.Generator().manual_seed(1))
    return inputs | {"pixel_values": images.to(dtype), "image_mask": image_mask}


def reference_memory_of_several(model, images, layer, input_ids):
    """Keys and values of one sample: those of all its images, one by one, with the embedding of each, and the rest."""
    slots = model.model.memory_slots
    if not images or model.config.visual_prompts == "none":
        return reference_memory(model, None, layer)
    keys, values = [], []
    for number, image in enumerate(images):
        of_image = reference_memory(model, image, layer, input_ids)
        for parts, memory, embeddings in zip((keys, values), of_image, (slots.image_key, slots.image_value)):
            parts.append(memory[:NUM_PATCHES] + (embeddings[number - 1] if number else 0))
    return torch.cat((*keys, slots.key[NUM_PATCHES:])), torch.cat((*values, slots.value[NUM_PATCHES:]))


@torch.no_grad()
@ablations
@pytest.mark.parametrize("form", ["factored", "materialised"])
def test_samples_with_unequal_numbers_of_images_equal_the_slow_reference(ablation, form):
    model = tiny_model(max_images=MAX_IMAGES, memory_form=form, **ablation).double()
    inputs = several_inputs([[1, 1, 0], [0, 0, 0], [1, 0, 0], [1, 1, 1]], torch.double)
    logits = model(**inputs).logits
    for row, mask in enumerate(inputs["image_mask"]):
        images = list(inputs["pixel_values"][row][mask])
        expected = reference_logits(model, inputs["input_ids"][row], images, reference_memory_of_several)
        torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@ablations
def test_one_image_gives_the_same_bits_whatever_else_an_adapter_reads(ablation):
    model, of_one = tiny_model(max_images=MAX_IMAGES, **ablation), tiny_model(**ablation)
    own = of_one.adapter_state_dict()
    added = model.adapter_state_dict().keys() - own.keys()
    has_images = model.config.visual_prompts != "none"
    assert added == ({"model.memory_slots.image_key", "model.memory_slots.image_value"} if has_images else set())
    model.load_state_dict(own, strict=False)
    model.model.vision_tower, model.model.language_model = of_one.model.vision_tower, of_one.model.language_model
    model.lm_head = of_one.lm_head
    image_mask = torch.tensor([True, False])
    for given in ({}, {"image_mask": image_mask}, {"pixel_values": None}):
        inputs = {**tiny_inputs(), **given}
        assert torch.equal(model(**inputs).logits, of_one(**inputs).logits)


MODES = {
    "forward": lambda model, inputs: model(**inputs).logits,
    "greedy": lambda model, inputs: scores(model, inputs),
    "uncached": lambda model, inputs: scores(model, inputs, use_cache=False),
    "beams": lambda model, inputs: scores(model, inputs, num_beams=3),
}


def scores(model, inputs, **kwargs):
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True}
    output = model.generate(**inputs, **options, output_logits=True, **kwargs)
    return torch.cat((output.sequences, torch.stack(output.logits, dim=1).view(len(output.sequences), -1)), dim=1)


@torch.no_grad()
@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
@pytest.mark.parametrize("fuser_query", ["network", "layer+instruction"])
def test_a_sample_gives_in_a_batch_what_it_gives_alone_and_from_joined_memories(mode, fuser_query):
    model = tiny_model(max_images=MAX_IMAGES, fuser_query=fuser_query)
    inputs = several_inputs([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    together, memories = mode(model, inputs), []
    size = len(together) // 3
    for row, number in enumerate(inputs["image_mask"].sum(dim=1)):
        text = {name: inputs[name][row : row + 1] for name in ("input_ids", "attention_mask")}
        images = inputs["pixel_values"][row : row + 1, :number]
        alone = {**text, "pixel_values": images} if number else text
        if number == 1:
            alone["pixel_values"] = images[:, 0]
        torch.testing.assert_close(together[size * row : size * (row + 1)], mode(model, alone), atol=1e-5, rtol=1e-5)
        instruction = model.get_instruction_features(text["input_ids"])
        memories.append([model.get_image_features(image[None], None, instruction) for image in images[0]])
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    joined = model.join_visual_memories(memories)
    assert joined.shape[3] == MAX_IMAGES * NUM_PATCHES
    torch.testing.assert_close(together, mode(model, {**text, "visual_memory": joined}), atol=1e-5, rtol=1e-5)
    masked = {**text, "visual_memory": joined, "image_mask": inputs["image_mask"]}
    torch.testing.assert_close(together, mode(model, masked), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_each_sample_may_have_an_adapter_that_reads_another_number_of_images(tmp_path):
    model, of_one = tiny_model(max_images=MAX_IMAGES), tiny_model(seed=1)
    of_one.save_pretrained(tmp_path)
    model.load_adapter(tmp_path, "one")
    inputs, names = several_inputs([[1, 1], [1, 0], [0, 0], [1, 1]]), ["default", "one", "one", "__base__"]
    logits = model(**inputs, adapter_names=names).logits
    for row, (name, number) in enumerate(zip(names, (2, 1, 0, 0))):
        alone = {"input_ids": inputs["input_ids"][row : row + 1]}
        if number:
            images = inputs["pixel_values"][row : row + 1, :number]
            alone["pixel_values"] = images if number > 1 else images[:, 0]
        if name != "__base__":
            model.set_adapter(name)
            expected = model(**alone).logits
        else:
            with model.disable_adapter():
                expected = model(**inputs).logits[row : row + 1]
        torch.testing.assert_close(logits[row], expected[0], atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match=r"2 images, but this adapter reads at most 1 \(max_images=1\)"):
        model(**inputs, adapter_names=["one"] * 4)


@ablations
@pytest.mark.parametrize("image_mask", [[[1, 1], [1, 0]], [[1], [0]], [[0], [0]]], ids=["two", "one", "none"])
def test_in_training_each_parameter_gets_a_gradient_in_every_batch(ablation, image_mask):
    """Or processes whose batches differ would wait for each other for ever."""
    model = tiny_model(max_images=MAX_IMAGES, **ablation).train()
    inputs = several_inputs(image_mask)
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_impossible_images_are_refused():
    model = tiny_model(max_images=2)
    inputs = several_inputs([[1, 1], [1, 0]])
    memory = model.get_image_features(inputs["pixel_values"]).pooler_output
    for change, message in (
        ({"pixel_values": torch.zeros(2, 3, 3, 16, 16)}, r"has 3 images, but .* at most 2 \(max_images=2\)"),
        ({"pixel_values": torch.zeros(2, 2, 3, 8, 8)}, r"`pixel_values` has the shape \(4, 3, 8, 8\)"),
        ({"image_mask": torch.ones(2, 3)}, r"`image_mask` has the shape \(2, 3\), but there are 2 x 2 images"),
    ):
        with pytest.raises(ValueError, match=message):
            model(**{**inputs, **change})
    for visual_memory, image_mask, message in (
        (memory.repeat(1, 1, 1, 2, 1), None, "has 4 images, but .* at most 2"),
        (memory[:, :, :, 1:], None, r"`visual_memory` has the shape .* 31, 9\)"),
        (memory, torch.ones(2, 3), r"the shape \(2, 3\), but there are 2 x 2 texts and images"),
    ):
        with pytest.raises(ValueError, match=message):
            model(input_ids=inputs["input_ids"], visual_memory=visual_memory, image_mask=image_mask)
    one = model.get_image_features(inputs["pixel_values"][:1, 0])
    for samples, message in (
        ([[], []], r"have the shapes \[\]. Give at least one"),
        ([[memory[:, :, :, :NUM_PATCHES]]], r"shapes \[\(2, .* batch of one"),
        ([[one, one, one]], "has 3 images, but this adapter reads at most 2"),
    ):
        with pytest.raises(ValueError, match=message):
            model.join_visual_memories(samples)


def test_memories_of_several_images_are_saved(tmp_path):
    model = tiny_model(max_images=2)
    memory = model.get_image_features(several_inputs([[1, 1]])["pixel_values"]).pooler_output
    model.save_visual_memory(memory, tmp_path / "memory.safetensors")
    assert torch.equal(model.load_visual_memory(tmp_path / "memory.safetensors"), memory)
