# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Creates a data set for `--task chat` from the drawings of Noto Emoji, with questions about the kind of thing that a
drawing shows. Every fifth drawing is in the test split only.

    python examples/emoji.py outputs/emoji-data
    accelerate launch train.py recipes/emoji-smollm2.yaml

The drawings (64 x 64 pixels, Apache-2.0) and their categories come from the npm package `emoji-datasource-google`
16.0.0 (MIT; 74 MB, kept in the cache folder).
"""

import argparse
import json
import random
import sys
import tarfile
import urllib.request
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks import _wheels  # noqa: E402


URL = "https://registry.npmjs.org/emoji-datasource-google/-/emoji-datasource-google-16.0.0.tgz"
SHA256 = "fb5fd131b362aab7a55542d2a147a79708cce0a8b1c1bbacd470172708b5c438"
KINDS = {
    "Smileys & Emotion": "face",
    "People & Body": "person",
    "Animals & Nature": "animal",
    "Food & Drink": "food",
    "Travel & Places": "place",
    "Activities": "activity",
    "Objects": "object",
    "Symbols": "symbol",
    "Flags": "flag",
}


def download() -> Path:
    """
    The package in the cache folder, downloaded if necessary.

    Raises:
        OSError: if the download fails, or the file has another checksum.
    """
    file = _wheels.cache_folder() / URL.rpartition("/")[2]
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=file.parent) as folder:
            try:
                part, _ = urllib.request.urlretrieve(URL, Path(folder) / file.name)
            except OSError as error:
                raise OSError(f"{URL} could not be downloaded ({error}). Put the file at {file}.") from error
            Path(part).replace(file)
    _wheels.check_digest(file, SHA256)
    return file


def questions(kind: str, rng: random.Random) -> list[tuple[str, str]]:
    """Three questions with their answers: one about the kind, one with the answer yes and one with the answer no."""
    other = rng.choice([name for name in KINDS.values() if name != kind])
    return [("what kind of thing is this?", kind), (f"is this a {kind}?", "yes"), (f"is this a {other}?", "no")]


def make(package: Path, folder: Path):
    """Writes `train.jsonl`, `test.jsonl` and `images` to an existing folder."""
    rng = random.Random(0)
    (folder / "images").mkdir(exist_ok=True)
    rows = {"train": [], "test": []}
    with tarfile.open(package) as archive:
        drawings = json.load(archive.extractfile("package/emoji.json"))
        drawings = [entry for entry in drawings if entry["has_img_google"] and entry["category"] in KINDS]
        rng.shuffle(drawings)
        split_of = {entry["image"]: "train" if index % 5 else "test" for index, entry in enumerate(drawings)}
        kind_of = {entry["image"]: KINDS[entry["category"]] for entry in drawings}
        for member in archive:  # in its own order, so that the archive is read only once
            name = Path(member.name).name
            if "/img/google/64/" not in member.name or name not in kind_of:
                continue
            Image.open(archive.extractfile(member)).convert("RGBA").save(folder / "images" / name)
            for question, answer in questions(kind_of[name], rng):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows[split_of[name]].append({"image": f"images/{name}", "messages": messages})
    for split, entries in rows.items():
        rng.shuffle(entries)
        text = "".join(json.dumps(row) + "\n" for row in entries)
        (folder / f"{split}.jsonl").write_text(text, encoding="utf-8")
        print(f"{folder / split}.jsonl: {len(entries):,} questions about {len(entries) // 3:,} drawings")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="output folder")
    folder = parser.parse_args().folder
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        parser.error(f"{folder} cannot be the output folder ({error}). Give another one.")
    make(download(), folder)


if __name__ == "__main__":
    main()
