"""Takes test and validation splits from the train rows of your own data (`--holdout`)."""

import os
from collections.abc import Iterator
from functools import partial

import numpy as np
from datasets import Dataset, Features, Image, List, Value
from datasets.fingerprint import Hasher

from tasks._reader import map_rows
from tasks._values import IMAGE_FEATURES, list_images


KEPT_TOGETHER = (
    "Rows that share an image are kept in one split, as are rows without an image that have the same texts. If there "
    "are too few images for this, only equal rows are kept together"
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
    The indices of rows that must be in the same split: equal rows or, with `by_images`, also all that share an image,
    directly or through other rows. Images are the same if their files or their bytes are.
    """
    rows = rows.cast_column("image", Image(decode=False))
    features, fingerprint = Features({"keys": List(Value("string"))}), Hasher.hash([rows._fingerprint, by_images])
    keys_of_rows = map_rows(rows, partial(keys_of, by_images=by_images), features, fingerprint)["keys"][:]
    parents, groups = {}, {}  # a forest: the keys of a group have the same root

    def root(key: str) -> str:
        while parents[key] != key:
            parents[key] = key = parents[parents[key]]
        return key

    for first, *others in keys_of_rows:
        parents.setdefault(first, first)
        for key in others:
            parents[root(parents.setdefault(key, key))] = root(first)
    for index, (first, *_) in enumerate(keys_of_rows):
        groups.setdefault(root(first), []).append(index)
    return list(groups.values())


def real_path(path: str) -> str:
    """The same text for every path of a file. URLs are returned unchanged."""
    return path if "://" in path else os.path.realpath(path)


def keys_of(row: dict, index: int, by_images: bool) -> dict:
    """Rows that have one of these keys in common are in one group."""
    images = [
        real_path(image["path"]).encode() if image["bytes"] is None else image["bytes"] for image in list_images(row)
    ]
    if images and by_images:
        parts = [[image] for image in images]
    else:
        texts = {name: value for name, value in row.items() if name not in IMAGE_FEATURES}
        parts = [[*images, repr(texts).encode()]]
    return {"keys": [Hasher.hash_bytes(part) for part in parts]}


def take_groups(groups: list[list[int]], sizes: list[int]) -> Iterator[list[int]]:
    """Yields, for each size, random groups that fit into it (the same in every run), or one group if none fits."""
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
