# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures the time of a training step, of an answer and of its parts: DEHVF, its language model without an image, MemVP
and LLaVA-LoRA, on the same random bases, texts and images.

    python -m benchmarks.speed                          # the preset `small`: 8 to 14 minutes on 2 cores
    python -m benchmarks.speed --threads 1 --clock cpu  # CPU time of one core, without that of other processes
    python -m benchmarks.speed --preset llama-7b        # needs one CUDA device

In `small`, the language model has a quarter of the width of LLaMA-7B and half of its layers. The encoder is so much
smaller than CLIP ViT-L/14 that both have the same share of the operations with 256 patches and 64 text tokens. The
results are written to `benchmarks/results`: `speed.json`, `.md` and `.png`; for other presets, `speed-<preset>.json`
and so on.

The methods are measured alternately, in an order that is reversed every round, for at least 7 rounds after a warm-up.
Other load on the machine therefore affects all of them. A ratio is the median of the rounds' ratios.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    LlavaForConditionalGeneration,
    StaticCache,
    StoppingCriteria,
)

from baselines import BaselineArguments, ImageTokensForConditionalGeneration, assemble
from benchmarks import (
    RESULTS,
    command_line,
    heading,
    machine_in_words,
    operations,
    positive,
    require_writable,
    save_report,
    table,
)
from dehvf import DehvfConfig, DehvfForConditionalGeneration


ROUNDS = 7
STEPS = 8  # consecutive steps that are timed together

TEXT_ONLY, DEHVF, MEMVP, LLAVA, MERGED = "text alone", "DEHVF", "MemVP", "LLaVA-LoRA", "LLaVA-LoRA, merged"


@dataclass(frozen=True)
class Preset:
    """
    Sizes of the models and inputs.

    config: JSON file of a `DehvfConfig`, or a dict with `text_config` and `vision_config`.
    patches_per_side: sizes of the images. The comparisons use the first, `measure_sweep` the first two, and
        `measure_growth` all of them.
    text_tokens: lengths of the prompts. The comparisons use the first, `measure_sweep` all of them.
    num_memory_slots: number of memory slots, unless there are more patches.
    new_tokens: length of a whole answer.
    extra_seconds: a comparison continues for at least this time, also after the minimum number of rounds.
    compiler: backend of `torch.compile`.
    """

    config: str | dict
    patches_per_side: tuple[int, ...] = (16, 24, 34)
    text_tokens: tuple[int, ...] = (64, 32, 128, 256)
    num_memory_slots: int = 320
    training_batch: int = 4
    inference_batch: int = 32
    sweep_batch: int = 32
    decode_batch: int = 8
    new_tokens: int = 16
    extra_seconds: float = 20
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    compiler: str = "inductor"


ON_CPU = {"dtype": torch.float32, "device": "cpu"}
SMALL_TEXT = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2752, "num_hidden_layers": 16}
SMALL_TEXT |= {"num_attention_heads": 8, "num_key_value_heads": 8, "pad_token_id": 0}
SMALL_TEXT |= {"vocab_size": 4000, "eos_token_id": None}  # 2 % of the weights, as in LLaMA; answers do not end early
SMALL_VISION = {"model_type": "clip_vision_model", "hidden_size": 240, "intermediate_size": 960, "patch_size": 14}
SMALL_VISION |= {"num_hidden_layers": 12, "num_attention_heads": 3}
SMALL_BASES = {"text_config": SMALL_TEXT, "vision_config": SMALL_VISION}
TINY_SIZES = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4}
TINY_BASES = {
    "text_config": {**SMALL_TEXT, **TINY_SIZES, "num_key_value_heads": 4, "vocab_size": 64},
    "vision_config": {**SMALL_VISION, **TINY_SIZES, "patch_size": 4},
}
PRESETS = {
    "tiny": Preset(
        TINY_BASES,
        patches_per_side=(3, 4, 5),
        text_tokens=(6, 4),
        num_memory_slots=12,
        training_batch=2,
        inference_batch=2,
        sweep_batch=1,
        decode_batch=2,
        new_tokens=3,
        extra_seconds=0,
        compiler="eager",
        **ON_CPU,
    ),
    "small": Preset(SMALL_BASES, inference_batch=4, sweep_batch=1, **ON_CPU),  # 32 would take an hour
    "llama-7b": Preset(operations.LLAMA_7B, text_tokens=(64, 256), extra_seconds=1),
    "llama-13b": Preset(operations.LLAMA_13B, text_tokens=(64, 256), num_memory_slots=400, extra_seconds=1),
}


class Comparison(NamedTuple):
    """The ratio of two methods' times. `at_least` and `at_most` map a preset to its target."""

    what: str
    group: str
    measure: str
    method: str
    reference: str
    at_least: dict[str, float] = {}
    at_most: dict[str, float] = {}


LARGE = ("llama-7b", "llama-13b")
AS_MEMVP = {"small": 1.02, **dict.fromkeys(LARGE, 1.03)}
LLAVA_TRAINING, LLAVA_INFERENCE = {"small": 3, "llama-7b": 2.5}, {"small": 3, "llama-7b": 3}
DECODING, COMPILED = {"small": 1.08, "llama-7b": 1.05}, {"small": 1.05, "llama-7b": 1.05}
COMPARISONS = [
    Comparison("training step", "training, LLaVA", "training step", LLAVA, DEHVF, at_least=LLAVA_TRAINING),
    Comparison("answer of one token", "inference, LLaVA", "first token", MERGED, DEHVF, at_least=LLAVA_INFERENCE),
    Comparison("whole answer", "inference, LLaVA", "whole answer", MERGED, DEHVF),
    Comparison("answer of one token", "inference, LLaVA", "first token", LLAVA, DEHVF, at_least=LLAVA_INFERENCE),
    Comparison("whole answer", "inference, LLaVA", "whole answer", LLAVA, DEHVF),
    Comparison("training step", "training", "training step", DEHVF, MEMVP, at_most=AS_MEMVP),
    Comparison("answer of one token", "inference", "first token", DEHVF, MEMVP, at_most=AS_MEMVP),
    Comparison("whole answer", "inference", "whole answer", DEHVF, MEMVP, at_most=AS_MEMVP),
    Comparison("whole answer", "inference", "whole answer", DEHVF, TEXT_ONLY, at_most={"small": 1.14}),
    Comparison("prefill, language side", "prefill", "prefill", DEHVF, TEXT_ONLY, at_most={"small": 1.085}),
    Comparison("decoding step", "decoding", "further token", DEHVF, TEXT_ONLY, at_most=DECODING),
    Comparison("decoding step, compiled", "compiled decoding", "further token", DEHVF, TEXT_ONLY, at_most=COMPILED),
    Comparison(
        "second question, whole answer", "second question", "whole answer", DEHVF, TEXT_ONLY, at_most={"small": 1.07}
    ),
]
# Our limit for linear growth: the largest deviation of a point from the straight line between the first and the last
# point, in % of the growth between them. Quadratic growth would deviate by 15 %.
LARGEST_DEVIATION = 10


# --- models ---


def make_config(preset: Preset, patches_per_side: int):
    slots = max(preset.num_memory_slots, patches_per_side**2)
    if isinstance(preset.config, str):
        config = operations.load_config(preset.config, patches_per_side, slots)
        config.text_config.eos_token_id, config.text_config.pad_token_id = None, 0
        return config
    bases = deepcopy(preset.config)
    bases["vision_config"]["image_size"] = patches_per_side * bases["vision_config"]["patch_size"]
    return DehvfConfig(**bases, num_memory_slots=slots)


def random_base(auto_class, config, preset: Preset) -> nn.Module:
    torch.manual_seed(0)
    with torch.device(preset.device):
        return auto_class.from_config(config, dtype=preset.dtype).eval().requires_grad_(False)


def with_same_weights(base: nn.Module) -> nn.Module:
    """A copy of the modules that shares the tensors of `base`, so that five models of 7B need the memory of one."""
    tensors = [*base.parameters(), *base.buffers()]
    return deepcopy(base, {id(tensor): tensor for tensor in tensors})


def build(method: str, config, vision: nn.Module, text: nn.Module) -> nn.Module:
    """A model with newly initialised trained modules on the given bases, which are not changed."""
    vision, text = with_same_weights(vision), with_same_weights(text)
    if method == TEXT_ONLY:
        return text
    if method in (LLAVA, MERGED):
        model = assemble("llava-lora", vision, text, BaselineArguments())
        if method == MERGED:  # this does not change the shared weights, since new LoRA modules add zero
            model.model.language_model = model.model.language_model.merge_and_unload()
        return model.eval()
    config = deepcopy(config)
    config.layer_fusion = "penultimate" if method == MEMVP else "adaptive"
    with text.device:
        return DehvfForConditionalGeneration(config, vision, text).eval()


def build_all(methods: tuple[str, ...], preset: Preset, patches_per_side: int, text: nn.Module) -> dict:
    config = make_config(preset, patches_per_side)
    vision = random_base(AutoModel, config.vision_config, preset)
    return {method: build(method, config, vision, text) for method in methods}


def count_trained(model: nn.Module) -> int:
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


# --- jobs: functions that return measure -> seconds ---


def make_inputs(model, preset: Preset, patches_per_side: int, batch_size: int, text_tokens: int) -> dict:
    """The same text and images for all methods: no image for the language model, also image tokens for LLaVA."""
    generator = torch.Generator().manual_seed(0)
    text = getattr(model.config, "text_config", model.config)
    ids = torch.randint(1, text.vocab_size, (batch_size, text_tokens), generator=generator)
    inputs = {"labels": ids}
    if vision := getattr(model.config, "vision_config", None):
        side = patches_per_side * vision.patch_size
        inputs["pixel_values"] = torch.randn(batch_size, vision.num_channels, side, side, generator=generator)
    if placeholders := getattr(model, "image_tokens", []):
        image_ids = torch.tensor([placeholders] * batch_size)
        ids = torch.cat((image_ids, ids), dim=1)
        inputs["labels"] = torch.cat((torch.full_like(image_ids, -100), inputs["labels"]), dim=1)
    inputs |= {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {name: tensor.to(preset.device) for name, tensor in inputs.items()}


def forward_on_device(model, input_ids: torch.Tensor, pixel_values: torch.Tensor, first: int = 0, **kwargs):
    """
    The forward of a model on texts with one image each, without synchronization with the GPU. The forward of a
    baseline with image tokens searches for them and checks their number on the host, which a CUDA graph cannot
    capture.

    Args:
        first: position of the first image token; the image tokens are consecutive.
    """
    if not isinstance(model, ImageTokensForConditionalGeneration):
        if hasattr(model, "visual_embeds"):  # ADEM-VL
            return model(input_ids, visual_embeds=model.image_features(pixel_values), **kwargs)
        return model(input_ids, pixel_values=pixel_values, **kwargs)
    images = {}
    if hasattr(model, "instruction"):  # IGVA
        images["instruction"] = model.instruction(input_ids, None, kwargs.pop("instruction_mask", None))
    if hasattr(model, "routing"):  # LaVIN
        kwargs["routing"] = model.routing(pixel_values.new_ones(len(pixel_values)), len(input_ids))
    features = model.image_features(pixel_values, **images)
    text = input_ids.masked_fill(input_ids == model.config.image_token_id, 0)
    before, _, after = model.get_input_embeddings()(text).tensor_split((first, first + features.shape[1]), dim=1)
    embeddings = torch.cat((before, features.to(before.dtype), after), dim=1)
    return LlavaForConditionalGeneration.forward(model, inputs_embeds=embeddings, **kwargs)


def training_step(model, optimizer, inputs: dict, now: Callable) -> dict[str, float]:
    """Forward, backward and update. Without an optimizer, backward to the input embeddings of a frozen model."""
    model.train()
    inputs = dict(inputs)
    start = now()
    if optimizer is None:
        inputs["inputs_embeds"] = model.get_input_embeddings()(inputs.pop("input_ids")).requires_grad_()
    model(**inputs).loss.backward()
    if optimizer is not None:
        optimizer.step()
        optimizer.zero_grad()
    return {"training step": now() - start}


def training_job(model, inputs: dict, now: Callable, **options) -> Callable[[], dict[str, float]]:
    """A training step with AdamW and its `options`, or without an optimizer if the model has no trained parameters."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, **options) if trained else None
    return partial(training_step, model, optimizer, inputs, now)


class TokenTimer(StoppingCriteria):
    """Records the time after each new token and never stops generation."""

    def __init__(self, now: Callable):
        self.now, self.times = now, []

    def __call__(self, input_ids, scores, **kwargs):
        self.times.append(self.now())
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer(model, inputs: dict, new_tokens: int, now: Callable) -> dict[str, float]:
    """Greedy `generate`. The first token includes the encoder and prefill; a ScienceQA answer has only this token."""
    model.eval()
    inputs = {name: tensor for name, tensor in inputs.items() if name != "labels"}
    timer = TokenTimer(now)
    start = now()
    model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False, stopping_criteria=[timer])
    seconds = {"first token": timer.times[0] - start, "whole answer": now() - start}
    if new_tokens > 1:
        seconds["further token"] = (timer.times[-1] - timer.times[0]) / (new_tokens - 1)
    return seconds


@torch.no_grad()
def prefill(model, inputs: dict, now: Callable) -> dict[str, float]:
    start = now()
    model(**inputs, use_cache=True, logits_to_keep=1)
    return {"prefill": now() - start}


def encode_images(model, inputs: dict) -> dict:
    """The inputs of a question about encoded images: `input_ids` and, with images, `visual_memory`."""
    encoded = {"input_ids": inputs["input_ids"]}
    if "pixel_values" in inputs:
        with torch.no_grad():
            encoded["visual_memory"] = model.get_image_features(inputs["pixel_values"]).pooler_output
    return encoded


@torch.no_grad()
def decoding_step(model, preset: Preset, num_steps: int, compiled: bool = False) -> Callable:
    """A function that decodes one token per row of a batch, after prefill, with a cache for `num_steps` tokens."""
    model.eval()
    inputs = make_inputs(model, preset, preset.patches_per_side[0], preset.decode_batch, preset.text_tokens[0])
    length = inputs["input_ids"].shape[1]
    room = length + num_steps
    cache = StaticCache(config=getattr(model.config, "text_config", model.config), max_cache_len=room)
    read = {}
    pixel_values = inputs.get("pixel_values")
    if isinstance(model, DehvfForConditionalGeneration):  # as in `generate`
        embeddings = model.get_input_embeddings()(inputs["input_ids"])
        memories, _ = model.model.read_images(embeddings, None, pixel_values, None, None, None)
        read, pixel_values = {"layer_memories": memories}, None
    images = {} if pixel_values is None else {"pixel_values": pixel_values}
    model(input_ids=inputs["input_ids"], cache=cache, use_cache=True, logits_to_keep=1, **read, **images)
    token = inputs["input_ids"][:, -1:].clone()
    # A mask of the full cache, since a mask of its filled part would have to be created on the host in each step
    mask = torch.ones(len(token), 1, 1, room, dtype=torch.bool, device=token.device)
    positions = torch.full_like(token, length)
    decode = torch.compile(model, backend=preset.compiler) if compiled else model

    @torch.no_grad()
    def step():
        arguments = {"attention_mask": mask, "position_ids": positions, "cache": cache, "use_cache": True}
        token.copy_(decode(input_ids=token, **arguments, **read).logits[:, -1:].argmax(dim=-1))

    return step


def make_clock(device: str, clock: str) -> Callable[[], float]:
    """A function that waits for the device and returns the wall time or the CPU time of this process in seconds."""
    read = {"wall": time.perf_counter, "cpu": time.process_time}[clock]

    def now() -> float:
        if device == "cuda":
            torch.cuda.synchronize()
        return read()

    return now


def time_steps(step: Callable, now: Callable, measure: str = "further token") -> dict[str, float]:
    """Mean seconds of a step, over `STEPS` consecutive ones."""
    start = now()
    for _ in range(STEPS):
        step()
    return {measure: (now() - start) / STEPS}


def interleave(
    jobs: dict[str, Callable], extra_seconds: float, least_rounds: int = ROUNDS
) -> dict[str, dict[str, list[float]]]:
    """Runs the jobs alternately, in an order that is reversed every round. Returns name -> measure -> seconds."""
    samples = {name: {measure: [] for measure in job()} for name, job in jobs.items()}  # this is the warm-up
    start, rounds = time.perf_counter(), 0
    while rounds < least_rounds or time.perf_counter() - start < extra_seconds:
        for name in list(jobs)[:: -1 if rounds % 2 else 1]:
            for measure, seconds in jobs[name]().items():
                samples[name][measure].append(seconds)
        rounds += 1
    return samples


# --- groups of jobs that are measured alternately ---


def measure_methods(models: dict, preset: Preset, now: Callable) -> dict:
    """Training and inference of all methods with the first number of patches and text tokens."""
    side, tokens = preset.patches_per_side[0], preset.text_tokens[0]
    jobs = {}
    for name in (TEXT_ONLY, DEHVF, MEMVP, LLAVA):
        inputs = make_inputs(models[name], preset, side, preset.training_batch, tokens)
        jobs[name] = training_job(models[name], inputs, now, fused=True)  # as in Trainer
    groups = measure_apart("training", jobs, preset)
    jobs = {}
    for name, model in models.items():
        inputs = make_inputs(model, preset, side, preset.inference_batch, tokens)
        jobs[name] = partial(answer, model, inputs, preset.new_tokens, now)
    return groups | measure_apart("inference", jobs, preset)


def measure_apart(group: str, jobs: dict, preset: Preset) -> dict:
    """
    Measures DEHVF with the slow LLaVA, and again with the other methods, whose small differences need more rounds.
    """
    slow = {name: job for name, job in jobs.items() if name in (DEHVF, LLAVA, MERGED)}
    fast = {name: job for name, job in jobs.items() if name not in (LLAVA, MERGED)}
    return {
        f"{group}, LLaVA": interleave(slow, preset.extra_seconds),
        group: interleave(fast, 3 * preset.extra_seconds),
    }


def measure_language_side(models: dict, preset: Preset, now: Callable) -> dict:
    """A question about an encoded image: prefill, decoding, and a whole answer to one question."""
    side, tokens = preset.patches_per_side[0], preset.text_tokens[0]
    jobs = {"prefill": {}, "decoding": {}, "second question": {}}
    for name in (TEXT_ONLY, DEHVF):
        model = models[name].eval()
        make = partial(make_inputs, model, preset, side)
        inputs = encode_images(model, make(preset.inference_batch, tokens))
        jobs["prefill"][name] = partial(prefill, model, inputs, now)
        for group, batch_size in (("decoding", preset.decode_batch), ("second question", 1)):
            inputs = encode_images(model, make(batch_size, tokens))
            inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
            jobs[group][name] = partial(answer, model, inputs, preset.new_tokens, now)
    return {group: interleave(group_jobs, preset.extra_seconds) for group, group_jobs in jobs.items()}


def measure_compiled_decoding(models: dict, preset: Preset, now: Callable) -> dict:
    num_steps = (ROUNDS + 1) * STEPS
    steps = {name: decoding_step(models[name], preset, num_steps, compiled=True) for name in (TEXT_ONLY, DEHVF)}
    return {"compiled decoding": interleave({name: partial(time_steps, steps[name], now) for name in steps}, 0)}


def measure_sweep(text: nn.Module, preset: Preset, now: Callable) -> list[dict]:
    """Answers of one token for each length of the text and two numbers of patches."""
    first, second, *_ = preset.patches_per_side
    points = []
    for side in (first, second):
        models = build_all((TEXT_ONLY, DEHVF, MERGED), preset, side, text)
        for tokens in sorted(preset.text_tokens):
            jobs = {}
            for name, model in models.items():
                inputs = make_inputs(model, preset, side, preset.sweep_batch, tokens)
                jobs[name] = partial(answer, model, inputs, 1, now)
            samples = interleave(jobs, 0)
            points.append({"patches": side**2, "text_tokens": tokens, "samples": samples})
    return points


def measure_growth(text: nn.Module, preset: Preset, now: Callable) -> dict:
    """Prefill of the language side for each number of patches, with as many memory slots, and a linear fit."""
    jobs = {}
    for side in preset.patches_per_side:
        config = make_config(preset, side)
        config.num_memory_slots = side**2
        model = build(DEHVF, config, random_base(AutoModel, config.vision_config, preset), text)
        inputs = make_inputs(model, preset, side, preset.inference_batch, preset.text_tokens[0])
        jobs[str(side**2)] = partial(prefill, model, encode_images(model, inputs), now)
    samples = interleave(jobs, preset.extra_seconds)
    patches = np.array([int(name) for name in samples])
    seconds = np.array([statistics.median(measures["prefill"]) for measures in samples.values()])
    slope, intercept = np.polyfit(patches, seconds, 1)
    ends = np.interp(patches, patches[[0, -1]], seconds[[0, -1]])
    deviation = 100 * np.abs(seconds - ends).max() / (seconds[-1] - seconds[0])
    return {
        "samples": samples,
        "seconds_per_patch": slope,
        "seconds_at_no_patch": intercept,
        "largest_deviation_in_percent": deviation,
        "is_linear": bool(deviation <= LARGEST_DEVIATION),
    }


# --- results ---


def compare(comparison: Comparison, groups: dict, preset: str) -> dict:
    """The comparison with its ratio and target. `met` is `None` if the preset has no target."""
    times, reference = (
        groups[comparison.group][name][comparison.measure] for name in (comparison.method, comparison.reference)
    )
    ratios = [one / other for one, other in zip(times, reference)]
    ratio = statistics.median(ratios)
    at_least, at_most = comparison.at_least.get(preset), comparison.at_most.get(preset)
    met = ratio >= at_least if at_least else ratio <= at_most if at_most else None
    return {
        **comparison._asdict(),
        **{"at_least": at_least, "at_most": at_most, "met": met},
        **{"ratio": ratio, "least": min(ratios), "greatest": max(ratios)},
    }


def median_ms(samples: list[float]) -> str:
    return f"{1e3 * statistics.median(samples):,.1f}"


def markdown(report: dict) -> str:
    groups, growth = report["groups"], report["growth"]
    verdict = {True: "met", False: "**missed**", None: "–"}
    comparisons = []
    for row in report["comparisons"]:
        target = f"≥ {row['at_least']}" if row["at_least"] else f"≤ {row['at_most']}" if row["at_most"] else "–"
        ratio = f"{row['ratio']:.3f} ({row['least']:.3f} to {row['greatest']:.3f})"
        comparisons.append([row["what"], row["method"], row["reference"], ratio, target, verdict[row["met"]]])
    deviation, limit = growth["largest_deviation_in_percent"], f"≤ {LARGEST_DEVIATION} % (ours)"
    what = "growth with the patches: deviation from a straight line"
    comparisons.append([what, "DEHVF", "", f"{deviation:.1f} % of it", limit, verdict[growth["is_linear"]]])

    methods, measures = [], ("first token", "further token", "whole answer")
    for name, trained in report["trained_parameters"].items():
        step = (groups["training, LLaVA"] | groups["training"]).get(name)
        answers = (groups["inference, LLaVA"] | groups["inference"])[name]
        cells = [name, f"{trained:,}", median_ms(step["training step"]) if step else "–"]
        methods.append([*cells, *(median_ms(answers[measure]) for measure in measures)])

    language_side = []
    for name in (TEXT_ONLY, DEHVF):
        second = groups["second question"][name]
        samples = groups["prefill"][name]["prefill"], groups["decoding"][name]["further token"], second["first token"]
        language_side.append([name, *map(median_ms, samples), median_ms(second["whole answer"])])

    sweep = []
    for point in report["sweep"]:
        samples = {name: measures["first token"] for name, measures in point["samples"].items()}
        ratio = statistics.median(one / other for one, other in zip(samples[MERGED], samples[DEHVF]))
        sizes = f"{point['patches']:,}", str(point["text_tokens"])
        sweep.append([*sizes, *map(median_ms, samples.values()), f"{ratio:.2f}"])

    lines = [
        *heading(report["command"], report["note"]),
        *("## Ratios", ""),
        *table(("", "of", "over", "median of the rounds' ratios (least to greatest)", "target", ""), comparisons),
        *("", "## Methods", "", "Milliseconds per batch.", ""),
        *table(("", "trained", "training step", *measures), methods),
        *("", "## Language side, with an encoded image", "", "Milliseconds per batch.", ""),
        *table(("", "prefill", "decoding step", "second question: first token", "whole answer"), language_side),
        *("", "## Answer of one token, by patches and text", "", "Milliseconds per batch, encoder included.", ""),
        *table(("patches", "text tokens", *report["sweep"][0]["samples"], f"{MERGED} over DEHVF"), sweep),
        *("", "## Growth with the patches: prefill, language side", ""),
        *table(
            ("patches (and slots)", "milliseconds per batch"),
            [(f"{int(name):,}", median_ms(row["prefill"])) for name, row in growth["samples"].items()],
        ),
        "",
        f"{1e5 * growth['seconds_per_patch']:.2f} ms per batch for each 100 patches; the largest deviation from a "
        f"straight line is {deviation:.1f} % of the growth.",
    ]
    return "\n".join(lines) + "\n"


def draw(report: dict, file: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 5), dpi=110, layout="constrained")
    ratios, patches = figure.subplots(1, 2)
    rows = report["comparisons"][::-1]
    for position, row in enumerate(rows):
        color = {True: "tab:green", False: "tab:red", None: "tab:blue"}[row["met"]]
        ratios.plot((row["least"], row["greatest"]), (position, position), color=color, alpha=0.4, linewidth=4)
        ratios.plot(row["ratio"], position, "o", color=color)
        if target := row["at_least"] or row["at_most"]:
            ratios.plot(target, position, "|", color="black", markersize=14)
    labels = [f"{row['what']}: {row['method']} over {row['reference']}" for row in rows]
    ratios.set_yticks(range(len(rows)), labels, fontsize=8)
    ratios.set_title("Ratios of time: median, minimum to maximum; target (black)")

    growth = report["growth"]
    numbers = [int(name) for name in growth["samples"]]
    seconds = [statistics.median(row["prefill"]) for row in growth["samples"].values()]
    patches.plot(numbers, seconds, "o", color="tab:blue", label="DEHVF")
    ends = np.array([0, numbers[-1]])
    line = growth["seconds_at_no_patch"] + growth["seconds_per_patch"] * ends
    patches.plot(ends, line, "--", color="tab:blue", label="straight line")
    patches.set_title("Prefill, language side: seconds per batch")
    patches.set_xlabel("patches (and memory slots)")
    patches.set_ylim(bottom=0)
    patches.grid(alpha=0.3)
    patches.legend(fontsize=9)
    figure.suptitle(f"Preset `{report['preset']}`, {report['threads']} threads, {report['clock']} time")
    figure.savefig(file)


def report_name(benchmark: str, preset: str, default: str = "small") -> str:
    """The name of a report, so that another preset than the default does not replace the report of that."""
    return benchmark if preset == default else f"{benchmark}-{preset}"


def note(name: str, preset: Preset, clock: str) -> str:
    unmeasured = [other for other, sizes in PRESETS.items() if sizes.device == "cuda" and other != name]
    return (
        f"Preset `{name}` with random weights in {str(preset.dtype).removeprefix('torch.')}: {clock} time, medians of "
        f"at least {ROUNDS} rounds; the methods are measured alternately. {preset.patches_per_side[0] ** 2} patches "
        f"and {preset.text_tokens[0]} text tokens unless stated otherwise; batches of {preset.training_batch} in "
        f"training, {preset.inference_batch} in inference and prefill, {preset.decode_batch} in decoding, "
        f"{preset.sweep_batch} for the answers by patches and text tokens, 1 for the second question; a whole answer "
        f"has {preset.new_tokens} tokens. Training is forward, backward and AdamW; for the language model alone, "
        "which has no trained parameters, forward and backward to its input embeddings. Inference is `generate`, "
        "encoder included; a ScienceQA answer has only the first token. Compiled: the forward of one token with a "
        f"static cache, compiled with {preset.compiler} for both methods. MemVP and DEHVF both run as the model of "
        f"this repository. {machine_in_words()}. Not measured here: "
        f"{' and '.join(f'`{other}`' for other in unmeasured)}, which need one CUDA device."
    )


def measure(name: str, preset: Preset, clock: str) -> dict:
    now = make_clock(preset.device, clock)
    side = preset.patches_per_side[0]
    text = random_base(AutoModelForCausalLM, make_config(preset, side).text_config, preset)
    models = build_all((TEXT_ONLY, DEHVF, MEMVP, LLAVA, MERGED), preset, side, text)
    groups = measure_methods(models, preset, now) | measure_language_side(models, preset, now)
    groups |= measure_compiled_decoding(models, preset, now)
    trained = {name: count_trained(model) for name, model in models.items()}
    del models
    return {
        "trained_parameters": trained,
        "groups": groups,
        "comparisons": [compare(comparison, groups, name) for comparison in COMPARISONS],
        "sweep": measure_sweep(text, preset, now),
        "growth": measure_growth(text, preset, now),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", choices=PRESETS, default="small")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="number of CPU threads")
    parser.add_argument(
        "--clock", choices=("wall", "cpu"), default="wall", help="cpu: CPU time of this process, summed over its cores"
    )
    arguments = parser.parse_args()
    require_writable(RESULTS)
    preset = PRESETS[arguments.preset]
    if preset.device == "cuda" and not torch.cuda.is_available():
        sys.exit(
            f"The preset `{arguments.preset}` needs one CUDA device with enough memory for its weights in bfloat16, "
            "and none is available. Use `--preset small`, which runs on a CPU."
        )
    if preset.device == "cuda" and arguments.clock == "cpu":
        sys.exit("`--clock cpu` does not include the time of a CUDA device. Use `--clock wall`.")
    torch.set_num_threads(arguments.threads)
    report = {
        "command": command_line("speed"),
        "preset": arguments.preset,
        "threads": arguments.threads,
        "clock": arguments.clock,
        "note": note(arguments.preset, preset, arguments.clock),
        **measure(arguments.preset, preset, arguments.clock),
    }
    save_report(RESULTS, report_name("speed", arguments.preset), report, markdown, draw)


if __name__ == "__main__":
    main()
