# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures a training step and a decoding step of `benchmarks.speed` as replayed CUDA graphs: the time of the computation
on the GPU, without the time in which the GPU waits for Python to launch kernels.

    python -m benchmarks.cuda_graphs                 # the preset llama-7b; needs one CUDA device with about 25 GB

The methods are measured alternately, as in `benchmarks.speed`. The results are written to `benchmarks/results`:
`cuda_graphs.json` and `.md`.
"""

import argparse
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from transformers import AutoModelForCausalLM

from benchmarks import RESULTS, format_ratios, heading, machine_in_words, require_writable, save_report, speed, table
from benchmarks.speed import DEHVF, LLAVA, MEMVP, MERGED, STEPS, TEXT_ONLY, decoding_step, make_clock, time_steps


WARM_UPS, ROUNDS = 3, 9
METHODS = (TEXT_ONLY, DEHVF, MEMVP, LLAVA, MERGED)
TRAINING, DECODING = "training step", "decoding step"
RATIOS = [
    (TRAINING, LLAVA, DEHVF, "≥ 2.5"),
    (TRAINING, DEHVF, MEMVP, "≤ 1.03"),
    (TRAINING, DEHVF, TEXT_ONLY, "–"),
    (DECODING, DEHVF, TEXT_ONLY, "≤ 1.05"),
    (DECODING, DEHVF, MEMVP, "≤ 1.03"),
    (DECODING, MERGED, DEHVF, "–"),
]


class Replay:
    """Captures the kernels of a function in a CUDA graph and replays them. Without CUDA, calls the function."""

    def __init__(self, function: Callable):
        self.run = self.function = function
        if torch.cuda.is_available():
            for _ in range(WARM_UPS):
                function()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=torch.cuda.current_stream()):
                function()
            self.run = graph.replay  # `function` keeps the tensors that the graph reads

    def __call__(self):
        self.run()


def training_step(model, preset) -> Callable:
    """Forward, backward and AdamW. For the language model alone, forward and backward to its input embeddings."""
    model.train()
    inputs = speed.make_inputs(model, preset, preset.patches_per_side[0], preset.training_batch, preset.text_tokens[0])
    del inputs["attention_mask"]  # all ones; checking this would need a synchronization, which a graph cannot capture
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if trained:
        optimizer = torch.optim.AdamW(trained, fused=True, capturable=preset.device == "cuda")
    else:
        embeddings = model.get_input_embeddings()(inputs.pop("input_ids")).detach().requires_grad_()
        inputs["inputs_embeds"], optimizer = embeddings, torch.optim.SGD([embeddings], lr=0.0)
    forward = partial(speed.forward_on_device, model) if "pixel_values" in inputs else model

    def step():
        forward(**inputs, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=False)

    return step


def measure(preset) -> dict:
    side = preset.patches_per_side[0]
    text = speed.random_base(AutoModelForCausalLM, speed.make_config(preset, side).text_config, preset)
    models, samples = speed.build_all(METHODS, preset, side, text), {}
    now = make_clock(preset.device, "wall")
    decode = partial(decoding_step, num_steps=WARM_UPS + (ROUNDS + 2) * STEPS)
    for what, make, excluded in ((TRAINING, training_step, MERGED), (DECODING, decode, LLAVA)):
        jobs = {
            name: partial(time_steps, Replay(make(model, preset)), now, what)
            for name, model in models.items()
            if name != excluded
        }
        samples[what] = speed.interleave(jobs, 0, ROUNDS)
    return samples


def markdown(report: dict) -> str:
    ratios, times = [], []
    for what, above, below, target in RATIOS:
        pairs = zip(report["samples"][what][above][what], report["samples"][what][below][what])
        ratios.append([what, above, below, format_ratios([time / reference for time, reference in pairs]), target])
    for name in METHODS:
        cells = {what: report["samples"][what].get(name) for what in (TRAINING, DECODING)}
        times.append([name, *(speed.median_ms(cell[what]) if cell else "–" for what, cell in cells.items())])
    lines = [
        *heading(report["command"], report["note"]),
        *table(("", "of", "over", "median of the rounds' ratios (least to greatest)", "target"), ratios),
        "",
        *table(("milliseconds", TRAINING, DECODING), times),
    ]
    return "\n".join(lines) + "\n"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=speed.PRESETS, default="llama-7b")
    arguments = parser.parse_args()
    require_writable(RESULTS)
    preset = speed.PRESETS[arguments.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit(f"The preset `{arguments.preset}` needs a CUDA device, and none is available.")
    report = {
        "command": f"python -m benchmarks.cuda_graphs --preset {arguments.preset}",
        "note": (
            f"Preset `{arguments.preset}` of `benchmarks.speed` with random weights in "
            f"{str(preset.dtype).removeprefix('torch.')}, {preset.patches_per_side[0] ** 2} patches and "
            f"{preset.text_tokens[0]} text tokens: a training step of {preset.training_batch} (forward, backward, "
            f"AdamW) and a decoding step of {preset.decode_batch}, replayed as CUDA graphs; medians of {ROUNDS} "
            f"rounds of {STEPS} replays; the methods are measured alternately. {machine_in_words()}."
        ),
    }
    # Graphs must be captured on a side stream, and the gradients must be allocated on the same stream
    with torch.cuda.stream(torch.cuda.Stream()) if preset.device == "cuda" else nullcontext():
        report["samples"] = measure(preset)
    name = speed.report_name("cuda_graphs", arguments.preset, default="llama-7b")
    save_report(RESULTS, name, report, markdown)


if __name__ == "__main__":
    main()
