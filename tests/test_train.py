"""The training script: its arguments, what it makes of rows, and whole runs in processes of their own."""

import json

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from tiny import DEHVF_SIZES, DehvfConfig, run, save_tiny_bases, tiny_processor

import train
from tasks import get_task


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
    arguments = train.DataArguments(task="scienceqa", data_path=str(folder), **values)
    return train.Split(get_task("scienceqa"), split, tiny_processor(), arguments, training)


# --- arguments ---


def test_flags_override_the_recipe_and_the_recipe_the_defaults():
    recipe, data, model, adapter, training = train.parse_arguments(
        ["recipes/digits.yaml", "--num_groups", "2", "--visual_prompts", "none", "--output_dir", "x"]
    )
    assert (recipe.name, data.task, model.vision_model) == ("digits.yaml", "digits", "assets/vision_model")
    assert (adapter.num_groups, adapter.visual_prompts, training.output_dir) == (2, "none", "x")
    assert adapter.fuser_hidden_size == DehvfConfig().fuser_hidden_size


def test_no_recipe_means_digits():
    assert train.parse_arguments([])[0] == train.DEFAULT_RECIPE
    assert train.parse_arguments(["--seed", "7"])[4].seed == 7


@pytest.mark.parametrize("recipe", train.recipes(), ids=lambda path: path.stem)
def test_every_recipe_parses(recipe):
    _, data, model, adapter, training = train.parse_arguments([str(recipe)])
    assert training.output_dir == f"outputs/{recipe.stem}"


def test_a_typo_in_a_recipe_ends_the_run(tmp_path):
    (tmp_path / "a.yaml").write_text("num_gruops: 4\n")
    with pytest.raises(ValueError, match="unknown key `num_gruops`. Did you mean `num_groups`"):
        train.parse_arguments([str(tmp_path / "a.yaml")])


def test_a_typo_in_a_flag_ends_the_run():
    with pytest.raises(ValueError, match="--num_gruops"):
        train.parse_arguments(["--num_gruops", "4"])


@pytest.mark.parametrize("flags", [["--layer_fusion", "median"], ["--task", "nothing"], ["--num_groups", "many"]])
def test_a_bad_choice_ends_the_run(flags, capsys):
    with pytest.raises(SystemExit):
        train.parse_arguments(flags)
    assert flags[0] in capsys.readouterr().err


def test_a_missing_recipe_lists_those_that_are_there():
    with pytest.raises(ValueError, match="There is no recipe recipes/digit.yaml.*digits.yaml"):
        train.parse_arguments(["recipes/digit.yaml"])


def test_a_rate_in_scientific_notation_is_a_number(tmp_path):
    (tmp_path / "a.yaml").write_text("learning_rate: 2e-2\noutput_dir: x\n")
    assert train.parse_arguments([str(tmp_path / "a.yaml")])[4].learning_rate == 0.02


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


def test_training_and_evaluation_see_the_same_prompt(scienceqa):
    trained, evaluated = make_split(scienceqa[0])[0], make_split(scienceqa[0], training=False)[0]
    length = len(evaluated["input_ids"])
    assert trained["input_ids"][:length] == evaluated["input_ids"]


def test_a_batch_is_padded_on_the_left_and_marks_images(scienceqa):
    split = make_split(scienceqa[0])
    rows = [split[0], split[1]]
    rows[0] = {**rows[0], "input_ids": rows[0]["input_ids"][:-3], "labels": rows[0]["labels"][:-3]}
    batch = train.Collator(tiny_processor())(rows)
    assert batch["image_mask"].tolist() == [False, True]
    assert batch["attention_mask"][0, :3].tolist() == [0, 0, 0] and batch["labels"][0, :3].tolist() == [-100] * 3
    assert batch["input_ids"].shape == batch["labels"].shape
    assert "pixel_values" not in train.Collator(tiny_processor())([split[0], split[2]])


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
    loader = torch.utils.data.DataLoader(
        split, batch_size=2, collate_fn=train.Collator(tiny_processor()), num_workers=1
    )
    assert len(list(loader)) == 3
    assert split.num_unreadable == 2, "workers count too"


def test_an_unreadable_image_fails_in_evaluation_with_its_row(scienceqa):
    folder, save = scienceqa
    save(test=break_images(make_rows(), [3]))
    with pytest.raises(ValueError, match="image in row 3 of the test split"):
        make_split(folder, "test", training=False)[3]


def test_an_empty_split_is_refused(scienceqa, monkeypatch):
    monkeypatch.setattr(get_task("scienceqa"), "load", lambda split, path: make_rows().select([]))
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
    with pytest.raises(ValueError, match="no task `cifar`. There are: digits"):
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
    assert "Response:" in run("python", "-c", code), "the lines of Python that a run ends with work"
    card = (output / "README.md").read_text()
    assert code.strip() in card and "pipeline_tag: image-text-to-text" in card


@pytest.mark.slow
def test_help_lists_every_argument():
    printed = launch("--help")
    assert "--visual_prompts" in printed and "--base_learning_rate" in printed
