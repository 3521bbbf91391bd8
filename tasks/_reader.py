"""Reads the records of your own data as the rows of a task, and finds the files of their images."""

import os
import re
import reprlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from urllib.parse import unquote

import datasets
import numpy as np
import PIL.Image
from datasets import Audio, ClassLabel, Dataset, Features, Image, IterableDataset, LargeList, List, Value, Video
from datasets.fingerprint import Hasher

from tasks._formats import Rows, read_records
from tasks._values import (
    BASE64_IMAGE,
    ENCODED_IMAGE,
    PLACE_OF_IMAGE,
    as_list,
    decode_base64,
    image_values,
    is_no_image,
    is_text,
    list_images,
)


IMAGE_FOLDERS = ("", "images", "image", "imgs")  # relative to the folder of the file
# Columns with texts that only `--task chat` reads, and what to do with these and with all others that would be lost
TEXTS_OF_CHATS = ("history", "system", "system_prompt")
MAKE_CHATS = "give the texts as messages with `--task chat`, or remove the column if it is not needed."
UNSUPPORTED = (
    "video, audio and tools are not supported. Remove the row, or the column if it is not needed. `--columns "
    "image=COLUMN` ignores video and audio."
)
LONGEST_FILE_NAME = 255  # of the usual file systems; longer texts may be base64


def convert(value, feature):
    """
    A value of a column as the author of the data wrote it: the names of class labels (-1 becomes `None`), and 0.1 for
    the float32 number that Python shows as 0.10000000149011612.
    """
    if isinstance(feature, List | LargeList) and isinstance(value, list):
        return [convert(element, feature.feature) for element in value]
    if isinstance(feature, ClassLabel) and isinstance(value, int):
        return feature.int2str(value) if value >= 0 else None
    if isinstance(feature, Value) and feature.dtype in ("float16", "float32") and isinstance(value, float):
        return float(str(np.dtype(feature.dtype).type(value)))
    return value


def read_weights(value) -> list[float]:
    """The numbers in a column of weights, also as texts of CSV: "0.5", "False", "[False, True]"."""
    parts = as_list(value.lower() if isinstance(value, str) else value)
    weights = []
    for part in parts if isinstance(parts, list) else [parts]:
        part = {"false": 0, "true": 1}.get(part.strip().lower(), part) if isinstance(part, str) else part
        with suppress(TypeError, ValueError):  # no number
            weights.append(float(part))
    return [weight for weight in weights if weight == weight]  # NaN is a missing value of pandas


def without_decoding(feature):
    """A feature, with the images, audio and video in it undecoded."""
    if isinstance(feature, Image | Audio | Video):
        return type(feature)(decode=False)
    if isinstance(feature, List | LargeList):
        return replace(feature, feature=without_decoding(feature.feature))
    if isinstance(feature, dict):
        return {name: without_decoding(part) for name, part in feature.items()}
    return feature


@dataclass(frozen=True)
class Reader:
    """Makes rows from records. It can be pickled, as the workers of a data loader require."""

    task_name: str
    fields: dict[str, tuple[str, ...]]
    folders: tuple[Path, ...]  # in which images are searched for
    place: str  # for messages
    command: str  # which lists all faults
    features: dict = field(default_factory=dict)  # of the columns, if they are known
    has_several_folders: bool = False  # whether it is unknown which of `folders` an image belongs to
    similar: dict[str, tuple[str, str]] = field(default_factory=dict)  # see `Source.find_similar`
    lost: tuple[str, ...] = ()  # see `Source.find_lost`

    def read(self, record: dict) -> tuple[dict, list[str]]:
        """The row of a record, and what is wrong with it."""
        fields, task = self.fields_of(record), import_module(self.task_name)
        images, has_images = fields["image"], self.fields["image"] != ()
        inner = task.find_images(fields) if has_images and hasattr(task, "find_images") else None
        second = self._find_second_images(record)
        if images is not None and inner and inner != image_values(images):
            second.append("there are images in the messages and in a column. Give them in one of the two places.")
        images, faults = self._find_images(inner if images is None else images)
        row, more = task.parse(fields, len(list_images(images)) + len(faults) if has_images else None)
        row, faults = {**images, **row}, self._find_lost(record) + second + faults + more
        return row, faults or self._find_unread(record, row)

    def finds_images(self, record: dict, index: int) -> dict:
        """Whether a record has images in its messages."""
        return {"found": bool(import_module(self.task_name).find_images(self.fields_of(record)))}

    def row(self, record: dict, index: int) -> dict:
        return self.check(f"{self.place}, row {index}", *self.read(record))

    def image(self, record: dict, index: int) -> dict:
        row, faults = self._find_images(self.fields_of(record)["image"])
        return self.check(f"{self.place}, row {index}", row, self._find_second_images(record) + faults)

    def _find_second_images(self, record: dict) -> list[str]:
        """
        Reports a fault if several columns have different images. Only the first of them is read; a later one may
        repeat its first images. `file_name` is ignored beside other columns, since it may be metadata.
        """
        values = {column: image_values(record.get(column)) for column in self.fields["image"]}
        read, *others = [column for column, images in values.items() if not is_no_image(images)] or [None]
        return [
            f"`{read}` and `{column}` have different images. Put all images of a row into `images`."
            for column in others
            if column != "file_name" and values[column] != values[read][: len(values[column])]
        ]

    def _find_lost(self, record: dict) -> list[str]:
        """Faults for columns with a value that would be lost: those in `lost`, and a second one with messages."""
        faults, weights = [], getattr(import_module(self.task_name), "WEIGHTS", ())
        for column in self.lost:
            value = as_list(record.get(column))
            if column in weights:
                if any(weight != 1 for weight in read_weights(value)):
                    faults.append(
                        f"it has the {column} {reprlib.repr(value)}, but the model is trained equally on all rows and "
                        "all messages of the assistant. Remove the row or the column, or split the row."
                    )
            elif value and not is_no_image(value):
                advice = MAKE_CHATS if column in TEXTS_OF_CHATS else UNSUPPORTED
                faults.append(f"it has `{column}`, which is not read: {advice}")
        filled = [column for column in self.fields.get("messages", ()) if record.get(column) not in (None, "", [])]
        return faults + [
            f"`{filled[0]}` and `{column}` both have messages. Give `--columns messages={filled[0]}` to read that "
            "column, or remove one of them."
            for column in filled[1:]
        ]

    def texts(self, record: dict, index: int) -> dict:
        """The row without images of a record that has `num_images` instead of images."""
        row, faults = import_module(self.task_name).parse(self.fields_of(record), record["num_images"])
        faults = self._find_lost(record) + faults
        faults = faults or self._find_unread(record, {**row, "image": record["num_images"] or None})
        return self.check(f"{self.place}, row {index}", row, faults)

    def check(self, where: str, row: dict | None, faults: list[str]) -> dict:
        if faults:
            raise ValueError(f"{where}: {faults[0]}\n`{self.command}` lists all such rows.")
        return row

    def fields_of(self, record: dict) -> dict:
        """Selects the fields of the task from a record. Of several columns, the first with a value is read."""
        fields = dict.fromkeys(self.fields)
        for name, columns in self.fields.items():
            for column in columns:
                value = record.get(column)
                if fields[name] is None and not (is_no_image(value) if name == "image" else value is None):
                    fields[name] = convert(value, self.features.get(column))
        return fields

    def _find_images(self, value) -> tuple[dict[str, dict | list | None], list[str]]:
        """The columns `image` and `images` of a row with an image or a list of images, and what is wrong with them."""
        found = [self._find_image(image) for image in image_values(value)]
        images = [image for image, _ in found if image is not None]
        faults = [fault for _, faults in found for fault in faults]
        if (None, []) in found[: len(images)]:
            faults.append(
                "there is no image (null) before another one of the row, so that later images would change their "
                "places. Give all images, or remove the null."
            )
        row = {"image": images[0] if images else None, "images": images if len(images) > 1 else None}
        return row, faults

    def _find_image(self, value) -> tuple[dict | None, list[str]]:
        """An undecoded image in the form of `datasets.Image`, and what is wrong with it."""
        if value is None:
            return None, []
        if isinstance(value, dict):
            return self._find_in_object(value)
        if isinstance(value, PIL.Image.Image):  # in a column that `datasets` has decoded
            return Image().encode_example(value), []
        if isinstance(value, bytes):
            return {"bytes": value, "path": None}, []
        if not is_text(value):
            return None, [f"`image` is {reprlib.repr(value)}. Make it a file's name in quotes, or null."]
        if value.startswith("file://"):
            value = unquote(value.removeprefix("file://"))
        # Base64 may look like a path: that of a JPEG begins with /9j/
        may_be_base64 = len(value) > LONGEST_FILE_NAME or value.startswith(BASE64_IMAGE) and not self._is_file(value)
        if may_be_base64 and (data := decode_base64(value)):
            return {"bytes": data, "path": None}, []
        if re.match(r"[A-Za-z][\w+.-]*://|data:", value) or os.path.isabs(value):  # a URL or a whole path
            return {"bytes": None, "path": value}, []
        return self._find_file(value)

    def _find_in_object(self, value: dict) -> tuple[dict | None, list[str]]:
        filled = {key: part for key, part in value.items() if part is not None}
        if not filled:
            return None, []
        for key in (key for key in ENCODED_IMAGE if key in filled):
            data = decode_base64(filled[key]) if isinstance(filled[key], str) else filled[key]
            if not isinstance(data, bytes):
                return None, [f"`{key}` of an image is neither bytes nor base64."]
            return {"bytes": data, "path": filled.get("path")}, []
        for key in (key for key in PLACE_OF_IMAGE if key in filled):
            return self._find_image(filled[key])
        keys = ", ".join(map(repr, (*ENCODED_IMAGE, *PLACE_OF_IMAGE)))
        return None, [f"an image is an object with {', '.join(map(repr, filled))}. Give one of {keys}."]

    def _is_file(self, name: str) -> bool:
        return any((folder / inner / name).is_file() for folder in self.folders for inner in IMAGE_FOLDERS)

    def _find_file(self, name: str) -> tuple[dict | None, list[str]]:
        if not self.folders:
            return None, [
                f"`image` is {name!r}, a file beside the data, which was not downloaded. Download the repository "
                "(`hf download --repo-type dataset`) and give its folder."
            ]
        places = [os.path.normpath(Path(folder, inner, name)) for folder in self.folders for inner in IMAGE_FOLDERS]
        if not self.has_several_folders:
            return {"bytes": None, "path": next(filter(os.path.isfile, places), places[0])}, []
        files = list(filter(os.path.isfile, dict.fromkeys(places)))
        if len(files) > 1:
            return None, [
                f"`image` is {name!r}, which may be {files[0]} or {files[1]}. Write its path relative to the folder "
                "of the data."
            ]
        return {"bytes": None, "path": (files or places)[0]}, []

    def _find_unread(self, record: dict, row: dict) -> list[str]:
        """Faults for fields that a row does not have, but its record has under a similar name."""
        if not self.similar:
            return []
        faults, fields = [], self.fields_of(record)
        read = {column for columns in self.fields.values() for column in columns}
        for column, value in record.items():
            name, own = self.similar.get(column.lower(), (None, None))
            if name is None or column in read or value in (None, "", []):
                continue
            if row.get(name, fields[name]) is None:  # some are read into others, such as `system` into `messages`
                faults.append(
                    f"there is no `{name}`, but `{column}` has a value and is not read. Rename it to `{own}`, which "
                    f"other rows use, or give `--columns {name}={own}` to ignore it."
                )
        return faults


def make_dataset(
    rows: list[dict], features: Features, streaming: bool, place: str | Path, split: str
) -> Dataset | IterableDataset:
    """The rows of a split, which were read from `place`. Raises `ValueError` if there are none."""
    if not rows:
        raise ValueError(f"{place} has no rows of the {split} split. Give the complete files.")
    rows = Dataset.from_list(rows, features=features)
    return rows.to_iterable_dataset() if streaming else rows


def raise_first(faults: list[str], place: str | Path):
    """Raises ValueError with the first fault of a data set, and the command that lists the others."""
    if faults:
        lists_all = f"`python -m tasks check {place}` lists all of them."
        raise ValueError(f"{faults[0]}\nThis is the first of {len(faults)} faults: {lists_all}")


def cache_file(fingerprint: str) -> str:
    """
    The file in the cache for a result with a fingerprint. By default `datasets` writes the results for data that
    `save_to_disk` wrote into their folder, which may be read-only or shared.
    """
    folder = Path(datasets.config.HF_DATASETS_CACHE) / "dehvf"
    folder.mkdir(parents=True, exist_ok=True)
    return str(folder / f"{fingerprint}.arrow")


def map_rows(rows: Dataset, function, features: Features, fingerprint: str, desc: str | None = None) -> Dataset:
    """
    `Dataset.map` row by row. The result is written to the cache, and read from there if an earlier run has written it
    with the same fingerprint.
    """
    return rows.map(
        function,
        with_indices=True,
        remove_columns=rows.column_names,
        features=features,
        cache_file_name=cache_file(fingerprint),
        new_fingerprint=fingerprint,
        desc=desc,
    )


def filter_rows(rows: Rows, function) -> Rows:
    """The rows for which a function is true. The result is written to the cache as in [`map_rows`]."""
    if isinstance(rows, IterableDataset):
        return rows.filter(function)
    fingerprint = Hasher.hash([rows._fingerprint, function])
    return rows.filter(function, cache_file_name=cache_file(fingerprint), new_fingerprint=fingerprint)


def undecoded(rows: Rows) -> Rows:
    """Rows with undecoded images. `Dataset.cast` would write lists of images once more, beside the data."""
    features = rows.features and Features({name: without_decoding(part) for name, part in rows.features.items()})
    if features == rows.features:
        return rows
    if isinstance(rows, IterableDataset):
        return rows.cast(features)
    info, fingerprint = rows.info.copy(), Hasher.hash([rows._fingerprint, "undecoded"])
    info.features = features
    return Dataset(rows.data, info, rows.split, indices_table=rows._indices, fingerprint=fingerprint)


def generate_rows(files: list[Path], reader: Reader) -> Iterator[dict]:
    for file in files:
        reader_of_file = replace(reader, folders=tuple(dict.fromkeys((file.parent, *reader.folders))))
        for where, record, faults in read_records(file):
            yield reader.check(where, *((record, faults) if faults else reader_of_file.read(record)))
