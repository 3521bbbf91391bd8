"""
COCO Captions (Chen et al., 2015) in the splits of Karpathy and Fei-Fei (2015): 113,287 / 5,000 / 5,000 images with
about five captions each. Read from a folder with

    dataset_coco.json   train2014/*.jpg   val2014/*.jpg

A training row is one caption that is not blank; a row for evaluation is one image with all of its captions.
"""

import shutil
from pathlib import Path

from datasets import Dataset, Features, Image, IterableDataset, List, Value

from tasks import _reader, no_context, no_options, read_entries, require_files, run_metric


COLUMNS = ("image", "captions", "image_id")
ANSWER_PREFIX = ""
MAX_NEW_TOKENS = 40  # a caption has about 10 words, and rarely more than 25
CARD = {"task_type": "image-to-text", "metric_type": "cider", "score": "CIDEr"}
DATASET_ROWS = 5000
METRIC = Path(__file__).parents[1] / "metrics" / "coco_captions"

PARTS = {"train": ("train", "restval"), "validation": ("val",), "test": ("test",)}
FEATURES = Features({"image": Image(), "captions": List(Value("string")), "image_id": Value("int64")})
LAYOUT = (
    "COCO Captions is read from a folder with dataset_coco.json, Karpathy's splits "
    "(https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip), and the image folders train2014 "
    "and val2014 (http://images.cocodataset.org/zips/train2014.zip and val2014.zip). Unpack them there and give the "
    "folder as `path`, in train.py `--data_path`."
)


def load(split: str, path: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """
    Raises:
        FileNotFoundError: if `path` lacks the file with the splits or an image folder of this split.
        ValueError: without a path, if there is no such split, or if the file is damaged or has another form.
    """
    if path is None:
        raise ValueError(f"path is None, but COCO Captions has no default location. {LAYOUT}")
    if split not in PARTS:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(PARTS)}.")
    folder = Path(path)
    splits = folder / "dataset_coco.json"
    require_files([splits], LAYOUT)
    entries = read_entries(splits, "images", LAYOUT, ("split", "filepath", "filename", "sentences", "cocoid"))
    entries = [entry for entry in entries if entry["split"] in PARTS[split]]
    require_files(sorted({folder / entry["filepath"] for entry in entries}), LAYOUT)
    rows = []
    for entry in entries:
        image = folder / entry["filepath"] / entry["filename"]
        captions = [" ".join(sentence["raw"].split()) for sentence in entry["sentences"]]
        for group in [[caption] for caption in captions if caption] if split == "train" else [captions]:
            rows.append({"image": str(image), "captions": group, "image_id": entry["cocoid"]})
    return _reader.make_dataset(rows, FEATURES, streaming, splits, split)


context, options = no_context, no_options


def prompt(row: dict, context: str) -> str:
    return "Describe the image in one sentence."


def answer(row: dict) -> str:
    return row["captions"][0]


def check_scorer():
    """Scores one caption, so that a missing package (`ImportError`) or Java (`RuntimeError`) is reported early."""
    if shutil.which("java") is None:
        raise RuntimeError(
            "There is no `java` on PATH, but captions are scored after the PTB tokenizer, a Java program that is part "
            "of pycocoevalcap. Install a Java runtime, on Debian and Ubuntu with `apt install default-jre-headless`."
        )
    score([{"prediction": "two dogs", "captions": ["two dogs", "a cat"]}], size=1)


def score(records: list[dict], size: int) -> dict[str, float]:
    """BLEU-1 to BLEU-4 and CIDEr, multiplied by 100 as in papers (`scale`), and the number of images (`count`)."""
    return run_metric(METRIC, records, [record["captions"] for record in records], size)
