# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
DDP, DeepSpeed and FSDP2: how they are started, and a Trainer that saves and loads adapters under each of them.

This file has every override of a private method of the Trainer and of a method of DeepSpeed. They were read in
transformers 5.23 and 5.24, accelerate 1.15 and DeepSpeed 0.19; `tests/test_engines.py` fails when a signature changes.
"""

import os
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


ENGINE_OF_ONE = "DDP or a single process"  # their checkpoints are the same
logger = logging.get_logger("train")


def name_engine(training_args) -> str:
    if training_args.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{training_args.deepspeed_plugin.zero_stage}"
    return "FSDP" if training_args.fsdp or "ACCELERATE_USE_FSDP" in os.environ else ENGINE_OF_ONE


def start_engine(training_args):
    """Starts DeepSpeed, if it is asked for, and sets the number of CPU threads."""
    if training_args.deepspeed_plugin is not None:
        import deepspeed

        if "RANK" not in os.environ:
            # `accelerate launch` sets these only for several processes. Without them DeepSpeed asks for MPI
            addresses = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **addresses)
        compile_communication()
        # On CPUs accelerate does not do this. ZeRO-3 needs it before it loads and shards the bases
        deepspeed.init_distributed(auto_mpi_discovery=False)
    if training_args.use_cpu:  # `accelerate launch` sets one thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // training_args.world_size))


def compile_communication():
    """
    Lets DeepSpeed compile its communication on CPUs, if it needs that, in one process at a time. A process that is
    killed meanwhile leaves torch's lock behind, for which all later ones would wait silently and forever.
    """
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder("ShareMemCommBuilder")
    if builder is None or not builder.is_compatible():
        return
    folder = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "dehvf.lock"):
        for lock in folder.glob(f"**/{builder.NAME}/lock"):
            with suppress(FileNotFoundError):  # whoever compiled is ready
                while time.time() - lock.stat().st_mtime < 60:  # perhaps a program that does not take our lock
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

    The Trainer does this for a `PeftModel` only. Here the weights are always saved by `save_pretrained`, which writes
    adapters alone, and read from its `model.safetensors`; DeepSpeed and FSDP2 save and load nothing but the optimizer.
    """

    order: torch.Generator | None = None  # that of `group_by_length`, seeded when an epoch begins

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
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return super().save_model(output_dir, _internal_call)
        with self.gathered():
            tensors = {name: whole(value.detach()).cpu().clone() for name, value in self.trained_parameters.items()}
        self._save(output_dir, state_dict=tensors)

    def load_adapters(self, checkpoint: str | Path):
        """Raises `ValueError` if the checkpoint is one of another method."""
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
        """Writes a checkpoint now, whatever `save_strategy` says."""
        self._save_checkpoint(self.model_wrapped, trial=None)

    def write_checkpoint(self, write):
        """Called with the Trainer's own writing of a checkpoint, `write()`."""
        write()

    def load_best_checkpoint(self):
        self.load_adapters(self.state.best_model_checkpoint)

    # --- overrides of private methods ---

    def _get_train_sampler(self, train_dataset=None):
        """
        `group_by_length` by the tokens of the encoded rows, which the Trainer cannot find. The order of each epoch is
        drawn from a seed, so that all processes and a resumed run have the same.
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
