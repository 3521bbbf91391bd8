"""Checkpoints: what they contain, how a run resumes, and what happens when a disk is full or a loss is NaN; logs."""

import hashlib
import itertools
import json
import os
import random
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path
from unittest.mock import Mock

import datasets
import pytest
import torch
from processes import let_accelerate_take_fsdp_on_the_cpu, start
from safetensors.torch import load_file
from test_tasks import write_lines
from test_train import FEW_LAYERS, make_rows, make_split, scienceqa, tiny_flags  # noqa: F401  `scienceqa` is a fixture
from tiny import NUM_PATCHES, ROOT, save_tiny_bases, tiny_processor
from transformers import AutoModelForImageTextToText, AutoProcessor

import train
from dehvf import adapters as adapters_dehvf
from tasks import get_task
from training.arguments import DataArguments
from training.checkpoints import (
    check_same_rows,
    commit_of_this_code,
    describe_code,
    find_last_checkpoint,
    find_start,
    list_checkpoints,
    move_run,
    read_manifest,
    write_manifest,
)
from training.data import Split, digest_rows
from training.engines import ENGINE_OF_ONE
from training.trainer import AnswerTrainer, Speed


# --- processes of their own ---


def finish(folder: Path, flags: list[str], processes: int = 1, prepare=None) -> list[str]:
    codes, outputs = start(folder, flags, processes, prepare)
    assert codes == [0] * processes, outputs
    return outputs


def zero(folder: Path, stage: int) -> Path:
    """The repository's DeepSpeed configuration, at another stage."""
    config = json.loads((ROOT / "ds_config.json").read_text())
    config["zero_optimization"]["stage"] = stage
    (folder / f"zero{stage}.json").write_text(json.dumps(config))
    return folder / f"zero{stage}.json"


SAVING = {"save_strategy": "steps", "logging_steps": 1, "disable_tqdm": True}


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))


def adapters(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def assert_same_adapters(one: Path, other: Path, **tolerance):
    one, other = adapters(one), adapters(other)
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        if tolerance:
            torch.testing.assert_close(other[name], tensor, **tolerance)
        else:
            assert torch.equal(other[name], tensor), name


# --- what is in a checkpoint ---


@pytest.fixture
def large_base(tmp_path, scienceqa):  # noqa: F811
    """Flags for adapters of about 1 MB on bases of about 50 MB."""
    save_tiny_bases(tmp_path, max_position_embeddings=512, intermediate_size=32768)
    flags = partial(tiny_flags, tmp_path, scienceqa[0], num_memory_slots=4000, save_steps=2, max_steps=2, **SAVING)
    return lambda output, **values: flags(output, **values)


def assert_no_frozen_weight(output: Path):
    """Weights, and two moments: three times the adapters, and once more under DeepSpeed, which keeps its own copy."""
    checkpoint = output / "checkpoint-2"
    adapter_bytes = sum(tensor.numel() * 4 for tensor in adapters(checkpoint).values())
    total = sum(file.stat().st_size for file in checkpoint.rglob("*") if file.is_file())
    base = (output.parent / "text" / "model.safetensors").stat().st_size
    code = sum(file.stat().st_size for file in ROOT.glob("*_dehvf.py"))
    text = code + 136_000  # tokenizer, configs, logs: the same whatever the size of the adapters
    assert 1e6 < adapter_bytes and base > 40 * adapter_bytes
    assert 3 * adapter_bytes < total < 4 * adapter_bytes + text, (total, adapter_bytes)


def test_a_checkpoint_of_one_process_has_no_frozen_weights(large_base, tmp_path):
    train.main(large_base(tmp_path / "output"))
    assert_no_frozen_weight(tmp_path / "output")


# ZeRO-1 and ZeRO-2 save and load by the same code
each_stage = pytest.mark.parametrize(
    "stage",
    [
        pytest.param(None, id="DDP", marks=pytest.mark.extended),
        pytest.param(1, id="ZeRO-1", marks=pytest.mark.extended),
        pytest.param(2, id="ZeRO-2", marks=pytest.mark.extended),
        pytest.param(3, id="ZeRO-3"),
    ],
)


@pytest.mark.slow
@pytest.mark.extended
@each_stage
def test_a_checkpoint_of_two_processes_has_no_frozen_weights(large_base, tmp_path, stage):
    engine = {} if stage is None else {"deepspeed": zero(tmp_path, stage)}
    finish(tmp_path, large_base(tmp_path / "output", per_device_train_batch_size=1, **engine), 2)
    assert_no_frozen_weight(tmp_path / "output")


def use_fsdp(version: int, rank: int):
    """What `accelerate launch --use_fsdp --fsdp_version 2` does."""
    settings = {
        "VERSION": str(version),
        "STATE_DICT_TYPE": "FULL_STATE_DICT",
        "AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    }
    settings["TRANSFORMER_CLS_TO_WRAP"] = "LlamaDecoderLayer,CLIPEncoderLayer"
    os.environ.update({f"FSDP_{name}": value for name, value in settings.items()}, ACCELERATE_USE_FSDP="true")
    let_accelerate_take_fsdp_on_the_cpu()


@pytest.mark.slow
def test_a_checkpoint_of_fsdp2_has_no_frozen_weights_and_resumes(large_base, tmp_path):
    flags = partial(large_base, save_steps=1, per_device_train_batch_size=1)
    fsdp2 = partial(use_fsdp, 2)
    finish(tmp_path, flags(tmp_path / "output"), 2, fsdp2)
    assert json.loads((tmp_path / "output" / "run.json").read_text())["engine"] == "FSDP"
    assert (tmp_path / "output" / "checkpoint-2" / "optimizer.bin").is_file(), "FSDP's own form"
    assert_no_frozen_weight(tmp_path / "output")
    model = AutoModelForImageTextToText.from_pretrained(tmp_path / "output", trust_remote_code=True)
    assert type(model).__name__ == model.config.architectures[0] == "DehvfForConditionalGeneration"
    assert not list((tmp_path / "output").glob("_fsdp*.py"))
    shutil.copytree(tmp_path / "output", tmp_path / "killed", ignore=shutil.ignore_patterns("results.json", "*-2"))
    (printed, _) = finish(tmp_path, flags(tmp_path / "killed"), 2, fsdp2)
    assert f"resuming from {tmp_path / 'killed' / 'checkpoint-1'}" in printed
    assert_same_adapters(tmp_path / "output", tmp_path / "killed", rtol=0, atol=1e-4)


@pytest.mark.slow
def test_fsdp_1_is_refused(scienceqa, tmp_path):  # noqa: F811
    flags = tiny_flags(tmp_path, scienceqa[0], tmp_path / "output")
    codes, (printed, _) = start(tmp_path, flags, 2, partial(use_fsdp, 1))
    assert codes == [1, 1] and "Set `fsdp_version: 2` in the accelerate config" in printed, printed


def test_a_checkpoint_is_a_folder_of_adapters(scienceqa, tmp_path):  # noqa: F811
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "first", save_steps=2, **SAVING))
    checkpoint = tmp_path / "first" / "checkpoint-2"
    model = AutoModelForImageTextToText.from_pretrained(checkpoint, trust_remote_code=True)
    assert torch.equal(
        dict(model.named_parameters())["model.memory_slots.key"], adapters(checkpoint)["model.memory_slots.key"]
    )
    assert AutoProcessor.from_pretrained(checkpoint, trust_remote_code=True).tokenizer is not None
    flags = {"adapter": checkpoint, "learning_rate": 0.0}
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "second", **flags))
    assert_same_adapters(checkpoint, tmp_path / "second")


# --- killed, and started again ---


def kill_at(moment: int, rank: int | None, me: int):
    """
    Makes this process kill itself at its n-th moment: before a step or the renaming of a manifest, or when half a file
    of a checkpoint is written or half of an old checkpoint removed.
    """
    if rank is not None and me != rank:
        return
    moments = itertools.count(1)

    def pass_by():
        if next(moments) == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(function):
        def wrapped(*args, **kwargs):
            pass_by()
            return function(*args, **kwargs)

        return wrapped

    def halfway(write):
        def wrapped(content, file, *args, **kwargs):
            write(content, file, *args, **kwargs)
            if isinstance(file, (str, Path)):
                written = Path(file).read_bytes()
                Path(file).write_bytes(written[: len(written) // 2])
                pass_by()
                Path(file).write_bytes(written)

        return wrapped

    def remove(folder, *args, **kwargs):
        for file in list(Path(folder).rglob("*"))[::2]:
            file.is_file() and file.unlink()
        pass_by()
        rmtree(folder, *args, **kwargs)

    from transformers import modeling_utils

    rmtree = shutil.rmtree
    shutil.rmtree = remove
    torch.save = halfway(torch.save)
    modeling_utils.safe_save_file = halfway(modeling_utils.safe_save_file)
    os.replace = before(os.replace)
    AnswerTrainer.training_step = before(AnswerTrainer.training_step)


@pytest.mark.parametrize("moments", [5, pytest.param(20, marks=[pytest.mark.slow, pytest.mark.extended])])
def test_a_run_killed_at_many_moments_ends_with_the_same_adapters(scienceqa, tmp_path, moments):  # noqa: F811
    """Bit for bit; with dropout, so that the random numbers have to go on as well."""
    values = {"num_train_epochs": 8, "save_steps": 2, "save_total_limit": 2, "memory_dropout": 0.1, **SAVING}
    values["train_sampling_strategy"] = "random"
    flags = partial(tiny_flags, tmp_path, scienceqa[0], **values)
    train.main(flags(tmp_path / "whole"))
    chosen, steps, cut_off = random.Random(0), [], 0
    for _ in range(moments):
        prepare = partial(kill_at, chosen.randint(1, 24), None)
        codes, (output,) = start(tmp_path, flags(tmp_path / "killed"), prepare=prepare)
        assert codes == [-signal.SIGKILL], output
        found = re.search(r"resuming from .*checkpoint-(\d+)", output)
        steps.append(int(found[1]) if found else 0)
        cut_off += "is not complete" in output
    finish(tmp_path, flags(tmp_path / "killed"))
    assert steps == sorted(steps) and len(set(steps)) > moments / 4, steps
    assert cut_off > 3 * moments / 20, "hardly a kill fell into the writing of a checkpoint"
    assert_same_adapters(tmp_path / "whole", tmp_path / "killed")
    whole, killed = (
        json.loads((tmp_path / name / "checkpoint-24" / "trainer_state.json").read_text())["log_history"]
        for name in ("whole", "killed")
    )
    assert [line["loss"] for line in whole] == [line["loss"] for line in killed]
    assert (tmp_path / "whole" / "predictions.jsonl").read_text() == (
        tmp_path / "killed" / "predictions.jsonl"
    ).read_text()


@pytest.mark.slow
@each_stage
def test_two_processes_killed_end_with_the_same_adapters(scienceqa, tmp_path, stage):  # noqa: F811
    values = {"per_device_train_batch_size": 1, "num_train_epochs": 2, "save_steps": 2, **SAVING}
    values |= {"memory_dropout": 0.1, "train_sampling_strategy": "random"}
    values |= {} if stage is None else {"deepspeed": zero(tmp_path, stage)}
    save_tiny_bases(tmp_path, **FEW_LAYERS, max_position_embeddings=512)
    flags = partial(tiny_flags, tmp_path, scienceqa[0], **values)
    finish(tmp_path, flags(tmp_path / "whole"), 2)
    resumed = []
    for moment, rank in ((7, 1), (8, 0)):
        prepare = partial(kill_at, moment, rank)
        codes, outputs = start(tmp_path, flags(tmp_path / "killed"), 2, prepare)
        assert codes[rank] == -signal.SIGKILL, outputs
        resumed.append("resuming from" in outputs[0])
    finish(tmp_path, flags(tmp_path / "killed"), 2)
    assert any(resumed)
    assert_same_adapters(tmp_path / "whole", tmp_path / "killed", rtol=0, atol=1e-4)


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory):
    """`(flags, folder)` of a run of six steps that was cut off between `checkpoint-4` and its end."""
    folder = tmp_path_factory.mktemp("six_steps")
    datasets.DatasetDict(train=make_rows(), test=make_rows(4)).save_to_disk(str(folder / "data"))
    flags = partial(tiny_flags, folder, folder / "data", num_train_epochs=2, save_steps=2, **SAVING)
    train.main(flags(folder / "whole"))
    cut_off = shutil.ignore_patterns("checkpoint-6", "results.json", "predictions.jsonl", "README.md")
    shutil.copytree(folder / "whole", folder / "output", ignore=cut_off)
    return flags, folder


@pytest.fixture
def interrupted(six_steps, tmp_path):
    """As `six_steps`, with a copy of the folder to go on in."""
    flags, folder = six_steps
    return flags, Path(shutil.copytree(folder / "output", tmp_path / "output"))


def flip(file: Path):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def cut(file: Path):
    file.write_bytes(file.read_bytes()[:-1])


DAMAGES = {
    "a flipped byte": (flip, "model.safetensors", "the content of model.safetensors has changed"),
    "a file cut short": (cut, "optimizer.pt", r"optimizer.pt has \d+ bytes instead of \d+"),
    "a lost file": (Path.unlink, "rng_state.pth", "rng_state.pth is missing"),
    "no manifest": (Path.unlink, "manifest.json", "is not complete: its manifest.json.*cannot be read"),
    "half a manifest": (cut, "manifest.json", "is not complete: its manifest.json.*cannot be read"),
    "a flipped byte in the manifest": (flip, "manifest.json", "is not complete: its manifest.json.*cannot be read"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(interrupted, damage, caplog):
    flags, output = interrupted
    spoil, name, message = DAMAGES[damage]
    spoil(output / "checkpoint-4" / name)
    with pytest.raises(ValueError, match=f"checkpoint-4 .*{message}"):
        train.main(flags(output, resume_from_checkpoint=output / "checkpoint-4"))
    run = json.loads((output / "run.json").read_text())
    checkpoint, manifest = find_last_checkpoint(output, run["run"])
    assert checkpoint == output / "checkpoint-2" and manifest["arguments"] == run["arguments"]
    assert re.search(f"checkpoint-4 .*{message}.* It is skipped", caplog.text)


def test_a_run_with_a_damaged_checkpoint_gives_the_same_result(interrupted, six_steps, capsys):
    flags, output = interrupted
    flip(output / "checkpoint-4" / "optimizer.pt")
    train.main(flags(output))
    assert f"resuming from {output / 'checkpoint-2'}" in capsys.readouterr().out
    assert_same_adapters(six_steps[1] / "whole", output)
    assert read_manifest(output / "checkpoint-4"), "written again"


@pytest.mark.parametrize(
    "other",
    [
        {"learning_rate": 0.01},
        {"num_train_epochs": 3},
        {"max_samples": 4},
        {"seed": 1},
        {"method": "memvp"},
        {"per_device_train_batch_size": 1},
    ],
    ids=lambda flags: next(iter(flags)),
)
def test_a_run_is_not_resumed_with_other_arguments(interrupted, other):
    flags, output = interrupted
    name = next(iter(other))
    for place in ("auto", output / "checkpoint-4"):
        with pytest.raises(
            ValueError, match=f"`{name}.*` was .* and is .*--output_dir.*--resume_from_checkpoint never"
        ):
            train.main(flags(output, resume_from_checkpoint=place, **other))


def test_a_run_is_not_resumed_in_another_mixed_precision_of_accelerate(interrupted, monkeypatch):
    flags, output = interrupted
    assert json.loads((output / "run.json").read_text())["arguments"]["mixed_precision"] == "no"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(ValueError, match="other arguments: `mixed_precision` was no and is bf16"):
        train.main(flags(output))


def test_a_run_that_recorded_no_mixed_precision_is_resumed(interrupted, capsys):
    """As those of earlier versions."""
    flags, output = interrupted
    run = json.loads((output / "run.json").read_text())
    del run["arguments"]["mixed_precision"]
    (output / "run.json").write_text(json.dumps(run))
    manifest = read_manifest(output / "checkpoint-4")
    del manifest["arguments"]["mixed_precision"], manifest["files"]
    (output / "checkpoint-4" / "manifest.json").unlink()
    write_manifest(output / "checkpoint-4", manifest)
    train.main(flags(output))
    assert f"resuming from {output / 'checkpoint-4'}" in capsys.readouterr().out
    assert json.loads((output / "results.json").read_text())["mixed_precision"] == "no"


def test_a_run_is_not_resumed_on_other_rows(interrupted, monkeypatch):
    flags, output = interrupted
    monkeypatch.setattr(get_task("scienceqa"), "load", lambda *_, **__: make_rows(hint="cba"))
    with pytest.raises(
        ValueError, match="checkpoint-4 .*another train or validation split.*another date.*restore its data"
    ):
        train.main(flags(output))


def test_rows_with_other_images_are_other_rows(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    split = make_split(scienceqa[0])
    digest, content = split.digest(), split.images[:]["image"]
    place = next(index for index, image in enumerate(content) if image is not None)
    for image in (None, {**content[place], "path": "b.png"}, {**content[place], "bytes": b"1"}):
        images = [*content[:place], image, *content[place + 1 :]]
        split.images = datasets.Dataset.from_dict({"image": images}, features=split.images.features)
        assert split.digest() != digest
    split.images = datasets.Dataset.from_dict({"image": content}, features=split.images.features)
    assert split.digest() == digest == digest_rows({"train": split, "test": split})
    path, digests = os.path.relpath(__file__), []
    for image in (path, os.path.abspath(path)):  # as from another working directory
        images = [*content[:place], {"path": image, "bytes": None}, *content[place + 1 :]]
        split.images = datasets.Dataset.from_dict({"image": images}, features=split.images.features)
        digests.append(split.digest())
    assert digests[0] == digests[1]
    for image in ({"path": "image.png", "bytes": b"1"}, {"path": "https://host/a.png", "bytes": None}):
        images, digests = [*content[:place], image, *content[place + 1 :]], set()
        split.images = datasets.Dataset.from_dict({"image": images}, features=split.images.features)
        for folder in (tmp_path, tmp_path.parent):
            monkeypatch.chdir(folder)
            digests.add(split.digest())
        assert len(digests) == 1
    split.images = datasets.Dataset.from_dict({"image": content}, features=split.images.features)
    assert digest_rows({"train": split, "validation": split}) != digest, "which decides on the best checkpoint"


ASKED = {"question": "Which?", "choices": ["a", "b"], "answer": "a"}
FREE = {"question": "Which?", "answer": "a"}


@pytest.mark.parametrize(
    "row, changed",
    [
        (FREE, {"answer": "b"}),
        (FREE, {"answer": ["a", "b"]}),
        (ASKED, {"answer": "b"}),
        (ASKED, {"answers": ["a", "b"]}),
    ],
    ids=["free", "free, several", "option", "options, several"],
)
def test_rows_of_a_validation_split_with_other_answers_are_other_rows(row, changed, tmp_path, monkeypatch):
    """The prompts are the same, but the best checkpoint is another one."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    digests = []
    for number, values in enumerate(({}, {}, changed)):
        folder = tmp_path / str(number)
        write_lines(folder / "validation.jsonl", [{**row, **values}])
        split = make_split(folder, "validation", training=False, task="vqa", columns="image=none")
        digests.append((split.digest(), digest_rows({"validation": split})))
    assert digests[0] == digests[1]
    assert digests[0][0] == digests[2][0] and digests[0][1] != digests[2][1]


def test_fewer_digests_of_rows_that_an_earlier_version_wrote_are_compared(tmp_path):
    write_manifest(tmp_path, {"rows": "train validation"})
    check_same_rows("train validation answers", tmp_path)
    for rows in ("train others answers", "others validation"):
        with pytest.raises(ValueError, match="belongs to a run on another train or validation split"):
            check_same_rows(rows, tmp_path)
    write_manifest(tmp_path, {"rows": "train validation answers"})
    with pytest.raises(ValueError, match="belongs to a run on another"):
        check_same_rows("train validation others", tmp_path)


def test_resuming_with_other_code_warns(interrupted, monkeypatch, caplog):
    flags, output = interrupted
    monkeypatch.setattr("training.checkpoints.commit_of_this_code", lambda: "another")
    train.main(flags(output))
    assert re.search(r"checkpoint-4 was written by other code.*commit [\w-]+ -> another", caplog.text)


def test_arguments_that_change_no_result_may_change_when_a_run_is_resumed(interrupted, six_steps, capsys):
    flags, output = interrupted
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_steps": 3, "logging_steps": 2}
    train.main(flags(output, **values))
    assert "resuming from" in capsys.readouterr().out
    assert_same_adapters(six_steps[1] / "whole", output, rtol=0, atol=1e-5)


def test_never_starts_again_and_removes_earlier_checkpoints(interrupted, capsys):
    flags, output = interrupted
    before = json.loads((output / "run.json").read_text())["run"]
    train.main(flags(output, resume_from_checkpoint="never", save_strategy="no", learning_rate=0.01))
    assert "resuming from" not in capsys.readouterr().out
    run = json.loads((output / "run.json").read_text())
    assert run["run"] != before and find_last_checkpoint(output, run["run"]) is None
    assert read_manifest(output / "checkpoint-4")["run"] == before, "nothing is removed"


def test_a_finished_run_is_replaced(interrupted, capsys):
    flags, output = interrupted
    train.main(flags(output))
    before = json.loads((output / "results.json").read_text())["run"]
    capsys.readouterr()
    train.main(flags(output))
    assert "resuming from" not in capsys.readouterr().out
    after, run = (json.loads((output / name).read_text())["run"] for name in ("results.json", "run.json"))
    assert before != after == run


def test_a_finished_run_with_other_arguments_is_moved(interrupted):
    flags, output = interrupted
    train.main(flags(output))
    before, weights = json.loads((output / "results.json").read_text()), adapters(output)
    for name in ("adapter", "data_path", "captions"):
        with pytest.raises(ValueError, match=f"`--{name} .* is in the output folder .* Give another `--output_dir`"):
            move_run(output, before["run"], {name: str(output / "checkpoint-4")}, "results")
    train.main(flags(output, learning_rate=0.01))
    moved = output.with_name(f"{output.name}-{before['run'][:8]}")
    assert json.loads((moved / "results.json").read_text()) == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in adapters(moved).items())
    assert json.loads((output / "results.json").read_text())["run"] != before["run"]


@pytest.mark.parametrize(
    "values, interrupted, place",
    [
        ({"save_strategy": "no"}, (AnswerTrainer, "predict"), ""),
        ({"save_only_model": True, "save_steps": 2, **SAVING}, (train, "evaluate"), "checkpoint-3"),
    ],
    ids=["in its evaluation", "without optimizer states"],
)
def test_adapters_of_a_run_that_cannot_be_resumed_are_moved(
    scienceqa,  # noqa: F811
    tmp_path,
    monkeypatch,
    caplog,
    values,
    interrupted,
    place,
):
    output = tmp_path / "output"

    def interrupt(owner, name, **others):
        with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
            patch.setattr(owner, name, lambda *_, **__: 1 / 0)
            train.main(tiny_flags(tmp_path, scienceqa[0], output, **{**values, **others}))

    interrupt(AnswerTrainer, "train")
    interrupt(*interrupted)
    assert [path.name for path in tmp_path.glob("output*")] == ["output"], "the first had saved nothing"
    run = json.loads((output / "run.json").read_text())["run"]
    before, moved = adapters(output / place), tmp_path / f"output-{run[:8]}"
    train.main(tiny_flags(tmp_path, scienceqa[0], output, **{**values, "learning_rate": 0.01}))
    assert f"a run that was not finished and cannot be resumed. They were moved to {moved}." in caplog.text
    assert f"To use these adapters, give `--adapter {moved / place}`, another `--output_dir`" in caplog.text
    assert all(torch.equal(tensor, before[name]) for name, tensor in adapters(moved / place).items())
    assert json.loads((output / "results.json").read_text())["run"] != run


def test_a_run_interrupted_after_its_last_step_takes_no_further_step(scienceqa, tmp_path):  # noqa: F811
    flags = partial(tiny_flags, tmp_path, scienceqa[0], max_steps=4, save_steps=2, **SAVING)  # three steps an epoch
    train.main(flags(tmp_path / "output"))
    (tmp_path / "output" / "results.json").unlink()
    seconds = read_manifest(tmp_path / "output" / "checkpoint-4")["train_seconds"]
    train.main(flags(tmp_path / "output"))
    assert_same_adapters(tmp_path / "output" / "checkpoint-4", tmp_path / "output")
    assert json.loads((tmp_path / "output" / "results.json").read_text())["train_seconds"] > seconds > 0


def test_a_stream_resumes_where_it_stopped(scienceqa, tmp_path):  # noqa: F811
    values = {"streaming": True, "max_steps": 9, "save_steps": 2, "train_sampling_strategy": "random", **SAVING}
    flags = partial(tiny_flags, tmp_path, scienceqa[0], **values)  # three steps a pass
    train.main(flags(tmp_path / "output"))
    whole = adapters(tmp_path / "output")
    for name in ("checkpoint-9", "checkpoint-8"):
        shutil.rmtree(tmp_path / "output" / name)
    (tmp_path / "output" / "results.json").unlink()
    train.main(flags(tmp_path / "output"))
    for name, tensor in adapters(tmp_path / "output").items():
        assert torch.equal(tensor, whole[name])


def test_a_baseline_resumes_where_it_stopped(scienceqa, tmp_path):  # noqa: F811
    flags = partial(
        tiny_flags, tmp_path, scienceqa[0], method="llava-lora", num_train_epochs=2, save_steps=4, **SAVING
    )
    train.main(flags(tmp_path / "whole"))
    shutil.copytree(tmp_path / "whole", tmp_path / "killed", ignore=shutil.ignore_patterns("results.json", "*-6"))
    train.main(flags(tmp_path / "killed"))
    assert_same_adapters(tmp_path / "whole", tmp_path / "killed")


# --- the best checkpoint, early stopping ---

BEST = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}


def score_like(scores):
    """A task's score that does not depend on the answers: those of the evaluations, one by one."""
    scores = iter(scores)
    return lambda records, size: {"average": next(scores), "count": len(records)}


def test_the_best_checkpoint_is_kept_and_loaded_after_resuming_too(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    flags = partial(tiny_flags, tmp_path, scienceqa[0], num_train_epochs=4, save_steps=2, **BEST, **SAVING)
    flags = flags(tmp_path / "output", early_stopping_patience=2)
    save = AnswerTrainer.write_checkpoint

    def save_and_fail(self, *args):
        save(self, *args)
        if self.state.global_step == 6:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(get_task("scienceqa"), "score", score_like([1, 3, 2]))
        patch.setattr(AnswerTrainer, "write_checkpoint", save_and_fail)
        with pytest.raises(KeyboardInterrupt):
            train.main(flags)
    assert checkpoints(tmp_path / "output") == [4, 6], "the best and the last"
    best = adapters(tmp_path / "output" / "checkpoint-4")
    # The second evaluation in a row that is no better; the last score is that of the test split
    monkeypatch.setattr(get_task("scienceqa"), "score", score_like([2.5, 0, 0]))
    train.main(flags)
    assert json.loads((tmp_path / "output" / "results.json").read_text())["train_seconds"] > 0
    assert checkpoints(tmp_path / "output") == [4], "the last one was step 8, which is not the best"
    for name, tensor in adapters(tmp_path / "output").items():
        assert torch.equal(tensor, best[name])


def test_a_run_interrupted_after_stopping_early_is_not_continued(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    flags = partial(tiny_flags, tmp_path, scienceqa[0], num_train_epochs=4, save_steps=2, **BEST, **SAVING)
    flags = flags(tmp_path / "output", early_stopping_patience=1, save_total_limit=3)
    task = get_task("scienceqa")
    monkeypatch.setattr(task, "score", score_like([3, 2, 0, 0]))
    train.main(flags)
    (tmp_path / "output" / "results.json").unlink()
    monkeypatch.setattr(task, "score", score_like([0, 0]))  # of the test split
    train.main(flags)
    assert checkpoints(tmp_path / "output") == [2, 4]
    assert_same_adapters(tmp_path / "output" / "checkpoint-2", tmp_path / "output")


def test_a_damaged_best_checkpoint_is_an_error(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    flags = partial(tiny_flags, tmp_path, scienceqa[0], num_train_epochs=2, save_steps=2, **BEST, **SAVING)
    monkeypatch.setattr(get_task("scienceqa"), "score", score_like([2, 1, 1]))
    evaluate = AnswerTrainer.evaluate

    def evaluate_and_flip(self, **kwargs):
        if self.state.global_step == 6:
            flip(tmp_path / "output" / "checkpoint-2" / "model.safetensors")
        return evaluate(self, **kwargs)

    monkeypatch.setattr(AnswerTrainer, "evaluate", evaluate_and_flip)
    with pytest.raises(ValueError, match="best checkpoint.*checkpoint-2 is damaged: the content of model.*--adapter"):
        train.main(flags(tmp_path / "output"))


# --- another number of processes ---


@pytest.mark.slow
def test_two_processes_resume_a_run_of_one(interrupted, six_steps, tmp_path):
    flags, output = interrupted
    (printed, _) = finish(tmp_path, flags(output, per_device_train_batch_size=1), 2)
    assert f"resuming from {output / 'checkpoint-4'}" in printed
    assert_same_adapters(six_steps[1] / "whole", output, rtol=0, atol=1e-4)


@pytest.mark.slow
def test_another_number_of_processes_under_zero_is_refused_with_the_remedy(interrupted, tmp_path):
    """The remedy that the message names, a new run with the adapters, works."""
    flags, output = interrupted
    other = flags(output, per_device_train_batch_size=1, deepspeed=zero(tmp_path, 2))
    codes, printed = start(tmp_path, other, 2)
    assert codes == [1, 1]
    for text in printed:
        assert f"checkpoint-4 was written with {ENGINE_OF_ONE} (processes: 1), this run is" in text, text
        assert "this run is DeepSpeed ZeRO-2 (processes: 2)" in text
        assert f"`--adapter {output / 'checkpoint-4'} --output_dir <another>`" in text
    values = {"adapter": output / "checkpoint-4", "per_device_train_batch_size": 1, "deepspeed": zero(tmp_path, 2)}
    data = flags(output)[flags(output).index("--data_path") + 1]
    finish(tmp_path, tiny_flags(Path(data).parent, data, tmp_path / "new", **values), 2)


@pytest.mark.slow
@pytest.mark.extended
def test_zero_3_stops_early_and_ends_with_its_best_checkpoint(scienceqa, tmp_path):  # noqa: F811
    values = {"per_device_train_batch_size": 1, "num_train_epochs": 3, "save_steps": 2, **BEST, **SAVING}
    values |= {"deepspeed": zero(tmp_path, 3), "early_stopping_patience": 1}
    finish(tmp_path, tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **values), 2, score_3_2)
    assert checkpoints(tmp_path / "output") == [2], "of 9 steps"
    assert_same_adapters(tmp_path / "output" / "checkpoint-2", tmp_path / "output")


def score_3_2(rank: int):
    get_task("scienceqa").score = score_like([3, 2, 0, 0])


def test_the_best_checkpoint_belongs_to_this_run(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    """Evaluated more often than saved: the folder of the best step is what another run has left."""
    flags = partial(tiny_flags, tmp_path, scienceqa[0], tmp_path / "output", num_train_epochs=2, **BEST, **SAVING)
    monkeypatch.setattr(get_task("scienceqa"), "score", score_like([3, 2, 1, 0, 0, 0, 0]))
    train.main(flags(save_steps=2, eval_steps=2, learning_rate=0.2))
    old = adapters(tmp_path / "output" / "checkpoint-2")
    monkeypatch.setattr(get_task("scienceqa"), "score", score_like([3, 2, 1, 0, 0, 0, 0]))
    train.main(flags(save_steps=4, eval_steps=2, learning_rate=0.001))
    assert all(not torch.equal(tensor, old[name]) for name, tensor in adapters(tmp_path / "output").items())


def test_a_run_resumes_only_from_its_own_folder(interrupted, tmp_path):
    """States of optimizers are pickles."""
    flags, output = interrupted
    for place, message in ((output / "checkpoint-4", "pickles.*--adapter"), (output, "Give one of .*checkpoint-4")):
        with pytest.raises(ValueError, match=message):
            train.main(flags(tmp_path / "other", resume_from_checkpoint=place))


def test_resuming_from_an_earlier_checkpoint_moves_later_ones_aside(interrupted):
    flags, output = interrupted
    weights = (output / "checkpoint-4" / "model.safetensors").read_bytes()
    train.main(flags(output, resume_from_checkpoint=(output / "checkpoint-2").absolute(), save_total_limit=1))
    assert [path.name for path in list_checkpoints(output)] == ["checkpoint-6"]
    (aside,) = output.glob("checkpoint-4-before-*")
    assert (aside / "model.safetensors").read_bytes() == weights


def test_the_trainers_values_for_true_and_false_are_understood(interrupted):
    flags, output = interrupted
    run = json.loads((output / "run.json").read_text())
    for asked, expected in (("true", output / "checkpoint-4"), ("false", None)):
        assert find_start(output, asked, run)[1] == expected


def test_an_output_folder_must_be_a_folder(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "dangling").symlink_to(tmp_path / "nothing")
    for name in ("file", "dangling"):
        for asked in ("auto", "never"):
            with pytest.raises(ValueError, match=f"`--output_dir .*{name}` is not a folder"):
                find_start(tmp_path / name, asked, {})


def test_an_output_folder_that_cannot_be_written_to_is_named_before_the_data_are_read(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(train, "load_processor", lambda *_: pytest.fail("too late"))
    read_only = [Path("/proc")] if sys.platform == "linux" else []  # also for root
    for folder in (tmp_path / "file" / "output", *read_only):
        with pytest.raises(ValueError, match=f"`--output_dir {folder}` cannot be .* written to: .* Give a folder"):
            train.main(["--output_dir", str(folder)])


@pytest.mark.parametrize("name", ["README.md", "config.json"])
def test_files_that_no_run_wrote_are_not_replaced(name, tmp_path):
    (tmp_path / name).write_text("{}")
    for asked in ("auto", "never"):
        with pytest.raises(ValueError, match=f"has a {name} that no run of train.py has written.*Give another folder"):
            find_start(tmp_path, asked, {})


def test_the_recorded_commit_is_that_of_this_checkout(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", "-C", tmp_path, "-c", "user.name=a", "-c", "user.email=b", *arguments], check=True)

    git("init", "-q")
    (tmp_path / "file").write_text("1")
    (tmp_path / "copy").mkdir()
    git("add", "file")
    git("commit", "-qm", "x")
    monkeypatch.setattr("training.checkpoints.ROOT", tmp_path)
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")  # as in a container
    clean = describe_code()["commit"]
    assert re.fullmatch("[0-9a-f]{40}", clean)
    (tmp_path / "file").write_text("2")
    assert describe_code()["commit"] == f"{clean}-dirty"
    monkeypatch.setattr("training.checkpoints.ROOT", tmp_path / "copy")
    assert describe_code()["commit"] is None


def test_folders_that_only_look_like_checkpoints_of_the_run_are_left_alone(interrupted):
    flags, output = interrupted
    shutil.copytree(output / "checkpoint-4", output / "checkpoint-4-backup")
    other = json.loads((output / "checkpoint-2" / "manifest.json").read_text())
    (output / "checkpoint-1").mkdir()
    content = other["content"].replace(json.loads(other["content"])["run"], "another")
    other = {"content": content, "sha256": hashlib.sha256(content.encode()).hexdigest()}
    (output / "checkpoint-1" / "manifest.json").write_text(json.dumps(other))
    train.main(flags(output, save_total_limit=1))
    assert sorted(path.name for path in output.glob("checkpoint-*")) == [
        "checkpoint-1",
        "checkpoint-4-backup",
        "checkpoint-6",
    ]


@pytest.mark.parametrize("change", ["moved", "lost"])
def test_the_best_checkpoint_is_searched_for_beside_the_one_to_resume_from(scienceqa, tmp_path, monkeypatch, change):  # noqa: F811
    flags = partial(tiny_flags, tmp_path, scienceqa[0], num_train_epochs=2, save_steps=2, **{**BEST, **SAVING})
    monkeypatch.setattr(get_task("scienceqa"), "score", score_like([3, 2, 1, 0, 0]))
    train.main(flags(tmp_path / "first", save_total_limit=5))
    (tmp_path / "first" / "results.json").unlink()
    shutil.rmtree(tmp_path / "first" / "checkpoint-6")
    (tmp_path / "first").rename(tmp_path / "moved")
    monkeypatch.setattr(get_task("scienceqa"), "score", score_like([1, 0, 0]))
    if change == "lost":
        shutil.rmtree(tmp_path / "moved" / "checkpoint-2")
        with pytest.raises(ValueError, match="cannot be resumed from .*checkpoint-4, since its best .*checkpoint-2"):
            train.main(flags(tmp_path / "moved", save_total_limit=5))
    else:
        train.main(flags(tmp_path / "moved", save_total_limit=5))
        assert_same_adapters(tmp_path / "moved" / "checkpoint-2", tmp_path / "moved")


def terminate_at(step: int, rank: int):
    """SIGTERM, as from a cluster's scheduler. transformers waits three seconds for a SIGKILL, too long for a test."""
    from transformers.trainer_jit_checkpoint import CheckpointManager

    begin, steps = AnswerTrainer.training_step, itertools.count(1)
    initialise = CheckpointManager.__init__
    CheckpointManager.__init__ = lambda self, trainer, kill_wait=3: initialise(self, trainer, 0)

    def training_step(self, *args, **kwargs):
        if next(steps) == step:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)
        return begin(self, *args, **kwargs)

    AnswerTrainer.training_step = training_step


def test_a_terminated_run_does_not_count_as_finished(scienceqa, tmp_path):  # noqa: F811
    values = {"enable_jit_checkpoint": True, "num_train_epochs": 4, **SAVING, "save_steps": 100}
    values |= {"memory_dropout": 0.1, "vision_adapter_dropout": 0.1}
    flags = partial(tiny_flags, tmp_path, scienceqa[0], **values)
    train.main(flags(tmp_path / "whole"))
    (printed,) = finish(tmp_path, flags(tmp_path / "output"), prepare=partial(terminate_at, 5))
    assert "The same command resumes" in printed and not (tmp_path / "output" / "results.json").exists()
    (printed,) = finish(tmp_path, flags(tmp_path / "output"))
    assert "resuming from" in printed
    assert_same_adapters(tmp_path / "whole", tmp_path / "output")


# --- a full disk ---


def test_a_full_disk_is_reported_and_the_run_resumes_from_the_earlier_checkpoint(
    interrupted, six_steps, monkeypatch, capsys
):
    flags, output = interrupted
    save = torch.save

    def fail(content, file, *args, **kwargs):
        if "checkpoint-6" in str(file):
            raise OSError(28, "No space left on device", str(file))
        save(content, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", fail)
        with pytest.raises(OSError, match="checkpoint-6 could not be written.*MB are free.*checkpoint-4. Free"):
            train.main(flags(output, save_total_limit=1))
    assert checkpoints(output) == [2, 4, 6], "nothing is removed before the new one is complete"
    train.main(flags(output))
    assert f"resuming from {output / 'checkpoint-4'}" in capsys.readouterr().out
    assert_same_adapters(six_steps[1] / "whole", output)


def test_a_really_full_disk_leaves_the_earlier_checkpoints(six_steps, tmp_path):
    flags, _ = six_steps
    disk = tmp_path / "disk"
    disk.mkdir()
    # Room for one checkpoint and a part of the next
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=560k", "tmpfs", disk], capture_output=True, text=True
    )
    if mounted.returncode:
        pytest.skip(f"a file system of 520 kB cannot be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(OSError, match="checkpoint-4 could not be written.*The last complete .*checkpoint-2"):
            train.main(flags(disk / "output"))
        model = AutoModelForImageTextToText.from_pretrained(disk / "output" / "checkpoint-2", trust_remote_code=True)
        assert all(parameter.isfinite().all() for parameter in model.parameters())
    finally:
        subprocess.run(["umount", "--lazy", disk], check=True)  # also where an error holds a file open


def test_a_full_disk_at_the_end_loses_no_adapters(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    write, output = adapters_dehvf.write_tensors, tmp_path / "output"

    def fail(tensors, file, *args, **kwargs):
        if Path(file).parent == output:
            raise OSError(28, "No space left on device")
        write(tensors, file, *args, **kwargs)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    flags = partial(tiny_flags, tmp_path, scienceqa[0])
    with monkeypatch.context() as patch:
        patch.setattr(adapters_dehvf, "write_tensors", fail)
        with pytest.raises(OSError, match="output could not be written: .*No space left") as error:
            train.main(flags(output))
    saved = re.search(r"`--adapter (\S+)` and `--num_train_epochs 0`", str(error.value))[1]
    train.main(flags(tmp_path / "whole"))
    assert_same_adapters(tmp_path / "whole", Path(saved))
    train.main(flags(output, adapter=saved, num_train_epochs=0))
    assert_same_adapters(tmp_path / "whole", output)


def test_adapters_that_cannot_be_saved_are_reported_with_what_to_do(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(adapters_dehvf, "write_tensors", Mock(side_effect=ValueError("not finite")))
    with pytest.raises(ValueError, match="not finite") as error:
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output"))
    assert f"resumes from the last checkpoint in {tmp_path / 'output'}" in error.value.__notes__[0]


# --- a loss that is no number ---


def test_a_diverging_run_ends_with_the_last_finite_state(scienceqa, tmp_path):  # noqa: F811
    """At 1e30 the first step's adapters are numbers, but what they give is not."""
    flags = {"learning_rate": 1e30, "warmup_steps": 0, "save_strategy": "no", "train_sampling_strategy": "sequential"}
    with pytest.raises(FloatingPointError) as error:
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **flags))
    checkpoint = tmp_path / "output" / "checkpoint-1"
    assert re.search(
        r"loss of step 2 is NaN or Inf, in the batches with the rows \[2, 3\] of the train split. The learning rate "
        r"is [\d.]+e\+28, [\d.]+e\+29. "
        rf"The last complete checkpoint is {re.escape(str(checkpoint))}.*`--learning_rate`",
        str(error.value),
    ), error.value
    assert read_manifest(checkpoint)["resumable"]
    assert all(tensor.isfinite().all() for tensor in adapters(checkpoint).values())
    assert json.loads((checkpoint / "trainer_state.json").read_text())["global_step"] == 1


def spoil_loss(step: int, batch: int, rank: int, me: int):
    """Makes the loss of a micro-batch NaN on one process."""
    from transformers import Trainer

    compute_loss, batches = Trainer.compute_loss, itertools.count(1)

    def spoilt(self, *args, **kwargs):
        loss = compute_loss(self, *args, **kwargs)
        if self.state.global_step + 1 == step and me == rank and next(batches) == batch:
            loss = loss * float("nan")
        return loss

    Trainer.compute_loss = spoilt


@pytest.mark.slow
@pytest.mark.parametrize("stage", [None, 2], ids=["DDP", "ZeRO-2"])
def test_all_processes_stop_if_the_loss_of_one_is_not_finite(scienceqa, tmp_path, stage):  # noqa: F811
    engine = {} if stage is None else {"deepspeed": zero(tmp_path, stage)}
    values = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "save_strategy": "no"}
    values |= {"num_train_epochs": 3, "train_sampling_strategy": "sequential", **engine}
    flags = tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **values)
    # Rows 0 to 3 make the first step, 4 and 5 the second; of the third process 1 has the rows 1 and 3
    codes, printed = start(tmp_path, flags, 2, partial(spoil_loss, 3, 1, 1))
    assert codes == [1, 1]
    for text in printed:
        assert "FloatingPointError: The loss of step 3 is NaN or Inf, in the batches with the rows [1]" in text, text
    assert read_manifest(tmp_path / "output" / "checkpoint-2")["processes"] == 2


def test_a_gradient_that_is_not_finite_ends_the_run_with_the_last_finite_state(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    """The loss is one."""
    begin = AnswerTrainer.training_step

    def spoil(self, model, *args, **kwargs):
        loss = begin(self, model, *args, **kwargs)
        if self.state.global_step == 2:
            self.trained_parameters["model.memory_slots.key"].grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(AnswerTrainer, "training_step", spoil)
    values = {"train_sampling_strategy": "sequential", "save_strategy": "no"}
    with pytest.raises(FloatingPointError, match=r"gradient of step 3 is NaN or Inf, .* rows \[4, 5\].*checkpoint-2"):
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **values))
    assert read_manifest(tmp_path / "output" / "checkpoint-2")["resumable"]
    assert all(tensor.isfinite().all() for tensor in adapters(tmp_path / "output" / "checkpoint-2").values())


def test_adapters_that_are_not_finite_are_not_saved(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    """Gradients can be NaN where the loss is not."""
    step = torch.optim.AdamW.step
    steps = itertools.count(1)

    def spoil(self, *args, **kwargs):
        step(self, *args, **kwargs)
        if next(steps) == 4:
            with torch.no_grad():
                self.param_groups[0]["params"][0][0] = float("inf")

    monkeypatch.setattr(torch.optim.AdamW, "step", spoil)
    with pytest.raises(FloatingPointError, match="adapters contain NaN or Inf after step 4.*complete .*checkpoint-2"):
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", num_train_epochs=2, save_steps=2, **SAVING))
    assert checkpoints(tmp_path / "output") == [2]


def test_gradients_that_overflow_are_left_to_the_loss_scaler(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    """As with fp16: a scale of 2^126 makes the gradients infinite, and the loss itself is finite. On CPUs the Trainer
    has no scaler, so it is given torch's own."""
    create, scalers = AnswerTrainer.create_optimizer, []

    def scale(self, *args):
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126, backoff_factor=2.0**-40)
        scalers.append(self.accelerator.scaler)
        return create(self, *args)

    monkeypatch.setattr(AnswerTrainer, "create_optimizer", scale)
    flags = {"num_train_epochs": 4, "max_grad_norm": 0, "warmup_steps": 0, "save_steps": 1, **SAVING}
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **flags))
    assert scalers[0].get_scale() < 2.0**126, "no step was skipped"
    first, last = (adapters(tmp_path / "output" / name) for name in ("checkpoint-1", "checkpoint-12"))
    assert any(not torch.equal(first[name], tensor) for name, tensor in last.items())


# --- reports ---


def test_speed_and_memory_are_logged_to_tensorboard_too(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.chdir(tmp_path)
    flags = {"report_to": "tensorboard", "train_sampling_strategy": "sequential", "logging_steps": 3}
    seen = []
    measure, seconds = Speed.measure, Speed.add_seconds

    def look(self, accelerator):
        counts = self.samples, int(self.text_tokens), int(self.visual_tokens)
        seen.append((counts, measure(self, accelerator)))
        return seen[-1][1]

    def five_seconds(self):
        seconds(self)
        self.seconds = 5.0

    monkeypatch.setattr(Speed, "measure", look)
    monkeypatch.setattr(Speed, "add_seconds", five_seconds)
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **flags))
    ((counts, logged),) = seen
    split = Split(
        get_task("scienceqa"),
        "train",
        tiny_processor(),
        DataArguments(task="scienceqa", data_path=str(scienceqa[0])),
        training=True,
    )
    assert counts == (6, sum(len(row["input_ids"]) for row in split), 3 * NUM_PATCHES)
    assert logged["text_tokens_per_second"] == round(counts[1] / 5, 2)
    assert logged["visual_tokens_per_second"] == round(counts[2] / 5, 2)
    assert 0.1 < logged["peak_memory_gb"] < 50
    (file,) = (tmp_path / "output" / "runs").rglob("*tfevents*")
    events = EventAccumulator(str(file)).Reload()
    for name, value in logged.items():
        (event,) = events.Scalars(f"train/{name}")
        assert event.value == pytest.approx(value, rel=1e-6)


def set_trackio_dir(folder: Path, rank: int):
    os.environ["TRACKIO_DIR"] = str(folder)  # read when trackio is imported


def test_trackio_gets_the_logs_of_a_run(scienceqa, tmp_path):  # noqa: F811
    flags = tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", report_to="trackio", project="seeing", **SAVING)
    finish(tmp_path, flags, prepare=partial(set_trackio_dir, tmp_path / "trackio"))
    with sqlite3.connect(tmp_path / "trackio" / "seeing.db") as database:
        lines = [json.loads(line) for (line,) in database.execute("SELECT metrics FROM metrics ORDER BY step")]
    lines = [line for line in lines if "train/loss" in line]
    names = {"train/samples_per_second", "train/text_tokens_per_second", "train/visual_tokens_per_second"}
    assert len(lines) == 3 and all(line.keys() >= {*names, "train/peak_memory_gb"} for line in lines)


def test_a_run_is_described_from_its_start(scienceqa, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(AnswerTrainer, "train", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output"))
    run = json.loads((tmp_path / "output" / "run.json").read_text())
    assert run["versions"]["torch"] == version("torch") and run["commit"] == commit_of_this_code()
    assert run["config"]["num_groups"] == 2 and run["arguments"]["learning_rate"] == 0.05
    assert (run["engine"], run["processes"]) == (ENGINE_OF_ONE, 1)
