# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the cost and the accuracy of larger images: DEHVF on DINOv2-small and SmolLM2-135M-Instruct (docs/bases.md) at
112, 224, 336 and 518 pixels, which give 64 to 1,369 patches, with one memory slot per patch.

    python -m benchmarks.resolutions                  # a minute on a CPU: operations, time and memory
    python -m benchmarks.resolutions --train          # first trains the missing runs, on the drawings of Noto Emoji
    python -m benchmarks.resolutions --report         # writes the tables from the existing results

Operations are counted by torch (`benchmarks.operations`). Time is measured for encoding one image, and for the forward
that answers a question about the encoded image with one token. Memory is the size of an encoded image, and the peak
growth of the memory in use during both. Runs are trained as in `benchmarks.pretrained`, with files in
`outputs/pretrained`; on one CPU core, a run takes from half an hour (112 pixels) to 8 hours (518). The tables are
written to `benchmarks/results`: `resolutions.json`, `.md` and `.png`.
"""

import argparse
import dataclasses
import json
import os
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
    positive,
    pretrained,
    read_report,
    require_writable,
    save_report,
    speed,
    spread,
    table,
)
from dehvf import DehvfConfig


IMAGE_SIZES = (112, 224, 336, 518)
PATCH_SIZE = 14
NUM_TEXT_TOKENS = 32  # of the question
EMOJI = pretrained.ROWS["emoji: DEHVF"]
ROWS = {
    f"{size} px": dataclasses.replace(
        EMOJI,
        values={**EMOJI.values, "image_size": size, "num_memory_slots": (size // PATCH_SIZE) ** 2},
        rate=EMOJI.rate / 2,  # since the batch is a quarter of that of `EMOJI`
        batch_size=16,
    )
    for size in IMAGE_SIZES
}
# Row of the table -> the parts of `operations.count` that it sums
PARTS = {
    "vision encoder": ("vision encoder",),
    "DEHVF, once per image": ("vision adapters", "projector", "fuser", "fusing"),
    "language model": ("attention", "FFN", "lm_head"),
    "memory lookup": ("memory lookup",),
}


# ---------------------------------------------------------------------------------------------------------------------
# Measurements
# ---------------------------------------------------------------------------------------------------------------------


def count_operations(row: pretrained.Row) -> dict[str, int]:
    """Operations by the names in `PARTS`, counted on the meta device."""
    bases = {
        "vision_config": AutoConfig.from_pretrained(pretrained.VISION_MODEL),
        "text_config": AutoConfig.from_pretrained(pretrained.TEXT_MODEL),
    }
    with operations.meta_device():
        model = operations.build_dehvf(DehvfConfig(**bases, **{**pretrained.SETTING, **row.values}))
        counted = operations.count(model, NUM_TEXT_TOKENS)
    return {name: sum(counted[part] for part in parts) for name, parts in PARTS.items()}


def build_jobs(row: pretrained.Row, bases: tuple, device: str) -> tuple[Callable, Callable, torch.Tensor]:
    """A function that encodes an image, one that answers a question about it, and the visual memory of the image."""
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


def time_jobs(encode: Callable, answer: Callable, now: Callable) -> dict[str, float]:
    """Seconds of both functions, by the clock `now`."""
    begin = now()
    encode()
    between = now()
    answer()
    return {"encode": between - begin, "answer": now() - between}


def measure_seconds(bases: tuple, device: str) -> dict[str, dict[str, list[float]]]:
    """Row -> job -> seconds in each round. On a CPU, the CPU time of this process."""
    now = speed.make_clock(device, "wall" if device == "cuda" else "cpu")
    jobs = {name: partial(time_jobs, *build_jobs(row, bases, device)[:2], now) for name, row in ROWS.items()}
    return speed.interleave(jobs, extra_seconds=0)


def measure_memory(name: str, device: str) -> dict[str, int]:
    """Bytes of an encoded image, and the peak growth of the memory in use during each job, in bytes."""
    encode, answer, visual_memory = build_jobs(ROWS[name], pretrained.load_bases(device), device)

    def peak_of(job: Callable) -> int:
        job()  # a first call, for allocations that are only made once
        if device == "cpu":
            return memory.growth_at_peak(job)
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        job()
        return torch.cuda.max_memory_allocated() - before

    return {"visual memory": visual_memory.nbytes, "encode": peak_of(encode), "answer": peak_of(answer)}


def memory_in_a_fresh_process(name: str) -> dict[str, int]:
    return json.loads(memory.run_fresh_process("benchmarks.resolutions", "--memory-of", name))


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


def measured_rows(report: dict) -> dict[str, list[float]]:
    """Row of the table, with its unit -> value for each image size."""
    sizes = report["measured"]["sizes"].values()
    by_name = {f"10⁹ operations: {part}": [size["operations"][part] / 1e9 for size in sizes] for part in PARTS}
    for job in ("encode", "answer"):
        by_name[f"ms: {job}"] = [1e3 * float(np.median(size["seconds"][job])) for size in sizes]
    for part in ("visual memory", "encode", "answer"):
        name = "10⁶ bytes: " + ("visual memory" if part == "visual memory" else f"{part}, peak")
        by_name[name] = [size["memory"][part] / 1e6 for size in sizes]
    return by_name


def patches(report: dict) -> list[int]:
    return [size["patches"] for size in report["measured"]["sizes"].values()]


def deviation_from_line(numbers: list[int], values: list[float]) -> float:
    """How far the last value is above the straight line through the first two, in % of the line's value."""
    slope = (values[1] - values[0]) / (numbers[1] - numbers[0])
    straight = values[0] + slope * (numbers[-1] - numbers[0])
    return 100 * (values[-1] / straight - 1)


def markdown(report: dict) -> str:
    numbers, by_name = patches(report), measured_rows(report)
    rows = [["patches and memory slots", *map(str, numbers), ""]]
    for name, values in by_name.items():
        cells = [f"{value:.3g}" if value < 100 else f"{value:.0f}" for value in values]
        rows.append([name, *cells, f"{deviation_from_line(numbers, values):+.0f} %"])
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

    numbers, by_name = patches(report), measured_rows(report)
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
    clock = "CPU time of one thread" if is_cpu else "wall time on the GPU"
    trained = ""
    if runs:
        row = next(iter(runs.values()))[0]["row"]
        machines = "; ".join(dict.fromkeys(run["machine"] for found in runs.values() for run in found))
        trained = (
            f"Accuracy: on questions about new drawings of Noto Emoji (docs/bases.md), after {row['steps']:,} steps "
            f"of {row['batch_size']} questions about other drawings, mean ± standard deviation over seeds. The "
            "drawings have 64 x 64 pixels and are enlarged, so a larger image has more patches but no more detail. "
            f"Trained on {machines}. Measured on "
        )
    report = {
        "command": "python -m benchmarks.resolutions",
        "note": (
            "DEHVF on SmolLM2-135M-Instruct and DINOv2-small in float32, with one image: encoding it, and answering a "
            f"question of {NUM_TEXT_TOKENS} tokens about the encoded image with one token. Milliseconds are {clock}, "
            f"medians of {speed.ROUNDS} rounds; the sizes are measured alternately. The visual memory is the result "
            "of `get_image_features`; 'peak' is the growth of the memory in use, in a fresh process. The last column "
            "is how far the value at the largest size is above the straight line through the two smallest sizes: "
            "attention in the vision encoder grows with the square of the number of patches, and what DEHVF adds "
            f"grows linearly. {trained}{measured['machine_in_words']}; load average before the start: "
            f"{measured['load']}."
        ),
        "measured": measured,
        "runs": runs,
    }
    save_report(RESULTS, "resolutions", report, markdown, draw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", action="store_true", help="first train the missing runs")
    parser.add_argument(
        "--sizes", nargs="+", type=int, choices=IMAGE_SIZES, default=IMAGE_SIZES, help="sizes to train"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(pretrained.SEEDS))
    parser.add_argument("--at-once", type=positive, default=1, help="runs that train at the same time")
    parser.add_argument(
        "--report",
        action="store_true",
        help="write the tables from the existing results without training and measuring",
    )
    parser.add_argument("--memory-of", choices=ROWS, help="only print the memory in bytes of this size, as JSON")
    arguments = parser.parse_args()
    require_writable(RESULTS)
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
    runs = pretrained.find_runs(ROWS, read_report(RESULTS, "resolutions").get("runs", {}))
    write_report(measured, {name: done for name in runs if (done := [run for run in runs[name] if "scores" in run])})


if __name__ == "__main__":
    main()
