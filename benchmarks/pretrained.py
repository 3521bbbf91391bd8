# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The methods, their ablations and variants of the fuser on pretrained bases, SmolLM2-135M-Instruct and DINOv2-small
(docs/bases.md), and the published pictures and questions of easy-VQA.

    python -m benchmarks.pretrained                     # trains what is missing, then writes the tables
    python -m benchmarks.pretrained --rows DEHVF MemVP --seeds 0 --steps 600 --jobs 2
    python -m benchmarks.pretrained --report            # writes the tables from what is there

For a GPU: a run of 1,200 steps takes minutes there, and hours on two cores. All rows of a batch size train on the same
questions in the same order, with the optimizer of `train.py`. A run notes its accuracy on the first 1,000 test
questions ten times, in a file in `outputs/pretrained` that remains when the run is stopped. A second start trains what
is not finished. The tables go to `benchmarks/results`: `pretrained.json`, `.md` and `.png`.

A question counts as answered if the most likely next token is the first token of its answer. All 13 answers have
different ones.
"""

import argparse
import dataclasses
import json
import math
import multiprocessing
import re
import statistics
import sys
import time
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
from benchmarks import RESULTS, fusers, machine_in_words, save_report, spread
from benchmarks.fusion import replacements
from benchmarks.speed import with_same_weights
from dehvf import ROOT, DehvfConfig, DehvfForConditionalGeneration, DehvfProcessor
from tasks import easy_vqa
from training.arguments import DEHVF_METHODS
from training.data import read_image
from training.encoding import RowEncoder
from training.fusion import fusion_figures


RUNS = ROOT / "outputs" / "pretrained"
VISION_MODEL, TEXT_MODEL = (ROOT / "assets" / "real" / name for name in ("dinov2-small", "smollm2-135m-instruct"))
CHAT_TEMPLATE = ROOT / "recipes" / "question-answer.jinja"
SEEDS = (0, 1, 2)
EVALUATIONS, EVALUATION_BATCH, FIRST_QUESTIONS = 10, 512, 1000
LEARNED = 95  # in %, for "questions until"


@dataclass(frozen=True)
class Row:
    """
    method: of `train.py`.
    values: fields of `DehvfConfig`, beside `SETTING`, or of `BaselineArguments`.
    rate, fuser_ratio: learning rate, and that of the fuser and its query as a ratio to it.
    fuser: one of `benchmarks.fusers.VARIANTS`, or the paper's.
    batch_size, steps: questions of a step, and steps.
    """

    method: str = "dehvf"
    values: dict = field(default_factory=dict)
    rate: float = 1e-3
    fuser_ratio: float = 0.1
    fuser: str = "the paper's"
    batch_size: int = 64
    steps: int = 1200


# 56 pixels are 16 patches of 14, for pictures of 64 x 64 pixels with one shape in them
SETTING = {"image_size": 56, "num_memory_slots": 16, "visual_scale": 0.3, "memory_scale": 1.0}
SETTING |= {"memory_dropout": 0.0, "vision_adapter_dropout": 0.0}
ROWS = {
    "DEHVF": Row(),
    "MemVP": Row("memvp"),
    "LLaVA-LoRA": Row("llava-lora"),
    "LaVIN": Row("lavin", rate=5e-3),
    "LLaMA-Adapter": Row("llama-adapter", rate=5e-3),
    "ADEM-VL": Row("adem-vl", rate=2e-3),
    "IGVA": Row("igva", {"igva_hidden_size": 64}),
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
    "batches of 16": Row(batch_size=16, steps=2000),
    "batches of 16, half the rate": Row(rate=5e-4, batch_size=16, steps=2000),
    "fuser: the paper's at the full rate": Row(fuser_ratio=1.0),
    **{f"fuser: {name}": Row(fuser=name) for name in fusers.VARIANTS},
}


# ---------------------------------------------------------------------------------------------------------------------
# Questions
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class Questions:
    """
    The questions of a split, encoded. They need no attention mask: they are padded on the right, no token attends to
    what follows it, and padding has no label.

    ids, labels: of each question with its answer, padded to the longest; labels are -100 where no answer is.
    kinds: of each question, see `easy_vqa.ANSWERS`.
    image_rows: the row of `pixel_values` that a question is about.
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
        """Positions from the first answer of all questions to the end of the longest question."""
        return self.ids.shape[1] - (self.labels != -100).int().argmax(dim=1).min().item()

    def to(self, device) -> "Questions":
        moved = (getattr(self, name).to(device) for name in ("ids", "labels", "image_rows", "pixel_values"))
        ids, labels, image_rows, pixel_values = moved
        return Questions(ids, labels, self.kinds, image_rows, pixel_values)

    def batch(self, rows: torch.Tensor, image_tokens: list[int]) -> dict[str, torch.Tensor]:
        rows = rows.to(self.ids.device)
        ids, labels = self.ids[rows], self.labels[rows]
        if image_tokens:  # behind the first token, which may be BOS
            image_ids = torch.tensor(image_tokens, device=ids.device).expand(len(rows), -1)
            ids = torch.cat((ids[:, :1], image_ids, ids[:, 1:]), dim=1)
            labels = torch.cat((torch.full_like(image_ids, -100), labels), dim=1)
        return {"input_ids": ids, "labels": labels, "pixel_values": self.pixel_values[self.image_rows[rows]].float()}


def load_questions(split: str, processor, dtype: torch.dtype = torch.float32) -> Questions:
    """`dtype` is that in which the pictures are kept, each once."""
    rows = easy_vqa.load(split)
    encoder = RowEncoder(easy_vqa, split, processor, max_prompt_length=64, training=True)
    encoded = encoder.encode(rows.remove_columns("image"))
    rows = rows.cast_column("image", datasets.Image(decode=False))
    numbers, entries = rows["image_id"][:], dict(zip(rows["image_id"][:], rows["image"][:]))
    image_rows = {number: row for row, number in enumerate(entries)}

    def pixels(entry) -> torch.Tensor:
        return processor(images=[read_image(entry)], return_tensors="pt")["pixel_values"][0].to(dtype)

    with ThreadPool() as pool:
        pixel_values = torch.stack(pool.map(pixels, entries.values()))
    ids = [torch.tensor(tokens) for tokens in encoded["input_ids"][:]]
    is_answer = [torch.tensor(flags, dtype=torch.bool) for flags in encoded["is_answer"][:]]
    labels = [tokens.where(flags, -100) for tokens, flags in zip(ids, is_answer)]
    return Questions(
        pad_sequence(ids, batch_first=True),
        pad_sequence(labels, batch_first=True, padding_value=-100),
        [easy_vqa.TYPES[answer] for answer in rows["answer"][:]],
        torch.tensor([image_rows[number] for number in numbers]),
        pixel_values,
    )


# ---------------------------------------------------------------------------------------------------------------------
# Runs
# ---------------------------------------------------------------------------------------------------------------------


def build(row: Row, seed: int, vision: nn.Module, text: nn.Module) -> nn.Module:
    """A method with new trained modules on the bases, which stay as they are."""
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


def make_optimizer(model, row: Row):
    """AdamW as in the recipes; the rate rises for 3 % of the steps, then falls as a cosine."""
    groups = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = row.rate * (row.fuser_ratio if "fuser" in name else 1)
            groups.setdefault((rate, 0.02 if parameter.ndim > 1 else 0.0), []).append(parameter)
    groups = [{"params": params, "lr": rate, "weight_decay": decay} for (rate, decay), params in groups.items()]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
    warmup = math.ceil(0.03 * row.steps)

    def factor(step: int) -> float:
        return min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * max(0, step - warmup) / row.steps)))

    return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


class Step:
    """
    Forward and backward of a batch. On a GPU DEHVF's are captured as a CUDA graph, since launching their kernels one
    by one takes longer than running them. The baselines with image tokens wait for the GPU in between.
    """

    def __init__(self, run, can_capture: bool):
        self.run, self.can_capture, self.calls, self.graph = run, can_capture, 0, None

    def __call__(self, batch: dict) -> torch.Tensor:
        self.calls += 1
        if not self.can_capture or self.calls <= 3:
            return self.eager(batch)
        if self.graph is None:
            self.batch = {name: tensor.clone() for name, tensor in batch.items()}
            self.graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.loss = self.eager(self.batch)
        for name, tensor in batch.items():
            self.batch[name].copy_(tensor)
        self.graph.replay()
        return self.loss.clone()

    def eager(self, batch: dict) -> torch.Tensor:
        self.run.optimizer.zero_grad(set_to_none=False)  # the graph writes to the same gradients each time
        logits, labels = self.run.logits(batch)
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=-100)
        loss.backward()
        return loss.detach()


class Run:
    """One row with one seed."""

    def __init__(self, row: Row, seed: int, bench: "Bench"):
        self.row, self.seed, self.bench = row, seed, bench
        self.model = build(row, seed, bench.vision, bench.text).to(bench.device)
        self.image_tokens = getattr(self.model, "image_tokens", [])
        self.optimizer, self.schedule = make_optimizer(self.model, row)
        self.parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]

    def logits(self, batch: dict) -> tuple[torch.Tensor, torch.Tensor]:
        """The logits and labels of all tokens from the first answer on."""
        inputs, labels = {name: batch[name] for name in ("input_ids", "pixel_values")}, batch["labels"]
        if getattr(self.model.config, "reads_instruction", False):
            inputs["instruction_mask"] = ((labels != -100).cumsum(dim=1) == 0).long()
        kept = self.bench.num_kept
        logits = self.model(**inputs, logits_to_keep=kept + 1, use_cache=False).logits[:, :-1].float()
        return logits, labels[:, -kept:]

    def batches(self):
        generator, questions = torch.Generator().manual_seed(self.seed), self.bench.train
        while True:
            order = torch.randperm(len(questions), generator=generator)
            for rows in order.split(self.row.batch_size):
                if len(rows) == self.row.batch_size:
                    yield questions.batch(rows, self.image_tokens)

    def train(self, file: Path):
        """Writes to the file what there is after each evaluation."""
        report = {"row": dataclasses.asdict(self.row), "seed": self.seed, "machine": machine_in_words(), "curve": []}
        report |= {"trained_parameters": sum(parameter.numel() for parameter in self.parameters)}
        is_cuda = self.bench.device.type == "cuda"
        step = Step(self, is_cuda and self.row.method not in BASELINES)
        losses, begin = [], time.perf_counter()
        batches = self.batches()
        self.model.train()
        for number in range(1, self.row.steps + 1):
            losses.append(step(next(batches)))
            nn.utils.clip_grad_norm_(self.parameters, 1.0)
            self.optimizer.step()
            self.schedule.step()
            if number * EVALUATIONS % self.row.steps < EVALUATIONS:
                scores, weights = self.evaluate(FIRST_QUESTIONS)
                loss = round(torch.stack(losses[-50:]).mean().item(), 4)
                report["curve"].append({"step": number, "loss": loss, **scores, **self.figures(weights)})
                report["seconds"] = round(time.perf_counter() - begin, 1)
                file.write_text(json.dumps(report))
        report["scores"], weights = self.evaluate()
        if weights is not None:
            report["fusion"] = self.figures(weights)
            others = replacements(weights, self.model.model.hierarchy.rows)
            report["replaced"] = {
                name: self.evaluate(replacement=other)[0]["average"] for name, other in others.items()
            }
        file.write_text(json.dumps(report))

    def figures(self, weights: torch.Tensor | None) -> dict:
        return {} if weights is None else fusion_figures(weights, self.model.model.hierarchy.rows)

    @torch.no_grad()
    def evaluate(self, limit: int | None = None, replacement: torch.Tensor | None = None):
        """
        Accuracy in % of each kind of question in the test split, and the fuser's weights of its pictures.

        Args:
            limit: number of questions; all by default.
            replacement: weights to use in place of the fuser's, for each picture of the split.
        """
        questions, weights_of = self.bench.test, {}

        def replace(module, arguments, weights):
            weights_of.update(zip(images.tolist(), weights))
            return weights if replacement is None else replacement[images].to(weights)

        fuser = getattr(self.model.model, "fuser", None)
        handle = None if fuser is None else fuser.register_forward_hook(replace)
        right = []
        self.model.eval()
        for rows in torch.arange(len(questions))[:limit].split(EVALUATION_BATCH):
            images = questions.image_rows[rows.to(questions.image_rows.device)].cpu()
            logits, labels = self.logits(questions.batch(rows, self.image_tokens))
            first = (labels != -100).int().argmax(dim=1, keepdim=True)
            right += (logits.argmax(dim=-1).gather(1, first) == labels.gather(1, first)).flatten().tolist()
        self.model.train()
        if handle is not None:
            handle.remove()
        hits = {
            kind: [hit for hit, other in zip(right, questions.kinds) if other == kind] for kind in easy_vqa.ANSWERS
        }
        scores = {kind: round(100 * statistics.mean(part), 2) for kind, part in hits.items() if part}
        weights = torch.stack([weights_of[image] for image in sorted(weights_of)]) if weights_of else None
        return {**scores, "average": round(100 * statistics.mean(right), 2)}, weights


class Bench:
    """The bases and the questions, on the device of all runs in a process."""

    def __init__(self, questions: dict[str, Questions], device: str):
        self.device, self.num_kept = torch.device(device), max(split.num_kept for split in questions.values())
        self.train, self.test = (questions[split].to(device) for split in ("train", "test"))
        self.vision, self.text = load_bases(device)


def load_bases(device: str) -> tuple[nn.Module, nn.Module]:
    """The vision encoder and the language model, frozen."""
    places = {VISION_MODEL: AutoModel, TEXT_MODEL: AutoModelForCausalLM}
    bases = (auto.from_pretrained(place, dtype=torch.float32).to(device) for place, auto in places.items())
    return tuple(base.requires_grad_(False) for base in bases)


def require_bases():
    """Ends the program if a pretrained base is not there."""
    if missing := [place for place in (VISION_MODEL, TEXT_MODEL) if not place.exists()]:
        sys.exit(f"There is no {missing[0]}. `python -m assets.real_bases` makes it, see docs/bases.md.")


def file_of(name: str, seed: int) -> Path:
    return RUNS / re.sub("[^a-z0-9]+", "-", name.lower()).strip("-") / f"seed-{seed}.json"


def read_run(name: str, row: Row, seed: int) -> dict | None:
    """What is there of a run of this row as it is now, finished or not."""
    if not file_of(name, seed).is_file():
        return None
    run = json.loads(file_of(name, seed).read_text(encoding="utf-8"))
    return run if run["row"] == dataclasses.asdict(row) else None


def work(questions: dict, device: str, queue):
    """A process that trains one run after the other."""
    torch.set_num_threads(1)
    torch.set_float32_matmul_precision("high")
    bench = Bench(questions, device)
    # CUDA graphs are captured on a stream of their own, on which gradients must have been made as well
    with torch.cuda.stream(torch.cuda.Stream()) if device == "cuda" else nullcontext():
        while (run := queue.get()) is not None:
            name, row, seed = run
            file_of(name, seed).parent.mkdir(parents=True, exist_ok=True)
            Run(row, seed, bench).train(file_of(name, seed))
            print(f"{name}, seed {seed}: done", flush=True)


def train_missing(
    rows: dict[str, Row],
    seeds: list[int],
    jobs: int,
    image_size: int | None = None,
    dtype: torch.dtype = torch.float32,
):
    """
    Trains what is not finished.

    Args:
        image_size: of all rows, if not that of `SETTING`.
        dtype: in which the pictures are kept.
    """
    # Seed by seed, so that whoever stops half-way has whole tables of fewer seeds
    runs = [(name, row, seed) for seed in seeds for name, row in rows.items()]
    missing = [run for run in runs if "scores" not in (read_run(*run) or {})]
    print(f"{len(runs) - len(missing)} runs are finished, {len(missing)} are missing.", flush=True)
    if not missing:
        return
    processor = DehvfProcessor.from_vision_text_pretrained(
        str(VISION_MODEL),
        str(TEXT_MODEL),
        image_size=image_size or SETTING["image_size"],
        chat_template=CHAT_TEMPLATE.read_text(encoding="utf-8"),
    )
    questions = {split: load_questions(split, processor, dtype) for split in ("train", "test")}
    context = multiprocessing.get_context("spawn")
    queue, device = context.Queue(), "cuda" if torch.cuda.is_available() else "cpu"
    for run in [*missing, *[None] * jobs]:
        queue.put(run)
    workers = [context.Process(target=work, args=(questions, device, queue)) for _ in range(jobs)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()


# ---------------------------------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------------------------------


def questions_until(run: dict) -> int | None:
    """Questions that were trained on when the accuracy on the first test questions first was `LEARNED`."""
    steps = [point["step"] for point in run["curve"] if point["average"] >= LEARNED]
    return run["row"]["batch_size"] * steps[0] if steps else None


def markdown(report: dict) -> str:
    kinds = [*easy_vqa.ANSWERS, "average"]
    head = ["", "trained", "seeds", *kinds, f"questions until {LEARNED} %", "std over layers", "over images"]
    head += ["at best without its own weights"]
    lines = [f"<!-- Written by `{report['command']}`. Do not edit. -->", "", report["note"], ""]
    lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, runs in report["runs"].items():
        last = [run.get("scores") or run["curve"][-1] for run in runs]
        until = [number for run in runs if (number := questions_until(run))]
        cells = [name, f"{runs[0]['trained_parameters']:,}", ", ".join(str(run["seed"]) for run in runs)]
        cells += [spread([scores[kind] for scores in last]) for kind in kinds]
        cells.append(f"{spread(until, 0)} ({len(until)} of {len(runs)})")
        for figure in ("std_over_layers", "std_over_images"):
            cells.append(spread([run["curve"][-1][figure] for run in runs if figure in run["curve"][-1]], 3))
        replaced = [max(run["replaced"].values()) - run["scores"]["average"] for run in runs if "replaced" in run]
        cells.append(spread(replaced, 2))
        lines.append(f"| {' | '.join(cells)} |")
    replaced = {name: [run for run in runs if "replaced" in run] for name, runs in report["runs"].items()}
    if names := list(dict.fromkeys(name for runs in replaced.values() for run in runs for name in run["replaced"])):
        lines += ["", "Accuracy with other fusion weights than the trained fuser's:", ""]
        lines += [f"| | its own | {' | '.join(names)} |", "|---" * (len(names) + 2) + "|"]
        for row, runs in replaced.items():
            cells = [spread([run["scores"]["average"] for run in runs], 2)]
            cells += [spread([run["replaced"][name] for run in runs], 2) for name in names]
            if runs:
                lines.append(f"| {row} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def draw(report: dict, file: Path):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(report["runs"])
    colors = pyplot.get_cmap("tab20").colors
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), sharex=True, sharey=True, layout="constrained")
    for axis, kind in zip(axes, ("yes/no", "colour")):
        for index, name in enumerate(names):
            for number, run in enumerate(report["runs"][name]):
                trained = [run["row"]["batch_size"] * point["step"] / 1000 for point in run["curve"]]
                scores = [point[kind] for point in run["curve"]]
                style = {"color": colors[index % 20], "linestyle": "-" if index < 20 else "--", "marker": "."}
                axis.plot(trained, scores, label=None if number else name, **style)
        axis.set_title(f"{kind} questions", loc="left")
        axis.set_xlabel("thousand questions trained on")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(f"accuracy on the first {FIRST_QUESTIONS:,} test questions, in %")
    axes[1].legend(loc="lower right", fontsize=8)
    figure.savefig(file, dpi=130)


def find_runs(rows: dict[str, Row], seeds: list[int]) -> dict[str, list[dict]]:
    """What is there of each row, finished or not."""
    found = {name: [read_run(name, row, seed) for seed in seeds] for name, row in rows.items()}
    return {name: there for name, runs in found.items() if (there := [run for run in runs if run])}


def write_report(rows: dict[str, Row], seeds: list[int]):
    runs = find_runs(rows, seeds)
    machines = dict.fromkeys(run["machine"] for found in runs.values() for run in found)
    report = {
        "command": "python -m benchmarks.pretrained",
        "note": (
            "SmolLM2-135M-Instruct and DINOv2-small on easy-VQA: 1,200 steps of 64 questions or 2,000 of 16, accuracy "
            f"in % on the 9,673 test questions (of a run that was stopped, on the first {FIRST_QUESTIONS:,} when it "
            "was), mean ± standard deviation over seeds. Most frequent answers to the same question text, without the "
            "picture: yes/no 82.5, shape 34.8, colour 12.0. The last column is the difference of the accuracy with "
            "the best of six replacements of the fusion weights (`benchmarks.fusion`): 0 or more means that the "
            f"fuser's own contribute nothing. {'; '.join(machines)}."
        ),
        "runs": runs,
    }
    save_report(RESULTS, "pretrained", report, markdown, draw)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--report", action="store_true", help="train nothing, write the tables from what is there")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--steps", type=int, help="in place of those of the rows, to try something")
    parser.add_argument("--jobs", type=int, default=1, help="processes that train at the same time")
    arguments = parser.parse_args()
    rows = {name: ROWS[name] for name in arguments.rows}
    if arguments.steps:
        rows = {name: dataclasses.replace(row, steps=arguments.steps) for name, row in rows.items()}
    if not arguments.report:
        require_bases()
        train_missing(rows, arguments.seeds, arguments.jobs)
    write_report(rows, arguments.seeds)


if __name__ == "__main__":
    main()
