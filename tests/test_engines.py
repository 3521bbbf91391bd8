"""The private methods of transformers and DeepSpeed that training/engines.py overrides are what they were."""

import inspect
import os
import time

from transformers import Trainer

from training import engines
from training.trainer import AnswerTrainer


# Parameters in transformers 5.23 and 5.24
OVERRIDDEN = {
    "_save_checkpoint": "self model trial",
    "_save_optimizer_and_scheduler": "self output_dir",
    "_load_from_checkpoint": "self resume_from_checkpoint model",
    "_load_best_model": "self",
    "_get_train_sampler": "self train_dataset",
    "_prepare_for_training": "self max_steps train_dataloader resume_from_checkpoint",
}
# Parameters in DeepSpeed 0.19
ENGINE = {
    "save_checkpoint": "self save_dir tag client_state save_latest exclude_frozen_parameters",
    "module_state_dict": "self destination prefix keep_vars exclude_frozen_parameters",
}


def parameters(function) -> str:
    return " ".join(inspect.signature(function).parameters)


def test_overridden_private_methods_have_the_signatures_that_were_read():
    assert {name: parameters(getattr(Trainer, name)) for name in OVERRIDDEN} == OVERRIDDEN
    for name in OVERRIDDEN:
        assert parameters(getattr(engines.AdapterTrainer, name)) == OVERRIDDEN[name]


def test_deepspeeds_engine_has_the_methods_that_are_replaced():
    from deepspeed import DeepSpeedEngine

    assert {name: parameters(getattr(DeepSpeedEngine, name)) for name in ENGINE} == ENGINE


def test_no_other_private_name_of_the_trainer_is_overridden():
    ours = [cls for cls in AnswerTrainer.__mro__ if cls.__module__.startswith("training.")]
    private = {(cls, name) for cls in ours for name in vars(cls) if name[0] == "_" and name[:2] != "__"}
    taken = {(cls, name) for cls, name in private if hasattr(Trainer, name)}
    assert taken == {(engines.AdapterTrainer, name) for name in OVERRIDDEN}


def test_the_lock_of_a_process_that_was_killed_while_it_compiled_is_removed(tmp_path, monkeypatch):
    """Not that of one that compiles: it is waited for."""
    from deepspeed.accelerator import get_accelerator

    builder, loads = get_accelerator().create_op_builder("ShareMemCommBuilder"), []
    lock = tmp_path / "py311_cpu" / builder.NAME / "lock"
    lock.parent.mkdir(parents=True)
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    monkeypatch.setattr(type(builder), "load", lambda self: loads.append(lock.exists()))
    lock.touch()
    os.utime(lock, (time.time() - 61,) * 2)
    engines.compile_communication()
    lock.touch()
    monkeypatch.setattr(engines.time, "sleep", lambda seconds: lock.unlink())
    engines.compile_communication()
    assert loads == [False, False]
