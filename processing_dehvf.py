# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Images and text, or chat messages, to the tensors that DEHVF takes."""

import os
from tempfile import TemporaryDirectory

import numpy as np
from huggingface_hub import CommitInfo, upload_folder
from PIL import Image, ImageOps
from transformers import AutoImageProcessor, AutoTokenizer
from transformers.processing_utils import ProcessorMixin
from transformers.utils import PROCESSOR_NAME, cached_file

from .configuration_dehvf import DehvfConfig
from .hub_dehvf import open_repository


# For base language models, which have no chat format of their own. Images leave no trace in the text.
CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {%- if message['content'] is string -%}
        {%- set text = message['content'] -%}
    {%- else -%}
        {%- set parts = message['content'] | selectattr('type', 'equalto', 'text') -%}
        {%- set text = parts | map(attribute='text') | join('\n') -%}
    {%- endif -%}
    {%- if message['role'] == 'assistant' -%}
        {{- 'Response: ' + text + eos_token + '\n' -}}
    {%- else -%}
        {{- text + '\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- 'Response:' -}}
{%- endif -%}
"""


def to_rgb(image: Image.Image) -> Image.Image:
    """
    An image as the vision encoder is to see it: the right way up, its first frame, without transparency, 8 bits.

    Raises:
        ValueError: if it has no pixels, or floating-point ones, whose range nobody knows.
        OSError, SyntaxError, ...: as Pillow raises them, if a file opened before turns out to be damaged.
    """
    if 0 in image.size:
        raise ValueError(f"it is {image.width} x {image.height} pixels large")
    if image.mode == "F":
        raise ValueError("its pixels are floating-point numbers. Scale them to 0..255 and convert it to mode L")
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):  # 16-bit greys, all of which `convert` would clip to white
        image = Image.fromarray((np.asarray(image).clip(0, 65535) // 257).astype(np.uint8))
    return image.convert("RGB")


class DehvfProcessor(ProcessorMixin):
    """
    An image processor and a tokenizer in one. There is no image token: the text of a question is the same with and
    without an image, and image `i` belongs to text `i`.

    Calling it with `images` and `text` gives `input_ids` and `attention_mask`, padded on the left, and, if any sample
    has an image, `pixel_values` of shape `(batch_size, num_channels, height, width)` and `image_mask` of shape
    `(batch_size,)`, false where a sample has none (its pixels are zero).

    Args:
        image_processor: image processor of the vision encoder.
        tokenizer: tokenizer of the language model. It is set to pad on the left, as generation needs; one without a
            padding token pads with the unknown token, or else the end-of-sequence token.
        chat_template (`str`, *optional*): Jinja template. By default texts stand on lines of their own and the answer
            follows `Response:`.

    Raises:
        ValueError: if a sample has more than one image, images and texts differ in number, or an image cannot be read.

    Example:

    ```python
    >>> processor(images=[image, None], text=["What is this?", "What is 2 + 3?"], return_tensors="pt")
    >>> message = {"role": "user", "content": [{"type": "image", "url": "a.png"}, {"type": "text", "text": "Who?"}]}
    >>> processor.apply_chat_template([message], add_generation_prompt=True, tokenize=True, return_dict=True)
    ```
    """

    text_kwargs = {"padding": True}

    def __init__(self, image_processor=None, tokenizer=None, chat_template: str | None = None, **kwargs):
        tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        super().__init__(image_processor, tokenizer, chat_template=chat_template or CHAT_TEMPLATE, **kwargs)

    @classmethod
    def from_vision_text_pretrained(
        cls,
        vision_model: str | os.PathLike,
        text_model: str | os.PathLike,
        vision_model_revision: str | None = None,
        text_model_revision: str | None = None,
        **kwargs,
    ):
        """The image processor of `vision_model` and the tokenizer of `text_model`, each a Hub id or a folder."""
        return cls(
            AutoImageProcessor.from_pretrained(vision_model, revision=vision_model_revision, **kwargs),
            AutoTokenizer.from_pretrained(text_model, revision=text_model_revision, **kwargs),
        )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike, **kwargs):
        """Where only a model's config stands, as in the source checkout, the processor is made from its bases."""
        hub_kwargs = {
            name: kwargs[name]
            for name in ("cache_dir", "force_download", "local_files_only", "token")
            if name in kwargs
        }
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

    def prepare_inputs_layout(self, images=None, text=None, **kwargs):
        _, text, videos, audio = super().prepare_inputs_layout(text=text, **kwargs)
        if images is not None:
            is_batch = isinstance(images, (list, tuple)) or getattr(images, "ndim", 0) == 4
            images = [self._single_image(entry) for entry in (images if is_batch else [images])]
        return images, text, videos, audio

    def _single_image(self, entry):
        """What a sample may have in place of its image: the image, `None`, or a list of at most one."""
        if isinstance(entry, (list, tuple)):
            if len(entry) > 1:
                raise ValueError(
                    f"A sample has {len(entry)} images, but DEHVF reads one image per text. Give the others as "
                    "samples of their own, or compose them into one image."
                )
            entry = entry[0] if entry else None
        return entry if entry is None else self._read_image(entry)

    def _read_image(self, entry):
        """The image of a file, URL or base64 string; or a PIL image; or an array or tensor, which stays what it is."""
        try:
            if isinstance(entry, (str, os.PathLike)) and os.path.isfile(entry):
                with Image.open(entry) as image:
                    return to_rgb(image)
            image = self.image_processor.fetch_images(entry)
            if isinstance(image, Image.Image):
                return to_rgb(image)
            if 0 in image.shape:
                raise ValueError(f"its shape is {tuple(image.shape)}")
            return image
        except Exception as error:  # Pillow raises many kinds
            raise ValueError(
                f"The image {str(entry)[:200]} cannot be read: {error}. Replace it, or give `None` in its place."
            ) from error

    def validate_inputs(self, images=None, text=None, **kwargs):
        super().validate_inputs(images=images, text=text, **kwargs)
        if images is None or text is None:
            return
        num_texts = 1 if isinstance(text, str) else len(text)
        if len(images) != num_texts:
            raise ValueError(
                f"There are {len(images)} images and {num_texts} texts. Give one entry per text, and `None` for a "
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

__all__ = ["DehvfProcessor"]
