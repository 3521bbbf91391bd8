"""The texts and images in a record of your own data: what is wrong with them, and how an image is read."""

import json
import re
import reprlib
from collections.abc import Callable
from functools import cache

import PIL.Image
from datasets import Image, List
from datasets.utils.file_utils import xopen


# In a row with several images, `image` is the first one and `images` has all of them. In other rows `images` is None.
IMAGE_FEATURES = {"image": Image(), "images": List(Image(decode=False))}
# Keys of an image that is an object, as in data sets on the Hub and in the messages of several APIs
ENCODED_IMAGE, PLACE_OF_IMAGE = ("bytes", "base64", "data"), ("path", "url", "image_url", "file_name", "image")
# The signatures of PNG, JPEG, GIF, WebP, TIFF (two of them) and BMP in base64
BASE64_IMAGE = ("iVBORw0KGgo", "/9j/", "R0lGOD", "UklGR", "SUkq", "TU0AK", "Qk0", "Qk1", "Qk2", "Qk3")


def is_text(value) -> bool:
    """Whether the value is a text that is not blank and can be encoded as UTF-8."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\ud800-\udfff]", value)


def find_text_faults(name: str, value) -> list[str]:
    """What is wrong with a value that must be a text."""
    if is_text(value):
        return []
    if value is None:
        return [f"there is no {name}. Add it, as a text."]
    if isinstance(value, str) and value.strip():
        return [f"{name} is {reprlib.repr(value)}, with half of a surrogate pair. Write the whole character."]
    return [f"{name} is {reprlib.repr(value)}. Make it a text in quotes that is not blank."]


def as_list(value):
    """Decodes a list that is stored as JSON in a cell of CSV or Parquet. Other values are returned unchanged."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def remove_markers(value) -> tuple:
    """
    Removes the `<image>` markers of LLaVA from a text like the processor. Also returns their number. Other values are
    returned unchanged, with 0.
    """
    if not isinstance(value, str) or "<image>" not in value:
        return value, 0
    from dehvf import processing  # takes seconds

    return processing.remove_image_markers(value)


def find_marker_faults(name: str, num_markers: int, num_images: int | None, kinds: str = "") -> list[str]:
    """What is wrong with the number of `<image>` markers of a row, which must be that of the images or zero."""
    if num_markers in (0, num_images) or num_images is None:
        return []
    found = f"{name} {num_markers} `<image>`{kinds}"
    if not num_images:
        return [f"{found}, but there is no image. Add it to the row, or remove `<image>`."]
    images = "one image" if num_images == 1 else f"{num_images} images"
    return [f"{found}, but the row has {images}. Write one for each image, or none."]


def decode_base64(text: str) -> bytes | None:
    """The bytes of a base64 text or a data URL, or `None` if it is neither."""
    from dehvf import images  # takes seconds

    try:
        return images.decode_base64(text)
    except ValueError:
        return None


def image_values(value) -> list:
    """The entries of a column of images, which has one image or a list of them in each row."""
    value = as_list(value)
    return value if isinstance(value, list) else [value]


def is_no_image(value) -> bool:
    """Whether a value is empty, as in an `images` column beside `image`: null, [], [null] or an object of nulls."""
    values = [image.values() if isinstance(image, dict) else [image] for image in image_values(value)]
    return all(part is None for parts in values for part in parts)


def list_images(row: dict) -> list:
    """All images of a row."""
    return row.get("images") or ([] if row["image"] is None else [row["image"]])


def read_image(image) -> PIL.Image.Image | None:
    """Reads an entry of an image column, decoded or not, as an RGB image like the processor; `None` stays `None`."""
    from dehvf import images  # takes seconds

    if image is None:
        return None
    # A place inside an archive, in a streamed data set, or on a file system of `fsspec`
    if isinstance(image, dict) and image["bytes"] is None and re.match(r"(?!https?:)[\w+.-]+://", image["path"]):
        with xopen(image["path"], "rb") as file:
            image = {"bytes": file.read(), "path": image["path"]}
    return images.read_image(image)


def find_reading_faults(image: dict) -> list[str]:
    import dehvf  # noqa: F401  its errors are not those of the image

    try:
        read_image(image)
    except ValueError as error:
        return [str(error)]
    except (ImportError, OSError) as error:  # of a file system
        return [f"The image {image['path']} cannot be read: {error}. Replace it, or give `None` in its place."]
    return []


def image_checker(opens: bool = True) -> Callable[[str], list[str]]:
    """A function that finds what is wrong with the image in a file and opens each file once, or none at all."""
    return cache(lambda path: find_reading_faults({"bytes": None, "path": path}) if opens else [])
