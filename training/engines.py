# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""What DDP, DeepSpeed and FSDP2 need."""

import os
from pathlib import Path

import torch
from accelerate.utils.other import get_free_port
from torch.distributed.tensor import DTensor
from transformers.utils import logging


ENGINE_OF_ONE = "DDP or a single process"  # whose checkpoints are the same
logger = logging.get_logger("train")


def name_engine(training_args) -> str:
    if training_args.deepspeed_plugin is not None:
        return f"DeepSpeed ZeRO-{training_args.deepspeed_plugin.zero_stage}"
    return "FSDP" if training_args.fsdp or "ACCELERATE_USE_FSDP" in os.environ else ENGINE_OF_ONE


def gather_shards(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor that FSDP2 has divided, as a whole."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def warn_of_compiler_locks():
    """torch waits without a word for whoever compiles DeepSpeed's operators, even if that process was killed."""
    folder = os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions")
    for lock in Path(folder).glob("**/lock"):
        logger.warning(f"{lock} says that DeepSpeed is being compiled. If nothing is, remove it: it was left behind.")


def start_engine(training_args):
    """DeepSpeed, where it is asked for, and the threads of a CPU."""
    if training_args.deepspeed_plugin is not None:
        import deepspeed

        if "RANK" not in os.environ:
            # `accelerate launch` sets these for several processes alone; without them DeepSpeed asks for MPI
            places = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(get_free_port())}
            os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", **places)
        warn_of_compiler_locks()
        # accelerate does so on accelerators alone. ZeRO-3 needs it before the bases, which it divides as they load
        deepspeed.init_distributed(auto_mpi_discovery=False)
    if training_args.use_cpu:  # `accelerate launch` leaves each process a single thread
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // training_args.world_size))
