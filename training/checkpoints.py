# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The output folder of a run, and the checkpoint from which it resumes.

    outputs/digits/run.json                      arguments, config, versions, commit; written before training
    outputs/digits/checkpoint-40/                adapters as `save_pretrained` writes them, and the optimizer's state
    outputs/digits/checkpoint-40/manifest.json   size and SHA-256 of each file; written last, so it means "complete"

An interrupted run resumes from its last complete checkpoint when the same command is run again.
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
from tempfile import TemporaryFile

from accelerate.utils import broadcast_object_list
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, logging

from tasks import RESULTS_FILE, RUN_FILE, write_json
from training.engines import ENGINE_OF_ONE, name_engine, name_precision
from training.flags import FILE_FLAGS, ROOT


MANIFEST = "manifest.json"
# Prefixes of `TrainingArguments` that do not change the result: paths, logs, speed, memory and devices. The batch size
# per device, the accumulated batches and the number of processes may change if their product does not.
FREE_ARGUMENTS = (
    *("output_dir", "resume_from_checkpoint", "run_name", "project", "report_to", "disable_tqdm", "local_rank"),
    *("logging_", "log_", "save_", "hub_", "push_to_hub", "trackio_", "ddp_", "do_", "debug", "skip_memory_metrics"),
    *("use_cpu", "deepspeed", "fsdp", "torch_compile", "torch_empty_cache_steps", "enable_jit_checkpoint"),
    *("activation_checkpointing", "gradient_checkpointing", "include_num_input_tokens_seen", "accelerator_config"),
    *("dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers", "dataloader_prefetch"),
    *("dataloader_multiprocessing_context", "per_device_", "gradient_accumulation_steps", "eval_accumulation_steps"),
)
logger = logging.get_logger("train")


# --- files ---


def read_json(file: Path) -> dict:
    """Empty if there is no such file. Raises `ValueError` if it is damaged."""
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ValueError(f"{file} is damaged: {error}. Delete it, or use another `--output_dir`.") from error


def digest(file: Path) -> str:
    with open(file, "rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()


def write_manifest(checkpoint: Path, facts: dict):
    """Marks a checkpoint as complete, after all processes have written their files."""
    files = [file for file in sorted(checkpoint.rglob("*")) if file.is_file()]
    listed = {str(file.relative_to(checkpoint)): [file.stat().st_size, digest(file)] for file in files}
    content = json.dumps({**facts, "files": listed}, default=str)
    write_json(checkpoint / MANIFEST, {"content": content, "sha256": hashlib.sha256(content.encode()).hexdigest()})


def read_manifest(checkpoint: Path, check_files: bool = True) -> dict:
    """
    Reads a manifest that `write_manifest` has written and, if `check_files`, compares each file with it.

    Raises:
        ValueError: if the checkpoint is not complete, or a file has changed; the message names the file.
    """
    try:
        outer = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))
        content = outer["content"].encode()
        if hashlib.sha256(content).hexdigest() != outer["sha256"]:
            raise ValueError("its SHA-256 differs")
        manifest = json.loads(content)
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{checkpoint} is not complete: its {MANIFEST}, which is written last, cannot be read ({error})."
        ) from error
    for name, (size, expected) in manifest["files"].items() if check_files else ():
        file = checkpoint / name
        if not file.is_file():
            raise ValueError(f"{checkpoint} is damaged: {name} is missing.")
        if file.stat().st_size != size:
            raise ValueError(f"{checkpoint} is damaged: {name} has {file.stat().st_size} bytes instead of {size}.")
        if digest(file) != expected:
            raise ValueError(f"{checkpoint} is damaged: the content of {name} has changed.")
    return manifest


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The checkpoints in a folder, sorted by step. Folders with other names, such as copies, are ignored."""
    found = [path for path in output_dir.glob("*") if re.fullmatch(rf"{PREFIX_CHECKPOINT_DIR}-\d+", path.name)]
    return sorted((path for path in found if path.is_dir()), key=lambda path: int(path.name.split("-")[-1]))


def set_aside_later_checkpoints(checkpoint: Path):
    """
    Renames the checkpoints of later steps than the one from which a run resumes: these steps are trained again, and
    their earlier checkpoints must neither be resumed from nor removed.
    """
    step = int(checkpoint.name.split("-")[-1])
    for later in list_checkpoints(checkpoint.parent):
        if int(later.name.split("-")[-1]) > step:
            target = later.with_name(f"{later.name}-before-{uuid.uuid4().hex[:8]}")
            logger.warning(f"{later} is of a later step than {checkpoint} and is renamed to {target}.")
            later.rename(target)


def remove_older_checkpoints(output_dir: Path, limit: int | None, run_id: str, best: str | None):
    """Keeps the last `limit` complete checkpoints of a run, and always the last one and the best one."""
    own = []
    for checkpoint in list_checkpoints(output_dir):
        try:
            if read_manifest(checkpoint, check_files=False)["run"] == run_id:
                own.append(checkpoint)
        except ValueError:  # incomplete, and possibly of another run
            pass
    kept = {own[-1].name, *([Path(best).name] if best else [])}
    older = [checkpoint for checkpoint in own if checkpoint.name not in kept]
    for checkpoint in older[: max(0, len(own) - max(limit, len(kept)))] if limit else ():
        shutil.rmtree(checkpoint, ignore_errors=True)


def find_last_checkpoint(output_dir: Path, run_id: str) -> tuple[Path, dict] | None:
    """The last complete checkpoint of a run, with its manifest. Warns of each checkpoint that is skipped."""
    for checkpoint in reversed(list_checkpoints(output_dir)):
        try:
            manifest = read_manifest(checkpoint)
        except ValueError as error:
            logger.warning(f"{error} It is skipped.")
            continue
        if manifest["run"] == run_id and manifest["resumable"]:
            return checkpoint, manifest
    return None


# --- what a run is ---


def commit_of_this_code() -> str | None:
    """The commit of this repository, with "-dirty" if files were changed; `None` outside of a checkout of its own."""

    def git(*arguments: str) -> str:
        # git refuses a checkout of another user, as in a container, unless it is declared safe
        command = ["git", "-c", "safe.directory=*", "-C", str(ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != ROOT.resolve():  # of a repository around a copy
            return None
        return git("rev-parse", "HEAD") + "-dirty" * bool(git("status", "--porcelain", "--untracked-files=no"))
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_code() -> dict:
    """The versions of the packages, and the commit of this repository."""
    packages = "torch transformers accelerate datasets peft deepspeed bitsandbytes pycocoevalcap".split()
    return {
        "versions": {name: version(name) for name in packages if find_spec(name)},
        "commit": commit_of_this_code(),
    }


def describe_arguments(training_args, *others) -> dict:
    """All arguments that change the result of training, by name."""
    values = {name: value for arguments in others for name, value in vars(arguments).items()}
    training = training_args.to_dict().items()
    values |= {name: value for name, value in training if not name.startswith(FREE_ARGUMENTS)}
    values["mixed_precision"] = name_precision(training_args)  # which may be that of accelerate's config
    del values["text_model_id"], values["vision_model_id"]  # they only matter for the Hub
    for name in FILE_FLAGS:  # the same file has another relative path in another working directory
        if values[name] is not None and Path(values[name]).exists():
            values[name] = os.path.abspath(values[name])
    if values["streaming"]:  # each worker reads its own shards
        values["dataloader_num_workers"] = training_args.dataloader_num_workers
    factors = (training_args.per_device_train_batch_size, training_args.gradient_accumulation_steps)
    values["per_device_train_batch_size x gradient_accumulation_steps x processes"] = (
        factors[0] * factors[1] * training_args.world_size
    )
    return json.loads(json.dumps(values, default=str))  # in the form in which they are read from a file


# --- where it resumes ---


def choose_start(training_args, *other_arguments) -> tuple[dict, Path | None]:
    """As [`find_start`]. The main process decides for all processes."""
    run = {
        "arguments": describe_arguments(training_args, *other_arguments),
        "engine": name_engine(training_args),
        "processes": training_args.world_size,
        **describe_code(),
    }
    start = [None]
    if training_args.process_index == 0:
        try:
            start = [find_start(Path(training_args.output_dir), training_args.resume_from_checkpoint or "auto", run)]
        except ValueError as error:
            start = [error]
    (start,) = broadcast_object_list(start)
    if isinstance(start, ValueError):
        raise start
    return start


def find_start(output_dir: Path, asked: str, run: dict) -> tuple[dict, Path | None]:
    """
    Decides where a run starts.

    Args:
        asked: `auto` resumes an interrupted run in `output_dir`, replaces a finished one with the same arguments, and
            moves a finished one with other arguments, or the adapters of one that cannot be resumed, to another
            folder; `never` replaces any run; any other value is the path of a checkpoint in `output_dir`. The
            Trainer's `true` and `false` mean `auto` and `never`.
        run: `arguments`, `engine`, `processes`, `versions` and `commit` of this run.

    Returns:
        `run` with an id and the seconds trained so far; and the checkpoint to resume from, if any.

    Raises:
        ValueError: if `output_dir` is not a folder or cannot be written to, the run to resume has other arguments, or
            the requested checkpoint is not complete.
    """
    if os.path.lexists(output_dir) and not output_dir.is_dir():
        raise ValueError(f"`--output_dir {output_dir}` is not a folder. Give another name, or remove what is there.")
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=output_dir).close()
    except OSError as error:
        raise ValueError(
            f"`--output_dir {output_dir}` cannot be created or written to: {error}. Give a folder to which you can "
            "write."
        ) from error
    foreign = [name for name in ("README.md", CONFIG_NAME, RESULTS_FILE) if (output_dir / name).exists()]
    if foreign and not (output_dir / RUN_FILE).exists():
        raise ValueError(
            f"`--output_dir {output_dir}` has a {foreign[0]} that no run of train.py has written, and this run would "
            "replace it. Give another folder."
        )
    new = {**run, "run": uuid.uuid4().hex, "train_seconds": 0.0}
    if asked.lower() in ("never", "false"):
        return new, None
    if asked.lower() in ("auto", "true"):
        earlier, results = read_json(output_dir / RUN_FILE), read_json(output_dir / RESULTS_FILE)
        finished = earlier and "scores" in results and results.get("run") == earlier.get("run")
        if not earlier and (left := list_checkpoints(output_dir)):
            logger.warning(f"{output_dir} has no {RUN_FILE}, so this run does not resume from {left[-1]}.")
        found = None if finished or not earlier else find_last_checkpoint(output_dir, earlier["run"])
        if finished and find_differing(run["arguments"], earlier["arguments"]):
            what = "the results of a finished run with other arguments"
            move_run(output_dir, earlier["run"], run["arguments"], what)
        elif earlier and not finished and found is None:
            keep_adapters(output_dir, earlier, run["arguments"])
        if found is None:
            return new, None
        checkpoint, manifest = found
    else:
        manifest = read_named_checkpoint(Path(asked), output_dir)
        checkpoint = output_dir / Path(asked).name
    check_same_arguments(run["arguments"], manifest["arguments"], checkpoint)
    check_same_engine(run, manifest, checkpoint)
    if changed := [name for name in ("versions", "commit") if run[name] != manifest[name]]:
        changes = ", ".join(f"{name} {manifest[name]} -> {run[name]}" for name in changed)
        logger.warning(f"{checkpoint} was written by other code, so results may differ: {changes}.")
    if asked.lower() not in ("auto", "true"):
        set_aside_later_checkpoints(checkpoint)
    return {**new, "run": manifest["run"], "train_seconds": manifest["train_seconds"]}, checkpoint


def read_named_checkpoint(checkpoint: Path, output_dir: Path) -> dict:
    """The manifest of the checkpoint that the user named. Raises `ValueError` if a run cannot resume from it."""
    if inside := list_checkpoints(checkpoint):
        raise ValueError(f"{checkpoint} is the folder of a run. Give one of its checkpoints, such as {inside[-1]}.")
    if checkpoint.resolve().parent != output_dir.resolve():
        raise ValueError(
            f"{checkpoint} is not in {output_dir}. Optimizer states are pickles, which can run code when they are "
            f"read, so only those of the run itself are read. To resume that run, give its folder as `--output_dir`; "
            f"to start a new run with its adapters, use `--adapter {checkpoint}`."
        )
    manifest = read_manifest(checkpoint)
    if not manifest["resumable"]:
        raise ValueError(
            f"{checkpoint} has no optimizer state (`--save_only_model`), so no run can resume from it. To start a new "
            f"run with its adapters, use `--adapter {checkpoint}`."
        )
    return manifest


def keep_adapters(output_dir: Path, earlier: dict, arguments: dict):
    """Moves the adapters of a run that cannot be resumed. A run without training has only a copy of its adapters."""
    complete = [checkpoint for checkpoint in list_checkpoints(output_dir) if (checkpoint / MANIFEST).is_file()]
    places = [place for place in (output_dir, *complete[-1:]) if (place / SAFE_WEIGHTS_NAME).is_file()]
    if places and earlier["arguments"]["num_train_epochs"] > 0:
        what = "the adapters of a run that was not finished and cannot be resumed"
        target = move_run(output_dir, earlier["run"], arguments, what)
        moved = " or ".join(f"`--adapter {target / place.relative_to(output_dir)}`" for place in places)
        logger.warning(
            f"This run starts from the beginning. To use these adapters, give {moved}, another `--output_dir` and, to "
            "evaluate them without training, `--num_train_epochs 0`."
        )


def move_run(output_dir: Path, run: str, arguments: dict, what: str) -> Path:
    """
    Renames the folder of an earlier run, so that a run with these arguments does not overwrite it. Returns the new
    folder. `what` names the content that is kept.
    """
    for name in FILE_FLAGS:
        if (place := arguments.get(name)) and Path(place).resolve().is_relative_to(output_dir.resolve()):
            raise ValueError(
                f"`--{name} {place}` is in the output folder {output_dir}, which has {what} and would be renamed. "
                "Give another `--output_dir`."
            )
    target = output_dir.absolute().with_name(f"{output_dir.absolute().name}-{run[:8]}")
    try:
        output_dir.rename(target)
    except OSError as error:
        raise ValueError(
            f"{output_dir} has {what}, and cannot be moved to {target} ({error}). Give another `--output_dir`, or "
            "`--resume_from_checkpoint never` to replace them."
        ) from error
    logger.warning(f"{output_dir} had {what}. They were moved to {target}.")
    return target


def find_differing(now: dict, earlier: dict) -> list[str]:
    """The arguments that differ, in words."""
    names = sorted(now.keys() & earlier.keys())  # other releases may have other arguments
    return [f"`{name}` was {earlier[name]} and is {now[name]}" for name in names if now[name] != earlier[name]]


def check_same_arguments(now: dict, earlier: dict, checkpoint: Path):
    """Raises `ValueError` if a checkpoint belongs to a run with other arguments."""
    if differing := find_differing(now, earlier):
        raise ValueError(
            f"{checkpoint} belongs to a run with other arguments: {'; '.join(differing)}. To resume that run, give "
            "its arguments. For a new run, use another `--output_dir`, perhaps with `--adapter` and this checkpoint. "
            "To replace that run, use `--resume_from_checkpoint never`."
        )


def check_same_rows(rows: str, checkpoint: Path):
    """Raises `ValueError` if a checkpoint belongs to a run on other rows. `rows` is the digest of the current rows."""
    earlier = read_manifest(checkpoint, check_files=False).get("rows", "")
    # Earlier versions wrote fewer digests
    if any(one != other for one, other in zip(rows.split(), earlier.split())):
        raise ValueError(
            f"{checkpoint} belongs to a run on another train or validation split: rows were changed, added or "
            "removed, or are encoded in another way, such as with another date if the chat template prints the "
            "current one. To resume that run, restore its data. For a new run, use another `--output_dir`, perhaps "
            "with `--adapter` and this checkpoint. To replace that run, use `--resume_from_checkpoint never`."
        )


def check_same_engine(run: dict, manifest: dict, checkpoint: Path):
    """Raises `ValueError` if the optimizer state of a checkpoint is sharded in another way."""
    sharded = run["engine"] != ENGINE_OF_ONE
    if manifest["engine"] != run["engine"] or (sharded and manifest["processes"] != run["processes"]):
        raise ValueError(
            f"{checkpoint} was written with {manifest['engine']} (processes: {manifest['processes']}), this run is "
            f"{run['engine']} (processes: {run['processes']}), which shards the optimizer's state in another way. "
            "Use the same engine and number of processes, or start a new run with the adapters: "
            f"`--adapter {checkpoint} --output_dir <another>`."
        )
