"""
Pairs of easy-VQA pictures (see tasks/easy_vqa.py): do both show the same shape? Each picture that has a question about
its shape is the left picture of equally many pairs with the same shape and with another shape. The right pictures are
drawn from the same split: 29,590 pairs for training, 296 for validation and 1,526 for testing. The answer cannot be
guessed from the question or the left picture.
"""

import random

from datasets import Dataset, Features, Image, IterableDataset, Value

from tasks import easy_vqa, no_context, no_options
from tasks._reader import make_dataset
from tasks._values import IMAGE_FEATURES


COLUMNS = ("image", "images", "answer")
ANSWER_PREFIX = easy_vqa.ANSWER_PREFIX
MAX_NEW_TOKENS = easy_vqa.MAX_NEW_TOKENS
CARD = easy_vqa.CARD
DATASET_ROWS = 1526

PAIRS_OF_EACH = {"train": 5, "validation": 1, "test": 1}  # left pictures, of the same shape and of another one
FEATURES = Features({**IMAGE_FEATURES, "answer": Value("string")})


def load(split: str, path: str | None = None, streaming: bool = False) -> Dataset | IterableDataset:
    """Raises OSError and ValueError as `easy_vqa.load`, or if all pictures of the split show the same shape."""
    rows = easy_vqa.load(split, path).cast_column("image", Image(decode=False))
    pairs = zip(rows["image"][:], rows["answer"][:])
    shapes = {image["path"]: answer for image, answer in pairs if easy_vqa.TYPES[answer] == "shape"}
    if len(set(shapes.values())) < 2:
        raise ValueError(f"The {split} split shows fewer than two shapes, which pairs need.")
    partners = {
        (shape, answer): [picture for picture in shapes if (shapes[picture] == shape) == (answer == "yes")]
        for shape in set(shapes.values())
        for answer in ("yes", "no")
    }
    numbers, rows = random.Random(split), []
    for left, shape in shapes.items():
        for answer in ("yes", "no") * PAIRS_OF_EACH[split]:
            images = [left, numbers.choice(partners[shape, answer])]
            rows.append({"image": left, "images": images, "answer": answer})
    return make_dataset(rows, FEATURES, streaming, path, split)


context, options = no_context, no_options


def prompt(row: dict, context: str) -> str:
    return "Do both pictures show the same shape?"


def answer(row: dict) -> str:
    return row["answer"]


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """Accuracy in per cent of the pairs that show the same shape ("yes"), of the others, and of all (`average`)."""
    return easy_vqa.score_kinds(records, size, {"yes": "yes", "no": "no"})
