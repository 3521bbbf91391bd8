# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the memory and the time of naive, materialised and factored injection: three ways in which an FFN can read the
memory of an image, with the same result.

    python -m benchmarks.injection             # 5 minutes

    naive           full keys and values for all language layers, computed once and kept (the paper's equation 13)
    materialised    each FFN computes its full keys and values when it reads them (`memory_form="materialised"`)
    factored        keys and values are never computed; the FFN reads features of the projector's width (`"factored"`)

In training, the first two are the same, since backward needs the keys and values of all layers. The models are those
of the preset `small` in `benchmarks.speed`, measured alternately as described there. Times are the CPU time of one
thread, so that other processes on the machine are not counted. The results are written to `benchmarks/results`:
`injection.json`, `.md` and `.png`.
"""

import argparse
import statistics
import time
from functools import partial

import torch
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM

from benchmarks import (
    RESULTS,
    command_line,
    heading,
    machine_in_words,
    memory,
    require_writable,
    save_report,
    speed,
    table,
)
from dehvf import injection


NAIVE, MATERIALISED, FACTORED = "naive", "materialised", "factored"
TRAINED_FORMS = (MATERIALISED, FACTORED)
NEW_TOKENS = 8


def build(preset: speed.Preset, form: str):
    """The DEHVF model of a preset, with `form` as its `memory_form`."""
    config = speed.make_config(preset, preset.patches_per_side[0])
    config.memory_form = form
    vision = speed.random_base(AutoModel, config.vision_config, preset)
    text = speed.random_base(AutoModelForCausalLM, config.text_config, preset)
    return speed.build(speed.DEHVF, config, vision, text)


def naive_memories(model, visual_memory: torch.Tensor) -> tuple[injection.LayerMemory, ...]:
    """The memory of one image for each language layer, with the image's full keys and values in the matrices."""
    num_slots = model.config.num_memory_slots

    def full_matrix(features: torch.Tensor, matrix: torch.Tensor) -> torch.Tensor:
        visual = features[0] @ matrix[num_slots:]  # n h
        return matrix[:num_slots] + F.pad(visual, (0, 0, 0, num_slots - len(visual)))  # S h

    return tuple(
        injection.LayerMemory(
            key_matrix=full_matrix(one.key_features, one.key_matrix),
            value_matrix=full_matrix(one.value_features, one.value_matrix.T).T.contiguous(),
            form=one.form,
            scale=one.scale,
            dropout=one.dropout,
        )
        for one in model.model.active.layer_memories(visual_memory, visual_memory.dtype)
    )


def bytes_of_image(memories: tuple[injection.LayerMemory, ...]) -> int:
    """Bytes that an image adds: its features, or, for `naive`, its full keys and values."""
    if memories[0].key_features is None:
        return memory.bytes_of(tensor for one in memories for tensor in (one.key_matrix, one.value_matrix))
    return memory.bytes_of(tensor for one in memories for tensor in (one.key_features, one.value_features))


@torch.no_grad()
def read(model, memories: tuple, ids: torch.Tensor) -> dict[str, float]:
    """Seconds of the prefill of a prompt, and mean seconds of a further token."""
    start = time.process_time()
    outputs = model(ids, layer_memories=memories, use_cache=True, logits_to_keep=1)
    prompt = time.process_time()
    for _ in range(NEW_TOKENS):
        token = outputs.logits[:, -1].argmax(dim=-1, keepdim=True)
        outputs = model(token, layer_memories=memories, cache=outputs.past_key_values, logits_to_keep=1)
    return {"prompt": prompt - start, "further token": (time.process_time() - prompt) / NEW_TOKENS}


def measure_reading(preset: speed.Preset) -> dict:
    """Bytes of one encoded image, and seconds of a prompt and of further tokens, for each form."""
    ways, models = {}, {form: build(preset, form) for form in TRAINED_FORMS}
    with torch.no_grad():
        for form, model in models.items():
            visual_memory = memory.encoded_image(model)
            ways[form] = model, model.model.active.layer_memories(visual_memory, visual_memory.dtype)
        ways = {NAIVE: (model, naive_memories(model, visual_memory)), **ways}
    ids = speed.make_inputs(model, preset, preset.patches_per_side[0], 1, preset.text_tokens[0])["input_ids"]
    samples = speed.interleave({name: partial(read, *way, ids) for name, way in ways.items()}, 0)
    return {"bytes": {name: bytes_of_image(memories) for name, (_, memories) in ways.items()}, "samples": samples}


def training_job(preset: speed.Preset, form: str):
    model = build(preset, form)
    side, tokens = preset.patches_per_side[0], preset.text_tokens[0]
    inputs = speed.make_inputs(model, preset, side, preset.training_batch, tokens)
    return speed.training_job(model, inputs, time.process_time)


def training_peak(preset: speed.Preset, form: str) -> int:
    """Growth of this process in bytes during two steps; AdamW has no state before the end of the first one."""
    step = training_job(preset, form)
    return memory.growth_at_peak(lambda: [step() for _ in range(2)])


# --- results ---


def markdown(report: dict) -> str:
    reading, training, peaks = report["reading"], report["training"], report["training_peaks"]
    inference, steps = [], []
    for name, num_bytes in reading["bytes"].items():
        times = [speed.median_ms(reading["samples"][name][measure]) for measure in ("prompt", "further token")]
        inference.append([name, f"{num_bytes / 1e6:.1f}", *times])
    for form in TRAINED_FORMS:
        peak = "not measured" if peaks is None else f"{peaks[form] / 1e6:,.0f}"
        name = f"{NAIVE}, {form}" if form == MATERIALISED else form
        steps.append([name, speed.median_ms(training[form]["training step"]), peak])
    lines = [
        *heading(report["command"], report["note"]),
        *("## Inference", ""),
        *table(("", "one image, 10⁶ bytes", "prompt, ms", "further token, ms"), inference),
        *("", "## Training", ""),
        *table(("", "step, ms", "peak without the weights, 10⁶ bytes"), steps),
    ]
    return "\n".join(lines) + "\n"


def draw(report: dict, file):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4), dpi=110, layout="constrained")
    image, token, peak = figure.subplots(1, 3)
    reading, peaks = report["reading"], report["training_peaks"] or {}
    panels = {
        (image, "Encoded image: 10⁶ bytes"): {name: size / 1e6 for name, size in reading["bytes"].items()},
        (token, "Further token: ms"): {
            name: 1e3 * statistics.median(samples["further token"]) for name, samples in reading["samples"].items()
        },
        (peak, "Peak of training: 10⁶ bytes"): {form: size / 1e6 for form, size in peaks.items()},
    }
    for (axis, title), numbers in panels.items():
        axis.bar_label(axis.bar(numbers.keys(), numbers.values(), color="tab:blue"), fmt="%.1f")
        axis.set_title(title)
    figure.savefig(file)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    on_cpu = [name for name, preset in speed.PRESETS.items() if preset.device == "cpu"]
    parser.add_argument("--preset", choices=on_cpu, default="small", help="sizes of the models")
    parser.add_argument(
        "--peak-of", choices=TRAINED_FORMS, help="only print the peak of training with this form, in bytes"
    )
    arguments = parser.parse_args()
    preset = speed.PRESETS[arguments.preset]
    if arguments.peak_of:
        print(training_peak(preset, arguments.peak_of))
        return
    require_writable(RESULTS)
    torch.set_num_threads(1)
    jobs = {form: training_job(preset, form) for form in TRAINED_FORMS}
    peaks = memory.peaks_in_fresh_processes("benchmarks.injection", arguments.preset, TRAINED_FORMS, num_runs=1)
    report = {
        "command": command_line("injection"),
        "preset": arguments.preset,
        "note": f"Preset `{arguments.preset}` in {str(preset.dtype).removeprefix('torch.')}: "
        f"{preset.patches_per_side[0] ** 2} patches and {preset.text_tokens[0]} text tokens; one prompt at a time, "
        f"training with a batch of {preset.training_batch}. `naive` keeps the full keys and values of all language "
        "layers, `materialised` computes them again in each FFN, `factored` never computes them. Times are the CPU "
        f"time of one thread, medians of {speed.ROUNDS} rounds; the forms are measured alternately. A peak is "
        f"measured in a fresh process. {machine_in_words()}.",
        "reading": measure_reading(preset),
        "training": speed.interleave(jobs, 0),
        "training_peaks": peaks and {form: peak for form, (peak,) in peaks.items()},
    }
    save_report(RESULTS, speed.report_name("injection", arguments.preset), report, markdown, draw)


if __name__ == "__main__":
    main()
