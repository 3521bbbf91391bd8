"""The training script: its arguments, what it makes of rows, and whole runs in processes of their own."""

import itertools
import json
import multiprocessing
import shutil

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import DEHVF_SIZES, DehvfConfig, run, save_tiny_bases, tiny_processor
from transformers import AutoModelForImageTextToText

import train
from tasks import get_task, score_folder
from training.arguments import DEFAULT_RECIPE, DataArguments, parse_arguments, recipes
from training.data import Collator, Split, StreamedSplit, read_image


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
def scienceqa(tmp_path):
    """A stand-in for the Hub's ScienceQA: `(folder, save)`, where `save(train=rows, test=rows)` writes splits."""

    def save(**splits):
        datasets.DatasetDict(splits).save_to_disk(str(tmp_path / "data"))

    save(train=make_rows(), validation=make_rows(2), test=make_rows(4))
    return tmp_path / "data", save


def make_split(folder, split="train", training=True, **values):
    arguments = DataArguments(task="scienceqa", data_path=str(folder), **values)
    return Split(get_task("scienceqa"), split, tiny_processor(), arguments, training)


# --- arguments ---


def test_flags_override_the_recipe_and_the_recipe_the_defaults():
    recipe, data, model, adapter, _, training = parse_arguments(
        ["recipes/digits.yaml", "--num_groups", "2", "--visual_prompts", "none", "--output_dir", "x"]
    )
    assert (recipe.name, data.task, model.vision_model) == ("digits.yaml", "digits", "assets/vision_model")
    assert (adapter.num_groups, adapter.visual_prompts, training.output_dir) == (2, "none", "x")
    assert adapter.fuser_hidden_size == DehvfConfig().fuser_hidden_size


def test_no_recipe_means_digits():
    assert parse_arguments([])[0] == DEFAULT_RECIPE
    assert parse_arguments(["--seed", "7"])[-1].seed == 7


@pytest.mark.parametrize("recipe", recipes(), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    training = parse_arguments([str(recipe)])[-1]
    assert training.output_dir == f"outputs/{recipe.stem}"


def test_a_typo_in_a_recipe_ends_the_run(tmp_path):
    (tmp_path / "a.yaml").write_text("num_gruops: 4\n")
    with pytest.raises(ValueError, match="unknown key `num_gruops`. Did you mean `num_groups`"):
        parse_arguments([str(tmp_path / "a.yaml")])


def test_a_typo_in_a_flag_ends_the_run():
    with pytest.raises(ValueError, match="--num_gruops"):
        parse_arguments(["--num_gruops", "4"])


@pytest.mark.parametrize("flags", [["--layer_fusion", "median"], ["--task", "nothing"], ["--num_groups", "many"]])
def test_a_bad_choice_ends_the_run(flags, capsys):
    with pytest.raises(SystemExit):
        parse_arguments(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_missing_recipe_lists_those_that_are_there():
    with pytest.raises(ValueError, match="There is no recipe recipes/digit.yaml.*digits.yaml"):
        parse_arguments(["recipes/digit.yaml"])


def test_a_rate_in_scientific_notation_is_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-2\noutput_dir: x\n")
    assert parse_arguments([str(tmp_path / "a.yaml")])[-1].learning_rate == 0.02


def test_a_recipe_changes_its_base(tmp_path):
    (tmp_path / "base.yaml").write_text("num_groups: 2\nseed: 5\noutput_dir: x\n")
    (tmp_path / "row.yaml").write_text("base: base.yaml\nnum_groups: 8\n")
    _, _, _, adapter, _, training = parse_arguments([str(tmp_path / "row.yaml")])
    assert (adapter.num_groups, training.seed, training.output_dir) == (8, 5, "x")


def test_a_rate_given_as_a_flag_overrides_the_recipes_rate_per_256():
    training = parse_arguments(["recipes/scienceqa-llama7b.yaml", "--learning_rate", "1e-4"])[-1]
    assert (training.learning_rate, training.base_learning_rate) == (1e-4, None)


def test_a_method_sets_its_switch_and_refuses_another():
    adapter = parse_arguments(["--method", "memvp"])[3]
    assert (adapter.layer_fusion, adapter.fuser_query) == ("penultimate", "network")
    assert parse_arguments(["--method", "layer+instruction"])[3].fuser_query == "layer+instruction"
    with pytest.raises(ValueError, match="`--method memvp` means `--layer_fusion penultimate`, but `mean` was given"):
        parse_arguments(["--method", "memvp", "--layer_fusion", "mean"])


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--streaming", "true"], "needs `--max_steps`"),
        (["--adapter", "x", "--method", "lavin"], "`--method lavin` was given beside it"),
        (["--adapter", "x", "--visual_prompts", "none"], "`--visual_prompts` was given beside it"),
        (["--learning_rate", "1", "--base_learning_rate", "1"], "Leave one of them out"),
    ],
)
def test_flags_that_cannot_hold_together_are_refused(flags, message):
    with pytest.raises(ValueError, match=message):
        train.main(flags)


# --- rows ---


def test_the_loss_is_on_the_answer_and_the_end_alone(scienceqa):
    split = make_split(scienceqa[0])
    row = split[1]
    decode = tiny_processor().tokenizer.decode
    answer = [token for token, label in zip(row["input_ids"], row["labels"]) if label != -100]
    assert decode(answer) == " The answer is B.</s>".replace("T", decode(answer)[1])
    assert [label for label in row["labels"] if label != -100] == answer
    prompt = decode(row["input_ids"][: -len(answer)])
    assert prompt.startswith("<s>") and prompt.endswith("Response:")


def test_an_evaluated_row_ends_where_the_answer_is_due(scienceqa):
    row = make_split(scienceqa[0], "test", training=False)[1]
    assert tiny_processor().tokenizer.decode(row["input_ids"]).endswith("answer is")
    assert "labels" not in row


def test_likelihood_compares_the_letters_tokens(scienceqa):
    split = make_split(scienceqa[0], "test", training=False)
    assert tiny_processor().tokenizer.convert_ids_to_tokens(split[0]["options"]) == [" A", " B"]


def test_options_that_begin_alike_are_refused(scienceqa, monkeypatch):
    monkeypatch.setattr(get_task("scienceqa"), "options", lambda row: ["one", "on"])
    with pytest.raises(ValueError, match="Row 0 of the test split has options that begin with the same token"):
        make_split(scienceqa[0], "test", training=False)


def test_training_and_evaluation_see_the_same_prompt(scienceqa):
    trained, evaluated = make_split(scienceqa[0])[0], make_split(scienceqa[0], training=False)[0]
    length = len(evaluated["input_ids"])
    assert trained["input_ids"][:length] == evaluated["input_ids"]


def test_a_batch_is_padded_on_the_left_and_marks_images(scienceqa):
    split = make_split(scienceqa[0])
    rows = [split[0], split[1]]
    rows[0] = {**rows[0], "input_ids": rows[0]["input_ids"][:-3], "labels": rows[0]["labels"][:-3]}
    batch = Collator(tiny_processor())(rows)
    assert batch["image_mask"].tolist() == [False, True]
    assert batch["attention_mask"][0, :3].tolist() == [0, 0, 0] and batch["labels"][0, :3].tolist() == [-100] * 3
    assert batch["input_ids"].shape == batch["labels"].shape and batch["index"].tolist() == [0, 1]
    assert "pixel_values" not in Collator(tiny_processor())([split[0], split[2]])


@pytest.mark.parametrize("training", [True, False])
def test_the_instruction_is_the_prompt_without_the_answer_and_its_prefix(scienceqa, training):
    split = make_split(scienceqa[0], "test", training=training)
    row = split[1]
    batch = Collator(tiny_processor(), instruction_mask=True)([row, {**row, "input_ids": [1, *row["input_ids"]]}])
    read = batch["input_ids"][0][batch["instruction_mask"][0].bool()]
    assert tiny_processor().tokenizer.decode(read).endswith("Response:")
    assert batch["instruction_mask"][0, 0] == 0, "padding"


def test_image_tokens_follow_the_first_token_of_rows_with_an_image(scienceqa):
    rows = [make_split(scienceqa[0])[index] for index in (0, 1)]
    batch = Collator(tiny_processor(), image_tokens=[99, 99])(rows)
    assert batch["input_ids"][1, :3].tolist() == [rows[1]["input_ids"][0], 99, 99]
    assert 99 not in batch["input_ids"][0] and batch["labels"].shape == batch["input_ids"].shape
    assert batch["labels"][1][batch["labels"][1] != -100].tolist() == [x for x in rows[1]["labels"] if x != -100]


def test_a_long_prompt_loses_context_and_nothing_else(scienceqa):
    folder, save = scienceqa
    save(train=make_rows(hint="a hint that goes on and on for far too long"))
    whole = make_split(folder)
    length = whole[0]["labels"].count(-100)
    shortened = make_split(folder, max_prompt_length=length - 10)
    assert (whole.num_shortened, shortened.num_shortened) == (0, 6)
    assert shortened[0]["labels"].count(-100) == length - 10
    decode = tiny_processor().tokenizer.decode
    assert decode(shortened[0]["input_ids"]) == decode(whole[0]["input_ids"]).replace("r too long", "")


def test_a_prompt_that_is_too_long_without_context_is_refused(scienceqa):
    with pytest.raises(ValueError, match="Row 0 of the train split.*`max_prompt_length=10`.*never cut"):
        make_split(scienceqa[0], max_prompt_length=10)


def break_images(rows, broken):
    """Replaces the bytes of some images by something that is no image."""
    undecoded = rows.cast_column("image", datasets.Image(decode=False))
    images = [
        {"bytes": b"no image", "path": None} if index in broken else row["image"]
        for index, row in enumerate(undecoded)
    ]
    features = undecoded.features
    return undecoded.remove_columns("image").add_column("image", images, feature=features["image"])


def test_an_unreadable_image_is_skipped_and_counted_in_training(scienceqa):
    folder, save = scienceqa
    save(train=break_images(make_rows(), [3]))
    split = make_split(folder)
    assert split[3]["index"] == 4
    assert split.num_unreadable == 1
    loader = torch.utils.data.DataLoader(split, batch_size=2, collate_fn=Collator(tiny_processor()), num_workers=1)
    assert len(list(loader)) == 3
    assert split.num_unreadable == 2, "workers count too"


def test_unreadable_images_are_named_before_training_where_they_will_be_evaluated(scienceqa):
    folder, save = scienceqa
    save(test=break_images(make_rows(), [3, 5]))
    with pytest.raises(ValueError, match="2 images of the test split cannot be read: row 3: .*; row 5: "):
        make_split(folder, "test", training=False)


def test_images_are_the_right_way_up(tmp_path):
    image, exif = Image.new("L", (40, 20)), Image.Exif()
    exif[0x0112] = 6  # a camera that was held upright
    image.save(tmp_path / "a.jpg", exif=exif)
    read = read_image({"path": str(tmp_path / "a.jpg"), "bytes": None})
    assert (read.size, read.mode) == ((20, 40), "RGB")


def test_rows_without_an_image_can_be_left_out_of_training(scienceqa):
    split = make_split(scienceqa[0], only_images=True)
    assert len(split) == 3 and all(row["image"] is not None for row in split)
    assert len(make_split(scienceqa[0], "test", training=False, only_images=True)) == 4


def test_workers_need_not_be_forked(scienceqa, monkeypatch):
    """As on macOS, and on Linux from Python 3.14 on."""
    spawn = multiprocessing.get_context("spawn")
    monkeypatch.setattr(multiprocessing, "Value", spawn.Value)
    arguments = DataArguments(task="scienceqa", data_path=str(scienceqa[0]), streaming=True)
    split = StreamedSplit(get_task("scienceqa"), "train", tiny_processor(), arguments, None)
    collate = Collator(tiny_processor())
    loader = torch.utils.data.DataLoader(
        split, batch_size=2, collate_fn=collate, num_workers=1, multiprocessing_context=spawn
    )
    assert len(list(itertools.islice(loader, 3))) == 3


def test_a_missing_image_is_named_before_training_where_it_will_be_evaluated(tmp_path):
    rows = [{"question": "why", "answer": "so", "image": "lost.png"}, {"question": "why", "answer": "so"}]
    for split in ("train", "test"):
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = DataArguments(task="vqa", data_path=str(tmp_path))
    trained = Split(get_task("vqa"), "train", tiny_processor(), arguments, training=True)
    assert trained[0]["index"] == 1 and trained.num_unreadable == 1
    with pytest.raises(ValueError, match="1 images of the test split cannot be read: row 0: .*lost.png"):
        Split(get_task("vqa"), "test", tiny_processor(), arguments, training=False)


def test_an_empty_split_is_refused(scienceqa, monkeypatch):
    monkeypatch.setattr(get_task("scienceqa"), "load", lambda *_, **__: make_rows().select([]))
    with pytest.raises(ValueError, match="train split of `scienceqa` is empty"):
        make_split(scienceqa[0])


def test_a_missing_column_is_refused(scienceqa):
    folder, save = scienceqa
    save(train=make_rows().remove_columns("hint"))
    with pytest.raises(ValueError, match=r"lacks the columns \['hint'\]"):
        make_split(folder)


def test_a_row_without_an_answer_is_refused(scienceqa, monkeypatch):
    monkeypatch.setattr(get_task("scienceqa"), "answer", lambda row: "")
    with pytest.raises(ValueError, match="Row 0 of the train split has no answer to learn"):
        make_split(scienceqa[0])


def test_an_unknown_task_is_refused():
    with pytest.raises(ValueError, match="no task `cifar`. There are: .*digits"):
        get_task("cifar")


# --- whole runs ---


def launch(*arguments, launcher=()) -> str:
    return run("accelerate", "launch", *launcher, "train.py", *arguments)


TINY_ADAPTERS = [word for name, value in DEHVF_SIZES.items() for word in (f"--{name}", value)]
TWO_PROCESSES = ("--num_processes", "2", "--use_deepspeed")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, flags",
    [((), ()), ((), ("--deepspeed", "ds_config.json")), (TWO_PROCESSES, ("--deepspeed", "ds_config.json"))],
    ids=["one process", "ZeRO-2 on one", "ZeRO-2 on two"],
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


@pytest.mark.slow
def test_help_lists_every_argument():
    printed = launch("--help")
    assert "--visual_prompts" in printed and "--base_learning_rate" in printed


def tiny_flags(tmp_path, scienceqa_folder, output, **flags) -> list[str]:
    """A run of seconds; `flags` change it."""
    vision, text = tmp_path / "vision", tmp_path / "text"
    if not vision.exists():
        save_tiny_bases(tmp_path, max_position_embeddings=512)
    values = {
        **{"task": "scienceqa", "data_path": scienceqa_folder, "vision_model": vision, "text_model": text},
        **{"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2, "num_train_epochs": 1},
        **({} if "adapter" in flags else DEHVF_SIZES),
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


@pytest.fixture
def trained(scienceqa, tmp_path):
    """`(flags, folder)` of a run of seconds."""
    scienceqa[1](train=make_rows(), test=make_rows(6).select(range(5)))
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "trained", logging_steps=1))
    return tiny_flags(
        tmp_path, scienceqa[0], tmp_path / "again", adapter=tmp_path / "trained", num_train_epochs=0
    ), tmp_path / "trained"


def test_saved_adapters_are_evaluated_as_they_were(trained, tmp_path):
    flags, folder = trained
    train.main(flags)
    assert read_predictions(tmp_path / "again") == read_predictions(folder)
    before, after = (json.loads((path / "results.json").read_text()) for path in (folder, tmp_path / "again"))
    assert before["scores"] == after["scores"] and before["adapter_sha256"] == after["adapter_sha256"]
    assert after["adapter"] == str(folder) and "train_seconds" not in after


def test_bases_that_were_known_by_their_folders_can_be_given_their_ids(trained, tmp_path):
    train.main([*trained[0], "--text_model_id", "org/text", "--text_model_revision", "0123abc"])
    config = json.loads((tmp_path / "again" / "config.json").read_text())
    assert (config["text_model_id"], config["text_model_revision"]) == ("org/text", "0123abc")
    assert config["vision_model_id"] == str(tmp_path / "vision")


@pytest.mark.parametrize("flag", ["--adapter", "--text_model"])
def test_a_misspelt_folder_is_named(trained, flag, monkeypatch):
    flags = trained[0] if flag == "--adapter" else trained[0][: trained[0].index("--adapter")]
    with pytest.raises(OSError, match="could be loaded from .*a misspelt folder"):
        train.main([*flags, flag, "a misspelt folder"])


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
    with pytest.raises(OSError, match="text, which the adapters need"):
        train.main([word for pair in given.items() for word in pair])


def test_a_result_tells_how_it_was_made(trained):
    results = json.loads((trained[1] / "results.json").read_text())
    assert (
        {"NAT", "average", "unparsed", "count"} <= results["scores"].keys() == results["scores_by_likelihood"].keys()
    )
    known = "method task split size template decoding seed versions adapter_sha256 vision_model text_model".split()
    assert all(results[name] is not None for name in known)
    assert {"data_path", "adapter_revision", "vision_model_revision", "text_model_revision"} <= results.keys()
    assert results["method"] == "dehvf" and results["shortened_prompts"] == {"train": 0, "test": 0}


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


def test_a_setting_is_named_by_what_its_adapters_are(scienceqa, tmp_path):
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "memvp", method="memvp"))
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "again", adapter=tmp_path / "memvp", num_train_epochs=0))
    assert json.loads((tmp_path / "again" / "results.json").read_text())["method"] == "memvp"


def test_the_best_checkpoint_is_that_of_the_tasks_score(scienceqa, tmp_path):
    flags = {"eval_strategy": "epoch", "save_strategy": "epoch", "load_best_model_at_end": True}
    train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "best", **flags))
    state = json.loads(next((tmp_path / "best").glob("checkpoint-*/trainer_state.json")).read_text())
    assert state["best_metric"] is not None and "eval_average" in state["log_history"][-1]


def test_a_run_goes_on_from_the_checkpoint_that_is_named(scienceqa, tmp_path):
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
    monkeypatch.setattr(train, "load", lambda *_: pytest.fail("too late"))
    with pytest.raises(RuntimeError, match="no scorer"):
        train.main(tiny_flags(tmp_path, scienceqa[0], tmp_path / "output"))


def test_answers_are_kept_when_scoring_fails_and_can_be_scored_alone(trained, tmp_path, monkeypatch):
    flags, folder = trained
    with monkeypatch.context() as patch:
        patch.setattr(get_task("scienceqa"), "score", lambda records, size: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(flags)
    assert "scores" not in json.loads((tmp_path / "again" / "results.json").read_text())
    scored = score_folder(tmp_path / "again")
    assert scored["scores"] == json.loads((folder / "results.json").read_text())["scores"]


@pytest.mark.slow
def test_two_processes_give_the_result_of_one(trained, tmp_path):
    flags, folder = trained
    # Not `accelerate launch`, which starts several processes on CPUs for DeepSpeed alone
    printed = run("torchrun", "--nproc_per_node", 2, "train.py", *flags)
    assert printed.count(", 2 processes") == 1
    assert read_predictions(tmp_path / "again") == read_predictions(folder)
    one, two = (json.loads((path / "results.json").read_text()) for path in (folder, tmp_path / "again"))
    assert two["size"] == two["scores"]["count"] == 5
    for name in ("scores", "scores_by_likelihood"):
        assert one[name] == two[name]
