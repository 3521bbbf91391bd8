"""
One file a task. A task is a module with

    COLUMNS                          columns that its rows must have
    ANSWER_PREFIX, MAX_NEW_TOKENS    evaluation lets the model go on from prompt and prefix by so many greedy tokens
    load(split, path=None)           -> `datasets.Dataset`
    context(row)                     -> str, the only part of a prompt that may be shortened
    prompt(row, context)             -> str, what the user says
    answer(row)                      -> str, what the model should say
    score(predictions, rows)         -> dict of numbers, `predictions` being the text after the prefix, one per row
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType


NAMES = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[!_]*.py")))


def get_task(name: str) -> ModuleType:
    if name not in NAMES:
        raise ValueError(f"There is no task `{name}`. There are: {', '.join(NAMES)}.")
    return import_module(f"tasks.{name}")
