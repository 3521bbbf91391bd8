"""Takes test and validation splits from the train rows of your own data (`--holdout`)."""

from collections.abc import Iterator
from functools import partial

import numpy as np
from datasets import Dataset, Features, Image, Value
from datasets.fingerprint import Hasher

from tasks._reader import map_rows
from tasks._values import IMAGE_FEATURES, list_images


KEPT_TOGETHER = (
    "Rows with the same images, or with the same texts and no image, are kept in one split; if there are too few "
    "images for that, only equal rows are"
)


def split_rows(rows: Dataset, names: list[str], fraction: float, place: str) -> dict[str, list[int]]:
    """
    The indices of the rows of each split in `names` and of `train`, always the same ones.

    Args:
        fraction: the part of the rows that each split in `names` takes.
        place: where the rows are from, for the message.

    Raises:
        ValueError: if a split would have no rows.
    """
    size = max(1, round(fraction * len(rows)))
    for by_images in (True, False):
        groups = find_groups(rows, by_images)
        parts = dict(zip(names, take_groups(groups, [size] * len(names))))
        parts["train"] = sorted({*range(len(rows))}.difference(*parts.values()))
        if all(parts.values()):
            return parts
    raise ValueError(
        f"The train split of {place} has {len(rows)} rows, {len(groups)} of them different. `--holdout {fraction}` "
        f"takes {size} for {' and '.join(names)} each, and leaves none to train on. Add rows, or give a smaller "
        "fraction."
    )


def find_groups(rows: Dataset, by_images: bool) -> list[list[int]]:
    """
    The indices of rows that must be in the same split: equal rows or, with `by_images`, also others about the same
    images. Images are the same if their paths or their bytes are.
    """
    rows = rows.cast_column("image", Image(decode=False))
    features, fingerprint = Features({"group": Value("string")}), Hasher.hash([rows._fingerprint, by_images])
    named, groups = map_rows(rows, partial(name_group, by_images=by_images), features, fingerprint), {}
    for index, group in enumerate(named["group"]):
        groups.setdefault(group, []).append(index)
    return list(groups.values())


def name_group(row: dict, index: int, by_images: bool) -> dict:
    images = [image["bytes"] or image["path"].encode() for image in list_images(row)]
    texts = {name: value for name, value in row.items() if name not in IMAGE_FEATURES}
    return {"group": Hasher.hash_bytes(images if images and by_images else [*images, repr(texts).encode()])}


def take_groups(groups: list[list[int]], sizes: list[int]) -> Iterator[list[int]]:
    """Yields a part of each size from random groups, always the same ones, or one group if all are too large."""
    left = [groups[number] for number in np.random.default_rng(0).permutation(len(groups))]
    for size in sizes:
        part, candidates, left = [], left, []
        for group in candidates:
            if len(part) + len(group) <= size:
                part += group
            else:
                left.append(group)
        if left and not part:
            part = left.pop(left.index(min(left, key=len)))
        yield sorted(part)
