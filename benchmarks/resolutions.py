# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
What a larger picture costs, and what it brings: DEHVF on DINOv2-small and SmolLM2-135M-Instruct (docs/bases.md) at
112, 224, 336 and 518 pixels, which are 64 to 1,369 patches, with a memory slot for each patch.

    python -m benchmarks.resolutions                  # a minute on a CPU: operations, seconds and memory
    python -m benchmarks.resolutions --train          # first trains on the drawings of Noto Emoji what is missing
    python -m benchmarks.resolutions --report         # writes the tables from what is there

Operations are those that torch counts (`benchmarks.operations`). Seconds are those of encoding one image, and of the
one forward that answers a question about it by one token once it is encoded. Memory is what an encoded image takes,
and how much more than before is in use at most meanwhile. Training is that of `benchmarks.pretrained`, whose files
stay in `outputs/pretrained`; on one CPU core, a run takes from half an hour (112 pixels) to 8 hours (518). The tables
go to `benchmarks/results`: `resolutions.json`, `.md` and `.png`.
"""

import argparse
import dataclasses
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoConfig

from benchmarks import (
    RESULTS,
    heading,
    machine_in_words,
    memory,
    operations,
    pretrained,
    save_report,
    speed,
    spread,
    table,
)
from dehvf import ROOT, DehvfConfig


IMAGE_SIZES = (112, 224, 336, 518)
PATCH_SIZE = 14
NUM_TEXT_TOKENS = 32  # of the question
EMOJI = pretrained.ROWS["emoji: DEHVF"]
ROWS = {
    f"{size} px": dataclasses.replace(
        EMOJI,
        values={**EMOJI.values, "image_size": size, "num_memory_slots": (size // PATCH_SIZE) ** 2},
        rate=EMOJI.rate / 2,  # for a quarter of the batch
        batch_size=16,
    )
    for size in IMAGE_SIZES
}
# What grows in the table -> the parts of `operations.count` that it is the sum of
PARTS = {
    "vision encoder": ("vision encoder",),
    "DEHVF, once per image": ("vision adapters", "projector", "fuser", "fusing"),
    "language model": ("attention", "FFN", "lm_head"),
    "memory lookup": ("memory lookup",),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measures
# ---------------------------------------------------------------------------------------------------------------------


def count_operations(row: pretrained.Row) -> dict[str, int]:
    """Of the models' shapes, without their weights."""
    bases = {
        "vision_config": AutoConfig.from_pretrained(pretrained.VISION_MODEL),
        "text_config": AutoConfig.from_pretrained(pretrained.TEXT_MODEL),
    }
    with operations.meta_device():
        model = operations.build_dehvf(DehvfConfig(**bases, **{**pretrained.SETTING, **row.values}))
        counted = operations.count(model, NUM_TEXT_TOKENS)
    return {name: sum(counted[part] for part in parts) for name, parts in PARTS.items()}


def jobs_of(row: pretrained.Row, bases: tuple, device: str) -> tuple[Callable, Callable, torch.Tensor]:
    """Encoding an image, answering a question about it, and its visual memory."""
    model = pretrained.build(row, 0, *bases).to(device).eval()
    size = model.config.resolution
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randn(1, model.config.vision_config.num_channels, size, size, generator=generator).to(device)
    shape = (1, NUM_TEXT_TOKENS)
    ids = torch.randint(1, model.config.text_config.vocab_size, shape, generator=generator).to(device)
    encode = torch.no_grad()(partial(model.get_image_features, pixels))
    visual_memory = encode().pooler_output
    answer = torch.no_grad()(partial(model, ids, visual_memory=visual_memory, logits_to_keep=1, use_cache=False))
    return encode, answer, visual_memory


def timed(encode: Callable, answer: Callable, now: Callable) -> dict[str, float]:
    begin = now()
    encode()
    between = now()
    answer()
    return {"encode": between - begin, "answer": now() - between}


def measure_seconds(bases: tuple, device: str) -> dict[str, dict[str, list[float]]]:
    """Row -> job -> seconds in each round. On a CPU those that this process has one core."""

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() if device == "cuda" else time.process_time()

    jobs = {name: partial(timed, *jobs_of(row, bases, device)[:2], now) for name, row in ROWS.items()}
    return speed.take_turns(jobs, extra_seconds=0)


def measure_memory(name: str, device: str) -> dict[str, int]:
    """Bytes of an encoded image, and by how many more than before are in use at most in each job."""
    encode, answer, visual_memory = jobs_of(ROWS[name], pretrained.load_bases(device), device)

    def peak_of(job: Callable) -> int:
        job()  # what is made once stays
        if device == "cpu":
            return memory.growth_at_peak(job)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before

    return {"visual memory": visual_memory.nbytes, "encode": peak_of(encode), "answer": peak_of(answer)}


def memory_in_a_fresh_process(name: str) -> dict[str, int]:
    # Each larger tensor is mapped on its own and given back at once, so that the resident set is what is alive
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", "benchmarks.resolutions", "--memory-of", name]
    process = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
    return json.loads(process.stdout)


def measure(device: str) -> dict:
    load = os.getloadavg()[0]
    seconds = measure_seconds(pretrained.load_bases(device), device)
    return {
        "machine_in_words": machine_in_words(),
        "load": round(load, 1),
        "device": device,
        "sizes": {
            name: {
                "patches": row.values["num_memory_slots"],
                "operations": count_operations(row),
                "seconds": seconds[name],
                "memory": memory_in_a_fresh_process(name),
            }
            for name, row in ROWS.items()
        },
    }


# ---------------------------------------------------------------------------------------------------------------------
# Results
# ---------------------------------------------------------------------------------------------------------------------


def columns(report: dict) -> dict[str, list[float]]:
    """What grows with the patches: its name with the unit, and its value at each size."""
    sizes = report["measured"]["sizes"].values()
    by_name = {f"10⁹ operations: {part}": [size["operations"][part] / 1e9 for size in sizes] for part in PARTS}
    for job in ("encode", "answer"):
        by_name[f"ms: {job}"] = [1e3 * float(np.median(size["seconds"][job])) for size in sizes]
    for part in ("visual memory", "encode", "answer"):
        name = "10⁶ bytes: " + ("visual memory" if part == "visual memory" else f"{part}, at most")
        by_name[name] = [size["memory"][part] / 1e6 for size in sizes]
    return by_name


def patches(report: dict) -> list[int]:
    return [size["patches"] for size in report["measured"]["sizes"].values()]


def bend(numbers: list[int], values: list[float]) -> float:
    """How far the last value is above the straight line through the first two, in % of that line."""
    slope = (values[1] - values[0]) / (numbers[1] - numbers[0])
    straight = values[0] + slope * (numbers[-1] - numbers[0])
    return 100 * (values[-1] / straight - 1)


def markdown(report: dict) -> str:
    numbers, by_name = patches(report), columns(report)
    rows = [["patches and memory slots", *map(str, numbers), ""]]
    for name, values in by_name.items():
        cells = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values]
        rows.append([name, *cells, f"{bend(numbers, values):+.0f} %"])
    for kind in [*pretrained.kinds_of("emoji"), "average"] if report["runs"] else ():
        found = (report["runs"].get(name, []) for name in report["measured"]["sizes"])
        cells = [spread([run["scores"][kind] for run in runs]) for runs in found]
        rows.append([f"accuracy in %: {kind}", *cells, ""])
    head = ("", *report["measured"]["sizes"], "above a straight line")
    return "\n".join([*heading(report["command"], report["note"]), *table(head, rows)]) + "\n"


def draw(report: dict, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    numbers, by_name = patches(report), columns(report)
    units = dict.fromkeys(name.partition(":")[0] for name in by_name)
    count = len(units) + bool(report["runs"])
    figure, axes = pyplot.subplots(1, count, figsize=(5 * count, 4.4), layout="constrained")
    for axis, unit in zip(axes, units):
        for index, (name, values) in enumerate(by_name.items()):
            if name.startswith(f"{unit}:"):
                color, label = f"C{index}", name.partition(": ")[2]
                axis.plot(numbers, values, "o-", color=color, label=label)
                slope = (values[1] - values[0]) / (numbers[1] - numbers[0])
                straight = [values[0] + slope * (number - numbers[0]) for number in numbers]
                axis.plot(numbers, straight, ":", color=color, linewidth=1)
        axis.set_title(f"{unit.replace('ms', 'milliseconds')} of one image", loc="left")
    if report["runs"]:
        axes[-1].set_title("accuracy on new drawings, in %", loc="left")
        for name, runs in report["runs"].items():
            place = numbers[list(ROWS).index(name)]
            for run in runs:
                axes[-1].plot(place, run["scores"]["average"], "o", color="C0")
    for axis in axes:
        axis.set_xlabel("patches")
        axis.set_xticks(numbers, [f"{number}\n{name}" for number, name in zip(numbers, ROWS)], fontsize=8)
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.set_ylim(0)
            axis.legend(fontsize=9)
    figure.savefig(file, dpi=110)
    pyplot.close(figure)


def write_report(measured: dict, runs: dict[str, list[dict]]):
    is_cpu = measured["device"] == "cpu"
    clock = "of one core, in time of this process" if is_cpu else "of the GPU"
    trained = ""
    if runs:
        row = next(iter(runs.values()))[0]["row"]
        machines = "; ".join(dict.fromkeys(run["machine"] for found in runs.values() for run in found))
        trained = (
            f"Accuracy: after {row['steps']:,} steps of {row['batch_size']} questions about drawings of Noto Emoji "
            "(docs/bases.md), on the questions about other drawings, mean ± standard deviation over seeds. The "
            "drawings have 64 x 64 pixels and are enlarged, so a larger image shows no more detail, but the encoder "
            f"has more patches for it. Trained on {machines}. Measured on "
        )
    report = {
        "command": "python -m benchmarks.resolutions",
        "note": (
            "SmolLM2-135M-Instruct and DINOv2-small with DEHVF in float32, one image: encoding it, and answering a "
            f"question of {NUM_TEXT_TOKENS} tokens by one token once it is encoded. Milliseconds are medians of "
            f"{speed.ROUNDS} rounds {clock}, the sizes in turns. The visual memory is what `get_image_features` "
            "returns; 'at most' is by how much the memory in use grows meanwhile, in a fresh process. The last column "
            "is how far the largest size is above the straight line through the two smallest: attention in the vision "
            "encoder grows with the square of the patches, and what DEHVF adds grows in proportion to them. "
            f"{trained}{measured['machine_in_words']}; load of the machine before: {measured['load']}."
        ),
        "measured": measured,
        "runs": runs,
    }
    save_report(RESULTS, "resolutions", report, markdown, draw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="first train what is missing")
    parser.add_argument("--sizes", nargs="+", type=int, choices=IMAGE_SIZES, default=IMAGE_SIZES, help="to train")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(pretrained.SEEDS))
    parser.add_argument("--at-once", type=int, default=1, help="runs that train at the same time")
    parser.add_argument("--report", action="store_true", help="train and measure nothing, write what is there")
    parser.add_argument("--memory-of", choices=ROWS, help="only print the bytes of this size, as JSON")
    arguments = parser.parse_args()
    pretrained.require_bases()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        torch.set_num_threads(1)
    if arguments.memory_of:
        print(json.dumps(measure_memory(arguments.memory_of, device)))
        return
    if arguments.report:
        measured = json.loads((RESULTS / "resolutions.json").read_text(encoding="utf-8"))["measured"]
    else:
        if arguments.train:
            trained = {f"{size} px": ROWS[f"{size} px"] for size in arguments.sizes}
            pretrained.train_missing(trained, arguments.seeds, arguments.at_once, only_scores=True)
        measured = measure(device)
    runs = pretrained.find_runs(ROWS, arguments.seeds)
    write_report(measured, {name: done for name in runs if (done := [run for run in runs[name] if "scores" in run])})


if __name__ == "__main__":
    main()
