# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Reads images, for the processor, training, data checks and the server."""

import base64
import os
from io import BytesIO
from urllib.request import Request, urlopen

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps


# Image processors resize the shorter side to a fixed length, which is at most about this. The longer side is scaled
# too.
RESIZED_SIDE = 512
SMALLEST_FILE = 20  # in bytes: no image is smaller, but names such as "cats" are valid base64


def read_image(entry) -> Image.Image:
    """
    Reads an image in any common form as an RGB image with 8 bits per channel. The EXIF orientation is applied, the
    first frame of an animation is used, and transparent pixels are shown on white.

    Args:
        entry: one of

            - path, `http(s)` URL, data URL or base64 string;
            - `bytes`, binary file, or `{"bytes": ..., "path": ...}` as `datasets` gives it;
            - PIL image of any mode;
            - array or tensor of shape `(height, width)`, `(height, width, channels)` or `(channels, height, width)`
              with 1, 3 or 4 channels and with values in 0..255, in 0..1 (floating point) or in 0..65535 (integers;
              uint16 always).
              Floating point values whose maximum is between 1 and 2 are refused, since they may be in either range. If
              both layouts are possible, arrays are read with channels last and tensors with channels first.

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
        if hasattr(source, "__array__") and not isinstance(source, str):  # NumPy's texts are arrays
            return _to_rgb(_array_to_image(source))
        with Image.open(_find_file(source)) as image:
            return _to_rgb(image)
    except Exception as error:  # Pillow raises many kinds
        path = entry.get("path") if isinstance(entry, dict) else entry
        name = str(path)[:200] if isinstance(path, (str, os.PathLike)) else f"of type {type(entry).__name__}"
        raise ValueError(
            f"The image {name} cannot be read: {error}. Replace it, or give `None` in its place."
        ) from error


def decode_base64(text: str) -> bytes:
    """The bytes of a base64 text or a data URL. Raises `ValueError` if it is neither."""
    encoded = text.partition(",")[2] if text.startswith("data:") else text
    return base64.b64decode("".join(encoded.split()), validate=True)


def _find_file(source):
    """The source as an argument of `Image.open`: a path or a binary file."""
    if isinstance(source, (bytes, bytearray, memoryview)):
        return BytesIO(source)
    if isinstance(source, str) and source.startswith(("http://", "https://")):
        request = Request(source, headers={"User-Agent": "dehvf"})  # some sites refuse the default one
        with urlopen(request, timeout=60) as response:
            return BytesIO(response.read())
    if isinstance(source, str) and not os.path.isfile(source):
        if os.path.isdir(source):
            raise ValueError("it is a folder")
        try:
            decoded = decode_base64(source)
        except ValueError:
            decoded = b""
        if len(decoded) < SMALLEST_FILE:
            raise ValueError("there is no such file, and it is neither a URL nor a base64 string")
        return BytesIO(decoded)
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
    low, high, is_float = values.min(), values.max(), values.dtype.kind in "bf"
    if is_float and low >= 0 and high <= 1:
        values = np.rint(values * 255.0)
    elif values.dtype.kind in "iu" and low >= 0 and (high > 255 or values.dtype == np.uint16) and high <= 65535:
        values = values // 257
    elif not (low >= 0 and high <= 255) or is_float and high < 2:  # NaN fails every comparison
        raise ValueError(f"its values are between {low} and {high}. Scale them to 0..1 (floating point) or 0..255")
    return np.rint(values).astype(np.uint8)


def _to_rgb(image: Image.Image) -> Image.Image:
    _check_size(*image.size)
    has_16_bits = image.mode.startswith("I;16") or (image.mode, image.format) == ("I", "PPM")
    tags = getattr(image, "tag_v2", {})  # of a TIFF file, where a value may also have 12 bits
    image = ImageOps.exif_transpose(image)
    if image.mode[0] in "IF":  # `convert` would clip them to 0..255
        values, transparent = np.asarray(image), image.info.get("transparency")
        bits, *_ = tags.get(ExifTags.Base.BitsPerSample, (16,))
        # All values may be small, so they are scaled by the number of bits
        shades = (values * np.uint32(255) // (2**bits - 1)).astype(np.uint8) if has_16_bits else _to_8_bits(values)
        white_is_zero = tags.get(ExifTags.Base.PhotometricInterpretation) == 0
        image = Image.fromarray(255 - shades if white_is_zero else shades)
        if transparent is not None:
            image.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    transparent = image.info.get("transparency")
    if isinstance(transparent, tuple) and max(transparent) > 255:  # of 16 bits, but Pillow reads 8 bits of each pixel
        image.info["transparency"] = tuple(value >> 8 for value in transparent)
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
            f"{limit // RESIZED_SIDE**2} are allowed (`PIL.Image.MAX_IMAGE_PIXELS`). Resize or crop it"
        )
