# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The folder of a run.

    outputs/digits/run.json                      arguments, config, versions, commit: written before training starts
    outputs/digits/checkpoint-40/                adapters as `save_pretrained` writes them, and the optimizer's state
    outputs/digits/checkpoint-40/manifest.json   size and SHA-256 of each file: written last, so it means "complete"

A run that was cut off goes on from its last complete checkpoint when the same command is started again.
"""

import hashlib
import json
import os
import re
import shutil
import subprocess
import uuid
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from training.engines import ENGINE_OF_ONE, name_engine


ROOT = Path(__file__).parents[1]
MANIFEST, RUN_FILE, RESULTS_FILE = "manifest.json", "run.json", "results.json"
MANIFEST_KEYS = {
    "run",
    "arguments",
    "engine",
    "processes",
    "versions",
    "commit",
    "train_seconds",
    "resumable",
    "files",
}
# `TrainingArguments` that say where files and logs go, how fast and on how many devices a run is computed. All others
# change what is learned, or which of its states is kept. The three factors of a step's samples count as their product.
FREE_ARGUMENTS = (
    *("output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "disable_tqdm", "local_rank"),
    *("logging_", "log_", "save_", "hub_", "push_to_hub", "trackio_", "ddp_", "do_", "debug", "skip_memory_metrics"),
    *("use_cpu", "deepspeed", "fsdp", "torch_compile", "torch_empty_cache_steps", "enable_jit_checkpoint"),
    *("activation_checkpointing", "gradient_checkpointing", "include_num_input_tokens_seen", "accelerator_config"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch"),
    *("dataloader_multiprocessing_context", "per_device_", "gradient_accumulation_steps", "eval_accumulation_steps"),
)
logger = logging.get_logger("train")


def write_json(file: Path, content: dict):
    """Wholly or not at all: whoever is killed in between leaves the file as it was."""
    unfinished = file.with_name(f"{file.name}.tmp")
    unfinished.write_text(json.dumps(content, indent=2, default=str))
    os.replace(unfinished, file)


def read_json(file: Path) -> dict:
    """Empty if there is no such file. Raises `ValueError` if it is damaged."""
    try:
        return json.loads(file.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. Remove it, or give another `--output_dir`.") from error


def digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_manifest(checkpoint: Path, facts: dict):
    """Declares a checkpoint complete, once all processes have written their files."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    listed = {str(file.relative_to(checkpoint)): [file.stat().st_size, digest(file)] for file in files}
    content = json.dumps({**facts, "files": listed}, default=str)
    write_json(checkpoint / MANIFEST, {"content": content, "sha256": hashlib.sha256(content.encode()).hexdigest()})


def read_manifest(checkpoint: Path, check_files: bool = True) -> dict:
    """
    What `write_manifest` wrote, after a look at each file that it lists, if `check_files`.

    Raises:
        ValueError: if the checkpoint is not as it was when it was complete; the message names the file.
    """
    try:
        outer = json.loads((checkpoint / MANIFEST).read_text())
        content = outer["content"].encode()
        if hashlib.sha256(content).hexdigest() != outer["sha256"]:
            raise ValueError("it is damaged")
        manifest = json.loads(content)
        if missing := sorted(MANIFEST_KEYS - manifest.keys()):
            raise ValueError(f"it lacks {', '.join(missing)}")
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint} is not complete: it has no {MANIFEST} that can be read, which is written last ({error})."
        ) from error
    for name, (size, expected) in manifest["files"].items() if check_files else ():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is damaged: {name} is missing.")
        if file.stat().st_size != size:
            raise ValueError(f"{checkpoint} is damaged: {name} has {file.stat().st_size} bytes in place of {size}.")
        if digest(file) != expected:
            raise ValueError(f"{checkpoint} is damaged: the content of {name} is not what was written.")
    return manifest


def list_checkpoints(output_dir: Path) -> list[Path]:
    """By step. Folders with other names, such as copies of a checkpoint, are the user's own."""
    found = [path for path in output_dir.glob("*") if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[-1]))


def remove_older_checkpoints(output_dir: Path, limit: int | None, run_id: str, best: str | None):
    """Leaves the last `limit` complete checkpoints of a run, the last and the best one in any case."""
    own = []
    for checkpoint in list_checkpoints(output_dir):
        try:
            if read_manifest(checkpoint, check_files=False)["run"] == run_id:
                own.append(checkpoint)
        except ValueError:  # not complete, and perhaps not ours
            pass
    kept = {own[-1], *([Path(best)] if best else [])}
    older = [checkpoint for checkpoint in own if checkpoint not in kept]
    for checkpoint in older[: max(0, len(own) - max(limit, len(kept)))] if limit else ():
        shutil.rmtree(checkpoint, ignore_errors=True)


def find_last_checkpoint(output_dir: Path, run_id: str) -> tuple[Path, dict] | None:
    """The last complete checkpoint of a run, with its manifest. What is passed over on the way is named."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            manifest = read_manifest(checkpoint)
        except ValueError as error:
            logger.warning(f"{error} It is passed over.")
            continue
        if manifest["run"] == run_id and manifest["resumable"]:
            return checkpoint, manifest
    return None


def describe_arguments(training_args, *others) -> dict:
    """All arguments that change a result, by name: those of `train.py`'s dataclasses with `--help`'s names."""
    values = {name: value for arguments in others for name, value in vars(arguments).items()}
    training = training_args.to_dict().items()
    values |= {name: value for name, value in training if not name.startswith(FREE_ARGUMENTS)}
    del values["text_model_id"], values["vision_model_id"]  # what to call them on the Hub
    if values["streaming"]:  # whose workers read shards of their own
        values["dataloader_num_workers"] = training_args.dataloader_num_workers
    factors = (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps)
    values["per_device_train_batch_size x gradient_accumulation_steps x processes"] = (
        factors[0] * factors[1] * training_args.world_size
    )
    return json.loads(json.dumps(values, default=str))  # as they come back from a file


def check_same_arguments(now: dict, earlier: dict, place: Path):
    """Raises `ValueError` if `place` belongs to a run with other arguments."""
    names = sorted(now.keys() & earlier.keys())  # another version may have further ones, see `warn_of_other_code`
    differing = [f"`{name}` was {earlier[name]}, is {now[name]}" for name in names if now[name] != earlier[name]]
    if differing:
        raise ValueError(
            f"{place} holds a run with other arguments: {'; '.join(differing)}. To go on with that run, give its "
            "arguments. For a new run give another `--output_dir`, to which `--adapter` with one of the checkpoints "
            "takes over what was learned; or, to replace that run, `--resume_from_checkpoint never`."
        )


def check_same_engine(run: dict, manifest: dict, checkpoint: Path):
    """Raises `ValueError` if the optimizer's state was divided among other processes, or in another way."""
    divided = run["engine"] != ENGINE_OF_ONE
    if manifest["engine"] != run["engine"] or (divided and manifest["processes"] != run["processes"]):
        raise ValueError(
            f"{checkpoint} was written with {manifest['engine']} (processes: {manifest['processes']}), this run is "
            f"{run['engine']} (processes: {run['processes']}): the optimizer's state is divided in another way. Start "
            f"as many in the same way; or begin a new run with its adapters: `--adapter {checkpoint} --output_dir "
            "<another>`."
        )


def warn_of_other_code(run: dict, manifest: dict, checkpoint: Path):
    if differing := [name for name in ("versions", "commit") if run[name] != manifest[name]]:
        changes = ", ".join(f"{name} {manifest[name]} -> {run[name]}" for name in differing)
        logger.warning(f"{checkpoint} was written by other code, and what comes next may differ: {changes}.")


def find_start(output_dir: Path, asked: str, run: dict) -> tuple[dict, Path | None]:
    """
    Where a run begins.

    Args:
        asked: `auto` goes on with a run in `output_dir` that was cut off, `never` replaces it, and all else is one of
            its checkpoints. A run that came to its end is replaced.
        run: `arguments`, `engine`, `processes`, `versions` and `commit` of this run.

    Returns:
        `run` with an id, and the seconds trained so far; and the checkpoint to go on from, if any.

    Raises:
        ValueError: if the run there is another one, or the checkpoint asked for by name is not complete, or not there.
    """
    new = {**run, "run": uuid.uuid4().hex, "train_seconds": 0.0}
    if asked in ("never", "false", "False"):  # the Trainer's way to say it
        return new, None
    if asked in ("auto", "true", "True"):
        earlier, results = read_json(output_dir / RUN_FILE), read_json(output_dir / RESULTS_FILE)
        finished = "scores" in results and results.get("run") == earlier.get("run")
        found = None if finished or not earlier else find_last_checkpoint(output_dir, earlier["run"])
        if found is None:
            return new, None
        checkpoint, manifest = found
    else:
        checkpoint = Path(asked)
        if inside := list_checkpoints(checkpoint):
            raise ValueError(
                f"{checkpoint} is the folder of a run. Name one of its checkpoints, such as {inside[-1]}."
            )
        if checkpoint.resolve().parent != output_dir.resolve():
            raise ValueError(
                f"{checkpoint} is not in {output_dir}. States of optimizers are pickles, which can run code when they "
                f"are read, so only a run's own are. Begin a new run with its adapters: `--adapter {checkpoint}`. If "
                f"that run is yours and is to go on, give its folder as `--output_dir`."
            )
        manifest = read_manifest(checkpoint)
        if not manifest["resumable"]:
            raise ValueError(
                f"{checkpoint} has no optimizer state (`--save_only_model`), so a run cannot go on from it. Begin a "
                f"new one with its adapters: `--adapter {checkpoint}`."
            )
    check_same_arguments(run["arguments"], manifest["arguments"], checkpoint)
    check_same_engine(run, manifest, checkpoint)
    warn_of_other_code(run, manifest, checkpoint)
    return {**new, "run": manifest["run"], "train_seconds": manifest["train_seconds"]}, checkpoint


def commit_of_this_code() -> str | None:
    """`None` outside of a git checkout."""
    command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_code() -> dict:
    """The versions that run, and the commit of this repository."""
    packages = "torch transformers accelerate datasets peft deepspeed bitsandbytes pycocoevalcap".split()
    return {
        "versions": {name: version(name) for name in packages if find_spec(name)},
        "commit": commit_of_this_code(),
    }


def choose_start(training_args, *other_arguments) -> tuple[dict, Path | None]:
    """See [`find_start`]. The main process looks for all, since they have to agree."""
    run = {
        "arguments": describe_arguments(training_args, *other_arguments),
        "engine": name_engine(training_args),
        "processes": training_args.world_size,
        **describe_code(),
    }
    folder, asked = Path(training_args.output_dir), training_args.resume_from_checkpoint or "auto"
    start = [None]
    if training_args.process_index == 0:
        try:
            start = [find_start(folder, asked, run)]
        except ValueError as error:
            start = [error]
    (start,) = broadcast_object_list(start)
    if isinstance(start, ValueError):
        raise start
    return start
