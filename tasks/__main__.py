"""
Work on data and answers that needs no model.

    python -m tasks check examples/vqa       # names each bad row of a folder or file that tasks/vqa.py or
                                             # tasks/easy_vqa.py reads
    python -m tasks score outputs/digits     # scores the answers of a run again and writes its results.json
"""

import argparse
import sys
from pathlib import Path

from tasks import easy_vqa, print_scores, score_folder, vqa


def check(path: Path) -> bool:
    """
    Prints what is wrong with JSON Lines in the format of `tasks/vqa.py`, or with `questions.json` in the format of
    `tasks/easy_vqa.py`. Returns whether nothing is.
    """
    files = sorted([*path.glob("*.jsonl"), *path.glob("data/*/questions.json")]) if path.is_dir() else [path]
    if not files:
        raise FileNotFoundError(
            f"{path} has no .jsonl file and no data/*/questions.json. Give a folder that has, or one file."
        )
    all_faults = []
    for file in files:
        task = easy_vqa if file.name == "questions.json" else vqa
        rows, faults = task.read(file, with_images=True)
        all_faults += faults
        images, choices = (sum(bool(row.get(name)) for row in rows) for name in ("image", "choices"))
        print(*faults, f"{file}: {len(rows)} good rows, {images} with an image, {choices} with choices", sep="\n")
    if all_faults:
        print(f"{len(all_faults)} faults")
    return not all_faults


def score(folder: Path) -> bool:
    """Scores a run's answers again and prints the scores."""
    print_scores(score_folder(folder))
    return True


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command in (check, score):
        subparser = commands.add_parser(command.__name__, description=command.__doc__)
        subparser.add_argument("path", type=Path)
        subparser.set_defaults(command=command)
    arguments = parser.parse_args()
    try:
        is_right = arguments.command(arguments.path)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # not a fault of this program
        sys.exit(str(error))
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
