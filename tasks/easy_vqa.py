"""
easy-VQA (Zhou, 2019): short questions about pictures of one coloured shape, 38,575 / 9,673 of them about 4,000 / 1,000
pictures, with 13 different answers. Read from a folder in the layout of the Python package `easy-vqa` 1.0:

    data/{train,test}/questions.json   data/{train,test}/images/<number>.png

Without a path, the wheel is downloaded once by `pip` into the user's cache. It is neither installed nor imported.

The data has no validation split: 5 % of the training pictures are held out with all of their questions, so that no
picture of the validation split is used for training.

The type of a question follows from its answer: "yes" and "no" answer yes/no questions, "circle" a question about the
shape, "red" a question about the colour. No answer belongs to two types.
"""

import hashlib
import json
import os
import random
import reprlib
from pathlib import Path
from tempfile import TemporaryDirectory
from zipfile import ZipFile

from datasets import Dataset, Features, Image, IterableDataset, Value
from filelock import FileLock

from tasks import _reader, _values, _wheels, check_size, no_context, no_options, require_files, vqa


COLUMNS = ("image", "question", "answer")
ANSWER_PREFIX = ""
MAX_NEW_TOKENS = 8  # an answer is one word; the tokenizer in assets/ has up to 6 tokens for it
CARD = vqa.CARD
DATASET_ROWS = 9673

REQUIREMENT = "easy-vqa==1.0"
SHA256 = "fcb51b309b78c7b00f97b64cdbcbcf5c105f94da1b39c0796cee5a787c4f650f"  # of its wheel
HELD_OUT = 0.05  # fraction of the training pictures that form the validation split

ANSWERS = {
    "yes/no": ("yes", "no"),
    "shape": ("circle", "rectangle", "triangle"),
    "colour": ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow"),
}
TYPES = {answer: kind for kind, answers in ANSWERS.items() for answer in answers}
FEATURES = Features(
    {"image": Image(), "question": Value("string"), "answer": Value("string"), "image_id": Value("int64")}
)
LAYOUT = (
    "easy-VQA is read from a folder with data/{train,test}/questions.json and data/{train,test}/images/<number>.png. "
    "To get it, run `pip download --no-deps easy-vqa==1.0` where there is a package registry, or download the wheel "
    "from https://pypi.org/project/easy-vqa/1.0/#files. Unpack it (it is a zip file) and give its folder `easy_vqa` "
    "as `path`, in train.py `--data_path`."
)


def load(split: str, path: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """
    Raises:
        FileNotFoundError: if the folder lacks `questions.json` or an image.
        OSError: without a path, if the wheel cannot be downloaded.
        ValueError: if there is no such split, a row has a fault, or the wheel has another checksum.
    """
    if split not in ("train", "validation", "test"):
        raise ValueError(f"split is {split!r}, but must be train, validation or test.")
    folder = Path(path) if path is not None else download()
    file = folder / "data" / ("test" if split == "test" else "train") / "questions.json"
    require_files([file], LAYOUT)
    rows, faults = read(file)
    _reader.raise_first(faults, file)
    require_files(sorted({Path(row["image"]) for row in rows}), LAYOUT)
    if split != "test":
        held_out = hold_out({row["image_id"] for row in rows})
        rows = [row for row in rows if (row["image_id"] in held_out) == (split == "validation")]
    return _reader.make_dataset(rows, FEATURES, streaming, file, split)


def download() -> Path:
    """
    The folder `easy_vqa` of the wheel in the user's cache. The wheel is downloaded if necessary.

    Raises:
        OSError: if `pip` fails, for example because no package registry can be reached.
        ValueError: if the wheel has another checksum.
    """
    home = _wheels.cache_folder()
    folder = home / "easy-vqa-1.0"
    if folder.exists():
        return folder
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / f"{folder.name}.lock"), TemporaryDirectory(dir=home) as temporary:
        if not folder.exists():  # another process may have downloaded it in the meantime
            with ZipFile(download_wheel(temporary)) as wheel:
                data = [name for name in wheel.namelist() if name.startswith("easy_vqa/data/")]
                wheel.extractall(temporary, data)
            os.replace(Path(temporary) / "easy_vqa", folder)
    return folder


def download_wheel(folder: str) -> Path:
    try:
        wheel = _wheels.download(REQUIREMENT, folder)
    except OSError as error:
        raise OSError(f"{error}\n{LAYOUT}") from error
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != SHA256:
        raise ValueError(f"{wheel.name} has the SHA-256 {digest}, but the published one has {SHA256}.\n{LAYOUT}")
    return wheel


def hold_out(images: set[int]) -> set[int]:
    """The pictures of the validation split."""
    return set(random.Random(0).sample(sorted(images), max(1, round(HELD_OUT * len(images)))))


def find_files(path: Path) -> list[Path]:
    """The files of questions in the published layout."""
    return [path] if path.name == "questions.json" else sorted(path.glob("data/*/questions.json"))


def read(file: Path, with_images: bool = False) -> tuple[list[dict], list[str]]:
    """
    The valid rows of a `questions.json`, and the faults of the other rows: one text for each fault, with the
    file, the row (counted from 0) and a correction. Images are only opened if `with_images`.
    """
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        return [], [f"{file}: not JSON in UTF-8: {error}. Write one list of rows."]
    if not isinstance(entries, list) or not entries:
        return [], [f"{file}: no rows. Write one list of rows."]

    find_image_faults = _values.image_checker(with_images)  # several questions refer to the same picture
    rows, faults = [], []
    for index, entry in enumerate(entries):
        wrong = find_faults(entry) or find_image_faults(image_of(file, entry[2]))
        faults += [f"{file}: row {index}: {fault}" for fault in wrong]
        if not wrong:
            question, answer, number = entry
            image = image_of(file, number)
            rows.append({"image": image, "question": question, "answer": answer, "image_id": number})
    return rows, faults


def find_faults(entry) -> list[str]:
    """The faults of an entry of `questions.json`, except those of its image."""
    match entry:
        case [str(question), str(answer), int()] if question.strip() and answer in TYPES:
            return []
    return [
        f'{reprlib.repr(entry)} is not a row. Write ["question", "answer", number of the image], with one of these '
        f"answers: {', '.join(TYPES)}."
    ]


def image_of(file: Path, number: int) -> str:
    return str(file.parent / f"images/{number}.png")


context, options = no_context, no_options


def prompt(row: dict, context: str) -> str:
    return row["question"]


def answer(row: dict) -> str:
    return row["answer"]


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """
    Accuracy in per cent of each type of question and of all questions (`average`). An answer is correct if it equals
    the expected word after `tasks.vqa.normalise`.
    """
    return score_kinds(records, size, TYPES)


def score_kinds(records: list[dict], size: int, kinds: dict[str, str]) -> dict[str, float | None]:
    """As `score`, for each kind of row. `kinds` maps each expected answer to its kind."""
    check_size(records, size)
    hits = {kind: [] for kind in kinds.values()}
    for record in records:
        hits[kinds[record["answer"]]].append(vqa.normalise(record["prediction"]) == record["answer"])
    accuracy = {kind: 100 * sum(part) / len(part) if part else None for kind, part in hits.items()}
    return {**accuracy, "average": 100 * sum(map(sum, hits.values())) / size, "count": size}
