# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Reads the recipe and the flags of a command as text. Wrong names and missing folders are reported here, before `torch`
and `transformers` are imported, which takes seconds.
"""

import ast
import difflib
import re
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[1]
DEFAULT_RECIPE = ROOT / "recipes" / "digits.yaml"
# Values of a recipe that describe its data, and apply only to its own task
TASK_VALUES = ("data_path", "columns", "holdout", "captions", "max_new_tokens", "max_samples", "only_images")
TASK_VALUES += ("train_sampling_strategy",)
# Flags of other releases of transformers and what replaced them
RENAMED = {"group_by_length": "train_sampling_strategy group_by_length", "no_cuda": "use_cpu"}
RENAMED |= {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps", "logging_dir": "output_dir"}
RENAMED |= {"overwrite_output_dir": "resume_from_checkpoint never"}
# Flags that name a folder or a repository on the Hub
PLACES = ("data_path", "adapter", "vision_model", "text_model")


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.yaml"))


def read_recipe(recipe: Path) -> dict:
    """
    The values of a recipe and of its `base`, a recipe in the same folder. A `null` removes a value of the base; values
    that belong to a task are also removed if the task differs. A relative path is searched for beside the recipe, in
    the working directory and in this repository, in this order.
    """
    if not recipe.is_file():
        raise ValueError(f"There is no recipe {recipe}. Recipes: {', '.join(path.name for path in recipes())}.")
    values = yaml.safe_load(recipe.read_text(encoding="utf-8")) or {}
    if not isinstance(values, dict):
        raise ValueError(f"{recipe} contains a {type(values).__name__}. Write a flag on each line, as `name: value`.")
    base = values.pop("base", None)
    values = values if base is None else keep_values(read_recipe(recipe.parent / base), values.get("task")) | values
    for name in (*PLACES, "chat_template", "captions"):
        place = values.get(name)
        if place is not None:
            places = (recipe.absolute().parent / place, Path(place), ROOT / place)
            values[name] = str(next(filter(Path.exists, places), place))
    return {name: value for name, value in values.items() if value is not None}


def keep_values(values: dict, task: str | None) -> dict:
    """The values of a recipe that apply to `task`. `None`, here or in the recipe, means that the task is the same."""
    is_other = None not in (task, values.get("task")) and task != values["task"]
    return {name: value for name, value in values.items() if not (is_other and name in TASK_VALUES)}


def read_command(arguments: list[str]) -> tuple[Path, dict, dict[str, str | None]]:
    """
    Splits `[recipe.yaml] [--flag value ...]`.

    Returns:
        The recipe, its values that apply to `--task`, and the first value of each flag by name, `None` if it has no
        value.

    Raises:
        ValueError: if there is no such recipe, flag, key of a recipe, folder or chat template; the message suggests
            another.
    """
    if unreadable := [word for word in arguments if re.search("[\ud800-\udfff]", word)]:
        raise ValueError(
            f"Python cannot read {unreadable[0]!a} with the encoding of this locale. Set `PYTHONUTF8=1` or a UTF-8 "
            "locale, such as `LC_ALL=C.UTF-8`."
        )
    has_recipe = arguments and not arguments[0].startswith("-")
    recipe = Path(arguments[0]) if has_recipe else DEFAULT_RECIPE
    values, flags = read_recipe(recipe), {}
    for word, following in zip(arguments, [*arguments[1:], "--"]):
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            flags[name.replace("-", "_")] = value or (None if following.startswith("--") else following)
    known = argument_names()
    for place, names in ((recipe, values), ("The command", flags)):
        for name in names:
            if not {name, name.removeprefix("no_")} & known:
                close = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, known, n=1)
                hint = f"Did you mean `{close[0]}`?" if close else "`train.py --help` lists all arguments."
                raise ValueError(f"{place}: unknown argument `{name}`. {hint}")
    values = keep_values(values, flags.get("task"))
    for name in PLACES:
        check_place(f"--{name}", flags.get(name, values.get(name)))
    template = flags.get("chat_template", values.get("chat_template"))
    if template not in (None, "plain") and not Path(template).is_file():
        raise ValueError(f"`--chat_template {template}`: there is no such file. Give a Jinja file, or `plain`.")
    return recipe, values, flags


@cache
def argument_names() -> set[str]:
    """The names of all arguments, read from the source of their dataclasses."""
    if (found := find_spec("transformers")) is None:
        raise ModuleNotFoundError(
            f"transformers is not installed for {sys.executable}. Activate the environment in which it is, or run "
            "`pip install -r requirements.txt`."
        )
    transformers = Path(found.origin).parent / "training_args.py"
    own = ("training/arguments.py", "baselines/__init__.py", "configuration_dehvf.py")
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (transformers, *(ROOT / name for name in own))]
    fields = [node.target for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {"help", *(field.id for field in fields if isinstance(field, ast.Name))}


def check_place(argument: str, place: str | None):
    """
    Raises `ValueError` if a place is neither an existing folder or file nor a possible name on the Hub.

    Args:
        argument: the flag with which it was given, for the message.
    """
    if place is None or Path(place).exists():
        return
    # Some models on the Hub have no owner in their name (gpt2)
    is_data = argument == "--data_path"
    on_hub = r"[\w.-]+/[\w.-]+(:[\w.-]+)?" if is_data else r"([\w.-]+/)?[\w.-]+"
    if not re.fullmatch(on_hub, place) or place.startswith("."):
        missing, choices = ("folder or file", "folder, a file") if is_data else ("folder", "folder")
        advice = f"Give a {choices} or a Hub id (`org/name`)."
        advice += " `python -m assets.real_bases` makes it." if place.startswith("assets/real/") else ""
        raise ValueError(f"`{argument} {place}`: there is no such {missing}. {advice}")
