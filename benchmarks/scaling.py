# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Estimates the training of 7B, 13B and 70B on 8, 64 and 512 GPUs with a million and 100 million images: the time, memory
and network traffic of a step under each engine, and what limits it. Calculated, not measured.

    python -m benchmarks.scaling

The estimate uses the operations in closed form (`benchmarks.operations`), the bytes of models on the meta device
(`benchmarks.memory`), the operations per second and the time of kernel launches measured on an H200
(`speed-llama-7b-h200.json`), the CPU time to read an image, measured here, and the assumptions below. The results are
written to `benchmarks/results`: `scaling.json`, `.md` and `.png`.
"""

import argparse
import io
import json
import statistics
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPImageProcessorPil

from benchmarks import RESULTS, heading, machine_in_words, memory, operations, require_writable, save_report, table


BATCH, TEXT_TOKENS = 32, 64  # per GPU
GPUS, IMAGES = (8, 64, 512), (10**6, 10**8)
GPUS_PER_MACHINE = 8
# Assumed bytes per second that a GPU receives within a machine (NVLink of an H100) and between machines (400 Gb/s)
WITHIN, BETWEEN = 450e9, 50e9
GPU_MEMORY = 141e9  # of an H200
BYTES_PER_IMAGE = 160_000  # COCO's train2017: 19 GB, 118,287 images
LLAMA_70B = {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64}
LLAMA_70B |= {"num_key_value_heads": 8, "max_position_embeddings": 4096}
HYBRID = "FSDP2 within machines"  # only the gradients of the adapters are sent between machines
# Engine -> its row in `memory.BASES_PER_GPU`
ENGINES = {"DDP, ZeRO-2": "one GPU, DDP, ZeRO-1, ZeRO-2", "ZeRO-3": "ZeRO-3", "FSDP2": "FSDP2", HYBRID: "FSDP2"}


def configs() -> dict:
    """The presets of 7B and 13B, and the latter with the shape of LLaMA-2-70B."""
    small, large = (operations.load_config(*shape) for name, shape in operations.SHAPES.items() if "256" in name)
    largest = deepcopy(large)
    largest.text_config.update(LLAMA_70B)
    return {"7B": small, "13B": large, "70B": largest}


def measured() -> dict[str, float]:
    """DEHVF at 7B on an H200: operations per second in a prefill of 32, and seconds to launch a training step."""
    report = json.loads((RESULTS / "speed-llama-7b-h200.json").read_text(encoding="utf-8"))["milliseconds"]
    config = configs()["7B"]
    prompt = sum(operations.language_model(config.text_config, 64).values()) + operations.memory_lookup(config, 64)
    prefill = statistics.median(report["prefill"]["DEHVF"]["prefill"]) / 1e3
    step = statistics.median(report["training, LLaVA"]["DEHVF"]["training step"]) / 1e3
    return {"operations_per_second": 32 * prompt / prefill, "launching_a_step_of_7b": step}


def seconds_per_image() -> float:
    """CPU time to decode a JPEG file of 640 x 480 pixels and to resize it for the encoder."""
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (60, 80, 3), dtype=np.uint8)).resize((640, 480))
    pixels = np.asarray(coarse, dtype=int) + rng.integers(-14, 15, (480, 640, 3))
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file := io.BytesIO(), "JPEG", quality=90)
    processor, seconds = CLIPImageProcessorPil(), []
    for _ in range(20):
        start = time.thread_time()
        processor(images=Image.open(file).convert("RGB"), return_tensors="pt")
        seconds.append(time.thread_time() - start)
    return statistics.median(seconds)


def training_operations(config) -> int:
    """Operations per sample: forward, the gradients of all activations, and those of the adapters' weights."""
    parts = operations.dehvf(config, TEXT_TOKENS)
    head = operations.product(TEXT_TOKENS - 1, config.text_config.hidden_size, config.text_config.vocab_size)
    frozen = [*operations.LANGUAGE_MODEL, "vision encoder"]
    adapters = sum(number for part, number in parts.items() if part not in frozen)
    return 2 * (sum(parts.values()) + head) + adapters


def num_shards(engine: str, gpus: int) -> int:
    """The number of GPUs among which the bases are divided."""
    return GPUS_PER_MACHINE if engine == HYBRID else gpus


def received(engine: str, needs: dict, gpus: int) -> float:
    """
    Bytes that a GPU receives per step: the gradients of the adapters, and, if the bases are divided, the missing
    shards, once in forward and once in backward.
    """
    trained = needs["adapters"] / memory.BYTES_PER_TRAINED
    gradients = 2 * (gpus - 1) / gpus * 4 * trained  # ring all-reduce
    shards = 1 if engine == "DDP, ZeRO-2" else num_shards(engine, gpus)
    return gradients + 2 * (shards - 1) / shards * needs["bases"]


def step(config, needs: dict, engine: str, gpus: int, facts: dict) -> dict:
    """The cost of a step, assuming that computation, kernel launches and communication overlap entirely."""
    speed = WITHIN if gpus <= GPUS_PER_MACHINE or engine == HYBRID else BETWEEN
    layers = config.text_config.num_hidden_layers / 32
    seconds = {
        "compute": BATCH * training_operations(config) / facts["operations_per_second"],
        "launches": layers * facts["launching_a_step_of_7b"],
        "network": received(engine, needs, gpus) / speed,
    }
    activations = needs["activations"] * BATCH / memory.ESTIMATE_BATCH
    bases = memory.BASES_PER_GPU[ENGINES[engine]](needs, num_shards(engine, gpus))
    per_gpu, longest = bases + needs["adapters"] + activations, max(seconds.values())
    images_per_second = gpus * BATCH / longest
    limit = "memory" if per_gpu > GPU_MEMORY else max(seconds, key=seconds.get)
    return {
        "memory": per_gpu,
        "seconds": seconds,
        "received": received(engine, needs, gpus),
        "limit": limit,
        "images_per_second": images_per_second,
        "hours": {str(images): images / images_per_second / 3600 for images in IMAGES},
        "read_per_second": images_per_second * BYTES_PER_IMAGE,
        "cores_per_gpu": images_per_second / gpus * facts["seconds_per_image"],
    }


def measure() -> dict:
    facts = {**measured(), "seconds_per_image": seconds_per_image()}
    rows = []
    for name, config in configs().items():
        needs = memory.training_needs(config)
        sizes = {"bases": needs["bases"], "trained": needs["adapters"] // memory.BYTES_PER_TRAINED}
        for engine in ENGINES:
            for gpus in GPUS:
                row = {"model": name, **sizes, "engine": engine, "gpus": gpus}
                rows.append(row | step(config, needs, engine, gpus, facts))
    return {"facts": facts, "rows": rows}


def markdown(report: dict) -> str:
    head = ["model", "engine", "GPUs", "memory, GB", "compute, s", "launches, s", "network, s", "received, GB"]
    head += ["limit", "images/s", "hours for 10⁶", "for 10⁸", "read, GB/s", "cores per GPU"]
    rows = []
    for row in report["rows"]:
        cells = [row["model"], row["engine"], str(row["gpus"]), f"{row['memory'] / 1e9:.1f}"]
        cells += [f"{row['seconds'][part]:.3f}" for part in ("compute", "launches", "network")]
        cells += [f"{row['received'] / 1e9:.2f}", row["limit"]]
        if row["limit"] == "memory":
            cells += ["–"] * 5
        else:
            cells += [f"{row['images_per_second']:,.0f}", *(f"{hours:.2f}" for hours in row["hours"].values())]
            cells += [f"{row['read_per_second'] / 1e9:.2f}", f"{row['cores_per_gpu']:.1f}"]
        rows.append(cells)
    return "\n".join([*heading(report["command"], report["note"]), *table(head, rows)]) + "\n"


def draw(report: dict, file: Path):
    from matplotlib.figure import Figure

    models = list(dict.fromkeys(row["model"] for row in report["rows"]))
    figure = Figure(figsize=(12, 4), dpi=120, layout="constrained")
    axes = figure.subplots(1, len(models), sharex=True, sharey=True)
    for axis, model in zip(axes, models):
        for engine, style in zip(ENGINES, ("o-", "s--", "^:", "x-.")):
            rows = [row for row in report["rows"] if (row["model"], row["engine"]) == (model, engine)]
            rows = [row for row in rows if row["limit"] != "memory"]
            axis.plot([row["gpus"] for row in rows], [row["images_per_second"] for row in rows], style, label=engine)
        axis.set(title=model, xlabel="GPUs", xscale="log", yscale="log")
        axis.set_xticks(GPUS, map(str, GPUS))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("images per second, calculated")
    axes[0].legend()
    figure.savefig(file)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    require_writable(RESULTS)
    report = {"command": "python -m benchmarks.scaling", **measure()}
    facts = report["facts"]
    report["note"] = (
        f"Calculated, not measured. Each GPU has a batch of {BATCH} with 256 patches and {TEXT_TOKENS} text tokens; "
        f"bases in bfloat16, no gradient checkpointing. Compute: {facts['operations_per_second'] / 1e12:.0f} x 10¹² "
        f"operations per second, as in a prefill of 32 on an H200. Launches: {facts['launching_a_step_of_7b']:.2f} s "
        f"for the 32 layers of 7B, as measured on the H200 without CUDA graphs. Network: {WITHIN / 1e9:.0f} GB/s "
        f"within a machine of {GPUS_PER_MACHINE} GPUs, {BETWEEN / 1e9:.0f} GB/s per GPU between machines. The time of "
        f"a step is the longest of the three. Reading an image of {BYTES_PER_IMAGE // 1000} kB takes "
        f"{1e3 * facts['seconds_per_image']:.0f} ms of one core here. {machine_in_words()}."
    )
    save_report(RESULTS, "scaling", report, markdown, draw)


if __name__ == "__main__":
    main()
