# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Compares the methods, the ablations and variants of the fuser on pretrained bases, SmolLM2-135M-Instruct and
DINOv2-small (docs/bases.md), with two data sets: the published pictures and questions of easy-VQA, and questions about
the drawings of Noto Emoji (created by `python examples/emoji.py outputs/emoji-data`), which are tested on other
drawings.

    python -m benchmarks.pretrained                     # trains the missing runs, then writes the tables
    python -m benchmarks.pretrained --rows DEHVF MemVP --seeds 3 --at-once 2
    python -m benchmarks.pretrained --dtype bfloat16 --only-scores --rows "emoji: MemVP"
    python -m benchmarks.pretrained --report            # writes the tables from the existing runs

On a GPU, eight simultaneous runs of easy-VQA took 160 seconds (one H200). On a CPU with bfloat16 instructions, a run
with the drawings takes about 18 minutes on one core with `--dtype bfloat16`, 13 with `--only-scores`; one with
easy-VQA takes hours. All rows with the same batch size train on the same questions in the same order, with the
optimizer of `train.py`. During a run, the accuracy on the first 1,000 test questions is written ten times to a file in
`outputs/pretrained`, which is kept if the run is stopped. When the command is run again, it only trains the runs that
are not finished. The tables are written to `benchmarks/results`: `pretrained.json`, `.md` and `.png`. Runs in bfloat16
have a row of their own.

An answer is correct if the most likely next token is the first token of the expected answer. This is unambiguous,
since the answers of each data set have different first tokens.
"""

import argparse
import dataclasses
import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from multiprocessing.pool import ThreadPool
from pathlib import Path

import datasets
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModel, AutoModelForCausalLM

from baselines import METHODS as BASELINES
from baselines import BaselineArguments, assemble
from benchmarks import (
    RESULTS,
    fusers,
    heading,
    machine_in_words,
    positive,
    read_report,
    require_writable,
    save_report,
    spread,
    table,
)
from benchmarks.fusion import replacements
from benchmarks.speed import forward_on_device, with_same_weights
from dehvf import ROOT, DehvfConfig, DehvfForConditionalGeneration, DehvfProcessor
from examples import emoji
from tasks import easy_vqa, write_json
from training.arguments import DEHVF_METHODS
from training.checkpoints import read_json
from training.data import read_image
from training.encoding import RowEncoder
from training.fusion import fusion_figures


RUNS = ROOT / "outputs" / "pretrained"
VISION_MODEL, TEXT_MODEL = (ROOT / "assets" / "real" / name for name in ("dinov2-small", "smollm2-135m-instruct"))
EMOJI = ROOT / "outputs" / "emoji-data"
CHAT_TEMPLATE = ROOT / "recipes" / "question-answer.jinja"
SEEDS = (0, 1, 2)
DTYPES = ("float32", "bfloat16")
EVALUATIONS, EVALUATION_BATCH = 10, {"cuda": 1024, "cpu": 32}
FIRST_QUESTIONS, REPLACED_QUESTIONS = 1000, 2000  # of the test split: during training, and with replaced weights
OWN = "its own"  # the fuser's own weights
SPLITS = ("train", "test")
LEARNED = 95  # accuracy in %, for the column "questions until"


@dataclass(frozen=True)
class Task:
    """
    load: reads the rows of a split, each with `question`, `answer`, `image` and `image_id`. The rows of one image are
        consecutive.
    kinds: answer -> kind of question.
    """

    load: Callable[[str], datasets.Dataset]
    kinds: dict[str, str]


def load_emoji(split: str) -> datasets.Dataset:
    file = EMOJI / f"{split}.jsonl"
    if not file.exists():
        sys.exit(f"There is no {file}. Run `python examples/emoji.py outputs/emoji-data`.")
    rows = []
    for line in file.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        question, answer = (message["content"] for message in row["messages"])
        rows.append(
            {"question": question, "answer": answer, "image": str(EMOJI / row["image"]), "image_id": row["image"]}
        )
    rows.sort(key=lambda row: row["image_id"])
    return datasets.Dataset.from_list(rows).cast_column("image", datasets.Image())


TASKS = {
    "easy-VQA": Task(easy_vqa.load, easy_vqa.TYPES),
    "emoji": Task(load_emoji, {**dict.fromkeys(emoji.KINDS.values(), "kind"), "yes": "yes/no", "no": "yes/no"}),
}


def kinds_of(task: str) -> list[str]:
    return list(dict.fromkeys(TASKS[task].kinds.values()))


@dataclass(frozen=True)
class Row:
    """
    method: `--method` of `train.py`.
    values: fields of `DehvfConfig`, which override `SETTING`, or of `BaselineArguments`.
    rate: learning rate.
    fuser_ratio: learning rate of the fuser and its query, as a fraction of `rate`.
    beta2: the second beta of AdamW.
    max_grad_norm: norm to which gradients are clipped; 0 means no clipping.
    fuser: one of `benchmarks.fusers.VARIANTS`, or "the paper's".
    batch_size: questions per step.
    steps: number of training steps.
    task: one of `TASKS`.
    """

    method: str = "dehvf"
    values: dict = field(default_factory=dict)
    rate: float = 5e-4
    fuser_ratio: float = 0.1
    beta2: float = 0.95
    max_grad_norm: float = 1.0
    fuser: str = "the paper's"
    batch_size: int = 16
    steps: int = 2000
    task: str = "easy-VQA"

    @property
    def image_size(self) -> int:
        return self.values.get("image_size", SETTING["image_size"])


# The pictures have 64 x 64 pixels and show one shape; 56 pixels give 4 x 4 patches of 14 pixels
SETTING = {"image_size": 56, "num_memory_slots": 16, "visual_scale": 0.3, "memory_scale": 1.0}
SETTING |= {"memory_dropout": 0.0, "vision_adapter_dropout": 0.0}
# All have about as many trained parameters as DEHVF, except IGVA, whose projector alone has more
METHODS = {
    "DEHVF": Row(),
    "MemVP": Row("memvp"),
    "LLaVA-LoRA": Row("llava-lora"),
    "LaVIN": Row("lavin", rate=2.5e-3),
    "LLaMA-Adapter": Row("llama-adapter", {"adaption_prompt_length": 20, "adaption_projector_size": 80}, rate=2.5e-3),
    "ADEM-VL": Row("adem-vl", {"adem_adapter_size": 24, "adem_projector_size": 128}, rate=2e-3),
    "IGVA": Row("igva", {"igva_hidden_size": 64}),
}
ABLATIONS = {
    "mean weights": Row(values={"layer_fusion": "mean"}),
    "keys only": Row(values={"visual_prompts": "keys"}),
    "values only": Row(values={"visual_prompts": "values"}),
    "keys and values the same": Row(values={"visual_prompts": "shared"}),
    "learnable tokens": Row(values={"fuser_query": "tokens"}),
    "instruction in place of the layer": Row("dehvf-instruction"),
    "layer + instruction": Row("layer+instruction"),
    "K = 1": Row(values={"num_groups": 1}),
    "K = 2": Row(values={"num_groups": 2}),
    "random mapping": Row(values={"layer_mapping": "random"}),
    "without visual prompts": Row(values={"visual_prompts": "none"}),
}
OTHER_RATES = {"DEHVF": 1e-3, "MemVP": 2.5e-4, "LLaVA-LoRA": 1e-3, "LaVIN": 1e-3, "LLaMA-Adapter": 1e-3}
OTHER_RATES |= {"ADEM-VL": 1e-3, "IGVA": 1e-3, "mean weights": 2.5e-4}
# (`visual_scale`, `memory_scale`, rate)
SCALES = [(0.3, 1.0, 1e-3), (0.3, 1.0, 2e-3), (0.3, 0.3, 2e-3), (0.3, 0.3, 4e-3), (0.3, 0.1, 4e-3)]
SCALES += [(0.1, 1.0, 2e-3), (0.1, 1.0, 4e-3), (0.1, 0.3, 3e-3), (0.1, 0.3, 6e-3), (0.1, 0.1, 6e-3)]
OPTIMIZERS = {
    "beta2 0.999": Row(beta2=0.999),
    "no clipping": Row(max_grad_norm=0.0),
    "no clipping, beta2 0.999": Row(max_grad_norm=0.0, beta2=0.999),
    "no clipping, beta2 0.999, batches of 64, rate 0.001": Row(
        max_grad_norm=0.0, beta2=0.999, rate=1e-3, batch_size=64, steps=1200
    ),
    "no clipping, beta2 0.999, scales 0.1 and 1, rate 0.001": Row(
        values={"visual_scale": 0.1}, max_grad_norm=0.0, beta2=0.999, rate=1e-3
    ),
}
ZERO = {"projector_initializer": "zero"}
ZERO_START = {
    "zero start": Row(values=ZERO),
    "zero start, rate 0.001": Row(values=ZERO, rate=1e-3),
    "zero start, rate 0.002": Row(values=ZERO, rate=2e-3),
    "zero start, rate 0.001, beta2 0.999": Row(values=ZERO, rate=1e-3, beta2=0.999),
    "zero start, rate 0.001, no clipping": Row(values=ZERO, rate=1e-3, max_grad_norm=0.0),
    "zero start, rate 0.001, fuser: pre-norm": Row(values=ZERO, rate=1e-3, fuser="pre-norm"),
    "zero start, mean weights, rate 0.001": Row(values={**ZERO, "layer_fusion": "mean"}, rate=1e-3),
}
EMOJI_ROWS = METHODS | {
    name: dataclasses.replace(row, values={"visual_scale": 0.1, "memory_scale": 0.3, **row.values}, rate=3e-3)
    for name, row in {**METHODS, **ABLATIONS}.items()
    if row.method in DEHVF_METHODS
}
EMOJI_ROWS |= {
    "zero start": dataclasses.replace(EMOJI_ROWS["DEHVF"], values={**EMOJI_ROWS["DEHVF"].values, **ZERO}),
    "DEHVF, clipping to 0.1": dataclasses.replace(EMOJI_ROWS["DEHVF"], max_grad_norm=0.1),
    "DEHVF, fuser ratio 0.02": dataclasses.replace(EMOJI_ROWS["DEHVF"], fuser_ratio=0.02),
    "MemVP, rate 0.001": dataclasses.replace(EMOJI_ROWS["MemVP"], rate=1e-3),
    "LLaVA-LoRA": dataclasses.replace(METHODS["LLaVA-LoRA"], rate=1e-3),
}
EASY_VQA_TABLE, EMOJI_TABLE = "Methods, ablations and fusers on easy-VQA", "Emoji: drawings that were not trained on"
TABLES = {
    EASY_VQA_TABLE: {
        **METHODS,
        **ABLATIONS,
        **{
            f"{name}, rate {rate:g}": dataclasses.replace({**METHODS, **ABLATIONS}[name], rate=rate)
            for name, rate in OTHER_RATES.items()
        },
        "fuser: the paper's at the full rate": Row(fuser_ratio=1.0),
        **{f"fuser: {name}": Row(fuser=name) for name in fusers.VARIANTS},
        "batches of 64, rate 0.001": Row(rate=1e-3, batch_size=64, steps=1200),
    },
    "DEHVF with other optimizer settings on easy-VQA": OPTIMIZERS,
    "DEHVF with a projector that starts at zero on easy-VQA": ZERO_START,
    "DEHVF with other scales and rates on easy-VQA": {
        f"scales {visual:g} and {memory:g}, rate {rate:g}": Row(
            values={"visual_scale": visual, "memory_scale": memory}, rate=rate, batch_size=64, steps=600
        )
        for visual, memory, rate in SCALES
    },
    EMOJI_TABLE: {
        f"emoji: {name}": dataclasses.replace(row, batch_size=64, steps=285, task="emoji")
        for name, row in EMOJI_ROWS.items()
    },
}
ROWS = {name: row for rows in TABLES.values() for name, row in rows.items()}


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """
    The encoded questions of a split. They need no attention mask: they are padded on the right, attention is causal,
    and padding has no label.

    ids, labels: token ids of each question with its answer, `(num_questions, max_length)`; labels are -100 outside the
        answer.
    kinds: kind of each question, see [`Task`].
    image_rows: index in `pixel_values` of the picture that each question is about.
    pixel_values: each picture once, in half precision: 5,000 pictures of 518 pixels are 16 GB in float32.
    """

    ids: torch.Tensor
    labels: torch.Tensor
    kinds: list[str]
    image_rows: torch.Tensor
    pixel_values: torch.Tensor

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def num_kept(self) -> int:
        """Number of positions from the earliest start of an answer to the end."""
        return self.ids.shape[1] - (self.labels != -100).int().argmax(dim=1).min().item()

    def to(self, device) -> "Questions":
        moved = (getattr(self, name).to(device) for name in ("ids", "labels", "image_rows", "pixel_values"))
        ids, labels, image_rows, pixel_values = moved
        return Questions(ids, labels, self.kinds, image_rows, pixel_values)

    def batch(self, rows: torch.Tensor, image_tokens: list[int]) -> dict[str, torch.Tensor]:
        rows = rows.to(self.ids.device)
        ids, labels = self.ids[rows], self.labels[rows]
        if image_tokens:  # after the first token, which may be BOS
            image_ids = torch.tensor(image_tokens, device=ids.device).expand(len(rows), -1)
            ids = torch.cat((ids[:, :1], image_ids, ids[:, 1:]), dim=1)
            labels = torch.cat((torch.full_like(image_ids, -100), labels), dim=1)
        return {"input_ids": ids, "labels": labels, "pixel_values": self.pixel_values[self.image_rows[rows]].float()}


def load_questions(task: Task, split: str, processor) -> Questions:
    rows = task.load(split)
    encoder = RowEncoder(easy_vqa, split, processor, max_prompt_length=64, training=True)
    encoded = encoder.encode(rows.remove_columns("image"))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    numbers, entries = rows["image_id"][:], dict(zip(rows["image_id"][:], rows["image"][:]))
    image_rows = {number: row for row, number in enumerate(entries)}

    def pixels(entry) -> torch.Tensor:
        return processor(images=[read_image(entry)], return_tensors="pt")["pixel_values"][0].half()

    with ThreadPool() as pool:
        pixel_values = torch.stack(pool.map(pixels, entries.values()))
    ids = [torch.tensor(tokens) for tokens in encoded["input_ids"][:]]
    is_answer = [torch.tensor(flags, dtype=torch.bool) for flags in encoded["is_answer"][:]]
    labels = [tokens.where(flags, -100) for tokens, flags in zip(ids, is_answer)]
    return Questions(
        pad_sequence(ids, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        [task.kinds[answer] for answer in rows["answer"][:]],
        torch.tensor([image_rows[number] for number in numbers]),
        pixel_values,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def build(row: Row, seed: int, vision: nn.Module, text: nn.Module) -> nn.Module:
    """A model with newly initialised trained modules on the given bases, which are not changed."""
    torch.manual_seed(seed)
    vision, text = with_same_weights(vision), with_same_weights(text)
    if row.method in BASELINES:
        return assemble(row.method, vision, text, BaselineArguments(**row.values), SETTING["image_size"])
    values = {**SETTING, **DEHVF_METHODS[row.method], **row.values}
    if values.get("layer_mapping") == "random":
        values["layer_mapping_seed"] = seed
    with text.device:
        model = DehvfForConditionalGeneration(
            DehvfConfig(vision_config=vision.config, text_config=text.config, **values), vision, text
        )
        if row.fuser in fusers.VARIANTS:
            fusers.replace_fuser(model, row.fuser)
    return model


def make_optimizer(model, row: Row) -> torch.optim.Optimizer:
    """AdamW as in the recipes. Learning rates are tensors, so that a CUDA graph reads their current values."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = row.rate * (row.fuser_ratio if "fuser" in name else 1)
            groups.setdefault((rate, 0.02 if parameter.ndim > 1 else 0.0), []).append(parameter)
    groups = [
        {"params": params, "peak": rate, "lr": torch.tensor(rate, device=model.device), "weight_decay": decay}
        for (rate, decay), params in groups.items()
    ]
    return torch.optim.AdamW(groups, betas=(0.9, row.beta2), fused=True, capturable=model.device.type == "cuda")


def rate_factor(step: int, steps: int) -> float:
    """Factor of the learning rate: linear warm-up for 3 % of the steps, then cosine decay almost to 0."""
    warmup = math.ceil(0.03 * steps)
    return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / steps)))


class Step:
    """
    Forward, backward and optimizer step of a batch. On a GPU, they are captured as a CUDA graph, since launching the
    kernels one by one takes longer than running them.
    """

    def __init__(self, run: "Run"):
        self.run, self.calls, self.graph = run, 0, None

    def __call__(self, batch: dict) -> torch.Tensor:
        self.calls += 1
        if self.run.stream is None or self.calls <= 3:
            return self.update(batch)
        if self.graph is None:
            self.batch = {name: tensor.clone() for name, tensor in batch.items()}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=self.run.stream):
                self.loss = self.update(self.batch)
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.graph.replay()
        return self.loss.clone()

    def update(self, batch: dict) -> torch.Tensor:
        self.run.optimizer.zero_grad(set_to_none=False)  # the graph always writes to the same gradient tensors
        logits, labels = self.run.logits(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        if self.run.row.max_grad_norm:
            nn.utils.clip_grad_norm_(self.run.parameters, self.run.row.max_grad_norm)
        self.run.optimizer.step()
        return loss.detach()


class Run:
    """A training run of one row with one seed. On a GPU, it has its own stream, so that several runs can overlap."""

    def __init__(self, row: Row, seed: int, bench: "Bench"):
        self.row, self.seed, self.bench = row, seed, bench
        self.stream = torch.cuda.Stream() if bench.device.type == "cuda" else None
        with self.on_stream():
            self.model = build(row, seed, bench.vision, bench.text).to(bench.device)
            self.image_tokens = getattr(self.model, "image_tokens", [])
            self.optimizer = make_optimizer(self.model, row)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def on_stream(self):
        return nullcontext() if self.stream is None else torch.cuda.stream(self.stream)

    def logits(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and labels of the last `num_kept` positions, which contain all answers."""
        labels, kept = batch["labels"], self.bench.num_kept
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
        if getattr(self.model.config, "reads_instruction", False):
            inputs["instruction_mask"] = ((labels != -100).cumsum(dim=1) == 0).long()
        # With a cache, transformers does not check for packed sequences, which would synchronize with the GPU
        options = {"logits_to_keep": kept + 1, "use_cache": not self.model.training}
        logits = forward_on_device(self.model, **inputs, first=1, **options).logits[:, :-1].float()
        return logits, labels[:, -kept:]

    def batches(self) -> Iterator[dict]:
        generator, questions = torch.Generator().manual_seed(self.seed), self.bench.train
        while True:
            order = torch.randperm(len(questions), generator=generator).to(self.bench.device)
            for rows in order.split(self.row.batch_size):
                if len(rows) == self.row.batch_size:
                    yield questions.batch(rows, self.image_tokens)

    def train(self, file: Path, only_scores: bool = False) -> Iterator[None]:
        """
        Trains one step per iteration. The result of each evaluation is written to the file at the next one, since
        waiting for the GPU would delay the other runs. With `only_scores`, there is only one evaluation, at the end,
        and the fusion weights are not replaced.
        """
        report = {"row": dataclasses.asdict(self.row), "seed": self.seed, "machine": machine_in_words()}
        report |= {"dtype": self.bench.dtype, "curve": []}
        report |= {"trained_parameters": sum(parameter.numel() for parameter in self.parameters)}
        step, losses, seconds, batches, point = Step(self), [], [], self.batches(), None
        self.model.train()
        for number in range(1, self.row.steps + 1):
            with self.on_stream():
                for group in self.optimizer.param_groups:
                    group["lr"].fill_(group["peak"] * rate_factor(number - 1, self.row.steps))
                began = time.perf_counter()
                losses.append(step(next(batches)))
                seconds.append(time.perf_counter() - began)
                if not only_scores and number * EVALUATIONS % self.row.steps < EVALUATIONS:
                    self.record(report, point, file)
                    point = number, torch.stack(losses[-50:]).mean(), *self.evaluate(FIRST_QUESTIONS)
            yield
        with self.on_stream():
            self.record(report, point, file)
            right, weights = self.evaluate()
            report["scores"] = self.scores(right)
            if self.bench.device.type == "cpu":  # a GPU overlaps the steps of several runs
                report["seconds_per_step"] = round(statistics.median(seconds), 3)
            if weights is not None:
                report["fusion"] = self.figures(weights)
            if weights is not None and not only_scores:
                report["replaced_questions"] = min(REPLACED_QUESTIONS, len(right))
                report["replaced"] = {OWN: self.scores(right[:REPLACED_QUESTIONS])["average"]}
                for name, other in replacements(weights, self.model.model.hierarchy.rows).items():
                    right, _ = self.evaluate(REPLACED_QUESTIONS, other)
                    report["replaced"][name] = self.scores(right)["average"]
        write_json(file, report)

    def record(self, report: dict, point: tuple | None, file: Path):
        """Appends an evaluation to the curve of the report and writes the file."""
        if point is not None:
            number, loss, right, weights = point
            scores, figures = self.scores(right), self.figures(weights)
            report["curve"].append({"step": number, "loss": round(loss.item(), 4), **scores, **figures})
            write_json(file, report)

    def figures(self, weights: torch.Tensor | None) -> dict:
        return {} if weights is None else fusion_figures(weights, self.model.model.hierarchy.rows)

    def scores(self, right: torch.Tensor) -> dict[str, float]:
        """Accuracy in % for each kind of question and for all (`average`), from whether each answer is correct."""
        right = right.tolist()
        hits = list(zip(right, self.bench.test.kinds))
        by_kind = {kind: [hit for hit, other in hits if other == kind] for kind in kinds_of(self.row.task)}
        scores = {kind: round(100 * statistics.mean(hits), 2) for kind, hits in by_kind.items() if hits}
        return {**scores, "average": round(100 * statistics.mean(right), 2)}

    @torch.no_grad()
    def evaluate(self, limit: int | None = None, replacement: torch.Tensor | None = None):
        """
        Args:
            limit: number of questions of the test split; by default all.
            replacement: weights to use instead of the fuser's own, for each picture of the split.

        Returns:
            Whether each question is answered correctly, and the fuser's own weights for each picture, `None` without a
            fuser.
        """
        questions, all_weights, right = self.bench.test, [], []
        batch_size = EVALUATION_BATCH[self.bench.device.type]

        def replace(module, arguments, weights):
            all_weights.append(weights)
            return weights if replacement is None else replacement[questions.image_rows[rows]].to(weights)

        fuser = getattr(self.model.model, "fuser", None)
        handle = None if fuser is None else fuser.register_forward_hook(replace)
        self.model.eval()
        for rows in torch.arange(len(questions), device=self.bench.device)[:limit].split(batch_size):
            logits, labels = self.logits(questions.batch(rows, self.image_tokens))
            first = (labels != -100).int().argmax(dim=1, keepdim=True)
            right.append((logits.argmax(dim=-1).gather(1, first) == labels.gather(1, first)).flatten())
        self.model.train()
        if handle is not None:
            handle.remove()
        right = torch.cat(right)
        if not all_weights:
            return right, None
        # All questions about a picture have the same weights
        weights = torch.cat(all_weights)
        by_image = weights.new_zeros(len(questions.pixel_values), *weights.shape[1:])
        by_image[questions.image_rows[: len(right)]] = weights
        return right, by_image[: self.bench.test_images[len(right) - 1] + 1]


class Bench:
    """What runs share: the bases and the questions, with pictures of one size, on one device."""

    def __init__(self, questions: dict[str, Questions], vision: nn.Module, text: nn.Module):
        self.vision, self.text, self.device = vision, text, text.device
        self.dtype = str(text.dtype).removeprefix("torch.")
        self.num_kept = max(split.num_kept for split in questions.values())
        self.train, self.test = (questions[split].to(self.device) for split in SPLITS)
        self.test_images = questions["test"].image_rows  # on the host, in ascending order


def load_bases(device: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module]:
    """The vision encoder and the language model, frozen."""
    places = {VISION_MODEL: AutoModel, TEXT_MODEL: AutoModelForCausalLM}
    bases = (auto.from_pretrained(place, dtype=dtype).to(device) for place, auto in places.items())
    return tuple(base.requires_grad_(False) for base in bases)


def require_bases():
    """Exits if a pretrained base is missing."""
    if missing := [place for place in (VISION_MODEL, TEXT_MODEL) if not place.exists()]:
        sys.exit(f"There is no {missing[0]}. Run `python -m assets.real_bases`, see docs/bases.md.")


def file_of(name: str, seed: int, dtype: str = "float32") -> Path:
    end = "" if dtype == "float32" else f"-{dtype}"
    return RUNS / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") / f"seed-{seed}{end}.json"


def read_run(file: Path, row: Row) -> dict | None:
    """The results of a run with the current values of its row, finished or not, or `None`."""
    run = read_json(file)
    return run if run and has_values(run, row) else None


def dtype_of(run: dict) -> str:
    return run.get("dtype", "float32")  # runs of earlier versions have none


def has_values(run: dict, row: Row) -> bool:
    """Whether a run has the current values of its row."""
    # Runs of earlier versions lack later fields, and had their default values
    return {**dataclasses.asdict(Row()), **run["row"]} == dataclasses.asdict(row)


def train_missing(
    rows: dict[str, Row], seeds: list[int], at_once: int, only_scores: bool = False, dtype: str = DTYPES[0]
):
    """
    Trains the runs that are not finished, `at_once` at the same time. `only_scores`: see [`Run.train`]. `dtype`: of
    the bases; trained modules are in float32.
    """
    # Seed by seed, so that the tables of a stopped benchmark are complete with fewer seeds
    runs = [(name, row, seed, file_of(name, seed, dtype)) for seed in seeds for name, row in rows.items()]
    missing = [
        (name, row, seed, file) for name, row, seed, file in runs if "scores" not in (read_run(file, row) or {})
    ]
    print(f"{len(runs) - len(missing)} runs are finished, {len(missing)} are missing.", flush=True)
    if not missing:
        return
    device, precision = "cuda" if torch.cuda.is_available() else "cpu", torch.get_float32_matmul_precision()
    if device == "cuda":
        torch.set_float32_matmul_precision("high")
    bases, benches, active, done = load_bases(device, getattr(torch, dtype)), {}, {}, object()
    for task, size in {(row.task, row.image_size) for _, row, *_ in missing}:
        processor = load_processor(size)
        questions = {split: load_questions(TASKS[task], split, processor) for split in SPLITS}
        benches[task, size] = Bench(questions, *bases)
    while active or missing:
        while missing and len(active) < at_once:
            name, row, seed, file = missing.pop(0)
            file.parent.mkdir(parents=True, exist_ok=True)
            if "scores" in read_json(file):
                sys.exit(f"{file} is a finished run of {name} with other values. Move it away first.")
            active[name, seed] = Run(row, seed, benches[row.task, row.image_size]).train(file, only_scores)
        for (name, seed), steps in list(active.items()):
            if next(steps, done) is done:
                del active[name, seed]
                print(f"{name}, seed {seed}: done", flush=True)
    torch.set_float32_matmul_precision(precision)


def load_processor(image_size: int) -> DehvfProcessor:
    return DehvfProcessor.from_vision_text_pretrained(
        str(VISION_MODEL),
        str(TEXT_MODEL),
        image_size=image_size,
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def last_point(run: dict) -> dict:
    """The scores, fusion figures and steps of a run at its end or, if it was stopped, at its last evaluation."""
    if "scores" not in run:
        return run["curve"][-1]
    return {**run["scores"], **run.get("fusion", {}), "step": run["row"]["steps"]}


def questions_until(run: dict) -> int | None:
    """Number of training questions until the accuracy on the first test questions reached `LEARNED`."""
    steps = [point["step"] for point in run["curve"] if point["average"] >= LEARNED]
    return run["row"]["batch_size"] * steps[0] if steps else None


def best_replacement(accuracy: dict[str, float]) -> float:
    """Difference in accuracy between the best replacement of the fusion weights and the fuser's own weights."""
    return max(value for name, value in accuracy.items() if name != OWN) - accuracy[OWN]


def split_by_dtype(runs: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """The runs of each row, with those in bfloat16 in a row of their own."""
    split = {}
    for name, found in runs.items():
        for run in found:
            end = "" if dtype_of(run) == "float32" else f", {dtype_of(run)}"
            split.setdefault(name + end, []).append(run)
    return split


def markdown(report: dict) -> str:
    lines = heading(report["command"], report["note"])
    for title, rows in TABLES.items():
        if found := {name: report["runs"][name] for name in rows if name in report["runs"]}:
            lines += [f"## {title}", "", *accuracy_table(split_by_dtype(found)), ""]
    by_row = split_by_dtype(report["runs"])
    replaced = {name: [run for run in runs if "replaced" in run] for name, runs in by_row.items()}
    if names := list(dict.fromkeys(name for runs in replaced.values() for run in runs for name in run["replaced"])):
        lines += ["## Replaced fusion weights", ""]
        lines += [
            "Accuracy on the first questions with the trained fuser's own weights and with replaced weights.",
            "",
        ]
        rows = [
            [row, f"{runs[0]['replaced_questions']:,}"]
            + [spread([run["replaced"][name] for run in runs], 2) for name in names]
            for row, runs in replaced.items()
            if runs
        ]
        lines += table(("", "questions", *names), rows)
    return "\n".join(lines).rstrip() + "\n"


def accuracy_table(rows: dict[str, list[dict]]) -> list[str]:
    kinds = [*kinds_of(next(iter(rows.values()))[0]["row"]["task"]), "average"]
    head = ["", "trained", "seeds", "questions", *kinds, f"questions until {LEARNED} %"]
    head += ["std over layers", "over images", "best replacement of the weights", "seconds per step"]
    lines = []
    for name, runs in rows.items():
        last, evaluated = [last_point(run) for run in runs], [run for run in runs if run["curve"]]
        until = [number for run in evaluated if (number := questions_until(run))]
        cells = [name, f"{runs[0]['trained_parameters']:,}", ", ".join(str(run["seed"]) for run in runs)]
        numbers = {run["row"]["batch_size"] * point["step"] for run, point in zip(runs, last)}
        cells.append(" to ".join(f"{number:,}" for number in sorted({min(numbers), max(numbers)})))
        cells += [spread([point[kind] for point in last]) for kind in kinds]
        cells.append(f"{spread(until, 0)} ({len(until)} of {len(evaluated)})" if evaluated else "–")
        for figure in ("std_over_layers", "std_over_images"):
            cells.append(spread([point[figure] for point in last if figure in point], 3))
        cells.append(spread([best_replacement(run["replaced"]) for run in runs if "replaced" in run], 2))
        cells.append(spread([run["seconds_per_step"] for run in runs if "seconds_per_step" in run], 2))
        lines.append(cells)
    return table(head, lines)


def draw(report: dict, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    methods = [*METHODS, "mean weights", "MemVP, rate 0.001", "without visual prompts"]
    panels = [("easy-VQA, yes/no questions", METHODS, "", "yes/no"), ("easy-VQA, colours", METHODS, "", "colour")]
    panels += [("emoji, all questions", [name for name in methods if name in EMOJI_ROWS], "emoji: ", "average")]
    figure = pyplot.figure(figsize=(17, 10), layout="constrained")
    upper, lower = figure.subfigures(2, 1)
    axes = upper.subplots(1, 3, sharey=True)
    for axis, (title, names, prefix, kind) in zip(axes, panels):
        for name in names:
            runs = [run for run in report["runs"].get(prefix + name, []) if run["curve"]]
            for number, run in enumerate(runs):
                trained = [run["row"]["batch_size"] * point["step"] / 1000 for point in run["curve"]]
                scores = [point[kind] for point in run["curve"]]
                style = {
                    "color": f"C{methods.index(name)}",
                    "linewidth": 2.5 if name == "DEHVF" else 1.2,
                    "marker": ".",
                }
                axis.plot(trained, scores, label=None if number else name, **style)
        axis.set_title(title, loc="left")
        axis.set_xlabel("thousand questions trained on")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(loc="lower right", bbox_to_anchor=(1, 0.04))
    axes[0].set_ylabel(f"accuracy on the first {FIRST_QUESTIONS:,} test questions, in %")
    draw_fusion(report["runs"], lower.subplots(1, 2))
    figure.savefig(file, dpi=130)
    pyplot.close(figure)


def draw_fusion(runs: dict[str, list[dict]], axes):
    """Accuracy of the runs with a fuser and four groups over a statistic of their weights, for each task."""
    panels = {
        "easy-VQA": ("std_over_positions", "standard deviation of the fusion weights over key and value"),
        "emoji": ("entropy", "entropy of the fusion weights, in nats (of equal weights: 1.39)"),
    }
    ends = [(run, last_point(run)) for found in runs.values() for run in found]
    for axis, (task, (statistic, label)) in zip(axes, panels.items()):
        for number, dtype in enumerate(DTYPES):
            points = [
                (end[statistic], end["average"])
                for run, end in ends
                if run["row"]["task"] == task and dtype_of(run) == dtype and end.get(statistic)
                if "num_groups" not in run["row"]["values"]
            ]
            axis.scatter([x for x, _ in points], [y for _, y in points], s=28, color=f"C{number}", label=dtype)
        axis.set_title(f"{task}, all questions, each run with a fuser", loc="left")
        axis.set_xlabel(label)
        axis.grid(alpha=0.3)
        axis.legend(loc="lower right")
    axes[0].set_ylabel("accuracy at the end, in %")


def find_runs(rows: dict[str, Row], reported: dict[str, list[dict]]) -> dict[str, list[dict]]:
    """
    The existing runs of each row, finished or not, by dtype and seed: those in `outputs/pretrained`, which this
    machine may not have, and the others of an earlier report.
    """
    found = {}
    for name, row in rows.items():
        files = sorted(file_of(name, 0).parent.glob("seed-*.json"))
        local = [run for file in files if (run := read_run(file, row))]
        runs = [run for run in reported.get(name, []) if has_values(run, row)] + local
        by_dtype_and_seed = {(DTYPES.index(dtype_of(run)), run["seed"]): run for run in runs}
        found[name] = [by_dtype_and_seed[key] for key in sorted(by_dtype_and_seed)]
    return {name: runs for name, runs in found.items() if runs}


def write_report(rows: dict[str, Row]):
    runs = find_runs(rows, read_report(RESULTS, "pretrained").get("runs", {}))
    machines = dict.fromkeys(run["machine"] for found in runs.values() for run in found)
    report = {
        "command": "python -m benchmarks.pretrained",
        "note": (
            "Adapters on SmolLM2-135M-Instruct and DINOv2-small. easy-VQA: 2,000 steps of 16 questions with the "
            "learning rate 5e-4 (LaVIN and LLaMA-Adapter 2.5e-3, ADEM-VL 2e-3) unless the row gives another; for the "
            "scales and rates, 600 steps of 64 questions. Rows with fewer questions were stopped. Emoji: 285 steps of "
            "64 questions; DEHVF and its ablations with the scales 0.1 and 0.3 and the learning rate 3e-3, LLaVA-LoRA "
            "with 1e-3, ADEM-VL with 2e-3. Accuracy in % on the 9,673 and the 1,146 test questions (for a stopped "
            f"run, on the first {FIRST_QUESTIONS:,} at its last evaluation), mean ± standard deviation over seeds. "
            "The most frequent answer to each question text, without the picture, has the accuracy: yes/no 82.5, "
            "shape 34.8, colour 12.0 (easy-VQA), kind 19.9 (emoji). Best replacement: the change in accuracy with "
            "the best of six replacements of the fusion weights (`benchmarks.fusion`); 0 or more means that the "
            "fuser's own weights contribute nothing. The bases are in float32 (on GPUs with TF32 products) unless the "
            "name of the row says bfloat16. Seconds per step: median of a run on one core of a CPU, "
            "the other of which was in use by other programs at times. "
            f"{'; '.join(machines)}."
        ),
        "runs": runs,
    }
    save_report(RESULTS, "pretrained", report, markdown, draw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--report", action="store_true", help="write the tables from the existing runs without training"
    )
    parser.add_argument(
        "--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(map(repr, ROWS))
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--at-once", type=positive, default=1, help="runs that train at the same time")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="dtype of the bases (default: %(default)s)")
    parser.add_argument(
        "--only-scores", action="store_true", help="evaluate once, at the end, and do not replace fusion weights"
    )
    arguments = parser.parse_args()
    require_writable(RESULTS)
    if not arguments.report:
        require_bases()
        rows = {name: ROWS[name] for name in arguments.rows}
        train_missing(rows, arguments.seeds, arguments.at_once, arguments.only_scores, arguments.dtype)
    write_report(ROWS)


if __name__ == "__main__":
    main()
