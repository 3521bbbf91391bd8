# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Images and text, or chat messages, to the tensors that DEHVF takes."""

import base64
import os
from io import BytesIO
from tempfile import TemporaryDirectory
from urllib.request import Request, urlopen

import numpy as np
import torch
from huggingface_hub import CommitInfo, upload_folder
from PIL import Image, ImageOps
from transformers import AutoTokenizer
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # at the top it may need torchvision
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME, cached_file

from .configuration_dehvf import DehvfConfig
from .hub_dehvf import open_repository


# Image processors resize the shorter side to a fixed length, at most about this one. The longer side grows with it.
RESIZED_SIDE = 512

# Leaves the text of each message and drops its images, since templates of language models expect plain strings
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
            {{- ' ' + message['content'] + eos_token -}}
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


def read_image(entry) -> Image.Image:
    """
    Reads an image in any common form as an RGB image: upright as its EXIF orientation says, the first frame of an
    animation, on white where it is transparent, with 8 bits per channel.

    Args:
        entry: one of

            - path, `http(s)` URL, data URL or base64 string;
            - `bytes`, binary file, or `{"bytes": ..., "path": ...}` as `datasets` gives it;
            - PIL image of any mode;
            - array or tensor of shape `(height, width)`, `(height, width, channels)` or `(channels, height, width)`
              with 1, 3 or 4 channels and with values in 0..255, in 0..1 (floating point) or in 0..65535 (integers).
              Where both layouts fit, an array has its channels last and a tensor first.

    Raises:
        ValueError: if the image cannot be read, has no pixels or values in another range, or has more than
            `PIL.Image.MAX_IMAGE_PIXELS` pixels, now or with its shorter side resized to 512. The number of pixels is
            checked before they are decoded.
    """
    try:
        source = entry
        if isinstance(source, dict):
            source = source.get("path") if source.get("bytes") is None else source["bytes"]
        if isinstance(source, Image.Image):
            return _to_rgb(source)
        if hasattr(source, "__array__"):
            return _to_rgb(_array_to_image(source))
        with Image.open(_find_file(source)) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow raises many kinds
        path = entry.get("path") if isinstance(entry, dict) else entry
        name = str(path)[:200] if isinstance(path, (str, os.PathLike)) else f"of type {type(entry).__name__}"
        raise ValueError(
            f"The image {name} cannot be read: {error}. Replace it, or give `None` in its place."
        ) from error


def _find_file(source):
    """What `Image.open` takes: a path or a binary file."""
    if isinstance(source, (bytes, bytearray)):
        return BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        request = Request(source, headers={"User-Agent": "dehvf"})  # some sites refuse the default one
        with urlopen(request, timeout=60) as response:
            return BytesIO(response.read())
    if isinstance(source, str) and not os.path.isfile(source):
        encoded = source.partition(",")[2] if source.startswith("data:") else source
        try:
            return BytesIO(base64.b64decode("".join(encoded.split()), validate=True))
        except ValueError as error:
            raise ValueError("there is no such file, and it is neither a URL nor a base64 string") from error
    if not isinstance(source, (str, os.PathLike)) and not hasattr(source, "read"):
        raise TypeError("expected a path, URL, base64 string, bytes, file, PIL image, array or tensor")
    return source


def _array_to_image(array) -> Image.Image:
    prefers_first = isinstance(array, torch.Tensor)
    if prefers_first:
        array = array.detach().cpu()
        array = array.float() if array.is_floating_point() else array  # NumPy has no bfloat16
    array, channels = np.asarray(array), (1, 3, 4)
    shape = array.shape
    if array.ndim == 3 and shape[0] in channels and (prefers_first or shape[2] not in channels):
        array = np.moveaxis(array, 0, 2)
    if 0 in shape or not (array.ndim == 2 or array.ndim == 3 and array.shape[2] in channels):
        raise ValueError(
            f"its shape is {tuple(shape)}. Expected (height, width), (height, width, channels) or "
            "(channels, height, width) with 1, 3 or 4 channels"
        )
    return Image.fromarray(_to_8_bits(array[..., 0] if array.shape[2:] == (1,) else array))


def _to_8_bits(values: np.ndarray) -> np.ndarray:
    if values.dtype == np.uint8:
        return values
    low, high = values.min(), values.max()
    if values.dtype.kind in "bf" and low >= 0 and high <= 1:
        values = np.rint(values * 255.0)
    elif values.dtype.kind in "iu" and low >= 0 and 255 < high <= 65535:
        values = values // 257
    elif not (low >= 0 and high <= 255):  # not a number fails every comparison
        raise ValueError(f"its values are between {low} and {high}. Scale them to 0..1 (floating point) or 0..255")
    return np.rint(values).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    _check_size(*image.size)
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # `convert` would clip them to 0..255
        image = Image.fromarray(_to_8_bits(np.asarray(image)))
    if image.has_transparency_data:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def _check_size(width: int, height: int):
    if not width or not height:
        raise ValueError(f"its size is {width} x {height} pixels")
    limit, aspect_ratio = Image.MAX_IMAGE_PIXELS, max(width, height) / min(width, height)
    if limit is not None and max(width * height, aspect_ratio * RESIZED_SIDE**2) > limit:
        raise ValueError(
            f"its size is {width} x {height} pixels. At most {limit} pixels and an aspect ratio of "
            f"{limit // RESIZED_SIDE**2} are allowed. Resize or crop it, or raise `PIL.Image.MAX_IMAGE_PIXELS`"
        )


class DehvfProcessor(ProcessorMixin):
    """
    Combines an image processor and a tokenizer. There is no image token: a question has the same text with and
    without an image, and image `i` belongs to text `i`.

    A call with `images` and `text` returns `input_ids` and `attention_mask`, padded on the left, and, if any sample
    has an image, `pixel_values` of shape `(batch_size, num_channels, height, width)` and `image_mask` of shape
    `(batch_size,)`, which is false for samples without an image (their pixels are zero). One text gives a batch of
    one. A text that already begins with the beginning-of-sequence token, as rendered by the chat template, gets no
    special tokens.

    Args:
        image_processor: image processor of the vision encoder.
        tokenizer: tokenizer of the language model. It is set to pad on the left, which generation needs; without a
            padding token it pads with the unknown token or else the end-of-sequence token.
        chat_template (`str`, *optional*): Jinja template. Defaults to that of the tokenizer. If it has none, each
            message is a line of its own, and the answer follows `Response:`.

    Raises:
        ValueError: if a sample has more than one image, the numbers of images and texts differ, or [`read_image`]
            cannot read an image.

    Example:

    ```python
    >>> processor(images=[image, None], text=["What is this?", "What is 2 + 3?"], return_tensors="pt")
    >>> message = {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "Who?"}]}
    >>> processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    ```
    """

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None, **kwargs):
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        if chat_template is None:
            chat_template = KEEP_TEXT + (tokenizer.get_chat_template() if tokenizer.chat_template else CHAT_TEMPLATE)
        super().__init__(image_processor, tokenizer, chat_template=chat_template, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | os.PathLike,
        text_model: str | os.PathLike,
        vision_model_revision: str | None = None,
        text_model_revision: str | None = None,
        **kwargs,
    ):
        """Loads the image processor of `vision_model` and the tokenizer of `text_model`, each a Hub id or folder."""
        kwargs.setdefault("trust_remote_code", False)  # `None` asks in a terminal
        return cls(
            AutoImageProcessor.from_pretrained(vision_model, revision=vision_model_revision, **kwargs),
            AutoTokenizer.from_pretrained(text_model, revision=text_model_revision, **kwargs),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Loads a saved processor or, from a folder or repository that has only a config, those of its bases."""
        kwargs.setdefault("trust_remote_code", False)  # as above
        hub_names = ("cache_dir", "force_download", "local_files_only", "token")
        hub_kwargs = {name: kwargs[name] for name in hub_names if name in kwargs}
        source = {**hub_kwargs, **{name: kwargs[name] for name in ("revision", "subfolder") if name in kwargs}}
        has_processor = cached_file(
            pretrained_model_name_or_path, PROCESSOR_NAME, _raise_exceptions_for_missing_entries=False, **source
        )
        if has_processor:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        config = DehvfConfig.from_pretrained(pretrained_model_name_or_path, **source)
        return cls.from_vision_text_pretrained(
            config.vision_model_id,
            config.text_model_id,
            vision_model_revision=config.vision_model_revision,
            text_model_revision=config.text_model_revision,
            trust_remote_code=kwargs["trust_remote_code"],
            **hub_kwargs,
        )

    def push_to_hub(
        self, repo_id: str, *, private: bool | None = None, token: bool | str | None = None, **kwargs
    ) -> CommitInfo:
        """
        Puts the processor's files into a repository on the Hub, in one commit. A card is left to the model's
        `push_to_hub`, which has something to tell, and the arguments are as there.
        """
        repo_id = open_repository(repo_id, private, token, kwargs.get("revision"))
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder)
            options = {"commit_message": "Upload DEHVF processor", **kwargs}
            return upload_folder(repo_id=repo_id, folder_path=folder, token=token, **options)

    def __call__(self, images=None, text=None, **kwargs):
        defaults = {"padding": True}
        if text is not None:
            text, bos = [text] if isinstance(text, str) else list(text), self.tokenizer.bos_token
            if bos and any(sample.startswith(bos) for sample in text):
                text = [bos + sample.removeprefix(bos) for sample in text]
                defaults["add_special_tokens"] = False
        given = {**kwargs, **kwargs.get("text_kwargs", {})}
        kwargs.update((name, value) for name, value in defaults.items() if name not in given)
        return super().__call__(images=images, text=text, **kwargs)

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        if images is not None:
            is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
            images = [self._read_sample(sample) for sample in (images if is_batch else [images])]
        return images, text, videos, audio

    def _read_sample(self, sample) -> Image.Image | None:
        """The image of a sample, which may be an image, `None`, or a list of at most one image."""
        if isinstance(sample, (list, tuple)):
            if len(sample) > 1:
                raise ValueError(
                    f"A sample has {len(sample)} images, but DEHVF reads one image per text. Pass the others as "
                    "samples of their own, or combine them into one image."
                )
            sample = sample[0] if sample else None
        return None if sample is None else read_image(sample)

    def validate_inputs(self, images=None, text=None, **kwargs):
        super().validate_inputs(images=images, text=text, **kwargs)
        if images is not None and text is not None and len(images) != len(text):
            raise ValueError(
                f"Got {len(images)} images and {len(text)} texts. Pass one entry per text, with `None` for a "
                "text without an image: images=[image, None], text=[question, question]."
            )

    def _process_images(self, images, **kwargs):
        present = [index for index, image in enumerate(images) if image is not None]
        if not present:
            return {}, []
        processed = self.image_processor([images[index] for index in present], **{**kwargs, "return_tensors": "np"})
        pixels = np.asarray(processed["pixel_values"])
        # One row per sample, so that batches can be sliced, gathered and repeated like every other input
        pixel_values = np.zeros((len(images), *pixels.shape[1:]), dtype=pixels.dtype)
        pixel_values[present] = pixels
        image_mask = np.zeros(len(images), dtype=bool)
        image_mask[present] = True
        return {"pixel_values": pixel_values, "image_mask": image_mask}, []

    @property
    def model_input_names(self):
        return [*super().model_input_names, "image_mask"]


DehvfProcessor.register_for_auto_class()

__all__ = ["DehvfProcessor", "read_image"]
