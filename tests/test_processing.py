"""The processor: what it reads, which image belongs to which text, and what the model gets."""

import base64
import json
import os
import pty
import struct
import subprocess
import sys
import zlib
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from threading import Thread

import numpy as np
import pytest
import torch
from datasets import Dataset
from datasets import Image as ImageFeature
from PIL import Image, ImageChops
from tiny import (
    IMAGE_SIZE,
    NUM_PATCHES,
    ROOT,
    DehvfProcessor,
    save_tiny_bases,
    tiny_config,
    tiny_image_processor,
    tiny_model,
    tiny_processor,
    tiny_tokenizer,
)
from tokenizers.processors import TemplateProcessing
from transformers import BitImageProcessorPil, CLIPImageProcessorPil, SiglipImageProcessorPil

from dehvf import processing


num_appended_tokens, read_image = processing.num_appended_tokens, processing.read_image


def image(color="red", size=(20, 30)):
    return Image.new("RGB", size, color)


def pixels_of(image) -> torch.Tensor:
    return tiny_processor()(images=image, return_tensors="pt")["pixel_values"]


@pytest.mark.parametrize(
    "image_processor, size",
    [
        (BitImageProcessorPil(size={"shortest_edge": 256}), {"shortest_edge": 128}),
        (CLIPImageProcessorPil(), {"shortest_edge": 112}),
        (SiglipImageProcessorPil(), {"height": 112, "width": 112}),
    ],
    ids=["DINOv2", "CLIP", "SigLIP"],
)
def test_an_image_processor_is_set_to_another_size(image_processor, size):
    before = image_processor(Image.new("RGB", (300, 200)), return_tensors="np")["pixel_values"]
    assert before.shape == (1, 3, 224, 224)
    processing.set_image_size(image_processor, 112)
    assert dict(image_processor.size) == size
    found = image_processor(Image.new("RGB", (300, 200)), return_tensors="np")["pixel_values"]
    assert found.shape == (1, 3, 112, 112)


# --- texts ---


def test_one_text_is_a_batch_and_several_are_padded_on_the_left():
    assert tiny_processor()(text="ab") == {"input_ids": [[1, 4, 5]], "attention_mask": [[1, 1, 1]]}
    padded = tiny_processor()(text=["abc", "a"])
    assert padded == {"input_ids": [[1, 4, 5, 6], [0, 0, 1, 4]], "attention_mask": [[1, 1, 1, 1], [0, 0, 1, 1]]}
    assert tiny_processor()(text=["abc", "a"], padding=False)["input_ids"] == [[1, 4, 5, 6], [1, 4]]
    assert tiny_processor()(text="a", text_kwargs={"add_special_tokens": False})["input_ids"] == [[4]]


def test_bos_occurs_once_for_every_kind_of_input():
    processor, message = tiny_processor(), [{"role": "user", "content": "abc"}]
    rendered = processor.apply_chat_template(message, add_generation_prompt=True)
    assert rendered == "<s>abc\nResponse:"
    ids = processor(text=rendered)["input_ids"]
    assert ids == processor(text=rendered.removeprefix("<s>"))["input_ids"] and ids[0].count(1) == 1
    assert ids == processor.apply_chat_template(message, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert processor(text=["<s>ab", "ab"])["input_ids"] == [[1, 4, 5], [1, 4, 5]]
    processor.tokenizer.backend_tokenizer.post_processor = None  # a tokenizer that has BOS and does not add it
    assert processor(text=["<s>ab", "ab"])["input_ids"] == [[1, 4, 5], [0, 4, 5]], "padded, and no BOS"
    processor.tokenizer.bos_token = None
    assert processor.apply_chat_template(message) == "abc\n"


def test_the_assistant_mask_covers_answers_and_their_ends():
    turns = [
        {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "who?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "me"}]},
        {"role": "user", "content": "why?"},
        {"role": "assistant", "content": "A"},
    ]
    processor = tiny_processor()
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True, "return_tensors": "pt"}
    batch = processor.apply_chat_template([turns, turns[:2]], **options)
    masks = batch["assistant_masks"].bool()
    texts = [processor.tokenizer.convert_ids_to_tokens(ids[mask]) for ids, mask in zip(batch["input_ids"], masks)]
    assert texts == [[" ", "m", "e", "</s>", " A", "</s>"], [" ", "m", "e", "</s>"]]
    assert len(batch["pixel_values"]) == 2 and "image_mask" not in batch
    assert processor.apply_chat_template(turns) == "<s>who?\nResponse: me</s>\nwhy?\nResponse: A</s>\n"


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<image>\nwho?", "who?"),
        ("<s><image>\nwho?", "<s>who?"),
        ("A: <image>\nwho? B:", "A: who? B:"),
        ("who? <image>", "who?"),
        ("who <image> is", "who is"),
        ("who <is>", "who <is>"),
    ],
)
def test_an_image_marker_of_llava_is_removed(text, expected):
    processor = tiny_processor()
    processor.max_images = 2
    assert processor(images=image(), text=text)["input_ids"] == processor(images=image(), text=expected)["input_ids"]
    without_image = processor.tokenizer([text.removeprefix("<s>")])["input_ids"]
    assert processor(text=text)["input_ids"] == without_image, "`<image>` may be what the question is about"
    both = processor(images=[[image(), image()]], text="<image><image>\nwho?")
    assert both["input_ids"] == processor(text="who?")["input_ids"]
    with pytest.raises(ValueError, match="in a text is 1, and that of its images is 2. .*leave the markers out"):
        processor(images=[[image(), image()]], text="<image>\nwho?")


@pytest.mark.parametrize("text", [{"role": "user"}, {"a", "b"}, [], ["a", None]])
def test_a_value_that_is_no_list_of_texts_is_refused(text):
    with pytest.raises(ValueError, match="Give a text, or a list of at least one text"):
        tiny_processor()(text=text)


@pytest.mark.parametrize("where", ["argument", "text_kwargs"])
def test_a_tokenizer_that_appends_eos_gives_the_requested_length(where):
    tokenizer = tiny_tokenizer()
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    processor = DehvfProcessor(tiny_image_processor(), tokenizer)

    def ids(text, **options):
        return processor(text=text, **({"text_kwargs": options} if where == "text_kwargs" else options))["input_ids"]

    for text in ("abc", "<s>abc"):
        assert ids(text, padding="max_length", max_length=8) == [[0] * 4 + ids("abc")[0]]
    assert ids("aefghij", truncation=True, max_length=4) == [ids("aefghij")[0][:4]]


def test_a_chat_template_given_at_loading_gets_the_text_of_a_message(tmp_path):
    tiny_processor().save_pretrained(tmp_path)
    template = "{% for message in messages %}{{ message['content'] + '!' }}{% endfor %}"
    chat = [{"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "who?"}]}]
    processor = DehvfProcessor.from_pretrained(tmp_path, chat_template=template)
    processor.save_pretrained(tmp_path)
    for loaded in (processor, DehvfProcessor.from_pretrained(tmp_path)):
        assert loaded.apply_chat_template(chat) == "who?!"
        assert loaded.chat_template.count(processing.KEEP_TEXT) == 1


def test_all_chat_templates_of_a_tokenizer_are_kept(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {name: "{{ messages[0]['content'] }} " + name for name in ("default", "tool_use")}
    processor = DehvfProcessor(tiny_image_processor(), tokenizer)
    processor.save_pretrained(tmp_path)
    chat = [{"role": "user", "content": [{"type": "text", "text": "who?"}]}]
    for loaded in (processor, DehvfProcessor.from_pretrained(tmp_path)):
        assert loaded.apply_chat_template(chat) == "who? default"
        assert loaded.apply_chat_template(chat, chat_template="tool_use") == "who? tool_use"


def test_an_answer_that_was_generated_continues_a_chat_as_in_training():
    question, processor = {"role": "user", "content": "who?"}, tiny_processor()
    chats = [[question, {"role": "assistant", "content": answer}, question] for answer in ("me", " me")]
    first, second = (processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats)
    assert first == second


@pytest.mark.parametrize("as_parts", [False, True])
def test_image_markers_are_removed_from_messages(as_parts):
    def turns(first, second):
        first, second = ([{"type": "text", "text": text}] if as_parts else text for text in (first, second))
        picture = {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "a"}]}
        answer = {"role": "assistant", "content": None}
        return [picture, answer, {"role": "user", "content": first}, answer, {"role": "user", "content": second}]

    processor, options = tiny_processor(), {"tokenize": True, "return_dict": True}
    with_marker = processor.apply_chat_template(turns("who?", "<image> is"), **options)
    assert with_marker["input_ids"] == processor.apply_chat_template(turns("who?", "is"), **options)["input_ids"]
    with pytest.raises(ValueError, match="markers in a text is 2, and that of its images is 1"):
        processor.apply_chat_template(turns("<image>", "<image> is"), **options)
    text = [{"role": "user", "content": "<image> is"}]
    assert (
        processor.apply_chat_template(text, **options)["input_ids"] == processor(text="<s><image> is\n")["input_ids"]
    )


@pytest.mark.parametrize(
    "part, message",
    [
        ({"type": "image"}, "of type 'image' without the image. Add it to the part"),
        ({"type": "image", "image": None}, "of type 'image' without the image"),
        ({"type": "image_url", "image_url": {"url": None}}, "of type 'image' without the image"),
        ({"type": "video", "video": "a.mp4"}, "a part of type 'video'. Give parts of type 'text' and 'image'"),
        ({"type": "text", "content": "who"}, "'content': 'who'.* Give its text as a string under 'text'"),
        ({"type": "text", "text": None}, "Give its text as a string under 'text'"),
    ],
)
def test_parts_of_messages_that_would_be_left_out_are_refused(part, message):
    messages = [{"role": "user", "content": [part, {"type": "text", "text": "what"}]}]
    processor = tiny_processor()
    for chats in (messages, [messages]):
        with pytest.raises(ValueError, match=message):
            processor.apply_chat_template(chats, tokenize=True, return_dict=True)
    text = processor.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}]}], add_generation_prompt=True
    )
    assert "pixel_values" in processor(images=image(), text=text)


@pytest.mark.parametrize(
    "chat, message",
    [
        ("hello", "A chat is a list of messages such as .* Got 'hello'"),
        ([], r"A chat is a list of messages such as .* Got \[\]"),
        ([[]], "A chat is a list of messages"),
        (["hello"], "A chat is a list of messages such as .* Got 'hello'"),
        (
            [{"role": "user", "content": ["hello"]}],
            r"content of a message is \['hello'\]. Give a text, or a list of parts",
        ),
        ([{"role": "user", "content": {"type": "text", "text": "a"}}], "Give a text, or a list of parts"),
        ([{"role": "user", "content": "a", "images": [image()]}], "has the key 'images'. Give each image as a part"),
    ],
)
def test_chats_of_another_form_are_refused(chat, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor().apply_chat_template(chat, tokenize=True, return_dict=True)


def test_an_image_is_found_under_each_key_of_its_part(tmp_path):
    processor, file = tiny_processor(), tmp_path / "a.png"
    image().save(file)
    encoded, place = base64.b64encode(file.read_bytes()).decode(), str(file)
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    expected = processor(images=image(), text="a", return_tensors="pt")["pixel_values"]
    values = {"image": image(), "url": place, "path": place, "base64": encoded, "image_url": {"url": place}}
    for kind in ("image", "image_url"):
        for key, value in [*values.items(), ("image_url", place)]:
            message = {"role": "user", "content": [{"type": kind, key: value}, {"type": "text", "text": "who"}]}
            found = processor.apply_chat_template([message], **options)
            assert torch.equal(found["pixel_values"], expected), (kind, key)
            assert message["content"][0] == {"type": kind, key: value}


def test_threads_share_a_processor():
    processor, texts = tiny_processor(), [["a" * number, "b"] for number in range(1, 30)]
    expected = [processor(text=pair, return_tensors="pt")["input_ids"] for pair in texts]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda pair: processor(text=pair, return_tensors="pt")["input_ids"], 8 * texts))
    assert all(torch.equal(ids, other) for ids, other in zip(found, 8 * expected, strict=True))
    num_appended_tokens(processor.tokenizer)
    assert processor.tokenizer.backend_tokenizer.padding is not None


def test_a_tokenizers_own_chat_template_is_used(tmp_path):
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = "{% for message in messages %}{{ 'Q:' + message.content + '\n' }}{% endfor %}"
    processor = DehvfProcessor(tiny_image_processor(), tokenizer)
    message = {"role": "user", "content": [{"type": "image", "image": image()}, {"type": "text", "text": "why?"}]}
    assert processor.apply_chat_template([message]) == "Q:why?\n"
    inputs = processor.apply_chat_template([message], tokenize=True, return_dict=True)
    assert inputs["input_ids"][0][0] == 1 and inputs["pixel_values"].shape[0] == 1
    processor.save_pretrained(tmp_path)
    assert DehvfProcessor.from_pretrained(tmp_path).chat_template == processor.chat_template
    assert DehvfProcessor(tiny_image_processor(), tokenizer, chat_template="mine").chat_template == "mine"


def test_a_tokenizer_without_padding_token_gets_one():
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    assert DehvfProcessor(tiny_image_processor(), tokenizer).tokenizer.pad_token == "<unk>"
    tokenizer.pad_token = tokenizer.unk_token = None
    assert DehvfProcessor(tiny_image_processor(), tokenizer).tokenizer.pad_token == "</s>"


# --- images and texts ---


def test_a_mixed_batch_marks_the_samples_with_images():
    inputs = tiny_processor()(images=[image(), None, [image("blue")]], text=["abc", "a", "ab"], return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert inputs["image_mask"].tolist() == [True, False, True]
    assert not inputs["pixel_values"][1].any()
    single = tiny_processor()(images=image("blue"), text="ab", return_tensors="pt")
    assert torch.equal(inputs["pixel_values"][2], single["pixel_values"][0])


@pytest.mark.parametrize("images", [None, [None, None], [[], None]])
def test_pixels_are_absent_where_no_sample_has_an_image(images):
    inputs = tiny_processor()(images=images, text=["abc", "a"], return_tensors="pt")
    assert set(inputs) == {"input_ids", "attention_mask"}


def test_output_feeds_the_model_as_it_is():
    model, processor = tiny_model(), tiny_processor()
    inputs = processor(images=[image(), None], text=["abc", "a"], return_tensors="pt")
    assert torch.equal(inputs["input_ids"], processor(text=["abc", "a"], return_tensors="pt")["input_ids"])
    assert model(**inputs).visual_memory.shape[3] == NUM_PATCHES
    assert model.generate(**inputs, max_new_tokens=2).shape[0] == 2
    without_text = processor(images=image(), return_tensors="pt")
    assert set(without_text) == {"pixel_values"}
    assert model.get_image_features(**without_text) is not None


def test_saved_and_loaded_processors_agree(tmp_path, caplog):
    vision, text = save_tiny_bases(tmp_path)
    DehvfProcessor.from_vision_text_pretrained(vision, text).save_pretrained(tmp_path / "saved")
    for _ in ("without a config", "with one"):
        loaded = DehvfProcessor.from_pretrained(tmp_path / "saved")
        tiny_config().save_pretrained(tmp_path / "saved")
    assert "You are using a model of type" not in caplog.text
    arguments = {"images": [image(), None], "text": ["abc", "a"], "return_tensors": "pt"}
    left, right = tiny_processor()(**arguments), loaded(**arguments)
    assert all(torch.equal(left[name], right[name]) for name in left)


@pytest.mark.parametrize(
    "images, text, message",
    [
        ([image()], ["a", "b"], "`images` has 1 entries and `text` has 2"),
        ([image(), None, None], "a", "`images` has 3 entries and `text` has 1"),
        ([[image(), image()]], "a", "2 images, but this adapter reads at most 1 per text"),
    ],
)
def test_images_that_do_not_fit_the_texts_are_refused(images, text, message):
    with pytest.raises(ValueError, match=message):
        tiny_processor()(images=images, text=text)


def output_in_terminal(script: str) -> str:
    """What a Python script prints in a terminal, in which somebody could answer it."""
    terminal, end = pty.openpty()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, env=environment, stdin=end, stdout=end, stderr=end
    )
    os.close(end)
    output = b""
    try:
        while chunk := os.read(terminal, 4096):
            output += chunk
    except OSError:  # the terminal was closed
        pass
    finally:
        os.close(terminal)
    assert process.wait() == 0, output.decode()
    return output.decode()


def test_loading_never_asks_whether_to_run_code(tmp_path):
    """A saved folder names our code, and a base may name its own, which must not run unless that is allowed."""
    vision, text = save_tiny_bases(tmp_path)
    config = json.loads((text / "config.json").read_text())
    (text / "config.json").write_text(json.dumps({**config, "auto_map": {"AutoConfig": "code.Config"}}))
    (text / "code.py").write_text("print('code of the base')")
    model = tiny_model()
    model.config.vision_model_id, model.config.text_model_id = str(vision), str(text)
    model.config.save_pretrained(tmp_path / "bare")
    model.config.save_pretrained(tmp_path / "saved")
    tiny_processor().save_pretrained(tmp_path / "saved")
    output = output_in_terminal(
        "from dehvf import DehvfProcessor\n"
        f"for name in ('bare', 'saved'): print(type(DehvfProcessor.from_pretrained('{tmp_path}/' + name)).__name__)"
    )
    assert output.count("DehvfProcessor") == 2
    assert "[y/N]" not in output and "code of the base" not in output


# --- every kind of image ---


def shades(*modes) -> Image.Image:
    """From black on the left to white on the right, converted to one mode after another."""
    picture = Image.fromarray(np.tile(np.linspace(0, 255, 32).astype(np.uint8), (24, 1)))
    for mode in modes:
        picture = picture.convert(mode)
    return picture


def drawing() -> Image.Image:
    """A black square on a ground that is transparent, and black where that is ignored."""
    picture = Image.new("RGBA", (32, 24), (0, 0, 0, 0))
    picture.paste("black", (8, 8, 16, 16))
    return picture


def file_of(picture: Image.Image, kind: str = "PNG", **options) -> bytes:
    picture.save(buffer := BytesIO(), kind, **options)
    return buffer.getvalue()


def tiff_of(values: np.ndarray, bits: int, photometric: int) -> bytes:
    """A TIFF file of 12 or 16 bits, in which 0 is white (`photometric` 0) or black (1)."""
    data = values.astype("<u2").tobytes()
    if bits == 12:  # two values in three bytes
        data = b"".join((int(a) << 12 | int(b)).to_bytes(3, "big") for a, b in values.reshape(-1, 2))
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: photometric, 273: 122, 277: 1, 278: height}
    tags[279] = len(data)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + data


ARRAY, GREY = np.asarray(shades("RGB")), np.asarray(shades())
TENSOR = torch.from_numpy(ARRAY.copy()).permute(2, 0, 1)
PNG = file_of(shades())
TURNED = Image.Exif()
TURNED[0x112] = 6  # a viewer has to turn the picture clockwise by 90 degrees

# Each kind of image, and how far its pixels may be from those of the plain picture
IMAGES = {
    "bytes": (PNG, 0),
    "bytearray": (bytearray(PNG), 0),
    "file": (BytesIO(PNG), 0),
    "base64": (base64.b64encode(PNG).decode(), 0),
    "base64 in lines": (base64.encodebytes(PNG).decode(), 0),
    "data URL": ("data:image/png;base64," + base64.b64encode(PNG).decode(), 0),
    "datasets": ({"bytes": PNG, "path": "gone.png"}, 0),
    "opened file": (Image.open(BytesIO(PNG)), 0),
    **{mode: (shades(mode), 0) for mode in ("L", "LA", "PA", "P", "RGB", "RGBA", "RGBX")},
    **{mode: (shades("RGB", mode), 3) for mode in ("CMYK", "YCbCr", "HSV", "LAB")},
    "RGBa": (shades("RGBA", "RGBa"), 0),
    "1": (shades("1"), 255),  # the shades are in its dots
    "I;16": (Image.fromarray(GREY.astype(np.uint16) * 257), 0),
    "I;16B": (Image.frombytes("I;16B", (32, 24), (GREY.astype(">u2") * 257).tobytes()), 0),
    "I": (Image.fromarray(GREY.astype(np.int32) * 257), 0),
    "I up to 255": (Image.fromarray(GREY.astype(np.int32)), 0),
    "F up to 1": (Image.fromarray(GREY.astype(np.float32) / 255), 0),
    "F up to 255": (Image.fromarray(GREY.astype(np.float32)), 0),
    "16-bit PNG": (file_of(Image.fromarray(GREY.astype(np.uint16) * 257)), 0),
    "16-bit PGM": (b"P5 32 24 65535\n" + (GREY.astype(">u2") * 257).tobytes(), 0),
    "12-bit TIFF": (tiff_of(GREY.astype(int) * 4095 // 255, 12, 1), 1),
    "16-bit TIFF": (tiff_of(GREY.astype(int) * 257, 16, 1), 0),
    "16-bit TIFF in which 0 is white": (tiff_of(65535 - GREY.astype(int) * 257, 16, 0), 0),
    "float TIFF": (file_of(Image.fromarray(GREY.astype(np.float32)), "TIFF"), 0),
    "JPEG in CMYK": (file_of(shades("RGB", "CMYK"), "JPEG"), 8),
    "AVIF": (file_of(shades(), "AVIF"), 8),
    "GIF": (file_of(shades(), "GIF", save_all=True, append_images=[image(size=(32, 24))]), 1),
    "turned": (file_of(shades().transpose(Image.Transpose.ROTATE_90), exif=TURNED), 0),
    "array": (ARRAY, 0),
    "array, channels first": (ARRAY.transpose(2, 0, 1), 0),
    "array of floats up to 1": (ARRAY / 255, 0),
    "array of floats up to 255": (ARRAY.astype(np.float32), 0),
    "array of 16 bits": (ARRAY.astype(np.uint16) * 257, 0),
    "array of int64": (ARRAY.astype(np.int64), 0),
    "memoryview": (memoryview(PNG), 0),
    "text of NumPy": (np.str_(base64.b64encode(PNG).decode()), 0),
    "array without channels": (GREY, 0),
    "array with one channel": (GREY[..., None], 0),
    "array with one channel first": (GREY[None], 0),
    "array with transparency": (np.asarray(shades("RGBA")), 0),
    "tensor": (TENSOR, 0),
    "tensor, channels last": (TENSOR.permute(1, 2, 0), 0),
    "tensor of floats": ((TENSOR / 255).requires_grad_(), 0),
    "tensor of bfloat16": ((TENSOR / 255).bfloat16(), 1),
    "tensor without channels": (TENSOR[0], 0),
}


@pytest.mark.parametrize("kind", IMAGES)
def test_every_kind_of_image_gives_the_same_picture(kind):
    entry, tolerance = IMAGES[kind]
    read = read_image(entry)
    assert read.mode == "RGB" and read.size == (32, 24)
    difference = np.abs(np.asarray(read).astype(int) - ARRAY)
    assert difference.max() <= tolerance
    assert torch.equal(pixels_of([entry]), pixels_of(read))


@pytest.mark.parametrize(
    "name, message", [("cats", "there is no such file"), ("a b", "there is no such file"), ("{}", "it is a folder")]
)
def test_a_name_that_is_no_image_is_refused(name, message, tmp_path):
    with pytest.raises(ValueError, match=f"cannot be read: {message}"):
        read_image(name.format(tmp_path))


def test_columns_of_datasets_are_lists_of_images_and_texts():
    images = [shades("RGB"), None, shades("L")]
    rows = Dataset.from_dict({"image": images, "question": ["a", "b", "c"]}).cast_column("image", ImageFeature())
    inputs = tiny_processor()(images=rows["image"], text=rows["question"], return_tensors="pt")
    assert torch.equal(inputs["pixel_values"], pixels_of(images)) and len(inputs["input_ids"]) == 3


def test_a_dark_image_of_16_bits_stays_dark():
    png, pgm = file_of(Image.fromarray(GREY.astype(np.uint16))), b"P5 32 24 65535\n" + GREY.astype(">u2").tobytes()
    for entry in (png, pgm, ARRAY.astype(np.uint16)):
        assert np.array_equal(read_image(entry), np.zeros_like(ARRAY))


def test_an_image_that_needs_no_rescaling_is_read_as_any_other():
    """`transformers` advises `do_rescale=False` for arrays up to 1."""
    pixels = tiny_processor()(images=ARRAY / 255, text="a", do_rescale=False, return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, pixels_of(shades("RGB")))


@pytest.mark.parametrize("form", ["path", "Path", "datasets", "URL"])
def test_an_image_is_read_from_where_it_is(form, tmp_path):
    (tmp_path / "a.png").write_bytes(PNG)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=tmp_path))
    Thread(target=server.serve_forever, daemon=True).start()
    path, url = tmp_path / "a.png", f"http://127.0.0.1:{server.server_port}/a.png"
    entry = {"path": str(path), "Path": path, "datasets": {"bytes": None, "path": str(path)}, "URL": url}[form]
    assert np.array_equal(read_image(entry), ARRAY)
    with pytest.raises(ValueError, match="404|no such file|No such file"):
        read_image({"datasets": {"path": str(path) + "x"}, "Path": tmp_path / "x"}.get(form, str(entry) + "x"))
    server.shutdown()


def png_with_transparent_colour() -> bytes:
    """[`drawing`] as a PNG file of 16 bits, which Pillow does not write, on a coloured ground that is transparent."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    ground = (0x1234, 0x5678, 0x9ABC)
    pixels = np.where(np.asarray(drawing())[..., 3:], 0, ground).astype(">u2")
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in pixels))
    chunks = (b"IHDR", struct.pack(">IIBBBBB", 32, 24, 16, 2, 0, 0, 0)), (b"tRNS", struct.pack(">HHH", *ground))
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in (*chunks, (b"IDAT", data), (b"IEND", b"")))


TRANSPARENT = {
    "RGBA": drawing(),
    "LA": drawing().convert("LA"),
    "PA": Image.frombytes("PA", (32, 24), drawing().convert("LA").tobytes()),
    "RGBa": drawing().convert("RGBa"),
    "PNG with a palette": file_of(drawing().quantize(4)),
    "GIF": file_of(drawing(), "GIF"),
    "PNG with a transparent shade": file_of(ImageChops.invert(drawing().getchannel("A")), transparency=255),
    "PNG of 16 bits with a transparent shade": file_of(
        Image.fromarray(257 * np.asarray(ImageChops.invert(drawing().getchannel("A"))).astype(np.uint16)),
        transparency=65535,
    ),
    "PNG with a transparent colour": file_of(
        Image.alpha_composite(Image.new("RGBA", (32, 24), "red"), drawing()).convert("RGB"), transparency=(255, 0, 0)
    ),
    "PNG of 16 bits with a transparent colour": png_with_transparent_colour(),
    "WebP": file_of(drawing(), "WEBP", lossless=True),
    "array": np.asarray(drawing()),
}


@pytest.mark.parametrize("kind", TRANSPARENT)
def test_what_is_transparent_is_white(kind):
    expected = Image.new("RGB", (32, 24), "white")
    expected.paste("black", (8, 8, 16, 16))
    assert np.array_equal(read_image(TRANSPARENT[kind]), expected)
    half = Image.new("RGBA", (32, 24), (0, 0, 0, 128))
    assert read_image(half).getpixel((0, 0)) == (127, 127, 127)


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says it is so large, and ends where its pixels should begin."""
    head = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    head = struct.pack(">I", 13) + head + struct.pack(">I", zlib.crc32(head))
    return b"\x89PNG\r\n\x1a\n" + head + struct.pack(">I", 1000) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    "entry, message",
    [
        (b"", "cannot identify"),
        (b"no image", "cannot identify"),
        (png_of(10, 10), "truncated"),
        (png_of(100_000, 100_000), "decompression bomb"),
        (
            png_of(13_000, 13_000),
            "13000 x 13000 pixels. At most 89478485 pixels.*`PIL.Image.MAX_IMAGE_PIXELS`.*Resize",
        ),
        (image(size=(8000, 1)), "8000 x 1 pixels. At most .* an aspect ratio of 341"),
        (png_of(0, 5), "cannot identify"),
        (Image.new("RGB", (0, 5)), "0 x 5 pixels"),
        (Image.new("F", (5, 5), 300), "between 300.0 and 300.0. Scale them"),
        (np.full((5, 5, 3), np.nan), "between nan and nan"),
        (np.full((5, 5, 3), -1), "between -1 and -1"),
        (np.full((5, 5), 65536), "between 65536 and 65536"),
        (np.linspace(0, 1.01, 25).reshape(5, 5), "between 0.0 and 1.01. Scale them"),  # as bicubic resizing gives them
        (np.zeros((0, 5, 3), np.uint8), r"shape is \(0, 5, 3\)"),
        (torch.zeros(3, 5, 5, 1), r"shape is \(3, 5, 5, 1\). Expected \(height, width\)"),
        (5, "type int cannot be read: expected a path"),
        ({"bytes": None, "path": None}, "type dict cannot be read: expected a path"),
        ("nowhere.png", "nowhere.png cannot be read: there is no such file, and it is neither"),
    ],
)
def test_a_value_that_is_no_image_is_refused_in_one_line(entry, message):
    with pytest.raises(ValueError, match=f"^The image .*{message}.*Replace it") as error:
        pixels_of([entry])
    assert len(str(error.value).splitlines()) == 1


def test_the_limit_of_pixels_can_be_raised_or_removed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    with pytest.raises(ValueError, match="At most 10000 pixels"):
        read_image(image(size=(1000, 11)))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    assert read_image(image(size=(8000, 1))).size == (8000, 1)
    assert read_image(image(size=(1, 1))).size == (1, 1)


@pytest.mark.parametrize(
    "image_fit, columns, rows",
    [
        (None, [1] * 8 + [0] * 8, [0.5] * 16),
        ("crop", [1] * 8 + [0] * 8, [0.5] * 16),
        ("squash", [1] * 4 + [0] * 12, [0.25] * 16),
        ("pad", [1] * 4 + [0] * 12, [0.5] * 4 + [0.25] * 8 + [0.5] * 4),
    ],
)
def test_image_fit_applies_to_images_that_are_not_square_also_after_saving(image_fit, columns, rows, tmp_path):
    """A picture of 64 x 32 pixels, white up to a quarter of its width or, where the sides are cut off, to a half."""
    white = 32 if image_fit in (None, "crop") else 16
    pixels = np.zeros((32, 64, 3), dtype=np.uint8)
    pixels[:, :white] = 255
    image_processor = tiny_image_processor()
    image_processor.image_mean, image_processor.image_std = [0.5] * 3, [1.0] * 3
    if image_fit is not None:  # as DINOv2 has it: larger at first, and then cropped
        image_processor.size = {"shortest_edge": 2 * IMAGE_SIZE}
    DehvfProcessor(image_processor, tiny_tokenizer(), image_fit=image_fit).save_pretrained(tmp_path)
    processor = DehvfProcessor.from_pretrained(tmp_path)
    values = processor(images=Image.fromarray(pixels), return_tensors="pt")["pixel_values"][0, 0] + 0.5
    torch.testing.assert_close(values[8], torch.tensor(columns, dtype=torch.float32), atol=0.15, rtol=0)
    torch.testing.assert_close(values.mean(dim=1), torch.tensor(rows, dtype=torch.float32), atol=0.03, rtol=0)


@pytest.mark.parametrize("image_fit", [None, "crop", "squash", "pad"])
@pytest.mark.parametrize("size", [(1400, 10), (10, 1400), (1, 1), (3, 5)])
def test_images_of_every_shape_are_fitted(image_fit, size):
    processor = DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), image_fit=image_fit)
    pixels = processor(images=Image.new("RGB", size, "white"), return_tensors="pt")["pixel_values"]
    assert pixels.shape == (1, 3, IMAGE_SIZE, IMAGE_SIZE)


@pytest.mark.parametrize("text", [[], [None], [("a", "b")]])
def test_a_value_that_is_no_text_is_refused(text):
    with pytest.raises(ValueError, match="`text` is .* Give a text, or a list of at least one text"):
        tiny_processor()(text=text)


@pytest.mark.parametrize(
    "parts, message",
    [
        ([], "NoneType for argument image_processor"),
        ([tiny_image_processor()], "NoneType for argument tokenizer"),
        ([tiny_tokenizer(), tiny_image_processor()], "for argument image_processor"),
    ],
)
def test_missing_and_swapped_parts_of_a_processor_are_named(parts, message):
    with pytest.raises(TypeError, match=message):
        DehvfProcessor(*parts)


def test_another_image_fit_is_refused():
    with pytest.raises(ValueError, match="`image_fit` is 'stretch'. Give `crop`, `squash` or `pad`"):
        DehvfProcessor(tiny_image_processor(), tiny_tokenizer(), image_fit="stretch")
