# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Measures what adaptive fusion contributes to a trained adapter: its accuracy on the test split with its own fusion
weights and with replaced ones.

    python -m benchmarks.fusion outputs/digits                   # --max_samples and other flags of train.py may follow
    python -m benchmarks.fusion outputs/digits --output_file fusion-digits.json

If no replacement lowers the accuracy, adaptive fusion contributes nothing. The report also says how much the fuser's
input, the class features of each vision layer, differs between the images.
"""

import argparse
import json
import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import set_seed

from benchmarks import command_line, describe_machine, require_writable
from tasks import get_task
from training.arguments import complete_arguments, parse_arguments
from training.checkpoints import RESULTS_FILE
from training.data import Collator, load_splits
from training.fusion import describe_fusion, fusion_figures, layers_of_groups
from training.models import load_model, load_processor
from training.results import SOURCE_OF_ROWS, make_records
from training.trainer import AnswerTrainer


def mean_over_layers(weights: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Each language layer gets the mean weights of its group."""
    result = weights.clone()
    for layers in layers_of_groups(rows):
        result[:, layers] = weights[:, layers].mean(1, keepdim=True)
    return result


def shuffle_layers(weights: torch.Tensor, rows: list[list[int]]) -> torch.Tensor:
    """Each language layer gets the weights of the next layer in its group; the last one gets those of the first."""
    result = weights.clone()
    for layers in layers_of_groups(rows):
        result[:, layers] = weights[:, layers].roll(-1, dims=1)
    return result


def replacements(weights: torch.Tensor, rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """
    Replacements of the fusion weights of a test split, by name. They have the shape of `weights`.

    Args:
        weights: `(num_images, num_language_layers, num_positions, num_candidates)`.
        rows: the candidates of each language layer; the weights beyond their number belong to padding.
    """
    over_images = weights.mean(0, keepdim=True).expand_as(weights)
    constant = mean_over_layers(over_images, rows).mean(2, keepdim=True).expand_as(weights)
    lengths = torch.tensor([len(row) for row in rows], device=weights.device)[:, None]  # D 1
    uniform = (torch.arange(weights.shape[-1], device=weights.device) < lengths) / lengths  # D M
    return {
        "mean over images": over_images,
        "mean over language layers of a group": mean_over_layers(weights, rows),
        "one constant for each group": constant,
        "another image's": weights.roll(len(weights) // 2, dims=0),
        "another layer's of the group": shuffle_layers(weights, rows),
        "uniform": uniform[:, None].expand_as(weights),
    }


def spread_over_images(features: torch.Tensor) -> dict[str, list[float]]:
    """
    For each vision layer, the root mean square of the class features' mean over images, and of their deviations from
    it. The fuser can only tell images apart by the latter.

    Args:
        features: `(num_images, num_vision_layers, vision_hidden_size)`, as the fuser gets them.
    """
    mean = features.double().mean(0)
    sizes = {"mean": mean.square().mean(-1), "deviation": (features - mean).square().mean((0, 2))}
    return {name: [round(value, 3) for value in squares.sqrt().tolist()] for name, squares in sizes.items()}


class Evaluation:
    """Answers the test split with given fusion weights. `arguments` are flags of train.py, including `--adapter`."""

    def __init__(self, arguments: list[str]):
        _, data_args, model_args, adapter_args, baseline_args, training_args = parse_arguments(arguments)
        set_seed(training_args.seed)
        self.task = get_task(data_args.task)
        complete_arguments(self.task, data_args, training_args)
        processor = load_processor(model_args, adapter_args)
        self.split = load_splits(self.task, processor, data_args, training_args)["test"]
        self.model = load_model(model_args, adapter_args, baseline_args)
        if getattr(self.model.base_model, "fuser", None) is None:
            raise ValueError(
                f"{model_args.adapter} was trained with `layer_fusion={self.model.config.layer_fusion!r}` and "
                f"`visual_prompts={self.model.config.visual_prompts!r}`, so it has no fuser. Give an adapter with "
                "adaptive fusion weights."
            )
        self.trainer = AnswerTrainer(
            model=self.model,
            args=training_args,
            data_collator=Collator(processor, [], self.model.config.reads_instruction),
            processing_class=processor,
            max_new_tokens=data_args.max_new_tokens,
            run={},
        )

    def answer(self, replacement: torch.Tensor | None) -> tuple[dict, torch.Tensor]:
        """
        Args:
            replacement: weights to use instead of the fuser's own, for each row with an image.

        Returns:
            The scores, and the fuser's own weights, `(num_rows_with_image, num_language_layers, num_positions,
            num_candidates)`, in the order of the split.
        """
        own, position = [], 0

        def replace(module, arguments, weights):
            nonlocal position
            own.append(weights)
            position += len(weights)
            if replacement is not None:
                return replacement[position - len(weights) : position].to(weights)

        handle = self.model.model.fuser.register_forward_hook(replace)
        try:
            output = self.trainer.predict(self.split)
        finally:
            handle.remove()
        records = make_records(self.task, self.trainer.processing_class, self.split, output)
        return self.task.score(records, len(self.split)), torch.cat(own)


def measure(arguments: list[str]) -> dict:
    evaluation, features = Evaluation(arguments), []
    model = evaluation.model.model
    rows, score = model.hierarchy.rows, evaluation.task.CARD["score"]
    handle = model.fuser.register_forward_pre_hook(lambda module, arguments: features.append(arguments[1]))
    scores, weights = evaluation.answer(None)
    handle.remove()
    accuracy = {"the adapter's own": round(scores[score], 2)}
    for name, replacement in replacements(weights, rows).items():
        accuracy[name] = round(evaluation.answer(replacement)[0][score], 2)
    return {
        "figures": fusion_figures(weights, rows),
        "class_features": spread_over_images(torch.cat(features)),
        "score": score,
        "accuracy": accuracy,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="output folder of train.py")
    parser.add_argument("--output_file", type=Path, help="JSON file to write the report to")
    options, flags = parser.parse_known_args()
    results = Path(options.adapter) / RESULTS_FILE
    if not results.is_file():
        sys.exit(f"There is no {results}. Give the `--output_dir` of a finished run of train.py.")
    results = json.loads(results.read_text(encoding="utf-8"))
    if file := options.output_file:
        require_writable(file.parent)
        if file.is_dir() or file.exists() and not os.access(file, os.W_OK):
            sys.exit(f"`--output_file` is {file}, which cannot be written. Give the name of a JSON file.")
    given = {name: results[name] for name in SOURCE_OF_ROWS if results.get(name) is not None}
    data = [word for name, value in given.items() for word in (f"--{name}", str(value))]
    with TemporaryDirectory() as folder:
        fixed = ["--adapter", options.adapter, "--num_train_epochs", "0", "--output_dir", folder]
        report = measure([*data, *fixed, *flags])
    report = {
        "machine": describe_machine(),
        "command": command_line("fusion"),
        "adapter": options.adapter,
        **report,
    }
    print(describe_fusion(report["figures"]))
    print(f"\n| fusion weights | {report['score']} |\n|---|---|")
    for name, accuracy in report["accuracy"].items():
        print(f"| {name} | {accuracy:.2f} |")
    print("\n| vision layer | class features: mean over images | deviation |\n|---|---|---|")
    for layer, sizes in enumerate(zip(*report["class_features"].values())):
        print(f"| {layer} | {sizes[0]:.3f} | {sizes[1]:.3f} |")
    if options.output_file:
        options.output_file.parent.mkdir(parents=True, exist_ok=True)
        options.output_file.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
