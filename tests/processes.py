"""
Runs train.py in processes of its own on the CPU, with what a launcher would put into their environment: `start` as a
user sees it from outside, exit codes and output; `run_in_processes` any function, for its result.

A fork server imports the heavy libraries once; to start `accelerate launch` or `torchrun` for each run would take 10
seconds of imports per process.
"""

import ctypes
import faulthandler
import gc
import io
import multiprocessing
import os
import re
import socket
import sys
import threading
import time
import traceback
from contextlib import redirect_stdout
from functools import cache
from pathlib import Path

import train
from training.engines import compile_communication
from training.trainer import AnswerTrainer


M_MMAP_THRESHOLD = -3  # of malloc.h


def fork_server():
    context = multiprocessing.get_context("forkserver")
    bases = (f"transformers.models.{name}.modeling_{name}" for name in ("clip", "llama"))
    context.set_forkserver_preload(["train", "deepspeed", "datasets", "peft", "evaluate", *bases])
    return context


@cache
def compile_deepspeed():
    """DeepSpeed's first start on a machine takes minutes, which are not to count as those of a test."""
    process = fork_server().Process(target=compile_communication)
    process.start()
    process.join()
    assert process.exitcode == 0


def start(folder: Path, flags: list[str], processes: int = 1, prepare=None) -> tuple[list[int], list[str]]:
    """
    `train.py flags` in so many processes; when one ends badly the others are killed, as launchers do.

    Args:
        folder: where their outputs go.
        prepare: called with the rank in each process before it starts, to arrange for an accident.

    Returns:
        Exit codes and outputs, by rank.
    """
    if processes > 1:
        compile_deepspeed()
    log, context = folder / "log", fork_server()
    environments = torchrun_environments(processes)
    running = [
        context.Process(target=_train, args=(rank, environment, log, prepare, flags))
        for rank, environment in enumerate(environments)
    ]
    for process in running:
        process.start()
    for _ in range(3000):  # five minutes
        for process in running:
            process.join(0.1 / processes)
        if any(process.exitcode for process in running) or not any(process.is_alive() for process in running):
            break
    for process in running:
        process.join(10)  # all processes are to end alike, if they can
        process.kill()
        process.join()
    return [process.exitcode for process in running], [Path(f"{log}.{rank}").read_text() for rank in range(processes)]


def _train(rank: int, environment: dict, log: Path, prepare, flags: list[str]):
    with open(f"{log}.{rank}", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout.reconfigure(line_buffering=True)  # what was printed before a kill or `os._exit` is to be found
    os.environ.update(environment)
    gc.freeze()  # the objects of the imported libraries, as in conftest.py
    if prepare is not None:
        prepare(rank)
    try:
        train.main(flags)
    except BaseException:
        traceback.print_exc()
        sys.stderr.flush()
        os._exit(1)
    os._exit(0)  # as a launcher's processes do not wait for threads of DeepSpeed either


def run_in_processes(job, environments: list[dict], *arguments, timeout: float = 300) -> list:
    """
    `job(*arguments)` in one new process for each environment. Returns their results, in order.

    Raises:
        AssertionError: if a job failed, with its traceback, or did not end in `timeout` seconds, as when it hangs.
    """
    compile_deepspeed()
    context = fork_server()
    results = context.SimpleQueue()
    processes = [
        context.Process(target=_run, args=(job, rank, environment, arguments, results, timeout), daemon=True)
        for rank, environment in enumerate(environments)
    ]
    for process in processes:
        process.start()
    ended, deadline = {}, time.monotonic() + timeout
    while len(ended) < len(processes) and time.monotonic() < deadline:
        if results.empty():
            time.sleep(0.02)
            continue
        rank, result, failure = results.get()
        if failure:
            break
        ended[rank] = result
    else:
        failure = f"{len(processes) - len(ended)} of {len(processes)} processes did not end in {timeout} s."
    complete = len(ended) == len(processes)
    for process in processes:
        process.join(30 if complete else 0)
        process.kill()
    assert complete, failure
    return [ended[rank] for rank in range(len(processes))]


def _run(job, rank: int, environment: dict, arguments: tuple, results, timeout: float):
    os.environ.update(environment)
    gc.freeze()
    faulthandler.dump_traceback_later(0.9 * timeout)  # where it hangs
    try:
        results.put((rank, job(*arguments), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def torchrun_environments(num_processes: int) -> list[dict]:
    """What torchrun sets for its processes. One process alone has nothing of it, as with `python train.py`."""
    if num_processes == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    sizes = {name: str(num_processes) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE")}
    ranks = [{name: str(rank) for name in ("RANK", "LOCAL_RANK")} for rank in range(num_processes)]
    return [{"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **sizes, **rank} for rank in ranks]


def train_and_look(flags: list[str], fsdp_on_cpu: bool = False) -> dict:
    """`train.main(flags)`, and what happened in it."""
    seen = {"batch_has_image": []}

    class WatchedTrainer(AnswerTrainer):
        def training_step(self, model, inputs, *args, **kwargs):
            seen["batch_has_image"].append("pixel_values" in inputs)
            return super().training_step(model, inputs, *args, **kwargs)

        def predict(self, *args, **kwargs):
            parameters, modules = list(self.model.parameters()), self.model.modules()
            seen["losses"] = [entry["loss"] for entry in self.state.log_history if "loss" in entry]
            seen["adapter_dtypes"] = {parameter.dtype for parameter in parameters if parameter.requires_grad}
            seen["base_dtypes"] = {parameter.dtype for parameter in parameters if not parameter.requires_grad}
            seen["activation_checkpointing"] = self.model.is_activation_checkpointing
            seen["divided_by_fsdp"] = sum(type(module).__name__.startswith("FSDP") for module in modules)
            seen["divided_by_deepspeed"] = sum(hasattr(parameter, "ds_id") for parameter in parameters)
            return super().predict(*args, **kwargs)

    train.AnswerTrainer = WatchedTrainer
    if fsdp_on_cpu:
        let_accelerate_take_fsdp_on_the_cpu()
    with redirect_stdout(io.StringIO()) as printed:
        train.main(flags)
    return {**seen, "printed": printed.getvalue()}


def let_accelerate_take_fsdp_on_the_cpu():
    """accelerate offers FSDP on accelerators alone, although PyTorch's runs on CPUs: without this it would be DDP."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    init = AcceleratorState.__init__

    def init_with_fsdp(self, *args, fsdp_plugin=None, **kwargs):
        init(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
        if fsdp_plugin is not None:
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
            self.fsdp_plugin = fsdp_plugin

    AcceleratorState.__init__ = init_with_fsdp


def growth_while_loading(flags: list[str]) -> int:
    """By how many bytes this process's own memory (not that of mapped files) grows at most while bases are loaded."""
    import torch

    # Each larger tensor is mapped on its own and given back at once, so that what is resident is what is alive
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)
    growth = []

    def load(*arguments):
        done = threading.Event()
        before = _resident()

        def sample():
            while not done.wait(0.001):
                growth.append(_resident() - before)

        sampler = threading.Thread(target=sample)
        sampler.start()
        try:
            loaded.append(original(*arguments))
        finally:
            done.set()
            sampler.join()
        raise StopIteration

    loaded, original, train.load_model = [], train.load_model, load
    try:
        train.main(flags)
    except StopIteration:
        pass
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return max(growth)


def _resident() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])
