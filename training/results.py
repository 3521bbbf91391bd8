# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Writes the results of a run: predictions, scores, the model card, and a repository on the Hub."""

import json
import re
import shlex
import shutil
import tempfile
from pathlib import Path

import numpy as np
import torch
from huggingface_hub import EvalResult, upload_folder
from transformers.trainer_utils import PredictionOutput
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME, cached_file, extract_commit_hash

from dehvf import hub
from tasks import PREDICTIONS_FILE, RESULTS_FILE, format_score, get_task, print_scores, score_folder, write_json
from tasks._holdout import KEPT_TOGETHER
from training.arguments import BASES, DEHVF_METHODS
from training.chats import ChatTokenizer, render
from training.checkpoints import describe_code, digest
from training.data import Split
from training.encoding import messages_before_answer
from training.engines import name_precision
from training.flags import ROOT
from training.fusion import describe_fusion


# Files to push: no checkpoints, no pickled arguments, and nothing from data that may be private, such as example.txt.
# The last two lines are files of tokenizers.
PUSHED_FILES = ["README.md", "*_dehvf.py", "results.json", ".eval_results/*.yaml"]
PUSHED_FILES += ["model.safetensors", "*config.json", "chat_template.jinja"]
PUSHED_FILES += ["tokenizer*.json", "*.model", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json"]
PUSHED_FILES += ["normalizer.json", "source.spm", "target.spm"]
KEPT_FILES = ["[!.]*/*"]  # in folders whose names do not begin with a dot
# Arguments that determine the rows of a split, in results.json
SOURCE_OF_ROWS = ("task", "data_path", "columns", "holdout", "captions", "max_samples", "only_images")
SOURCE_OF_ROWS += ("max_prompt_length",)
# Values in the scores of a task for which higher is not better
NO_SCORES = ("count", "scale", "unparsed")


def evaluate(trainer, task, splits: dict[str, Split], facts: dict, data_args, model_args):
    """Saves the adapters, answers the test split, and writes the predictions, the results (`facts`) and the card."""
    training_args, processor, split = trainer.args, trainer.processing_class, splits["test"]
    folder = Path(training_args.output_dir)
    trainer.save_model()
    trainer.compute_metrics = None  # it is for the validation split
    trainer.fusion.figures()  # discards the statistics of training
    try:
        output = trainer.predict(split)
        facts |= {"fusion": trainer.fusion.figures()}
        if training_args.process_index == 0:
            records = make_records(task, processor, split, output)
            facts |= {"shortened_prompts": {name: split.num_shortened for name, split in splits.items()}}
            if data_args.max_new_tokens > 1:
                facts["cut_answers"] = sum(record["cut"] for record in records)
            facts |= describe_run(task, processor, trainer.model, split, data_args, model_args, training_args)
            save_answers(folder, records, facts)
    except (Exception, KeyboardInterrupt) as error:
        error.add_note(
            f"The adapters are complete in {folder}. To evaluate them without training again, give `--adapter "
            f"{folder} --num_train_epochs 0`, another `--output_dir` and the flags of the data (for a baseline also "
            "its `--method`, bases and sizes), perhaps with a smaller `--per_device_eval_batch_size`."
        )
        raise
    if training_args.process_index == 0:
        try:
            report(folder, task, processor, split)
        except Exception as error:
            error.add_note(
                f"The answers are complete in {folder}. To score them, run `python -m tasks score {folder}`."
            )
            raise


def save_answers(folder: Path, records: list[dict], facts: dict):
    """
    Writes the answers before they are scored, so that an error in the scoring does not lose them.

    Raises:
        OSError: if the folder cannot be written. The answers are in a temporary folder, whose name is in the message.
    """
    lines = "".join(json.dumps(record, default=str) + "\n" for record in records)

    def write(folder: Path):
        (folder / PREDICTIONS_FILE).write_text(lines, encoding="utf-8")
        write_json(folder / RESULTS_FILE, facts)

    try:
        write(folder)
    except OSError as error:
        write(other := Path(tempfile.mkdtemp(prefix="dehvf-")))
        (folder / PREDICTIONS_FILE).unlink(missing_ok=True)  # it may be incomplete
        raise OSError(
            f"{folder} could not be written: {error}. The answers were saved to {other} instead. To score them, run "
            f"`python -m tasks score {other}`."
        ) from error


def make_records(task, processor, split: Split, output) -> list[dict]:
    """
    The lines of `predictions.jsonl`: each row of the split once, with the prediction of `AnswerTrainer`, without the
    text that the chat template puts before each answer.
    """
    tokens, choices = output.predictions
    tokens = torch.as_tensor(tokens)
    tokens = tokens.masked_fill(tokens == -100, processor.tokenizer.pad_token_id)
    texts = processor.batch_decode(tokens, skip_special_tokens=True)
    chat = ChatTokenizer(processor)
    if not task.ANSWER_PREFIX and (preface := chat.answer_preface()):
        texts = [text.strip().removeprefix(preface) for text in texts]
    ended = torch.isin(tokens, torch.tensor([*chat.special_ids])).any(dim=1)
    answers = dict(sorted(zip(output.label_ids.tolist(), zip(texts, choices.tolist(), ended.tolist()))))
    if list(answers) != list(range(len(split))):
        raise ValueError(f"There are {len(answers)} answers for the {len(split)} rows of the {split.name} split.")
    records = []
    for index, (row, encoded) in enumerate(zip(split.rows, split.encoded)):
        has_image = row.pop("image") is not None
        row.pop("images", None)
        prediction, choice, has_ended = answers[index]
        # What follows an option does not matter, and an answer of one token cannot show whether it is complete
        options = "|".join(re.escape(option.strip()) for option in task.options(row) or ())
        names_option = options and re.match(rf"\s*(?:{options})\b", prediction)
        cut = not has_ended and not names_option and tokens.shape[1] > 1
        facts = {"index": index, "prediction": prediction, "cut": cut, "expected": task.answer(row)}
        facts |= {"choice": choice if encoded["options"] else None, "has_image": has_image}
        records.append({**row, **facts})
    return records


def check_metric(task, processor, split: Split, metric: str):
    """Raises `ValueError` if `metric_for_best_model` is not a score of the task on this split."""
    zeros = np.zeros(len(split), dtype=int)
    output = PredictionOutput((zeros[:, None], zeros), np.arange(len(split)), {})
    records = [{**record, "prediction": record["expected"]} for record in make_records(task, processor, split, output)]
    scores = task.score(records, len(split))
    known = [name for name, value in scores.items() if value is not None and name not in NO_SCORES] + ["loss"]
    if metric.removeprefix("eval_") not in known:
        raise ValueError(
            f"`--metric_for_best_model {metric}` is not a score of the {split.name} split. Scores: {', '.join(known)}."
        )


def describe_run(task, processor, model, split: Split, data_args, model_args, training_args) -> dict:
    """Everything that a reader needs to reproduce a result."""
    weights = Path(training_args.output_dir).glob("*.safetensors")
    bases = {f"{base}_model": getattr(model_args, f"{base}_model") for base in BASES}
    revisions = {f"{base}_model_revision": base_revision(model.config, base, bases[f"{base}_model"]) for base in BASES}
    return {
        **{name: getattr(data_args, name) for name in SOURCE_OF_ROWS},
        "holdout_groups": KEPT_TOGETHER if data_args.holdout else None,
        "split": split.name,
        "size": len(split),
        "template": render(processor, "{prompt}") + task.ANSWER_PREFIX,
        "decoding": f"greedy, max_new_tokens={data_args.max_new_tokens}",
        **{name: getattr(training_args, name) for name in ("seed", "data_seed", "learning_rate")},
        "mixed_precision": name_precision(training_args),
        "adapter": model_args.adapter,
        "adapter_revision": commit_of(model_args.adapter, model_args.adapter_revision),
        "adapter_sha256": {file.name: digest(file) for file in weights},
        **bases,
        **revisions,
        "config": model.config.to_diff_dict(),
        **describe_code(),
    }


def commit_of(location: str | None, revision: str | None) -> str | None:
    """The commit of adapters on the Hub; `None` for a folder."""
    if location is None or Path(location).is_dir():
        return None
    return extract_commit_hash(cached_file(location, CONFIG_NAME, revision=revision), None)


def base_revision(config, base: str, location: str) -> str | None:
    """The commit of a base, if it was loaded from the place in the config."""
    known = getattr(config, f"{base}_model_id") == location
    return getattr(config, f"{base}_model_revision") if known else None


def command_of(recipe: Path, flags: list[str]) -> str:
    """The command of a run, without the token."""
    recipe = recipe.relative_to(ROOT) if recipe.is_relative_to(ROOT) else recipe
    flags = flags[1:] if flags and not flags[0].startswith("-") else flags
    command = shlex.join(["accelerate", "launch", "train.py", str(recipe), *flags])
    return re.sub(r"--hub[-_]token[= ]\S+", "--hub_token ...", command)


def write_card(folder: Path, name: str, results: dict, code: str | None):
    """Writes the model card of a run, with its data, scores and command."""
    scores, config = results["scores"], results["config"]
    task = get_task(results["task"])
    path = (results["data_path"] or "").partition(":")[0]
    is_on_hub = path and hub.is_hub_id(path)
    dataset = path if is_on_hub else getattr(task, "DATASET", None)
    data = {"dataset_type": dataset or results["task"], "dataset_name": results["task"]}
    metric = {"metric_type": task.CARD["metric_type"], "metric_value": round(scores[task.CARD["score"]], 2)}
    split = task.CARD.get("split", results["split"])
    result = EvalResult(task_type=task.CARD["task_type"], dataset_split=split, **data, **metric)
    # The score of other rows than those of a published split is not a result on it
    is_part = results["holdout"] or results["max_samples"] or results["only_images"]
    has_own_rows = not is_on_hub and results["size"] != getattr(task, "DATASET_ROWS", results["size"])
    is_published = dataset or hasattr(task, "DATASET_ROWS")
    is_whole = not is_published or not (is_part or has_own_rows)
    bases = {
        config.get(f"{base}_model_id", results[f"{base}_model"]): config.get(f"{base}_model_revision")
        for base in reversed(BASES)
    }
    table = "\n".join(f"| {kind} | {format_score(value)} |" for kind, value in scores.items() if value is not None)
    fusion = f"{describe_fusion(results['fusion'])}\n\n" if results["fusion"] else ""
    sections = (
        f"## Test split of `{results['task']}`, {results['size']} rows\n\n| | |\n|---|---|\n{table}\n\n{fusion}"
        f"## Recipe\n\n```bash\n{results['command']}\n```\n\n"
    )
    adapter_digest = results["adapter_sha256"][SAFE_WEIGHTS_NAME]
    facts = results["method"], bases, results["trained_parameters"], code, results["versions"], adapter_digest
    metadata = {"datasets": [dataset] if dataset else None, "model_name": name}
    metadata |= {"eval_results": [result]} if is_whole else {}
    card = hub.make_card(name, *facts, sections, **metadata)
    card.save(folder / "README.md")
    shutil.rmtree(folder / ".eval_results", ignore_errors=True)  # of an earlier run
    if dataset and is_whole:
        hub.write_eval_results(folder, dataset, results["task"], result.metric_value)


def example_code(folder: Path) -> str:
    """Lines of Python that load the adapters and ask about an image of the test split."""
    return f"""\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

folder = {str(folder)!r}
model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
question = open(folder + "/example.txt", encoding="utf-8").read()
inputs = processor(images=Image.open(folder + "/example.png"), text=question, return_tensors="pt")
tokens = model.generate(**inputs, max_new_tokens=10, do_sample=False)
print(processor.batch_decode(tokens, skip_special_tokens=True)[0])
"""


def write_example(folder: Path, task, processor, split: Split) -> bool:
    """
    Writes the first question with an image to files, for `example_code`, if possible of a row without earlier turns,
    which the web page can show. Returns whether there is one.
    """
    for name in ("example.png", "example.txt"):  # of an earlier run
        (folder / name).unlink(missing_ok=True)
    example = None
    for index, row in enumerate(split.rows):
        if row["image"] is not None and not row.get("images"):
            messages = messages_before_answer(task, row, task.context(row))
            if len(messages) == 1:
                example = index, messages
                break
            example = example or (index, messages)
    if example is None:
        return False
    index, messages = example
    split[index]["image"].save(folder / "example.png")
    question = processor.apply_chat_template(messages, add_generation_prompt=True)
    (folder / "example.txt").write_text(question, encoding="utf-8")
    return True


def report(folder: Path, task, processor, split: Split):
    """Scores the predictions in a folder, writes its model card and prints how to use the adapters."""
    results = score_folder(folder)
    print_scores(results)
    if results.get("cut_answers"):
        print(
            f"{results['cut_answers']} of {results['size']} answers were cut off. To allow longer ones without "
            f"training again, give a larger `--max_new_tokens`, `--adapter {folder} --num_train_epochs 0` and another "
            "`--output_dir`."
        )
    if results["fusion"]:
        print(describe_fusion(results["fusion"]))
    usable = results["method"] in DEHVF_METHODS and write_example(folder, task, processor, split)
    code = example_code(folder) if usable else None
    write_card(folder, folder.name, results, code)
    if usable:
        print(f"\nTo ask about an image:\n\n{code}")


def open_repository(training_args) -> str | None:
    """
    With `--push_to_hub`, creates the repository, so that errors of the Hub are raised before training. The Trainer
    itself must not push, since it would push without results and with its pickled arguments.
    """
    asked, training_args.push_to_hub = training_args.push_to_hub, False
    if not asked or training_args.process_index != 0:
        return None
    name = training_args.hub_model_id or Path(training_args.output_dir).absolute().name
    private, token = training_args.hub_private_repo, training_args.hub_token
    return hub.open_repository(name, private, token, training_args.hub_revision)


def push(folder: Path, repo_id: str, training_args):
    """
    Pushes the adapters, the card and the results of a complete run in one commit, which removes the scores of another
    adapter. A card that a person has written is kept.
    """
    results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
    source = {"revision": training_args.hub_revision, "token": training_args.hub_token}
    write_card(folder, repo_id.split("/")[-1], results, hub.example_code(repo_id, training_args.hub_revision))
    kept_files = KEPT_FILES
    try:
        card, made_for = hub.find_card(repo_id, **source)
        if card is not None and made_for is None:
            print(f"The README.md of {repo_id} was not written by a push, and is kept. The new one is in {folder}.")
            kept_files = [*KEPT_FILES, "README.md"]
        commit = upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message="Upload DEHVF adapters",
            allow_patterns=PUSHED_FILES,
            ignore_patterns=kept_files,
            delete_patterns=hub.find_old_scores(repo_id, results["adapter_sha256"][SAFE_WEIGHTS_NAME], **source),
            **source,
        )
    except Exception as error:
        words = ["hf", "upload", repo_id, str(folder), "."]
        words += [word for pattern in PUSHED_FILES for word in ("--include", pattern)]
        words += [word for pattern in kept_files for word in ("--exclude", pattern)]
        error.add_note(f"The run is complete in {folder}. To repeat only the push:\n\n{shlex.join(words)}")
        raise
    print(f"\nPushed: {commit.commit_url}")
