"""
Each task is one module in this folder with

    COLUMNS                          columns that its rows must have
    ANSWER_PREFIX, MAX_NEW_TOKENS    text after the prompt in evaluation, and the maximum number of tokens that the
                                     model then generates greedily
    CARD                             names of the task and the metric on the Hub, the score for the model card, and
                                     `split`, the published split of the test rows, if it has another name
    load(split, path=None, streaming=False)
                                     -> `datasets.Dataset`, or `datasets.IterableDataset` when streaming, of the split
                                     "train", "validation" or "test". Column `image` is a `datasets.Image`, None in
                                     rows without an image; images are not decoded here. If rows may have several
                                     images, `images` has all of them (None in other rows) and `image` the first.
    context(row)                     -> str, the only part of a prompt that may be shortened (or `no_context`)
    prompt(row, context)             -> str, the user's message
    answer(row)                      -> str, the expected message of the model
    options(row)                     -> list of str, the possible answers after the prefix, or None (`no_options`)
    score(records, size)             -> dict of numbers, None for a score without rows

A record is a line of `predictions.jsonl`: a row without its image, with `index`, `prediction` (the text after the
prefix), `cut` (whether it was cut off after MAX_NEW_TOKENS, before its end or an option), `expected` (the row's
answer), `has_image` and `choice` (the index of the most likely option, None without options). Columns of rows need
other names than these. `size` is the number of rows in the split; another number of records is an error. A task may
also have

    DATASET, DATASET_ROWS            Hub id of its data, if they are on the Hub, and number of rows of the published
                                     test split, for the model card: the score of other rows, such as those of your own
                                     files, is not a result on this data set
    check_scorer()                   raises an error before training if a requirement of `score` is missing
    load(..., max_samples=None)      to generate a smaller split instead of using the first rows
    load(..., columns=None, holdout=None)
                                     for your own data: the columns to read, and the fraction of the train split that
                                     becomes a missing split; see tasks/_sources.py
    load(..., captions=None)         a file with captions of the images, for the context in evaluation
    find_files(path), read(file, with_images=False)
                                     the files of a published data set in a folder; the valid rows of a file, and the
                                     faults of the others. For `python -m tasks check`, which lists such tasks.
    messages(row)                    -> list of {"role": ..., "content": ...}, the last one the answer, for rows that
                                     are conversations; `prompt` and `context` are then not used
"""

import json
import os
import reprlib
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from types import ModuleType


# Files in the folder of a run of `train.py`
RUN_FILE, RESULTS_FILE, PREDICTIONS_FILE = "run.json", "results.json", "predictions.jsonl"
# What `train.py` adds to a row in `predictions.jsonl`
ADDED_COLUMNS = ("index", "prediction", "cut", "expected", "choice", "has_image")
NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def get_task(name: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"There is no task `{name}`. Tasks: {', '.join(NAMES)}.")
    return import_module(f"tasks.{name}")


def score_folder(folder: str | Path) -> dict:
    """
    Scores the answers that `train.py` has written to a folder; no model is needed. Reads `predictions.jsonl`, and
    `task` and `size` from `results.json`; writes `scores` into the latter, and `scores_by_likelihood` if each row has
    a `choice`.

    Returns:
        The new content of `results.json`.

    Raises:
        FileNotFoundError: if one of the two files is missing.
        ValueError: if one of them is damaged, or there is not one answer for each row of the split.
    """
    predictions, results = Path(folder) / PREDICTIONS_FILE, Path(folder) / RESULTS_FILE
    require_files([predictions, results], "`train.py` writes both files into its `--output_dir`.")
    facts = read_json(results.read_text(encoding="utf-8"), results)
    if missing := {"task", "size"} - facts.keys():
        raise ValueError(f"{results} has no `{min(missing)}`, which `train.py` writes. Run the evaluation again.")
    task = get_task(facts["task"])
    records = read_predictions(predictions, task)
    indices = [record["index"] for record in records if "index" in record]
    if len(indices) == facts["size"] and sorted(indices) != list(range(facts["size"])):
        raise ValueError(f"{predictions} does not have each row of the split once. Run the evaluation again.")
    scores = {"scores": task.score(records, facts["size"])}
    if all(record.get("choice") is not None for record in records):
        chosen = [{**record, "prediction": task.options(record)[record["choice"]]} for record in records]
        scores["scores_by_likelihood"] = task.score(chosen, facts["size"])
    others = {name: fact for name, fact in facts.items() if name not in ("scores", "scores_by_likelihood")}
    write_json(results, scores | others)
    return scores | others


def read_predictions(file: Path, task: ModuleType) -> list[dict]:
    """The lines of `predictions.jsonl`. Raises `ValueError` if there are none, or one lacks a value of the task."""
    records, needed = [], {*task.COLUMNS, "prediction", "expected", "has_image"} - {"image", "images"}
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        record = read_json(line, place := f"{file}, line {number}")
        if missing := needed - record.keys():
            raise ValueError(f"{place} has no `{min(missing)}`. A line needs {', '.join(sorted(needed))}.")
        if not isinstance(record["prediction"], str):
            raise ValueError(f"{place} has the `prediction` {record['prediction']!r}. Make it a text.")
        records.append(record)
    if not records:
        raise ValueError(f"{file} has no answers. Run the evaluation again.")
    return records


def write_json(file: Path, content: dict):
    """Writes the file atomically: if the process is killed, the old file is kept."""
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=2, default=str), encoding="utf-8")
    os.replace(unfinished, file)


def read_json(text: str | bytes, place, advice: str = "Run the evaluation again.") -> dict:
    """Raises `ValueError` that names the place if the text is not a JSON object."""
    try:
        value = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{place} is not valid JSON ({error}). {advice}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{place} has {reprlib.repr(value)} in place of a JSON object. {advice}")
    return value


def read_entries(file: Path, name: str, layout: str, keys: Iterable[str] = ()) -> list:
    """
    The list with this name in the JSON object of a published file. Raises `ValueError` with `layout` if there is none,
    or an entry lacks one of `keys`.
    """
    entries = read_json(file.read_bytes(), file, layout).get(name)
    if not isinstance(entries, list):
        raise ValueError(f"{file} has no list `{name}`. {layout}")
    for number, entry in enumerate(entries):
        require_keys(entry, keys, f"{file}: entry {number} of `{name}`", layout)
    return entries


def require_keys(entry, keys: Iterable[str], place, layout: str):
    """Raises `ValueError` with the first key that an entry of a published file lacks, and `layout`."""
    for key in keys:
        if not isinstance(entry, dict) or key not in entry:
            raise ValueError(f"{place} has no `{key}`. {layout}")


def print_scores(results: dict):
    """Prints the scores of `score_folder`, one line for each way of choosing an answer."""
    for kind in ("scores", "scores_by_likelihood"):
        if kind in results:
            scores = {name: value for name, value in results[kind].items() if value is not None}
            print(f"{kind}:", *(f"{name} {format_score(value)}" for name, value in scores.items()))


def format_score(value: int | float) -> str:
    """A count as it is, a score with two decimals."""
    return str(value) if isinstance(value, int) else f"{value:.2f}"


def no_context(row: dict) -> str:
    """The function `context` of a task whose prompts are never shortened."""
    return ""


def no_options(row: dict) -> None:
    """The function `options` of a task with free answers."""
    return None


def run_metric(metric: Path, records: list[dict], references: list, size: int) -> dict:
    """Computes the scores of the predictions in records with one of the metrics in `metrics/`."""
    import evaluate

    # In memory, since processes that score at the same time would share a file
    metric = evaluate.load(str(metric), keep_in_memory=True)
    predictions = [record["prediction"] for record in records]
    return metric.compute(predictions=predictions, references=references, size=size)


def check_size(records: list[dict], size: int):
    """Raises ValueError if there are fewer or more records than the split has rows."""
    if len(records) != size:
        raise ValueError(f"There are {len(records)} predictions for a split of {size} rows. Score each row once.")


def require_files(paths: Iterable[Path], layout: str):
    """Raises FileNotFoundError with the first missing file or folder, how many more there are, and `layout`."""
    missing = [path for path in paths if not path.exists()]
    if missing:
        more = f" (and {len(missing) - 1:,} more)" if len(missing) > 1 else ""
        raise FileNotFoundError(f"{missing[0]}{more} is missing. {layout}")
