"""Each field of `transformers.TrainingArguments` works, is refused at the start, or is about logs and places."""

import dataclasses
import itertools
from contextlib import nullcontext
from types import SimpleNamespace

import datasets
import pytest
import torch
from safetensors.torch import load_file
from test_train import make_rows, make_split, read_predictions, tiny_flags
from tiny import ROOT
from transformers import TrainingArguments
from transformers.trainer_utils import SchedulerType

import train
from dehvf import DehvfConfig
from tasks import get_task
from training.arguments import KEPT, OPTIMIZERS, SCORE_SCHEDULES, check_arguments, complete_arguments, parse_arguments
from training.engines import name_precision
from training.trainer import AnswerTrainer


NUM_ROWS = 8  # 4 steps of 2


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A stand-in for ScienceQA, with prompts of different lengths, in `data`."""
    folder = tmp_path_factory.mktemp("arguments")
    rows = make_rows(NUM_ROWS).map(lambda row, index: {"hint": "ab" * (index * 3 % NUM_ROWS)}, with_indices=True)
    splits = datasets.DatasetDict(train=rows, validation=make_rows(2), test=make_rows(4))
    splits.save_to_disk(str(folder / "data"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", folder / "cache")
        yield folder


def run(folder, output="", **flags) -> SimpleNamespace:
    """A run of four steps: its trainer, output folder, losses, first adapters and the rows of each batch."""
    count = itertools.count()
    output = folder / (output or next(f"run{n}" for n in count if not (folder / f"run{n}").exists()))
    values = {"logging_steps": 1, "disable_tqdm": True, "warmup_steps": 0, **flags}
    made, make, compute_loss = SimpleNamespace(output=output, rows=[]), train.make_trainer, AnswerTrainer.compute_loss

    def keep_trainer(*args):
        made.trainer = make(*args)
        made.first = {name: value.detach().clone() for name, value in made.trainer.trained_parameters.items()}
        return made.trainer

    def keep_rows(self, model, inputs, *args, **kwargs):
        made.rows.append(inputs["index"].tolist())
        return compute_loss(self, model, inputs, *args, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "make_trainer", keep_trainer)
        patch.setattr(AnswerTrainer, "compute_loss", keep_rows)
        train.main(tiny_flags(folder, folder / "data", output, **values))
    made.losses = logged(made, "loss")
    return made


def logged(made, name: str) -> list:
    return [entry[name] for entry in made.trainer.state.log_history if name in entry]


@pytest.fixture(scope="module")
def plain(folder):
    return run(folder)


# --- the table ---

# Values that change how a run computes, and not what
SAME = {
    "accumulation": {
        **{"gradient_accumulation_steps": 2, "per_device_train_batch_size": 1, "average_tokens_across_devices": False},
        **{"torch_empty_cache_steps": 1, "dataloader_pin_memory": False, "tf32": False, "use_cpu": True},
    },
    "checkpointing": {
        "activation_checkpointing": True,
        "activation_checkpointing_kwargs": '{"every_n_layers": 2}',
        "per_device_eval_batch_size": 3,
    },
    "workers": {
        **{"dataloader_num_workers": 1, "dataloader_prefetch_factor": 1, "dataloader_persistent_workers": True},
        **{"dataloader_multiprocessing_context": "fork", "full_determinism": True},
    },
}
# Values of one run, and what its trainer then has
HELD = {
    "sgd": (
        {
            **{"optim": "sgd", "optim_args": "momentum=0.5", "weight_decay": 0.1, "num_train_epochs": 0.5},
            **{
                "lr_scheduler_type": "cosine_with_min_lr",
                "lr_scheduler_kwargs": '{"min_lr": 0.01}',
                "warmup_steps": 1,
            },
        },
        lambda made: (
            made.trainer.optimizer.defaults["momentum"],
            sorted({group["weight_decay"] for group in made.trainer.optimizer.param_groups}),
            logged(made, "learning_rate"),
            made.trainer.lr_scheduler.get_last_lr()[0],
        ),
        (0.5, [0, 0.1], [0, 0.05], 0.01),
    ),
    "adam": (
        {"adam_beta1": 0.5, "adam_beta2": 0.6, "adam_epsilon": 1e-3, "max_steps": 5, "learning_rate": 0.25},
        lambda made: (
            *(made.trainer.optimizer.defaults[name] for name in ("betas", "eps", "lr")),
            made.trainer.state.global_step,
            len(made.rows),
        ),
        ((0.5, 0.6), 1e-3, 0.25, 5, 5),
    ),
    "ddp": (
        {
            **{"ddp_bucket_cap_mb": 7, "ddp_broadcast_buffers": False, "ddp_static_graph": True},
            **{"ddp_find_unused_parameters": True, "max_steps": 1},
        },
        lambda made: [
            getattr(made.trainer.accelerator.ddp_handler, name)
            for name in ("bucket_cap_mb", "broadcast_buffers", "static_graph", "find_unused_parameters")
        ],
        [7, False, True, True],
    ),
    "compiler": (
        {"torch_compile_backend": "aot_eager", "torch_compile_mode": "max-autotune", "num_train_epochs": 0},
        lambda made: [
            made.trainer.args.torch_compile,
            *(getattr(made.trainer.accelerator.state.dynamo_plugin, name) for name in ("backend", "mode")),
        ],
        [True, "AOT_EAGER", "max-autotune"],
    ),
    "steps of evaluation": (
        {
            **{"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 3, "eval_on_start": True},
            **{"eval_accumulation_steps": 1, "per_device_eval_batch_size": 1},
        },
        lambda made: [entry["step"] for entry in made.trainer.state.log_history if "eval_average" in entry],
        [0, 3, 4],
    ),
    "steps of saving": (
        {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 2, "save_only_model": True},
        lambda made: (
            sorted(path.name for path in made.output.glob("checkpoint-*")),
            (made.output / "checkpoint-4" / "optimizer.pt").exists(),
        ),
        (["checkpoint-3", "checkpoint-4"], False),
    ),
    "rows that fill no batch": (
        {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "dataloader_drop_last": True},
        lambda made: ([len(rows) for rows in made.rows], len(read_predictions(made.output))),
        ([3, 3], 4),
    ),
    "in order": (
        {"train_sampling_strategy": "sequential"},
        lambda made: made.rows,
        [[0, 1], [2, 3], [4, 5], [6, 7]],
    ),
}
# With tests of their own, below
OWN = [
    "max_grad_norm",
    "label_smoothing_factor",
    "bf16",
    "neftune_noise_alpha",
    "seed",
    "data_seed",
    "ignore_data_skip",
]
OWN += ["load_best_model_at_end", "metric_for_best_model", "greater_is_better"]
OWN += ["gradient_checkpointing", "gradient_checkpointing_kwargs"]
# In other files
ELSEWHERE = {
    **dict.fromkeys(("deepspeed", "fsdp"), "test_distributed.py"),
    **dict.fromkeys(("enable_jit_checkpoint", "resume_from_checkpoint"), "test_checkpoints.py"),
    **{"push_to_hub": "test_hub.py", "torch_compile": "test_citizen.py"},
}
WORKS = {*OWN, *ELSEWHERE, *itertools.chain(*SAME.values()), *itertools.chain(*(flags for flags, *_ in HELD.values()))}
REFUSED = {*KEPT, "do_eval", "fp16"}
LOGS_AND_PLACES = {
    *("output_dir", "run_name", "project", "report_to", "disable_tqdm", "save_on_each_node", "skip_memory_metrics"),
    *("logging_strategy", "logging_steps", "logging_first_step", "log_on_each_node", "log_level", "log_level_replica"),
    *("include_num_input_tokens_seen", "trackio_space_id", "trackio_bucket_id", "trackio_static_space_id"),
    *("hub_token", "hub_private_repo", "hub_model_id", "hub_revision"),
    *("local_rank", "ddp_backend", "ddp_timeout", "fsdp_config"),
}


def test_each_field_is_in_one_class():
    names = [field.name for field in dataclasses.fields(TrainingArguments)]
    classes = [WORKS & set(names), REFUSED, LOGS_AND_PLACES]
    assert sorted(itertools.chain(*classes)) == sorted(names), "none is missing, none is in two"
    for name, file in ELSEWHERE.items():
        assert name in (ROOT / "tests" / file).read_text(), name
    documented = (ROOT / "docs" / "training.md").read_text()
    assert [name for name in REFUSED if f"`{name}" not in documented] == []


# --- what works ---


@pytest.mark.parametrize("flags", SAME.values(), ids=SAME)
def test_how_a_run_computes_does_not_change_what_it_learns(folder, plain, flags):
    try:
        made = run(folder, **flags)
        assert torch.are_deterministic_algorithms_enabled() == flags.get("full_determinism", False)
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(made.losses, plain.losses, atol=1e-4, rtol=1e-4)
    for name, tensor in made.trainer.trained_parameters.items():
        torch.testing.assert_close(tensor, plain.trainer.trained_parameters[name], atol=1e-3, rtol=1e-3, msg=name)
    assert read_predictions(made.output) == read_predictions(plain.output)


@pytest.mark.parametrize("flags, read, expected", HELD.values(), ids=HELD)
def test_a_value_is_the_trainers(folder, flags, read, expected):
    assert read(run(folder, **flags)) == expected


@pytest.mark.parametrize("limit", [0, 0.01])
def test_gradients_are_clipped_unless_the_limit_is_zero(folder, limit):
    flags = {"optim": "sgd", "learning_rate": 0.5, "weight_decay": 0, "lr_scheduler_type": "constant", "max_steps": 1}
    made = run(folder, max_grad_norm=limit, **flags)
    steps = [value.detach() - made.first[name] for name, value in made.trainer.trained_parameters.items()]
    expected = min(limit or float("inf"), logged(made, "grad_norm")[0])
    assert torch.nn.utils.get_total_norm(steps).item() == pytest.approx(0.5 * expected, rel=1e-3)


@pytest.mark.parametrize(
    "method",
    [
        *("dehvf", "llava-lora"),
        *(
            pytest.param(name, marks=pytest.mark.extended)
            for name in ("lavin", "llama-adapter", "llama-adapter-v2", "adem-vl")
        ),
    ],
)
def test_label_smoothing_is_that_of_the_next_token(folder, monkeypatch, method):
    """With two batches a step, whose answers count together."""
    losses, compute_loss = [], AnswerTrainer.compute_loss

    def compare(self, model, inputs, *args, num_items_in_batch, **kwargs):
        outputs, labels = [], inputs["labels"].clone()
        handle = model.register_forward_hook(lambda module, inputs, output: outputs.append(output["logits"].detach()))
        loss = compute_loss(self, model, inputs, *args, num_items_in_batch=num_items_in_batch, **kwargs)
        handle.remove()
        expected = torch.nn.functional.cross_entropy(
            outputs[0][:, :-1].flatten(0, 1), labels[:, 1:].flatten(), label_smoothing=0.1, reduction="sum"
        )
        losses.append((loss.item(), expected.item() / num_items_in_batch.item()))
        return loss

    monkeypatch.setattr(AnswerTrainer, "compute_loss", compare)
    flags = {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "max_steps": 2}
    run(folder, label_smoothing_factor=0.1, method=method, **flags)
    assert len(losses) == 4
    for loss, expected in losses:
        assert loss == pytest.approx(expected, rel=1e-4)


def test_bfloat16_and_noise_change_the_losses_and_seeds_what_they_name(folder, plain):
    half = run(folder, bf16=True)
    assert half.losses == pytest.approx(plain.losses, rel=0.05) and half.losses != plain.losses
    assert {value.dtype for value in half.trainer.trained_parameters.values()} == {torch.float32}
    noisy = run(folder, neftune_noise_alpha=5, max_steps=1)
    assert noisy.rows[0] == plain.rows[0] and noisy.losses[0] != pytest.approx(plain.losses[0], rel=1e-3)
    other_rows, other_adapters = run(folder, data_seed=1, max_steps=2), run(folder, seed=1, max_steps=2)
    for made, has_same_adapters in ((other_rows, True), (other_adapters, False)):
        same = [torch.equal(value, plain.first[name]) for name, value in made.first.items()]
        assert all(same) == has_same_adapters and made.rows != plain.rows[:2]
    streamed = [run(folder, data_seed=seed, streaming=True, max_steps=1) for seed in (1, 2)]
    assert streamed[0].losses != streamed[1].losses
    assert all(torch.equal(streamed[1].first[name], value) for name, value in streamed[0].first.items())


def test_the_former_name_of_activation_checkpointing_is_understood():
    with pytest.warns(FutureWarning, match="gradient_checkpointing"):
        words = ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"every_n_layers": 2}']
        training_args = parse_arguments(words)[-1]
    assert training_args.activation_checkpointing
    assert training_args.activation_checkpointing_kwargs == {"every_n_layers": 2}


@pytest.mark.parametrize(
    "metric, flags, values, best, step",
    [
        ("average", {}, [10, 40, 30, 20], 40, 2),
        ("IMG", {"metric_for_best_model": "eval_IMG", "greater_is_better": False}, [99, 10, 40, 5, 20], 5, 3),
    ],
    ids=["the task's score", "another"],
)
def test_the_best_adapters_are_those_of_the_score_that_is_named(
    folder, monkeypatch, metric, flags, values, best, step
):
    """With made-up scores. Those of another name are asked for once before training."""
    score, values = get_task("scienceqa").score, iter(values)
    monkeypatch.setattr(
        get_task("scienceqa"), "score", lambda records, size: {**score(records, size), metric: next(values, 0)}
    )
    flags = flags | {
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "best",
        "load_best_model_at_end": True,
    }
    made = run(folder, **flags)
    state = made.trainer.state
    assert (state.best_metric, state.best_global_step) == (best, step)
    kept = load_file(f"{state.best_model_checkpoint}/model.safetensors")
    assert all(torch.equal(value, kept[name]) for name, value in made.trainer.trained_parameters.items())


@pytest.mark.parametrize("method", ["dehvf", "llava-lora", "dehvf-instruction"])
def test_the_loss_of_the_validation_split_is_that_of_training(folder, method):
    flags = {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps", "save_steps": 2, "method": method}
    made = run(folder, **flags, load_best_model_at_end=True, metric_for_best_model="eval_loss")
    losses, trainer = logged(made, "eval_loss"), made.trainer
    assert trainer.state.best_metric == min(losses) and len(losses) == 2
    rows = make_split(folder / "data", "validation", processor=trainer.processing_class)
    batch = trainer._prepare_inputs(trainer.data_collator(list(rows)))
    expected = trainer.model.eval()(**{name: value for name, value in batch.items() if name != "index"}).loss
    assert min(losses) == pytest.approx(expected.item(), rel=1e-5)


def test_a_model_that_computes_nan_is_not_evaluated(folder):
    made = run(folder, max_steps=1)
    made.trainer.model.model.memory_slots.key.data.fill_(1e38)
    with pytest.raises(FloatingPointError, match="computes NaN.*smaller `--learning_rate`"):
        made.trainer.predict(make_split(folder / "data", "test", training=False))


def test_a_schedule_that_follows_a_score_takes_higher_for_better(folder):
    for kind in SCORE_SCHEDULES:
        for words, mode in (([], "max"), (["--greater_is_better", "false"], "min")):
            words = ["--lr_scheduler_type", kind, "--eval_strategy", "epoch", *words]
            recipe, data, model, adapter, _, training = parse_arguments(words)
            check_arguments(words, data, model, adapter, training)
            complete_arguments(get_task("digits"), data, training)
            assert (training.metric_for_best_model, training.lr_scheduler_kwargs) == ("average", {"mode": mode})
    made = run(folder, lr_scheduler_type="reduce_lr_on_plateau", eval_strategy="steps", eval_steps=2)
    assert made.trainer.lr_scheduler.mode == "max"


def test_each_optimizer_and_schedule_can_be_made(plain):
    trainer = plain.trainer
    for name, keys in OPTIMIZERS.items():
        words = ["--optim", name, *(["--optim_args", ",".join(f"{key}=0.25" for key in keys)] if keys else [])]
        training_args = parse_arguments(words)[-1]
        check_arguments(words, *parse_arguments(words)[1:4], training_args)
        kind, options = trainer.get_optimizer_cls_and_kwargs(training_args, trainer.model)
        assert issubclass(kind, torch.optim.Optimizer) and set(keys) <= options.keys(), name
    needed = {"cosine_with_min_lr": {"min_lr": 0.1}, "cosine_warmup_with_min_lr": {"min_lr": 0.1}}
    needed |= {"warmup_stable_decay": {"num_decay_steps": 1}}
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=1.0)
    for kind in SchedulerType:
        trainer.args.lr_scheduler_type, trainer.args.lr_scheduler_kwargs = kind, needed.get(kind.value)
        trainer.lr_scheduler = None
        assert trainer.create_scheduler(4, optimizer) is not None


def test_rows_are_grouped_by_tokens_and_a_resumed_run_has_the_same(folder):
    flags = {"train_sampling_strategy": "group_by_length", "num_train_epochs": 2}
    flags |= {"save_strategy": "steps", "save_steps": 1}
    whole = run(folder, "grouped", **flags)
    lengths = [len(row["input_ids"]) for row in whole.trainer.train_dataset.encoded]
    assert whole.trainer._get_train_sampler().lengths == lengths and len(set(lengths)) > 4
    assert [sorted(itertools.chain(*whole.rows[:4])), sorted(itertools.chain(*whole.rows[4:]))] == [[*range(8)]] * 2
    assert whole.rows[:4] != whole.rows[4:], "each epoch has an order of its own"
    resumed = run(folder, "grouped", resume_from_checkpoint=folder / "grouped" / "checkpoint-6", **flags)
    assert resumed.rows == whole.rows[6:]


def test_a_resumed_run_can_begin_its_epoch_again(folder):
    flags = {"ignore_data_skip": True, "save_strategy": "steps", "save_steps": 1}
    whole = run(folder, "again", **flags)
    resumed = run(folder, "again", resume_from_checkpoint=folder / "again" / "checkpoint-2", **flags)
    assert resumed.rows == whole.rows[:2]


# --- what is refused ---


@pytest.mark.parametrize("name", KEPT)
def test_a_field_that_must_keep_its_value_is_refused_with_the_reason(name):
    parsed = parse_arguments([])
    setattr(parsed[-1], name, "other")
    with pytest.raises(ValueError, match=f"`--{name} other` is not supported: .{{20,}}. Remove it."):
        check_arguments([], *parsed[1:4], parsed[-1])


@pytest.mark.parametrize(
    "flags, message",
    [
        ("--eval_do_concat_batches false", "`--eval_do_concat_batches False` is not supported: the task scores"),
        ("--do_train false", "`--do_train False` is not supported: `--num_train_epochs 0` evaluates"),
        ("--do_eval true", "`--do_eval` is not supported: .* if `--eval_strategy` is"),
        ("--do_eval false --eval_strategy epoch", "`--do_eval` is not supported"),
        ("--no_do_predict", "the test split is always evaluated"),
        ("--debug underflow_overflow", "`--debug .*` is not supported: a loss or gradient"),
        ('--accelerator_config {"split_batches":true}', "rows are distributed"),
        ("--auto_find_batch_size true", "depend on the batch size"),
        ("--fp16 true", "`--fp16` has no effect on a CPU"),
        ("--tf32 true", "--tf32 requires"),
        ("--learning_rate nan", "`--learning_rate nan` was given. It must be a finite number of at least 0"),
        ("--learning_rate=-1e-3", "`--learning_rate -0.001` was given"),
        ("--fuser_lr_ratio=-1", "`--fuser_lr_ratio -1.0` was given"),
        ("--data_seed=-1", "`--data_seed -1` was given"),
        ("--base_learning_rate inf", "`--base_learning_rate inf` was given"),
        ("--max_grad_norm=-1", "`--max_grad_norm -1.0` was given"),
        ("--per_device_train_batch_size 0", "`--per_device_train_batch_size 0` was given.* at least 1"),
        ("--label_smoothing_factor 1", "must be below 1"),
        ("--adam_beta2 1.5", "`--adam_beta2 1.5` was given. It must be below 1"),
        ("--max_steps 0", "`--max_steps 0` was given. Give a positive number"),
        ("--num_train_epochs 0 --max_steps 4", "`--max_steps` has no effect"),
        ("--warmup_steps 1.5", "`--warmup_steps 1.5` was given"),
        ("--train_sampling_strategy batch_rebalance", "batch_rebalance` is not supported: it does not read `--seed`"),
        ("--streaming true --max_steps 1 --train_sampling_strategy group_by_length", "needs the lengths of all rows"),
        ("--max_new_tokens 0", "`--max_new_tokens 0` was given. It must be at least 1"),
        ("--max_prompt_length=-1", "`--max_prompt_length -1` was given"),
        ("--max_samples 0", "`--max_samples 0` was given"),
        ("--optim galore_adamw", "`--optim galore_adamw` is not supported: .*Use one of adamw_torch"),
        ("--optim sgd --optim_args momentun=0.9", "`--optim sgd` does not read `momentun`.* It reads momentum"),
        ("--optim sgd --optim_args momentum", "`--optim_args momentum` was given. Write it as `name=value"),
        ("--optim_args fused=true", "`--optim adamw_torch_fused` does not read `fused`.* It reads nothing"),
        ("--eval_steps 2", "`--eval_steps` has no effect without `--eval_strategy steps`"),
        ("--save_steps 2", "`--save_steps` has no effect without `--save_strategy steps`"),
        ("--save_strategy steps --save_steps 0", "`--save_steps 0.* was given. Give a positive number of steps"),
        ("--save_strategy best", "`--save_strategy` has no effect without `--eval_strategy steps` or `epoch`"),
        ("--metric_for_best_model IMG", "`--metric_for_best_model` has no effect without `--eval_strategy"),
        ("--load_best_model_at_end true", "`--load_best_model_at_end` has no effect without `--eval_strategy"),
        ("--lr_scheduler_type warmup_stable_decay", "cannot be used with `--lr_scheduler_kwargs {}`.*num_decay_steps"),
        ("--lr_scheduler_type cosine_with_min_lr", "cannot be used with `--lr_scheduler_kwargs {}`.* min_lr"),
        ("--dataloader_persistent_workers true", "no effect without `--dataloader_num_workers 1` or more"),
        ("--hub_model_id org/name", "`--hub_model_id` has no effect without `--push_to_hub true`"),
    ],
)
def test_what_would_have_no_effect_or_a_wrong_one_is_refused(flags, message, monkeypatch):
    monkeypatch.setattr(train, "load_processor", lambda *_: pytest.fail("too late"))
    with pytest.raises(ValueError, match=message):
        train.main(["--max_samples", "2", *flags.split()])


NO_MODES = '--deepspeed={"zero_optimization":{"stage":2}}'
AUTOCAST = '--deepspeed={"zero_optimization":{"stage":2},"torch_autocast":{"enabled":true,"dtype":"bfloat16"}}'
ITS_OWN = '--deepspeed={"zero_optimization":{"stage":2},"bf16":{"enabled":true}}'


@pytest.mark.parametrize(
    "flags, environment, message",
    [
        ([], {"MIXED_PRECISION": "fp16"}, "`mixed_precision: fp16` of accelerate has no effect on a CPU"),
        ([], {"MIXED_PRECISION": "bf16", "USE_DEEPSPEED": "true"}, "`mixed_precision: bf16` was .*`--dtype bfloat16`"),
        ([NO_MODES], {"MIXED_PRECISION": "bf16"}, "`mixed_precision: bf16` was given with DeepSpeed"),
        ([ITS_OWN], {}, "`mixed_precision: bf16` was given with DeepSpeed"),
        (["--deepspeed=ds_config.json"], {"MIXED_PRECISION": "bf16"}, None),  # in which it has no effect
        ([AUTOCAST], {}, None),
        ([], {"MIXED_PRECISION": "bf16"}, None),
    ],
)
def test_the_mixed_precision_of_accelerate_is_checked_as_that_of_a_flag(flags, environment, message, monkeypatch):
    for name, value in environment.items():
        monkeypatch.setenv(f"ACCELERATE_{name}", value)
    parsed = parse_arguments([*flags, "--use_cpu", "true"])
    with pytest.raises(ValueError, match=message) if message else nullcontext():
        check_arguments(flags, *parsed[1:4], parsed[-1])
    if not message:
        expected = {(): "bf16", (AUTOCAST,): "torch_autocast bfloat16"}.get((*flags,), "no")
        assert name_precision(parsed[-1]) == expected


@pytest.mark.parametrize(
    "flags, message",
    [
        (
            {"eval_strategy": "epoch", "metric_for_best_model": "accuracy"},
            r"`--metric_for_best_model accuracy` is not a score .*Scores: NAT, SOC, TXT, IMG, G1-6, average, loss\.",
        ),
        (
            {"dataloader_drop_last": True, "per_device_train_batch_size": 9, "max_steps": 2},
            r"The train split has 8 rows, fewer than a batch on each process \(9 x 1\)",
        ),
        (
            {"max_new_tokens": 500},
            r"Row \d of the test split has \d+ tokens, and its answer may have 500, together more than the 512",
        ),
        (
            {"method": "llava", "max_new_tokens": 420},
            r"Row 1 of the test split has 100 tokens with the 16 of each image or tile, and its answer .* the 512",
        ),
    ],
)
def test_what_the_rows_do_not_allow_is_refused_before_training(folder, flags, message):
    with pytest.raises(ValueError, match=message):
        run(folder, **flags)


def test_a_warm_up_that_covers_all_steps_is_named(folder, caplog):
    for steps, warned in ((4, True), (3, False), (0.9, False)):
        caplog.clear()
        run(folder, warmup_steps=steps)
        assert ("covers all 4 steps" in caplog.text) == warned


# --- recipes ---


def test_a_value_of_a_recipes_task_is_not_that_of_another_task(tmp_path):
    own, digits = parse_arguments(["--task", "vqa", "--data_path", "x/y"]), parse_arguments(["--task", "digits"])
    assert (own[-1].train_sampling_strategy, digits[-1].train_sampling_strategy) == ("random", "sequential")
    assert own[2] == digits[2], "the bases stay"
    assert (own[1].max_samples, own[1].only_images) == (None, False) != (digits[1].max_samples, digits[1].only_images)
    values = "data_path: x/y\ntrain_sampling_strategy: sequential\nseed: 5\n"
    (tmp_path / "base.yaml").write_text(f"task: digits\n{values}")
    (tmp_path / "row.yaml").write_text("base: base.yaml\ntask: vqa\n")
    (tmp_path / "any.yaml").write_text(values)
    for words, kept in (
        (["row.yaml"], (None, "random", 5)),
        (["base.yaml", "--task", "vqa"], (None, "random", 5)),
        (["base.yaml"], ("x/y", "sequential", 5)),
        (["any.yaml", "--task", "vqa"], ("x/y", "sequential", 5)),
    ):
        _, data, *_, training = parse_arguments([str(tmp_path / words[0]), *words[1:]])
        assert (data.data_path, training.train_sampling_strategy, training.seed) == kept, words


def test_a_number_of_epochs_overrides_a_recipes_number_of_steps(tmp_path):
    (tmp_path / "steps.yaml").write_text("max_steps: 1500\n")
    words = [str(tmp_path / "steps.yaml"), "--num_train_epochs", "2"]
    _, *parsed = parse_arguments(words)
    check_arguments(words, *parsed[:3], parsed[-1])
    assert (parsed[-1].num_train_epochs, parsed[-1].max_steps) == (2, -1)


def test_a_flag_overrides_the_partner_of_its_value_in_a_recipe(tmp_path):
    (tmp_path / "row.yaml").write_text("base_learning_rate: 0.02\nstreaming: true\nmax_steps: 5\n")
    words = [str(tmp_path / "row.yaml"), "--learning_rate", "1e-4", "--num_train_epochs", "0"]
    _, *parsed = parse_arguments(words)
    check_arguments(words, *parsed[:3], parsed[-1])
    assert (parsed[-1].learning_rate, parsed[-1].max_steps) == (1e-4, -1)


def test_a_recipe_overrides_the_partner_of_its_value_in_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("base_learning_rate: 0.02\nmax_steps: 1500\n")
    (tmp_path / "row.yaml").write_text("base: base.yaml\nlearning_rate: 1e-4\nnum_train_epochs: 3\n")
    training = parse_arguments([str(tmp_path / "row.yaml")])[-1]
    assert (training.learning_rate, training.base_learning_rate) == (1e-4, None)
    assert (training.num_train_epochs, training.max_steps) == (3, -1)


def test_values_of_yaml_are_read_as_they_are_meant(tmp_path):
    lines = ["save_strategy: no", "eval_strategy: off", "report_to: [tensorboard, trackio]", "learning_rate: 1e-4"]
    lines += ["lr_scheduler_type: cosine_with_min_lr", "lr_scheduler_kwargs: {min_lr: 1e-5}"]
    lines += ["task: vqa", "columns: {question: prompt, answer: label}", "max_steps: 010"]
    (tmp_path / "row.yaml").write_text("\n".join(lines))
    _, data, *_, training = parse_arguments([str(tmp_path / "row.yaml")])
    assert data.columns == "question=prompt,answer=label"
    assert training.save_strategy == training.eval_strategy == "no"
    assert training.report_to == ["tensorboard", "trackio"] and training.learning_rate == 1e-4
    assert training.lr_scheduler_kwargs == {"min_lr": 1e-5} and training.max_steps == 10
    (tmp_path / "row.yaml").write_text("report_to: []\nlr_scheduler_kwargs:\n  <<: {num_cycles: 2}\n")
    training = parse_arguments([str(tmp_path / "row.yaml")])[-1]
    assert training.report_to == [] and training.lr_scheduler_kwargs == {"num_cycles": 2}


@pytest.mark.parametrize(
    "name, text, value",
    [
        *((name, text, text) for name in ("output_dir", "text_model_revision") for text in ("007", "1e5", "12e4567")),
        *(("run_name", text, text) for text in ("1.10", "on", "2024-01-01", "1:30.5", "1_000", "'1.10'")),
        ("run_name", "~", None),
        ("columns", "{question: 007, answer: yes}", "question=007,answer=yes"),
        ("columns", "{question: 1.0, image: null}", "question=1.0,image=none"),
        ("report_to", "[on, 010]", ["on", "010"]),
    ],
)
def test_texts_in_a_recipe_that_look_like_other_values_are_read_as_written(name, text, value, tmp_path):
    (tmp_path / "row.yaml").write_text(f"{name}: {text}\nseed: 010\ntask: vqa\n")
    _, *parsed = parse_arguments([str(tmp_path / "row.yaml")])
    found = next(getattr(own, name) for own in parsed if hasattr(own, name))
    assert found == (value if value is None or isinstance(value, list) else value.strip("'"))
    assert parsed[-1].seed == 10, "a number, as before"


@pytest.mark.parametrize(
    ("recipe", "flags", "message"),
    [
        ("learning_rate: 1\nbase_learning_rate: 1\n", [], "has both `learning_rate` and `base_learning_rate`"),
        ("seed: 1\nseed: 2\n", [], "row.yaml is not valid YAML: `seed` is given twice"),
        ("seed: [1\n", [], "(?s)row.yaml is not valid YAML: .*Write a flag on each line"),
        ("base: row.yaml\n", [], "row.yaml is its own `base`"),
        ("base: none.yaml\n", [], "There is no recipe .*none.yaml, which .*row.yaml names as its `base`"),
        ("data_path: [2024]\n", [], r"row.yaml: `data_path` is \['2024'\]. Give one text"),
        ("no_dataloader_pin_memory: true\n", [], "`no_.*`. Did you mean `dataloader_pin_memory: false`"),
        ("seed: 1\n", ["--no_only_images"], "The command: unknown argument `--no_only_images`"),
        ("seed: 1\n", ["-seed", "2"], "The command: unknown argument `-seed`"),
        ("seed: 1\n", ["--no_dataloader_pin_memory", "true"], "`--no_data.*` takes no value. Remove 'true'"),
        ("seed: 1\n", ["--no-dataloader-pin-memory", "yes", "1"], "`--no-data.*` takes no value. Remove 'yes' '1'"),
        ("on: 1\n", [], "row.yaml: True is not the name of a flag"),
        ("task: vqa\n", ["--output_dir="], "`--output_dir` is empty"),
        ("base: [row.yaml]\n", [], r"`base` is \['row.yaml'\]. Give the name of one recipe"),
        ("eval_steps: 5\n", [], "`--eval_steps` has no effect without `--eval_strategy steps`"),
        ("lora_rank: 8\n", [], "`--lora_rank` has no effect with `--method dehvf`"),
        ("hub_model_id: org/name\n", [], "`--hub_model_id` has no effect without `--push_to_hub true`"),
        ("adapter: assets\nvisual_scale: 0.9\n", [], "`--visual_scale` was given, but `--adapter .*` already defines"),
        (
            "adapter: assets\nvisual_scale: 0.9\n",
            ["--num_groups", "2"],
            "`--num_groups` and `--visual_scale` were given, .* Remove them from .*row.yaml and the command",
        ),
        ("num_groups: 2\n", ["--adapter=assets", "--num_groups", "2"], "`--num_groups` was .* from the command"),
        ("seed: 1\n", ["--seed", "2", "other.yaml"], "Give the recipe other.yaml before all flags"),
        ("method: llava\nvisual_prompts: none\n", [], "`--visual_prompts` has no effect with `--method llava`"),
        ("learning_rate: [0.1, 0.2]\n", [], "`--learning_rate` takes one value. Remove '0.2'"),
        ("seed: 2\n", ["--output_dir=my", "2", "run"], "`--output_dir` takes one value. Remove '2' 'run'"),
        (
            "seed: 1\n",
            ["--lr_scheduler_kwargs", "{'min_lr': 1}"],
            r"\{'min_lr': 1\}\" is not valid JSON .*double quotes.* file of `--deepspeed` must not have comments",
        ),
    ],
)
def test_a_recipe_that_cannot_be_meant_is_refused(recipe, flags, message, tmp_path):
    (tmp_path / "row.yaml").write_text(recipe)
    arguments = [str(tmp_path / "row.yaml"), *flags]
    with pytest.raises(ValueError, match=message):
        parsed = parse_arguments(arguments)
        check_arguments(arguments, *parsed[1:4], parsed[-1])


def test_the_values_of_a_recipe_for_new_adapters_are_ignored_for_saved_ones(tmp_path):
    recipe = "method: memvp\nnum_groups: 2\nchat_template: plain\nimage_fit: pad\nmax_images: 2\nseed: 5\n"
    (tmp_path / "row.yaml").write_text(recipe)
    arguments = [str(tmp_path / "row.yaml"), "--adapter", "assets"]
    _, data, model, adapter, _, training = parse_arguments(arguments)
    check_arguments(arguments, data, model, adapter, training)
    assert (model.method, model.chat_template, model.image_fit) == ("dehvf", None, None)
    assert (adapter.num_groups, adapter.layer_fusion) == (DehvfConfig.num_groups, "adaptive")
    assert (adapter.max_images, training.seed) == (2, 5)


@pytest.mark.parametrize(
    ("recipe", "flags", "expected"),
    [
        ("layer_mapping: [[0, 1], [2], [1, 3]]\n", [], [[0, 1], [2], [1, 3]]),
        ("layer_mapping: random\n", [], "random"),
        ("layer_mapping: random\n", ["--layer_mapping", "[[0], [1, 2]]"], [[0], [1, 2]]),
        ("layer_mapping: [[0], [1]]\n", ["--layer_mapping=hierarchical"], "hierarchical"),
        ("seed: 1\n", [], "hierarchical"),
    ],
)
def test_a_layer_mapping_is_a_name_or_lists(recipe, flags, expected, tmp_path):
    (tmp_path / "row.yaml").write_text(recipe)
    adapters = parse_arguments([str(tmp_path / "row.yaml"), *flags])[3]
    assert adapters.layer_mapping == expected


def test_a_layer_mapping_that_is_neither_is_refused(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--layer_mapping", "deep"])
    assert "'deep' is neither hierarchical nor random nor JSON. Give one of these, or lists" in capsys.readouterr().err
