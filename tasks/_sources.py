"""
Your own data: makes the rows of a task from a file, a folder or a Hub id in any of the formats in `tasks/_formats.py`.

A task that reads such data (`tasks/vqa.py`, `tasks/chat.py`) has, in addition to the interface in `tasks/__init__.py`,

    FEATURES                  features of its rows, including IMAGE_FEATURES
    FIELDS                    the fields that it reads, each with the columns that may contain it, in this order
    REQUIRED                  the fields that every row must have
    parse(record, num_images) -> the row without its images, and what is wrong with it. The record has all fields;
                              missing values are None.
    find_images(record)       optional: the images of a row that has none in a column
    find_unread_keys(record)  optional: the keys inside of a field that are not read
    LOST                      optional: columns without which a row has another meaning, and that are not read
    WEIGHTS                   optional: columns that say with 0 or false that a row or a part of it is not trained on
    PARTS                     optional: each split with the names that it may have in the data, in this order
"""

import difflib
import json
import logging
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import suppress
from functools import cache, reduce
from itertools import islice
from pathlib import Path
from types import ModuleType

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import (
    Dataset,
    Features,
    Image,
    IterableDataset,
    Value,
    concatenate_datasets,
)
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher

from tasks._formats import (
    FORMATS,
    KEYS_OF_ROWS,
    Record,
    Rows,
    choose_split,
    find_declared,
    find_files,
    has_format,
    is_saved,
    open_dataset,
    read_records,
    split_of,
    split_of_file,
    stamp_files,
    survey,
)
from tasks._holdout import KEPT_TOGETHER, split_rows
from tasks._reader import Reader, convert, generate_rows, map_rows, undecoded
from tasks._values import IMAGE_FEATURES, is_no_image


logger = logging.getLogger(__name__)

# Names that other data sets use for the fields of a task
SYNONYMS = {
    "image": "images img imgs picture pictures photo image_path image_file image_url image_name filename filepath "
    "image_file_name file_names images_file_names",
    "question": "prompt query instruction problem input text",
    "answer": "label labels caption captions response output target solution completion",
    "choices": "options candidates alternatives answer_choices answer_options multiple_choices",
    "context": "hint hints passage paragraph background input",
    "system": "system_prompt system_message",
    "messages": "conversation dialog dialogue chat turns",
}
# Columns of data sets that have one column for each image of a row
NUMBERED_IMAGE = re.compile(r"(image|img|picture|photo)[ _-]?\d+", re.IGNORECASE)
# Columns of data sets that have one column for each option of a row
OPTION = re.compile(r"[A-F]|(?:choice|option)[ _-]?(?:[a-f]|\d+)", re.IGNORECASE)
# Columns that may name the split of each row
COLUMNS_OF_SPLITS = ("split", "subset", "partition")
# Columns that may have what a row is about, and that no task reads
MEDIA = ("video", "videos", "audio", "audios")
MOST_NOTES = 5  # about files that are not read
MOST_COLUMNS = 20  # in a message


@cache
def warn_once(message: str):
    """Logs a warning, once even if several splits are taken from the same rows."""
    logger.warning(message)


def find_subfolders(folder: str | Path, depth: int) -> Iterator[str]:
    """The folders in a folder, up to a depth, as in `coco/train2017`. Those that cannot be read are skipped."""
    with suppress(PermissionError):
        for entry in os.scandir(folder):
            if entry.is_dir() and not entry.name.startswith("."):
                yield entry.path
                if depth > 1:
                    yield from find_subfolders(entry.path, depth - 1)


def find_filled(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Whether each value of an Arrow column of images has an image, as [`is_no_image`] for values of Python."""
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        is_filled = np.zeros(len(column), dtype=bool)
        is_filled[pc.list_parent_indices(column).filter(find_filled(pc.list_flatten(column)))] = True
        return pa.chunked_array([is_filled])
    if pa.types.is_string(column.type) or pa.types.is_large_string(column.type):  # a list may be stored as JSON
        return pa.chunked_array([[not is_no_image(value.as_py()) for value in column]], pa.bool_())
    if isinstance(column.type, pa.JsonType):
        values = (json.loads(value.as_py() or "null") for value in column)
        return pa.chunked_array([[not is_no_image(value) for value in values]], pa.bool_())
    if pa.types.is_struct(column.type):
        parts = [pc.struct_field(column, [number]).is_valid() for number in range(column.type.num_fields)]
        return reduce(pc.or_, parts)
    return column.is_valid()


def has_all_bytes(rows: Dataset, column: str) -> bool:
    """Whether each row of a column with images has none or its bytes, and no row only the path of a file."""
    if not isinstance(rows.features[column], Image):
        return False
    images = rows.data.column(column)
    return pc.struct_field(images, "bytes").null_count == images.null_count


def find_format(folder: Path) -> str | None:
    """The pattern of a folder's files that are named after the train split, if any. Raises `ValueError` if several."""
    declared = {file for files in find_declared(folder).values() for file in files}
    files = [(pattern, file) for pattern in FORMATS for file in folder.glob(pattern) if split_of(file.stem) == "train"]
    named = {pattern: file for pattern, file in files if file in declared or not declared}
    if len(named) > 1:
        raise ValueError(
            f"{' and '.join(map(str, named.values()))} may both be the train split. Keep one, or give its path."
        )
    return next(iter(named), None)


class Source:
    """
    The data of a file, a folder or a Hub id, as read by a task. `splits` has the files or the rows of each split.

    Args:
        columns: columns to read as fields, such as "question=prompt,image=none".

    Raises:
        OSError: if nothing with this name exists.
        ValueError: if its format is not supported, or `columns` has another form.
    """

    def __init__(self, task: ModuleType, path: str, columns: str | None = None, streaming: bool = False):
        self.task, self.path, self.columns, self.streaming = task, path, columns, streaming
        self.fields = self._choose_columns()
        folder = Path(path)
        if is_saved(folder):
            patterns = []
        else:
            patterns = [named] if (named := find_format(folder)) else FORMATS
        for pattern in patterns:
            self.format, self.splits = FORMATS[pattern], find_files(folder, pattern)
            if self.splits:
                break
        else:
            self.format, self.splits = "save_to_disk" if folder.exists() else "the Hub", {}
        self._names = {}
        self.has_files = bool(self.splits) and self.format != "Parquet"
        self.files = self.splits
        if not self.has_files:
            self.splits = open_dataset(path, streaming)

    def _choose_columns(self) -> dict[str, tuple[str, ...]]:
        fields, chosen = dict(self.task.FIELDS), set()
        for pair in self.columns.split(",") if self.columns else ():
            name, _, column = (part.strip() for part in pair.partition("="))
            if name not in fields or not column:
                raise ValueError(
                    f"`--columns {self.columns}`: {pair!r} is not of the form FIELD=COLUMN, where FIELD is one of "
                    f"{', '.join(fields)}."
                )
            if name in chosen:
                raise ValueError(f"`--columns {self.columns}` gives `{name}` twice. Keep one of them.")
            chosen.add(name)
            fields[name] = () if column == "none" else (column,)
        return fields

    def find_split(self, split: str) -> str:
        """The name in the data of a split of the task."""
        names = getattr(self.task, "PARTS", {}).get(split, (split,))
        return next((name for name in names if name in self.splits), names[0])

    def label(self, split: str) -> str:
        """The name of a split in messages."""
        files = self.files.get(split, ())
        return str(files[0]) if len(files) == 1 else f"{self.path}, {split} split"

    def records(self, split: str, unread_keys: dict[str, None] | None = None) -> Iterator[Record]:
        """
        Yields the place of each record, its row, and what is wrong with it. Keys inside of a field that the task does
        not read, such as those of messages, are added to `unread_keys`.
        """
        find_unread_keys = getattr(self.task, "find_unread_keys", None)
        for reader, (where, record, faults) in self._raw_records(split):
            if find_unread_keys and unread_keys is not None and not faults:
                unread_keys.update(dict.fromkeys(find_unread_keys(reader.fields_of(record))))
            yield where, *((record, faults) if faults else reader.read(record))

    def _raw_records(self, split: str) -> Iterator[tuple[Reader, Record]]:
        """Yields each record with its reader."""
        part = self._part(split)
        if self.has_files:
            for file in part:
                reader = self._reader(split, file.parent)
                yield from ((reader, record) for record in read_records(file))
            return
        reader = self._reader(split)
        for index, record in enumerate(self._undecoded(part, reader)):
            yield reader, (f"{reader.place}, row {index}", record, [])

    def rows(self, split: str) -> Rows:
        """
        The rows of a split, with the task's `FEATURES`. Unless streamed, they are written to the cache of `datasets`,
        without the images of Parquet files or `save_to_disk`.

        Raises:
            ValueError: if there is no such split, a row has a fault, or as in [`find_missing`].
        """
        part = self._part(split)
        if faults := self.find_missing(split, self.find_absent(split)):
            raise ValueError(faults[0])
        for note in self.find_unread() if split == "train" else ():
            warn_once(note)
        rows = self._read_files(split, part) if self.has_files else self._read_rows(split, part)
        if not self.streaming:
            fields = [name for name in self.fields if name in rows.column_names]  # others are read into these
            absent = [name for name in fields if rows.data.column(name).null_count == len(rows) > 0]
        elif absent := [name for name in self.fields if self.find_missing(split, [name])]:
            first = list(rows.cast_column("image", Image(decode=False)).take(100))
            absent = [name for name in absent if all(row.get(name) is None for row in first)]
        if faults := self.find_missing(split, absent):
            raise ValueError(faults[0])
        return rows

    def names(self, split: str) -> list[str]:
        """
        The columns of a split; for files with records, the keys of all records or, if they are streamed, of the first
        1,000 and of as many more as are read until all fields that are needed have a column.
        """
        part = self._part(split)
        if split not in self._names and not self.has_files:
            self._names[split] = list(part.features or next(iter(part)))
        elif split not in self._names:
            names, needed = {}, [columns for name, columns in self.fields.items() if columns and self._is_needed(name)]
            for number, (_, record, _) in enumerate(record for file in part for record in read_records(file)):
                if self.streaming and number >= 1000 and all(names.keys() & columns for columns in needed):
                    break
                names |= dict.fromkeys(record or ())
            self._names[split] = list(names)
        return self._names[split]

    def find_absent(self, split: str) -> list[str]:
        """The fields that are needed but have no column. Empty if nothing could be read."""
        names = set(self.names(split))
        return [name for name in self.fields if names and self._is_needed(name) and not names & {*self.fields[name]}]

    def find_missing(self, split: str, absent: list[str]) -> list[str]:
        """
        Faults for fields that no row has: if the field is required, if a column with a similar name is not read, or if
        it is the image. A stream may have images in later rows.
        """
        names, faults = self.names(split), self._find_numbered_images(split) + self._find_separate_options(split)
        faults += self._find_several_splits(split)
        # Fields that are read into others, such as `system` into `messages`
        inner = [
            name for name in self.fields if name not in self.task.FEATURES and not {*self.fields[name]} & {*names}
        ]
        absent = list(dict.fromkeys([*absent, *inner]))
        read = {column for name, columns in self.fields.items() for column in columns if name not in absent}
        read |= {column for name in self.fields.keys() - {*absent} for column in self.task.FIELDS[name]}
        for name in absent:
            columns = self.fields[name]
            unread = [column for column in names if column not in {*read, *columns}]
            similar = [column for column in unread if column.lower() in self._similar_names(name)]
            similar += difflib.get_close_matches(name, unread, n=1, cutoff=0.75)
            is_needed = self._is_needed(name) or name == "image" and self._needs_image(split)
            # Only a column of images must not be empty, unless it was chosen and later rows of a stream may fill it
            can_be_empty = name != "image" or self.streaming and self._is_needed(name)
            is_known = can_be_empty and bool({*columns} & {*names})
            if not columns or is_known or not similar and not is_needed:
                continue
            advice = f"Give `--columns {name}={similar[0] if similar else 'COLUMN'}`"
            if name not in self.task.REQUIRED:
                advice += f", or `--columns {name}=none` to train without it"
            elif {"messages", "conversations"} & set(unread):
                advice += ", or `--task chat` to train on messages"
            elif self.format == FORMATS["*.json"] and self._may_be_whole(split):
                advice += ". If the file is one object with all rows, put them under exactly one of the keys "
                advice += ", ".join(KEYS_OF_ROWS)
            given = f" (`{columns[0]}`)" if columns != self.task.FIELDS[name] else ""
            if name == "image" and (own := self._find_image_column_of_others(split)):
                advice = f"Other splits have `{own}`. Rename the column with the images to that"
                advice += ", or, if this split has no images, add the column and leave it empty"
            what = f"{'an' if name[0] in 'aeiou' else 'a'} `{name}`{given}"
            listed = ", ".join(names[:MOST_COLUMNS])
            listed += f" and {len(names) - MOST_COLUMNS} more" if len(names) > MOST_COLUMNS else ""
            faults.append(f"{self.label(split)}: no row has {what}. The columns are {listed}. {advice}.")
        return faults

    def _may_be_whole(self, split: str) -> bool:
        """Whether a file has one record, which may be an object with all rows under a key that is not read."""
        return any(len(list(islice(read_records(file), 2))) == 1 for file in self._part(split))

    def _find_numbered_images(self, split: str) -> list[str]:
        """A fault for columns such as `image_2`, of which only one could be read, unless one was chosen."""
        numbered = [column for column in self.names(split) if NUMBERED_IMAGE.fullmatch(column)]
        if not numbered or self.fields["image"] != self.task.FIELDS["image"]:
            return []
        return [
            f"{self.label(split)}: the columns {', '.join(numbered)} seem to have further images of a row. Put all "
            "images of a row in order into a list, in one column `images`, or choose one column, for example with "
            f"`--columns image={numbered[0]}`."
        ]

    def _find_separate_options(self, split: str) -> list[str]:
        """A fault for columns such as `A` and `B`, each with an option, unless a column with all is read."""
        names = self.names(split)
        options = [column for column in names if OPTION.fullmatch(column)]
        own = self.task.FIELDS.get("choices")
        if len(options) < 2 or own is None or self.fields["choices"] != own or {*own} & {*names}:
            return []
        return [
            f"{self.label(split)}: the columns {', '.join(options)} seem to have the options of a row. Put them into "
            "a list, in one column `choices`, and write `answer` as the text of an option, or give "
            "`--columns choices=none` to train without them."
        ]

    def _find_several_splits(self, split: str) -> list[str]:
        """A fault for a column whose values name several splits. Of a stream, the first 1,000 rows are read."""
        part, read = self._part(split), {column for columns in self.fields.values() for column in columns}
        for column in self.names(split):
            if column.lower() not in COLUMNS_OF_SPLITS or column in read:
                continue
            if self.has_files:
                values = (record.get(column) for file in part for _, record, _ in read_records(file) if record)
            elif self.streaming:
                values = (row[column] for row in part.select_columns(column))
            else:
                values = part.unique(column)
            feature = None if self.has_files or part.features is None else part.features[column]
            values = (convert(value, feature) for value in islice(values, 1000 if self.streaming else None))
            named = sorted({value for value in values if isinstance(value, str) and split_of(value)})
            if len({*map(split_of, named)}) > 1:
                return [
                    f"{self.label(split)}: the column `{column}` has the values {', '.join(named)}, but is not read, "
                    "so all rows would be in one split. Write a file for each split, such as `train.jsonl` and "
                    "`test.jsonl`, or remove the column."
                ]
        return []

    def find_similar(self, split: str) -> dict[str, tuple[str, str]]:
        """
        Names of columns, in lower case, that are not read because a column with a similar name is: maps each to its
        field and that column. Rows from another source may only have the former. Only for fields that are not required
        and not in `columns`.
        """
        names, similar = self.names(split), {}
        chosen = {pair.partition("=")[0].strip() for pair in (self.columns or "").split(",")}
        for name in (SYNONYMS.keys() & self.fields.keys()) - chosen - {*self.task.REQUIRED}:
            own = next((column for column in self.fields[name] if column in names), None)
            if own is not None:
                similar |= dict.fromkeys(self._similar_names(name), (name, own))
        return similar

    def find_lost(self) -> tuple[str, ...]:
        """
        Columns that must be empty if they are not read: those in `LOST`, and `MEDIA` unless a column with the images
        was chosen. Those in `WEIGHTS` must have no zero.
        """
        media = MEDIA if self.fields["image"] == self.task.FIELDS["image"] else ()
        lost = (*getattr(self.task, "LOST", ()), *getattr(self.task, "WEIGHTS", ()), *media)
        return tuple(column for column in lost if all(column not in columns for columns in self.fields.values()))

    def _similar_names(self, name: str) -> list[str]:
        """Names, in lower case, that the column of a field may have: its own, and those of other data sets."""
        return [*self.task.FIELDS[name], *SYNONYMS.get(name, "").split()]

    def find_unread(self, split: str | None = None) -> list[str]:
        """Notes about data files and folders that are not read. With `split`, about files that may be this split."""
        folder, read = Path(self.path), {file for files in self.files.values() for file in files}
        if not read or not folder.is_dir():
            return []
        is_declared, is_flat = bool(find_declared(folder)), any(file.parent == folder for file in read)

        def reason(file: Path) -> str:
            if not has_format(file.name):
                return "it is compressed, or its suffix is not in lower case. Unpack or rename it"
            if FORMATS[f"*{file.suffix}"] != self.format:
                return f"other files are {self.format}. Save it as that too"
            if is_declared:
                return "README.md declares other files. Add it to `configs` there"
            if is_flat and file.parent != folder:
                return f"{folder} itself contains data. Move it there"
            if own := split_of_file(file, folder):
                return f"another file is named `{own}`. To read both, name it `{own}-2`"
            return "its name has no split, unlike those of others. Add the split, as in `train-2`"

        files, notes = survey(folder)
        unread = [file for file in files if file not in read and split in (None, split_of_file(file, folder))]
        notes = [] if split else notes
        notes += [f"{file} is not read, since {reason(file)}." for file in unread]
        more = [f"{len(notes) - MOST_NOTES} more files are not read."] if len(notes) > MOST_NOTES else []
        return notes[:MOST_NOTES] + more

    def _needs_image(self, split: str) -> bool:
        """Whether a split without images is a fault. A stream with a column for them may have some in later rows."""
        if self._find_image_column_of_others(split):
            return True
        if self.streaming:
            return not {*self.fields["image"]} & {*self.names(split)}
        others = [] if split_of(split) == "train" else self.splits
        return not any(row and row["image"] for name in others for _, row, _ in self.records(name))

    def _find_image_column_of_others(self, split: str) -> str | None:
        """
        The column with the images of another split, if this split has none: it may have another name here. Not for the
        train split, whose columns the others must have.
        """
        if split_of(split) == "train" or {*self.fields["image"]} & {*self.names(split)}:
            return None
        names = {column for name in self.splits for column in self.names(name)}
        return next((column for column in self.fields["image"] if column in names), None)

    def _is_needed(self, name: str) -> bool:
        return name in self.task.REQUIRED or self.fields[name] != self.task.FIELDS[name]

    def _part(self, split: str) -> list[Path] | Rows:
        takes = "Add it, or take one from the train split: `--holdout 0.05` takes 5 % of the rows."
        can_take = split not in ("train", *map(split_of, self.splits)) and not hasattr(self.task, "PARTS")
        try:
            return choose_split(self.splits, split, self.path, self.files)
        except ValueError as error:
            advice = self.find_unread(split) or [takes] * can_take
            if split == "train" and split not in map(split_of, self.splits):
                advice.append("A file, or the folder of one split, is read as the train split: give its path.")
            raise ValueError(" ".join([str(error), *advice])) from None

    def _reader(self, split: str, *folders: Path) -> Reader:
        """Images are searched for beside the file, then in the folder of the data set."""
        task, path = self.task.__name__, Path(self.path)
        parents = [file.parent for file in self.files.get(split, ())] if not self.has_files else []
        folders = dict.fromkeys([*folders, *parents, path.parent if path.is_file() else path])
        command = f"python -m tasks check {self.path} --task {task.rpartition('.')[2]}"
        command += f" --columns {self.columns}" if self.columns else ""
        features = {} if self.has_files else self._part(split).features or {}
        return Reader(
            task,
            self.fields,
            folders=tuple(folders) if path.exists() else (),
            place=self.label(split),
            command=command,
            features=dict(features),
            has_several_folders=len({*parents}) > 1,
            similar=self.find_similar(split),
            lost=self.find_lost(),
        )

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
        reader, features = self._reader(split), self.task.FEATURES
        rows = self._undecoded(rows, reader)
        if self.streaming:
            names = list(rows.features or next(iter(rows)))
            return rows.map(reader.row, with_indices=True, remove_columns=names, features=features)
        present = [column for column in self.fields["image"] if column in rows.column_names]
        filled = [column for column in present if pc.any(find_filled(rows.data.column(column))).as_py()]
        if not filled or self._has_images_in_messages(rows.remove_columns(present), reader):
            return self._map(rows, reader.row, features)
        images, texts = rows.select_columns(filled), rows.remove_columns(present)
        if len(filled) == 1 and has_all_bytes(images, filled[0]):
            images = images.rename_columns({filled[0]: "image"} if filled != ["image"] else {})
            several = Features({"images": IMAGE_FEATURES["images"]})
            several = Dataset.from_dict({"images": [None] * len(images)}, features=several)
            images = concatenate_datasets([images, several], axis=1)
        else:
            images = self._map(images, reader.image, Features({**IMAGE_FEATURES, "image": Image(decode=False)}))
        one, several = (images.with_format("arrow")[name] for name in IMAGE_FEATURES)
        num_images = pc.coalesce(pc.list_value_length(several), one.is_valid().cast("int32"))
        texts = concatenate_datasets([texts, Dataset(pa.table({"num_images": num_images}))], axis=1)
        texts = self._map(texts, reader.texts, Features({n: features[n] for n in features if n not in IMAGE_FEATURES}))
        return (
            concatenate_datasets([images, texts], axis=1).cast_column("image", Image()).select_columns(list(features))
        )

    def _has_images_in_messages(self, rows: Dataset, reader: Reader) -> bool:
        """Whether a row has images in its messages, which must be compared with those in its columns."""
        if not hasattr(self.task, "find_images"):
            return False
        found = self._map(rows, reader.finds_images, Features({"found": Value("bool")}))
        return pc.any(found.data.column("found")).as_py()

    def _undecoded(self, rows: Rows, reader: Reader) -> Rows:
        """The columns that a reader needs, with undecoded images."""
        names = list(rows.features or next(iter(rows)))
        read = {column for columns in self.fields.values() for column in columns}
        kept = [name for name in names if name in {*read, *reader.lost} or name.lower() in reader.similar]
        return undecoded(rows.select_columns(kept))

    def _map(self, rows: Dataset, function, features: Features) -> Dataset:
        fingerprint = self._fingerprint(function.__self__.folders, rows._fingerprint, function.__name__)
        return map_rows(rows, function, features, fingerprint)

    def _fingerprint(self, places: Iterable[Path], *facts) -> str:
        """Fingerprint of the files in `places`, of `facts`, and of the code of the tasks."""
        paths = list(dict.fromkeys(places))
        paths += map(Path, sorted({path for place in paths if place.is_dir() for path in find_subfolders(place, 4)}))
        folder = Path(__file__).parent
        sources = [folder.parent / "processing_dehvf.py", *sorted(folder.glob("*.py"))]  # the first removes `<image>`
        code = [file.read_text(encoding="utf-8") for file in sources]
        return Hasher.hash([stamp_files(paths), *facts, self.task.__name__, self.fields, *code])


def load(
    task: ModuleType,
    split: str,
    path: str | None = None,
    streaming: bool = False,
    columns: str | None = None,
    holdout: float | None = None,
) -> Rows:
    """
    The rows of a split. With its first argument bound, this is the `load` function of a task.

    Args:
        holdout: fraction of the train split that becomes the test split if there is none; another part of this size
            becomes the validation split if there is none. The rows are always the same, and those that share an
            image are in one split.

    Raises:
        OSError: if there is no such folder, and no such data set on the Hub or no network.
        ValueError: without a path, if `holdout` is not a fraction or cannot be used, or as in [`Source`] and
            [`Source.rows`].
    """
    name = task.__name__.rpartition(".")[2]
    if path is None:
        raise ValueError(f"path is None, but `{name}` reads your own data: give a folder or a Hub id (--data_path).")
    source = Source(task, path, columns, streaming)
    if holdout is None:
        return source.rows(split)
    known = {split_of(name) for name in source.splits}  # also if two names mean it, of which one must be chosen
    missing = [name for name in ("test", "validation") if name not in known]
    if not 0 < holdout < 0.5:
        raise ValueError(f"`--holdout {holdout}` is not between 0 and 0.5. Give a fraction of the rows, such as 0.05.")
    if not missing:
        raise ValueError(f"`--holdout` was given, but {path} has a test and a validation split. Remove the flag.")
    if split not in ("train", *missing):
        return source.rows(split)
    if streaming:
        raise ValueError("`--holdout` needs the number of rows, which a stream does not have. Remove `--streaming`.")
    rows = source.rows("train")
    parts = split_rows(rows, missing, holdout, path)
    if split == missing[0]:
        sizes = " and ".join(f"{len(parts[name])} are the {name} split" for name in missing)
        logger.warning(f"`--holdout {holdout}`: of {len(rows)} train rows, {sizes}. {KEPT_TOGETHER}.")
    return rows.select(parts[split])
