import gc
import os
from functools import cache

import pytest
import torch
from transformers.utils import logging


# Tiny models lose far more to the hand-over between threads than they gain
torch.set_num_threads(1)
logging.disable_progress_bar()
# Each full collection would walk the objects of all imported libraries, a tenth of the time that tests take
gc.disable()


def pytest_configure(config):
    """
    With `pytest -n`, one core for each worker, since threads that wait for a busy core crawl. Two workers share a core
    with `-n 4` on two cores, so that one runs while the other waits for a server or a process.
    """
    worker = os.environ.get("PYTEST_XDIST_WORKER", "").removeprefix("gw")
    if worker and hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker) % len(cores)]})


# The files that take longest, so that with `-n` no worker is left with one of them at the end
LONGEST = ("readme", "checkpoints", "citizen", "train", "distributed", "hub", "serving", "baselines", "loading")
LONGEST += ("transformers_suite", "training_arguments", "large_bases", "bases", "several_images", "generation", "app")
LONGEST += ("recipes", "modeling", "pictures", "operations", "tasks", "speed", "threads", "releases", "fusion")


def pytest_collection_modifyitems(items):
    order = {f"test_{name}.py": index for index, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


def pytest_collection_finish():
    gc.collect()
    gc.freeze()
    gc.enable()


def pytest_runtest_setup(item):
    if "PYTEST_XDIST_WORKER" in os.environ and item.path.name != f"test_{LONGEST[0]}.py":
        lower_priority()


@cache
def lower_priority():
    """All workers wait for the one with the README's job, which takes minutes, so that one runs first."""
    if hasattr(os, "nice"):
        os.nice(5)


@pytest.fixture
def nothing_compiled():
    """Drops the graphs of earlier tests. All models share one forward, which torch compiles eight times at most."""
    torch.compiler.reset()
