# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Starts DDP, DeepSpeed and FSDP2, and defines a Trainer that saves and loads adapters under each of them.

All overrides of private methods of the Trainer and of methods of DeepSpeed are in this file. They were checked against
the code of transformers 5.23 and 5.24, accelerate 1.15 and DeepSpeed 0.19; `tests/test_engines.py` fails when a
signature changes.
"""

import os
import tempfile
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import torch
from accelerate.utils import save_fsdp_optimizer
from accelerate.utils.other import get_free_port
from datasets import Dataset
from filelock import FileLock
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME
from transformers.utils import SAFE_WEIGHTS_NAME, logging


ENGINE_OF_ONE = "DDP or a single process"  # these two have the same checkpoints
logger = logging.get_logger("train")


def name_engine(training_args) -> str:
    if training_args.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{training_args.deepspeed_plugin.zero_stage}"
    return "FSDP" if training_args.fsdp or "ACCELERATE_USE_FSDP" in os.environ else ENGINE_OF_ONE


def name_precision(training_args) -> str:
    """
    The mixed precision of a run: that of `--bf16` or `--fp16`, or else of accelerate's launcher or config. With
    DeepSpeed it is that of its config, into which accelerate only writes its own if there is none; `torch_autocast`
    there, which leaves adapters in float32, has a name of its own.
    """
    asked, plugin = training_args.mixed_precision, training_args.deepspeed_plugin
    if plugin is None:
        return asked
    modes = {mode: plugin.deepspeed_config.get(mode, {"enabled": mode == asked}) for mode in ("bf16", "fp16")}
    autocast = plugin.deepspeed_config.get("torch_autocast", {})
    modes[f"torch_autocast {autocast.get('dtype')}"] = autocast
    return next((mode for mode, config in modes.items() if config.get("enabled") is True), "no")


def start_engine(training_args):
    """Starts DeepSpeed, if requested, and sets the number of CPU threads."""
    if training_args.deepspeed_plugin is not None:
        import deepspeed

        # DeepSpeed clips the gradients itself, and transformers only fills in values that are "auto"
        config = training_args.deepspeed_plugin.hf_ds_config.config
        config.setdefault("gradient_clipping", training_args.max_grad_norm)
        if "RANK" not in os.environ:
            # `accelerate launch` only sets these for several processes. Without them DeepSpeed requires MPI
            addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **addresses)
        compile_communication()
        # accelerate does not do this on CPUs. ZeRO-3 needs it before the bases are loaded and sharded
        deepspeed.init_distributed(auto_mpi_discovery=False)
    if training_args.use_cpu:  # `accelerate launch` sets it to one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // training_args.world_size))


def compile_communication():
    """
    Lets DeepSpeed compile its communication on CPUs, if necessary, in one process at a time. If a process is killed
    while it compiles, it leaves a lock of torch behind, for which all later processes would wait silently and forever.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "dehvf.lock"):
        for lock in folder.glob(f"**/{builder.NAME}/lock"):
            with suppress(FileNotFoundError):  # the other process has finished
                while time.time() - lock.stat().st_mtime < 60:  # possibly held by a program that does not use our lock
                    logger.warning_once(f"Waiting for the process that compiles DeepSpeed, see {lock}.")
                    time.sleep(1)
                lock.unlink()
        builder.load()


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The full tensor, if FSDP2 has sharded it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


class AdapterTrainer(Trainer):
    """
    A Trainer whose checkpoints contain the trained parameters and not the frozen bases.

    The Trainer supports this for a `PeftModel` only. Here the weights are always saved with `save_pretrained`, which
    only writes adapters, and read from its `model.safetensors`; DeepSpeed and FSDP2 only save and load the optimizer.
    """

    order: torch.Generator | None = None  # generator of `group_by_length`, seeded at the beginning of each epoch

    @property
    def trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def gathered(self, modifier_rank: int | None = None):
        """A context in which the trained parameters are whole under ZeRO-3."""
        if not self.is_deepspeed_enabled:
            return nullcontext()
        import deepspeed

        parameters = list(self.trained_parameters.values())
        return deepspeed.zero.GatheredParameters(parameters, modifier_rank=modifier_rank)

    def are_adapters_finite(self) -> bool:
        with self.gathered():
            finite = [whole(parameter.isfinite().all()) for parameter in self.trained_parameters.values()]
            return bool(torch.stack(finite).all())

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        Saves the adapters to `output_dir`, or at the end of training to a temporary folder if that fails.

        Raises:
            OSError: if they were saved to the temporary folder, whose name is in the message.
        """
        output_dir, tensors = output_dir or self.args.output_dir, None
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            with self.gathered():
                tensors = {
                    name: whole(value.detach()).cpu().clone() for name, value in self.trained_parameters.items()
                }
        try:
            self._save(output_dir, state_dict=tensors)
        except Exception as error:  # `tokenizers` raises this class if the disk is full
            if _internal_call:  # a checkpoint, which is not the end of training
                raise
            if isinstance(error, ValueError):  # about what is saved, so another folder would not help
                error.add_note(
                    "The trained adapters were not saved. Once the cause is removed, the same command resumes from "
                    f"the last checkpoint in {output_dir}, if there is one (see `--save_strategy`)."
                )
                raise
            folder = tempfile.mkdtemp(prefix="dehvf-")
            self._save(folder, state_dict=tensors)
            raise OSError(
                f"{output_dir} could not be written: {error}. The trained adapters were saved to {folder} instead. "
                f"Free some space, then use `--adapter {folder}` and `--num_train_epochs 0` to evaluate them."
            ) from error

    def load_adapters(self, checkpoint: str | Path):
        """Raises `ValueError` if the checkpoint belongs to another method."""
        tensors, trained = load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME), self.trained_parameters
        if differing := sorted(tensors.keys() ^ trained.keys()):
            raise ValueError(
                f"{checkpoint} has {len(tensors)} tensors, this model trains {len(trained)}. They differ in "
                f"{len(differing)} names, such as {differing[0]}. Use the method and the sizes of the checkpoint."
            )
        with self.gathered(modifier_rank=0), torch.no_grad():
            for name, parameter in trained.items():
                tensor = tensors[name].to(parameter.device)
                if isinstance(parameter, DTensor):
                    tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
                parameter.copy_(tensor)

    def save_checkpoint(self):
        """Writes a checkpoint now, independent of `save_strategy`."""
        self._save_checkpoint(self.model_wrapped, trial=None)

    def write_checkpoint(self, write):
        """Called to write a checkpoint; `write()` is the implementation of the Trainer."""
        write()

    def load_best_checkpoint(self):
        self.load_adapters(self.state.best_model_checkpoint)

    # --- overrides of private methods ---

    def _get_train_sampler(self, train_dataset=None):
        """
        Sampler for `group_by_length` with the lengths of the encoded rows, which the Trainer cannot find. The order of
        each epoch depends on a seed, so that it is the same in all processes and in a resumed run.
        """
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        encoded = (train_dataset or self.train_dataset).encoded.with_format("arrow")
        lengths = pc.list_value_length(encoded["input_ids"][:])
        sampler = super()._get_train_sampler(Dataset.from_dict({self.args.length_column_name: lengths.to_pylist()}))
        sampler.generator = self.order = torch.Generator()
        return sampler

    def _save_checkpoint(self, model, trial):
        self.write_checkpoint(partial(super()._save_checkpoint, model, trial))

    def _save_optimizer_and_scheduler(self, output_dir):
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _load_from_checkpoint(self, resume_from_checkpoint, model=None):
        self.load_adapters(resume_from_checkpoint)

    def _load_best_model(self):
        self.load_best_checkpoint()

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.deepspeed
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        engine.module_state_dict = lambda *_, **__: {}
        if resume_from_checkpoint is not None:
            self.load_adapters(resume_from_checkpoint)
            deepspeed_load_checkpoint(engine, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared
