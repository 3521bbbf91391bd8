"""
Questions of your own: with an image or without, with options or a free answer. Read from a folder with one JSON Lines
file a split (train.jsonl, validation.jsonl, test.jsonl), see examples/vqa:

    {"question": "What shape is shown?", "image": "images/circle.png", "answer": "a circle"}
    {"question": "Which is larger?", "choices": ["a hen", "a cow"], "answer": "a cow", "context": "Both are adult."}

`question` and `answer` are texts. The others may be null or left out: `image` is a file, looked for from the folder of
the JSON Lines file; `choices` are 2 to 26 texts, one of them the answer; `context` is a text, the only one that may be
shortened. Other keys are not read. `python -m tasks check FOLDER` names every row that is not like this.

A data set on the Hub, a folder that `save_to_disk` wrote and a folder with Parquet files are read too, if they have
these columns.
"""

import json
import re
import reprlib
import unicodedata
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, Value
from PIL import Image as PILImage

from tasks import open_dataset, require_files, scienceqa


COLUMNS = ("image", "question", "answer")
ANSWER_PREFIX = scienceqa.ANSWER_PREFIX
MAX_NEW_TOKENS = 20
CARD = scienceqa.CARD

FEATURES = Features(
    {"image": Image(), "question": Value("string"), "choices": List(Value("string"))}
    | {"answer": Value("string"), "context": Value("string")}
)


def load(split: str, path: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """
    Raises:
        FileNotFoundError: if a folder with JSON Lines has none for this split.
        ValueError: without a path, if `path` holds no such data, or if a row of the JSON Lines is not as it should be.
    """
    if path is None:
        raise ValueError("path is None, but `vqa` reads your own data: give a folder or a Hub id (--data_path).")
    if not any(Path(path).glob("*.jsonl")):
        return only_own_columns(open_dataset(path, split, streaming))
    file = Path(path) / f"{split}.jsonl"
    require_files([file], "A folder with JSON Lines has one such file for each split: train, validation, test.")
    rows, faults = read(file)
    if faults:
        raise ValueError(f"{faults[0]}\nThat is the first of {len(faults)}: `python -m tasks check {path}` names all.")
    rows = Dataset.from_list(rows, features=FEATURES)
    return rows.to_iterable_dataset() if streaming else rows


def only_own_columns(rows: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """Others may be of any kind, or bear the names of what `train.py` adds."""
    rows = rows.select_columns([name for name in rows.column_names if name in FEATURES])
    if "image" in rows.column_names:
        return rows
    return rows.map(lambda row: {"image": None}, features=Features({**rows.features, "image": Image()}))


def read(file: Path, with_images: bool = False) -> tuple[list[dict], list[str]]:
    """
    The rows of a JSON Lines file that are as they should be, and what is wrong with the others: one text for each
    fault, with file, line and what to do. Images are looked at only if `with_images`.
    """
    rows, faults, number = [], [], 0
    with open(file, "rb") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                wrong = [f"no JSON: {error.msg} at character {error.pos + 1}. Write one whole object on each line."]
            except UnicodeDecodeError as error:
                wrong = [f"no UTF-8 text: {error.reason} at byte {error.start + 1}. Save the file as UTF-8."]
            else:
                wrong = find_faults(row) + find_image_faults(row, file.parent, with_images)
            faults += [f"{file}:{number}: {fault}" for fault in wrong]
            if not wrong:
                image = row.get("image") and str(file.parent / row["image"])
                rows.append({name: row.get(name) for name in FEATURES} | {"image": image})
    if not rows and not faults:
        faults = [f"{file}: no rows. Write one JSON object on each line."]
    return rows, faults


def find_faults(row) -> list[str]:
    """What is wrong with a row's texts."""
    if not isinstance(row, dict):
        return [f'{reprlib.repr(row)} is no row. Write an object: {{"question": "...", "answer": "..."}}.']
    faults = []
    for name in ("question", "answer"):
        if row.get(name) is None:
            faults.append(f"there is no `{name}`. Add it, as a text.")
        elif not is_text(row[name]):
            faults.append(f"`{name}` is {reprlib.repr(row[name])}. Make it a text in quotes that is not blank.")
    if not isinstance(row.get("context"), str | None):
        faults.append(f"`context` is {reprlib.repr(row['context'])}. Make it a text in quotes, or leave it out.")
    choices, answer = row.get("choices"), row.get("answer")
    if not choices and isinstance(choices, list | None):  # Arrow may have an empty list for none
        return faults
    if not isinstance(choices, list) or not all(is_text(choice) for choice in choices):
        return [*faults, f"`choices` is {reprlib.repr(choices)}. Make it a list of texts, none of them blank."]
    if not 2 <= len(choices) <= 26:
        faults.append(f"`choices` has {len(choices)} texts. Give 2 to 26 of them, or none for a free answer.")
    if repeated := sorted({choice for choice in choices if choices.count(choice) > 1}):
        faults.append(f"`choices` repeats {', '.join(map(repr, repeated))}. Give each option once.")
    if is_text(answer) and answer not in choices:
        faults.append(f"`answer` is {answer!r}, which is none of {choices}. Write it exactly as in `choices`.")
    return faults


def find_image_faults(row, folder: Path, look: bool) -> list[str]:
    """What is wrong with the name of a row's image, and to `look`, with the file."""
    name = row.get("image") if isinstance(row, dict) else None
    if name is None:
        return []
    if not is_text(name):
        return [f"`image` is {reprlib.repr(name)}. Make it a file's name in quotes, or null."]
    if not look:
        return []
    file = folder / name
    if not file.is_file():
        return [f"there is no image {file}. Names are relative to {folder}."]
    try:
        with PILImage.open(file) as image:
            image.convert("RGB")
    except Exception as error:  # PIL raises many kinds
        return [f"the image {file} cannot be read: {error}. Replace the file or leave the row out."]
    return []


def is_text(value) -> bool:
    return isinstance(value, str) and bool(value.strip())


def context(row: dict) -> str:
    return row.get("context") or ""


def prompt(row: dict, context: str) -> str:
    if row.get("choices"):
        return scienceqa.prompt(row, context)
    return f"Question: {row['question']}\nContext: {context or 'N/A'}"


def answer(row: dict) -> str:
    """
    Raises:
        ValueError: if the row is not as it should be, which is seen here for rows that do not come from JSON Lines.
    """
    if faults := find_faults(row):
        raise ValueError(f"{row} is not as `vqa` needs it: {' '.join(faults)}")
    if row.get("choices"):
        return scienceqa.answer({"answer": row["choices"].index(row["answer"])})
    return f"The answer is {row['answer'].strip().removesuffix('.')}."


def options(row: dict) -> list[str] | None:
    return scienceqa.options(row) if row.get("choices") else None


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """
    Accuracy in per cent of the rows with and without an image, with options and with a free answer, and of all
    (`average`). With options the letter counts; free answers are compared as `normalise` leaves them. `unparsed` is
    the share, in per cent, of predictions that name no option or say nothing; they count as wrong.
    """
    from metrics.scienceqa.scienceqa import parse

    if len(records) != size:
        raise ValueError(f"There are {len(records)} predictions for a split of {size} rows. Score each row once.")
    said, hits = [], []
    for record in records:
        choices, text, wanted = record.get("choices"), record["prediction"], record["answer"]
        if not choices:
            said.append(normalise(text) or None)
            hits.append(said[-1] == normalise(wanted))
        else:
            said.append(parse(text, len(choices)))
            hits.append(said[-1] == choices.index(wanted))

    def accuracy(belongs):
        part = [hit for hit, record in zip(hits, records) if belongs(record)]
        return 100 * sum(part) / len(part) if part else None

    return {
        "image": accuracy(lambda record: record["has_image"]),
        "no image": accuracy(lambda record: not record["has_image"]),
        "choices": accuracy(lambda record: record.get("choices")),
        "free": accuracy(lambda record: not record.get("choices")),
        "average": accuracy(lambda record: True),
        "unparsed": 100 * sum(text is None for text in said) / len(said),
        "count": len(said),
    }


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles (" The red car." -> "red car"), unless it is nothing else."""
    text = unicodedata.normalize("NFC", text).lower().strip().removesuffix(".")
    # A sign before a digit is part of the number: -5, 3.5, 10:30, 1/2
    is_part = [bool(re.match(r"[-.,:/]\d", text[place:])) for place in range(len(text))]
    kept = [sign for sign, part in zip(text, is_part) if part or not unicodedata.category(sign).startswith("P")]
    words = "".join(kept).split() or text.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
