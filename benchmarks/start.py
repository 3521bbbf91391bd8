# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the start-up time: imports, loading an adapter, and a training run up to its first step, with the default
recipe and with 566,000 captions in the layout of COCO.

    python -m benchmarks.start                  # minutes on 2 cores
    python -m benchmarks.start --captions 0     # without the captions, which take most of the time

Each measurement is a fresh process. Imports and loading are measured alternately; the report gives medians. The
imports of transformers that any model file needs are measured separately from those of the shipped files. The captions
are synthetic, five per copy of one picture, in a temporary folder. A run on them is measured with an empty and with a
filled cache of encoded rows, with 1 and 2 processes. Its memory is the peak resident set of each process, and the part
without mapped files, since `datasets` maps the encoded rows from the disk. Reading 100,000 of these rows is compared
with encoding them into lists. The results are written to `benchmarks/results`: `start` and `captions`, each as `.json`
and `.md`.
"""

import argparse
import gc
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from PIL import Image

from benchmarks import RESULTS, heading, machine_in_words, positive, require_writable, save_report, table, verdict
from benchmarks.memory import resident_set
from dehvf import ROOT, DehvfForConditionalGeneration, DehvfProcessor
from tasks import coco_captions
from training.encoding import RowEncoder


BASES = ROOT / "assets" / "vision_model", ROOT / "assets" / "language_model"
IMPORTS = "from transformers import AutoModelForImageTextToText, GenerationMixin, PreTrainedModel, ProcessorMixin"
OWN, SHIPPED = "importing what a model of transformers imports", "importing the shipped files as well"
LOADING, HELP = "from_pretrained of an adapter with its bases", "accelerate launch train.py --help"
STARTING = "accelerate launch train.py, to its first step"
TARGETS = {LOADING: 3, HELP: 4, STARTING: 12}  # seconds on 2 cores
ADDED = 1  # target in seconds for the imports of the shipped files, without those of transformers
PROCESSES = (1, 2)
FIELDS = ("VmHWM", "RssAnon")  # of a process: the peak resident set, and its part without mapped files
CAPTIONS_PER_IMAGE = 5
ROWS = 100_000  # for `measure_rows`


def seconds_of(command: list[str]) -> float:
    """Wall time of a command."""
    start = time.perf_counter()
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    return time.perf_counter() - start


def seconds_of_loading(folder: Path) -> float:
    """Wall time of `from_pretrained` in a fresh process, without the imports."""
    lines = (
        f"{IMPORTS}, AutoModel",
        "import time, dehvf",
        "start = time.perf_counter()",
        f"AutoModel.from_pretrained({str(folder)!r}, trust_remote_code=True)",
        "print(time.perf_counter() - start)",
    )
    command = [sys.executable, "-c", "\n".join(lines)]
    process = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return float(process.stdout.split()[-1])


def measure_run(launch: list[str], *flags: str, cache: Path) -> dict:
    """Seconds from the start of a training run to its first logged step, and the memory of each process then."""
    with tempfile.TemporaryDirectory() as folder:
        command = [*launch, "train.py", *flags, "--logging_steps", "1", "--output_dir", folder]
        environment = {**os.environ, "HF_DATASETS_CACHE": str(cache), "PYTHONUNBUFFERED": "1"}
        start = time.perf_counter()
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as process:
            has_started = any("'loss'" in line for line in iter(process.stdout.readline, ""))
            seconds = time.perf_counter() - start
            children = psutil.Process(process.pid).children(recursive=True) if has_started else []
            trainers = [child.pid for child in children if "train.py" in child.cmdline()[1:3]]
            memory = [{field: resident_set(field, pid) for field in FIELDS} for pid in trainers]
            for child in children:
                child.kill()
            process.kill()
    if not has_started:
        raise RuntimeError(f"`{' '.join(command)}` ended before its first step. Run it alone to see why.")
    return {"seconds": seconds, "memory": memory}


def write_captions(folder: Path, size: int):
    """Writes `size` training captions in the layout of COCO, and ten test images, to `folder`."""
    picture = io.BytesIO()
    Image.new("RGB", (64, 64), "red").save(picture, "JPEG")
    images = []
    for number in range(-(-size // CAPTIONS_PER_IMAGE) + 10):
        part = "test" if number < 10 else "train"
        place = folder / f"{part}2014"
        place.mkdir(exist_ok=True)
        (place / f"{number}.jpg").write_bytes(picture.getvalue())
        ways = range(CAPTIONS_PER_IMAGE)
        sentences = [{"raw": f"picture {number} of a red square, said in way {way}"} for way in ways]
        names = {"filepath": place.name, "filename": f"{number}.jpg", "cocoid": number, "split": part}
        images.append({**names, "sentences": sentences})
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images}), encoding="utf-8")


def measure_rows(folder: Path, size: int) -> dict[str, dict[str, float]]:
    """Rows per second and bytes of memory per row, for rows encoded into lists and rows read from the cache."""
    rows = coco_captions.load("train", str(folder)).remove_columns("image")
    rows = rows.select(range(min(size, len(rows))))
    processor = DehvfProcessor.from_vision_text_pretrained(*BASES)
    encoder = RowEncoder(coco_captions, "train", processor, max_prompt_length=512, training=True)
    encoder.encode(rows)  # fills the cache file
    ways = {
        "encoded into lists": lambda: [encoder(row, index) for index, row in enumerate(rows)],
        "read from the file": lambda: [None for _ in encoder.encode(rows)],
    }
    found = {}
    for name, read in ways.items():
        gc.collect()
        before, start = resident_set("RssAnon"), time.perf_counter()
        kept = read()
        seconds = time.perf_counter() - start
        grown = resident_set("RssAnon") - before
        found[name] = {"per_second": len(rows) / seconds, "bytes": max(0, grown) / len(rows)}
        del kept
    return found


def rows_in_a_fresh_process(folder: Path, cache: Path) -> dict:
    command = [sys.executable, "-m", "benchmarks.start", "--rows-of", str(folder)]
    environment = {**os.environ, "HF_DATASETS_CACHE": str(cache)}
    process = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(process.stdout.splitlines()[-1])


def measure_start(rounds: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        adapter, cache, launch = Path(folder, "adapter"), Path(folder, "cache"), ["accelerate", "launch"]
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(*BASES, num_memory_slots=32)
        model.save_pretrained(adapter, merge_base=True)
        jobs = {
            OWN: lambda: seconds_of([sys.executable, "-c", IMPORTS]),
            SHIPPED: lambda: seconds_of([sys.executable, "-c", f"{IMPORTS}; import dehvf"]),
            LOADING: lambda: seconds_of_loading(adapter),
            HELP: lambda: seconds_of([*launch, "train.py", "--help"]),
            STARTING: lambda: measure_run(launch, cache=cache)["seconds"],
        }
        first = jobs[STARTING]()
        seconds = {name: [] for name in jobs}
        for _ in range(rounds):
            for name, job in jobs.items():
                seconds[name].append(job())
    return {"rounds": rounds, "measured_on": machine_in_words(), "seconds": seconds, "first_run": first}


def measure_captions(size: int) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        write_captions(Path(folder), size)
        flags, runs = ("--task", "coco_captions", "--data_path", folder, "--use_cpu", "true"), {}
        for processes in PROCESSES:
            launch, cache = ["torchrun", "--nproc_per_node", str(processes)], Path(folder, f"cache-{processes}")
            runs[processes] = [measure_run(launch, *flags, cache=cache) for _ in range(2)]
        rows = rows_in_a_fresh_process(Path(folder), Path(folder, "cache-rows"))
    return {"captions": size, "measured_on": machine_in_words(), "runs": runs, "rows": rows}


COMMAND = "python -m benchmarks.start"


def markdown(report: dict) -> str:
    medians = {name: statistics.median(values) for name, values in report["seconds"].items()}
    rows = []
    for name, values in report["seconds"].items():
        target = f"≤ {TARGETS[name]}: {verdict(medians[name] <= TARGETS[name])}" if name in TARGETS else ""
        rows.append([name, f"{medians[name]:.1f}", f"{min(values):.1f} to {max(values):.1f}", target])
    added = medians[SHIPPED] - medians[OWN]
    rows.append(["the shipped files alone", f"{added:.1f}", "", f"≤ {ADDED}: {verdict(added <= ADDED)}"])
    note = f"Seconds, medians of {report['rounds']} rounds, each in a fresh process. {report['measured_on']}."
    lines = [
        *heading(COMMAND, note),
        *table(("", "seconds", "least to greatest", "target"), rows),
        "",
        "The first run of the default recipe on a machine, which generates and encodes its rows, takes "
        f"{report['first_run']:.0f} seconds to its first step.",
    ]
    return "\n".join(lines) + "\n"


def captions_markdown(report: dict) -> str:
    note = (
        f"{report['captions']:,} captions in the layout of COCO, tiny bases. Memory: MB of each process when the "
        f"first step is logged, as the peak resident set and without mapped files. {report['measured_on']}."
    )
    starts = []
    for processes, runs in report["runs"].items():
        for state, run in zip(("empty", "filled"), runs):
            memory = [", ".join(f"{memory[kind] / 1e6:,.0f}" for memory in run["memory"]) for kind in FIELDS]
            starts.append([str(processes), state, f"{run['seconds']:.0f}", *memory])
    reads = [[name, f"{row['per_second']:,.0f}", f"{row['bytes']:,.0f}"] for name, row in report["rows"].items()]
    head = ("processes", "cache of encoded rows", "seconds to the first step", "peak, MB", "without files, MB")
    what = f"{min(ROWS, report['captions']):,} of these rows, without their images, by one process:"
    lines = [*heading(COMMAND, note), *table(head, starts), "", what, ""]
    return "\n".join([*lines, *table(("", "rows per second", "bytes of memory per row"), reads)]) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=7)
    parser.add_argument(
        "--captions", type=int, default=566_000, help="number of training captions in the layout of COCO"
    )
    parser.add_argument(
        "--rows-of", type=Path, help="only print the result of `measure_rows` for this folder, as JSON"
    )
    arguments = parser.parse_args()
    if arguments.rows_of:
        print(json.dumps(measure_rows(arguments.rows_of, ROWS)))
        return
    require_writable(RESULTS)
    save_report(RESULTS, "start", measure_start(arguments.rounds), markdown)
    if arguments.captions:
        save_report(RESULTS, "captions", measure_captions(arguments.captions), captions_markdown)


if __name__ == "__main__":
    main()
