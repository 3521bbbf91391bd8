"""
Data formats: finds the splits of a file, a folder or a Hub id, and reads them as records or with `datasets`.
"""

import csv
import glob
import json
import os
import re
import reprlib
import textwrap
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset, Features, IterableDataset, load_dataset, load_from_disk
from datasets.data_files import SPLIT_KEYWORDS, sanitize_patterns
from datasets.exceptions import DatasetGenerationError
from datasets.fingerprint import Hasher
from huggingface_hub import metadata_load

from tasks import PREDICTIONS_FILE, RESULTS_FILE, RUN_FILE


Rows = Dataset | IterableDataset

FORMATS = {"*.jsonl": "JSON Lines", "*.csv": "CSV", "*.parquet": "Parquet", "*.json": "JSON"}  # in this order
# Keys under which a JSON file that is one object has its rows
KEYS_OF_ROWS = ("data", "rows", "examples", "instances", "samples")
# JSON files about a data set, which `datasets` writes beside its rows
DESCRIPTIONS = ("dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json")
# What a run of `train.py` writes into its folder, which may be that of the data
WRITTEN_BY_RUNS = (RUN_FILE, RESULTS_FILE, PREDICTIONS_FILE, "*config.json", "*token*.json", "vocab.json")
WRITTEN_BY_RUNS += ("checkpoint-*",)
MOST_NAMES = 10  # in a message


# --- splits ---


def keywords_of(name: str) -> list[tuple[str, str]]:
    """
    The words of a name that refer to a split, each after its split: "val2014" and "valData" -> ("validation", "val").
    """
    words = re.split(r"[^a-zA-Z]+|(?<=[a-z])(?=[A-Z])", name)
    words = [re.sub("(?:set|data|split)$", "", word.lower()) for word in words]
    return [(str(split), word) for word in words for split, keywords in SPLIT_KEYWORDS.items() if word in keywords]


def split_of(name: str) -> str | None:
    """The split that a name refers to first, or `None`."""
    return next((split for split, _ in keywords_of(name)), None)


def choose_split(splits: dict, split: str, path: str, files: dict[str, list[Path]] | None = None):
    """
    The value of a split, under its own name or, if exactly one other name refers to it, under that name (`dev`,
    `train_sft`). `files` are those of each split, for the message.

    Raises:
        ValueError: if there is no such split, or if several names refer to it.
    """
    names = [split] if split in splits else [name for name in splits if split_of(name) == split]
    if len(names) > 1:
        advice = f"load the data set, rename that split to `{split}`, and save it with `save_to_disk`"
        if files:
            names = [str(file.relative_to(path)) for name in names for file in files.get(name, ())] or names
            advice = f"name it `{split}`. To read all of them, name them `{split}-1`, `{split}-2` and so on"
        listed = ", ".join(names[:MOST_NAMES]) + ", ..." * (len(names) > MOST_NAMES)
        raise ValueError(f"{path} has no split `{split}`, but several that may be it: {listed}. Choose one: {advice}.")
    if not names:
        raise ValueError(f"{path} has no split `{split}`. It has: {', '.join(splits)}.")
    return splits[names[0]]


def find_declared(folder: Path) -> dict[str, list[Path]]:
    """
    The files of each split in `configs` of a README.md, as in a clone of the Hub's repository, if there are any.

    Raises:
        ValueError: if it has several configurations, none of which is the default, or one that cannot be read.
    """
    if not has_configs(folder):
        return {}
    configs = (metadata_load(folder / "README.md") or {}).get("configs") or []
    names = [config.get("config_name", "default") for config in configs]
    default = [config for name, config in zip(names, configs) if config.get("default") or name == "default"]
    if len(configs) > 1 and not default:
        raise ValueError(
            f"{folder / 'README.md'} declares several configurations: {', '.join(names)}. Give the folder or the file "
            "of one of them instead, as in its `data_files`, or remove the others from `configs`."
        )
    config = (default or configs or [{}])[0]
    root, found = folder / config.get("data_dir", ""), {}
    for split, patterns in sanitize_patterns(config.get("data_files") or {}).items():
        names = {name for pattern in patterns for name in glob.glob(pattern, root_dir=root, recursive=True)}
        found[split] = [root / name for name in sorted(names) if is_data(root / name, root)]
    return {split: files for split, files in found.items() if files}


def has_format(name: str) -> bool:
    return f"*{os.path.splitext(name)[1]}" in FORMATS and name not in DESCRIPTIONS


def may_have_format(name: str) -> bool:
    """Whether a file would be read if it was unpacked and its suffix was in lower case."""
    return has_format(re.sub(r"\.(gz|zip|bz2|xz|zst)$", "", name.lower()))


def find_run(file: Path, folder: Path) -> Path | None:
    """
    The folder of a run of `train.py` to which a file in `folder` belongs, or `None`. If that is `folder` itself, the
    run has written beside the data, and only the files with its names belong to it.
    """
    for place in file.parents:
        if place.is_relative_to(folder) and (place / RUN_FILE).is_file():
            name = file.relative_to(place).parts[0]
            if place != folder or any(fnmatch(name, pattern) for pattern in WRITTEN_BY_RUNS):
                return place
    return None


def is_data(file: Path, folder: Path) -> bool:
    """Whether a file in a folder may have rows to learn. The rows in the folder of a run are those of a test split."""
    return has_format(file.name) and find_run(file, folder) is None


def walk(folder: Path, accepts=has_format, onerror: Callable[[OSError], None] | None = None) -> Iterator[Path]:
    """
    The data files in a folder and its subfolders, which may have many images too. Hidden ones are left out, and so are
    folders that cannot be opened, for each of which `onerror` is called.
    """
    seen = set()
    for place, folders, names in os.walk(folder, onerror=onerror, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        if (own := os.path.realpath(place)) in seen:  # a link to a folder above it
            folders.clear()
            continue
        seen.add(own)
        yield from (Path(place, name) for name in sorted(filter(accepts, names)) if not name.startswith("."))


def survey(folder: Path) -> tuple[list[Path], list[str]]:
    """The files in a folder that may have data, and notes about the folders in it that are left out."""
    closed = []
    runs = {file: find_run(file, folder) for file in walk(folder, may_have_format, closed.append)}
    notes = [
        f"{error.filename} is not read, since it cannot be opened: {error.strerror}. Change its permissions."
        for error in closed
    ]
    for run in dict.fromkeys(filter(None, runs.values())):
        if run == folder:
            notes.append(f"What a run of train.py wrote into {folder}, such as {PREDICTIONS_FILE}, is not read.")
        else:
            notes.append(f"{run} is not read, since a run of train.py wrote it. Move data of your own out of it.")
    return [file for file, run in runs.items() if run is None], notes


def has_configs(folder: Path) -> bool:
    """Whether the README.md of a folder declares `configs`."""
    readme = folder / "README.md"
    return readme.is_file() and bool(re.search(r"^configs:", readme.read_text("utf-8", "replace"), re.MULTILINE))


def keywords_of_file(file: Path, folder: Path) -> list[tuple[str, str]]:
    """The result of [`keywords_of`] for the folders below `folder` that contain a file, and for its name."""
    return [pair for part in file.relative_to(folder).with_suffix("").parts for pair in keywords_of(part)]


def split_of_file(file: Path, folder: Path) -> str | None:
    """The split that the path of a file refers to last, or `None`."""
    return next((split for split, _ in reversed(keywords_of_file(file, folder))), None)


def find_files(path: Path, pattern: str) -> dict[str, list[Path]]:
    """
    The files of each split: those that a README.md declares, or else according to their names or the names of their
    folders. Of files with different words for a split, such as `eval` and `test`, those with its own name are read;
    without these, each word is a split in the result. Files with other names are the train split if no other file is,
    and are not read otherwise. Subfolders are searched if the folder itself contains no files. A `path` that is a file
    is the train split.

    Raises:
        ValueError: if a path refers to several splits, or only some of the files with other names have "train" in
            them.
    """
    if path.is_file():
        return {"train": [path]} if path.match(pattern) else {}
    if declared := find_declared(path):
        found = {split: [file for file in files if file.match(pattern)] for split, files in declared.items()}
        return {split: files for split, files in found.items() if files}
    files = [file for file in path.glob(pattern) if is_data(file, path)]
    files = files or [file for file in walk(path) if file.match(pattern) and is_data(file, path)]
    found, others = {str(split): {} for split in SPLIT_KEYWORDS}, []
    for file in sorted(files):
        if file.name.startswith("."):
            continue
        if not (keywords := keywords_of_file(file, path)):
            others.append(file)
            continue
        if len(dict(keywords)) > 1:
            words = ", ".join(repr(word) for _, word in keywords)
            raise ValueError(
                f"{file} may be of several splits, since its path has the words {words}. Name it and the folders that "
                "contain it after one split."
            )
        (split, word), *_ = keywords
        found[split].setdefault(split if (split, split) in keywords else word, []).append(file)
    if others and not found["train"]:
        found["train"] = {"train": others}
        trained = [file for file in others if "train" in str(file.relative_to(path)).lower()]
        if 0 < len(trained) < len(others):
            other = next(file for file in others if file not in trained)
            raise ValueError(
                f"{trained[0]} seems to be the train split, and {other} another one. Name each file after its split, "
                "as in `vqa-train` and `vqa-test`, or files that are all trained on `train-1` and `train-2`."
            )
    splits = {}
    for split, names in found.items():
        if split in names or len(names) == 1:
            splits[split] = names.get(split) or next(iter(names.values()))
        else:
            splits |= names
    return splits


def is_saved(folder: Path) -> bool:
    """Whether `save_to_disk` of a `DatasetDict` or a `Dataset` wrote a folder, or its subfolders for the splits."""
    return any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")) or bool(find_saved(folder))


def find_saved(folder: Path) -> dict[str, Path]:
    """The subfolders for splits that `save_to_disk` of a `Dataset` wrote, if the folder has no data files."""
    places = [file.parent for file in sorted(folder.glob("*/state.json")) if split_of(file.parent.name)]
    if places and any(is_data(file, folder) for file in folder.iterdir()):
        return {}
    return {place.name: place for place in places}


def stamp_files(paths: Iterable[Path]) -> list[tuple[str, int, int]]:
    """What changes if one of the files or folders is written again: path, time of modification and size."""
    return [(str(path), path.stat().st_mtime_ns, path.stat().st_size) for path in paths if path.exists()]


def identify_by_files(rows: Dataset) -> Dataset:
    """
    Rows that `save_to_disk` wrote, with a fingerprint that changes with their files: the one that was saved with them
    may belong to other rows, since `Dataset.from_generator` makes it from the code of its function. They are returned
    without the format that was saved with them, such as tensors.
    """
    stamps = stamp_files(Path(file["filename"]) for file in rows.cache_files)
    return Dataset(rows.data, rows.info, rows.split, fingerprint=Hasher.hash([rows._fingerprint, stamps]))


def join_features(splits: dict[str, list[Path]]) -> tuple[Features, dict[str, list[str]]]:
    """
    The columns of all Parquet files.

    Returns:
        The types of all columns, and the names of the columns of each split.

    Raises:
        ValueError: if files of a split have different columns, or a column has types that [`join_types`] refuses.
    """
    features, names, sources = {}, {}, {}
    for split, files in splits.items():
        for file in files:
            own = Features.from_arrow_schema(pq.read_schema(file))
            names.setdefault(split, list(own))
            if differing := {*names[split]} ^ own.keys():
                raise ValueError(f"only one of {files[0]} and {file} has the columns {', '.join(sorted(differing))}")
            for name, feature in own.items():
                other = features.setdefault(name, feature)
                features[name] = join_types(other, feature)
                if features[name] is None:
                    first, second = (textwrap.shorten(repr(part), 200) for part in (other, feature))
                    raise ValueError(f"`{name}` has the type {first} in {sources[name]} and {second} in {file}")
                if features[name] == feature:
                    sources[name] = file
    return Features(features), names


def join_types(one, other):
    """
    The type for a column that has these types in two files, such as the wider of two integers. A column that is null
    throughout a file has no type there.

    Returns:
        The type, or `None` if the values of one file would be read as others, such as the text "007" as the number 7.
    """
    if one == other:
        return one
    # Arrow knows neither images nor class labels, and would join bytes and texts
    has_bytes = {"binary" in repr(part) for part in (one, other)}
    if len(has_bytes) > 1 or re.search(r"ClassLabel\(|Image\(", repr((one, other))):
        pairs = (one, other), (other, one)
        return next((a for a, b in pairs if "Image(" in repr(a) or "Value('null')" in repr(b)), None)
    schemas = [pa.schema(Features({"": feature}).type) for feature in (one, other)]
    try:
        return Features.from_arrow_schema(pa.unify_schemas(schemas, promote_options="permissive"))[""]
    except pa.ArrowException:
        return None


def open_dataset(path: str, streaming: bool) -> dict[str, Rows]:
    """
    The splits of a data set on the Hub (`org/name`, or `org/name:config`), of a folder that `save_to_disk` wrote, of a
    Parquet file, or of a folder with Parquet files, such as a clone of the Hub's repository. Files and folders need no
    network.

    Raises:
        OSError: if there is no such folder, and no such data set on the Hub or no network.
        ValueError: if `path` is a file or folder of another kind, or its Parquet files cannot be read together.
    """
    folder = Path(path)
    if is_saved(folder):
        try:
            saved = {name: load_from_disk(place) for name, place in find_saved(folder).items()} or load_from_disk(path)
        except IndexError as error:  # of `datasets`, for which there are no files to read
            raise ValueError(f"{path} has a split without rows. Remove it, and save the others again.") from error
        splits = {"train": saved} if isinstance(saved, Dataset) else saved
        splits = {name: identify_by_files(rows) for name, rows in splits.items()}
        return {name: rows.to_iterable_dataset() if streaming else rows for name, rows in splits.items()}
    if files := find_files(folder, "*.parquet"):
        if has_configs(folder):
            return load_dataset(path, streaming=streaming)
        # `load_dataset(path)` would take a folder with more images than Parquet files for an `imagefolder`
        # These are patterns, in which a folder's name may have a special character such as `[`
        names = {split: [glob.escape(str(file)) for file in paths] for split, paths in files.items()}
        try:
            features, columns = join_features(files)
            splits = load_dataset("parquet", data_files=names, features=features, streaming=streaming)
            return {split: rows.select_columns(columns[split]) for split, rows in splits.items()}
        except (DatasetGenerationError, ValueError) as error:
            raise ValueError(
                f"{path} cannot be read as Parquet: {error.__cause__ or error}. Each split needs at least one row. "
                "All files need the same types, and the files of a split the same columns."
            ) from error
    if folder.exists():
        names = sorted(file.name for file in (folder.iterdir() if folder.is_dir() else [folder]))
        notes = survey(folder)[1] if folder.is_dir() else []
        found = (
            f"{path} has no data that this task reads. Give files that match {', '.join(FORMATS)}, unpacked and with "
            f"names in lower case, or a folder that `save_to_disk` has written. Found: {reprlib.repr(names)}."
        )
        raise ValueError(" ".join([found, *notes]))
    name, _, config = path.partition(":")
    if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name) or has_format(folder.name):
        raise FileNotFoundError(f"There is no file or folder {path}, and no data set on the Hub can have this name.")
    try:
        return load_dataset(name, config or None, streaming=streaming)
    except OSError as error:
        raise OSError(f"There is no folder {path}, and the Hub gave no data set of this name: {error}") from error


# --- records of JSON and CSV ---

# A record is an entry of a file, from which a row is made. Faults are texts that say what is wrong and what to do.
Record = tuple[str, dict | None, list[str]]  # its place, the record, its faults


def read_records(file: Path) -> Iterator[Record]:
    """The records of a file. A leading byte order mark of UTF-8 is skipped."""
    is_empty = True
    with open(file, "rb") as lines:
        start = lines.read(100).removeprefix(b"\xef\xbb\xbf").lstrip()
    if file.suffix == ".csv":
        reader = read_csv
    elif start.startswith(b"["):
        reader = read_list
    else:
        reader = read_object if file.suffix == ".json" else read_lines
    try:
        for record in reader(file):
            is_empty = False
            yield record
    except UnicodeDecodeError as error:
        yield str(file), None, [f"not UTF-8 text: {error.reason} at byte {error.start + 1}. Save the file as UTF-8."]
    else:
        if is_empty:
            yield str(file), None, ["no rows. Write one JSON object on each line, one list of them, or CSV."]


class RepeatedKey(ValueError):
    """A key is given twice in an object of JSON."""


def read_object_once(pairs: list[tuple]) -> dict:
    """An object of JSON. Raises `RepeatedKey` if a key is given twice, of which `json` would keep the last."""
    found = dict(pairs)
    if len(found) < len(pairs):  # compared first, since an object may have as many keys as a data set has rows
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise RepeatedKey(f"`{twice}` is given twice. Keep one of them.")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=read_object_once)


def read_lines(file: Path) -> Iterator[Record]:
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            record, faults = None, []
            try:
                record = DECODER.decode(line.decode("utf-8-sig"))
            except RepeatedKey as error:
                faults = [str(error)]
            except json.JSONDecodeError as error:
                form = "one list of objects" if file.suffix == ".json" else "one whole object on each line"
                faults = [f"not JSON: {error.msg} at character {error.pos + 1}. Write {form}."]
            except UnicodeDecodeError as error:
                faults = [f"not UTF-8 text: {error.reason} at byte {error.start + 1}. Save the file as UTF-8."]
            yield f"{file}:{number}", *check_record(record, faults)
            if faults and file.suffix == ".json":  # probably one JSON value over many lines
                return


def read_object(file: Path) -> Iterator[Record]:
    """Reads one object that has a list of records under one of `KEYS_OF_ROWS`, or else one record per line."""
    try:
        whole = DECODER.decode(file.read_text(encoding="utf-8-sig"))
    except (json.JSONDecodeError, RepeatedKey):  # `read_lines` says where
        whole = None
    keys = [key for key in KEYS_OF_ROWS if isinstance(whole, dict) and isinstance(whole.get(key), list)]
    values = whole.values() if isinstance(whole, dict) else ()
    are_rows = values and all(isinstance(value, dict) for value in values)
    are_splits = values and all(isinstance(whole[key], list) and split_of(key) for key in whole)
    are_columns = are_rows and all(key.isdigit() for value in values for key in value)
    fault = None
    if are_columns:
        fault = 'it has columns, as pandas writes them. Write rows: `to_json(file, orient="records")`.'
    elif are_rows:
        fault = "it is one object with a row for each key. Write a list of its values."
    elif are_splits:
        fault = "it has several splits. Write a file for each of them."
    if fault is not None:
        yield str(file), None, [fault]
    elif len(keys) != 1:
        yield from read_lines(file)
    else:
        for number, record in enumerate(whole[keys[0]]):
            yield f"{file}: row {number} of `{keys[0]}`", *check_record(record, [])


def read_list(file: Path) -> Iterator[Record]:
    """Reads a list of records one by one, since Python objects take many times the memory of the text."""
    text, decoder, separator = file.read_text(encoding="utf-8-sig"), DECODER, re.compile(r"[\s,]*")
    place, number = separator.match(text, text.index("[") + 1).end(), 0
    while place < len(text) and text[place] != "]":
        try:
            record, place = decoder.raw_decode(text, place)
        except json.JSONDecodeError as error:
            fault = f"not JSON: {error.msg} at line {error.lineno}, column {error.colno}. Write one list of objects."
            yield f"{file}: row {number}", None, [fault]
            return
        except RepeatedKey as error:
            yield f"{file}: row {number}", None, [str(error)]
            return
        yield f"{file}: row {number}", *check_record(record, [])
        place, number = separator.match(text, place).end(), number + 1
    if place >= len(text):
        yield f"{file}: row {number}", None, ["the list is not closed. Write `]` at its end."]
    elif text[place + 1 :].strip():
        yield f"{file}: row {number}", None, ["something follows the end of the list. Write one list of objects."]


def read_csv(file: Path) -> Iterator[Record]:
    """Reads a line with the column names, then one record per line. Empty cells are `None`."""
    csv.field_size_limit(1 << 30)
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader, line = csv.DictReader(lines, strict=True, skipinitialspace=True), 1
        try:
            reader.fieldnames = names = [name.strip() for name in reader.fieldnames or ()]
            if len(names) == 1 and (found := [sign for sign in ";\t|" if sign in names[0]]):
                yield f"{file}:1", None, [f"the columns seem to be separated by {found[0]!r}. Save it with commas."]
                return
            if len({*names}) < len(names):
                yield f"{file}:1", None, [f"the header has a column name twice: {', '.join(names)}. Use unique names."]
                return
            line = 2
            for cells in reader:
                if None in cells or None in cells.values():
                    fault = f"it does not have {len(names)} cells like the first line"
                    yield f"{file}:{line}", None, [f"{fault}. Put texts with a comma into quotes."]
                else:
                    yield f"{file}:{line}", {name: cell or None for name, cell in cells.items()}, []
                line = reader.line_num + 1
        except csv.Error as error:
            advice = 'Write "" for a quote inside of a cell in quotes, and close the quotes of each cell'
            yield f"{file}:{line}", None, [f"not CSV: {error}. {advice}. Later rows were not read."]


def check_record(record, faults: list[str]) -> tuple[dict | None, list[str]]:
    if faults or isinstance(record, dict):
        return record, faults
    return None, [f'{reprlib.repr(record)} is not a row. Write an object: {{"name": value, ...}}.']
