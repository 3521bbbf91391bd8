"""
NLVR2 (Suhr et al., 2019): is a statement about two photos true? 86,373 / 6,982 / 6,967 rows for training, validation
and testing. Read from a folder with the files of github.com/lil-lab/nlvr (`nlvr2/data`). The photos are in this folder
or any subfolder, such as the folders of the archives that the authors send on request, with their published names:

    train.json   dev.json   test1.json   .../dev-10-0-img0.png   .../dev-10-0-img1.png

or from a data set with the columns of `lmms-lab/NLVR2`: on the Hub, a folder that `save_to_disk` wrote, or a folder
with Parquet files. It has no train split, and the other splits only as balanced and unbalanced subsets; the balanced
subsets are read.
"""

import re
import sys
from pathlib import Path

from datasets import Dataset, Features, IterableDataset, Value

from tasks import _reader, _sources, _values, no_context, run_metric
from tasks._formats import read_records


COLUMNS = ("image", "images", "statement", "label", "identifier")
ANSWER_PREFIX = " The answer is"
MAX_NEW_TOKENS = 4  # some tokenizers have several tokens for "False"
DATASET, DATASET_ROWS = "lmms-lab/NLVR2", 2316  # test1.json has 4,651 others as well
CARD = {"task_type": "visual-question-answering", "metric_type": "accuracy", "score": "accuracy"}
CARD |= {"split": "balanced_test_public"}
METRIC = Path(__file__).parents[1] / "metrics" / "nlvr2"

LABELS = ("True", "False")
FILES = {"train": "train.json", "validation": "dev.json", "test": "test1.json"}
PARTS = {
    "train": ("train",),
    "validation": ("validation", "dev", "balanced_dev"),
    "test": ("test", "test1", "balanced_test_public"),
}
FEATURES = Features(
    {**_values.IMAGE_FEATURES, "statement": Value("string"), "label": Value("string"), "identifier": Value("string")}
)
FIELDS = {
    "image": ("images",),
    "left": ("left_image",),
    "right": ("right_image",),
    "statement": ("sentence", "question"),
    "label": ("label", "answer"),
    "identifier": ("identifier", "question_id"),
}
REQUIRED = ("statement", "label", "identifier")
LAYOUT = (
    "NLVR2 is read from a folder with train.json, dev.json and test1.json (github.com/lil-lab/nlvr, nlvr2/data), and "
    "the photos there or in folders below, or from a data set with the columns of lmms-lab/NLVR2. Give it as `path`, "
    "in train.py `--data_path`."
)


def load(
    split: str, path: str | None = None, streaming: bool = False, columns: str | None = None
) -> Dataset | IterableDataset:
    """
    Raises:
        FileNotFoundError: if the folder has no photos at all.
        ValueError: without a path, if there is no such split, or if a row has a fault.
    """
    if path is None:
        raise ValueError(f"path is None, but NLVR2 has no default location. {LAYOUT}")
    if split not in PARTS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(PARTS)}.")
    file = Path(path) / FILES[split]
    if columns is not None or file not in find_files(Path(path)):
        source = _sources.Source(sys.modules[__name__], path, columns, streaming)
        return source.rows(source.find_split(split))
    rows, faults = read(file)
    _reader.raise_first(faults, path)
    return _reader.make_dataset(rows, FEATURES, streaming, file, split)


def find_files(path: Path) -> list[Path]:
    """The published files."""
    return [file for name in FILES.values() if (file := path / name).exists() and is_published(file)]


def is_published(file: Path) -> bool:
    """Whether the first line has the form of NLVR2; files of other data may have the same name."""
    with open(file, encoding="utf-8", errors="replace") as lines:
        return '"identifier"' in (line := lines.readline()) and '"left_url"' in line


def read(file: Path, with_images: bool = False) -> tuple[list[dict], list[str]]:
    """
    The valid rows of a published file, and the faults of the other rows: one text for each fault, with the
    file, the line and a correction. Images are only opened if `with_images`. A row whose image is missing is kept,
    with the expected file name, since not all images are still available.

    Raises:
        FileNotFoundError: if there are no photos at all.
    """
    photos = {photo.name: str(photo) for photo in file.parent.rglob("*-img[01].png")}
    if not photos:
        raise FileNotFoundError(f"There are no photos (*-img0.png and *-img1.png) in {file.parent}. {LAYOUT}")

    find_image_faults = _values.image_checker(with_images)  # several rows refer to the same photo
    rows, faults = [], []
    for where, record, wrong in read_records(file):
        if not wrong:
            row, wrong = parse({**record, "statement": record.get("sentence")}, num_images=2)
        if not wrong:
            pair = row["identifier"].rpartition("-")[0]
            names = [f"{pair}-img{number}.png" for number in (0, 1)]
            images = [photos.get(name, str(file.parent / name)) for name in names]
            wrong = [fault for image in images for fault in find_image_faults(image)]
        faults += [f"{where}: {fault}" for fault in wrong]
        if not wrong:
            rows.append({"image": images[0], "images": images, **row})
    return rows, faults


def find_images(record: dict) -> list:
    """The two images of a row that has them in two columns."""
    return [record["left"], record["right"]]


def parse(record: dict, num_images: int) -> tuple[dict, list[str]]:
    """A row without its images, and its faults."""
    statement, label, identifier = map(record.get, REQUIRED)
    faults = _values.find_text_faults("the statement", statement)
    if num_images != 2:
        faults.append(f"it has {num_images} images. Give two, the left one first.")
    if str(label).capitalize() not in LABELS:
        faults.append(f"the label is {label!r}. Make it True or False.")
    if not isinstance(identifier, str) or not re.fullmatch(r"\w+-\w+-\w+-\w+", identifier):
        faults.append(f"the identifier is {identifier!r}. Make it `split-set-pair-sentence`, as in dev-10-0-1.")
    return {"statement": statement, "label": str(label).capitalize(), "identifier": identifier}, faults


context = no_context


def prompt(row: dict, context: str) -> str:
    return f"Statement: {row['statement']}\nIs it true of the left and the right image?"


def answer(row: dict) -> str:
    return f"The answer is {row['label']}."


def options(row: dict) -> list[str]:
    return [f" {label}" for label in LABELS]


def score(records: list[dict], size: int) -> dict[str, float]:
    """The official accuracy and consistency, and the proportion of answers that are neither label, in per cent."""
    references = [{name: record[name] for name in ("label", "identifier")} for record in records]
    return run_metric(METRIC, records, references, size)
