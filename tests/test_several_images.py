"""Samples with several images: the model, the processor, training data and `generate`."""

import csv
import json

import datasets
import pytest
import torch
from PIL import Image, ImageColor
from safetensors.torch import load_file, save_file
from test_modeling import ablations, reference_logits, reference_memory
from test_train import make_split, tiny_flags
from tiny import (
    DEHVF_SIZES,
    IMAGE_SIZE,
    NUM_PATCHES,
    DehvfForConditionalGeneration,
    DehvfProcessor,
    relative_error,
    save_tiny_bases,
    tiny_config,
    tiny_image_processor,
    tiny_inputs,
    tiny_model,
    tiny_tokenizer,
)
from transformers import AutoModelForImageTextToText, pipeline

import train
from tasks import chat, vqa
from tasks.__main__ import check
from tasks._values import list_images
from training.data import Collator, read_image


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
def test_joined_memories_of_images_with_fewer_tiles_keep_the_index_of_each_tile():
    model = tiny_model(max_images=2, image_tiles="2x2")
    inputs = several_inputs([[1, 0, 0, 0, 0, 1, 1]])  # the first image is too small for tiles
    images = inputs["pixel_values"]
    memories = [model.get_image_features(images[:, :1]), model.get_image_features(images[:, 5:])]
    text = {name: inputs[name] for name in ("input_ids", "attention_mask")}
    joined = model(**text, visual_memory=model.join_visual_memories([memories])).logits
    torch.testing.assert_close(joined, model(**inputs).logits, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_memory_of_several_images_may_have_another_dtype_than_the_model():
    model = tiny_model(max_images=2)
    inputs = several_inputs([[1, 1], [1, 0]])
    memory = model.get_image_features(inputs.pop("pixel_values"), inputs.pop("image_mask")).pooler_output
    expected = model(**inputs, visual_memory=memory).logits
    logits = model.bfloat16()(**inputs, visual_memory=memory).logits
    assert logits.dtype == torch.bfloat16 and relative_error(logits, expected) < 0.05


@torch.no_grad()
def test_the_image_size_may_be_changed_before_saving(tmp_path):
    model = tiny_model(max_images=2, image_size=12)
    model.config.image_size = 8
    inputs = several_inputs([[1, 1]])
    inputs["pixel_values"] = inputs["pixel_values"][..., :8, :8]
    logits = model(**inputs).logits
    model.save_pretrained(tmp_path, merge_base=True)
    loaded = DehvfForConditionalGeneration.from_pretrained(tmp_path)
    torch.testing.assert_close(loaded(**inputs).logits, logits)
    model.config.image_size = 100
    with pytest.raises(ValueError, match=r"`num_memory_slots=\d+` is less than the 625 patches of an image"):
        model(**{**inputs, "pixel_values": torch.zeros(1, 2, 3, 100, 100)})


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


@torch.no_grad()
@pytest.mark.parametrize("number", [1, 2])
def test_a_saved_adapter_may_be_loaded_for_more_images(number, tmp_path):
    """Such as one that was trained on single images, to be trained on pairs."""
    sizes = {**DEHVF_SIZES, "max_images": number}
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*save_tiny_bases(tmp_path), **sizes)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "adapter")
    inputs = several_inputs([[1] * number, [0] * number])
    for load in (DehvfForConditionalGeneration.from_pretrained, AutoModelForImageTextToText.from_pretrained):
        trust = {} if load.__self__ is DehvfForConditionalGeneration else {"trust_remote_code": True}
        grown = load(tmp_path / "adapter", max_images=number + 2, **trust)
        assert grown.config.max_images == number + 2
        assert torch.equal(grown(**inputs).logits, model(**inputs).logits)
        embeddings = grown.model.memory_slots.image_key
        assert len(embeddings) == number + 1 and embeddings[:-2].any() == (number > 1) and not embeddings[-2:].any()
    grown.save_pretrained(tmp_path / "grown")
    again = DehvfForConditionalGeneration.from_pretrained(tmp_path / "grown")
    more = several_inputs([[1] * (number + 2), [1, 0, 0, 0][: number + 2]])
    assert torch.equal(again(**more).logits, grown(**more).logits)
    tensors = load_file(tmp_path / "grown" / "model.safetensors")
    save_file(
        {name: tensor for name, tensor in tensors.items() if "image_key" not in name},
        tmp_path / "grown" / "model.safetensors",
    )
    with pytest.raises(ValueError, match="missing: model.memory_slots.image_key"):
        DehvfForConditionalGeneration.from_pretrained(tmp_path / "grown")
    if number > 1:
        with pytest.raises(ValueError, match="wrong shape|unexpected"):
            DehvfForConditionalGeneration.from_pretrained(tmp_path / "adapter", max_images=1)


@pytest.mark.parametrize(
    "values, changes",
    [
        ({"max_images": 2}, {"max_images": 3, "image_tiles": "2x2"}),
        ({"image_tiles": "2x2"}, {"max_images": 2, "image_tiles": "3x3"}),
        ({"image_tiles": "2x2"}, {"image_tiles": "1x4"}),
        ({"image_tiles": "2x2"}, {"max_images": 5, "image_tiles": None}),
    ],
    ids=str,
)
def test_embeddings_of_images_and_tiles_are_not_given_to_others(values, changes, tmp_path):
    bases = save_tiny_bases(tmp_path)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **{**DEHVF_SIZES, **values})
    model.save_pretrained(tmp_path / "adapter")
    saved, given = values.get("image_tiles"), changes["image_tiles"]
    with pytest.raises(ValueError, match=f"with `image_tiles={saved}`, but `image_tiles={given}` was given.*Load it"):
        DehvfForConditionalGeneration.from_pretrained(tmp_path / "adapter", **changes)
    config = DehvfForConditionalGeneration.from_pretrained(tmp_path / "adapter", max_images=4).config
    assert (config.max_images, config.image_tiles) == (4, saved)


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
    changed = tiny_model()
    changed.config.max_images = 2
    with pytest.raises(ValueError, match="has 2 images, but this model was built for at most 1"):
        changed(**inputs)
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


# --- the processor ---


def picture(colour="red", size=(IMAGE_SIZE, IMAGE_SIZE)) -> Image.Image:
    return Image.new("RGB", size, colour)


def several_processor(**values) -> DehvfProcessor:
    return DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), **values)


def test_samples_have_the_images_of_their_lists_and_the_model_reads_them():
    processor, colours = several_processor(max_images=2), ("red", "blue", "green")
    first, second, third = map(picture, colours)
    pixels = processor(images=[first, second, third], return_tensors="pt")["pixel_values"]
    assert pixels.shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE), "as ever where no sample has several"
    images = [[first, second], [third], [], [None], third]
    inputs = processor(images=images, text=["a"] * 5, return_tensors="pt")
    assert inputs["image_mask"].tolist() == [[True, True], [True, False], [False] * 2, [False] * 2, [True, False]]
    assert torch.equal(inputs["pixel_values"][inputs["image_mask"]], pixels[[0, 1, 2, 2]])
    assert not inputs["pixel_values"][~inputs["image_mask"]].any()
    assert tiny_model(max_images=2)(**inputs).logits.shape[0] == 5
    with pytest.raises(ValueError, match="A sample has 3 images, but this adapter reads at most 2 per text"):
        processor(images=[[first, second, third]], text="a")
    with pytest.raises(ValueError, match=r"`images` has 2 entries and `text` has 1. .* a list for one with several"):
        processor(images=[first, second], text="a")


def test_images_of_all_turns_of_a_chat_are_read_in_their_order():
    parts = [{"type": "image", "image": picture(colour)} for colour in ("red", "blue")]
    turns = [
        {"role": "user", "content": [parts[0], {"type": "text", "text": "who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "me"}]},
        {"role": "user", "content": [{"type": "text", "text": "and"}, parts[1], {"type": "text", "text": "he?"}]},
    ]
    processor = several_processor(max_images=2)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template([turns, turns[:1]], **options)
    assert inputs["image_mask"].tolist() == [[True, True], [True, False]]
    expected = processor(images=[[picture("red"), picture("blue")], picture("red")], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], expected["pixel_values"])
    alone = processor.apply_chat_template(turns, **options)
    assert torch.equal(alone["pixel_values"], expected["pixel_values"][:1])


def test_the_pipeline_answers_about_several_images():
    model, processor = tiny_model(max_images=2), several_processor(max_images=2)
    content = [{"type": "image", "image": picture(colour)} for colour in ("red", "blue")]
    chat = [{"role": "user", "content": [*content, {"type": "text", "text": "who?"}]}]
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt", "add_generation_prompt": True}
    inputs = processor.apply_chat_template(chat, **options)
    limits = {"max_new_tokens": 4, "do_sample": False}
    expected = model.generate(**inputs, **limits)[:, inputs["input_ids"].shape[1] :]
    expected = processor.batch_decode(expected, skip_special_tokens=True)[0]
    assert pipe(text=chat, generate_kwargs=limits, return_full_text=False)[0]["generated_text"] == expected
    text, images = processor.apply_chat_template(chat, add_generation_prompt=True), [picture("red"), picture("blue")]
    found = pipe(images=[images], text=[text], generate_kwargs=limits, return_full_text=False)
    assert found[0]["generated_text"] == expected


@pytest.mark.parametrize("image_fit", [None, "crop", "squash", "pad"])
def test_a_large_image_is_followed_by_its_tiles(image_fit, tmp_path):
    """A picture with six colours in two rows, each of them one tile; a small picture has none."""
    colours, side = ["red", "lime", "blue", "white", "black", "yellow"], 2 * IMAGE_SIZE
    large = picture(size=(3 * side, 2 * side))
    for number, colour in enumerate(colours):
        large.paste(picture(colour, (side, side)), (side * (number % 3), side * (number // 3)))
    several_processor(max_images=2, image_tiles="2x3", image_fit=image_fit).save_pretrained(tmp_path)
    processor = DehvfProcessor.from_pretrained(tmp_path)
    inputs = processor(images=[[large, picture()], [picture(), large], None], text=["a"] * 3, return_tensors="pt")
    marks = ["11111111000000", "10000001111111", "00000000000000"]
    assert inputs["image_mask"].int().tolist() == [list(map(int, row)) for row in marks]
    whole = several_processor(image_fit=image_fit)(images=large, return_tensors="pt")["pixel_values"]
    parts = [picture(colour) for colour in colours]
    parts = several_processor()(images=parts, return_tensors="pt")["pixel_values"]
    for found in (inputs["pixel_values"][0, :7], inputs["pixel_values"][1, 7:]):
        assert torch.equal(found[:1], whole)
        inner = (..., slice(2, -2), slice(2, -2))  # where no neighbour shines in
        torch.testing.assert_close(found[1:][inner], parts[inner], atol=1e-5, rtol=0)
    small = processor(images=[picture(), None], return_tensors="pt")
    assert torch.equal(
        small["pixel_values"], several_processor()(images=[picture(), None], return_tensors="pt")["pixel_values"]
    )
    model = tiny_model(max_images=2, image_tiles="2x3")
    assert model.model.memory_slots.image_key.shape[0] == 13
    together = model(**inputs).logits[1]
    alone = {name: value[1:2] for name, value in inputs.items()}
    torch.testing.assert_close(together, model(**alone).logits[0], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tiles", ["2", "0x2", "2x10", "2 x 2"])
def test_other_tiles_are_refused(tiles):
    for make in (several_processor, tiny_config):
        with pytest.raises(Exception, match=f"`image_tiles` is '{tiles}', but must be rows and columns from 1 to 9"):
            make(image_tiles=tiles)


# --- data and training ---


COLOURS = ("red", "blue", "lime")
FILES = [[f"{colour}.png" for colour in COLOURS], ["blue.png"], []]
QUESTIONS = [{"question": f"who? {number}", "answer": "me", "images": images} for number, images in enumerate(FILES)]


def conversation(content, second) -> list[dict]:
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": "me"}]
    return [*turns, {"role": "user", "content": second}, {"role": "assistant", "content": "he"}]


def in_parts(files: list[str]) -> list[dict]:
    """A chat with the last image in its second question, and the others in the first."""
    images = [{"type": "image", "image": file} for file in files]
    texts = [{"type": "text", "text": text} for text in ("who?", "and he?")]
    return conversation([*images[:-1], texts[0]], [texts[1], *images[-1:]])


def with_markers(files: list[str]) -> list[dict]:
    return conversation("<image>" * len(files[:-1]) + "who?", "and he?" + "<image>" * len(files[-1:]))


def write_lines(folder, rows: list[dict]):
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))


def write_csv(folder):
    with open(folder / "train.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, QUESTIONS[0])
        writer.writeheader()
        writer.writerows({**row, "images": json.dumps(row["images"])} for row in QUESTIONS)


def with_decoded_images(folder) -> datasets.Dataset:
    rows = [{**row, "images": [str(folder / file) for file in row["images"]]} for row in QUESTIONS]
    return datasets.Dataset.from_list(rows).cast_column("images", datasets.List(datasets.Image()))


def save_own_rows(folder):
    """What the task itself made of rows."""
    (folder / "first").mkdir()
    rows = [{**row, "images": [f"../{file}" for file in row["images"]]} for row in QUESTIONS]
    write_lines(folder / "first", rows)
    vqa.load("train", str(folder / "first")).save_to_disk(folder)


LAYOUTS = {
    "lists": (vqa, lambda folder: write_lines(folder, QUESTIONS)),
    "CSV": (vqa, write_csv),
    "Parquet": (vqa, lambda folder: with_decoded_images(folder).to_parquet(folder / "train.parquet")),
    "save_to_disk": (vqa, lambda folder: with_decoded_images(folder).save_to_disk(folder)),
    "own rows": (vqa, save_own_rows),
    "parts": (chat, lambda folder: write_lines(folder, [{"messages": in_parts(files)} for files in FILES])),
    "markers": (
        chat,
        lambda folder: write_lines(folder, [{"messages": with_markers(files), "images": files} for files in FILES]),
    ),
}


def write_pictures(folder):
    for colour in COLOURS:
        picture(colour).save(folder / f"{colour}.png")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rows_have_the_images_of_their_lists_or_turns(layout, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    write_pictures(tmp_path)
    task, write = LAYOUTS[layout]
    write(tmp_path)
    expected = [[file.removesuffix(".png") for file in files] for files in FILES]
    for streaming in (False, True):
        rows = list(
            task.load("train", str(tmp_path), streaming=streaming).cast_column("image", datasets.Image(decode=False))
        )
        assert [row["images"] is None for row in rows] == [False, True, True]
        assert [row["image"] is None for row in rows] == [False, False, True]
        found = [[read_image(image).getpixel((0, 0)) for image in list_images(row)] for row in rows]
        assert found == [[ImageColor.getrgb(colour) for colour in colours] for colours in expected]
    if task is chat:
        assert [message["content"] for message in rows[0]["messages"]] == ["who?", "me", "and he?", "he"]
    assert check(str(tmp_path), task=task.__name__.removeprefix("tasks."))
    printed = capsys.readouterr().out
    assert "3 good rows, 2 with an image" in printed
    assert "rows with several images: 1. Train with `--max_images 3`." in printed


def test_a_batch_has_the_images_of_its_rows_and_a_placeholder_for_each_view(tmp_path):
    write_pictures(tmp_path)
    write_lines(tmp_path, QUESTIONS)
    split = make_split(tmp_path, task="vqa", processor=several_processor(max_images=3))
    processor = several_processor(max_images=3)
    batch = Collator(processor, image_tokens=[63, 63])([*split])
    assert batch["image_mask"].tolist() == [[True] * 3, [True, False, False], [False] * 3]
    assert batch["pixel_values"].shape == (3, 3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert (batch["input_ids"] == 63).sum(dim=1).tolist() == [6, 2, 0]
    assert Collator(processor)([split[1], split[2]])["pixel_values"].shape == (2, 3, IMAGE_SIZE, IMAGE_SIZE)
    with pytest.raises(ValueError, match="Row 0 of the train split has 3 images, .* at most 2. .*`--max_images 3`"):
        make_split(tmp_path, task="vqa", processor=several_processor(max_images=2))


@pytest.fixture
def pairs(tmp_path):
    """Questions about one, two or no pictures, with a test split."""
    write_pictures(tmp_path)
    files = [["red.png", "blue.png"], ["lime.png"], [], ["blue.png", "red.png"]] * 2
    rows = [
        {"question": "who?" * (1 + number % 3), "answer": "me", "images": images}
        for number, images in enumerate(files)
    ]
    write_lines(tmp_path, rows)
    (tmp_path / "test.jsonl").write_text("\n".join(map(json.dumps, rows[:4])))
    return tmp_path


@pytest.mark.parametrize("method", ["dehvf", "llava", "llava-lora"])
def test_a_run_trains_and_evaluates_on_several_images(method, pairs, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", pairs / "cache")
    flags = {"task": "vqa", "max_images": 2, "image_tiles": "1x2", "max_steps": 2, "method": method}
    train.main(tiny_flags(pairs, pairs, pairs / "output", **flags))
    assert len((pairs / "output" / "predictions.jsonl").read_text().splitlines()) == 4
    if method == "dehvf":
        model = AutoModelForImageTextToText.from_pretrained(pairs / "output", trust_remote_code=True)
        processor = DehvfProcessor.from_pretrained(pairs / "output")
        assert (processor.max_images, processor.image_tiles, model.config.max_encoded_images) == (2, "1x2", 6)
        assert model.model.memory_slots.image_value[2].any(), "the embedding of the second image has learned"
        more = {"task": "vqa", "max_images": 3, "max_steps": 1, "adapter": pairs / "output"}
        train.main(tiny_flags(pairs, pairs, pairs / "more", **more))
        processor = DehvfProcessor.from_pretrained(pairs / "more")
        model = DehvfForConditionalGeneration.from_pretrained(pairs / "more")
        assert (processor.max_images, model.config.max_images, len(model.model.memory_slots.image_key)) == (3, 3, 8)
        with pytest.raises(ValueError, match="`--max_images 2` was given, but the adapter .* reads 3 images"):
            train.main(
                tiny_flags(pairs, pairs, pairs / "less", **{**more, "max_images": 2, "adapter": pairs / "more"})
            )
        with pytest.raises(ValueError, match="`--max_images` was given, but `--adapter"):
            train.main(tiny_flags(pairs, pairs, pairs / "less", **{**more, "max_images": 1}))


def test_a_baseline_that_reads_one_image_refuses_several():
    for flag, value in (("max_images", "2"), ("image_tiles", "2x2")):
        with pytest.raises(ValueError, match=f"`--method lavin` reads one image of a row, but `--{flag}` was given"):
            train.main(["--method", "lavin", f"--{flag}", value, "--max_samples", "2"])
