# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures requests per second, and the time to the first token and to the end of an answer: DEHVF and LLaVA-LoRA on the
same bases and with the same server, `demo/serve.py`, with 1, 4 and 16 clients. Also compares questions about an image
that the server has already encoded with questions without an image.

    python -m benchmarks.serving              # 10 minutes on 2 cores
    python -m benchmarks.serving --rounds 1

The bases are SmolLM2-135M-Instruct and DINOv2-small at 224 pixels, 256 patches (docs/bases.md). The trained modules
have random weights, since only time is measured. LLaVA-LoRA is merged and uses the same handlers and the same engine,
with a processor that inserts the image tokens into the prompts. Each server is a separate process. They are measured
alternately, in an order that is reversed every round, while the other servers are idle. The results are written to
`benchmarks/results`: `serving.json`, `.md` and `.png`.
"""

import argparse
import base64
import io
import json
import multiprocessing
import os
import socket
import statistics
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import httpx
import numpy as np
import torch
from PIL import Image
from transformers import AutoModel, AutoModelForCausalLM

from baselines import BaselineArguments, assemble
from benchmarks import (
    RESULTS,
    command_line,
    heading,
    machine_in_words,
    positive,
    require_writable,
    save_report,
    table,
    verdict,
)
from benchmarks.pretrained import TEXT_MODEL, VISION_MODEL
from benchmarks.speed import DEHVF, MERGED, TEXT_ONLY
from dehvf import DehvfForConditionalGeneration, DehvfProcessor


QUESTION = "How many circles are there in the picture, and what colour is the largest one?"
ROUNDS = 3
# Targets: requests per second over LLaVA-LoRA with the most clients; time with a known image over text alone
LEAST_RATIO, LARGEST_RATIO = 2.5, 1.05


@dataclass(frozen=True)
class Setting:
    """
    image_size: side in pixels.
    clients: numbers of clients; each sends its next request as soon as it has an answer.
    answer_tokens: lengths of answers.
    requests_per_client: with one client, and with several.
    known_questions: number of questions of each kind in `measure_known`.
    """

    vision_model: str = str(VISION_MODEL)
    text_model: str = str(TEXT_MODEL)
    image_size: int = 224
    num_memory_slots: int = 320
    clients: tuple[int, ...] = (1, 4, 16)
    answer_tokens: tuple[int, ...] = (1, 32)
    requests_per_client: tuple[int, int] = (4, 2)
    known_questions: int = 10


# --- servers ---


def make_engine_class(model) -> type:
    """The engine of the server; for LLaVA, one that adds its placeholders after the first token of a prompt."""
    from demo.engine import Engine

    if not hasattr(model, "image_tokens"):
        return Engine
    image_tokens = torch.tensor([model.image_tokens])

    class ImageTokenEngine(Engine):
        def _encode(self, chat, images):
            inputs = super()._encode(chat, images)
            if images:
                added = {"input_ids": image_tokens, "attention_mask": torch.ones_like(image_tokens)}
                for name, tokens in added.items():
                    inputs[name] = torch.cat((inputs[name][:, :1], tokens, inputs[name][:, 1:]), dim=1)
            return inputs

    return ImageTokenEngine


class SingleModelManager:
    """Replaces the `ModelManager` of transformers, from which the server gets its model by name."""

    def __init__(self, name: str, model, processor):
        self.force_model, self.loaded = name, (model, processor)

    def process_model_name(self, name: str) -> str:
        return name

    def load_model_and_processor(self, name: str):
        return self.loaded

    def list_models(self) -> list[dict]:
        return [{"id": self.force_model, "object": "model"}]

    def shutdown(self):
        pass


def build(method: str, setting: Setting):
    """The model and its processor. Special tokens are suppressed, so that answers have the requested length."""
    from demo.serve import remember_images

    bases, size = (setting.vision_model, setting.text_model), {"image_size": setting.image_size}
    processor = DehvfProcessor.from_vision_text_pretrained(*bases, **size)
    torch.manual_seed(0)
    if method == DEHVF:
        size["num_memory_slots"] = setting.num_memory_slots
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **size)
        remember_images(model)
    else:
        model = AutoModelForCausalLM.from_pretrained(setting.text_model)
    if method == MERGED:
        vision = AutoModel.from_pretrained(setting.vision_model)
        model = assemble("llava-lora", vision, model, BaselineArguments(), setting.image_size)
        model.model.language_model = model.model.language_model.merge_and_unload()
    model.generation_config.eos_token_id = None
    model.generation_config.suppress_tokens = processor.tokenizer.all_special_ids
    return model.eval(), processor


def serve(method: str, setting: Setting, port: int, threads: int):
    """Runs a server until the process is terminated."""
    import uvicorn

    from demo.client_images import ImageReader
    from demo.serve import build as build_app

    torch.set_num_threads(threads)
    model, processor = build(method, setting)
    app = build_app(
        SingleModelManager(method, model, processor),
        ImageReader(),
        max_requests=2 * max(setting.clients),
        engine_class=make_engine_class(model),
    )
    uvicorn.run(app, port=port, log_level="warning")


@contextmanager
def servers(methods: tuple[str, ...], setting: Setting, threads: int):
    """Starts a server for each method. Gives method -> URL when all of them are ready."""
    context, processes, urls = multiprocessing.get_context("spawn"), [], {}
    try:
        for method in methods:
            with socket.socket() as free:
                free.bind(("localhost", 0))
                port = free.getsockname()[1]
            processes.append(context.Process(target=serve, args=(method, setting, port, threads), daemon=True))
            processes[-1].start()
            urls[method] = f"http://localhost:{port}"
        for process, url in zip(processes, urls.values()):
            while not is_ready(url):
                if not process.is_alive():
                    raise RuntimeError("A server did not start. See its output for the reason.")
                time.sleep(0.2)
        yield urls
    finally:
        for process in processes:
            process.terminate()
            process.join()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/health").is_success
    except httpx.TransportError:
        return False


# --- clients ---


def make_image(seed: int) -> str:
    """The data URL of a JPEG file with random content."""
    colours = np.random.default_rng(seed).integers(0, 256, (6, 8, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize((320, 240), Image.Resampling.BICUBIC).save(file, "JPEG")
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"


def ask(client: httpx.Client, image: str | None, num_tokens: int) -> dict[str, float]:
    """Seconds to the first token (`first`) and to the end (`whole`) of a streamed answer."""
    content = [{"type": "text", "text": QUESTION}]
    if image is not None:
        content.insert(0, {"type": "image_url", "image_url": {"url": image}})
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": num_tokens, "stream": True}
    body |= {"temperature": 0, "stream_options": {"include_usage": True}}
    start, first, usage = time.perf_counter(), None, None
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        response.raise_for_status()
        for line in response.iter_lines():
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(line.removeprefix("data: "))
            usage = chunk.get("usage")
            if first is None and chunk["choices"] and chunk["choices"][0]["delta"].get("content"):
                first = time.perf_counter()
    end = time.perf_counter()
    if usage["completion_tokens"] != num_tokens:
        raise RuntimeError(f"An answer has {usage['completion_tokens']} tokens instead of {num_tokens}.")
    return {"first": (first or end) - start, "whole": end - start}


def run_clients(url: str, num_clients: int, num_requests: int, num_tokens: int, first_seed: int) -> dict:
    """Requests per second and seconds per answer of simultaneous clients. Each request has a new image."""
    images = [make_image(first_seed + number) for number in range(num_requests)]
    with ThreadPoolExecutor(num_clients) as threads, httpx.Client(base_url=url, timeout=600) as client:
        start = time.perf_counter()
        answers = list(threads.map(lambda image: ask(client, image, num_tokens), images))
        seconds = time.perf_counter() - start
    return {
        "requests_per_second": num_requests / seconds,
        **{name: [answer[name] for answer in answers] for name in ("first", "whole")},
    }


def measure_load(urls: dict[str, str], setting: Setting, rounds: int) -> list[dict]:
    """The results of each round and method, for each number of clients and length of answers."""
    rows, seed = [], 1
    for method in (DEHVF, MERGED):  # warm-up
        run_clients(urls[method], 1, 1, max(setting.answer_tokens), first_seed=seed)
    for num_clients in setting.clients:
        for num_tokens in setting.answer_tokens:
            samples = {DEHVF: [], MERGED: []}
            num_requests = num_clients * setting.requests_per_client[num_clients > 1]
            for turn in range(rounds):
                for method in list(samples)[:: -1 if turn % 2 else 1]:
                    seed += num_requests
                    samples[method].append(run_clients(urls[method], num_clients, num_requests, num_tokens, seed))
            rows.append({"clients": num_clients, "answer_tokens": num_tokens, "samples": samples})
    return rows


KNOWN, WITHOUT = "DEHVF, a known image", "DEHVF, no image"


def measure_known(urls: dict[str, str], setting: Setting) -> list[dict]:
    """Seconds of whole answers to one client, for text alone, without an image and with a known image."""
    image = make_image(0)
    kinds = {TEXT_ONLY: (TEXT_ONLY, None), WITHOUT: (DEHVF, None), KNOWN: (DEHVF, image)}
    rows = []
    with httpx.Client(timeout=600, base_url=urls[TEXT_ONLY]) as text, httpx.Client(base_url=urls[DEHVF]) as dehvf:
        dehvf.timeout, clients = text.timeout, {TEXT_ONLY: text, DEHVF: dehvf}
        for num_tokens in setting.answer_tokens:
            samples = {kind: [] for kind in kinds}
            for turn in range(-1, setting.known_questions):
                for kind in list(kinds)[:: -1 if turn % 2 else 1]:
                    method, own = kinds[kind]
                    seconds = ask(clients[method], own, num_tokens)["whole"]
                    if turn >= 0:  # the first turn is a warm-up, in which the image becomes known
                        samples[kind].append(seconds)
            rows.append({"answer_tokens": num_tokens, "samples": samples})
    return rows


# --- the report ---


def median_ratio(ones: list[float], others: list[float]) -> float:
    return statistics.median(one / other for one, other in zip(ones, others))


def speedup(row: dict) -> float:
    """Requests per second of DEHVF over those of LLaVA: the median of the rounds' ratios."""
    rates = [[sample["requests_per_second"] for sample in row["samples"][name]] for name in (DEHVF, MERGED)]
    return median_ratio(*rates)


def milliseconds(samples: list[dict], name: str) -> str:
    """Median and 95th percentile of all rounds."""
    values = [1000 * value for sample in samples for value in sample[name]]
    return f"{np.median(values):,.0f} / {np.percentile(values, 95):,.0f}"


def markdown(report: dict) -> str:
    most = max(row["clients"] for row in report["load"])
    load, known = [], []
    for row in report["load"]:
        for name, samples in row["samples"].items():
            rate = statistics.median(sample["requests_per_second"] for sample in samples)
            cells = [str(row["clients"]), count(row["answer_tokens"], "token"), name, f"{rate:.2f}"]
            cells += [milliseconds(samples, "first"), milliseconds(samples, "whole")]
            cells += [f"{speedup(row):.2f}" if name == DEHVF else ""]
            has_target = name == DEHVF and row["clients"] == most
            cells += [f"≥ {LEAST_RATIO}: {verdict(speedup(row) >= LEAST_RATIO)}" if has_target else ""]
            load.append(cells)
    for row in report["known"]:
        samples = row["samples"]
        over_text = median_ratio(samples[KNOWN], samples[TEXT_ONLY])
        cells = [count(row["answer_tokens"], "token")]
        cells += [f"{1000 * statistics.median(values):,.0f}" for values in samples.values()]
        cells += [f"{over_text:.3f}", f"{median_ratio(samples[KNOWN], samples[WITHOUT]):.3f}"]
        known.append([*cells, f"≤ {LARGEST_RATIO} of {TEXT_ONLY}: {verdict(over_text <= LARGEST_RATIO)}"])
    kinds = report["known"][0]["samples"]
    lines = [
        *heading("python -m benchmarks.serving", report["note"]),
        *("## Load", "", "Milliseconds to the first token and to the end of an answer: median / 95th percentile.", ""),
        *table(("clients", "answer", "", "requests per second", "first token", "end", "ratio", "target"), load),
        *("", "## A known image", "", "Milliseconds of a whole answer to one client.", ""),
        *table(("answer", *kinds, f"known over {TEXT_ONLY}", "known over no image", "target"), known),
    ]
    return "\n".join(lines) + "\n"


def count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' if number > 1 else ''}"


def draw(report: dict, file: Path):
    from matplotlib.figure import Figure

    rows, figure = report["load"], Figure(figsize=(9, 4.5), dpi=110, layout="constrained")
    axes = figure.subplots()
    for shift, name in enumerate((DEHVF, MERGED)):
        rates = [statistics.median(sample["requests_per_second"] for sample in row["samples"][name]) for row in rows]
        axes.bar([place + 0.36 * (shift - 0.5) for place in range(len(rows))], rates, 0.34, label=name)
    labels = [f"{count(row['clients'], 'client')},\n{count(row['answer_tokens'], 'token')}" for row in rows]
    axes.set_xticks(range(len(rows)), labels, fontsize=8)
    axes.set_title("Requests per second")
    axes.legend()
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(file)


def note(setting: Setting, rounds: int, threads: int, load_average: float) -> str:
    side, bases = setting.image_size, (Path(setting.text_model).name, Path(setting.vision_model).name)
    return (
        f"{' and '.join(bases)} in float32, images of {side}×{side} pixels, {setting.num_memory_slots} memory slots; "
        "greedy, streamed. Under load, each request has a new image. The servers are measured alternately; requests "
        f"per second and ratios are medians over rounds: {rounds}. Each server is `demo/serve.py` in a separate "
        f"process (threads: {threads}) and batches waiting requests; the clients run on the same machine. "
        f"`{TEXT_ONLY}` is the language model without memory slots. {machine_in_words()}. Load average before the "
        f"start, from other processes: {load_average:.1f}."
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="rounds under each load")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="threads of each server")
    arguments, setting = parser.parse_args(), Setting()
    require_writable(RESULTS)
    for folder in (setting.vision_model, setting.text_model):
        if not Path(folder).is_dir():
            sys.exit(f"There is no folder {folder}. See docs/bases.md for how to get the base models.")
    load_average = os.getloadavg()[0]
    with servers((TEXT_ONLY, DEHVF, MERGED), setting, arguments.threads) as urls:
        known = measure_known(urls, setting)
        rows = measure_load(urls, setting, arguments.rounds)
    report = {
        "command": command_line("serving"),
        "setting": asdict(setting),
        "rounds": arguments.rounds,
        "threads": arguments.threads,
        "note": note(setting, arguments.rounds, arguments.threads, load_average),
        "load": rows,
        "known": known,
    }
    save_report(RESULTS, "serving", report, markdown, draw)


if __name__ == "__main__":
    main()
