# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Each benchmark is a module, run with `python -m benchmarks.<name>`, except `fusers`, which `pretrained` imports. The
reports are in `benchmarks/results`.
"""

import json
import os
import platform
import re
import shlex
import statistics
import sys
from argparse import ArgumentTypeError
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch

from training.checkpoints import commit_of_this_code


RESULTS = Path(__file__).parent / "results"


def positive(text: str) -> int:
    """Reads an argument that is at least 1."""
    if (number := int(text)) < 1:
        raise ArgumentTypeError(f"it is {number}, but must be at least 1")
    return number


def describe_machine() -> dict:
    """The processor, memory in 10^9 bytes, number of threads, GPU, package versions and commit of this repository."""
    cpus = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", cpus.read_text(encoding="utf-8")) if cpus.exists() else None
    packages = ("torch", "transformers", "peft")
    return {
        "processor": found[1] if found else platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"Python": platform.python_version()} | {name: version(name) for name in packages},
        "commit": commit_of_this_code(),
    }


def machine_in_words() -> str:
    """The machine and the package versions in one line."""
    machine = describe_machine()
    versions = ", ".join(f"{name} {number}" for name, number in machine["versions"].items())
    gpu = f"{machine['gpu']}, " if machine["gpu"] else ""
    return f"{gpu}{machine['processor']}, {machine['cores']} cores, {machine['threads']} threads; {versions}"


def spread(values: list[float], digits: int = 1) -> str:
    """Mean ± standard deviation; a dash without values."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{deviation}" if values else "–"


def heading(command: str, note: str) -> list[str]:
    """The first lines of a report: the command that writes it, and a note."""
    return [f"<!-- Written by `{command}`. Do not edit. -->", "", note, ""]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table."""
    head, *rows = ("|" + "".join(f" {cell} |" if cell else " |" for cell in cells) for cells in (head, *rows))
    return [head, "|---" * (head.count("|") - 1) + "|", *rows]


def format_ratios(ratios: Sequence[float]) -> str:
    """The median, the minimum and the maximum."""
    return f"{statistics.median(ratios):.3f} ({min(ratios):.3f} to {max(ratios):.3f})"


def verdict(is_met: bool) -> str:
    """Whether a target is met."""
    return "met" if is_met else "not met"


def require_writable(folder: Path):
    """Ends the command if reports cannot be written to this folder: before measuring, which may take hours."""
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        sys.exit(f"The report cannot be written to {folder}. Use a folder that you can write to.")


def command_line(name: str) -> str:
    """The command of this benchmark with its arguments."""
    return shlex.join(["python", "-m", f"benchmarks.{name}", *sys.argv[1:]])


def read_report(folder: Path, name: str) -> dict:
    """The report that `save_report` wrote to `folder`; empty if there is none."""
    file = folder / f"{name}.json"
    return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}


def save_report(folder: Path, name: str, report: dict, markdown: Callable, draw: Callable | None = None):
    """Writes `name.json`, `name.md` and, with `draw`, `name.png` to `folder`, after printing the Markdown."""
    report = {"machine": describe_machine(), **report}
    text = markdown(report)
    print(text)
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1), encoding="utf-8")
    (folder / f"{name}.md").write_text(text, encoding="utf-8")
    if draw is not None:
        draw(report, folder / f"{name}.png")
