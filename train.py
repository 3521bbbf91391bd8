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

A recipe is a YAML file of the flags that `--help` lists, and perhaps `base:`, a recipe beside it whose values it
changes; flags override both. `--output_dir` gets `run.json` (arguments, config, versions), the adapters
(`model.safetensors` and the files to load them), `README.md` (the card), `predictions.jsonl` and `results.json`.
A run that was cut off goes on from its last complete checkpoint when the same command is started again.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from transformers import EarlyStoppingCallback, set_seed

from tasks import get_task
from training.arguments import check_arguments, complete_arguments, parse_arguments
from training.checkpoints import RESULTS_FILE, RUN_FILE, choose_start, write_json
from training.data import Collator, Split
from training.engines import start_engine
from training.models import count_parameters, load, method_of
from training.results import command_of, describe_run, make_records, open_repository, push, report
from training.trainer import AnswerTrainer


def evaluate(trainer: AnswerTrainer, task, splits: dict[str, Split], facts: dict, data_args, model_args):
    """Saves the adapters, lets them answer the test split, and reports."""
    training_args, processor, split = trainer.args, trainer.processing_class, splits["test"]
    folder = Path(training_args.output_dir)
    trainer.save_model()
    facts["shortened_prompts"] = {name: split.num_shortened for name, split in splits.items()}
    trainer.compute_metrics = None  # it scores the validation split
    output = trainer.predict(split)
    if training_args.process_index == 0:
        # Before scoring, so that no generated answer is lost to a fault there; `python -m tasks score` repeats it
        records = make_records(task, processor, split, output)
        lines = [json.dumps(record, default=str) + "\n" for record in records]
        (folder / "predictions.jsonl").write_text("".join(lines))
        facts |= describe_run(task, processor, trainer.model, split, data_args, model_args, training_args, folder)
        write_json(folder / RESULTS_FILE, facts)
        report(folder, task, processor, split)


def main(arguments: list[str]):
    recipe, data_args, model_args, adapter_args, baseline_args, training_args = parse_arguments(arguments)
    check_arguments(arguments, data_args, model_args, adapter_args, training_args)
    start_engine(training_args)
    set_seed(training_args.seed)
    task = get_task(data_args.task)
    complete_arguments(task, data_args, training_args)
    if hasattr(task, "check_scorer"):  # before hours of training, and not after them
        task.check_scorer()
    main_process, folder = training_args.process_index == 0, Path(training_args.output_dir)
    run, checkpoint = choose_start(training_args, data_args, model_args, adapter_args, baseline_args)
    repository = open_repository(training_args)
    if training_args.run_name is None:  # for `report_to`: the same when the run goes on, and no other run's
        training_args.run_name = f"{folder.name}-{run['run'][:8]}"
    processor, splits, model = load(task, data_args, model_args, adapter_args, baseline_args, training_args)
    trained, total = count_parameters(model)
    method = method_of(model.config, model_args.method)
    if main_process:
        rate = f"learning rate {training_args.learning_rate:g}"
        print(f"recipe {recipe}, method {method}, {rate}, {training_args.world_size} processes")
        print(f"{trained:,} of {total:,} parameters are trained ({100 * trained / total:.2f} %)")
        if checkpoint is not None:
            print(f"going on from {checkpoint}")
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / RUN_FILE, {**run, "recipe": recipe, "config": model.config.to_diff_dict()})

    def compute_metrics(output):
        records = make_records(task, processor, splits["validation"], output)
        return task.score(records, len(splits["validation"]))

    trainer = AnswerTrainer(
        model=model,
        args=training_args,
        train_dataset=splits.get("train"),
        eval_dataset=splits.get("validation"),
        data_collator=Collator(
            processor, getattr(model, "image_tokens", []), getattr(model.config, "reads_instruction", False)
        ),
        processing_class=processor,
        compute_metrics=compute_metrics,
        max_new_tokens=task.MAX_NEW_TOKENS,
        run=run,
    )
    if training_args.early_stopping_patience is not None:
        trainer.add_callback(EarlyStoppingCallback(training_args.early_stopping_patience))
    facts = {"run": run["run"], "method": method, "trained_parameters": trained}
    if "train" in splits:
        training = trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        facts["train_seconds"] = run["train_seconds"] + training.metrics["train_runtime"]
        # Each process reads rows of its own, but the whole of a stream
        times = torch.tensor(splits["train"].num_unreadable, device=training_args.device)
        facts["unreadable_image_reads"] = int(times if data_args.streaming else trainer.accelerator.reduce(times))
    if "train" not in splits or trainer.is_complete():
        facts["command"] = command_of(recipe, arguments)
        evaluate(trainer, task, splits, facts, data_args, model_args)
        if main_process and repository is not None:
            push(folder, repository, training_args)
    elif main_process:
        print(f"\nStopped at step {trainer.state.global_step}. The same command goes on from the last checkpoint.")
    if torch.distributed.is_initialized():
        # Before the group: a trainer under DDP that outlived it was seen to hang, now and then, when it was freed
        del trainer
        gc.collect()
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
