# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Bytes: what an image costs once it is encoded, beside LLaVA's KV cache of its tokens; what a checkpoint holds; what a
training step needs at its peak; and what loading a base does.

    python -m benchmarks.memory                # minutes on 2 cores, nearly all of them for the training steps
    python -m benchmarks.memory --estimate     # seconds: what a GPU needs to train 7B and 13B, by engine; calculated
    python -m benchmarks.memory --gpu llama-7b # seconds: the same, measured on one CUDA device

Bytes per image and per checkpoint are those of the tensors of 7B and 13B, which run on the meta device: shapes and
dtypes without values. The peak of training is measured on the CPU, with the models of `benchmarks.speed`'s preset
`small`: how far the resident set of a fresh process grows in two steps. Likewise that of loading, with a base of
random weights in shards, 1 GB together, that is written to a temporary folder. The results go to `benchmarks/results`:
`memory.json`, `.md` and `.png`.
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

from benchmarks import RESULTS, heading, machine_in_words, operations, save_report, speed, table
from dehvf import ROOT, DehvfForConditionalGeneration


PROC = Path("/proc/self")
PEAK_METHODS = (speed.TEXT_ONLY, speed.DEHVF, speed.MEMVP, speed.LLAVA)
PEAK_RUNS = 3
LOADED_LAYERS = 14  # of the base that is loaded, 67 MB each


# --- closed forms: numbers of values. Letters: modeling_dehvf.py ---


def visual_memory(config) -> int:
    """`D P n (c + 1)`, with the column of ones that carries the projector's bias."""
    positions = config.text_config.num_hidden_layers * len(config.memory_positions)
    return positions * config.num_patches * (config.projector_hidden_size + 1)


def materialised_memory(config) -> int:
    """`D P n h`: keys and values in full, as the paper's equation 13 has them."""
    positions = config.text_config.num_hidden_layers * len(config.memory_positions)
    return positions * config.num_patches * config.text_config.hidden_size


def kv_cache(text, tokens: int) -> int:
    return 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim * tokens


# --- tensors ---


def bytes_of(tensors) -> int:
    return sum(tensor.nbytes for tensor in tensors)


def cached_tensors(causal_lm, tokens: int) -> list[torch.Tensor]:
    """Keys and values that a language model keeps of a sequence, such as the visual tokens of one image."""
    with torch.no_grad():
        ids = torch.zeros(1, tokens, dtype=torch.long, device=causal_lm.device)
        cache = causal_lm(ids, use_cache=True, logits_to_keep=1).past_key_values
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def encoded_image(model) -> torch.Tensor:
    size = (1, model.config.vision_config.num_channels, model.config.resolution, model.config.resolution)
    with torch.no_grad():
        return model.get_image_features(torch.zeros(size, device=model.device)).pooler_output


def measure(shape: tuple) -> dict:
    """Of models without values, with bases in bfloat16 and adapters in float32, as they are trained and loaded."""
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
    """Bytes of a process: `VmRSS` now, `VmHWM` at most since the last reset, `RssAnon` now without mapped files."""
    status = (PROC.parent / str(process) / "status").read_text(encoding="utf-8")
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", status)[1])


def growth_at_peak(job: Callable) -> int:
    """By how many bytes this process's resident set grows at most while `job` runs."""
    gc.collect()
    (PROC / "clear_refs").write_text("5")  # resets VmHWM, see proc(5)
    before = resident_set("VmRSS")
    job()
    return resident_set("VmHWM") - before


def training_peak(method: str, preset: speed.Preset) -> int:
    """Of two steps, since in the first one AdamW has no state yet. Weights are there before and do not count."""
    side, tokens = preset.patches_per_side[0], preset.text_tokens[0]
    config = speed.make_config(preset, side)
    text = speed.random_base(AutoModelForCausalLM, config.text_config, preset)
    model = speed.build_all((method,), preset, side, text)[method]
    inputs = speed.make_inputs(model, preset, side, preset.training_batch, tokens)
    step = speed.training_job(model, inputs, time.perf_counter)
    return growth_at_peak(lambda: [step() for _ in range(2)])


def peaks_in_fresh_processes(
    benchmark: str, preset: str, names: Sequence[str], num_runs: int
) -> dict[str, list[int]] | None:
    """
    What `python -m benchmark --preset preset --peak-of name` prints, in bytes, for each name and run; `None` where
    Linux's account of the resident set cannot be reset.
    """
    if not os.access(PROC / "clear_refs", os.W_OK):
        return None
    # Each larger tensor is mapped on its own and given back at once, so that the resident set is what is alive
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    peaks = {name: [] for name in names}
    for _ in range(num_runs):
        for name in names:
            command = [sys.executable, "-m", benchmark, "--preset", preset, "--peak-of", name]
            process = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE)
            peaks[name].append(int(process.stdout))
    return peaks


# --- loading ---


def save_sharded_base(folder: Path, num_layers: int) -> int:
    """Writes `vision`, `text` in shards, and `adapter`, all in float32. Returns the bytes of the shards."""
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
    """Of this process's resident set, at most and in the end, for each way to load what `save_sharded_base` wrote."""
    saved = partial(AutoModel.from_pretrained, folder / "adapter", trust_remote_code=True)
    ways = {
        "`from_pretrained`": saved,
        "`from_vision_text_pretrained`": partial(new_adapters, folder, num_groups=2),
        "`from_pretrained`, converted to bfloat16": partial(saved, dtype=torch.bfloat16),
    }
    models, growth = [], {}

    def load(way: Callable):
        models[:] = [way()]
        with torch.no_grad():  # reads what the loading has only mapped
            models[0](torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 3, 56, 56))

    for name, way in ways.items():
        models.clear()
        gc.collect()
        before = resident_set("VmRSS")
        growth[name] = {"peak": growth_at_peak(partial(load, way)), "after": resident_set("VmRSS") - before}
    return growth


def loading_in_a_fresh_process() -> dict | None:
    if not os.access(PROC / "clear_refs", os.W_OK):
        return None
    with tempfile.TemporaryDirectory() as folder:
        num_bytes = save_sharded_base(Path(folder), LOADED_LAYERS)
        command = [sys.executable, "-m", "benchmarks.memory", "--loading-of", folder]
        process = subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.PIPE)
        return {"bytes": num_bytes, "growth": json.loads(process.stdout)}


# --- what a GPU needs to train, calculated ---

# Adapters and gradients in float32, and AdamW's two moments
BYTES_PER_TRAINED = 4 + 4 + 8
# Most that ZeRO-3 holds whole of the bases at once, in values: `stage3_max_live_parameters` of DeepSpeed
ZERO3_LIVE = 10**9
ESTIMATE_BATCH, ESTIMATE_TOKENS = 4, 64


def kept_for_backward(model, inputs: dict) -> int:
    """Bytes of what autograd keeps of a forward: each storage once, and no weights."""
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            kept[storage._cdata] = storage  # held, or the next tensor might get its number
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model(**inputs)
    return sum(storage.nbytes() for storage in kept.values())


def training_needs(config, dtype: torch.dtype = torch.bfloat16) -> dict[str, int]:
    """
    Bytes of one process that trains, by part, of models on the meta device: the bases in `dtype`, what belongs to the
    adapters, activations without and with gradient checkpointing, and one layer of the language model. With
    checkpointing a layer's activations are there again while backward is in it.
    """
    with operations.meta_device():
        vision = AutoModel.from_config(config.vision_config, dtype=dtype)
        text = AutoModelForCausalLM.from_config(config.text_config, dtype=dtype)
        model = speed.build(speed.DEHVF, config, vision, text).train()
        size = config.resolution
        ids = torch.zeros(ESTIMATE_BATCH, ESTIMATE_TOKENS, dtype=torch.long)
        # One that needs no look at its values
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
        "text tokens. GPU = bases + 16 x trained (adapters and gradients in float32, AdamW) + activations (what "
        "autograd keeps of a forward, with whole attention matrices, counted on the meta device). Bases: whole; "
        "ZeRO-3: whole / GPUs + at most 10⁹ values at work; FSDP2: whole / GPUs + two layers; offload: at most 10⁹ "
        "values at work, and the whole once in each machine's memory. Not counted: about 1 for CUDA, and what its "
        "allocator wastes."
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
    """Peak of the bytes on a GPU in three training steps, with the weights and the sizes of `estimate_table`."""
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
        *("## An image, once it is encoded", "", "10⁶ bytes, in bfloat16.", ""),
        *table(("", "visual memory", "LLaVA's KV cache", "materialised memory"), images),
        *("", "## A checkpoint", "", "10⁶ bytes: trained tensors in float32, bases in bfloat16.", ""),
        *table(
            ("", "DEHVF", "LLaVA-LoRA", "vision encoder", "language model", "DEHVF, in % of the bases"), checkpoints
        ),
        *("", f"## The peak of training, preset `{report['preset']}`", ""),
    ]
    if report["training_peaks"] is None:
        lines.append("Not measured: this system has no `/proc/self/clear_refs`.")
    else:
        lines += ["10⁶ bytes that the resident set grows by, beyond the weights.", ""]
        rows = []
        for method, peaks in report["training_peaks"].items():
            least, median, greatest = (f(peaks) / 1e6 for f in (min, statistics.median, max))
            rows.append([method, f"{median:,.0f}", f"{least:,.0f} to {greatest:,.0f}"])
        lines += table(("", "median", "least to greatest"), rows)
    lines += ["", "## Loading", ""]
    if report["loading"] is None:
        lines.append("Not measured: this system has no `/proc/self/clear_refs`.")
    else:
        num_bytes, growth = report["loading"]["bytes"], report["loading"]["growth"]
        lines += [f"By how much the resident set grows, in shares of the base's {num_bytes / 1e6:,.0f}·10⁶ bytes.", ""]
        rows = [
            [name, *(f"{one[when] / num_bytes:.2f}" for when in ("peak", "after"))] for name, one in growth.items()
        ]
        lines += table(("", "at most", "in the end"), rows)
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
    images.set_title("An image, once it is encoded: 10⁶ bytes in bfloat16")
    parts = ("DEHVF", "LLaVA-LoRA", "language model")
    draw_bars(checkpoints, {part: [shape["checkpoint"][part] for shape in shapes] for part in parts})
    checkpoints.set(title="A checkpoint, and the base that it leaves out: 10⁶ bytes", yscale="log")
    checkpoints.set_ylim(top=3e5)  # room for the legend
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = [name for name, preset in speed.PRESETS.items() if preset.device == "cpu"]
    parser.add_argument("--preset", choices=on_cpu, default="small", help="of the training steps")
    parser.add_argument("--peak-of", choices=PEAK_METHODS, help="only print the bytes of this method's training peak")
    parser.add_argument("--loading-of", type=Path, help="only print what loading this folder's models needs, as JSON")
    parser.add_argument("--estimate", action="store_true", help="only print what a GPU needs to train, calculated")
    parser.add_argument(
        "--gpu", choices=speed.LARGE, help="only print the bytes that this preset trains with, as JSON"
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
    report = {
        "command": "python -m benchmarks.memory",
        "preset": arguments.preset,
        "shapes": {name: measure(shape) for name, shape in operations.SHAPES.items()},
        "training_peaks": peaks_in_fresh_processes("benchmarks.memory", arguments.preset, PEAK_METHODS, PEAK_RUNS),
        "loading": loading_in_a_fresh_process(),
    }
    report["note"] = (
        "Bytes per image and per checkpoint are those of tensors on the meta device. A visual memory is what "
        "`get_image_features` returns, and serves any number of questions; LLaVA's KV cache is that of the image's "
        "tokens alone, as many as patches. The materialised memory is an image's keys and values in full, which this "
        "repository never keeps. The peak of training is that of two steps with a batch of "
        f"{preset.training_batch}, {preset.patches_per_side[0] ** 2} patches and {preset.text_tokens[0]} text tokens "
        f"in {str(preset.dtype).removeprefix('torch.')}: activations, gradients and AdamW's state, in {PEAK_RUNS} "
        "fresh processes. The language model alone has nothing to train and runs backward to its input embeddings. "
        "Loading is that of a base in float32, in shards, and a first forward, in one fresh process. A tensor that is "
        "not converted stays where its file is mapped; of one that is, the mapped pages count beside the copy until "
        "loading ends, though the system may drop them when memory is short. "
        f"{machine_in_words()}."
    )
    save_report(RESULTS, "memory", report, markdown, draw)


if __name__ == "__main__":
    main()
