"""
ScienceQA (Lu et al., 2022): multiple choice, half with an image, in the columns of `derek-thomas/ScienceQA`. Read from
that data set on the Hub, a folder that `save_to_disk` wrote, a folder with the Hub's Parquet files, or a folder in the
layout of the original release (github.com/lupantech/ScienceQA):

    problems.json   pid_splits.json   images/{train,val,test}/<number>/image.png

With the original release, captions of the images can be read from a file and added to the context in evaluation, as in
MemVP (`use_caption` in its eval.py):

    {"captions": {"<number>": "a map of the world"}}
"""

import json
import reprlib
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, Value

from tasks import read_entries, read_json, require_files, require_keys, run_metric
from tasks._formats import choose_split, open_dataset
from tasks._reader import make_dataset
from tasks._values import find_text_faults


COLUMNS = ("image", "question", "choices", "answer", "hint", "subject", "grade")
ANSWER_PREFIX = " The answer is"
MAX_NEW_TOKENS = 1
DATASET, DATASET_ROWS = "derek-thomas/ScienceQA", 4241
CARD = {"task_type": "visual-question-answering", "metric_type": "accuracy", "score": "average"}
METRIC = Path(__file__).parents[1] / "metrics" / "scienceqa"

FEATURES = Features(
    {"image": Image(), "question": Value("string"), "choices": List(Value("string")), "answer": Value("int8")}
    | {name: Value("string") for name in "hint task grade subject topic category skill lecture solution".split()}
)


def load(
    split: str, path: str | None = None, streaming: bool = False, captions: str | None = None
) -> Dataset | IterableDataset:
    """
    Args:
        captions: file with captions. They are not added to the train split.

    Raises:
        FileNotFoundError: if the original layout or the file with captions lacks a file or folder.
        ValueError: if `path` has none of these layouts or no such split, a file is damaged or has another form, or
            there are no captions for the split.
    """
    if path is not None and any((Path(path) / name).exists() for name in ("problems.json", "pid_splits.json")):
        rows = load_original(Path(path), split, captions if split != "train" else None)
        return rows.to_iterable_dataset() if streaming else rows
    if captions is not None:
        raise ValueError(
            f"Captions are found by the numbers of the problems, which {path or DATASET} does not have. Give "
            "`--data_path` the folder of the original release, with problems.json, or remove `--captions`."
        )
    return choose_split(open_dataset(path or DATASET, streaming), split, path or DATASET)


def load_original(folder: Path, split: str, captions: str | None = None) -> Dataset:
    images = folder / "images" / {"validation": "val"}.get(split, split)
    layout = (
        "The original layout of ScienceQA is a folder with problems.json, pid_splits.json and the images as "
        "images/{train,val,test}/<number>/image.png: see github.com/lupantech/ScienceQA for all of them."
    )
    files = folder / "problems.json", folder / "pid_splits.json"
    require_files([*files, images], layout)
    problems, numbers = read_json(files[0].read_bytes(), files[0], layout), read_entries(files[1], images.name, layout)
    require_keys(problems, numbers, files[0], layout)
    rows = []
    for number in numbers:
        require_keys(problems[number], FEATURES, f"{files[0]}: problem {number}", layout)
        row = {name: problems[number][name] for name in FEATURES}
        rows.append({**row, "image": row["image"] and str(images / number / row["image"])})
    rows = make_dataset(rows, FEATURES, False, files[1], split)
    if captions is None:
        return rows
    known = read_captions(Path(captions))
    if not any(number in known for number in numbers):
        raise ValueError(
            f"{captions} has no caption for any of the {len(rows)} problems of the {split} split, such as number "
            f"{numbers[0]}. Give the file that belongs to {folder}."
        )
    return rows.add_column("caption", [known.get(number, "") for number in numbers])


def read_captions(file: Path) -> dict[str, str]:
    """Captions by the number of the problem. Raises `FileNotFoundError`, or `ValueError` for another format."""
    form = 'Captions are a JSON file, {"captions": {"<number>": "<text>"}}'
    require_files([file], f"{form}, such as the captions.json of MemVP and LaVIN.")
    try:
        captions = json.loads(file.read_text(encoding="utf-8"))["captions"]
        is_good = all(isinstance(text, str) for text in captions.values())
    except (ValueError, TypeError, KeyError, AttributeError):
        is_good = False
    if not is_good:
        raise ValueError(f"{file} has another form. {form}.")
    return captions


def context(row: dict) -> str:
    return " ".join((row["hint"] or "", row.get("caption") or "")).strip()


def prompt(row: dict, context: str) -> str:
    listed = " ".join(f"({letter(index)}) {choice}" for index, choice in enumerate(row["choices"]))
    return f"Question: {row['question']}\nContext: {context or 'N/A'}\nOptions: {listed}"


def answer(row: dict) -> str:
    """Raises `ValueError` if the question is not a text, or the answer is not the index of one of 2 to 26 choices."""
    choices, index, faults = row["choices"], row["answer"], find_text_faults("`question`", row["question"])
    # Two choices may be equal, since the answer is a letter
    if not isinstance(choices, list) or not all(isinstance(choice, str) for choice in choices):
        faults.append(f"`choices` is {reprlib.repr(choices)}. Make it a list of texts.")
    elif not 2 <= len(choices) <= 26:
        faults.append(f"`choices` has {len(choices)} texts. Give 2 to 26 of them.")
    elif type(index) is not int or not 0 <= index < len(choices):
        faults.append(
            f"`answer` is {index!r}. Make it the index of the right choice, 0 to {len(choices) - 1}. Rows whose "
            "answer is hidden cannot be used."
        )
    if faults:
        raise ValueError(" ".join(faults))
    return answer_of(index)


def answer_of(index: int) -> str:
    return f"The answer is {letter(index)}."


def options(row: dict) -> list[str]:
    return [f" {letter(index)}" for index in range(len(row["choices"]))]


def letter(index: int) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index]


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """The nine columns of the ScienceQA table, and the proportion of answers that are not a letter, in per cent."""
    names = ("answer", "subject", "grade", "has_image")
    references = [
        {name: record[name] for name in names}
        | {"num_choices": len(record["choices"]), "has_hint": bool(record["hint"])}
        for record in records
    ]
    return run_metric(METRIC, records, references, size)
