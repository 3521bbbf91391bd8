# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures memory: of an encoded image, compared with LLaVA's KV cache of its tokens; of a checkpoint; of a training step
at its peak; and of loading a base.

    python -m benchmarks.memory                # minutes on 2 cores, most of them for the training steps
    python -m benchmarks.memory --estimate     # seconds: the memory per GPU to train 7B and 13B, by engine; calculated
    python -m benchmarks.memory --gpu llama-7b # seconds: the peak of training, measured on one CUDA device

Bytes per image and per checkpoint are computed for 7B and 13B on the meta device, whose tensors have a shape and a
dtype but no values. The peak of training is the growth of the resident set of a fresh process in two steps on the CPU,
with the models of the preset `small` in `benchmarks.speed`. The peak of loading is measured in the same way, with a
base of random weights in shards of 1 GB in total, written to a temporary folder. The results are written to
`benchmarks/results`: `memory.json`, `.md` and `.png`.
"""

import argparse
import gc
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from transformers import AutoModel, AutoModelForCausalLM, CLIPVisionConfig, LlamaConfig

from benchmarks import (
    RESULTS,
    command_line,
    heading,
    machine_in_words,
    operations,
    require_writable,
    save_report,
    speed,
    table,
)
from dehvf import ROOT, DehvfForConditionalGeneration


PROC = Path("/proc/self")
PEAK_METHODS = (speed.TEXT_ONLY, speed.DEHVF, speed.MEMVP, speed.LLAVA)
PEAK_RUNS = 3
LOADED_LAYERS = 14  # of the base in `measure_loading`, 67 MB each


# --- closed forms: numbers of values. The letters are those of modeling_dehvf.py ---


def visual_memory(config) -> int:
    """`D P n (c + 1)`, with the column of ones that carries the projector's bias."""
    positions = config.text_config.num_hidden_layers * len(config.memory_positions)
    return positions * config.num_patches * (config.projector_hidden_size + 1)


def materialised_memory(config) -> int:
    """`D P n h`: the full keys and values of the paper's equation 13."""
    positions = config.text_config.num_hidden_layers * len(config.memory_positions)
    return positions * config.num_patches * config.text_config.hidden_size


def kv_cache(text, tokens: int) -> int:
    """Keys and values of all layers for `tokens` tokens."""
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens


# --- tensors ---


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def cached_tensors(causal_lm, tokens: int) -> list[torch.Tensor]:
    """The KV cache of a language model after a sequence of `tokens` tokens, such as the visual tokens of one image."""
    with torch.no_grad():
        ids = torch.zeros(1, tokens, dtype=torch.long, device=causal_lm.device)
        cache = causal_lm(ids, use_cache=True, logits_to_keep=1).past_key_values
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def encoded_image(model) -> torch.Tensor:
    """The visual memory of one image."""
    size = (1, model.config.vision_config.num_channels, model.config.resolution, model.config.resolution)
    with torch.no_grad():
        return model.get_image_features(torch.zeros(size, device=model.device)).pooler_output


def measure(shape: tuple) -> dict:
    """Bytes per image and per checkpoint of one of `operations.SHAPES`: bases in bfloat16, adapters in float32."""
    config = operations.load_config(*shape)
    half = torch.bfloat16
    with operations.meta_device():
        vision = AutoModel.from_config(config.vision_config, dtype=half)
        text = AutoModelForCausalLM.from_config(config.text_config, dtype=half)
        model, llava = (speed.build(method, config, vision, text) for method in (speed.DEHVF, speed.LLAVA))
        memory = encoded_image(model)
        cache = cached_tensors(text, config.num_patches)
    return {
        "image": {
            "visual memory": {"closed_form": half.itemsize * visual_memory(config), "tensors": memory.nbytes},
            "KV cache": {
                "closed_form": half.itemsize * kv_cache(config.text_config, config.num_patches),
                "tensors": bytes_of(cache),
            },
            "materialised memory": {"closed_form": half.itemsize * materialised_memory(config)},
        },
        "checkpoint": {
            "DEHVF": bytes_of(model.adapter_state_dict().values()),
            "LLaVA-LoRA": bytes_of(parameter for parameter in llava.parameters() if parameter.requires_grad),
            "vision encoder": bytes_of(vision.parameters()),
            "language model": bytes_of(text.parameters()),
        },
    }


# --- the peak of training ---


def resident_set(field: str, process: int | str = "self") -> int:
    """Bytes of the resident set: `VmRSS` now, `VmHWM` its peak since the last reset, `RssAnon` without files."""
    status = (PROC.parent / str(process) / "status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def growth_at_peak(job: Callable) -> int:
    """The peak growth of this process's resident set while `job` runs, in bytes."""
    gc.collect()
    (PROC / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = resident_set("VmRSS")
    job()
    return resident_set("VmHWM") - before


def training_peak(method: str, preset: speed.Preset) -> int:
    """Growth in bytes during two steps; AdamW has no state before the end of the first one. Excludes the weights."""
    side, tokens = preset.patches_per_side[0], preset.text_tokens[0]
    config = speed.make_config(preset, side)
    text = speed.random_base(AutoModelForCausalLM, config.text_config, preset)
    model = speed.build_all((method,), preset, side, text)[method]
    inputs = speed.make_inputs(model, preset, side, preset.training_batch, tokens)
    step = speed.training_job(model, inputs, time.perf_counter)
    return growth_at_peak(lambda: [step() for _ in range(2)])


def run_fresh_process(module: str, *words: str) -> str:
    """The output of `python -m module *words`."""
    # With this threshold, large tensors are returned to the system when freed, so the resident set has only live ones
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, "-m", module, *words]
    return subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout


def peaks_in_fresh_processes(
    benchmark: str, preset: str, names: Sequence[str], num_runs: int
) -> dict[str, list[int]] | None:
    """
    The bytes that `python -m benchmark --preset preset --peak-of name` prints, for each name and run; `None` if the
    system cannot reset the peak of the resident set (only Linux can).
    """
    if not os.access(PROC / "clear_refs", os.W_OK):
        return None
    peaks = {name: [] for name in names}
    for _ in range(num_runs):
        for name in names:
            peaks[name].append(int(run_fresh_process(benchmark, "--preset", preset, "--peak-of", name)))
    return peaks


# --- loading ---


def save_sharded_base(folder: Path, num_layers: int) -> int:
    """Writes the folders `vision`, `text` (in shards) and `adapter` in float32. Returns the bytes of the shards."""
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "vocab_size": 8000}
    causal_lm = AutoModelForCausalLM.from_config(LlamaConfig(num_hidden_layers=num_layers, **sizes))
    causal_lm.save_pretrained(folder / "text", max_shard_size="100MB")
    sizes = {"hidden_size": 64, "intermediate_size": 256, "num_attention_heads": 4, "num_hidden_layers": 6}
    vision = AutoModel.from_config(CLIPVisionConfig(image_size=56, patch_size=14, **sizes))
    vision.save_pretrained(folder / "vision")
    new_adapters(folder, num_groups=2).save_pretrained(folder / "adapter")
    return sum(file.stat().st_size for file in (folder / "text").glob("*.safetensors"))


def new_adapters(folder: Path, **config_values):
    return DehvfForConditionalGeneration.from_vision_text_pretrained(
        folder / "vision", folder / "text", **config_values
    )


def growth_of_loading(folder: Path) -> dict[str, dict[str, int]]:
    """Growth of the resident set in bytes, at its peak and at the end, for each way to load `save_sharded_base`."""
    saved = partial(AutoModel.from_pretrained, folder / "adapter", trust_remote_code=True)
    ways = {
        "`from_pretrained`": saved,
        "`from_vision_text_pretrained`": partial(new_adapters, folder, num_groups=2),
        "`from_pretrained`, converted to bfloat16": partial(saved, dtype=torch.bfloat16),
    }
    models, growth = [], {}

    def load(way: Callable):
        models[:] = [way()]
        with torch.no_grad():  # reads the weights, which loading has only mapped
            models[0](torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, 56, 56))

    for name, way in ways.items():
        models.clear()
        gc.collect()
        before = resident_set("VmRSS")
        growth[name] = {"peak": growth_at_peak(partial(load, way)), "after": resident_set("VmRSS") - before}
    return growth


def measure_loading() -> dict | None:
    """Runs `growth_of_loading` in a fresh process."""
    if not os.access(PROC / "clear_refs", os.W_OK):
        return None
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = save_sharded_base(Path(folder), LOADED_LAYERS)
        command = [sys.executable, "-m", "benchmarks.memory", "--loading-of", folder]
        process = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        return {"bytes": num_bytes, "growth": json.loads(process.stdout)}


# --- the memory of training on a GPU, calculated ---

# Of a trained value: itself and its gradient in float32, and the two moments of AdamW
BYTES_PER_TRAINED = 4 + 4 + 8
# The maximum number of gathered base parameters under ZeRO-3: `stage3_max_live_parameters` of DeepSpeed
ZERO3_LIVE = 10**9
ESTIMATE_BATCH, ESTIMATE_TOKENS = 4, 64


def kept_for_backward(model, inputs: dict) -> int:
    """Bytes of the tensors that autograd saves in a forward. Each storage counts once; weights do not count."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # keeps it alive, since a new storage could get the same address
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def training_needs(config, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """
    Bytes of a training process by part, for models on the meta device: the bases in `dtype`, the adapters with their
    gradients and optimizer states, the activations without and with gradient checkpointing, and one layer of the
    language model. With checkpointing, the activations of one layer are recomputed during its backward.
    """
    with operations.meta_device():
        vision = AutoModel.from_config(config.vision_config, dtype=dtype)
        text = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        model = speed.build(speed.DEHVF, config, vision, text).train()
        size = config.resolution
        ids = torch.zeros(ESTIMATE_BATCH, ESTIMATE_TOKENS, dtype=torch.long)
        # A 4D mask, since transformers would read the values of a 2D one
        mask = torch.ones(ESTIMATE_BATCH, 1, ESTIMATE_TOKENS, ESTIMATE_TOKENS, dtype=torch.bool)
        inputs = {"input_ids": ids, "labels": ids, "attention_mask": mask}
        inputs["pixel_values"] = torch.zeros(ESTIMATE_BATCH, 3, size, size)
        plain = kept_for_backward(model, inputs)
        model.activation_checkpointing_enable()
        checkpointed = kept_for_backward(model, inputs)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return {
        "bases": bytes_of(parameter for parameter in model.parameters() if not parameter.requires_grad),
        "dtype": dtype.itemsize,
        "layer": bytes_of(text.model.layers[0].parameters()),
        "adapters": BYTES_PER_TRAINED * trained,
        "activations": plain,
        "activations, checkpointed": checkpointed + (plain - checkpointed) // config.text_config.num_hidden_layers,
    }


# Engine -> bytes of the bases on each GPU
BASES_PER_GPU = {
    "one GPU, DDP, ZeRO-1, ZeRO-2": lambda needs, gpus: needs["bases"],
    "ZeRO-3": lambda needs, gpus: needs["bases"] // gpus + min(needs["bases"], ZERO3_LIVE * needs["dtype"]),
    "FSDP2": lambda needs, gpus: needs["bases"] // gpus + 2 * needs["layer"],
    "ZeRO-3 offload": lambda needs, gpus: min(needs["bases"], ZERO3_LIVE * needs["dtype"]),
}


def estimate_table() -> str:
    note = (
        f"10⁹ bytes per GPU, calculated: bases in bfloat16, batch {ESTIMATE_BATCH}, 256 patches, {ESTIMATE_TOKENS} "
        "text tokens. GPU = bases + 16 x trained (adapters and gradients in float32, AdamW) + activations (the "
        "tensors that autograd saves in a forward, with full attention matrices, counted on the meta device). Bases: "
        "all of them; ZeRO-3: bases / GPUs + at most 10⁹ gathered values; FSDP2: bases / GPUs + two layers; offload: "
        "at most 10⁹ gathered values, with one copy of the bases in each machine's memory. Not counted: about 1 for "
        "CUDA, and the fragmentation of its allocator."
    )
    shapes = [shape for name, shape in operations.SHAPES.items() if "256" in name]
    needs = [training_needs(operations.load_config(*shape)) for shape in shapes]
    rows = []
    for engine, bases in BASES_PER_GPU.items():
        for gpus in (2, 4, 8) if engine in ("ZeRO-3", "FSDP2") else ("any",):
            cells = [
                f"{(bases(one, gpus) + one['adapters'] + one[activations]) / 1e9:.1f}"
                for one in needs
                for activations in ("activations", "activations, checkpointed")
            ]
            rows.append([engine, str(gpus), *cells])
    head = ("engine", "GPUs", "7B", "7B, checkpointed", "13B", "13B, checkpointed")
    return "\n".join([note, "", *table(head, rows)]) + "\n"


def measure_gpu(preset: speed.Preset) -> dict[str, int]:
    """Peak bytes of a GPU in three training steps, including the weights, with the sizes of `estimate_table`."""
    side, peaks = preset.patches_per_side[0], {}
    config = speed.make_config(preset, side)
    text = speed.random_base(AutoModelForCausalLM, config.text_config, preset)
    vision = speed.random_base(AutoModel, config.vision_config, preset)
    for name in (speed.DEHVF, f"{speed.DEHVF}, checkpointed", speed.MEMVP, speed.LLAVA):
        model = speed.build(name.removesuffix(", checkpointed"), config, vision, text)
        if name.endswith("checkpointed"):
            model.activation_checkpointing_enable()
        inputs = speed.make_inputs(model, preset, side, ESTIMATE_BATCH, ESTIMATE_TOKENS)
        step = speed.training_job(model, inputs, time.perf_counter, fused=True)
        gc.collect()
        torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            step()
        peaks[name] = torch.cuda.max_memory_allocated()
        del model, inputs, step
    return peaks


# --- results ---

NOT_MEASURED = "Not measured: this system has no `/proc/self/clear_refs`."


def markdown(report: dict) -> str:
    images, checkpoints = [], []
    for name, shape in report["shapes"].items():
        image, checkpoint = shape["image"], shape["checkpoint"]
        numbers = [image["visual memory"]["tensors"], image["KV cache"]["tensors"]]
        numbers.append(image["materialised memory"]["closed_form"])
        images.append([name, *(f"{number / 1e6:.1f}" for number in numbers)])
        share = 100 * checkpoint["DEHVF"] / (checkpoint["vision encoder"] + checkpoint["language model"])
        checkpoints.append([name, *(f"{number / 1e6:,.1f}" for number in checkpoint.values()), f"{share:.2f}"])
    lines = [
        *heading(report["command"], report["note"]),
        *("## An encoded image", "", "10⁶ bytes, in bfloat16.", ""),
        *table(("", "visual memory", "LLaVA's KV cache", "materialised memory"), images),
        *("", "## A checkpoint", "", "10⁶ bytes: trained tensors in float32, bases in bfloat16.", ""),
        *table(
            ("", "DEHVF", "LLaVA-LoRA", "vision encoder", "language model", "DEHVF, in % of the bases"), checkpoints
        ),
        *("", f"## The peak of training, preset `{report['preset']}`", ""),
    ]
    if report["training_peaks"] is None:
        lines.append(NOT_MEASURED)
    else:
        lines += ["Growth of the resident set in 10⁶ bytes, without the weights.", ""]
        rows = []
        for method, peaks in report["training_peaks"].items():
            least, median, greatest = (f(peaks) / 1e6 for f in (min, statistics.median, max))
            rows.append([method, f"{median:,.0f}", f"{least:,.0f} to {greatest:,.0f}"])
        lines += table(("", "median", "least to greatest"), rows)
    lines += ["", "## Loading", ""]
    if report["loading"] is None:
        lines.append(NOT_MEASURED)
    else:
        num_bytes, growth = report["loading"]["bytes"], report["loading"]["growth"]
        lines += [f"Growth of the resident set, as a fraction of the base's {num_bytes / 1e6:,.0f}·10⁶ bytes.", ""]
        rows = [
            [name, *(f"{one[when] / num_bytes:.2f}" for when in ("peak", "after"))] for name, one in growth.items()
        ]
        lines += table(("", "peak", "at the end"), rows)
    return "\n".join(lines) + "\n"


def draw(report: dict, file: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), dpi=110, layout="constrained")
    images, checkpoints = figure.subplots(1, 2)

    def draw_bars(axis, parts: dict[str, list[int]]):
        for shift, (part, sizes) in enumerate(parts.items()):
            places = [position + 0.27 * shift for position in range(len(sizes))]
            container = axis.bar(places, [size / 1e6 for size in sizes], 0.25, label=part)
            axis.bar_label(container, fmt="%.1f", fontsize=8)
        axis.set_xticks(range(len(sizes)), [name.replace(", ", "\n") for name in report["shapes"]], fontsize=8)
        axis.legend(fontsize=9, loc="upper left")

    shapes = report["shapes"].values()
    parts = ("visual memory", "KV cache")
    draw_bars(images, {part: [shape["image"][part]["tensors"] for shape in shapes] for part in parts})
    images.set_title("An encoded image: 10⁶ bytes in bfloat16")
    parts = ("DEHVF", "LLaVA-LoRA", "language model")
    draw_bars(checkpoints, {part: [shape["checkpoint"][part] for shape in shapes] for part in parts})
    checkpoints.set(title="A checkpoint, and the language model: 10⁶ bytes", yscale="log")
    checkpoints.set_ylim(top=3e5)  # room for the legend
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = [name for name, preset in speed.PRESETS.items() if preset.device == "cpu"]
    parser.add_argument("--preset", choices=on_cpu, default="small", help="sizes of the models of the training steps")
    parser.add_argument(
        "--peak-of", choices=PEAK_METHODS, help="only print the peak of training with this method, in bytes"
    )
    parser.add_argument(
        "--loading-of", type=Path, help="only print the memory of loading the models in this folder, as JSON"
    )
    parser.add_argument("--estimate", action="store_true", help="only print the calculated memory per GPU")
    parser.add_argument(
        "--gpu",
        choices=speed.LARGE,
        help="only print the peak of training with this preset on a GPU, in bytes, as JSON",
    )
    arguments = parser.parse_args()
    if arguments.loading_of:
        print(json.dumps(growth_of_loading(arguments.loading_of)))
        return
    if arguments.estimate:
        print(estimate_table())
        return
    if arguments.gpu:
        print(json.dumps({"machine": machine_in_words(), **measure_gpu(speed.PRESETS[arguments.gpu])}))
        return
    preset = speed.PRESETS[arguments.preset]
    if arguments.peak_of:
        print(training_peak(arguments.peak_of, preset))
        return
    require_writable(RESULTS)
    report = {
        "command": command_line("memory"),
        "preset": arguments.preset,
        "shapes": {name: measure(shape) for name, shape in operations.SHAPES.items()},
        "training_peaks": peaks_in_fresh_processes("benchmarks.memory", arguments.preset, PEAK_METHODS, PEAK_RUNS),
        "loading": measure_loading(),
    }
    report["note"] = (
        "Bytes per image and per checkpoint are those of tensors on the meta device. The visual memory is the result "
        "of `get_image_features` and is used for any number of questions; LLaVA's KV cache is that of the image's "
        "tokens only, one per patch. The materialised memory has an image's full keys and values, which this "
        f"repository never keeps. The peak of training is that of two steps with a batch of {preset.training_batch}, "
        f"{preset.patches_per_side[0] ** 2} patches and {preset.text_tokens[0]} text tokens in "
        f"{str(preset.dtype).removeprefix('torch.')}: activations, gradients and AdamW's state, in {PEAK_RUNS} fresh "
        "processes. The language model alone has no trained parameters; its backward ends at the input embeddings. "
        "Loading is that of a base in float32, in shards, with a first forward, in one fresh process. A tensor that "
        "is not converted stays in the mapped file. If it is converted, the mapped pages count in addition to the "
        f"copy until loading ends, although the system may drop them when memory is short. {machine_in_words()}."
    )
    save_report(RESULTS, speed.report_name("memory", arguments.preset), report, markdown, draw)


if __name__ == "__main__":
    main()
