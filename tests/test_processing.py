"""The processor: which image belongs to which text, and what the model gets."""

import struct
import zlib

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


# --- images of all sorts ---


def pixels_of(image) -> torch.Tensor:
    return tiny_processor()(images=image, text="a", return_tensors="pt")["pixel_values"]


def shades() -> Image.Image:
    """From black on the left to white on the right."""
    return Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (32, 1)))


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr", "I;16", "I"])
@pytest.mark.parametrize("opened", [True, False], ids=["opened", "path"])
def test_the_same_picture_in_another_mode_gives_nearly_the_same_pixels(mode, opened, tmp_path):
    image = shades()
    if mode.startswith("I"):
        image = Image.fromarray(np.asarray(image).astype(np.uint16 if mode == "I;16" else np.int32) * 257)
    else:
        image = (image.convert("RGB") if mode in ("P", "CMYK", "YCbCr") else image).convert(mode)
    file = tmp_path / ("a.jpg" if mode in ("CMYK", "YCbCr") else "a.tif" if mode == "I" else "a.png")
    image.save(file)
    with Image.open(file) as image:
        pixels = pixels_of(image if opened else str(file))
    # Pixels lie between -2 and 2; a picture of black and white alone has the shades in its dots
    assert (pixels - pixels_of(shades())).abs().mean() < (0.4 if mode == "1" else 0.05)


@pytest.mark.parametrize("form", ["path", "Path", "opened"])
def test_a_photo_taken_sideways_is_turned(form, tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was turned; a viewer has to turn the picture by 90 degrees
    shades().save(tmp_path / "a.png", exif=exif)
    image = {"path": str, "Path": lambda file: file, "opened": Image.open}[form](tmp_path / "a.png")
    assert torch.equal(pixels_of(image), pixels_of(shades().transpose(Image.Transpose.ROTATE_270)))


def test_an_animation_gives_its_first_frame(tmp_path):
    image("red").save(tmp_path / "a.gif", save_all=True, append_images=[image("blue")])
    assert torch.equal(pixels_of(str(tmp_path / "a.gif")), pixels_of(image("red")))


@pytest.mark.parametrize("size", [(1, 1), (1, 4000), (4000, 1)])
def test_an_image_of_one_pixel_or_one_line_is_an_image(size):
    torch.testing.assert_close(pixels_of(image(size=size)), pixels_of(image()))


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says it is so large, and ends where its pixels should begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "cannot identify"),
        (b"no image", "cannot identify"),
        (png_of(10, 10), "truncated"),
        (png_of(100_000, 100_000), "decompression bomb"),
        (png_of(0, 5), "cannot identify"),
    ],
    ids=["empty", "no image", "cut short", "bomb", "zero pixels"],
)
def test_a_file_that_is_no_image_is_named(content, message, tmp_path):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ValueError, match=f"The image .*a.png cannot be read: .*{message}.*Replace it"):
        pixels_of(str(tmp_path / "a.png"))


@pytest.mark.parametrize(
    "value, message",
    [
        (Image.new("RGB", (0, 5)), "it is 0 x 5 pixels large"),
        (np.zeros((0, 5, 3), np.uint8), r"its shape is \(0, 5, 3\)"),
        (Image.new("F", (5, 5)), "floating-point numbers. Scale them"),
        (5, "The image 5 cannot be read"),
        ("nowhere.png", "The image nowhere.png cannot be read"),
        (np.full((5, 5, 3), np.nan), "nan"),
        (np.full((5, 5, 3), 65535, np.uint16), "outside the range"),
    ],
    ids=["no pixels", "empty array", "floats", "number", "missing", "nan", "16-bit array"],
)
def test_what_cannot_be_an_image_is_refused(value, message):
    with pytest.raises(ValueError, match=message):
        pixels_of([value])
