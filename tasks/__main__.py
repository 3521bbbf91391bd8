"""
Checks data and scores answers, without a model.

    python -m tasks check examples/vqa       # lists the bad rows of your own data, and possible mistakes
    python -m tasks score outputs/digits     # scores the answers of a run again and writes its results.json
"""

import argparse
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from tasks import easy_vqa, get_task, nlvr2, print_scores, score_folder, vqav2
from tasks._formats import choose_split, split_of
from tasks._sources import Source
from tasks._values import IMAGE_FEATURES, find_reading_faults, image_checker, list_images


PUBLISHED = (easy_vqa, nlvr2, vqav2)  # tasks that read the files of a published data set
# Columns that tell the task of a data set
TASK_OF_COLUMN = {"messages": "chat", "conversations": "chat", "left_image": "nlvr2"}
TASK_OF_COLUMN |= {"multiple_choice_answer": "vqav2"}
# Files and columns of the data of tasks that `check` does not read
UNCHECKED_FILES = {"problems.json": "scienceqa", "dataset_coco.json": "coco_captions"}
UNCHECKED_COLUMNS = {"hint", "subject", "grade"}, "scienceqa"

LONG = 2000  # characters: about 500 tokens of English
# Control tokens of language models. In the texts of data they are read as ordinary text.
CONTROL_TOKENS = re.compile(
    r"</?s>|<\|[\w ]+\|>|<(?:bos|eos|pad|unk|video|audio|start_of_turn|end_of_turn)>|\[/?INST\]"
    r"|</?(?i:img|image)(?:[ _]?\w+)?>|\[IMG\]"  # image placeholders in the data of other models
)


def check(path: str, task: str | None = None, columns: str | None = None) -> bool:
    """
    Reads all rows of your own data in the same way as training, and opens their images. Prints each fault, the number
    of rows, and notes about possible mistakes. Returns whether there is no fault; the exit status is then 0.
    """
    published = {file: module for module in PUBLISHED for file in module.find_files(Path(path))}
    names = {module.__name__.rpartition(".")[2] for module in published.values()}
    if published and not columns and (task is None or {task} == names):
        num_faults = sum(check_file(module, file) for file, module in published.items())
    else:
        task = task or guess_task(path)
        source = Source(get_task(task), path, columns)
        print(f"{path}: {source.format}, read with --task {task}")
        names = {name: name for name in source.splits}
        known, trained, num_faults = {*map(split_of, names), *names}, Trained(), 0
        splits = [source.find_split(split) for split in ("train", "validation", "test")]
        for split in [split for split in dict.fromkeys(splits) if split in known] or splits[:1]:
            num_faults += check_split(source, choose_split(names, split, path, source.files), split, trained)
        for unread in source.find_unread():
            print(f"note: {unread}")
        if "train" not in known:
            print("note: there is no train split, without which `train.py` can only evaluate an adapter")
        elif not ("test" in known or hasattr(source.task, "PARTS") or source.find_unread("test")):
            print("note: there is no test split. `train.py --holdout 0.05` takes one from the train split.")
    if num_faults:
        print(f"{num_faults} faults")
    return not num_faults


def guess_task(path: str) -> str:
    """The task that reads the data. Raises `ValueError` for the data of a task that is not checked here."""
    found = [name for file, name in UNCHECKED_FILES.items() if (Path(path) / file).is_file()]
    source = None if found else Source(get_task("chat"), path)
    names = source.names(next(iter(source.splits))) if source else []
    columns, name = UNCHECKED_COLUMNS
    if found or columns <= {*names}:
        raise ValueError(
            f"{path} is data of `--task {found[0] if found else name}`, which this command does not check. `train.py` "
            "reports a fault before training. If it is data of your own, give `--task vqa`."
        )
    return next((task for column, task in TASK_OF_COLUMN.items() if column in names), "vqa")


def check_file(task: ModuleType, file: Path) -> int:
    rows, faults = task.read(file, with_images=True)
    print(*faults, f"{file}: {len(rows)} good rows, {len(rows)} with an image", sep="\n")
    return len(faults)


@dataclass
class Trained:
    """What was found in the train split."""

    rows: set[int] = field(default_factory=set)  # hashes
    has_images: bool = False


def check_split(source: Source, name: str, split: str, trained: Trained) -> int:
    """Checks a split and prints the result. Returns the number of faults. `trained` is filled by the train split."""
    if faults := source.find_missing(name, source.find_absent(name)):
        print(*faults, sep="\n")
        return len(faults)
    num_faults, num_rows, most_images, present, longest, notes = 0, 0, 0, {}, {}, {}
    read_once, unread_keys = image_checker(), {}

    def note(kind: str, where: str):
        count, first = notes.get(kind, (0, where))
        notes[kind] = count + 1, first

    for where, row, faults in source.records(name, unread_keys):
        images = list_images(row) if row else []
        for image in images:
            is_file = image["bytes"] is None
            faults = [*faults, *(read_once(image["path"]) if is_file else find_reading_faults(image))]
        for fault in faults:
            print(f"{where}: {fault}")
        num_faults += len(faults)
        if faults:
            continue
        num_rows += 1
        for column, value in row.items():
            present[column] = present.get(column, 0) + (value is not None)
        for column, text in find_texts(row):
            longest[column] = max(longest.get(column, 0), len(text))
            for token in set(CONTROL_TOKENS.findall(text)):
                note(f"`{token}` in `{column}`, which is treated as ordinary text", where)
        prompt = {name: row.get(name) for name in ("question", "choices")} | {"messages": row.get("messages", [])[:-1]}
        if sum(len(text) for _, text in find_texts(prompt)) > LONG:
            note(
                f"a prompt of more than {LONG:,} characters besides `context`, which may exceed `--max_prompt_length` "
                "(512 tokens by default)",
                where,
            )
        most_images = max(most_images, len(images))
        texts = {column: value for column, value in row.items() if column not in IMAGE_FEATURES}
        pictures = [image["path"] if image["bytes"] is None else hash(image["bytes"]) for image in images]
        row_hash = hash(repr((texts, pictures)))
        if row_hash in trained.rows:
            note("a row that is also in the train split" if split != "train" else "a row that is repeated", where)
        if split == "train":
            trained.rows.add(row_hash)
            trained.has_images |= bool(images)
    absent = [field for field in source.fields if present.get(field) == 0]
    for fault in source.find_missing(name, absent):
        num_faults += 1
        print(fault)
    print(f"{source.label(name)}: {num_rows} good rows, {present.get('image', 0)} with an image", end="")
    print(f", {present['choices']} with choices" if "choices" in present else "")
    if len(files := source.files.get(name, ())) > 1:
        print(f"read from {len(files)} files, {files[0]} to {files[-1]}")
    if most_images > 1:
        print(f"rows with several images: {present['images']}. Train with `--max_images {most_images}`.")
    if longest:
        lengths = ", ".join(f"{column} {length}" for column, length in longest.items())
        print(f"longest texts in characters: {lengths}")
    if trained.has_images and not present.get("image"):
        print("note: no row has an image, unlike in the train split")
    read = {column for columns in source.fields.values() for column in columns}
    if unread := [column for column in source.names(name) if column not in read]:
        print(f"note: columns that are not read: {', '.join(unread)}")
    if unread_keys:
        print(f"note: keys of messages that are not read: {', '.join(unread_keys)}")
    for kind, (count, first) in notes.items():
        print(f"note: {count} times {kind}, the first at {first}")
    return num_faults


def find_texts(row: dict) -> Iterator[tuple[str, str]]:
    """The texts of a row and their columns."""
    for column, value in row.items():
        for text in value if isinstance(value, list) else [value]:
            text = text.get("content") if isinstance(text, dict) and column not in IMAGE_FEATURES else text
            if isinstance(text, str):
                yield column, text


def score(path: str) -> bool:
    """Scores a run's answers again and prints the scores."""
    print_scores(score_folder(path))
    return True


def main():
    parser = argparse.ArgumentParser(
        prog="python -m tasks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for command in (check, score):
        subparser = commands.add_parser(command.__name__, description=command.__doc__)
        subparser.add_argument("path", help="file, folder or Hub id" if command is check else "--output_dir of a run")
        subparser.set_defaults(command=command)
        if command is check:
            readers = ["vqa", *dict.fromkeys(TASK_OF_COLUMN.values())]
            subparser.add_argument("--task", choices=readers, help="task that reads it, if not as its columns say")
            subparser.add_argument("--columns", help="columns with other names: question=prompt,answer=label")
    arguments = vars(parser.parse_args())
    sys.stdout.reconfigure(errors="backslashreplace")  # faulty texts may contain characters that cannot be printed
    try:
        is_right = arguments.pop("command")(**arguments)
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # not an error of this program
        sys.exit(str(error))
    sys.exit(0 if is_right else 1)


if __name__ == "__main__":
    main()
