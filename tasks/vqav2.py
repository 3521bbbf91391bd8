"""
VQAv2 (Goyal et al., 2017): questions about photos of COCO with ten answers each, 443,757 for training and 214,354 for
validation. Read from a folder with the unpacked files of https://visualqa.org/download.html:

    v2_OpenEnded_mscoco_{train2014,val2014}_questions.json   v2_mscoco_{train2014,val2014}_annotations.json
    train2014/*.jpg   val2014/*.jpg

or from a data set with the columns of `lmms-lab/VQAv2`: on the Hub, a folder that `save_to_disk` wrote, or a folder
with Parquet files.

The answers of the published test split are secret, so the validation split is the test split here, as in most papers.
The questions about one of every `HELD_OUT` training photos form the validation split. The model is trained on the
most frequent of the ten answers.
"""

import reprlib
import statistics
import sys
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, List, Value

from tasks import _reader, _sources, _values, no_context, no_options, read_entries, require_files, run_metric


COLUMNS = ("image", "question", "answer", "answers", "answer_type")
ANSWER_PREFIX = ""
MAX_NEW_TOKENS = 10  # an answer is rarely longer than three words
DATASET, DATASET_ROWS = "lmms-lab/VQAv2", 214_354
CARD = {"task_type": "visual-question-answering", "metric_type": "accuracy", "score": "average"}
CARD |= {"split": "validation"}  # the answers of the published test split are secret
METRIC = Path(__file__).parents[1] / "metrics" / "vqav2"

PARTS = {"train": ("train",), "validation": ("train",), "test": ("validation",)}
HELD_OUT = 50
FOLDERS = {"train": "train2014", "validation": "val2014"}
FEATURES = Features(
    {**_values.IMAGE_FEATURES, "question": Value("string"), "answer": Value("string")}
    | {"answers": List(Value("string")), "question_type": Value("string"), "answer_type": Value("string")}
    | {"question_id": Value("int64"), "image_id": Value("int64")}
)
FIELDS = {name: (name,) for name in FEATURES if name != "images"} | {"answer": ("multiple_choice_answer",)}
REQUIRED = ("image", "question", "answers", "image_id")
LAYOUT = (
    "VQAv2 is read from a folder with v2_OpenEnded_mscoco_{train2014,val2014}_questions.json, "
    "v2_mscoco_{train2014,val2014}_annotations.json and the image folders train2014 and val2014 "
    "(https://visualqa.org/download.html), or from a data set with the columns of lmms-lab/VQAv2. Give it as `path`, "
    "in train.py `--data_path`."
)


def load(
    split: str, path: str | None = None, streaming: bool = False, columns: str | None = None
) -> Dataset | IterableDataset:
    """
    Raises:
        FileNotFoundError: if the folder lacks the annotations or the image folder of the split.
        ValueError: without a path, if there is no such split, or if a row has a fault.
    """
    if path is None:
        raise ValueError(f"path is None, but VQAv2 has no default location. {LAYOUT}")
    if split not in PARTS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(PARTS)}.")
    if columns is None and find_files(Path(path)):
        file = Path(path) / questions_name(*PARTS[split])
        rows, faults = read(file)
        _reader.raise_first(faults, path)
        rows = _reader.make_dataset(rows, FEATURES, streaming, file, split)
    else:
        source = _sources.Source(sys.modules[__name__], path, columns, streaming)
        rows = source.rows(source.find_split(split))
    if split == "test":
        return rows
    if streaming:
        return rows.filter(lambda number: is_held_out(number) == (split == "validation"), input_columns="image_id")
    is_wanted = [is_held_out(number) == (split == "validation") for number in rows["image_id"][:]]
    return rows.select([index for index, wanted in enumerate(is_wanted) if wanted])


def is_held_out(image_id: int) -> bool:
    return image_id % HELD_OUT == 0


def questions_name(part: str) -> str:
    return f"v2_OpenEnded_mscoco_{FOLDERS[part]}_questions.json"


def find_files(path: Path) -> list[Path]:
    """The files of questions in the published layout."""
    return [file for part in FOLDERS if (file := path / questions_name(part)).exists()]


def read(file: Path, with_images: bool = False) -> tuple[list[dict], list[str]]:
    """
    The valid rows of a file of questions with its annotations in the same folder, and the faults of the other rows:
    one text for each fault, with the file, the number of the question and a correction. Images are only opened if
    `with_images`.

    Raises:
        FileNotFoundError: if a file or the image folder is missing.
        ValueError: if a file is damaged or has another form.
    """
    name = file.name.split("_")[3]  # train2014
    annotations, images = file.with_name(f"v2_mscoco_{name}_annotations.json"), file.parent / name
    require_files([file, annotations, images], LAYOUT)
    entries = read_entries(annotations, "annotations", LAYOUT, ("question_id",))
    answered = {entry["question_id"]: entry for entry in entries}

    find_image_faults = _values.image_checker(with_images)  # several rows refer to the same photo
    rows, faults = [], []
    for entry in read_entries(file, "questions", LAYOUT, ("question_id",)):
        number = entry["question_id"]
        if number not in answered:
            faults.append(f"{file}: question {number} has no annotation in {annotations.name}. Add it.")
            continue
        record = {**entry, **answered[number]}
        row, wrong = parse({field: record.get(key) for field, (key,) in FIELDS.items()}, num_images=1)
        if not wrong:
            image = str(images / f"COCO_{name}_{row['image_id']:012d}.jpg")
            wrong = find_image_faults(image)
        faults += [f"{file}: question {number}: {fault}" for fault in wrong]
        if not wrong:
            rows.append({"image": image, "images": None, **row})
    return rows, faults


def parse(record: dict, num_images: int) -> tuple[dict, list[str]]:
    """A row without its image, and its faults."""
    answers = record["answers"]
    if isinstance(answers, list):
        answers = [entry.get("answer") if isinstance(entry, dict) else entry for entry in answers]
    faults = _values.find_text_faults("`question`", record["question"])
    if num_images != 1:
        faults.append(f"it has {num_images} images. Give one.")
    answer = record["answer"]
    if not answers or not isinstance(answers, list) or not all(isinstance(text, str) for text in answers):
        faults.append(
            f"`answers` is {reprlib.repr(answers)}. Make it the list of the answers that people gave. The published "
            "test split has none: evaluate on the validation split."
        )
    else:
        answer = answer or statistics.mode(answers)
        faults += _values.find_text_faults("`multiple_choice_answer`", answer)
    if not isinstance(record["image_id"], int):
        faults.append(f"`image_id` is {record['image_id']!r}. Make it the number of the photo in COCO.")
    kept = {name: record[name] for name in ("question_type", "answer_type", "question_id", "image_id")}
    return {"question": record["question"], "answer": answer, "answers": answers, **kept}, faults


context, options = no_context, no_options


def prompt(row: dict, context: str) -> str:
    return f"Question: {row['question']}\nAnswer with a word or a short phrase."


def answer(row: dict) -> str:
    return row["answer"]


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """The official accuracy in per cent for each type of answer and for all questions (`average`)."""
    references = [{name: record[name] for name in ("answers", "answer_type")} for record in records]
    return run_metric(METRIC, records, references, size)
