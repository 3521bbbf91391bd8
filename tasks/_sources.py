"""
Data of your own: opens a file, a folder or a Hub id in any format that people have, and makes a task's rows of it.

A task that reads such data (`tasks/vqa.py`, `tasks/chat.py`) has, besides the interface in `tasks/__init__.py`,

    FEATURES                  of its rows; one is `image`
    FIELDS                    what it reads: each field with the columns that it may be in, the first one that has it
    REQUIRED                  the fields that every row must have
    parse(record, has_image)  -> the row without its image, and what is wrong with it. The record has all fields, None
                              where there is nothing.
    find_images(record)       optional: the images of a row that has none in a column
"""

import csv
import difflib
import json
import os
import re
import reprlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from importlib import import_module
from itertools import islice
from pathlib import Path
from types import ModuleType

import datasets
import pyarrow as pa
from datasets import (
    ClassLabel,
    Dataset,
    Features,
    Image,
    IterableDataset,
    List,
    concatenate_datasets,
    load_dataset,
    load_from_disk,
)
from datasets.data_files import SPLIT_KEYWORDS
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher


Rows = Dataset | IterableDataset

FORMATS = {"*.jsonl": "JSON Lines", "*.csv": "CSV", "*.parquet": "Parquet", "*.json": "JSON"}  # in this order
IMAGE_FOLDERS = ("", "images", "image", "imgs")  # in the folder of the file
# Names of other data sets for what a task reads
SYNONYMS = {
    "image": (
        "images",
        "img",
        "imgs",
        "picture",
        "pictures",
        "photo",
        "photos",
        "image_path",
        "image_file",
        "image_url",
    )
    + ("image_name", "filename", "filepath", "jpg", "png"),
    "question": ("prompt", "query", "instruction", "problem", "input", "text"),
    "answer": ("label", "labels", "caption", "captions", "response", "output", "target", "solution", "completion"),
    "choices": ("options", "candidates", "alternatives"),
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
}


# ---------------------------------------------------------------------------------------------------------------------
# Splits
# ---------------------------------------------------------------------------------------------------------------------


def split_of(name: str) -> str | None:
    """The split that a name speaks of ("val2014" -> "validation"), `None` if it speaks of none."""
    words = set(re.split(r"[^a-z]+", name.lower()))
    return next((str(split) for split, keywords in SPLIT_KEYWORDS.items() if words & set(keywords)), None)


def choose_split(splits: dict, split: str, path: str, advice: str = ""):
    """
    The value of a split, under its own name or, if only one other name speaks of it, under that (`dev`, `train_sft`).

    Raises:
        ValueError: if there is none, with `advice`.
    """
    names = [split] if split in splits else [name for name in splits if split_of(name) == split]
    if len(names) != 1:
        raise ValueError(f"{path} has no split `{split}`. It has: {', '.join(splits)}.{advice}")
    return splits[names[0]]


def find_files(path: Path, pattern: str) -> dict[str, list[Path]]:
    """
    The files of each split, as their names or the folders that they are in say. Files with another name are the train
    split if no name says so, and are not read otherwise. Those in subfolders are read if the folder itself has none. A
    `path` that is a file is the train split.
    """
    if path.is_file():
        return {"train": [path]} if path.match(pattern) else {}
    files = sorted(path.glob(pattern)) or sorted(path.rglob(pattern))
    splits = {}
    for file in files:
        parts = file.relative_to(path).with_suffix("").parts
        if not any(part.startswith(".") for part in parts):
            split = next((split_of(part) for part in reversed(parts) if split_of(part)), None)
            splits.setdefault(split, []).append(file)
    others = splits.pop(None, [])
    if others and "train" not in splits:
        splits["train"] = others
    return {str(split): splits[split] for split in SPLIT_KEYWORDS if split in splits}


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a `DatasetDict` or a `Dataset` wrote it."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))


def open_dataset(path: str, streaming: bool) -> dict[str, Rows]:
    """
    The splits of a data set on the Hub (`org/name`, or `org/name:config`), of a folder that `save_to_disk` wrote, of a
    Parquet file, or of a folder with Parquet files, such as a clone of the Hub's repository. Files and folders need no
    network.

    Raises:
        OSError: if there is no such folder, and no such data set on the Hub or no network.
        ValueError: if `path` is a file or a folder of another kind.
    """
    folder = Path(path)
    if is_saved(folder):
        rows = load_from_disk(path)
        splits = {"train": rows} if isinstance(rows, Dataset) else rows
        return {name: rows.to_iterable_dataset() if streaming else rows for name, rows in splits.items()}
    if files := find_files(folder, "*.parquet"):
        readme = folder / "README.md"
        if readme.is_file() and re.search(r"^configs:", readme.read_text(encoding="utf-8"), re.MULTILINE):
            return load_dataset(path, streaming=streaming)
        # `load_dataset(path)` would take a folder with more images than Parquet files for an `imagefolder`
        names = {split: [str(file) for file in paths] for split, paths in files.items()}
        return load_dataset("parquet", data_files=names, streaming=streaming)
    if folder.exists():
        raise ValueError(
            f"{path} holds no data set that this task reads: no `dataset_dict.json` or `state.json` (`save_to_disk` "
            "writes them), no Parquet file, and none of the files that the task's docstring in tasks/ names."
        )
    name, _, config = path.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or f"*{folder.suffix}" in FORMATS:
        raise FileNotFoundError(f"There is no file or folder {path}, and no data set on the Hub can have this name.")
    try:
        return load_dataset(name, config or None, streaming=streaming)
    except OSError as error:
        raise OSError(f"There is no folder {path}, and the Hub gave no data set of this name: {error}") from error


# ---------------------------------------------------------------------------------------------------------------------
# Records of JSON and CSV
# ---------------------------------------------------------------------------------------------------------------------

# A record is what is written in a file; it becomes a row. Faults are texts that say what is wrong and what to do.
Record = tuple[str, dict | None, list[str]]  # where it is, the record, its faults


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file. A leading byte order mark of UTF-8 is skipped."""
    is_empty = True
    with open(file, "rb") as lines:
        start = lines.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
    reader = read_csv if file.suffix == ".csv" else read_list if start.startswith(b"[") else read_lines
    try:
        for record in reader(file):
            is_empty = False
            yield record
    except UnicodeDecodeError as error:
        yield str(file), None, [f"no UTF-8 text: {error.reason} at byte {error.start + 1}. Save the file as UTF-8."]
    except csv.Error as error:
        yield str(file), None, [f"no CSV: {error}. Write a comma between cells, and quotes around one with a comma."]
    else:
        if is_empty:
            yield str(file), None, ["no rows. Write one JSON object on each line, one list of them, or CSV."]


def read_lines(file: Path) -> Iterator[Record]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record, faults = None, []
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                form = "one list of objects" if file.suffix == ".json" else "one whole object on each line"
                faults = [f"no JSON: {error.msg} at character {error.pos + 1}. Write {form}."]
            except UnicodeDecodeError as error:
                faults = [f"no UTF-8 text: {error.reason} at byte {error.start + 1}. Save the file as UTF-8."]
            yield f"{file}:{number}", *check_record(record, faults)
            if faults and file.suffix == ".json":  # rather one value over many lines than many bad lines
                return


def read_list(file: Path) -> Iterator[Record]:
    """One list of records, decoded one by one, since Python objects take many times the memory of the text."""
    text, decoder, separator = file.read_text(encoding="utf-8-sig"), json.JSONDecoder(), re.compile(r"[\s,]*")
    place, number = separator.match(text, text.index("[") + 1).end(), 0
    while place < len(text) and text[place] != "]":
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            fault = f"no JSON: {error.msg} at line {error.lineno}, column {error.colno}. Write one list of objects."
            yield f"{file}: row {number}", None, [fault]
            return
        yield f"{file}: row {number}", *check_record(record, [])
        place, number = separator.match(text, place).end(), number + 1
    if place >= len(text):
        yield f"{file}: row {number}", None, ["the list is not closed. Write `]` at its end."]


def read_csv(file: Path) -> Iterator[Record]:
    """A line with the names of the columns, then one record a line. An empty cell is none."""
    csv.field_size_limit(1 << 30)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader, line = csv.DictReader(lines, strict=True), 2
        for cells in reader:
            if None in cells or None in cells.values():
                expected = len(reader.fieldnames)
                fault = f"it has not {expected} cells, as the first line has. Put texts with a comma into quotes."
                yield f"{file}:{line}", None, [fault]
            else:
                yield f"{file}:{line}", {name: cell or None for name, cell in cells.items()}, []
            line = reader.line_num + 1


def check_record(record, faults: list[str]) -> tuple[dict | None, list[str]]:
    if faults or isinstance(record, dict):
        return record, faults
    return None, [f'{reprlib.repr(record)} is no row. Write an object: {{"name": value, ...}}.']


# ---------------------------------------------------------------------------------------------------------------------
# What tasks need to parse records
# ---------------------------------------------------------------------------------------------------------------------


def is_text(value) -> bool:
    """Whether it is a text that is not blank and can be written as UTF-8."""
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
    """A list that is written as JSON in one cell of CSV or Parquet as a list, other values as they are."""
    if isinstance(value, str) and value.lstrip().startswith("["):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def remove_markers(text: str) -> tuple[str, int]:
    """A text without the `<image>` of LLaVA, since an image is no token here, and how often it was there."""
    text, count = re.subn(r"\s*<image>\s*", lambda found: "\n" if "\n" in found[0] else " ", text)
    return (text.strip() if count else text), count


def find_image(value, folders: tuple[Path, ...]) -> tuple[dict | None, list[str]]:
    """An undecoded image as `datasets.Image` has it, and what is wrong with it. A list of one image is that image."""
    if isinstance(value, list):
        value = [image for image in value if image is not None]
        if len(value) > 1:
            return None, [f"it has {len(value)} images. A row has at most one: make a row for each, or leave it out."]
        value = value[0] if value else None
    if isinstance(value, bytes):
        return {"bytes": value, "path": None}, []
    if isinstance(value, dict):
        if value.get("bytes") is not None:
            return {"bytes": value["bytes"], "path": value.get("path")}, []
        value = value.get("path")
    if value is None:
        return None, []
    if not is_text(value):
        return None, [f"`image` is {reprlib.repr(value)}. Make it a file's name in quotes, or null."]
    if re.match(r"[A-Za-z][\w+.-]*:", value) or os.path.isabs(value):  # a URL
        return {"bytes": None, "path": value}, []
    if not folders:
        return None, [
            f"`image` is {value!r}, a file beside the data, which is not downloaded. Download the repository (`hf "
            "download --repo-type dataset`) and give its folder."
        ]
    places = (os.path.normpath(os.path.join(folder, name, value)) for folder in folders for name in IMAGE_FOLDERS)
    first = next(places)
    return {"bytes": None, "path": next(filter(os.path.isfile, (first, *places)), first)}, []


def find_reading_faults(image: dict) -> list[str]:
    from dehvf import images  # takes seconds

    try:
        images.read_image(image)
    except ValueError as error:
        return [str(error)]
    return []


# ---------------------------------------------------------------------------------------------------------------------
# Rows
# ---------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reader:
    """Makes rows of records. It can be pickled, for the workers of a data loader."""

    task_name: str
    fields: dict[str, tuple[str, ...]]
    folders: tuple[Path, ...]  # in which images are looked for
    place: str  # for messages
    command: str  # which names all faults
    labels: dict[str, ClassLabel] = field(default_factory=dict)

    def read(self, record: dict) -> tuple[dict, list[str]]:
        """The row of a record, and what is wrong with it."""
        record, task = self._pick(record), import_module(self.task_name)
        images = record["image"]
        if images in (None, []) and hasattr(task, "find_images"):
            images = task.find_images(record)
        image, faults = find_image(images, self.folders)
        row, more = task.parse(record, image is not None or bool(faults))
        return {"image": image, **row}, faults + more

    def row(self, record: dict, index: int) -> dict:
        return self.check(f"{self.place}, row {index}", *self.read(record))

    def image(self, record: dict, index: int) -> dict:
        image, faults = find_image(self._pick(record)["image"], self.folders)
        return self.check(f"{self.place}, row {index}", {"image": image}, faults)

    def texts(self, record: dict, index: int) -> dict:
        """A row without its image, of a record that has `has_image` in place of it."""
        row, faults = import_module(self.task_name).parse(self._pick(record), record["has_image"])
        return self.check(f"{self.place}, row {index}", row, faults)

    def check(self, where: str, row: dict | None, faults: list[str]) -> dict:
        if faults:
            raise ValueError(f"{where}: {faults[0]}\n`{self.command}` names all such rows.")
        return row

    def _pick(self, record: dict) -> dict:
        """A record with the fields of the task. Class labels have their names; -1 is none."""
        for column, label in self.labels.items():
            if isinstance(number := record.get(column), int):
                record = {**record, column: label.int2str(number) if number >= 0 else None}
        return {
            name: next((record[column] for column in columns if record.get(column) is not None), None)
            for name, columns in self.fields.items()
        }


def generate_rows(files: list[Path], reader: Reader) -> Iterator[dict]:
    for file in files:
        reader_of_file = replace(reader, folders=tuple(dict.fromkeys((file.parent, *reader.folders))))
        for where, record, faults in read_records(file):
            yield reader.check(where, *((record, faults) if faults else reader_of_file.read(record)))


class Source:
    """
    The data of a file, a folder or a Hub id as a task reads it. `splits` has the files of each split or its rows.

    Args:
        columns: which column to read as which field, "question=prompt,image=none".

    Raises:
        OSError: if there is nothing of this name.
        ValueError: if it is of another kind, or if `columns` has another form.
    """

    def __init__(self, task: ModuleType, path: str, columns: str | None = None, streaming: bool = False):
        self.task, self.path, self.columns, self.streaming = task, path, columns, streaming
        self.fields = self._choose_columns()
        folder = Path(path)
        for pattern, self.format in FORMATS.items():
            self.splits = {} if is_saved(folder) else find_files(folder, pattern)
            if self.splits:
                break
        else:
            self.format = "save_to_disk" if folder.exists() else "the Hub"
        self._names = {}
        self.has_files = bool(self.splits) and self.format != "Parquet"
        self.files = self.splits
        if not self.has_files:
            self.splits = open_dataset(path, streaming)

    def _choose_columns(self) -> dict[str, tuple[str, ...]]:
        fields = dict(self.task.FIELDS)
        for pair in self.columns.split(",") if self.columns else ():
            name, _, column = (part.strip() for part in pair.partition("="))
            if name not in fields or not column:
                raise ValueError(
                    f"`--columns {self.columns}`: {pair!r} is not of the form FIELD=COLUMN, where FIELD is one of "
                    f"{', '.join(fields)}."
                )
            fields[name] = () if column == "none" else (column,)
        return fields

    def label(self, split: str) -> str:
        """The split in messages."""
        files = self.files.get(split, ())
        return str(files[0]) if len(files) == 1 else f"{self.path}, {split} split"

    def records(self, split: str) -> Iterator[Record]:
        """Where each record is, the row that it becomes, and what is wrong with it."""
        part = self._part(split)
        if self.has_files:
            for file in part:
                reader = self._reader(split, file.parent)
                for where, record, faults in read_records(file):
                    yield where, *((record, faults) if faults else reader.read(record))
            return
        rows, reader = self._undecoded(part), self._reader(split)
        for index, record in enumerate(rows):
            yield f"{reader.place}, row {index}", *reader.read(record)

    def rows(self, split: str) -> Rows:
        """
        The rows of a split, with the task's `FEATURES`. Unless streamed, they are in the cache of `datasets`; images
        that a Parquet file or `save_to_disk` has are not copied there.

        Raises:
            ValueError: if there is no such split, if a row is not as it should be, or as [`find_missing`].
        """
        part = self._part(split)
        if faults := self.find_missing(split, self.find_absent(split)):
            raise ValueError(faults[0])
        rows = self._read_files(split, part) if self.has_files else self._read_rows(split, part)
        if not self.streaming:
            absent = [name for name in rows.column_names if rows.data.column(name).null_count == len(rows) > 0]
        elif absent := [name for name in self.fields if self.find_missing(split, [name])]:
            first = list(rows.cast_column("image", Image(decode=False)).take(100))
            absent = [name for name in absent if all(row.get(name) is None for row in first)]
        if faults := self.find_missing(split, absent):
            raise ValueError(faults[0])
        return rows

    def names(self, split: str) -> list[str]:
        """The columns of a split; of files with records, the keys of the first 1,000."""
        part = self._part(split)
        if split not in self._names and not self.has_files:
            self._names[split] = list(part.features or next(iter(part)))
        elif split not in self._names:
            records = islice((record for file in part for _, record, _ in read_records(file)), 1000)
            self._names[split] = list(dict.fromkeys(name for record in records for name in record or ()))
        return self._names[split]

    def find_absent(self, split: str) -> list[str]:
        """The fields that are needed, but have no column. None if nothing could be read."""
        names = set(self.names(split))
        return [name for name in self.fields if names and self._is_needed(name) and not names & {*self.fields[name]}]

    def find_missing(self, split: str, absent: list[str]) -> list[str]:
        """
        What to do about fields that no row has, if they are required, if there is a column of a similar name that is
        not read, or if it is the image. A stream may have images in later rows.
        """
        names, faults = self.names(split), []
        read = {column for name, columns in self.fields.items() for column in columns if name not in absent}
        for name in absent:
            columns = self.fields[name]
            unread = [column for column in names if column not in {*read, *columns}]
            similar = [column for column in unread if column.lower() in SYNONYMS.get(name, ())]
            similar += difflib.get_close_matches(name, unread, n=1, cutoff=0.75)
            is_needed = self._is_needed(name) or name == "image" and self._needs_image(split)
            if not columns or not similar and not is_needed:
                continue
            advice = f"Give `--columns {name}={similar[0] if similar else 'COLUMN'}`"
            if name not in self.task.REQUIRED:
                advice += f", or `--columns {name}=none` to do without"
            elif {"messages", "conversations"} & set(unread):
                advice += ", or `--task chat` to train on messages"
            given = f" (`{columns[0]}`)" if columns != self.task.FIELDS[name] else ""
            faults.append(
                f"{self.label(split)}: no row has {'an' if name == 'image' else 'a'} `{name}`{given}. The columns are "
                f"{', '.join(names)}. {advice}."
            )
        return faults

    def _needs_image(self, split: str) -> bool:
        """Whether it is a fault that a split has no image. A stream may have one in later rows."""
        others = [] if split_of(split) == "train" else self.splits
        return not self.streaming and not any(
            row and row["image"] for name in others for _, row, _ in self.records(name)
        )

    def _is_needed(self, name: str) -> bool:
        return name in self.task.REQUIRED or self.fields[name] != self.task.FIELDS[name]

    def _part(self, split: str) -> list[Path] | Rows:
        takes = " Add it, or take one from the train split: `--holdout 0.05` takes 5 % of the rows."
        return choose_split(self.splits, split, self.path, takes if split != "train" else "")

    def _reader(self, split: str, *folders: Path) -> Reader:
        """Images are looked for beside the file, and then in the folder of the data set."""
        task, path = self.task.__name__, Path(self.path)
        parents = [file.parent for file in self.files.get(split, ())] if not self.has_files else []
        folders = dict.fromkeys([*folders, *parents, path.parent if path.is_file() else path])
        command = f"python -m tasks check {self.path} --task {task.rpartition('.')[2]}"
        command += f" --columns {self.columns}" if self.columns else ""
        labels = {}
        if not self.has_files:
            features = self._part(split).features or {}
            labels = {name: feature for name, feature in features.items() if isinstance(feature, ClassLabel)}
        folders = tuple(folders) if path.exists() else ()
        return Reader(task, self.fields, folders, self.label(split), command, labels)

    def _read_files(self, split: str, files: list[Path]) -> Rows:
        reader, features = self._reader(split), self.task.FEATURES
        arguments = {"files": files, "reader": reader}
        if self.streaming:
            return IterableDataset.from_generator(generate_rows, features, arguments)
        fingerprint = self._fingerprint([*files, *(file.parent for file in files), *reader.folders])
        try:
            return Dataset.from_generator(generate_rows, features, gen_kwargs=arguments, fingerprint=fingerprint)
        except DatasetGenerationError as error:
            raise error.__cause__ or error from None

    def _read_rows(self, split: str, rows: Rows) -> Rows:
        rows, reader, features = self._undecoded(rows), self._reader(split), self.task.FEATURES
        if self.streaming:
            names = list(rows.features or next(iter(rows)))
            return rows.map(reader.row, with_indices=True, remove_columns=names, features=features)
        column = next((column for column in self.fields["image"] if column in rows.column_names), None)
        if column is None:
            return self._map(rows, reader.row, features)
        images, texts = rows.select_columns(column), rows.remove_columns(column)
        if isinstance(images.features[column], Image):
            images = images.rename_columns({column: "image"} if column != "image" else {})
        else:
            images = self._map(images, reader.image, Features({"image": Image(decode=False)}))
        has_image = Dataset(pa.table({"has_image": images.with_format("arrow")["image"].is_valid()}))
        texts = concatenate_datasets([texts, has_image], axis=1)
        texts = self._map(
            texts, reader.texts, Features({name: features[name] for name in features if name != "image"})
        )
        return (
            concatenate_datasets([images, texts], axis=1).cast_column("image", Image()).select_columns(list(features))
        )

    def _undecoded(self, rows: Rows) -> Rows:
        """The columns that are read, with undecoded images."""
        names = list(rows.features or next(iter(rows)))
        read = [column for columns in self.fields.values() for column in columns if column in names]
        rows = rows.select_columns(list(dict.fromkeys(read)))
        for column, feature in (rows.features or {}).items():
            if isinstance(feature, Image):
                rows = rows.cast_column(column, Image(decode=False))
            elif isinstance(feature, List) and isinstance(feature.feature, Image):
                rows = rows.cast_column(column, List(Image(decode=False)))
        return rows

    def _map(self, rows: Dataset, function, features: Features) -> Dataset:
        """`Dataset.map` row by row, into the cache even if the data are in a folder that cannot be written to."""
        fingerprint = self._fingerprint(function.__self__.folders, rows._fingerprint, function.__name__)
        folder = Path(datasets.config.HF_DATASETS_CACHE) / "dehvf"
        folder.mkdir(parents=True, exist_ok=True)
        return rows.map(
            function,
            with_indices=True,
            remove_columns=rows.column_names,
            features=features,
            cache_file_name=str(folder / f"{fingerprint}.arrow"),
            new_fingerprint=fingerprint,
        )

    def _fingerprint(self, places: Iterable[Path], *facts) -> str:
        """Of rows that the code of the tasks makes of files, of which some are in one of `places`, and of `facts`."""
        paths = dict.fromkeys(place / name for place in places for name in IMAGE_FOLDERS)
        stamps = [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.exists()]
        code = [file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))]
        return Hasher.hash([stamps, *facts, self.task.__name__, self.fields, *code])


def load(
    task: ModuleType, split: str, path: str | None, streaming: bool, columns: str | None, holdout: float | None
) -> Rows:
    """
    The rows of a split.

    Args:
        holdout: share of the train split that becomes the test split, if there is none, and another such part the
            validation split. They are always the same rows.

    Raises:
        OSError: if there is no such folder, and no such data set on the Hub or no network.
        ValueError: without a path, if `holdout` is no share or cannot be used, or as [`Source`] and [`Source.rows`].
    """
    name = task.__name__.rpartition(".")[2]
    if path is None:
        raise ValueError(f"path is None, but `{name}` reads your own data: give a folder or a Hub id (--data_path).")
    source = Source(task, path, columns, streaming)
    if holdout is None:
        return source.rows(split)
    known = {split_of(name) for name in source.splits}
    missing = [name for name in ("test", "validation") if name not in known]
    if not 0 < holdout < 0.5:
        raise ValueError(f"`--holdout {holdout}` is no share of the rows between 0 and 0.5. Give one, such as 0.05.")
    if not missing:
        raise ValueError(f"`--holdout` was given, but {path} has a test and a validation split. Remove the flag.")
    if split not in ("train", *missing):
        return source.rows(split)
    if streaming:
        raise ValueError("`--holdout` needs the number of rows, which a stream has not. Remove `--streaming`.")
    rows = source.rows("train")
    if len(rows) <= len(missing):
        raise ValueError(f"The train split of {path} has {len(rows)} rows, too few to take others from it.")
    for name in missing:
        parts = rows.train_test_split(holdout, seed=0)
        if name == split:
            return parts["test"]
        rows = parts["train"]
    return rows
