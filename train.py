# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains DEHVF adapters on frozen bases, evaluates them on the test split and saves them with a model card.

    accelerate launch train.py                                          # recipes/digits.yaml, minutes on a CPU
    accelerate launch train.py --visual_prompts none --output_dir outputs/digits-blind
    accelerate launch train.py recipes/scienceqa-llama7b.yaml --per_device_train_batch_size 2
    accelerate launch --num_processes 2 --use_deepspeed train.py --deepspeed ds_config.json

A recipe is a YAML file of the flags that `--help` lists; flags beside it override it. `--output_dir` gets the adapters
(`model.safetensors` and the files to load them), `README.md` (the card), `predictions.jsonl` and `results.json`.
"""

import dataclasses
import difflib
import io
import itertools
import json
import multiprocessing
import os
import sys
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import torch
import yaml
from PIL import Image
from transformers import HfArgumentParser, Trainer, TrainingArguments, set_seed
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import logging

from tasks import NAMES, get_task


ROOT = Path(__file__).parent
DEFAULT_RECIPE = ROOT / "recipes" / "digits.yaml"
logger = logging.get_logger("train")


# ---------------------------------------------------------------------------------------------------------------------
# Arguments: data, bases, adapters, training
# ---------------------------------------------------------------------------------------------------------------------


@dataclass
class DataArguments:
    """What is learned."""

    task: Literal[NAMES] = field(default="digits", metadata={"help": "File in tasks/ that reads and scores the data."})
    data_path: str | None = field(
        default=None, metadata={"help": "Hub id or folder of the data, if not the task's own."}
    )
    max_prompt_length: int = field(
        default=512, metadata={"help": "Longest prompt in tokens. A longer one loses the end of its context."}
    )
    max_samples: int | None = field(
        default=None, metadata={"help": "Take the first so many rows of each split, for a quick try."}
    )


@dataclass
class ModelArguments:
    """The frozen bases."""

    vision_model: str = field(
        default="openai/clip-vit-large-patch14", metadata={"help": "Hub id or folder of the vision encoder."}
    )
    text_model: str = field(
        default="huggyllama/llama-7b", metadata={"help": "Hub id or folder of the language model."}
    )
    vision_model_revision: str | None = field(default=None, metadata={"help": "Commit of the vision encoder."})
    text_model_revision: str | None = field(default=None, metadata={"help": "Commit of the language model."})
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = field(
        default="auto", metadata={"help": "dtype of the frozen bases; adapters are float32."}
    )
    attn_implementation: str | None = field(default=None, metadata={"help": "eager, sdpa, flash_attention_2, ..."})


def adapter_arguments() -> type:
    """The numbers and switches of `DehvfConfig` as a dataclass, so that each default stands there alone."""
    config_class = get_class_from_dynamic_module("configuration_dehvf.DehvfConfig", str(ROOT))
    own = {name: hint for name, hint in config_class.__annotations__.items() if "model_" not in name}
    for name in ("vision_config", "text_config", "tie_word_embeddings"):
        del own[name]
    help_text = {"help": f"See {config_class.__name__}."}
    return dataclasses.make_dataclass(
        "AdapterArguments",
        [
            (
                name,
                float if hint == float | int else hint,
                field(default=getattr(config_class, name), metadata=help_text),
            )
            for name, hint in own.items()
        ],
    )


@dataclass
class DehvfTrainingArguments(TrainingArguments):
    """
    `transformers.TrainingArguments` and one more. Other defaults than there: `remove_unused_columns` (the collator
    makes the model's inputs), `ddp_find_unused_parameters` (each adapter gets a gradient at each step), `report_to`,
    and `use_cpu`, true where there is nothing else.
    """

    base_learning_rate: float | None = field(
        default=None,
        metadata={"help": "Learning rate per 256 samples, the paper's convention: rate x total batch / 256."},
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "Keep false: rows are needed whole."})
    ddp_find_unused_parameters: bool | None = field(default=False, metadata={"help": "Not needed."})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "tensorboard, trackio, ..."})
    use_cpu: bool = field(default=not torch.accelerator.is_available(), metadata={"help": "Train on the CPU."})


def parse_arguments(arguments: list[str]):
    """Reads `[recipe.yaml] [--flag value ...]`. Flags override the recipe; an unknown key ends the run."""
    parser = HfArgumentParser(
        [DataArguments, ModelArguments, adapter_arguments(), DehvfTrainingArguments],
        description=__doc__,
        usage="accelerate launch train.py [recipe.yaml] [--flag value ...]",
        allow_abbrev=False,
    )
    recipe = Path(arguments.pop(0)) if arguments and not arguments[0].startswith("-") else DEFAULT_RECIPE
    if not recipe.is_file():
        raise ValueError(f"There is no recipe {recipe}. There are: {', '.join(map(str, recipes()))}.")
    flags = []
    for key, value in (yaml.safe_load(recipe.read_text()) or {}).items():
        if f"--{key}" not in parser._option_string_actions:
            known = [name.removeprefix("--") for name in parser._option_string_actions]
            close = difflib.get_close_matches(key, known, n=1)
            hint = f" Did you mean `{close[0]}`?" if close else " `train.py --help` lists all."
            raise ValueError(f"{recipe}: unknown key `{key}`.{hint}")
        values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
        flags += [f"--{key}", *map(str, values)]
    parsed = parser.parse_args_into_dataclasses([*flags, *arguments], look_for_args_file=False)
    return recipe, *parsed


def recipes() -> list[Path]:
    return sorted((ROOT / "recipes").glob("*.yaml"))


# ---------------------------------------------------------------------------------------------------------------------
# Data: rows -> token ids -> batches
# ---------------------------------------------------------------------------------------------------------------------


class Split(torch.utils.data.Dataset):
    """
    A split of a task, encoded. Texts are encoded here and now, so that what is wrong with them comes out before
    training; images are decoded when a batch needs them.

    A training row is prompt, answer and end of sequence, with labels on the last two; a row to evaluate is prompt and
    answer prefix. An image that cannot be read is an error in evaluation; in training the next row stands in for it,
    and `num_unreadable` counts.

    Raises:
        ValueError: if the split is empty or lacks a column, or a row has no answer or is too long without context.
    """

    def __init__(self, task, split: str, processor, arguments: DataArguments, training: bool):
        from datasets import Image as ImageFeature

        rows = task.load(split, arguments.data_path)
        if missing := [name for name in task.COLUMNS if name not in rows.column_names]:
            raise ValueError(
                f"The {split} split of `{arguments.task}` lacks the columns {missing}. It has {rows.column_names}."
            )
        if arguments.max_samples is not None:
            rows = rows.select(range(min(arguments.max_samples, len(rows))))
        if not len(rows):
            raise ValueError(f"The {split} split of `{arguments.task}` is empty.")
        self.name, self.training = split, training
        self.rows = rows.cast_column("image", ImageFeature(decode=False))
        self.num_shortened = 0
        self._num_unreadable = multiprocessing.Value("i", 0)  # shared with the workers of a data loader
        self.encoded = [
            self._encode(task, processor, row, index, arguments.max_prompt_length)
            for index, row in enumerate(rows.remove_columns("image"))
        ]
        if self.num_shortened:
            logger.warning(
                f"{self.num_shortened} of {len(rows)} prompts of the {split} split were longer than "
                f"{arguments.max_prompt_length} tokens and lost the end of their context."
            )

    @property
    def num_unreadable(self) -> int:
        return self._num_unreadable.value

    def _encode(self, task, processor, row: dict, index: int, max_prompt_length: int) -> dict[str, list[int]]:
        tokenizer = processor.tokenizer
        context = task.context(row)
        prompt = render(processor, task.prompt(row, context))
        excess = len(tokenizer(prompt).input_ids) - max_prompt_length
        if excess > 0:
            offsets = tokenizer(context, return_offsets_mapping=True, add_special_tokens=False).offset_mapping
            # A cut can leave a word in more tokens than it had, hence perhaps once more
            while excess > 0 and offsets:
                offsets = offsets[:-excess]
                context = context[: offsets[-1][1]] if offsets else ""
                prompt = render(processor, task.prompt(row, context))
                excess = len(tokenizer(prompt).input_ids) - max_prompt_length
            self.num_shortened += 1
        if excess > 0:
            raise ValueError(
                f"Row {index} of the {self.name} split has {excess + max_prompt_length} tokens without any context, "
                f"more than `max_prompt_length={max_prompt_length}`. Raise the limit: question, options and answer "
                "are never cut."
            )
        if not self.training:
            return {"input_ids": tokenizer(prompt + task.ANSWER_PREFIX).input_ids}
        # Encoded in one piece, as the model will meet it, and split where the prompt ends
        answer = task.answer(row)
        encoded = tokenizer(f"{prompt} {answer}", return_offsets_mapping=True)
        labels = [
            token if start >= len(prompt) and end > start else -100
            for token, (start, end) in zip(encoded.input_ids, encoded.offset_mapping)
        ]
        if not answer.strip() or all(label == -100 for label in labels):
            raise ValueError(f"Row {index} of the {self.name} split has no answer to learn: {row}")
        end = tokenizer.eos_token_id
        return {"input_ids": [*encoded.input_ids, end], "labels": [*labels, end]}

    def __len__(self) -> int:
        return len(self.encoded)

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):  # or `list(split)` would never end
            raise IndexError(f"Row {index} was asked for, but the {self.name} split has {len(self)} rows.")
        for row in itertools.chain(range(index, len(self)), range(index)):
            try:
                image = read_image(self.rows[row]["image"])
            except Exception as error:  # PIL raises many kinds
                message = f"The image in row {row} of the {self.name} split cannot be read: {error}"
                if not self.training:
                    raise ValueError(message) from error
                with self._num_unreadable.get_lock():
                    self._num_unreadable.value += 1
                logger.warning(f"{message}. The next row stands in.")
                continue
            return {"index": row, "image": image, **self.encoded[row]}
        raise ValueError(f"No image of the {self.name} split can be read.")


def render(processor, prompt: str) -> str:
    return processor.apply_chat_template([{"role": "user", "content": prompt}], add_generation_prompt=True)


def read_image(image: dict | None) -> Image.Image | None:
    if image is None:
        return None
    return Image.open(io.BytesIO(image["bytes"]) if image["bytes"] is not None else image["path"]).convert("RGB")


@dataclass
class Collator:
    """
    Rows of a [`Split`] -> a batch, padded on the left. Two rows of 3 and 2 tokens, the second with an image:

        input_ids      (2, 3)          attention_mask [[1, 1, 1], [0, 1, 1]]
        pixel_values   (2, 3, 64, 64)  image_mask     [False, True]
        labels         (2, 3), -100 on padding and prompt, in training; index (2,), the row's number, in evaluation
    """

    processor: object

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        tokens = {"input_ids": [row["input_ids"] for row in rows]}
        batch = self.processor.tokenizer.pad(tokens, return_tensors="pt")
        length = batch["input_ids"].shape[1]
        if "labels" in rows[0]:
            labels = [[-100] * (length - len(row["labels"])) + row["labels"] for row in rows]
            batch["labels"] = torch.tensor(labels)
        else:
            batch["index"] = torch.tensor([row["index"] for row in rows])
        images = [row["image"] for row in rows]
        if any(image is not None for image in images):
            batch.update(self.processor(images=images, return_tensors="pt"))
        return dict(batch)


# ---------------------------------------------------------------------------------------------------------------------
# Training and evaluation
# ---------------------------------------------------------------------------------------------------------------------


class AnswerTrainer(Trainer):
    """A Trainer whose evaluation lets the model answer: predictions are the new tokens, labels the rows' numbers."""

    def __init__(self, *args, max_new_tokens: int, **kwargs):
        super().__init__(*args, **kwargs)
        self.max_new_tokens = max_new_tokens

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        index = inputs.pop("index")
        model = self.accelerator.unwrap_model(model)
        tokens = model.generate(**inputs, max_new_tokens=self.max_new_tokens, do_sample=False)
        return None, tokens[:, inputs["input_ids"].shape[1] :], index


def decode(processor, split: Split, output) -> dict[int, str]:
    """Row number -> the model's words, from the output of `AnswerTrainer`, for each row of the split once."""
    tokens = torch.as_tensor(output.predictions)
    tokens = tokens.masked_fill(tokens == -100, processor.tokenizer.pad_token_id)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    predictions = dict(sorted(zip(output.label_ids.tolist(), texts)))
    if list(predictions) != list(range(len(split))):
        raise ValueError(f"{len(predictions)} answers came back for the {len(split)} rows of the {split.name} split.")
    return predictions


def write_predictions(file: Path, task, split: Split, predictions: dict[int, str]):
    """One JSON object a line. Before scoring, so that no generated answer is lost to a fault there."""
    rows = split.rows.remove_columns("image")
    with open(file, "w") as lines:
        for index, prediction in predictions.items():
            row = {"index": index, "prediction": prediction, "expected": task.answer(rows[index]), **rows[index]}
            lines.write(json.dumps(row) + "\n")


def write_card(folder: Path, model, results: dict):
    """A card with valid metadata. A base in a local folder has no Hub id to name, so it is left out."""
    from huggingface_hub import EvalResult, ModelCard, ModelCardData

    bases = [base for base in (model.config.text_model_id, model.config.vision_model_id) if not Path(base).exists()]
    scores, task_name = results["scores"], results["task"]
    data = ModelCardData(
        base_model=bases or None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=["dehvf", "adapter"],
        model_name=folder.name,
        eval_results=[
            EvalResult(
                task_type="visual-question-answering",
                dataset_type=task_name,
                dataset_name=task_name,
                dataset_split="test",
                metric_type="accuracy",
                metric_value=round(scores["average"], 2),
            )
        ],
    )
    table = "\n".join(f"| {name} | {value:.2f} |" for name, value in scores.items() if value is not None)
    ModelCard(
        f"---\n{data.to_yaml()}\n---\n\n# {folder.name}\n\nDEHVF adapters: {results['trained_parameters']:,} trained "
        f"parameters on the frozen {model.config.text_model_id} and {model.config.vision_model_id}.\n\n"
        f"## Test split of `{task_name}`, {results['size']} rows\n\n| | |\n|---|---|\n{table}\n\n"
        f"## Use\n\n```python\n{example_code(folder)}```\n"
    ).save(folder / "README.md")


def example_code(folder: Path) -> str:
    """Lines of Python that load what was trained and ask about an image of the test split."""
    return f"""\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = {str(folder)!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = open(folder + "/example.txt").read()
inputs = processor(images=Image.open(folder + "/example.png"), text=question, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
print(question + processor.batch_decode(answer, skip_special_tokens=True)[0])
"""


def write_example(folder: Path, task, processor, split: Split) -> bool:
    """The first question of a split that has an image, for `example_code`."""
    for index, row in enumerate(split.rows):
        if row["image"] is not None:
            split[index]["image"].save(folder / "example.png")
            (folder / "example.txt").write_text(render(processor, task.prompt(row, task.context(row))))
            return True
    return False


def count_parameters(model) -> tuple[int, int]:
    """Trained and all; under ZeRO-3 a parameter's own size is zero and `ds_numel` tells."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


def load(task, data_args, model_args, adapter_args, training_args):
    """Returns the processor, the splits by name (data before models: its faults come out sooner) and the model."""
    with training_args.main_process_first(desc="load the remote code"):  # its cache is not made for several writers
        model_class = get_class_from_dynamic_module("modeling_dehvf.DehvfForConditionalGeneration", str(ROOT))
        processor_class = get_class_from_dynamic_module("processing_dehvf.DehvfProcessor", str(ROOT))
    bases = (model_args.vision_model, model_args.text_model)
    revisions = {name: getattr(model_args, name) for name in ("vision_model_revision", "text_model_revision")}
    processor = processor_class.from_vision_text_pretrained(*bases, **revisions)
    names = ("train", "test") if training_args.eval_strategy == "no" else ("train", "validation", "test")
    splits = {name: Split(task, name, processor, data_args, training=name == "train") for name in names}
    model = model_class.from_vision_text_pretrained(
        *bases,
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **revisions,
        **dataclasses.asdict(adapter_args),
    )
    return processor, splits, model


def report(folder: Path, task, processor, model, split: Split, predictions: dict[int, str], facts: dict):
    """Scores the predictions and leaves everything about the run in its folder."""
    results = {
        "scores": task.score(list(predictions.values()), split.rows),
        "split": split.name,
        "size": len(split),
        "template": render(processor, task.prompt(split.rows[0], "{context}")) + task.ANSWER_PREFIX,
        "decoding": f"greedy, {task.MAX_NEW_TOKENS} tokens",
        **facts,
        "config": model.config.to_diff_dict(),
        "versions": {name: version(name) for name in ("torch", "transformers", "accelerate", "datasets")},
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2, default=str))
    write_card(folder, model, results)
    print(" ".join(f"{name} {value:.2f}" for name, value in results["scores"].items() if value is not None))
    if write_example(folder, task, processor, split):
        print(f"\nTo ask the result about an image:\n\n{example_code(folder)}")


def main():
    if "--deepspeed" in sys.argv and "RANK" not in os.environ:
        # `accelerate launch` sets these for several processes alone; without them DeepSpeed asks for MPI
        os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
    recipe, data_args, model_args, adapter_args, training_args = parse_arguments(sys.argv[1:])
    set_seed(training_args.seed)
    if training_args.use_cpu:  # `accelerate launch` leaves each process a single thread
        torch.set_num_threads(max(1, os.cpu_count() // training_args.world_size))
    if training_args.base_learning_rate is not None:
        devices = training_args.gradient_accumulation_steps * training_args.world_size
        batch_size = training_args.per_device_train_batch_size * devices
        training_args.learning_rate = training_args.base_learning_rate * batch_size / 256

    task = get_task(data_args.task)
    processor, splits, model = load(task, data_args, model_args, adapter_args, training_args)
    trained, total = count_parameters(model)
    main_process = training_args.process_index == 0
    if main_process:
        print(f"recipe {recipe}, {len(splits['train'])} rows, learning rate {training_args.learning_rate:g}")
        print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)")

    def compute_metrics(output):
        predictions = decode(processor, splits["validation"], output)
        return task.score(list(predictions.values()), splits["validation"].rows)

    trainer = AnswerTrainer(
        model=model,
        args=training_args,
        train_dataset=splits["train"],
        eval_dataset=splits.get("validation"),
        data_collator=Collator(processor),
        processing_class=processor,
        compute_metrics=compute_metrics,
        max_new_tokens=task.MAX_NEW_TOKENS,
    )
    facts = {"task": data_args.task, "seed": training_args.seed, "trained_parameters": trained}
    facts["train_seconds"] = trainer.train().metrics["train_runtime"]
    trainer.save_model()
    facts["shortened_prompts"] = {name: split.num_shortened for name, split in splits.items()}
    facts["unreadable_images"] = splits["train"].num_unreadable
    trainer.compute_metrics = None  # it scores the validation split
    output = trainer.predict(splits["test"])
    if main_process:
        folder = Path(training_args.output_dir)
        predictions = decode(processor, splits["test"], output)
        write_predictions(folder / "predictions.jsonl", task, splits["test"], predictions)
        report(folder, task, processor, model, splits["test"], predictions, facts)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
