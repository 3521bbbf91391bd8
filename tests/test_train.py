"""The training script: its arguments, what it makes of rows, and whole runs."""

import datetime
import itertools
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from operator import itemgetter
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import datasets
import numpy as np
import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file
from tiny import (
    DEHVF_SIZES,
    IMAGE_SIZE,
    NUM_TEXT_LAYERS,
    ROOT,
    TEXT_SIZES,
    DehvfConfig,
    DehvfForConditionalGeneration,
    run,
    save_tiny_bases,
    tiny_config,
    tiny_model,
    tiny_processor,
    tiny_vision_config,
)
from transformers import AutoConfig, AutoModelForImageTextToText

import train
from baselines import METHODS
from dehvf import DehvfProcessor
from tasks import get_task, score_folder
from training import arguments
from training.arguments import DataArguments, DehvfTrainingArguments, parse_arguments
from training.chats import ChatTokenizer, prints_date, render
from training.data import Collator, Split, StreamedSplit, load_splits, read_image
from training.encoding import RowEncoder
from training.flags import DEFAULT_RECIPE, HELP_FILE, argument_names, argument_types, read_recipe, recipes, show_help
from training.models import load_processor, method_of
from training.results import write_card, write_example
from training.trainer import AnswerTrainer


def make_rows(size=6, hint="abc"):
    """Rows in ScienceQA's columns, every second one with an image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
    rows = {
        "image": [image if index % 2 else None for index in range(size)],
        "question": ["what is it?"] * size,
        "choices": [["one", "two"]] * size,
        "answer": [index % 2 for index in range(size)],
        "hint": [hint] * size,
        "subject": ["natural science", "social science"] * (size // 2),
        "grade": ["grade2"] * size,
    }
    return datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())


@pytest.fixture
def scienceqa(tmp_path, monkeypatch):
    """A stand-in for the Hub's ScienceQA: `(folder, save)`, where `save(train=rows, test=rows)` writes splits."""

    def save(**splits):
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    save(train=make_rows(), validation=make_rows(2), test=make_rows(4))
    return tmp_path / "data", save


def make_split(folder, split="train", training=True, task="scienceqa", processor=None, **values):
    arguments = DataArguments(task=task, data_path=str(folder), **values)
    return Split(get_task(task), split, processor or tiny_processor(), arguments, training)


# --- arguments ---


def test_flags_override_the_recipe_and_the_recipe_the_defaults():
    recipe, data, model, adapter, _, training = parse_arguments(
        ["recipes/digits.yaml", "--num_groups", "2", "--visual_prompts", "none", "--output_dir", "x"]
    )
    assert (recipe.name, data.task, model.vision_model) == ("digits.yaml", "digits", "assets/vision_model")
    assert (adapter.num_groups, adapter.visual_prompts, training.output_dir) == (2, "none", "x")
    assert adapter.fuser_hidden_size == DehvfConfig().fuser_hidden_size
    assert parse_arguments(["--seed", "7"])[0] == DEFAULT_RECIPE


@pytest.mark.parametrize("recipe", recipes(), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    bases = ["--vision_model", "org/vision", "--text_model", "org/text"]  # assets/real may be missing
    assert parse_arguments([str(recipe), *bases])[-1].output_dir == f"outputs/{recipe.stem}"


def test_the_default_recipe_finds_its_bases_from_any_folder(tmp_path, monkeypatch):
    assert parse_arguments([])[2].vision_model == "assets/vision_model"
    monkeypatch.chdir(tmp_path)
    assert parse_arguments([])[2].vision_model == str(ROOT / "assets" / "vision_model")


def test_a_recipe_of_this_repository_is_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert parse_arguments(["recipes/digits.yaml"])[0] == DEFAULT_RECIPE
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "digits.yaml").write_text("task: vqa\n")
    assert parse_arguments(["recipes/digits.yaml"])[1].task == "vqa"


def test_the_paths_of_a_recipe_are_found_beside_it_first(tmp_path, monkeypatch):
    for folder in (tmp_path / "own" / "data", tmp_path / "other" / "data", tmp_path / "other" / "more"):
        folder.mkdir(parents=True)
    (tmp_path / "own" / "base.yaml").write_text("data_path: data\ntext_model: more\nvision_model: org/model\n")
    (tmp_path / "own" / "row.yaml").write_text("base: base.yaml\n")
    monkeypatch.chdir(tmp_path / "other")
    for recipe in ("../own/base.yaml", "../own/row.yaml"):
        _, data, model, *_ = parse_arguments([recipe, "--task", "vqa"])
        assert Path(data.data_path).samefile(tmp_path / "own" / "data")
        assert (model.text_model, model.vision_model) == ("more", "org/model")
    for folder, value in (("own", "{}"), ("other", "no JSON")):
        (tmp_path / folder / "engine.json").write_text(value)
    (tmp_path / "own" / "engine.yaml").write_text("deepspeed: engine.json\n")
    assert Path(read_recipe(Path("../own/engine.yaml"))["deepspeed"]).samefile(tmp_path / "own" / "engine.json")
    (tmp_path / "list.yaml").write_text("- seed: 5\n")
    with pytest.raises(ValueError, match="list.yaml contains a list. Write a flag on each line"):
        parse_arguments([str(tmp_path / "list.yaml")])


def test_saved_adapters_name_their_bases_unless_others_are_named_with_them(tmp_path):
    adapter, recipe = ["--adapter", "org/adapter"], tmp_path / "recipe.yaml"
    for values, flags, expected in (
        ({}, adapter, (None, None)),
        ({}, [*adapter, "--text_model", "org/text"], (None, "org/text")),
        ({"text_model": "org/new"}, adapter, (None, None)),
        ({"adapter": "org/adapter"}, [], (None, None)),
        ({"adapter": "org/adapter", "text_model": "org/text"}, [], (None, "org/text")),
        ({"adapter": "org/other", "text_model": "org/text"}, adapter, (None, None)),
    ):
        recipe.write_text(json.dumps({"task": "vqa", **values}))
        model = parse_arguments([str(recipe), *flags])[2]
        assert (model.adapter, model.vision_model, model.text_model) == ("org/adapter", *expected)


def test_a_recipe_changes_its_base_and_a_rate_overrides_the_rate_per_256(tmp_path):
    (tmp_path / "base.yaml").write_text("num_groups: 2\nseed: 5\nbase_learning_rate: 2e-2\noutput_dir: x\n")
    (tmp_path / "row.yaml").write_text("base: base.yaml\nnum_groups: 8\n")
    for flags, rates in (([], (5e-5, 0.02)), (["--learning_rate", "1e-4"], (1e-4, None))):
        _, _, _, adapter, _, training = parse_arguments([str(tmp_path / "row.yaml"), *flags])
        assert (adapter.num_groups, training.seed, training.output_dir) == (8, 5, "x")
        assert (training.learning_rate, training.base_learning_rate) == rates


def test_a_method_sets_its_switch():
    adapter = parse_arguments(["--method", "memvp"])[3]
    assert (adapter.layer_fusion, adapter.fuser_query) == ("penultimate", "network")
    assert parse_arguments(["--method", "layer+instruction"])[3].fuser_query == "layer+instruction"


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_gruops", "4"], "The command: unknown argument `num_gruops`. Did you mean `num_groups`?"),
        (["--group_by_length", "true"], "Did you mean `train_sampling_strategy group_by_length`?"),
        (["--output_dir", "gr\udcc3\udcb6sse"], "cannot read .* encoding of this locale. Set `PYTHONUTF8=1`"),
        (["recipes/digit.yaml"], "There is no recipe recipes/digit.yaml. Did you mean `recipes/digits.yaml`"),
        (["--data_path", "nowhere"], "`--data_path nowhere`: there is no such folder"),
        (["--text_model", "/no/where"], "`--text_model /no/where`: there is no such folder"),
        (["--adapter=./checkpoint"], "`--adapter ./checkpoint`: there is no such folder"),
        (["--method", "memvp", "--layer_fusion", "mean"], "means `--layer_fusion penultimate`, but `mean` was given"),
        (["--method", "memvp", "--layer_fusion", "adaptive"], "penultimate`, but `adaptive` was given"),
        (["--lora_rank", "4"], "`--lora_rank` has no effect with `--method dehvf`. It is for llava-lora, igva"),
        (["--method", "lavin", "--igva-num-heads=2"], "`--igva_num_heads` .* with `--method lavin`. It is for igva"),
        (["--method", "llava", "--visual_prompts", "none"], "`--visual_prompts` has no effect with `--method llava`"),
        (["--method", "lavin", "--fuser_lr_ratio", "1"], "`--fuser_lr_ratio` .* It is for dehvf, memvp"),
        (["--method", "lavin", "--lavin_temperature", "0"], "`lavin_temperature` is 0.0, but must be more than 0"),
        (["--adapter_revision", "abc"], "`--adapter_revision` has no effect without `--adapter`"),
        (["--adapter", "assets", "--adapter_revision", "abc"], "assets is a folder, .* Remove `--adapter_revision`"),
        (["--num_train_epochs", "0", "--save_strategy", "epoch"], "`--save_strategy` has no effect with `--num_train"),
        (
            ["--lr_scheduler_type", "constant", "--warmup_steps", "9"],
            "`--lr_scheduler_type constant` has no warm-up",
        ),
        (["--fsdp_config", "{}"], "`--fsdp_config` has no effect without `--fsdp`"),
        (["--layer_mapping_seed", "7"], "`--layer_mapping_seed` has no effect without `--layer_mapping random`"),
        (["--layer_mapping", "[[0]]", "--num_groups", "2"], "`--num_groups` has no effect without `--layer_mapping h"),
        (["--optim", "sgd", "--adam_beta1", "0.5"], "`--adam_beta1` has no effect without `--optim adamw_torch`"),
        (["--save_total_limit", "3"], "`--save_total_limit` has no effect without `--save_strategy steps` or"),
        (["--optim", "sgd", "--optim_args", "momentum=abc"], "`momentum` must be a number"),
        (["--streaming", "true"], "needs `--max_steps`"),
        (["--adapter", "x", "--method", "memvp"], "`--method` was given, but `--adapter x`"),
        (["--adapter", "x", "--method", "lavin", "--chat_template", "plain"], "`--chat_template` was given, but"),
        (["--adapter", "x", "--visual_prompts", "none"], "`--visual_prompts` was given, but `--adapter x`"),
        (["--learning_rate", "1", "--base_learning_rate", "1"], "Remove one of them"),
        (["--early_stopping_patience", "2"], "needs `--load_best_model_at_end true`.*--eval_strategy"),
        (["--load_in_4bit", "true", "--method", "lavin"], "`--method lavin` does not support `--load_in_4bit`"),
        (["--load_in_4bit", "true", "--load_in_8bit", "true"], "only one can be used"),
        (["--method", "lavin", "--deepspeed", "launch/zero3.json"], "`--method lavin` does not .* ZeRO-3"),
        (["--num_train_epochs", "0", "--deepspeed", "ds_config.json"], "which DeepSpeed ZeRO-2 does not support"),
        (
            ["--deepspeed", '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "AdamW"}}'],
            "DeepSpeed config has `optimizer`, but train.py makes",
        ),
        (
            ["--lr_scheduler_type", "greedy", "--eval_strategy", "epoch", "--warmup_steps", "9"],
            "greedy` has no warm-up",
        ),
        (["--bf16", "true", "--deepspeed", "ds_config.json"], "`--bf16` was given with .*`--dtype bfloat16` instead"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_that_cannot_work_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train.main([*flags, *([] if ".yaml" in flags[0] else ["--max_samples", "2"])])


@pytest.mark.parametrize("flags", [["--method", "lavin"], ["--num_train_epochs", "0"]])
def test_what_fsdp_cannot_do_is_refused(flags, monkeypatch):
    monkeypatch.setattr(arguments, "name_engine", lambda _: "FSDP")
    with pytest.raises(ValueError, match="FSDP"):
        train.main([*flags, "--max_samples", "2"])


@pytest.mark.parametrize("flags", [["--layer_fusion", "median"], ["--task", "nothing"], ["--num_groups", "many"]])
def test_a_value_that_is_no_choice_ends_the_run(flags, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_typo_in_a_recipe_is_named(tmp_path):
    (tmp_path / "a.yaml").write_text("num_gruops: 4\n")
    with pytest.raises(ValueError, match="a.yaml: unknown argument `num_gruops`. Did you mean `num_groups`"):
        parse_arguments([str(tmp_path / "a.yaml")])


@pytest.mark.parametrize("flags", [["--num_gruops", "4"], ["recipes/digit.yaml"], ["--data_path", "nowhere"]])
def test_a_wrong_command_is_reported_before_the_libraries_are_imported(flags):
    start = time.perf_counter()
    process = subprocess.run([sys.executable, "train.py", *flags], cwd=ROOT, capture_output=True, text=True)
    assert process.returncode and "ValueError" in process.stderr
    assert "torch" not in process.stderr and time.perf_counter() - start < 5


def test_a_python_without_the_requirements_is_named(monkeypatch):
    monkeypatch.setattr("training.flags.find_spec", lambda name: None)
    argument_types.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=f"not installed for {re.escape(sys.executable)}.*requirements.txt"):
        argument_names()


def test_the_help_describes_every_flag_and_no_name_is_missing_from_the_sources(capsys):
    with pytest.raises(SystemExit):
        parse_arguments(["--help"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "--fuser-num-heads FUSER_NUM_HEADS Attention heads of the fuser" in printed
    for word in printed.split():
        if word.startswith("--") and word.strip("-,=").isidentifier():
            name = word.strip("-,=")
            assert {name, name.removeprefix("no_")} & argument_names(), name
    assert all(len(text) > 10 for text in arguments.describe_fields(DehvfConfig.__doc__).values())


def test_the_listed_flags_are_those_of_the_parser():
    if HELP_FILE.read_text(encoding="utf-8").splitlines()[0] != (expected := arguments.make_help()).splitlines()[0]:
        pytest.skip("docs/flags.txt was written with other versions of Python or transformers")
    assert HELP_FILE.read_text(encoding="utf-8") == expected, "run `python -m training.arguments`"
    helps = {action.dest: action.help for action in arguments.make_parser()._actions}
    for name, (_, reason) in arguments.KEPT.items():
        assert helps[name] == f"Keep the default: {reason}."


def test_help_is_printed_without_slow_imports(tmp_path):
    if not HELP_FILE.read_text(encoding="utf-8").splitlines()[0].endswith(f" {transformers.__version__}"):
        pytest.skip("docs/flags.txt was written with another version of transformers")
    command = [sys.executable, "-X", "importtime", ROOT / "train.py", "--help"]
    process = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert not process.returncode and "torch" not in process.stderr
    assert process.stdout == HELP_FILE.read_text(encoding="utf-8").partition("\n\n")[2]


def test_help_for_another_release_of_transformers_comes_from_the_parser(monkeypatch, capsys):
    monkeypatch.setattr("training.flags.version", lambda name: "0.0.0")
    show_help(["--help"])
    assert capsys.readouterr().out == ""


# --- rows ---


def test_the_loss_is_on_the_answer_and_eos_and_evaluation_sees_the_same_prompt(scienceqa):
    row, evaluated = make_split(scienceqa[0])[1], make_split(scienceqa[0], training=False)[1]
    decode = tiny_processor().tokenizer.decode
    answer = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert decode(answer) == " The answer is B.</s>".replace("T", decode(answer)[1])
    assert [label for label in row["labels"] if label != -100] == answer
    prompt = decode(row["input_ids"][: -len(answer)])
    assert prompt.startswith("<s>") and prompt.endswith("Response:")
    assert decode(evaluated["input_ids"]).endswith("answer is") and "labels" not in evaluated
    assert row["input_ids"][: len(evaluated["input_ids"])] == evaluated["input_ids"]
    options = [option for (option,) in evaluated["options"]]
    assert tiny_processor().tokenizer.convert_ids_to_tokens(options) == [" A", " B"]


@pytest.mark.parametrize("with_bos", [True, False], ids=["BOS in the template", "BOS by the tokenizer"])
def test_a_prompt_has_the_tokens_that_the_chat_template_gives_with_bos_once(scienceqa, with_bos):
    processor = tiny_processor()
    if not with_bos:
        processor.chat_template = processor.chat_template.replace("{{- bos_token | default('', true) -}}\n", "")
    assert ("bos_token" in processor.chat_template) == with_bos
    row = make_split(scienceqa[0], processor=processor)[0]
    message = {"role": "user", "content": get_task("scienceqa").prompt(make_rows()[0], "abc")}
    tokens = processor.apply_chat_template([message], tokenize=True, add_generation_prompt=True)
    tokens = tokens[0] if isinstance(tokens[0], list) else tokens
    assert row["input_ids"][: row["is_answer"].index(True)] == tokens
    assert tokens.count(processor.tokenizer.bos_token_id) == 1
    assert ChatTokenizer(processor).encode(render(processor, message["content"]))[0] == tokens


def test_a_batch_is_padded_on_the_left_and_marks_images_and_instructions(scienceqa):
    split = make_split(scienceqa[0])
    rows = [split[0], split[1]]
    rows[0] |= {name: rows[0][name][:-3] for name in ("input_ids", "is_answer", "labels")}
    batch = Collator(tiny_processor(), instruction_mask=True)(rows)
    assert batch["image_mask"].tolist() == [False, True]
    assert batch["attention_mask"][0, :3].tolist() == [0, 0, 0] and batch["labels"][0, :3].tolist() == [-100] * 3
    assert batch["input_ids"].shape == batch["labels"].shape and batch["index"].tolist() == [0, 1]
    assert "pixel_values" not in Collator(tiny_processor())([split[0], split[2]])
    read = batch["input_ids"][1][batch["instruction_mask"][1].bool()]
    assert tiny_processor().tokenizer.decode(read).endswith("Response:")
    assert batch["instruction_mask"][0, :3].tolist() == [0, 0, 0]


def test_image_tokens_follow_the_first_token_of_rows_with_an_image(scienceqa):
    rows = [make_split(scienceqa[0])[index] for index in (0, 1)]
    batch = Collator(tiny_processor(), image_tokens=[99, 99])(rows)
    assert batch["input_ids"][1, :3].tolist() == [rows[1]["input_ids"][0], 99, 99]
    assert 99 not in batch["input_ids"][0] and batch["labels"].shape == batch["input_ids"].shape
    assert batch["labels"][1][batch["labels"][1] != -100].tolist() == [x for x in rows[1]["labels"] if x != -100]


def test_a_long_prompt_loses_context_and_nothing_else(scienceqa):
    folder, save = scienceqa
    save(train=make_rows(hint="a hint that is very, very far too long"))
    whole = make_split(folder)
    length = whole[0]["labels"].count(-100)
    shortened = make_split(folder, max_prompt_length=length - 10)
    assert (whole.num_shortened, shortened.num_shortened) == (0, 6)
    assert shortened[0]["labels"].count(-100) == length - 10
    decode = tiny_processor().tokenizer.decode
    assert decode(shortened[0]["input_ids"]) == decode(whole[0]["input_ids"]).replace("r too long", "")


def test_training_computes_the_logits_of_the_answers_alone(scienceqa, tmp_path):
    model, collator = tiny_model(max_position_embeddings=512), Collator(tiny_processor())
    batch = collator([make_split(scienceqa[0])[index] for index in range(4)])
    arguments = DehvfTrainingArguments(str(tmp_path), use_cpu=True)
    trainer = AnswerTrainer(model=model, args=arguments, data_collator=collator, max_new_tokens=1, run={})
    widths = []
    model.lm_head.register_forward_hook(lambda module, inputs, logits: widths.append(logits.shape[1]))
    loss = trainer.compute_loss(model, dict(batch))
    torch.testing.assert_close(loss, model(**{name: batch[name] for name in batch if name != "index"}).loss)
    assert widths == [len("The answer is A.") + 2, batch["input_ids"].shape[1]]  # with EOS, and one before them


@pytest.mark.parametrize("model_type", ["gpt2", "gpt_neo", "llama"])
def test_padding_changes_neither_a_loss_nor_a_likelihood(model_type, tmp_path):
    """Also where positions have embeddings, and the padding before a text would be counted."""
    names = ("num_attention_heads", "num_hidden_layers", "hidden_size", "vocab_size", "initializer_range")
    sizes = {**{name: TEXT_SIZES[name] for name in names}, "max_position_embeddings": 64}
    if model_type == "gpt_neo":
        sizes["attention_types"] = [[["global"], NUM_TEXT_LAYERS]]
    text_config = AutoConfig.for_model(model_type, **sizes)
    vision_config = tiny_vision_config("clip_vision_model")
    torch.manual_seed(0)
    model = DehvfForConditionalGeneration(
        DehvfConfig(vision_config=vision_config, text_config=text_config, **DEHVF_SIZES)
    ).eval()
    arguments, collator = DehvfTrainingArguments(str(tmp_path), use_cpu=True), Collator(tiny_processor())
    trainer = AnswerTrainer(model=model, args=arguments, data_collator=collator, max_new_tokens=1, run={})

    def loss(*lengths):
        rows = [{"input_ids": [*range(3, 3 + length)], "labels": [-100, *range(4, 3 + length)]} for length in lengths]
        batch = collator([{"index": 0, "image": None, **row} for row in rows])
        return trainer.compute_loss(model, batch, num_items_in_batch=1)

    def likelihoods(*lengths):
        options = [[7, 8], [9], [10, 11, 12]]
        rows = [{"input_ids": [*range(3, 3 + length)], "options": options} for length in lengths]
        batch = collator([{"index": 0, "image": None, **row} for row in rows])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
        generated = model.generate(**inputs, max_new_tokens=1, return_dict_in_generate=True, output_logits=True)
        return trainer.option_likelihoods(model, inputs, batch["options"], generated.logits[0])

    with torch.no_grad():
        torch.testing.assert_close(loss(5, 9), loss(5) + loss(9))
        torch.testing.assert_close(likelihoods(5, 9), torch.cat([likelihoods(5), likelihoods(9)]))


def test_a_chat_template_can_replace_that_of_the_tokenizer(tmp_path):
    vision, text = save_tiny_bases(tmp_path)
    (tmp_path / "own.jinja").write_text("{{ messages[0]['content'] }}!", encoding="utf-8-sig")
    command = ["--vision_model", str(vision), "--text_model", str(text), "--chat_template"]
    for place, expected in (("plain", "<s>who?\nResponse:"), (str(tmp_path / "own.jinja"), "who?!")):
        processor = load_processor(*parse_arguments([*command, place])[2:4])
        assert render(processor, "who?") == expected
        processor.save_pretrained(tmp_path / "saved")
        assert render(type(processor).from_pretrained(tmp_path / "saved"), "who?") == expected
    with pytest.raises(ValueError, match="there is no such file"):
        parse_arguments([*command, "other.jinja"])


def test_rows_are_encoded_once_for_all_processes_and_runs(scienceqa, monkeypatch):
    """And again when anything changes that they depend on."""
    encoded, encode = [], RowEncoder.__call__
    monkeypatch.setattr(RowEncoder, "__call__", lambda self, *row: encoded.append(row) or encode(self, *row))
    first = make_split(scienceqa[0])
    assert len(encoded) == 6 and first.encoded.cache_files, "memory-mapped"
    again = make_split(scienceqa[0])
    assert len(encoded) == 6 and list(again.encoded) == list(first.encoded)
    longer, template = tiny_processor(), tiny_processor()
    longer.tokenizer.add_tokens(["what is"])
    template.chat_template = "Now: " + template.chat_template
    scienceqa[1](train=make_rows(6, hint="another"), test=make_rows(6))
    for values in ({}, {"split": "test"}, {"training": False}, {"max_prompt_length": 500}, {"max_samples": 5}):
        make_split(scienceqa[0], **values)
    for processor in (longer, template):
        make_split(scienceqa[0], processor=processor)
    assert len(encoded) == 6 * 7 + 5


def break_images(rows, broken):
    """Replaces the bytes of some images by something that is no image."""
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    images = [
        {"bytes": b"no image", "path": None} if index in broken else row["image"]
        for index, row in enumerate(undecoded)
    ]
    features = undecoded.features
    return undecoded.remove_columns("image").add_column("image", images, feature=features["image"])


def test_an_unreadable_image_is_replaced_in_training_and_named_before_evaluation(scienceqa):
    folder, save = scienceqa
    save(train=break_images(make_rows(), [3]), test=break_images(make_rows(), [3, 5]))
    split = make_split(folder)
    assert split[3]["index"] == 4 and int(split.unreadable_images) == 1
    loader = torch.utils.data.DataLoader(split, batch_size=2, collate_fn=Collator(tiny_processor()), num_workers=1)
    assert len(list(loader)) == 3
    assert int(split.unreadable_images) == 2, "workers count too"
    with pytest.raises(ValueError, match="2 images of the test split cannot be read: row 3: .*; row 5: "):
        make_split(folder, "test", training=False)


def test_a_missing_image_file_is_like_an_unreadable_one(tmp_path):
    rows = [{"question": "why", "answer": "so", "image": "lost.png"}, {"question": "why", "answer": "so"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert make_split(tmp_path, task="vqa")[0]["index"] == 1
    with pytest.raises(ValueError, match="1 images of the test split cannot be read: row 0: .*lost.png"):
        make_split(tmp_path, "test", training=False, task="vqa")


def test_images_are_the_right_way_up(tmp_path):
    image, exif = Image.new("L", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    read = read_image({"path": str(tmp_path / "a.jpg"), "bytes": None})
    assert (read.size, read.mode) == ((20, 40), "RGB")


def test_rows_that_are_too_long_with_their_images_are_named(scienceqa):
    split, processor = make_split(scienceqa[0], max_new_tokens=1), tiny_processor()
    longest = max(len(row["input_ids"]) for row in split)
    processor.tokenizer.model_max_length = longest + 15
    split.check_lengths(processor, 1)
    message = f"has {longest + 16} tokens with the 16 of each image or tile, more than the {longest + 15}"
    with pytest.raises(ValueError, match=f"Row 1 of the train split {message}"):
        split.check_lengths(processor, 1, 16)
    with pytest.raises(ValueError, match=message):
        Collator(processor, image_tokens=[9] * 16)([*split])


def test_a_cache_that_cannot_be_created_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "file" / "cache")
    with pytest.raises(
        OSError, match="cannot be created: .*file/cache.*Set the environment variable HF_DATASETS_CACHE"
    ):
        load_splits(None, None, None, SimpleNamespace(process_index=0))


def test_rows_without_an_image_can_be_left_out_of_training(scienceqa):
    split = make_split(scienceqa[0], only_images=True)
    assert len(split) == 3 and all(row["image"] is not None for row in split)
    assert len(make_split(scienceqa[0], "test", training=False, only_images=True)) == 4
    assert len(make_split(scienceqa[0], only_images=True, max_samples=len(split))) == len(split)


@pytest.mark.parametrize("num_workers", [0, 2, 9])
def test_workers_repeat_each_row_of_a_stream_equally_often(tmp_path, num_workers):
    for file, numbers in {"a": range(2), "b": range(2, 8)}.items():
        rows = [{"question": (1 + number) * "why ", "answer": "so"} for number in numbers]
        (tmp_path / f"train-{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = DataArguments(task="vqa", data_path=str(tmp_path), columns="image=none", streaming=True)
    split = StreamedSplit(get_task("vqa"), "train", tiny_processor(), arguments, shuffle_seed=0)
    loader = torch.utils.data.DataLoader(split, batch_size=1, collate_fn=itemgetter(0), num_workers=num_workers)
    found = Counter(len(row["input_ids"]) for row in itertools.islice(loader, 24))
    assert sorted(found.values()) == 8 * [3], found


@pytest.mark.extended
@pytest.mark.parametrize("streaming", [True, False])
def test_workers_need_not_be_forked(scienceqa, monkeypatch, streaming):
    """As on macOS, and on Linux from Python 3.14 on."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "Value", spawn.Value)
    arguments = DataArguments(task="scienceqa", data_path=str(scienceqa[0]), streaming=streaming)
    kinds = {True: (StreamedSplit, None), False: (Split, True)}
    kind, last = kinds[streaming]
    split, collate = (
        kind(get_task("scienceqa"), "train", tiny_processor(), arguments, last),
        Collator(tiny_processor()),
    )
    loader = torch.utils.data.DataLoader(
        split, batch_size=2, collate_fn=collate, num_workers=1, multiprocessing_context=spawn
    )
    assert len(list(itertools.islice(loader, 3))) == 3


@pytest.mark.parametrize(
    "replaced, values, message",
    [
        ({"load": lambda *_, **__: make_rows().select([])}, {}, "train split of `scienceqa` is empty"),
        (
            {"load": lambda *_, **__: make_rows().remove_columns("hint")},
            {},
            r"lacks the columns \['hint'\]",
        ),
        *(
            (
                {"load": lambda *_, name=name, **__: make_rows().add_column(name, ["one"] * 6)},
                {},
                f"train split of `scienceqa` has the column `{name}`.* Rename it",
            )
            for name in ("index", "prediction", "cut", "expected", "choice", "has_image")
        ),
        ({"answer": lambda row: ""}, {}, "Row 0 of the train split: it has no answer to learn"),
        (
            {"options": lambda row: ["one", "one"]},
            {"training": False},
            "Row 0 of the train split: it has options with the same tokens",
        ),
        ({}, {"max_prompt_length": 10}, "Row 0 of the train split.*`max_prompt_length=10`.*never shortened"),
    ],
)
def test_rows_that_cannot_be_learned_are_refused(scienceqa, monkeypatch, replaced, values, message):
    for name, function in replaced.items():
        monkeypatch.setattr(get_task("scienceqa"), name, function)
    with pytest.raises(ValueError, match=message):
        make_split(scienceqa[0], **values)


def test_a_template_that_prints_the_date_is_named_and_rendered_again_each_day(scienceqa, monkeypatch, caplog):
    processor, prompts = tiny_processor(), []
    training_args = SimpleNamespace(
        process_index=0, num_train_epochs=1, eval_strategy="no", main_process_first=lambda desc: nullcontext()
    )
    template = processor.chat_template
    date = "{{ strftime_now('%d') }}"
    for day, text in ((1, date), (2, date), (3, "03")):
        now = datetime.datetime(2026, 11, day)
        clock = SimpleNamespace(now=lambda now=now: now, today=lambda now=now: now.date())
        monkeypatch.setattr("transformers.utils.chat_template_utils.datetime", clock)
        monkeypatch.setattr("training.encoding.date", clock)
        processor.chat_template = text + template
        arguments = DataArguments(task="scienceqa", data_path=str(scienceqa[0]))
        splits = load_splits(get_task("scienceqa"), processor, arguments, training_args)
        prompts.append(processor.tokenizer.decode(splits["test"][0]["input_ids"], skip_special_tokens=True).split()[0])
    assert [prompt[:2] for prompt in prompts] == ["01", "02", "03"]
    assert prints_date(SimpleNamespace(chat_template={"default": date}))
    assert caplog.text.count("The chat template prints the current date") == 2


def test_a_stream_has_the_rows_of_the_split_and_mixes_them(scienceqa):
    arguments = DataArguments(task="scienceqa", data_path=str(scienceqa[0]), streaming=True, max_samples=5)
    task, processor = get_task("scienceqa"), tiny_processor()
    streamed, shuffled = (StreamedSplit(task, "train", processor, arguments, seed) for seed in (None, 0))
    rows = make_split(scienceqa[0], max_samples=5)
    passes = [[row["labels"] for row in itertools.islice(split, 10)] for split in (streamed, shuffled)]
    in_order, mixed = [row["labels"] for row in rows], sorted(row["labels"] for row in rows)
    assert passes[0] == 2 * in_order, "pass after pass"
    assert [sorted(passes[1][:5]), sorted(passes[1][5:])] == [mixed, mixed]
    assert passes[1][:5] != in_order and passes[1][5:] != passes[1][:5], "each pass in an order of its own"


# --- whole runs ---


def launch(*arguments, launcher=()) -> str:
    return run("accelerate", "launch", *launcher, "train.py", *arguments)


TINY_ADAPTERS = [word for name, value in DEHVF_SIZES.items() for word in (f"--{name}", value)]
# Under ZeRO-3, each layer takes long
FEW_LAYERS = {"num_vision_layers": 4, "num_hidden_layers": 2}
TWO_PROCESSES = ("--num_processes", "2", "--use_deepspeed")


@pytest.mark.slow
@pytest.mark.extended  # test_readme.py launches the default recipe, test_recipes.py starts this one
@pytest.mark.parametrize(
    "launcher, flags",
    [
        pytest.param((), (), id="one process"),
        pytest.param((), ("--deepspeed", "ds_config.json"), id="ZeRO-2 on one"),
        pytest.param(TWO_PROCESSES, ("--deepspeed", "ds_config.json"), id="ZeRO-2 on two"),
    ],
)
def test_the_scienceqa_recipe_trains_on_a_stand_in(scienceqa, tmp_path, launcher, flags):
    """The paper's recipe as it is, but for the places of data and bases and the sizes that tiny bases ask for."""
    vision, text = save_tiny_bases(tmp_path, max_position_embeddings=512)
    output = tmp_path / "output"
    printed = launch(
        *("recipes/scienceqa-llama7b.yaml", "--data_path", scienceqa[0], "--vision_model", vision),
        *("--text_model", text, "--dtype", "float32", "--num_train_epochs", 2, "--output_dir", output),
        *("--per_device_train_batch_size", 2, "--eval_strategy", "epoch", "--per_device_eval_batch_size", 3),
        *(*TINY_ADAPTERS, *flags),
        launcher=launcher,
    )
    processes = 2 if launcher else 1
    assert f"learning rate {0.02 * 2 * processes / 256:g}" in printed
    tensors = load_file(output / "model.safetensors")
    assert f"{sum(tensor.numel() for tensor in tensors.values()):,} of" in printed
    lines = [json.loads(line) for line in (output / "predictions.jsonl").read_text().splitlines()]
    assert [line["index"] for line in lines] == [0, 1, 2, 3], "each row once, however many processes"
    results = json.loads((output / "results.json").read_text())
    assert {"NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12", "average"} <= results["scores"].keys()
    assert results["scores"]["count"] == results["size"] == 4
    code = printed[printed.index("from PIL import Image") :]
    if not flags:
        assert "Response:" in run("python", "-c", code), "the lines of Python that a run ends with work"
    card = (output / "README.md").read_text()
    assert code.strip() in card and "pipeline_tag: image-text-to-text" in card
    assert "folders are those of the machine" in card and f"| `{vision}` |" in card


def tiny_flags(tmp_path, scienceqa_folder, output, **flags) -> list[str]:
    """A run of seconds; `flags` change it."""
    vision, text = tmp_path / "vision", tmp_path / "text"
    if not vision.exists():
        save_tiny_bases(tmp_path, max_position_embeddings=512)
    values = {
        **{"task": "scienceqa", "data_path": scienceqa_folder, "vision_model": vision, "text_model": text},
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 1},
        **({} if "adapter" in flags or flags.get("method") in METHODS else DEHVF_SIZES),
        **{"learning_rate": 0.05, "output_dir": output, **flags},
    }
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def read_predictions(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text().splitlines()]


def test_a_stream_trains_on_the_rows_that_can_be_read(scienceqa, tmp_path):
    folder, save = scienceqa
    save(train=break_images(make_rows(), [3]), test=make_rows(4))
    train.main(tiny_flags(tmp_path, folder, tmp_path / "output", streaming=True, max_steps=4))
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["unreadable_image_reads"] >= 1
    assert len(read_predictions(tmp_path / "output")) == results["size"] == 4


@pytest.mark.parametrize("method", ["dehvf", "lavin"])
def test_a_base_with_generation_values_without_effect_is_trained_and_saved(scienceqa, tmp_path, method):
    """Also if the token that ends a turn is added to its generation config."""
    scienceqa[1](train=make_rows(), test=make_rows(4))
    flags = {"method": method, "max_steps": 1, "save_strategy": "steps", "save_steps": 1}
    flags = tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", **flags)
    file = tmp_path / "text" / "generation_config.json"
    values = {"eos_token_id": 3, "temperature": 0.9, "top_p": 0.6}
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))
    train.main(flags)
    for folder in (tmp_path / "output", tmp_path / "output" / "checkpoint-1"):
        saved = json.loads((folder / "generation_config.json").read_text())
        assert saved["eos_token_id"] == [3, 2] and not {"temperature", "top_p"} & saved.keys()


@pytest.fixture
def trained(scienceqa, tmp_path):
    """`(flags, folder)` of a run of seconds."""
    scienceqa[1](train=make_rows(), test=make_rows(6).select(range(5)))
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "trained", logging_steps=1))
    return tiny_flags(
        tmp_path, scienceqa[0], tmp_path / "again", adapter=tmp_path / "trained", num_train_epochs=0
    ), tmp_path / "trained"


def test_saved_adapters_are_evaluated_as_they_were(trained, tmp_path, monkeypatch, caplog):
    flags, folder = trained
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(AnswerTrainer, "predict", lambda *_, **__: 1 / 0)
        train.main(flags)
    train.main(flags)
    assert "You are using a model of type" not in caplog.text
    assert len([*tmp_path.glob("again*")]) == 1, "an interrupted evaluation is replaced: it has trained nothing"
    assert read_predictions(tmp_path / "again") == read_predictions(folder)
    before, after = (json.loads((path / "results.json").read_text()) for path in (folder, tmp_path / "again"))
    assert before["scores"] == after["scores"] and before["adapter_sha256"] == after["adapter_sha256"]
    assert after["adapter"] == str(folder) and "train_seconds" not in after


def test_a_baseline_whose_evaluation_failed_is_evaluated_from_its_folder(scienceqa, tmp_path, monkeypatch):
    flags = {"method": "llava-lora", "image_size": 8, "lora_rank": 2}
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "whole", **flags))
    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "prediction_step", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError) as raised:
            train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "failed", **flags))
    with monkeypatch.context() as patch:
        patch.setattr(AnswerTrainer, "prediction_step", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt) as interrupted:
            train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "stopped", **flags))
    assert f"adapters are complete in {tmp_path / 'stopped'}" in interrupted.value.__notes__[0]
    adapter = {"adapter": tmp_path / "failed", "num_train_epochs": 0}
    assert f"give `--adapter {tmp_path / 'failed'} --num_train_epochs 0`" in raised.value.__notes__[0]
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "again", **flags, **adapter))
    assert read_predictions(tmp_path / "again") == read_predictions(tmp_path / "whole")
    for others, message in (
        ({"lora_rank": 4}, "was saved with `lora_rank=2`, but this model has `lora_rank=4`"),
        ({"lora_alpha": 32}, "was saved with `lora_alpha=16"),
        ({"image_size": 16}, "was saved with `image_size=8`"),
        ({"method": "dehvf"}, "has the baseline llava-lora. Give also `--method llava-lora`"),
    ):
        values = {**others, **adapter} if "method" in others else {**flags, **others, **adapter}
        with pytest.raises(ValueError, match=message):
            train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "other", **values))


def test_bases_that_were_known_by_their_folders_can_be_given_their_ids(trained, tmp_path):
    train.main([*trained[0], "--text_model_id", "org/text", "--text_model_revision", "0123abc"])
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["text_model_id"], config["text_model_revision"]) == ("org/text", "0123abc")
    assert config["vision_model_id"] == str(tmp_path / "vision")


def test_saved_adapters_are_evaluated_on_their_own_bases_unless_others_are_given(trained, tmp_path):
    """The recipe's bases are those of other adapters."""
    flags, folder = trained
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    shutil.move(tmp_path / "text", tmp_path / "moved")
    given = dict(zip(flags[::2], flags[1::2]))
    del given["--vision_model"], given["--text_model"]
    train.main([word for pair in {**given, "--adapter": tmp_path / "merged"}.items() for word in map(str, pair)])
    assert read_predictions(tmp_path / "again") == read_predictions(folder)
    with pytest.raises(OSError, match="text, which the adapter needs"):
        train.main([word for pair in given.items() for word in pair])


def test_results_record_how_they_were_made(trained):
    results = json.loads((trained[1] / "results.json").read_text())
    assert (
        {"NAT", "average", "unparsed", "count"} <= results["scores"].keys() == results["scores_by_likelihood"].keys()
    )
    known = "method task split size template decoding seed versions adapter_sha256 vision_model text_model".split()
    assert all(results[name] is not None for name in known)
    assert {"data_path", "adapter_revision", "vision_model_revision", "text_model_revision"} <= results.keys()
    assert results["method"] == "dehvf" and results["shortened_prompts"] == {"train": 0, "test": 0}


@pytest.mark.parametrize(
    "changed, split",
    [
        ({"size": 4241}, "test"),
        ({"size": 4241, "data_path": None}, "test"),
        ({"task": "vqav2", "size": 214_354}, "validation"),
        ({"task": "vqa", "data_path": "org/data"}, "test"),
        ({}, None),
        ({"task": "vqav2", "size": 214_355}, None),
        ({"size": 4241, "max_samples": 5}, None),
        ({"task": "vqa", "data_path": "org/data", "only_images": True}, None),
        ({"task": "vqa", "data_path": "org/data", "holdout": 0.1}, None),
        ({"task": "digits", "max_samples": 5}, "test"),
        ({"task": "easy_vqa", "size": 9673, "data_path": None}, "test"),
        ({"task": "easy_vqa", "size": 5, "data_path": None, "max_samples": 5}, None),
    ],
    ids=[
        *("its published rows in a folder", "from the Hub", "vqav2", "a data set on the Hub", "other rows"),
        *("more rows than on the Hub", "its first rows", "images only", "rows of the train split", "made at run time"),
        *("all rows of a wheel", "its first rows of a wheel"),
    ],
)
def test_the_card_claims_a_result_on_a_published_split_only_for_all_its_rows(trained, changed, split):
    results = json.loads((trained[1] / "results.json").read_text())
    assert [results[name] for name in ("max_samples", "only_images", "max_prompt_length")] == [None, False, 512]
    write_card(trained[1], "name", {**results, **changed}, None)
    found = ModelCard.load(trained[1] / "README.md").data.eval_results
    assert [result.dataset_split for result in found or ()] == ([split] if split else [])
    is_published = split is not None and changed.get("task") not in ("digits", "easy_vqa")  # these are not on the Hub
    assert [path.stem for path in trained[1].glob(".eval_results/*")] == (
        [changed.get("task", "scienceqa")] if is_published else []
    )


def test_the_most_likely_option_is_that_of_the_models_logits(trained):
    flags, folder = trained
    arguments = DataArguments(task="scienceqa", data_path=flags[flags.index("--data_path") + 1])
    processor = tiny_processor()
    split = Split(get_task("scienceqa"), "test", processor, arguments, training=False)
    model = AutoModelForImageTextToText.from_pretrained(folder, trust_remote_code=True)
    for row, record in zip(split, read_predictions(folder), strict=True):
        batch = Collator(processor)([row])
        options = batch.pop("options")[0]
        del batch["index"]
        logits = model(**batch).logits[0, -1, options]
        assert record["choice"] == int(logits.argmax()) and logits[0] != logits[1]


def test_the_example_is_the_prompt_that_was_evaluated_and_if_possible_of_one_turn(tmp_path):
    system, question = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is it?"}
    answer, other = {"role": "assistant", "content": "A hen."}, {"role": "user", "content": "And its colour?"}
    chats = [[system, question, answer, other, answer], [question, answer]]
    Image.new("RGB", (9, 9), "red").save(tmp_path / "a.png")
    for chosen, expected in ((chats[:1], 0), (chats, 1)):
        rows = (json.dumps({"messages": messages, "image": "a.png"}) + "\n" for messages in chosen)
        (tmp_path / "test.jsonl").write_text("".join(rows))
        processor = tiny_processor()
        split = make_split(tmp_path, "test", False, "chat", processor)
        assert write_example(tmp_path, get_task("chat"), processor, split)
        example = processor(text=(tmp_path / "example.txt").read_text())["input_ids"][0]
        assert list(example) == list(split.encoded[expected]["input_ids"])
        (tmp_path / "example.png").unlink()


def test_a_fuser_that_is_not_used_does_not_name_the_method():
    config = tiny_config(fuser_query="instruction")
    assert method_of(config, "dehvf") == "dehvf-instruction"
    config.layer_fusion = "mean"
    assert method_of(config, "dehvf") == "dehvf"


def test_a_setting_and_its_image_size_are_those_of_the_adapters(scienceqa, tmp_path):
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "memvp", method="memvp", image_size=8))
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "again", adapter=tmp_path / "memvp", num_train_epochs=0))
    assert json.loads((tmp_path / "again" / "results.json").read_text())["method"] == "memvp"
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["image_size"], config["vision_config"]["image_size"]) == (8, IMAGE_SIZE)


def test_a_baseline_and_its_processor_take_the_image_size(scienceqa, tmp_path):
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output", method="adem-vl", image_size=8))
    assert json.loads((tmp_path / "output" / "config.json").read_text())["image_size"] == 8
    pixel_values = DehvfProcessor.from_pretrained(tmp_path / "output")(Image.new("RGB", (9, 9)))["pixel_values"]
    assert pixel_values.shape[2:] == (8, 8)


def test_the_best_checkpoint_is_that_of_the_tasks_score(scienceqa, tmp_path):
    flags = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "best", **flags))
    state = json.loads(next((tmp_path / "best").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["best_metric"] is not None and "eval_average" in state["log_history"][-1]


def test_a_run_resumes_from_the_given_checkpoint(scienceqa, tmp_path):
    flags = {"save_strategy": "epoch", "num_train_epochs": 2, "logging_steps": 1}
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "whole", **flags))
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed")
    first = tmp_path / "resumed" / "checkpoint-3"
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "resumed", resume_from_checkpoint=first, **flags))
    whole, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_a_scorer_that_lacks_something_is_asked_before_all_else(scienceqa, tmp_path, monkeypatch):
    def lack():
        raise RuntimeError("no scorer")

    monkeypatch.setattr(get_task("scienceqa"), "check_scorer", lack, raising=False)
    monkeypatch.setattr(train, "load_processor", lambda *_: pytest.fail("too late"))
    with pytest.raises(RuntimeError, match="no scorer"):
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output"))


def test_answers_are_kept_when_scoring_fails_and_can_be_scored_alone(trained, tmp_path, monkeypatch):
    flags, folder = trained
    with monkeypatch.context() as patch:
        patch.setattr(get_task("scienceqa"), "score", lambda records, size: 1 / 0)
        with pytest.raises(ZeroDivisionError) as error:
            train.main(flags)
    assert f"run `python -m tasks score {tmp_path / 'again'}`" in error.value.__notes__[0]
    assert "scores" not in json.loads((tmp_path / "again" / "results.json").read_text())
    scored = score_folder(tmp_path / "again")
    assert scored["scores"] == json.loads((folder / "results.json").read_text())["scores"]


@pytest.mark.parametrize("name", ["predictions.jsonl", "results.json.tmp"])
def test_answers_are_kept_when_the_disk_is_full(trained, tmp_path, monkeypatch, name):
    flags, folder = trained
    write = Path.write_text

    def fail(self, text, *args, **kwargs):
        if self == tmp_path / "again" / name:
            write(self, text[:9])
            raise OSError(28, "No space left on device")
        return write(self, text, *args, **kwargs)

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with (
        monkeypatch.context() as patch,
        pytest.raises(OSError, match="again could not be written: .*No space") as error,
    ):
        patch.setattr(Path, "write_text", fail)
        train.main(flags)
    saved = re.search(r"`python -m tasks score (\S+)`", str(error.value))[1]
    assert score_folder(saved)["scores"] == json.loads((folder / "results.json").read_text())["scores"]
    assert not (tmp_path / "again" / "predictions.jsonl").exists(), "half of it"
    assert "The adapters are complete" in error.value.__notes__[0]


@pytest.mark.slow
@pytest.mark.extended  # test_distributed.py compares losses and adapters
def test_two_processes_give_the_result_of_one(trained, tmp_path):
    flags, folder = trained
    # Not `accelerate launch`, which starts several processes on CPUs for DeepSpeed alone
    printed = run("torchrun", "--nproc_per_node", 2, "train.py", *flags)
    assert printed.count(", processes: 2") == 1
    assert read_predictions(tmp_path / "again") == read_predictions(folder)
    one, two = (json.loads((path / "results.json").read_text()) for path in (folder, tmp_path / "again"))
    assert two["size"] == two["scores"]["count"] == 5
    for name in ("scores", "scores_by_likelihood"):
        assert one[name] == two[name]
