# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Reads the recipe and the flags of a command as text. Wrong names and missing folders are reported here, before `torch`
and `transformers` are imported, which takes seconds.
"""

import ast
import difflib
import os
import re
import sys
from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import yaml


ROOT = Path(__file__).resolve().parents[1]
DEFAULT_RECIPE = ROOT / "recipes" / "digits.yaml"
HELP_FILE = ROOT / "docs" / "flags.txt"
# Values of a recipe that describe its data, and apply only to its own task
TASK_VALUES = ("data_path", "columns", "holdout", "captions", "max_new_tokens", "max_samples", "only_images")
TASK_VALUES += ("train_sampling_strategy",)
# Flags of other releases of transformers and what replaced them
RENAMED = {"group_by_length": "train_sampling_strategy group_by_length", "no_cuda": "use_cpu"}
RENAMED |= {"evaluation_strategy": "eval_strategy", "warmup_ratio": "warmup_steps", "logging_dir": "output_dir"}
RENAMED |= {"overwrite_output_dir": "resume_from_checkpoint never"}
# Flags that name a folder or a repository on the Hub
PLACES = ("data_path", "adapter", "vision_model", "text_model")
FILE_FLAGS = (*PLACES, "chat_template", "captions")
CONFIG_FLAGS = ("deepspeed", "fsdp_config")  # whose value may also be the configuration itself
# Pairs of which the first has no effect if the second is given as well
PARTNERS = (("learning_rate", "base_learning_rate"), ("num_train_epochs", "max_steps"))


class RecipeLoader(yaml.SafeLoader):
    """
    Reads numbers as YAML 1.2 does (`1e-5`, `010`) and the values of text fields as they are written (`run_name:
    1.10`), and refuses keys that are given twice.
    """

    yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in found if tag != "tag:yaml.org,2002:int"]
        for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_document(self, node):
        texts = text_names()
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if isinstance(key, yaml.ScalarNode) and key.value in texts:
                keep_texts(value)
        return super().construct_document(node)

    def construct_mapping(self, node, deep=False):
        keys = [key for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
        names = [self.construct_object(key, deep=True) for key in keys]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.MarkedYAMLError(problem=f"`{twice[0]}` is given twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)


def keep_texts(node: yaml.Node):
    """Lets all values in a node, except null, be read as texts."""
    if isinstance(node, yaml.ScalarNode):
        node.tag = node.tag if node.tag == "tag:yaml.org,2002:null" else "tag:yaml.org,2002:str"
        return
    for part in node.value:
        keep_texts(part[1] if isinstance(node, yaml.MappingNode) else part)


STARTS = list("-+0123456789")
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"[-+]?\d+$"), STARTS)
RecipeLoader.add_implicit_resolver("tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), STARTS)
RecipeLoader.add_constructor("tag:yaml.org,2002:int", lambda loader, node: int(node.value))


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.yaml"))


def read_recipe(recipe: Path) -> dict:
    """
    The values of a recipe and of its `base`, a recipe in the same folder. A `null` removes a value of the base; values
    that belong to a task are also removed if the task differs. A relative path is searched for beside the recipe, in
    the working directory and in this repository, in this order.
    """
    values = {}
    for file, own in reversed(read_chain(recipe)):
        values = keep_values(values, own.get("task"))
        # A recipe overrides its base like a flag overrides a recipe
        values = without_partners(values, {name for name, value in own.items() if value is not None})
        for name in (*FILE_FLAGS, *CONFIG_FLAGS):
            if (place := own.get(name)) is not None:
                if name in CONFIG_FLAGS and not str(place).endswith(".json"):
                    continue
                if not isinstance(place, str):
                    raise ValueError(f"{file}: `{name}` is {place!r}. Give one text.")
                place = os.path.expanduser(place)
                places = (file.absolute().parent / place, Path(place), ROOT / place)
                own[name] = str(next(filter(Path.exists, places), place))
        values |= own
    return {name: value for name, value in values.items() if value is not None}


def without_partners(values: dict, given) -> dict:
    """Values without those that `given` ones override, see [`PARTNERS`]."""
    overridden = {other for name, other in PARTNERS if name in given}
    return {name: value for name, value in values.items() if name not in overridden}


def read_chain(recipe: Path) -> list[tuple[Path, dict]]:
    """The values in a recipe, in its `base`, in the base of this, and so on, each with its file."""
    chain = []
    while recipe is not None:
        if recipe.resolve() in (file.resolve() for file, _ in chain):
            raise ValueError(f"{recipe} is its own `base`. Name another recipe there.")
        values = read_yaml(recipe, base_of=chain[-1][0] if chain else None)
        base = values.pop("base", None)
        if not isinstance(base, str | None):
            raise ValueError(f"{recipe}: `base` is {base!r}. Give the name of one recipe.")
        if None not in (values.get("learning_rate"), values.get("base_learning_rate")):
            raise ValueError(f"{recipe} has both `learning_rate` and `base_learning_rate`. Remove one of them.")
        chain.append((recipe, values))
        recipe = base and recipe.parent / base
    return chain


def read_yaml(recipe: Path, base_of: Path | None = None) -> dict:
    """The content of a recipe file. `no` and `off` are words if they are the value of a strategy."""
    if not recipe.is_file():
        needed = f", which {base_of} names as its `base`" if base_of else ""
        known = [path.name for path in recipes()]
        close = difflib.get_close_matches(recipe.name, known, n=1)
        advice = f"Did you mean `recipes/{close[0]}`?" if close else f"Recipes: {', '.join(known)}."
        raise ValueError(f"There is no recipe {recipe}{needed}. {advice}")
    try:
        values = yaml.load(recipe.read_text(encoding="utf-8"), RecipeLoader) or {}
    except UnicodeDecodeError as error:
        raise ValueError(f"{recipe} is not UTF-8 text: {error}. Save it as UTF-8.") from error
    except yaml.YAMLError as error:
        raise ValueError(
            f"{recipe} is not valid YAML: {error}. Write a flag on each line, as `name: value`."
        ) from error
    if not isinstance(values, dict):
        raise ValueError(f"{recipe} contains a {type(values).__name__}. Write a flag on each line, as `name: value`.")
    if wrong := [name for name in values if not isinstance(name, str)]:
        raise ValueError(f"{recipe}: {wrong[0]!r} is not the name of a flag. Write a flag on each line.")
    return {name: "no" if value is False and name.endswith("_strategy") else value for name, value in values.items()}


def keep_values(values: dict, task: str | None) -> dict:
    """The values of a recipe that apply to `task`. `None`, here or in the recipe, means that the task is the same."""
    is_other = None not in (task, values.get("task")) and task != values["task"]
    return {name: value for name, value in values.items() if not (is_other and name in TASK_VALUES)}


def find_recipe(arguments: list[str]) -> Path | None:
    """The recipe that a command names, if any, from the working directory or else from this repository."""
    if not arguments or arguments[0].startswith("-"):
        return None
    recipe = Path(arguments[0])
    return ROOT / recipe if not recipe.is_file() and (ROOT / recipe).is_file() else recipe


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
    for before, word in zip(arguments, arguments[1:]):
        if word.endswith((".yaml", ".yml")) and not before.startswith("--"):
            raise ValueError(f"Give the recipe {word} before all flags, and only one.")
    recipe = find_recipe(arguments) or DEFAULT_RECIPE
    values, flags = read_recipe(recipe), {}
    for word, following in zip(arguments, [*arguments[1:], "--"]):
        if word.startswith("--"):
            name, _, value = word.removeprefix("--").partition("=")
            flags[name.replace("-", "_")] = value or (None if following.startswith("--") else following)
    known = argument_names()
    for place, names in ((recipe, values), ("The command", flags)):
        for name in names:
            positive = name.removeprefix("no_")  # of a flag without a value, which only a command can have
            if name not in known and (positive not in known or names is values):
                close = [RENAMED[name]] if name in RENAMED else difflib.get_close_matches(name, known, n=1)
                close = [f"{positive}: false"] if positive in known else close
                hint = f"Did you mean `{close[0]}`?" if close else "`train.py --help` lists all arguments."
                raise ValueError(f"{place}: unknown argument `{name}`. {hint}")
    values = keep_values(values, flags.get("task"))
    for name in PLACES:
        check_place(f"--{name}", flags.get(name, values.get(name)))
    template = flags.get("chat_template", values.get("chat_template"))
    if template not in (None, "plain") and not Path(template).is_file():
        raise ValueError(f"`--chat_template {template}`: there is no such file. Give a Jinja file, or `plain`.")
    return recipe, values, flags


def show_help(arguments: list[str]):
    """
    Prints `HELP_FILE` and exits if help is asked for and the file is that of the installed transformers. Otherwise
    the parser prints its own, which takes seconds, since its defaults need torch and transformers.
    """
    if {"-h", "--help"} & {*arguments}:
        title, _, text = HELP_FILE.read_text(encoding="utf-8").partition("\n\n")
        if title.endswith(f" transformers {version('transformers')}"):
            print(text, end="")
            sys.exit()


@cache
def argument_types() -> dict[str, str]:
    """The types of all arguments by name, read from the source of their dataclasses."""
    if (found := find_spec("transformers")) is None:
        raise ModuleNotFoundError(
            f"transformers is not installed for {sys.executable}. Activate the environment in which it is, or run "
            "`pip install -r requirements.txt`."
        )
    transformers = Path(found.origin).parent / "training_args.py"
    own = ("training/arguments.py", "baselines/__init__.py", "configuration_dehvf.py")
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in (transformers, *(ROOT / name for name in own))]
    fields = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.AnnAssign)]
    return {field.target.id: ast.unparse(field.annotation) for field in fields if isinstance(field.target, ast.Name)}


def argument_names() -> set[str]:
    return {"help", *argument_types()}


def text_names() -> set[str]:
    """The names of the arguments that are texts or lists of texts."""
    return {name for name, kind in argument_types().items() if {*kind.split(" | ")} <= {"str", "list[str]", "None"}}


def is_commit(revision: str | None) -> bool:
    return re.fullmatch("[0-9a-f]{40}", revision or "") is not None


def check_has_commits(adapter: str, revision: str | None, flag: str):
    """Raises `ValueError` if `flag` gives a revision of an adapter in a folder."""
    if revision is not None and Path(adapter).exists():
        raise ValueError(
            f"{adapter} is a folder, which has no commits, so the revision {revision} has no effect. Remove {flag}."
        )


def check_is_pinned(adapter: str, revision: str | None):
    """Raises `ValueError` if an adapter is on the Hub and `revision` is not a commit, or as [`check_has_commits`]."""
    check_has_commits(adapter, revision, "`--revision`")
    if not Path(adapter).exists() and not is_commit(revision):
        given = "no `--revision` was" if revision is None else f"`--revision {revision}` was"
        raise ValueError(
            f"There is no folder {adapter}. If it is a Hub id, loading it runs the code of that repository, but "
            f"{given} given. Give the commit whose code you have read: `--revision` and 40 hex digits."
        )


def check_place(argument: str, place: str | None):
    """Raises `ValueError` if the place that `argument` names neither exists nor can be a name on the Hub."""
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
