# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The Trainer of `train.py`."""

import json
import shutil
import sys
import time
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import torch
from accelerate.utils import broadcast_object_list, gather_object, save_fsdp_optimizer
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import EarlyStoppingCallback, Trainer
from transformers.integrations.deepspeed import deepspeed_load_checkpoint, is_deepspeed_zero3_enabled
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import SAFE_WEIGHTS_NAME

from training.checkpoints import find_last_checkpoint, read_manifest, remove_older_checkpoints, write_manifest
from training.engines import gather_shards


class AnswerTrainer(Trainer):
    """
    A Trainer for adapters on frozen bases, whose evaluation lets the model answer. Predictions are the new tokens and
    the most likely option (-1 where there are none), labels the rows' numbers.

    Args:
        max_new_tokens: length of an answer.
        run: what a checkpoint is to remember of the run, see [`find_start`].

    Raises:
        ValueError: under FSDP 1, which melts adapters and frozen weights into one tensor.
    """

    def __init__(self, *args, max_new_tokens: int, run: dict, **kwargs):
        super().__init__(*args, **kwargs)
        if self.is_fsdp_enabled and self.accelerator.state.fsdp_plugin.fsdp_version != 2:
            raise ValueError(
                "FSDP 1 was asked for, which cannot keep adapters apart from frozen weights. Set `fsdp_version: 2` in "
                "the accelerate config."
            )
        self.max_new_tokens, self.run = max_new_tokens, run
        self._losses = []  # of the batches of this optimizer step: loss, rows
        self._restart_counting()

    # --- evaluation ---

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        index, options = inputs.pop("index"), inputs.pop("options")
        if (is_deepspeed_zero3_enabled() or self.is_fsdp_enabled) and "pixel_values" not in inputs:
            # Bases are divided, so all processes have to run the same modules. In training the model sees to that
            vision = self.model.config.vision_config
            size = (len(index), vision.num_channels, vision.image_size, vision.image_size)
            inputs["pixel_values"] = torch.zeros(size, device=index.device)
            inputs["image_mask"] = torch.zeros(len(index), dtype=torch.bool, device=index.device)
        generated = self.accelerator.unwrap_model(model).generate(
            **inputs,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            synced_gpus=True if self.is_fsdp_enabled else None,  # `generate` knows of ZeRO-3 by itself
            return_dict_in_generate=True,
            output_logits=True,
        )
        # Options begin with tokens of their own, so the logits of the first new token order them by likelihood
        scores = generated.logits[0].float().gather(1, options.clamp(min=0)).masked_fill(options < 0, float("-inf"))
        choice = scores.argmax(dim=1).masked_fill(options[:, 0] < 0, -1)
        return None, (generated.sequences[:, inputs["input_ids"].shape[1] :], choice), index

    # --- adapters alone ---
    #
    # The Trainer leaves frozen weights out, and does not miss them in a file, for a `PeftModel` only. It asks whether
    # it has one in four places: when it saves the model under ZeRO-3, when it saves DeepSpeed's checkpoint, and when
    # it reads this again, to go on or as the best one; with FSDP it asks as often. So here the weights always go
    # through `model.safetensors`, in which `save_pretrained` writes adapters alone, and DeepSpeed and FSDP are left
    # with the optimizer.

    def _trained_parameters(self) -> dict[str, torch.nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def _whole(self, parameters: dict, modifier_rank: int | None = None):
        """A context in which parameters that ZeRO-3 has partitioned are whole."""
        if not self.is_deepspeed_enabled:
            return nullcontext()
        import deepspeed  # only where it was asked for

        return deepspeed.zero.GatheredParameters(list(parameters.values()), modifier_rank=modifier_rank)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            return super().save_model(output_dir, _internal_call)
        trained = self._trained_parameters()
        with self._whole(trained):
            tensors = {name: gather_shards(parameter.detach()).cpu().clone() for name, parameter in trained.items()}
        self._save(output_dir, state_dict=tensors)

    def _load_adapters(self, checkpoint: str):
        tensors, trained = load_file(Path(checkpoint) / SAFE_WEIGHTS_NAME), self._trained_parameters()
        if differing := sorted(tensors.keys() ^ trained.keys()):
            raise ValueError(
                f"The {len(tensors)} tensors in {checkpoint} and the {len(trained)} trained here differ in "
                f"{len(differing)} names, among them {differing[0]}. Go on with the method that they are of."
            )
        with self._whole(trained, modifier_rank=0), torch.no_grad():
            for name, parameter in trained.items():
                tensor = tensors[name].to(parameter.device)
                if isinstance(parameter, DTensor):
                    tensor = distribute_tensor(tensor, parameter.device_mesh, parameter.placements)
                parameter.copy_(tensor)

    def _init_training_state(
        self, max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
    ):
        """
        The best checkpoint stands beside the one to go on from, wherever the run's folder is by now.

        Raises:
            ValueError: if it is missing or damaged, which would otherwise come out after training.
        """
        started = super()._init_training_state(
            max_steps, num_update_steps_per_epoch, num_train_epochs, resume_from_checkpoint, trial
        )
        if resume_from_checkpoint is not None:
            checkpoint = Path(resume_from_checkpoint)
            best = json.loads((checkpoint / TRAINER_STATE_NAME).read_text())["best_model_checkpoint"]
            if best is not None and self.args.load_best_model_at_end:
                best = checkpoint.parent / Path(best).name
                try:
                    read_manifest(best)
                except ValueError as error:
                    raise ValueError(
                        f"{checkpoint} cannot be gone on from, since the best checkpoint so far is lost: {error} Give "
                        "an earlier one as `--resume_from_checkpoint`, or begin anew with `never`."
                    ) from error
                self.state.best_model_checkpoint = str(best)
        return started

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        self._load_adapters(resume_from_checkpoint)

    def _load_best_model(self):
        try:
            read_manifest(Path(self.state.best_model_checkpoint))
        except ValueError as error:
            raise ValueError(
                f"Training is done, but its best checkpoint cannot be loaded: {error} {self._name_last_checkpoint()} "
                "`--adapter` with it and `--num_train_epochs 0` evaluate what is in it."
            ) from error
        self._load_adapters(self.state.best_model_checkpoint)

    def _save_optimizer_and_scheduler(self, output_dir: str):
        if not self.is_fsdp_enabled:
            return super()._save_optimizer_and_scheduler(output_dir)
        plugin = self.accelerator.state.fsdp_plugin
        save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        self._started = time.perf_counter()
        if not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        engine = self.deepspeed  # from here on it neither saves nor expects weights, but its optimizer's copy of them
        engine.save_checkpoint = partial(engine.save_checkpoint, exclude_frozen_parameters=True)
        engine.module_state_dict = lambda *_, **__: {}
        if resume_from_checkpoint is not None:
            self._load_adapters(resume_from_checkpoint)
            deepspeed_load_checkpoint(engine, resume_from_checkpoint, load_module_strict=False)
            self._load_optimizer_and_scheduler(resume_from_checkpoint)
        return prepared

    # --- complete checkpoints ---

    def _save_checkpoint(self, model, trial):
        """
        Raises:
            FloatingPointError: if an adapter holds NaN or Inf. Nothing is written.
            OSError: if it cannot be written, as on a full disk.
        """
        if not self._are_adapters_finite():
            raise FloatingPointError(
                f"Step {self.state.global_step} left NaN or Inf in the adapters, so they are not saved. "
                f"{self._name_last_checkpoint()} {self._advise_on_rates()}"
            )
        checkpoint = self._checkpoint()
        if self.args.should_save:
            shutil.rmtree(checkpoint, ignore_errors=True)  # what a run left that was cut off while it wrote here
        self.accelerator.wait_for_everyone()
        # Older checkpoints go when this one is complete, and not before
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        # The best one may be this one, and no folder of that step which an earlier run has left
        best_step, step = self.state.best_global_step, self.state.global_step
        self.state.best_global_step = best_step if best_step == step else None
        try:
            super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            if self.args.should_save:
                seconds = self.run["train_seconds"] + time.perf_counter() - self._started
                resumable = not self.args.save_only_model
                write_manifest(checkpoint, {**self.run, "train_seconds": seconds, "resumable": resumable})
        except (OSError, RuntimeError, SafetensorError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamWriter" not in str(error):
                raise  # another process has died, say
            free = shutil.disk_usage(self.args.output_dir).free
            raise OSError(
                f"{checkpoint} could not be written ({free / 1e6:,.1f} MB are free there): {error}. "
                f"{self._name_last_checkpoint()} Make room, then start the same command again."
            ) from error
        finally:
            self.args.save_total_limit, self.state.best_global_step = limit, best_step
        if self.args.should_save:
            best = self.state.best_model_checkpoint
            remove_older_checkpoints(Path(self.args.output_dir), limit, self.run["run"], best)

    def _checkpoint(self) -> Path:
        return Path(self.args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"

    def _name_last_checkpoint(self) -> str:
        found = find_last_checkpoint(Path(self.args.output_dir), self.run["run"])
        return f"The last complete checkpoint is {found[0]}." if found else "There is no complete checkpoint yet."

    def _is_saved(self) -> bool:
        """Whether this step's checkpoint is there; as the main process sees it, since all have to agree."""
        saved = [False]
        if self.args.should_save:
            try:
                saved = [read_manifest(self._checkpoint())["run"] == self.run["run"]]
            except ValueError:
                pass
        return broadcast_object_list(saved)[0]

    def _are_adapters_finite(self) -> bool:
        trained = self._trained_parameters()
        with self._whole(trained):
            finite = [gather_shards(parameter.isfinite().all()) for parameter in trained.values()]
            return bool(torch.stack(finite).all())

    def is_complete(self) -> bool:
        """Whether the run has come to its end: by its last step or early, and not by a signal, say."""
        stopped_early = any(
            callback.early_stopping_patience_counter >= callback.early_stopping_patience
            for callback in self.callback_handler.callbacks
            if isinstance(callback, EarlyStoppingCallback)
        )
        return stopped_early or self.state.global_step >= self.state.max_steps

    def _run_epoch(self, *args, **kwargs):
        """The Trainer would take one more step after a checkpoint at which the run had come to its end."""
        if self.is_complete():
            self.control.should_training_stop = True
        else:
            self._clock = time.perf_counter()
            super()._run_epoch(*args, **kwargs)

    # --- a loss or a gradient that is no number ---

    def compute_loss(self, model, inputs, *args, **kwargs):
        """
        Raises:
            FloatingPointError: if a loss of this optimizer step, on any process, is NaN or Inf. All processes raise it
                together, before the step changes anything, with the adapters in a complete checkpoint.
        """
        rows = inputs.pop("index")
        self._count(inputs)
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self._losses.append((loss.detach().isfinite().all(), rows))
        # Before backward, in which DeepSpeed takes the step. Gradients that overflow fp16 are left to the loss scaler
        if self.accelerator.sync_gradients:
            finite, rows = zip(*self._losses)
            if self.accelerator.reduce((~torch.stack(finite)).sum()):
                self._stop("loss", [row for ok, batch in zip(finite, rows) if not ok for row in batch.tolist()])
        return loss

    def _get_grad_norm(self, model, grad_norm=None):
        """
        Raises:
            FloatingPointError: as `compute_loss`, if the gradient is NaN or Inf. DeepSpeed has taken the step by now,
                so there it is found out when the adapters are saved, or by the next loss.
        """
        norm = super()._get_grad_norm(model, grad_norm)
        rows = torch.cat([rows for _, rows in self._losses])
        self._losses.clear()
        if not self.is_deepspeed_enabled and self.accelerator.scaler is None:
            if not gather_shards(torch.as_tensor(norm)).isfinite():
                self._stop("gradient", rows.tolist())
        return norm

    def _stop(self, what: str, rows: list[int]):
        rows = sorted(gather_object(rows))
        streamed = isinstance(self.train_dataset, torch.utils.data.IterableDataset)
        places = ", counted as they came in the stream" if streamed else ""
        rates = sorted({group["lr"] for group in self.optimizer.param_groups})
        message = (
            f"The {what} of step {self.state.global_step + 1} is NaN or Inf, in the batches with the rows {rows} of "
            f"the train split{places}; the learning rate is {', '.join(f'{rate:g}' for rate in rates)}. "
        )
        if not self._are_adapters_finite():
            message += "The adapters hold NaN or Inf too, from an earlier step, and are not saved. "
        elif self.state.global_step and not self._is_saved():
            self._save_checkpoint(self.model_wrapped, trial=None)
        raise FloatingPointError(f"{message}{self._name_last_checkpoint()} {self._advise_on_rates()}")

    def _advise_on_rates(self) -> str:
        return (
            "Look at these rows, or begin a new run with its adapters (`--adapter`) and a smaller `--learning_rate` "
            "or `--max_grad_norm`."
        )

    # --- speed and memory in the log ---

    def _restart_counting(self):
        self._clock, self._seconds = time.perf_counter(), 0.0
        self._samples, self._text_tokens, self._visual_tokens = 0, 0, 0

    def _count(self, inputs: dict):
        """On the device, and waited for when they are logged. Visual tokens are patches of images."""
        self._samples += len(inputs["input_ids"])
        self._text_tokens = self._text_tokens + inputs["attention_mask"].sum()
        if "pixel_values" in inputs:
            images, (height, width) = inputs["image_mask"].sum(), inputs["pixel_values"].shape[-2:]
            patch_size = self.model.config.vision_config.patch_size
            self._visual_tokens = self._visual_tokens + images * (height // patch_size) * (width // patch_size)
            self._text_tokens = self._text_tokens - images * len(self.data_collator.image_tokens)

    def _maybe_log_save_evaluate(self, *args, **kwargs):
        if self.control.should_log and self.args.device.type != "cpu":
            torch.accelerator.synchronize()  # or the last steps would not count
        self._seconds += time.perf_counter() - self._clock
        super()._maybe_log_save_evaluate(*args, **kwargs)
        self._clock = time.perf_counter()  # evaluation and saving do not count

    def log(self, logs: dict[str, float], start_time: float | None = None):
        if "loss" in logs:
            logs |= self._measure()
        super().log(logs, start_time)

    def _measure(self) -> dict[str, float]:
        """Per second of training since the last log, of all processes together; memory is that of the fullest one."""
        own = [self._samples, self._text_tokens, self._visual_tokens, peak_memory(self.args.device)]
        own = torch.tensor([float(value) for value in own], device=self.args.device)
        *sums, peak = zip(*self.accelerator.gather(own[None]).tolist())
        names = ("samples_per_second", "text_tokens_per_second", "visual_tokens_per_second")
        speeds = {name: round(sum(values) / self._seconds, 2) for name, values in zip(names, sums)}
        self._restart_counting()
        return {**speeds, "peak_memory_gb": round(max(peak), 3)}


def peak_memory(device: torch.device) -> float:
    """In GB of 10^9 bytes: what torch had allocated on a GPU, or what the process had resident without one."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    import resource  # not on Windows

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
