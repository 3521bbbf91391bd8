# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Trains adapters on frozen bases, evaluates them on the test split and saves them with a model card.

    accelerate launch train.py                                          # recipes/digits.yaml, minutes on a CPU
    accelerate launch train.py --visual_prompts none --output_dir outputs/digits-blind
    accelerate launch train.py --method llava-lora --output_dir outputs/digits-llava-lora
    accelerate launch train.py --adapter outputs/digits --num_train_epochs 0 --output_dir outputs/digits-again
    accelerate launch train.py recipes/scienceqa-llama7b.yaml --per_device_train_batch_size 2
    accelerate launch --num_processes 2 --use_deepspeed train.py --deepspeed ds_config.json
    accelerate launch train.py recipes/scienceqa-llama7b.yaml --push_to_hub true --hub_model_id org/dehvf-llama7b

A recipe is a YAML file with flags that `--help` lists. It may name another recipe as its `base`; flags override both.
A run writes `run.json` (arguments, config, versions), the adapters (`model.safetensors` and the files to load them),
`README.md` (the model card), `predictions.jsonl` and `results.json` to `--output_dir`. With `--save_strategy steps` or
`epoch`, an interrupted run resumes from its last complete checkpoint when the same command is run again.
"""

import gc
import sys
from pathlib import Path

from training.flags import read_command, show_help


if __name__ == "__main__":
    # Before the imports below, which take seconds
    read_command(sys.argv[1:])  # reports wrong flags
    show_help(sys.argv[1:])

import torch  # noqa: E402
from transformers import EarlyStoppingCallback, set_seed  # noqa: E402

from dehvf import adapters  # noqa: E402
from tasks import get_task, write_json  # noqa: E402
from training.arguments import check_arguments, complete_arguments, parse_arguments  # noqa: E402
from training.checkpoints import RUN_FILE, check_same_rows, choose_start  # noqa: E402
from training.data import Collator, Split, digest_rows, load_splits  # noqa: E402
from training.engines import start_engine  # noqa: E402
from training.models import end_at_turns, load_model, load_processor, method_of  # noqa: E402
from training.results import check_metric, command_of, evaluate, make_records, open_repository, push  # noqa: E402
from training.trainer import AnswerTrainer  # noqa: E402


def main(arguments: list[str]):
    recipe, data_args, model_args, adapter_args, baseline_args, training_args = parse_arguments(arguments)
    check_arguments(arguments, data_args, model_args, adapter_args, training_args)
    start_engine(training_args)
    set_seed(training_args.seed)
    task = get_task(data_args.task)
    complete_arguments(task, data_args, training_args)
    if hasattr(task, "check_scorer"):
        task.check_scorer()

    main_process, folder = training_args.process_index == 0, Path(training_args.output_dir)
    run, checkpoint = choose_start(training_args, data_args, model_args, adapter_args, baseline_args)
    repository = open_repository(training_args)
    if training_args.run_name is None:  # for `report_to`: unique for each run, and unchanged when it is resumed
        training_args.run_name = f"{folder.name}-{run['run'][:8]}"

    processor = load_processor(model_args, adapter_args)
    splits = load_splits(task, processor, data_args, training_args)  # before the model, so that errors come early
    if "validation" in splits and training_args.metric_for_best_model not in (None, task.CARD["score"]):
        check_metric(task, processor, splits["validation"], training_args.metric_for_best_model)
    run["rows"] = digest_rows(splits)
    if checkpoint is not None:
        check_same_rows(run["rows"], checkpoint)
    model = load_model(model_args, adapter_args, baseline_args)
    end_at_turns(model, processor)
    trained, total = adapters.count_parameters(model)
    facts = {"run": run["run"], "method": method_of(model.config, model_args.method), "trained_parameters": trained}
    if main_process:
        rate = f"learning rate {training_args.learning_rate:g}"
        print(f"recipe {recipe}, method {facts['method']}, {rate}, processes: {training_args.world_size}")
        print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)")
        if checkpoint is not None:
            print(f"resuming from {checkpoint}")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, {**run, "recipe": recipe, "config": model.config.to_diff_dict()})

    trainer = make_trainer(task, processor, splits, model, data_args, training_args, run)
    if "train" in splits:
        facts |= train(trainer, checkpoint, streamed=data_args.streaming)
    if "train" not in splits or trainer.is_complete():
        facts["command"] = command_of(recipe, arguments)
        evaluate(trainer, task, splits, facts, data_args, model_args)
        if main_process and repository is not None:
            push(folder, repository, training_args)
    elif main_process:
        print(f"\nStopped at step {trainer.state.global_step}. The same command resumes from the last checkpoint.")

    if torch.distributed.is_initialized():
        # In this order: under DDP, freeing the Trainer after its process group sometimes hung
        del trainer
        gc.collect()
        torch.distributed.destroy_process_group()


def make_trainer(task, processor, splits: dict, model, data_args, training_args, run: dict) -> AnswerTrainer:
    def compute_metrics(output):
        records = make_records(task, processor, splits["validation"], output)
        return task.score(records, len(splits["validation"]))

    image_tokens = getattr(model, "image_tokens", [])
    for split in splits.values():
        if image_tokens and isinstance(split, Split):
            split.check_lengths(processor, data_args.max_new_tokens, len(image_tokens))
    trainer = AnswerTrainer(
        model=model,
        args=training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=Collator(processor, image_tokens, getattr(model.config, "reads_instruction", False)),
        processing_class=processor,
        compute_metrics=compute_metrics,
        max_new_tokens=data_args.max_new_tokens,
        run=run,
    )
    if training_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training_args.early_stopping_patience))
    return trainer


def train(trainer: AnswerTrainer, checkpoint: Path | None, streamed: bool) -> dict:
    """Trains. Returns the seconds, with those before the checkpoint, and the number of unreadable images."""
    result = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    unreadable = torch.tensor(int(trainer.train_dataset.unreadable_images), device=trainer.args.device)
    return {
        "train_seconds": trainer.run["train_seconds"] + result.metrics["train_runtime"],
        # Each process reads its own rows, but every process reads the whole stream
        "unreadable_image_reads": int(unreadable if streamed else trainer.accelerator.reduce(unreadable)),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
