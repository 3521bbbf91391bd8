# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Converts images and text, or chat messages, into the input tensors of DEHVF."""

import os
import re
import reprlib
from collections.abc import Iterable, Mapping, Sequence, Set
from difflib import get_close_matches
from itertools import takewhile
from tempfile import TemporaryDirectory

import numpy as np
from huggingface_hub import CommitInfo, upload_folder
from PIL import Image, ImageOps
from transformers import AutoTokenizer
from transformers.image_utils import ImageInput
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it may need torchvision
from transformers.processing_utils import ProcessingKwargs, ProcessorMixin
from transformers.utils import CONFIG_NAME, PROCESSOR_NAME, cached_file

from .bases_dehvf import has_file, hub_arguments
from .configuration_dehvf import DehvfConfig, read_tiles, shared
from .hub_dehvf import check_upload, open_repository
from .images_dehvf import read_image


# Keeps the text of each message and removes its images, since templates of language models expect plain strings
KEEP_TEXT = """\
{%- set chat = namespace(messages=[]) -%}
{%- for message in messages -%}
    {%- set content = message['content'] or '' -%}
    {%- if content is not string -%}
        {%- set content = content | selectattr('type', 'equalto', 'text') | map(attribute='text') | join('\n') -%}
    {%- endif -%}
    {%- set chat.messages = chat.messages + [dict(message, content=content)] -%}
{%- endfor -%}
{%- set messages = chat.messages -%}
"""

# For base language models, whose tokenizers have no chat template
CHAT_TEMPLATE = """\
{{- bos_token | default('', true) -}}
{%- for message in messages -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Response:' -}}
        {%- generation -%}
            {{- ' ' + message['content'] | trim + eos_token -}}
        {%- endgeneration -%}
        {{- '\n' -}}
    {%- else -%}
        {{- message['content'] + '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Response:' -}}
{%- endif -%}
"""


def keep_text(chat_template: str | dict[str, str]) -> str | dict[str, str]:
    """A chat template, or several by name, with `KEEP_TEXT` before it."""
    if isinstance(chat_template, dict):
        return {name: keep_text(template) for name, template in chat_template.items()}
    return KEEP_TEXT + chat_template.removeprefix(KEEP_TEXT)


def set_image_size(image_processor, image_size: int):
    """Makes an image processor return square images of this size. The cropped fraction does not change."""
    square = {"height": image_size, "width": image_size}
    if getattr(image_processor, "do_center_crop", None):
        scale = image_size / image_processor.crop_size["height"]
        image_processor.size = {name: round(side * scale) for name, side in dict(image_processor.size).items()}
        image_processor.crop_size = square
    else:
        image_processor.size = square


def result_size(image_processor) -> tuple[int, int]:
    """Width and height of the images that an image processor returns."""
    crops = getattr(image_processor, "do_center_crop", None)
    side = dict(image_processor.crop_size if crops else image_processor.size)
    return (side["width"], side["height"]) if "width" in side else (side["shortest_edge"],) * 2


def is_list(images) -> bool:
    """Whether images are a list of images, such as a column of `datasets`, and not the text or bytes of one."""
    return isinstance(images, Sequence) and not isinstance(images, (str, bytes, bytearray, memoryview))


def cut_tiles(image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
    """The tiles of an image, row by row."""
    width, height = image.width // columns, image.height // rows
    corners = [(column * width, row * height) for row in range(rows) for column in range(columns)]
    return [image.crop((left, top, left + width, top + height)) for left, top in corners]


def fit_image(image: Image.Image, image_fit: str, image_processor, rows: int = 1, columns: int = 1) -> Image.Image:
    """Fits an image to the size of a grid of images of the image processor, by default a single one."""
    width, height = result_size(image_processor)
    size = (columns * width, rows * height)
    if image_fit == "squash":
        return image.resize(size, image_processor.resample)
    if image_fit == "crop":
        return ImageOps.fit(image, size, image_processor.resample)
    colour = tuple(round(255 * mean) for mean in image_processor.image_mean or (0.5, 0.5, 0.5))
    # `ImageOps.pad` would make the shorter side of a long image zero
    scale = min(size[0] / image.width, size[1] / image.height)
    inner = max(1, round(image.width * scale)), max(1, round(image.height * scale))
    return ImageOps.pad(image.resize(inner, image_processor.resample), size, image_processor.resample, colour)


# A tokenizer with one word, used to find the special tokens that a post-processor adds
ONE_WORD = '{"added_tokens": [], "model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "a"}}'


def special_tokens_mask(tokenizer) -> list[int]:
    """For each token of the text "a" whether the tokenizer adds it as a special token."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
    if backend.post_processor is None:
        return [0]
    # Calling the tokenizer would reset its padding, which another thread may be using
    one_word = type(backend).from_str(ONE_WORD)
    one_word.post_processor = backend.post_processor
    return one_word.encode("a").special_tokens_mask


def num_appended_tokens(tokenizer) -> int:
    """Number of special tokens that a tokenizer appends to each text, for example because of `add_eos_token`."""
    return len(list(takewhile(bool, reversed(special_tokens_mask(tokenizer)))))


PER_TOKEN = ("token_type_ids", "offset_mapping", "special_tokens_mask")  # what a tokenizer may return beside its ids
IMAGE_OPTIONS = ("image_size", "max_images", "image_tiles")  # of a processor, with the values of its model's config
MARKERS = re.compile(r"(?<!\s)\s*(?:<image>\s*)+")
# Keys of an image in a part of a message
IMAGE_KEYS = ("image", "url", "path", "base64", "image_url")


def remove_image_markers(text: str) -> tuple[str, int]:
    """
    Removes the `<image>` markers of LLaVA with the white space on one side, since there are no image tokens here. Also
    returns their number.
    """

    def space(found: re.Match) -> str:  # the first one beside the markers; none at the ends of the text
        is_inside = found.start() > 0 and found.end() < len(text)
        return re.search(r"\s+|$", found[0])[0] if is_inside else ""

    return MARKERS.sub(space, text), text.count("<image>")


def check_markers(num_markers: int, num_images: int):
    """Raises `ValueError` if a text has `<image>` markers, but not one for each of its images."""
    if num_markers not in (0, num_images):
        raise ValueError(
            f"The number of `<image>` markers in a text is {num_markers}, and that of its images is {num_images}. "
            "There are no image tokens: leave the markers out, or write one for each image."
        )


def check_names(kwargs: dict):
    """Raises `TypeError` for an argument that resembles one of the processor, since `transformers` ignores it."""
    known = (*IMAGE_OPTIONS, "image_fit", "chat_template")
    for name in kwargs.keys() - {*known}:
        if close := get_close_matches(name, known, n=1, cutoff=0.8):
            raise TypeError(f"A processor has no argument `{name}`. Did you mean `{close[0]}`?")


def read_chats(conversation) -> list[list[dict]]:
    """
    The chats of a conversation, or of a list of them, with each image under the key `image` of its part, where
    `transformers` finds it whatever the type of the part.

    Raises:
        ValueError: if a message or part has another form, in which it would be ignored.
    """
    chats = conversation if is_batch_of_chats(conversation) else [conversation]
    chats = [getattr(chat, "messages", chat) for chat in chats]  # of a pipeline's `Chat`
    if not all(isinstance(chat, (list, tuple)) and chat for chat in chats):
        raise _wrong_chat(conversation)
    return [[_read_message(message) for message in chat] for chat in chats]


def remove_markers_of_chat(chat: list[dict]) -> list[dict]:
    """
    Removes the `<image>` markers from the texts of a chat with images, as in training. `chat` is one that
    [`read_chats`] returned.

    Raises:
        ValueError: as in [`check_markers`].
    """
    cleaned, num_markers, num_images = [], 0, 0
    for message in chat:
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        texts = [remove_image_markers(part["text"]) if part["type"] == "text" else ("", 0) for part in parts]
        num_markers += sum(count for _, count in texts)
        num_images += sum(part["type"] == "image" for part in parts)
        parts = [{**part, "text": text} if count else part for part, (text, count) in zip(parts, texts)]
        if content:
            message = {**message, "content": parts[0]["text"] if isinstance(content, str) else parts}
        cleaned.append(message)
    if not num_images:  # `<image>` may be what the question is about
        return chat
    check_markers(num_markers, num_images)
    return cleaned


def is_batch_of_chats(conversation) -> bool:
    first = conversation[0] if isinstance(conversation, (list, tuple)) and conversation else None
    return isinstance(first, (list, tuple)) or hasattr(first, "messages")


def _wrong_chat(given) -> ValueError:
    return ValueError(
        f"A chat is a list of messages such as {{'role': 'user', 'content': 'Who?'}}. Got {reprlib.repr(given)}."
    )


def _read_message(message) -> dict:
    if hasattr(message, "model_dump"):  # of OpenAI's client
        message = message.model_dump()
    if not isinstance(message, dict):
        raise _wrong_chat(message)
    content = message.get("content")
    if misplaced := [key for key in ("image", "images") if message.get(key) is not None]:
        raise ValueError(
            f"A message has the key {misplaced[0]!r}. Give each image as a part of `content`: "
            "{'type': 'image', 'image': image}."
        )
    if content is None or isinstance(content, str):
        return message
    if not isinstance(content, (list, tuple)) or not all(isinstance(part, dict) for part in content):
        raise ValueError(
            f"The content of a message is {reprlib.repr(content)}. Give a text, or a list of parts such as "
            "{'type': 'text', 'text': 'Who?'}."
        )
    return {**message, "content": [_read_part(part) for part in content]}


def _read_part(part: dict) -> dict:
    kind = part.get("type")
    if kind == "text":
        if not isinstance(part.get("text"), str):
            raise ValueError(f"A part of type 'text' is {reprlib.repr(part)}. Give its text as a string under 'text'.")
        return part
    if kind not in ("image", "image_url"):
        raise ValueError(f"A message has a part of type {kind!r}. Give parts of type 'text' and 'image'.")
    image = next((part[key] for key in IMAGE_KEYS if part.get(key) is not None), None)
    if isinstance(image, dict) and "url" in image:  # as in OpenAI's API
        image = image["url"]
    if image is None:
        raise ValueError(
            "A message has a part of type 'image' without the image. Add it to the part as `image`, `url`, `path` "
            "or `base64`; or render the text (`tokenize=False`) and call the processor with `images` and `text`."
        )
    rest = {key: value for key, value in part.items() if key not in IMAGE_KEYS}
    return {**rest, "type": "image", "image": image}


class DehvfProcessorKwargs(ProcessingKwargs, total=False):
    _defaults = {"text_kwargs": {"padding": True}}


@shared
class DehvfProcessor(ProcessorMixin):
    """
    Combines an image processor and a tokenizer. There is no image token: a question has the same text with and without
    an image, and image `i` belongs to text `i`. For a text with several images, entry `i` of `images` is a list.

    A call with `images` and `text` returns `input_ids` and `attention_mask`, padded on the left, and, if any sample
    has an image, `pixel_values` of shape `(batch_size, num_channels, height, width)`. If another sample has none, its
    pixels are zero, and `image_mask` of shape `(batch_size,)` is false for it; there is no `image_mask` otherwise,
    since some trainers, such as TRL's `GRPOTrainer`, only pass on inputs that they know. If any sample has several, or
    tiles, the shapes are `(batch_size, num_images, num_channels, height, width)` and `(batch_size, num_images)`:
    the images of a sample in their order, each followed by its tiles, row by row. A single text gives a batch of one.
    No special tokens are added to texts that already begin with the beginning-of-sequence token, such as the output of
    the chat template, and end-of-sequence tokens that the tokenizer appends are removed. A text with images may
    contain LLaVA's `<image>` once for each of them, which is removed.

    Args:
        image_processor: image processor of the vision encoder.
        tokenizer: tokenizer of the language model. It is set to pad on the left, as generation requires. If it has no
            padding token, it pads with the unknown token or else the end-of-sequence token.
        chat_template (`str`, *optional*): Jinja template. Defaults to the template of the tokenizer. If there is none,
            each message is a separate line, and the answer follows `Response:`.
        image_fit (`str`, *optional*): how an image that is not square is made square: `crop` (to its centre), `squash`
            (change its proportions), or `pad` (with the mean colour of `image_processor`). By default
            `image_processor` decides.
        max_images (`int`): maximum number of images per sample, as in [`DehvfConfig`].
        image_tiles (`str`, *optional*): rows and columns of tiles, as in [`DehvfConfig`]. An image that is wider or
            higher than the output of `image_processor` is fitted to the size of all tiles together, according to
            `image_fit`.

    Raises:
        TypeError: if `image_processor` or `tokenizer` is missing, or is an object of another class.
        ValueError: if `image_fit` or `image_tiles` has another value, a sample has more than `max_images` images or
            a different number of `<image>` markers, the numbers of samples and texts differ, or [`read_image`] cannot
            read an image.

    Example:

    ```python
    >>> processor(images=[image, None], text=["What is this?", "What is 2 + 3?"], return_tensors="pt")
    >>> processor(images=[[first, second]], text="What differs?", return_tensors="pt")  # with `max_images=2`
    >>> message = {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "Who?"}]}
    >>> processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    ```
    """

    valid_processor_kwargs = DehvfProcessorKwargs

    def __init__(
        self,
        image_processor=None,
        tokenizer=None,
        chat_template: str | None = None,
        image_fit: str | None = None,
        max_images: int = 1,
        image_tiles: str | None = None,
        **kwargs,
    ):
        if image_fit not in (None, "crop", "squash", "pad"):
            raise ValueError(f"`image_fit` is {image_fit!r}. Give `crop`, `squash` or `pad`.")
        if image_fit is None and any(read_tiles(image_tiles)):
            image_fit = "crop" if getattr(image_processor, "do_center_crop", None) else "squash"
        self.image_fit, self.max_images, self.image_tiles = image_fit, max_images, image_tiles
        super().__init__(image_processor, tokenizer, **kwargs)  # checks the types
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if chat_template is None:
            chat_template = keep_text(tokenizer.chat_template or CHAT_TEMPLATE)
        self.chat_template = chat_template

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | os.PathLike,
        text_model: str | os.PathLike,
        vision_model_revision: str | None = None,
        text_model_revision: str | None = None,
        chat_template: str | None = None,
        image_size: int | None = None,
        image_fit: str | None = None,
        max_images: int = 1,
        image_tiles: str | None = None,
        **kwargs,
    ):
        """
        Loads the image processor of `vision_model` and the tokenizer of `text_model`, each a Hub id or folder.
        `chat_template` replaces the template of the tokenizer; in it, the `content` of each message is a string.
        `image_size` is the same as in [`DehvfConfig`]; the other arguments are described above.
        """
        check_names(kwargs)
        kwargs.setdefault("trust_remote_code", False)  # `None` would prompt in a terminal
        image_processor = AutoImageProcessor.from_pretrained(vision_model, revision=vision_model_revision, **kwargs)
        if image_size is not None:
            set_image_size(image_processor, image_size)
        tokenizer = AutoTokenizer.from_pretrained(text_model, revision=text_model_revision, **kwargs)
        chat_template = chat_template and keep_text(chat_template)
        options = {"image_fit": image_fit, "max_images": max_images, "image_tiles": image_tiles}
        return cls(image_processor, tokenizer, chat_template=chat_template, **options)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """
        Loads a saved processor. If the folder or repository only has a config, loads the processors of its bases.
        `image_size`, `image_fit`, `max_images`, `image_tiles` and `chat_template` replace what was saved.
        """
        check_names(kwargs)
        kwargs.setdefault("trust_remote_code", False)  # as above
        hub_kwargs = hub_arguments(kwargs)
        source = {**hub_kwargs, **{name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}}
        has_processor = cached_file(
            pretrained_model_name_or_path, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **source
        )
        if has_processor:
            image_size = kwargs.pop("image_size", None)
            if kwargs.get("chat_template") is not None:
                kwargs["chat_template"] = keep_text(kwargs["chat_template"])
            if "config" not in kwargs and has_file(pretrained_model_name_or_path, CONFIG_NAME, **source):
                values, _ = DehvfConfig.get_config_dict(pretrained_model_name_or_path, **source)
                if values.get("model_type") == DehvfConfig.model_type:  # else `AutoTokenizer` warns of an unknown type
                    kwargs["config"] = DehvfConfig.from_dict(values)
            processor = super().from_pretrained(pretrained_model_name_or_path, **kwargs)
            if image_size is not None:
                set_image_size(processor.image_processor, image_size)
            return processor
        config = DehvfConfig.from_pretrained(pretrained_model_name_or_path, **source)
        names = ("vision_model_revision", "text_model_revision", *IMAGE_OPTIONS)
        options = {name: getattr(config, name) for name in names}
        options |= {name: kwargs[name] for name in (*IMAGE_OPTIONS, "image_fit", "chat_template") if name in kwargs}
        options |= {**hub_kwargs, "trust_remote_code": kwargs["trust_remote_code"]}
        return cls.from_vision_text_pretrained(config.vision_model_id, config.text_model_id, **options)

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: bool | str | None = None, **kwargs
    ) -> CommitInfo:
        """
        Uploads the processor's files to a repository on the Hub, in one commit. It does not write a card; the model's
        `push_to_hub`, which has the same arguments, does.

        Raises:
            TypeError, ValueError: for the same arguments as there. Then nothing is on the Hub.
        """
        check_upload(kwargs)
        repo_id = open_repository(repo_id, private, token, kwargs.get("revision"))
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            options = {"commit_message": "Upload DEHVF processor", **kwargs}
            return upload_folder(repo_id=repo_id, folder_path=folder, token=token, **options)

    def __call__(self, images: ImageInput | None = None, text: str | list[str] | None = None, **kwargs):
        if text is not None:
            # Iterating over a dict gives its keys, and over a set its elements in arbitrary order
            is_list_of_texts = isinstance(text, Iterable) and not isinstance(text, (str, Mapping, Set))
            texts, bos = list(text) if is_list_of_texts else [text], self.tokenizer.bos_token
            if not texts or not all(isinstance(sample, str) for sample in texts):
                raise ValueError(f"`text` is {reprlib.repr(text)}. Give a text, or a list of at least one text.")
            text = texts
            given = {**kwargs.get("text_kwargs", {}), **kwargs}
            adds = given.get("add_special_tokens", True)
            if bos and "add_special_tokens" not in given and any(sample.startswith(bos) for sample in text):
                # The others get the tokens that they would get on their own
                added = bos if special_tokens_mask(self.tokenizer)[0] else ""
                text = [sample if sample.startswith(bos) else added + sample for sample in text]
                kwargs["add_special_tokens"] = adds = False
        appended = num_appended_tokens(self.tokenizer) if text is not None and adds else 0
        if appended and given.get("max_length") is not None:
            text_kwargs = {**kwargs.pop("text_kwargs", {}), "max_length": given["max_length"] + appended}
            kwargs = {**{name: kwargs[name] for name in kwargs if name != "max_length"}, "text_kwargs": text_kwargs}
        inputs = super().__call__(images=images, text=text, **kwargs)
        if appended:  # the model cannot answer a prompt that ends with EOS
            if given.get("padding_side", self.tokenizer.padding_side) == "right":
                raise ValueError(
                    f"The tokenizer appends {appended} special tokens to each text, which can only be removed with "
                    "padding on the left. Leave out `padding_side`, or set `add_eos_token=False` in the tokenizer."
                )
            for name in inputs.keys() & {*self.tokenizer.model_input_names, *PER_TOKEN}:
                rows = inputs[name]
                inputs[name] = [row[:-appended] for row in rows] if isinstance(rows, list) else rows[:, :-appended]
        return inputs

    def apply_chat_template(self, conversation, *args, tokenize: bool = False, **kwargs):
        """
        As in `transformers`. A `chat_template` that is given here gets the parts of each message, unlike the
        processor's own, which gets a string.

        Raises:
            ValueError: with `tokenize=True`, if a chat, message or part has another form, such as an image part
                without an image, which would otherwise be ignored silently, or if there are `<image>` markers, but
                not one for each image.
        """
        if tokenize:
            chats = [remove_markers_of_chat(chat) for chat in read_chats(conversation)]
            conversation = chats if is_batch_of_chats(conversation) else chats[0]
        return super().apply_chat_template(conversation, *args, tokenize=tokenize, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        if images is not None:
            is_batch = is_list(images) or getattr(images, "ndim", 0) == 4
            images = [self._read_sample(sample) for sample in (images if is_batch else [images])]
            if text is not None and len(images) == len(text):
                text = [self._remove_markers(sample, len(own)) for sample, own in zip(text, images)]
        return images, text, videos, audio

    def _remove_markers(self, text: str, num_images: int) -> str:
        if not num_images:
            return text
        bos = self.tokenizer.bos_token or ""
        start = bos if text.startswith(bos) else ""
        text, num_markers = remove_image_markers(text.removeprefix(start))
        check_markers(num_markers, num_images)
        return start + text

    def _read_sample(self, sample) -> list[Image.Image]:
        """Reads the images of a sample, which is an image, `None`, or a list of images."""
        images = [image for image in (sample if is_list(sample) else [sample]) if image is not None]
        if len(images) > self.max_images:
            raise ValueError(
                f"A sample has {len(images)} images, but this adapter reads at most {self.max_images} per text "
                "(`max_images`). Pass the others as separate samples, or make an adapter with a larger "
                "`max_images`."
            )
        return [read_image(image) for image in images]

    def validate_inputs(self, images=None, text=None, **kwargs):
        super().validate_inputs(images=images, text=text, **kwargs)
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(
                f"`images` has {len(images)} entries and `text` has {len(text)}. Pass one entry per text, with `None` "
                "for a text without an image and a list for one with several: images=[image, None, [first, second]], "
                "text=[question, question, question]."
            )

    def _process_images(self, images, **kwargs):
        rows, columns = read_tiles(self.image_tiles)
        views, places = [], []
        for sample, own in enumerate(images):
            for number, image in enumerate(own):
                new = self._views(image, rows, columns)
                views += new
                # A tile always has the same index, also after an image that is too small for tiles
                places += [(sample, number * (1 + rows * columns) + view) for view in range(len(new))]
        if not views:
            return {}, []
        if self.image_fit is not None and getattr(self.image_processor, "do_center_crop", None):
            # The image processor of DINOv2 would enlarge the fitted image and crop it again
            kwargs |= {"do_resize": False, "do_center_crop": False}
        kwargs["do_rescale"] = getattr(self.image_processor, "do_rescale", True)  # all were read with 8 bits
        processed = self.image_processor(views, **{**kwargs, "return_tensors": "np"})
        pixels, where = np.asarray(processed["pixel_values"]), tuple(np.transpose(places))
        # One row per sample, so that batches can be sliced, gathered and repeated like every other input
        shape = (len(images), 1 + where[1].max())
        pixel_values = np.zeros((*shape, *pixels.shape[1:]), dtype=pixels.dtype)
        pixel_values[where] = pixels
        image_mask = np.zeros(shape, dtype=bool)
        image_mask[where] = True
        if shape[1] == 1:
            pixel_values, image_mask = pixel_values[:, 0], image_mask[:, 0]
        if image_mask.all():
            return {"pixel_values": pixel_values}, []
        return {"pixel_values": pixel_values, "image_mask": image_mask}, []

    def _views(self, image: Image.Image, rows: int, columns: int) -> list[Image.Image]:
        """The inputs of the image processor for an image: the whole image, and its tiles if it is large."""
        if self.image_fit is None:
            return [image]
        views = [fit_image(image, self.image_fit, self.image_processor)]
        if rows and (image.width > views[0].width or image.height > views[0].height):
            views += cut_tiles(fit_image(image, self.image_fit, self.image_processor, rows, columns), rows, columns)
        return views


DehvfProcessor.register_for_auto_class()

__all__ = ["DehvfProcessor", "read_image"]
