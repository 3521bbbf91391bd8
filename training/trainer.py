# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The Trainer of `train.py`: it evaluates by generating answers, writes complete checkpoints and stops at NaN."""

import copy
import json
import re
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from transformers import EarlyStoppingCallback, GenerationConfig, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_pt_utils import LabelSmoother
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import logging

from dehvf import DehvfForConditionalGeneration
from training.checkpoints import find_last_checkpoint, read_manifest, remove_older_checkpoints, write_manifest
from training.engines import AdapterTrainer
from training.fusion import FusionRecorder


logger = logging.get_logger("train")


def generate_greedily(model, **kwargs):
    """
    Calls `generate` with only the token ids of the model's generation config. `do_sample=False` is not enough: the
    config of a language model may also have beams, a repetition penalty or a time limit.
    """
    given = model.generation_config
    ids = {name: getattr(given, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = GenerationConfig(**ids)
    try:
        return model.generate(**kwargs)
    finally:
        model.generation_config = given


class AnswerTrainer(AdapterTrainer):
    """
    A Trainer for adapters on frozen bases. Evaluation generates an answer for each row: the predictions are the new
    tokens and the index of the most likely option (-1 for a row without options), the labels are the indices of the
    rows. There is a loss if the split also has the correct answers, see [`Split`].

    Args:
        max_new_tokens: maximum length of an answer.
        run: facts for the manifest of each checkpoint, see [`find_start`].

    Raises:
        ValueError: under FSDP 1, which flattens adapters and frozen weights into one tensor.
    """

    def __init__(self, *args, max_new_tokens: int, run: dict, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP 1 does not keep adapters apart from frozen weights. Set `fsdp_version: 2` in the accelerate "
                "config."
            )
        if self.label_smoother is not None:
            self.label_smoother = ShiftedLabelSmoother(self.args.label_smoothing_factor)
        self.max_new_tokens, self.run = max_new_tokens, run
        self.losses = []  # for each batch of the current optimizer step: whether its loss is finite, and its rows
        self.speed = Speed()
        self.add_callback(self.speed)
        self.fusion = FusionRecorder(self.model)
        self.add_callback(StepChecks(self))
        for callback in self.callback_handler.callbacks:
            if type(callback).__name__ == "JITCheckpointCallback":
                # There, dropout has drawn the random numbers of the step that a resumed run repeats
                callback.on_pre_optimizer_step = lambda *args, **kwargs: None

    def get_decay_parameter_names(self, model) -> list[str]:
        """
        Weight decay is for matrices only. It would pull the scales of LLaMA-Adapter V2, which start at 1 and multiply
        the outputs of frozen layers, towards 0.
        """
        # ZeRO-3 leaves empty tensors and keeps the shape in `ds_shape`
        vectors = {name for name, p in model.named_parameters() if len(getattr(p, "ds_shape", p.shape)) < 2}
        return [name for name in super().get_decay_parameter_names(model) if name not in vectors]

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        """Puts the fuser and its query into separate groups if `fuser_lr_ratio` changes their learning rate."""
        is_new = self.optimizer is None  # with DeepSpeed, this is called twice
        optimizer, ratio = super().create_optimizer(model), self.args.fuser_lr_ratio
        if ratio == 1 or not is_new:
            return optimizer
        named = (self.model if model is None else model).named_parameters()
        fuser = {id(parameter) for name, parameter in named if re.search(r"\b(fuser|fuser_query)\.", name)}
        groups = []
        for group in optimizer.param_groups:
            for inside, rate in ((False, group["lr"]), (True, ratio * group["lr"])):
                if parameters := [parameter for parameter in group["params"] if (id(parameter) in fuser) == inside]:
                    groups.append({**group, "lr": rate, "params": parameters})
        optimizer.param_groups[:] = groups
        return optimizer

    def train(self, resume_from_checkpoint: str | None = None, **kwargs):
        self.resumed_from = resume_from_checkpoint
        return super().train(resume_from_checkpoint, **kwargs)

    # --- rows ---

    def get_train_dataloader(self):
        """Raises `ValueError` if `dataloader_drop_last` drops all rows, so that there would be no step."""
        loader = super().get_train_dataloader()
        if isinstance(loader.dataset, torch.utils.data.IterableDataset) or len(loader):
            return loader
        raise ValueError(
            f"The train split has {len(self.train_dataset)} rows, fewer than a batch on each process "
            f"({self.args.train_batch_size} x {self.args.world_size}), and `--dataloader_drop_last true` drops them: "
            "nothing would be trained. Remove it, or give a smaller `--per_device_train_batch_size`."
        )

    def get_eval_dataloader(self, eval_dataset=None):
        return self.make_whole(super().get_eval_dataloader, eval_dataset)

    def get_test_dataloader(self, test_dataset):
        return self.make_whole(super().get_test_dataloader, test_dataset)

    def make_whole(self, make, dataset):
        """Makes a data loader for evaluation: all rows in order, independent of the arguments for training."""
        training_args, self.args = self.args, copy.copy(self.args)
        self.args.dataloader_drop_last, self.args.train_sampling_strategy = False, "sequential"
        try:
            return make(dataset)
        finally:
            self.args = training_args

    # --- evaluation ---

    @torch.no_grad()
    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        index, options, answered = inputs.pop("index"), inputs.pop("options"), inputs.pop("answered", None)
        generated = generate_greedily(
            self.accelerator.unwrap_model(model),
            **inputs,
            max_new_tokens=self.max_new_tokens,
            synced_gpus=True if self.is_fsdp_enabled else None,  # `generate` sets it itself under ZeRO-3
            return_dict_in_generate=True,
            output_logits=True,
        )
        if self.accelerator.reduce(generated.logits[0].isnan().any().int()):
            raise FloatingPointError(
                "The model computes NaN, so it cannot answer: the adapters have diverged, or the base models "
                "overflow in their dtype. Train with a smaller `--learning_rate`, or give another `--dtype`: "
                "`bfloat16` or `float32`."
            )
        likelihoods = self.option_likelihoods(model, inputs, options, generated.logits[0])
        choice = likelihoods.argmax(dim=1).masked_fill(options[:, 0, 0] < 0, -1)
        loss = None if answered is None else model(**{**inputs, **answered}).loss
        return loss, (generated.sequences[:, inputs["input_ids"].shape[1] :], choice), index

    def option_likelihoods(self, model, inputs: dict, options: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """
        The log-likelihood of each option after its prompt, `-inf` for padding.

        Args:
            options: tokens of the options, of shape `(batch_size, num_options, num_tokens)`, padded with -1.
            logits: logits of the first new token, of shape `(batch_size, vocab_size)`.
        """
        batch_size, num_options, _ = options.shape
        is_token = options >= 0
        # All processes call the model equally often, as ZeRO-3 and FSDP require
        sizes = torch.tensor([list(options.shape[1:])], device=options.device)
        num_calls, num_tokens = self.accelerator.gather(sizes).amax(dim=0).tolist()
        if num_tokens == 1:
            likelihoods = logits.float().log_softmax(dim=-1).gather(1, options[..., 0].clamp(min=0))
            return likelihoods.masked_fill(~is_token[..., 0], float("-inf"))
        likelihoods = torch.full((batch_size, num_options), float("-inf"), device=options.device)
        for number in range(num_calls):
            option, is_own = options[:, min(number, num_options - 1)], is_token[:, min(number, num_options - 1)]
            added = {"input_ids": option.clamp(min=0), "attention_mask": is_own.long()}
            added["instruction_mask"] = torch.zeros_like(option)
            longer = {name: torch.cat([inputs[name], added[name]], dim=1) for name in added if name in inputs}
            logits = model(**{**inputs, **longer}, logits_to_keep=option.shape[1] + 1).logits[:, :-1].float()
            each = logits.log_softmax(dim=-1).gather(2, option.clamp(min=0)[..., None])[..., 0]
            if number < num_options:
                total = each.masked_fill(~is_own, 0).sum(dim=1)
                likelihoods[:, number] = total.masked_fill(~is_own[:, 0], float("-inf"))
        return likelihoods

    # --- complete checkpoints ---

    def write_checkpoint(self, write):
        """
        Writes a checkpoint, then its manifest, and only then removes older checkpoints.

        Raises:
            FloatingPointError: if an adapter contains NaN or Inf. Nothing is written.
            OSError: if the checkpoint cannot be written, for example because the disk is full.
        """
        if not self.are_adapters_finite():
            raise FloatingPointError(
                f"The adapters contain NaN or Inf after step {self.state.global_step} and are not saved. "
                f"{self.name_last_checkpoint()} {ADVICE}"
            )
        if self.is_saved():  # a signal can ask for a checkpoint that has just been written
            return
        if self.args.should_save:
            shutil.rmtree(self.checkpoint, ignore_errors=True)  # left by a run that was killed while it wrote here
        self.accelerator.wait_for_everyone()
        state, args = self.state, self.args
        limit, best_step = args.save_total_limit, state.best_global_step
        args.save_total_limit = None
        if best_step != state.global_step:  # the folder of that step may belong to an earlier run
            state.best_global_step = None
        try:
            write()
            self.accelerator.wait_for_everyone()
            if args.should_save:
                seconds = self.run["train_seconds"] + time.perf_counter() - self.speed.began
                resumable = not args.save_only_model
                write_manifest(self.checkpoint, {**self.run, "train_seconds": seconds, "resumable": resumable})
        except (OSError, RuntimeError, SafetensorError) as error:
            from_writer = any(name in str(error) for name in ("PytorchStreamWriter", "inline_container"))
            if isinstance(error, RuntimeError) and not from_writer:
                raise  # not an error of the disk
            free = shutil.disk_usage(args.output_dir).free
            raise OSError(
                f"{self.checkpoint} could not be written ({free / 1e6:,.1f} MB are free): {error}. "
                f"{self.name_last_checkpoint()} Free some space, then run the same command again."
            ) from error
        finally:
            args.save_total_limit, state.best_global_step = limit, best_step
        if args.should_save:
            remove_older_checkpoints(Path(args.output_dir), limit, self.run["run"], state.best_model_checkpoint)

    @property
    def checkpoint(self) -> Path:
        """The checkpoint of the current step."""
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def is_saved(self) -> bool:
        """Whether the checkpoint of the current step is complete, according to the main process."""
        saved = [False]
        if self.args.should_save:
            try:
                saved = [read_manifest(self.checkpoint)["run"] == self.run["run"]]
            except ValueError:
                pass
        return broadcast_object_list(saved)[0]

    def name_last_checkpoint(self) -> str:
        found = find_last_checkpoint(Path(self.args.output_dir), self.run["run"])
        return f"The last complete checkpoint is {found[0]}." if found else "There is no complete checkpoint yet."

    def load_best_checkpoint(self):
        try:
            read_manifest(Path(self.state.best_model_checkpoint))
        except ValueError as error:
            raise ValueError(
                f"The best checkpoint cannot be loaded after training: {error} {self.name_last_checkpoint()} To "
                "evaluate that one, use `--adapter` with it and `--num_train_epochs 0`."
            ) from error
        super().load_best_checkpoint()

    def is_complete(self) -> bool:
        """Whether the run took its last step or stopped early, and was not interrupted."""
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        return stopped_early or self.state.global_step >= self.state.max_steps

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Returns no batch if the run was resumed at its end, since the Trainer would otherwise take one more step."""
        if self.control.should_training_stop:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # --- NaN or Inf in a loss or gradient ---

    def compute_loss(self, model, inputs, *args, **kwargs):
        """
        Raises:
            FloatingPointError: if a loss of this optimizer step is NaN or Inf in any process. All processes raise it
                together, before the step, and the adapters are in a complete checkpoint.
        """
        rows = inputs.pop("index")
        own_loss = self.label_smoother is None and self.compute_loss_func is None
        if own_loss and isinstance(self.model, DehvfForConditionalGeneration):
            # Only answers have a loss: computing logits of the prompt would waste time and memory
            answers = (inputs["labels"] != -100).any(dim=0).int()
            inputs["logits_to_keep"] = len(answers) - int(answers.argmax()) + 1
        self.speed.count(inputs, self.model, len(self.data_collator.image_tokens))
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.losses.append((loss.detach().isfinite().all(), rows))
        if self.accelerator.sync_gradients:  # before `backward`, in which DeepSpeed makes the step
            finite, rows = zip(*self.losses)
            if self.accelerator.reduce((~torch.stack(finite)).sum()):
                self.stop("loss", [row for ok, batch in zip(finite, rows) if not ok for row in batch.tolist()])
        return loss

    def check_gradient(self):
        """
        Raises `FloatingPointError`, as `compute_loss` does, if a gradient is NaN or Inf. Under DeepSpeed the step has
        already been made; NaN is then found in the next loss or when the adapters are saved. A loss scaler skips such
        steps.
        """
        rows = torch.cat([rows for _, rows in self.losses])
        self.losses.clear()
        if self.is_deepspeed_enabled or self.accelerator.scaler is not None:
            return
        gradients = [value.grad for value in self.trained_parameters.values() if value.grad is not None]
        local = [gradient.to_local() if isinstance(gradient, DTensor) else gradient for gradient in gradients]
        local = [gradient for gradient in local if gradient.numel()]  # a process may have no part of a small parameter
        wrong = (~torch.nn.utils.get_total_norm(local, float("inf")).isfinite()).int()
        if self.accelerator.reduce(wrong) if self.is_fsdp_enabled else wrong:
            self.stop("gradient", rows.tolist())

    def stop(self, what: str, rows: list[int]):
        rows = sorted(gather_object(rows))
        streamed = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        order = ", in the order of the stream" if streamed else ""
        rates = ", ".join(f"{rate:g}" for rate in sorted({group["lr"] for group in self.optimizer.param_groups}))
        message = (
            f"The {what} of step {self.state.global_step + 1} is NaN or Inf, in the batches with the rows {rows} of "
            f"the train split{order}. The learning rate is {rates}."
        )
        if not self.are_adapters_finite():
            message += " The adapters contain NaN or Inf from an earlier step and are not saved."
        elif self.state.global_step and not self.is_saved():
            self.save_checkpoint()
        raise FloatingPointError(f"{message} {self.name_last_checkpoint()} {ADVICE}")

    # --- speed, memory and fusion weights in the log ---

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self.speed.measure(self.accelerator)
        for prefix, name in (("", "loss"), ("eval_", "eval_runtime")):
            if name in logs:
                logs |= {f"{prefix}fusion_{figure}": value for figure, value in self.fusion.figures().items()}
        super().log(logs, start_time)


ADVICE = (
    "Look at these rows, or start a new run from the checkpoint (`--adapter`) with a smaller `--learning_rate` or "
    "`--max_grad_norm`."
)


class ShiftedLabelSmoother(LabelSmoother):
    """
    Label smoothing with shifted labels. The Trainer only shifts the labels for model classes of transformers; other
    models would be trained to predict the current token.
    """

    def __call__(self, model_output, labels, shift_labels=False, num_items_in_batch=None):
        return super().__call__(model_output, labels, shift_labels=True, num_items_in_batch=num_items_in_batch)


class StepChecks(TrainerCallback):
    """Callbacks of `AnswerTrainer` at the beginning of training and of each epoch, and before each optimizer step."""

    def __init__(self, trainer: AnswerTrainer):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        if self.trainer.resumed_from is not None and args.load_best_model_at_end:
            state.best_model_checkpoint = find_best_checkpoint(Path(self.trainer.resumed_from))
        self.resumed_at_end = control.should_training_stop = self.trainer.is_complete()
        if 1 <= state.max_steps <= args.warmup_steps and state.is_world_process_zero:
            logger.warning(
                f"`--warmup_steps {args.warmup_steps:g}` covers all {state.max_steps} steps, so the learning rate of "
                "a schedule with a warm-up is lower than `--learning_rate` throughout. Give a fraction such as 0.03."
            )

    def on_epoch_begin(self, args, state, control, **kwargs):
        if self.trainer.order is not None:
            seed = args.seed if args.data_seed is None else args.data_seed
            self.trainer.order.manual_seed(seed + int(state.epoch or 0))

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        self.trainer.check_gradient()

    def on_epoch_end(self, args, state, control, **kwargs):
        if self.resumed_at_end:  # it has already been evaluated and saved
            control.should_evaluate = control.should_save = False


def find_best_checkpoint(checkpoint: Path) -> str | None:
    """The best checkpoint so far, searched for beside the given one. Raises `ValueError` if it is lost or damaged."""
    best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))["best_model_checkpoint"]
    if best is None:
        return None
    best = checkpoint.parent / Path(best).name
    try:
        read_manifest(best)
    except ValueError as error:
        raise ValueError(
            f"The run cannot be resumed from {checkpoint}, since its best checkpoint is lost: {error} Give an earlier "
            "checkpoint as `--resume_from_checkpoint`, or start again with `--resume_from_checkpoint never`."
        ) from error
    return str(best)


class Speed(TrainerCallback):
    """Counts samples, tokens and seconds of training between two logs, without evaluation and saving."""

    def __init__(self):
        self.began = time.perf_counter()
        self.reset()

    def reset(self):
        self.seconds, self.samples, self.text_tokens, self.visual_tokens = 0.0, 0, 0, 0

    def count(self, inputs: dict, model, num_image_tokens: int):
        """Adds a batch. Visual tokens are patches. Sums stay on the device until they are logged."""
        self.samples += len(inputs["input_ids"])
        self.text_tokens = self.text_tokens + inputs["attention_mask"].sum()
        if "pixel_values" in inputs:
            images, (height, width) = inputs["image_mask"].sum(), inputs["pixel_values"].shape[-2:]
            patch_size = model.config.vision_config.patch_size
            self.visual_tokens = self.visual_tokens + images * (height // patch_size) * (width // patch_size)
            self.text_tokens = self.text_tokens - images * num_image_tokens

    def on_train_begin(self, args, state, control, **kwargs):
        self.began = time.perf_counter()

    def start(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    on_epoch_begin = on_evaluate = on_save = start

    def on_step_end(self, args, state, control, **kwargs):
        self.add_seconds()

    def add_seconds(self):
        now = time.perf_counter()
        self.seconds, self.last = self.seconds + now - self.last, now

    def measure(self, accelerator) -> dict[str, float]:
        """Throughput since the last log, the sum over all processes, and the peak memory, their maximum."""
        self.add_seconds()  # the Trainer has synchronized with the device to read the loss
        own = [self.samples, self.text_tokens, self.visual_tokens, peak_memory(accelerator.device)]
        own = torch.tensor([float(value) for value in own], device=accelerator.device)
        *sums, peak = zip(*accelerator.gather(own[None]).tolist())
        names = ("samples_per_second", "text_tokens_per_second", "visual_tokens_per_second")
        speeds = {name: round(sum(values) / self.seconds, 2) for name, values in zip(names, sums)}
        self.reset()
        return {**speeds, "peak_memory_gb": round(max(peak), 3)}


def peak_memory(device: torch.device) -> float:
    """Peak memory in GB (1e9 bytes): allocated by torch on a GPU, or the resident memory of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
