"""The processor: which image belongs to which text, and what the model gets."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    IMAGE_SIZE,
    NUM_PATCHES,
    DehvfProcessor,
    save_tiny_bases,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)


def image(color="red", size=(20, 30)):
    return Image.new("RGB", size, color)


def test_a_mixed_batch_marks_who_has_an_image():
    inputs = tiny_processor()(images=[image(), None, [image("blue")]], text=["abc", "a", "ab"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert inputs["image_mask"].tolist() == [True, False, True]
    assert not inputs["pixel_values"][1].any()
    single = tiny_processor()(images=image("blue"), text="ab", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"][2], single["pixel_values"][0])


def test_padding_is_on_the_left():
    inputs = tiny_processor()(text=["abc", "a"], return_tensors="pt")
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1], [0, 0, 1, 1]]


@pytest.mark.parametrize("images", [None, [None, None], [[], None]])
def test_pixels_are_absent_where_no_sample_has_an_image(images):
    inputs = tiny_processor()(images=images, text=["abc", "a"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}


@pytest.mark.parametrize("form", ["path", "array", "tensor", "single", "list", "nested"])
def test_images_may_come_in_many_forms(form, tmp_path):
    image().save(tmp_path / "a.png")
    forms = {
        "path": str(tmp_path / "a.png"),
        "array": np.asarray(image()),
        "tensor": torch.from_numpy(np.array(image())).permute(2, 0, 1),
        "single": image(),
        "list": [image()],
        "nested": [[image()]],
    }
    inputs = tiny_processor()(images=forms[form], text="a", return_tensors="pt")
    expected = tiny_processor()(images=image(), text="a", return_tensors="pt")
    torch.testing.assert_close(inputs["pixel_values"], expected["pixel_values"])


def test_the_text_is_the_same_with_and_without_an_image():
    processor = tiny_processor()
    with_image = processor(images=image(), text="abc", return_tensors="pt")
    assert torch.equal(with_image["input_ids"], processor(text="abc", return_tensors="pt")["input_ids"])


def test_output_feeds_the_model_as_it_is():
    model = tiny_model()
    inputs = tiny_processor()(images=[image(), None], text=["abc", "a"], return_tensors="pt")
    assert model(**inputs).visual_memory.shape[3] == NUM_PATCHES
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2


def test_chat_template_takes_images_out_of_the_text():
    message = {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "what?"}]}
    processor = tiny_processor()
    text = processor.apply_chat_template([message], add_generation_prompt=True)
    assert text == "what?\nResponse:"
    inputs = processor.apply_chat_template(
        [message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(images=image(), text=text, return_tensors="pt")
    assert all(torch.equal(inputs[name], expected[name]) for name in expected)


def test_chat_template_over_several_turns_and_a_batch():
    turns = [
        {"role": "user", "content": "who?"},
        {"role": "assistant", "content": [{"type": "text", "text": "me"}]},
        {"role": "user", "content": "why?"},
    ]
    processor = tiny_processor()
    assert processor.apply_chat_template(turns) == "who?\nResponse: me</s>\nwhy?\n"
    message = [{"role": "user", "content": [{"type": "image", "image": image()}]}]
    inputs = processor.apply_chat_template(
        [turns, message], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert inputs["image_mask"].tolist() == [False, True]


def test_a_tokenizer_without_padding_token_gets_one():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert DehvfProcessor(tiny_image_processor(), tokenizer).tokenizer.pad_token == "<unk>"
    tokenizer.pad_token = tokenizer.unk_token = None
    assert DehvfProcessor(tiny_image_processor(), tokenizer).tokenizer.pad_token == "</s>"


def test_saved_and_loaded_processors_agree(tmp_path):
    vision, text = save_tiny_bases(tmp_path)
    DehvfProcessor.from_vision_text_pretrained(vision, text).save_pretrained(tmp_path / "saved")
    loaded = DehvfProcessor.from_pretrained(tmp_path / "saved")
    arguments = {"images": [image(), None], "text": ["abc", "a"], "return_tensors": "pt"}
    left, right = tiny_processor()(**arguments), loaded(**arguments)
    assert all(torch.equal(left[name], right[name]) for name in left)


def test_counts_of_images_and_texts_must_agree():
    with pytest.raises(ValueError, match="1 images and 2 texts"):
        tiny_processor()(images=[image()], text=["a", "b"])
    with pytest.raises(ValueError, match="3 images and 1 texts"):
        tiny_processor()(images=[image(), None, None], text="a")


def test_two_images_of_one_sample_are_refused():
    with pytest.raises(ValueError, match="2 images, but DEHVF reads one image per text"):
        tiny_processor()(images=[[image(), image()]], text="a")
