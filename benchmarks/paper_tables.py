# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Reproduces the paper's tables on a small scale: its methods, ablations, numbers of groups and layer mappings, on
`digits` with the embedded bases and three seeds. The baselines are trained with two learning rates.

    python -m benchmarks.paper_tables               # trains the missing runs, then writes the tables
    python -m benchmarks.paper_tables --report      # writes the tables from the existing runs

A run takes minutes on one core, and one run per core is trained at a time. Each run has a folder in
`outputs/paper_tables`. When the command is run again, it only trains the runs that are not finished. The tables are
written to `benchmarks/results`: `paper_tables.json`, `.md` and `.png`.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from queue import SimpleQueue

from baselines import METHODS
from benchmarks import RESULTS, heading, machine_in_words, read_report, require_writable, save_report, spread, table
from dehvf import ROOT


RUNS = ROOT / "outputs" / "paper_tables"
SEEDS = (0, 1, 2)
COLUMNS = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average")
# Statistics of the fusion weights -> column (docs/inspecting.md)
FUSION_FIGURES = {"std_over_layers": "weights: std over layers", "std_over_images": "over images"}

# The settings of the default recipe, repeated here so that finished runs stay comparable when the recipe changes. With
# one group, each language layer reads 9 candidates here; in the paper, four groups of 24 vision layers give 7
SMALL = {"max_samples": 40000, "only_images": True, "per_device_train_batch_size": 16, "learning_rate": 5e-3}
SMALL_DEHVF = {"visual_scale": 0.1, "memory_scale": 0.3, "num_groups": 1, "fuser_lr_ratio": 0.1}

# Sizes with which the baselines train about as many parameters as DEHVF here (275 thousand, most of them in the fuser)
ALL_LINEAR = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj"
BASELINES = {
    "LLaVA-LoRA": {"method": "llava-lora", "lora_rank": 16, "lora_target_modules": ALL_LINEAR},
    "LaVIN": {"method": "lavin", "lavin_adapter_size": 56},
    "LLaMA-Adapter": {"method": "llama-adapter", "adaption_prompt_length": 64, "adaption_projector_size": 384},
    "LLaMA-Adapter V2": {"method": "llama-adapter-v2", "adapter_v2_size": 48},
    # The scales are those of the authors
    "ADEM-VL": {"method": "adem-vl", "adem_adapter_size": 48, "adem_projector_size": 352},
    "IGVA": {"method": "igva", "igva_hidden_size": 80},
}
# The recipe's learning rate was chosen for DEHVF, so the baselines are also trained with a lower one. It is better for
# these (seed 0)
LOWER_RATE = {"learning_rate": 2e-3}
BETTER_WITH_LOWER_RATE = [name for name in BASELINES if name != "ADEM-VL"]

# Table -> row -> its flags of train.py, in addition to `SMALL` and (except for baselines) `SMALL_DEHVF`. "{seed}" is
# replaced by the seed of the run.
TABLES = {
    "Methods (the paper's Tables 1 and 2)": {
        "DEHVF": {},
        "MemVP": {"method": "memvp"},
        **{name: row | (LOWER_RATE if name in BETTER_WITH_LOWER_RATE else {}) for name, row in BASELINES.items()},
        "instruction in place of the layer": {"method": "dehvf-instruction"},
        "layer + instruction": {"method": "layer+instruction"},
    },
    "Ablations (Table 4)": {
        "full": {},
        "without visual prompts": {"visual_prompts": "none"},
        "without adaptive weights": {"layer_fusion": "mean"},
        "without multi-features": {"method": "memvp"},
        "keys and values the same": {"visual_prompts": "shared"},
        "prompts in keys only": {"visual_prompts": "keys"},
        "prompts in values only": {"visual_prompts": "values"},
        "learnable tokens": {"fuser_query": "tokens"},
    },
    "Groups K": {
        "K = 1": {},
        "K = 2": {"num_groups": 2},
        "K = 4": {"num_groups": 4},
        "K = 8": {"num_groups": 8},
    },
    "Layer mapping, K = 4": {
        "hierarchical": {"num_groups": 4},
        "random": {"num_groups": 4, "layer_mapping": "random", "layer_mapping_seed": "{seed}"},
    },
    "Baselines with the other learning rate": {
        name: row | ({} if name in BETTER_WITH_LOWER_RATE else LOWER_RATE) for name, row in BASELINES.items()
    },
}
# Findings or choices of the paper: in each table, the first row is better than the second
PAPER_ORDER = [
    ("Methods (the paper's Tables 1 and 2)", better, worse)
    for better, worse in (
        ("DEHVF", "MemVP"),
        ("MemVP", "LLaVA-LoRA"),
        ("LLaVA-LoRA", "LaVIN"),
        ("LaVIN", "LLaMA-Adapter"),
    )
] + [("Ablations (Table 4)", "full", row) for row in list(TABLES["Ablations (Table 4)"])[1:]]
PAPER_ORDER += [("Groups K", "K = 4", row) for row in ("K = 1", "K = 2", "K = 8")]
PAPER_ORDER += [("Layer mapping, K = 4", "hierarchical", "random")]


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def flags_of(row: dict, seed: int) -> dict[str, str]:
    own = {} if row.get("method") in METHODS else SMALL_DEHVF
    return {name: str(value).format(seed=seed) for name, value in {**SMALL, **own, **row, "seed": seed}.items()}


def words_of(flags: dict[str, str]) -> list[str]:
    return [word for name, value in flags.items() for word in (f"--{name}", *value.split())]


def folder_of(row: dict, seed: int) -> Path:
    """The folder of a run. Rows with the same flags, such as "full" and "K = 1", share it; the first one names it."""
    name = next(name for rows in TABLES.values() for name, other in rows.items() if other == row)
    name += f" {row['learning_rate']:.0e}" if "learning_rate" in row else ""
    return RUNS / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") / f"seed-{seed}"


def read_run(row: dict, seed: int) -> dict | None:
    """The results of the finished run with exactly these flags, or `None`."""
    folder = folder_of(row, seed)
    files = folder / "flags.json", folder / "results.json"
    if not all(file.is_file() for file in files):
        return None
    flags, results = (json.loads(file.read_text(encoding="utf-8")) for file in files)
    return results if flags == flags_of(row, seed) and "scores" in results else None


def train(row: dict, seed: int, cores: SimpleQueue) -> str | None:
    """Trains and evaluates in a separate process on a free core. Returns an error message, or `None`."""
    folder, flags = folder_of(row, seed), flags_of(row, seed)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").unlink(missing_ok=True)
    (folder / "flags.json").write_text(json.dumps(flags))
    command = [sys.executable, "-m", "accelerate.commands.launch", "train.py", *words_of(flags)]
    command += ["--output_dir", str(folder)]
    core, start = cores.get(), time.time()
    try:
        with (
            open(folder / "log.txt", "w") as log,
            subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log) as process,
        ):
            if hasattr(os, "sched_setaffinity"):
                os.sched_setaffinity(process.pid, {core})
            code = process.wait()
    finally:
        cores.put(core)
    print(
        f"{folder.relative_to(RUNS)}: {'done' if code == 0 else 'FAILED'} in {time.time() - start:.0f} s", flush=True
    )
    return f"{folder}: exit code {code}, see log.txt there" if code else None


def train_missing() -> list[str]:
    """Trains the runs that are not finished. Returns the error messages of failed runs."""
    rows = {str(folder_of(row, 0)): row for table in TABLES.values() for row in table.values()}.values()
    # Seed by seed, so that the tables of a stopped benchmark are complete with fewer seeds
    missing = [(row, seed) for seed in SEEDS for row in rows if read_run(row, seed) is None]
    print(f"{len(rows) * len(SEEDS) - len(missing)} runs are finished, {len(missing)} are missing.", flush=True)
    available = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count())
    cores = SimpleQueue()
    for core in available:
        cores.put(core)
    with ThreadPoolExecutor(len(available)) as pool:
        return [error for error in pool.map(lambda run: train(*run, cores), missing) if error]


# ---------------------------------------------------------------------------------------------------------------------
# Seconds per batch
# ---------------------------------------------------------------------------------------------------------------------


def measure_seconds() -> dict:
    """
    Median seconds per method of a training step with a batch of 4 and of answering 32 questions with one greedy token,
    all with an image, and the machine. The methods are measured alternately, so that other load on the machine affects
    all of them.
    """
    from benchmarks import speed
    from tasks import get_task
    from training.arguments import parse_arguments
    from training.data import Collator, load_splits
    from training.models import load_model, load_processor

    steps, answers = {}, {}
    for name, row in TABLES["Methods (the paper's Tables 1 and 2)"].items():
        words = [*words_of(flags_of(row, 0)), "--max_samples", "100", "--output_dir", str(RUNS / "seconds")]
        _, data, model_args, adapter_args, baseline_args, training_args = parse_arguments(words)
        task, processor = get_task(data.task), load_processor(model_args, adapter_args)
        splits = load_splits(task, processor, data, training_args)
        model = load_model(model_args, adapter_args, baseline_args)
        reads = getattr(model.config, "reads_instruction", False)
        collate = Collator(processor, getattr(model, "image_tokens", []), reads)
        batches = []
        for split, size in ((splits["train"], 4), (splits["test"], 32)):
            rows = [row for row in (split[index] for index in range(len(split))) if row["image"] is not None]
            batches.append(collate(rows[:size]))
        for batch in batches:
            for unused in ("index", "options"):
                batch.pop(unused, None)
        steps[name] = speed.training_job(model, batches[0], time.perf_counter, fused=True)  # as in Trainer
        answers[name] = partial(speed.answer, model, batches[1], 1, time.perf_counter)

    steps, answers = (speed.interleave(jobs, extra_seconds=0, least_rounds=15) for jobs in (steps, answers))
    methods = {
        name: {
            "training batch of 4": statistics.median(steps[name]["training step"]),
            "inference batch of 32": statistics.median(answers[name]["whole answer"]),
        }
        for name in steps
    }
    return {"machine": machine_in_words(), "methods": methods}


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def collect(reported: dict) -> dict:
    """
    Table -> row -> the number of trained parameters and, for each column, the accuracy of each finished seed. A row of
    which this machine has fewer runs than the tables of an earlier report is taken from these.
    """
    tables = {}
    for title, rows in TABLES.items():
        tables[title] = {}
        for name, row in rows.items():
            runs = {seed: run for seed in SEEDS if (run := read_run(row, seed))}
            earlier = reported.get(title, {}).get(name, {"flags": None})
            if earlier["flags"] == row and len(earlier["seeds"]) > len(runs):
                tables[title][name] = earlier
            elif runs:
                tables[title][name] = {
                    "flags": row,
                    "seeds": list(runs),
                    "trained_parameters": next(iter(runs.values()))["trained_parameters"],
                    "scores": {column: [run["scores"][column] for run in runs.values()] for column in COLUMNS},
                    "fusion": [run["fusion"] for run in runs.values() if run.get("fusion")],
                    "torch": [run["versions"]["torch"] for run in runs.values()],
                }
    return tables


def compare_with_paper(tables: dict) -> list[dict]:
    """Whether the accuracy on image questions has the same order here, for each pair in `PAPER_ORDER`."""
    found = []
    for title, better, worse in PAPER_ORDER:
        if not {better, worse} <= tables[title].keys():
            continue
        high, low = (tables[title][name]["scores"]["IMG"] for name in (better, worse))
        difference = statistics.mean(high) - statistics.mean(low)
        if min(len(high), len(low)) == 1:
            verdict = "as in the paper, one seed" if difference > 0 else "reversed, one seed"
        elif min(high) > max(low):
            verdict = "holds in every seed"
        elif max(high) < min(low):
            verdict = "**reversed** in every seed"
        else:
            verdict = "not decided: seeds overlap"
        found.append({"better": better, "worse": worse, "difference": difference, "verdict": verdict})
    return found


def markdown(report: dict) -> str:
    lines = heading(report["command"], report["note"])
    for title, rows in report["tables"].items():
        timed = any(name in report["seconds"] for name in rows)
        head = ["", "trained", "seeds", *COLUMNS, *FUSION_FIGURES.values()]
        head += ["s / training batch (4)", "s / inference batch (32)"] if timed else []
        body = []
        for name, row in rows.items():
            cells = [name, f"{row['trained_parameters']:,}", str(len(row["seeds"]))]
            cells += [spread(row["scores"][column]) for column in COLUMNS]
            for figure in FUSION_FIGURES:
                values = [run[figure] for run in row["fusion"] if figure in run]  # none with one layer in each group
                cells.append(" to ".join(dict.fromkeys(f"{end(values):.3f}" for end in (min, max))) if values else "–")
            if timed:
                cells += [f"{seconds:.3f}" for seconds in report["seconds"].get(name, {}).values()]
            body.append(cells)
        lines += [f"## {title}", "", *table(head, body), ""]
    orders = [
        [order["better"], order["worse"], f"{order['difference']:+.1f}", order["verdict"]]
        for order in report["paper_order"]
    ]
    lines += ["## The paper's orders, on image questions here", ""]
    return "\n".join([*lines, *table(("better in the paper", "than", "here", ""), orders)]) + "\n"


def draw(report: dict, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    tables = report["tables"]
    figure, axes = pyplot.subplots(
        len(tables),
        figsize=(8, 0.42 * sum(len(rows) + 1.6 for rows in tables.values())),
        height_ratios=[len(rows) + 0.6 for rows in tables.values()],
        sharex=True,
        layout="constrained",
    )
    for axis, (title, rows) in zip(axes, tables.items()):
        for position, row in enumerate(rows.values()):
            values = row["scores"]["IMG"]
            axis.barh(position, statistics.mean(values), color="tab:blue", alpha=0.35)
            axis.plot(values, [position] * len(values), "o", color="tab:blue", markersize=4)
        axis.set_yticks(range(len(rows)), list(rows))
        axis.invert_yaxis()
        axis.axvline(25, color="grey", linestyle="--", linewidth=1)
        axis.set_title(title, loc="left", fontsize=10)
    axes[-1].set_xlabel("accuracy on image questions of `digits`, test split, in % (dashed: chance)")
    figure.suptitle("The paper's rows on a small scale: mean (bar) and each seed (dot)")
    figure.savefig(file, dpi=130)


def write_report(only_existing: bool = False):
    """`only_existing`: without a measurement of seconds on this machine, takes that of the earlier report."""
    seconds_file, earlier = RUNS / "seconds.json", read_report(RESULTS, "paper_tables")
    tables, machine = collect(earlier.get("tables", {})), {}
    if seconds_file.is_file():
        seconds = json.loads(seconds_file.read_text(encoding="utf-8"))
    elif not only_existing:
        seconds = measure_seconds()
        seconds_file.write_text(json.dumps(seconds))
    elif earlier:
        seconds = {"machine": earlier["seconds_machine"], "methods": earlier["seconds"]}
        machine = {"machine": earlier["machine"]}
    else:
        sys.exit(f"There is no report in {RESULTS} and no measurement in {RUNS}. Run it without `--report`.")
    versions = sorted({version for rows in tables.values() for row in rows.values() for version in row["torch"]})
    report = {
        **machine,
        "command": "python -m benchmarks.paper_tables",
        "note": (
            "A small replica, not the paper's experiment: `digits` with the embedded bases, trained on the image "
            f"questions among {SMALL['max_samples']:,} rows in batches of {SMALL['per_device_train_batch_size']} with "
            f"the learning rate {SMALL['learning_rate']:g}, which was chosen for DEHVF; "
            f"{', '.join(BETTER_WITH_LOWER_RATE)} have {LOWER_RATE['learning_rate']:g}, which is better for them "
            "(seed 0). DEHVF and its ablations have one group (K = 1), in which each language layer reads 9 "
            "candidates; in the paper, K = 4 gives 7. Accuracy in % on 1,000 test questions by the greedy token, mean "
            "± standard deviation over seeds. Chance on image questions (IMG) is 25. The language model was trained "
            "to understand words that are added to its hidden states, which favours DEHVF and MemVP over methods with "
            f"image tokens. Trained with torch {' and '.join(versions)}. Seconds: {seconds['machine']}."
        ),
        "tables": tables,
        "paper_order": compare_with_paper(tables),
        "seconds": seconds["methods"],
        "seconds_machine": seconds["machine"],
    }
    save_report(RESULTS, "paper_tables", report, markdown, draw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", action="store_true", help="write the tables from the existing runs without training"
    )
    arguments = parser.parse_args()
    require_writable(RESULTS)
    failed = [] if arguments.report else train_missing()
    write_report(only_existing=arguments.report)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
