"""Tasks: where rows come from, what is asked, how answers are scored, and the two commands of `python -m tasks`."""

import hashlib
import io
import itertools
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from datetime import datetime
from importlib import import_module
from pathlib import Path
from zipfile import ZipFile

import numpy as np
import pytest
from datasets import Dataset, DatasetDict, Image, IterableDataset, List, Value
from PIL import Image as PILImage
from tiny import ROOT, run

from tasks import (
    NAMES,
    coco_captions,
    digits,
    easy_vqa,
    easy_vqa_pairs,
    get_task,
    nlvr2,
    scienceqa,
    score_folder,
    vqa,
    vqav2,
)
from tasks.__main__ import check, main
from training.data import read_image


SCIENCEQA_COLUMNS = (
    "image question choices answer hint task grade subject topic category skill lecture solution".split()
)


@pytest.fixture(scope="module")
def rows():
    return {split: digits.load(split, max_samples=1000) for split in ("train", "validation", "test")}


def undecoded(rows):
    return list(rows.cast_column("image", Image(decode=False)))


def has_image(rows):
    return [row["image"] is not None for row in undecoded(rows)]


def write_image(file, colour="red"):
    file.parent.mkdir(parents=True, exist_ok=True)
    PILImage.new("RGB", (8, 8), colour).save(file)


def image_bytes(colour):
    file = io.BytesIO()
    PILImage.new("RGB", (8, 8), colour).save(file, "PNG")
    return file.getvalue()


def write_lines(file, rows):
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def make_records(task, rows, predictions, choices=None):
    """What `train.py` writes into predictions.jsonl."""
    records = []
    for index, (row, prediction) in enumerate(zip(undecoded(rows), predictions)):
        image = row.pop("image")
        facts = {"prediction": prediction, "expected": task.answer(row), "has_image": image is not None}
        records.append({"index": index, **facts, **row} | ({"choice": choices[index]} if choices else {}))
    return records


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_the_interface(name):
    task = get_task(name)
    for attribute in "COLUMNS ANSWER_PREFIX MAX_NEW_TOKENS CARD load context prompt answer options score".split():
        assert hasattr(task, attribute), attribute


# --- digits ---


def test_digits_has_the_columns_of_scienceqa(rows):
    row = next(row for row in rows["train"] if row["image"] is not None)
    assert list(row) == SCIENCEQA_COLUMNS
    assert row["image"].size == (64, 64) and row["image"].mode == "RGB"
    assert len(row["choices"]) == 4 and row["answer"] in range(4)
    assert row["subject"] in ("natural science", "social science", "language science")
    assert row["grade"].startswith("grade")


def test_splits_of_digits_share_no_scan():
    seen = {split: [scan.tobytes() for pool in digits.scans(split) for scan in pool] for split in digits.SCANS}
    everything = sum(seen.values(), [])
    assert len(everything) == 1797
    # Some people write alike: the collection itself has no two equal scans, so equality means the same scan
    assert len(set(everything)) == len(everything)


def test_digits_is_the_same_every_time():
    left, right = digits.load("test", max_samples=50), digits.load("test", max_samples=50)
    assert left.data.table == right.data.table
    assert digits.load("test", seed=1, max_samples=50).data.table != left.data.table
    streamed = digits.load("test", streaming=True, max_samples=50)
    assert isinstance(streamed, IterableDataset) and undecoded(streamed) == undecoded(left)


def test_digits_has_no_more_rows_than_its_split():
    assert len(digits.load("validation", max_samples=501)) == 500


def test_half_of_digits_is_text_and_the_rest_needs_the_image(rows):
    images = np.array(has_image(rows["train"]))
    assert 0.4 < images.mean() < 0.6
    kinds = Counter(np.array(rows["train"]["skill"])[images])
    assert {"digit by colour", "colour by place", "count", "sum", "difference", "largest"} <= kinds.keys()
    hints = np.array([bool(hint) for hint in rows["train"]["hint"]])
    for with_image in (True, False):
        for with_hint in (True, False):
            assert ((images == with_image) & (hints == with_hint)).sum() > 20


def test_digits_orders_questions_by_difficulty():
    skills = [skill for skill in digits.load("train", max_samples=2000)["skill"] if skill in digits.PICTURE_SKILLS]
    assert {"digit present", "colour present", "place present"} == set(skills[:100])
    assert {"count", "sum", "place by digit"} <= set(skills[-300:])


def test_correct_letters_of_digits_are_balanced(rows):
    images = np.array(has_image(rows["train"]))
    counts = np.bincount(np.array(rows["train"]["answer"])[images], minlength=4) / images.sum()
    assert (abs(counts - 0.25) < 0.05).all()


def test_the_text_of_an_image_question_does_not_give_its_answer_away():
    """The best guess from question and options alone: the option that was right most often for this question."""
    train, test = digits.load("train", max_samples=3000), digits.load("test")

    def image_questions(rows):
        columns = rows.remove_columns("image")
        return [row for row, with_image in zip(columns, has_image(rows)) if with_image]

    right, offered = Counter(), Counter()
    for row in image_questions(train):
        for index, choice in enumerate(row["choices"]):
            offered[row["question"], choice] += 1
            right[row["question"], choice] += index == row["answer"]
    questions = image_questions(test)
    hits = 0
    for row in questions:
        odds = [right[row["question"], c] / max(offered[row["question"], c], 1) for c in row["choices"]]
        hits += int(np.argmax(odds)) == row["answer"]
    assert hits / len(questions) < 0.33


@pytest.mark.parametrize(
    "arguments", [{"split": "dev"}, {"split": "test", "max_samples": 0}, {"split": "test", "path": "x"}]
)
def test_digits_refuses_what_it_does_not_have(arguments):
    with pytest.raises(ValueError, match="dev|at least 1|run time"):
        digits.load(**arguments)


# --- ScienceQA ---


ROW = {"question": "Why?", "hint": "", "choices": ["so", "not so"], "answer": 1}


def test_prompt_and_answer_are_the_papers():
    assert scienceqa.prompt(ROW, "") == "Question: Why?\nContext: N/A\nOptions: (A) so (B) not so"
    assert scienceqa.prompt(ROW, "It rains.") == "Question: Why?\nContext: It rains.\nOptions: (A) so (B) not so"
    assert scienceqa.answer(ROW) == "The answer is B."
    assert scienceqa.options(ROW) == [" A", " B"]


@pytest.mark.parametrize(
    "facts, message",
    [
        *(({"answer": answer}, "`answer` is .*, 0 to 1. Rows .* hidden") for answer in (-1, 2, "B", None, 0.0, True)),
        *(({"choices": choices}, "`choices` has .* 2 to 26") for choices in ([], ["so"], ["so"] * 27)),
        *(({"choices": choices}, "`choices` is .* list of texts") for choices in (None, "so", [1, 2])),
        ({"question": None}, "no `question`"),
    ],
)
def test_a_row_of_scienceqa_without_a_right_choice_is_refused(facts, message):
    with pytest.raises(ValueError, match=message):
        scienceqa.answer({**ROW, **facts})


def scienceqa_problem(**facts):
    text = {name: name for name in "hint task subject topic category skill lecture solution".split()}
    return {**text, "question": "Why?", "choices": ["so", "not so"], "answer": 1, "grade": "grade3", **facts}


@pytest.fixture
def original(tmp_path):
    """ScienceQA as it was released: two test questions, one with an image, and one question to validate."""
    folder = tmp_path / "scienceqa"
    problems = {
        "7": scienceqa_problem(image="image.png", split="test"),
        "8": scienceqa_problem(image=None, split="val", question="When?"),
        "12": scienceqa_problem(image=None, split="test", answer=0),
    }
    write_image(folder / "images" / "test" / "7" / "image.png")
    for name in ("train", "val"):
        (folder / "images" / name).mkdir()
    (folder / "problems.json").write_text(json.dumps(problems))
    (folder / "pid_splits.json").write_text(json.dumps({"train": [], "val": ["8"], "test": ["12", "7"]}))
    return folder


def test_the_original_scienceqa_has_the_columns_of_the_hubs(original):
    rows = scienceqa.load("test", str(original))
    assert rows.features == digits.FEATURES and rows.column_names == SCIENCEQA_COLUMNS
    assert [row["answer"] for row in rows] == [0, 1]  # in the order of the split
    assert [row["image"] and row["image"].size for row in rows] == [None, (8, 8)]
    assert scienceqa.load("validation", str(original))["question"] == ["When?"]
    assert rows[1]["grade"] == "grade3" and rows[1]["hint"] == "hint"


@pytest.mark.parametrize("layout", ["original", "save_to_disk", "parquet"])
def test_every_layout_of_scienceqa_gives_the_same_rows_streamed_or_not(layout, original, tmp_path):
    expected = scienceqa.load("test", str(original))
    folder = original
    if layout == "save_to_disk":
        folder = tmp_path / "saved"
        DatasetDict(test=expected).save_to_disk(folder)
    if layout == "parquet":
        folder = tmp_path / "hub"
        (folder / "data").mkdir(parents=True)
        expected.to_parquet(folder / "data" / "test-00000-of-00001.parquet")
    whole, streamed = (scienceqa.load("test", str(folder), streaming=streaming) for streaming in (False, True))
    assert isinstance(whole, Dataset) and isinstance(streamed, IterableDataset)
    assert undecoded(whole) == undecoded(streamed) and has_image(whole) == [False, True]
    assert whole.features == streamed.features == digits.FEATURES
    texts = list(expected.remove_columns("image"))
    assert list(whole.remove_columns("image")) == list(streamed.remove_columns("image")) == texts


@pytest.mark.parametrize("missing", ["problems.json", "pid_splits.json", "images/test"])
def test_what_the_original_scienceqa_lacks_is_named(missing, original):
    path = original / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path} is missing.*images/\{{train,val,test\}}/<number>"):
        scienceqa.load("test", str(original))


def test_a_folder_of_another_kind_or_without_the_split_is_refused(original, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="empty has no data that this task reads.*save_to_disk"):
        scienceqa.load("test", str(tmp_path / "empty"))
    DatasetDict(test=scienceqa.load("test", str(original))).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="no split `train`. It has: test"):
        scienceqa.load("train", str(tmp_path / "saved"))


def test_captions_of_scienceqa_follow_the_hint_in_evaluation(original, tmp_path):
    """`get_context_text` of MemVP's util/base_prompt.py: hint and caption, one space between them; `N/A` for none."""
    problems = json.loads((original / "problems.json").read_text())
    problems["12"]["hint"] = ""
    (original / "images" / "train" / "13").mkdir()
    problems["13"] = scienceqa_problem(image=None, split="train")
    (original / "problems.json").write_text(json.dumps(problems))
    (original / "pid_splits.json").write_text(json.dumps({"train": ["13"], "val": ["8"], "test": ["12", "7"]}))
    file = tmp_path / "captions.json"
    file.write_text(json.dumps({"captions": {"7": "a red square", "13": "unread"}}))
    rows = scienceqa.load("test", str(original), captions=str(file))
    prompts = [scienceqa.prompt(row, scienceqa.context(row)).splitlines()[1] for row in rows.remove_columns("image")]
    assert prompts == ["Context: N/A", "Context: hint a red square"]
    assert rows["hint"] == ["", "hint"], "which the score reads"
    assert "caption" not in scienceqa.load("train", str(original), captions=str(file)).column_names
    with pytest.raises(ValueError, match="no caption for any of the 1 problems of the validation split.* number 8"):
        scienceqa.load("validation", str(original), captions=str(file))
    for text in ("no JSON", '{"7": "a red square"}', '{"captions": ["a"]}', '{"captions": {"7": 1}}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="captions.json has another form. Captions are a JSON file"):
            scienceqa.load("test", str(original), captions=str(file))
    with pytest.raises(FileNotFoundError, match="absent.json is missing.*Captions are a JSON file"):
        scienceqa.load("test", str(original), captions=str(tmp_path / "absent.json"))
    DatasetDict(test=rows).save_to_disk(tmp_path / "saved")
    with pytest.raises(ValueError, match="numbers of the problems, which .*saved does not have.*problems.json"):
        scienceqa.load("test", str(tmp_path / "saved"), captions=str(file))


@pytest.mark.parametrize("layout", ["original", "save_to_disk", "coco"])
def test_the_check_names_the_task_of_data_that_it_does_not_read(layout, original, tmp_path, capsys):
    folder, task = original, "coco_captions" if layout == "coco" else "scienceqa"
    if layout != "original":
        folder = tmp_path / "other"
        DatasetDict(test=scienceqa.load("test", str(original))).save_to_disk(folder)
    if layout == "coco":
        (folder / "dataset_coco.json").write_text("{}")
    with pytest.raises(ValueError, match=f"is data of `--task {task}`, which this command does not check"):
        check(str(folder))


def test_scienceqa_is_scored_by_what_its_records_say(original):
    records = make_records(scienceqa, scienceqa.load("test", str(original)), [" A", " A"])
    scores = scienceqa.score(records, 2)
    assert (scores["IMG"], scores["TXT"], scores["G1-6"], scores["average"]) == (0, 50, 50, 50)
    with pytest.raises(ValueError, match="2 predictions for a split of 3 rows"):
        scienceqa.score(records, 3)


# --- COCO Captions ---


def save_karpathy(folder):
    """Four images with two captions each, one for each of Karpathy's parts."""
    images = []
    for number, (part, images_of) in enumerate(
        [("train", "train2014"), ("restval", "val2014"), ("val", "val2014"), ("test", "val2014")]
    ):
        name = f"COCO_{images_of}_{number:012d}.jpg"
        write_image(folder / images_of / name)
        sentences = [{"raw": f"A {part}\nimage. "}, {"raw": f"Number {number}."}]
        sentences += [{"raw": " \n"}] if part == "train" else []
        images.append(
            {"filepath": images_of, "filename": name, "split": part, "sentences": sentences, "cocoid": number}
        )
    (folder / "dataset_coco.json").write_text(json.dumps({"images": images, "dataset": "coco"}))


@pytest.fixture
def coco(tmp_path):
    save_karpathy(tmp_path / "coco")
    return tmp_path / "coco"


def test_coco_trains_on_captions_and_evaluates_images(coco):
    train, validation, test = (coco_captions.load(split, str(coco)) for split in ("train", "validation", "test"))
    assert train["captions"] == [["A train image."], ["Number 0."], ["A restval image."], ["Number 1."]]
    assert train["image_id"] == [0, 0, 1, 1], "a blank caption is not learned"
    assert (validation["image_id"], validation["captions"]) == ([2], [["A val image.", "Number 2."]])
    assert (test["image_id"], test["captions"]) == ([3], [["A test image.", "Number 3."]])
    assert test[0]["image"].size == (8, 8)
    streamed = coco_captions.load("train", str(coco), streaming=True)
    assert isinstance(streamed, IterableDataset) and undecoded(streamed) == undecoded(train)
    assert [coco_captions.answer(row) for row in (train[1], test[0])] == ["Number 0.", "A test image."]
    assert coco_captions.options(test[0]) is None


@pytest.mark.parametrize("missing", ["dataset_coco.json", "val2014"])
def test_what_coco_lacks_is_named_with_its_place_to_get_it(missing, coco):
    path = coco / missing
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{path} is missing.*caption_datasets.zip.*val2014.zip"):
        coco_captions.load("test", str(coco))


def test_coco_needs_a_path_and_one_of_its_splits(coco):
    with pytest.raises(ValueError, match="path is None.*caption_datasets.zip"):
        coco_captions.load("test")
    with pytest.raises(ValueError, match="split is 'dev'"):
        coco_captions.load("dev", str(coco))


def test_captions_are_scored_against_all_of_their_image(coco):
    records = make_records(coco_captions, coco_captions.load("test", str(coco)), [" number 3"])
    scores = coco_captions.score(records, 1)
    assert scores["BLEU-2"] == pytest.approx(100) and coco_captions.CARD["score"] in scores
    with pytest.raises(ValueError, match="1 predictions for a split of 2 rows"):
        coco_captions.score(records, 2)


def test_a_missing_java_is_named_before_anything_is_generated(tmp_path, monkeypatch):
    coco_captions.check_scorer()
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="no `java` on PATH.*Install"):
        coco_captions.check_scorer()


def test_a_missing_pycocoevalcap_is_named_before_anything_is_generated(monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "pycocoevalcap"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "pycocoevalcap", None)  # as if it were not installed
    with pytest.raises(ImportError, match="pip install pycocoevalcap"):
        coco_captions.check_scorer()


# --- VQAv2 ---


ANSWERS = ["yes"] * 6 + ["Yes.", "no", "no", "the 2"]  # of one question


def save_vqav2(folder):
    """The published layout with four training photos, one of which is held out, and two to validate."""
    for part, photos in (("train2014", (1, 2, 3, 50)), ("val2014", (4, 50))):
        questions, annotations = [], []
        for photo in photos:
            write_image(folder / part / f"COCO_{part}_{photo:012d}.jpg")
            for number, kind in enumerate(("yes/no", "number", "other")):
                ids = {"image_id": photo, "question_id": 1000 * photo + number}
                questions.append({**ids, "question": f"Is it number {number}?"})
                answers = [
                    {"answer": text, "answer_confidence": "yes", "answer_id": i} for i, text in enumerate(ANSWERS)
                ]
                types = {"question_type": "is it", "answer_type": kind, "multiple_choice_answer": "yes"}
                annotations.append({**ids, **types, "answers": answers})
        annotations.reverse()  # they are found by their numbers
        (folder / f"v2_OpenEnded_mscoco_{part}_questions.json").write_text(json.dumps({"questions": questions}))
        (folder / f"v2_mscoco_{part}_annotations.json").write_text(json.dumps({"annotations": annotations}))


def save_vqav2_of_the_hub(folder):
    """The same rows in the columns of the Hub."""
    (folder / "data").mkdir(parents=True)
    save_vqav2(folder / "published")
    for part, name in (("train2014", "train"), ("val2014", "validation")):
        questions = json.loads((folder / "published" / f"v2_OpenEnded_mscoco_{part}_questions.json").read_text())
        annotations = json.loads((folder / "published" / f"v2_mscoco_{part}_annotations.json").read_text())
        answered = {entry["question_id"]: entry for entry in annotations["annotations"]}
        rows = [{**entry, **answered[entry["question_id"]]} for entry in questions["questions"]]
        photos = [f"COCO_{part}_{row['image_id']:012d}.jpg" for row in rows]
        images = [{"bytes": (folder / "published" / part / photo).read_bytes(), "path": None} for photo in photos]
        rows = Dataset.from_list([{**row, "image": image} for row, image in zip(rows, images)])
        rows.cast_column("image", Image()).to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    shutil.rmtree(folder / "published")


@pytest.mark.parametrize("save", [save_vqav2, save_vqav2_of_the_hub])
@pytest.mark.parametrize("streaming", [False, True])
def test_vqav2_trains_on_photos_that_it_does_not_validate_on_and_tests_on_the_validation_split(
    save, streaming, tmp_path
):
    save(tmp_path)
    splits = {name: vqav2.load(name, str(tmp_path), streaming) for name in ("train", "validation", "test")}
    splits = {name: undecoded(rows) for name, rows in splits.items()}
    photos = {name: [row["image_id"] for row in rows] for name, rows in splits.items()}
    assert photos == {"train": [1, 1, 1, 2, 2, 2, 3, 3, 3], "validation": [50] * 3, "test": [4, 4, 4, 50, 50, 50]}
    row = splits["test"][1]
    assert row.keys() == vqav2.FEATURES.keys() and read_image(row["image"]).size == (8, 8)
    assert (row["question_id"], row["answer_type"], row["question_type"]) == (4001, "number", "is it")
    assert (row["answers"], vqav2.answer(row), vqav2.options(row)) == (ANSWERS, "yes", None)
    assert vqav2.prompt(row, vqav2.context(row)) == "Question: Is it number 1?\nAnswer with a word or a short phrase."


def test_the_answer_that_vqav2_learns_is_the_most_frequent_one():
    record = dict.fromkeys(vqav2.FIELDS) | {"question": "?", "answers": ["b", "a", "a"], "image_id": 1}
    assert vqav2.parse(record, 1)[0]["answer"] == "a"
    assert vqav2.parse({**record, "answer": "b"}, 1)[0]["answer"] == "b"


def test_what_is_wrong_with_vqav2_is_named(command, tmp_path):
    with pytest.raises(ValueError, match="path is None.*visualqa.org"):
        vqav2.load("test")
    with pytest.raises(ValueError, match="split is 'val'"):
        vqav2.load("val", str(tmp_path))
    save_vqav2(tmp_path)
    for words in ([], ["--task", "vqav2"]):
        code, output = command("check", tmp_path, *words)
        assert code == 0 and "train2014_questions.json: 12 good rows" in output and "6 good rows" in output
    photo = tmp_path / "val2014" / "COCO_val2014_000000000004.jpg"
    photo.write_text("no image")
    annotations = tmp_path / "v2_mscoco_val2014_annotations.json"
    entries = json.loads(annotations.read_text())["annotations"]
    assert entries[0]["question_id"] == 50002
    del entries[0]
    entries[0] |= {"answers": None}
    annotations.write_text(json.dumps({"annotations": entries}))
    code, output = command("check", tmp_path)
    assert code == 1 and output.count("question 400") == 3 and f"The image {photo} cannot be read" in output
    assert "question 50001: `answers` is None." in output and "question 50002 has no annotation in" in output
    with pytest.raises(ValueError, match="question 5000.*\n.*first of 2 faults: `python -m tasks check"):
        vqav2.load("test", str(tmp_path))
    annotations.unlink()
    with pytest.raises(FileNotFoundError, match="annotations.json is missing. VQAv2 is read from"):
        vqav2.load("test", str(tmp_path))


def test_the_check_command_notes_that_there_is_no_train_split(command, tmp_path):
    (tmp_path / "test.jsonl").write_text(json.dumps({"question": "Why?", "answer": "so"}))
    code, output = command("check", tmp_path, "--columns", "image=none")
    assert code == 0 and "note: there is no train split" in output


def test_the_check_command_notes_prompts_that_may_be_too_long(command, tmp_path):
    note = "1 times a prompt of more than 2,000 characters besides `context`, which may exceed"
    for long, noted in (("question", True), ("answer", False), ("context", False)):
        row = {"question": "Why?", "answer": "so", long: "word " * 500}
        (tmp_path / "questions.json").write_text(json.dumps([row]))  # which is also the name of easy-VQA's file
        code, output = command("check", tmp_path / "questions.json", "--columns", "image=none")
        assert code == 0 and (note in output) == noted, output
    chat = [{"role": "user", "content": "Why?"}, {"role": "assistant", "content": "word " * 500}]
    for messages, noted in ((chat, False), ([chat[0], chat[1], *chat], True)):
        (tmp_path / "chat.json").write_text(json.dumps([{"messages": messages}]))
        code, output = command("check", tmp_path / "chat.json", "--columns", "image=none")
        assert code == 0 and (note in output) == noted, output


def test_the_check_command_reads_vqav2_of_the_hub(command, tmp_path):
    save_vqav2_of_the_hub(tmp_path)
    code, output = command("check", tmp_path)
    assert code == 0 and "read with --task vqav2" in output and "12 good rows, 12 with an image" in output
    assert "no test split" not in output
    for file in (tmp_path / "data").iterdir():
        Dataset.from_parquet(str(file)).remove_columns("answers").to_parquet(file)
    code, output = command("check", tmp_path)
    assert code == 1 and "no row has an `answers`" in output


def official(answers, prediction, rate):
    """Answers of ten people in short, and what the official script of VQA 2.0 prints for a prediction, in per cent."""
    people = [text for text, number in answers.items() for _ in range(number)]
    assert len(people) == 10
    return pytest.param(people, prediction, rate, id=f"{prediction!r}-{rate}")


# Computed by vqaEval.py of github.com/GT-Vision-Lab/VQA (commit a013f00), translated to Python 3
OFFICIAL = [
    official({"yes": 10}, "yes", 100),
    official({"yes": 10}, " yes\n", 100),
    official({"yes": 10}, "Yes", 0),
    official({"yes": 10}, "no", 0),
    official({"yes": 9, "no": 1}, "Yes.", 100),
    official({"yes": 9, "no": 1}, "no", 30),
    official({"yes": 8, "no": 2}, "no", 60),
    official({"yes": 7, "no": 3}, "no", 90),
    official({"yes": 6, "no": 4}, "no", 100),
    official({"2": 5, "two": 3, "Two.": 1, "3": 1}, "two", 100),
    official({"0": 5, "none": 5}, "zero", 100),
    official({"10": 9, "9": 1}, "ten", 100),
    official({"red": 3, "the red": 2, "a Red": 2, "blue": 3}, "An RED", 100),
    official({"a": 4, "b": 6}, "a", 100),
    official({"a": 4, "b": 6}, "the", 100),
    official({"don't know": 5, "dont know": 4, "x": 1}, "dont know", 100),
    official({"he'd've": 9, "x": 1}, "hed've", 100),
    official({"hed've": 9, "x": 1}, "hedve", 0),
    official({"somebodyd": 9, "x": 1}, "somebody'd", 100),
    official({"I've": 9, "x": 1}, "Ive", 0),
    official({"let's": 9, "x": 1}, "lets", 0),
    official({"'twas": 9, "x": 1}, "twas", 100),
    official({"t shirt": 5, "t-shirt": 4, "x": 1}, "t-shirt", 100),
    official({"tshirt": 9, "x": 1}, "t- shirt", 0),
    official({"yes/no": 9, "x": 1}, "yes no", 100),
    official({"red, white": 9, "x": 1}, "red white", 100),
    official({"red,white": 9, "x": 1}, "red white", 100),
    official({"1,000": 9, "x": 1}, "1000", 100),
    official({"1,000 t-shirts": 9, "x": 1}, "1000 tshirts", 100),
    official({"3.5": 9, "x": 1}, "3.5", 100),
    official({"3.5": 9, "x": 1}, "35", 0),
    official({"5.": 9, "x": 1}, "5", 100),
    official({"st. john": 9, "x": 1}, "st john", 100),
    official({".5": 9, "x": 1}, ".5", 100),
    official({"a.m.": 9, "x": 1}, "am", 100),
    official({"stop sign": 9, "x": 1}, "stop\tsign", 100),
    official({"stop  sign": 10}, "stop sign", 0),
    official({"what?": 9, "x": 1}, "what", 100),
    official({"c++": 9, "x": 1}, "c", 100),
    official({"3:00": 9, "x": 1}, "3:00", 100),
    official({"café": 9, "x": 1}, "CAFÉ!", 100),
    official({"x": 9, "": 1}, "the", 30),
    official({"." * 40: 9, "x": 1}, "." * 8, 0),  # only 32 periods of a text are removed
    official({"." * 40: 9, "x": 1}, "." * 40, 100),
]


@pytest.mark.parametrize("answers, prediction, rate", OFFICIAL)
def test_vqav2_is_scored_as_by_the_official_script(answers, prediction, rate):
    record = {"answers": answers, "answer_type": "other", "prediction": prediction}
    assert vqav2.score([record], 1)["average"] == pytest.approx(rate)
    metric = import_module("metrics.vqav2.vqav2")
    if len(set(answers)) > 1:
        prediction, *answers = map(metric.normalise, (prediction, *answers))
    subsets = [answers[:index] + answers[index + 1 :] for index in range(10)]
    written_out = [min(subset.count(prediction.strip()) / 3, 1) for subset in subsets]
    assert rate == pytest.approx(100 * sum(written_out) / 10)


QUESTIONS, ANNOTATIONS = "v2_OpenEnded_mscoco_val2014_questions.json", "v2_mscoco_val2014_annotations.json"
CAPTIONED = {"split": "train", "filepath": "train2014", "filename": "a.jpg", "sentences": [], "cocoid": 1}
DAMAGES = [
    (vqav2, ANNOTATIONS, "[]", r"\[\] in place of a JSON object. VQAv2 is read"),
    (vqav2, ANNOTATIONS, {"questions": []}, "has no list `annotations`. VQAv2 is read"),
    (vqav2, ANNOTATIONS, {"annotations": [{"id": 1}]}, "entry 0 of `annotations` has no `question_id`. VQAv2 is"),
    (vqav2, QUESTIONS, {"questions": [{"id": 1}]}, "entry 0 of `questions` has no `question_id`. VQAv2 is read"),
    (vqav2, QUESTIONS, {"questions": []}, "has no rows of the test split"),
    (coco_captions, "dataset_coco.json", '{"images": [{"split', r"not valid JSON \(Unterminated.* COCO Captions is"),
    (coco_captions, "dataset_coco.json", {"annotations": []}, "has no list `images`. COCO Captions is read"),
    (coco_captions, "dataset_coco.json", {"images": [{"id": 1}]}, "entry 0 of `images` has no `split`. COCO"),
    (coco_captions, "dataset_coco.json", {"images": [3]}, "entry 0 of `images` has no `split`. COCO Captions"),
    (coco_captions, "dataset_coco.json", {"images": [CAPTIONED]}, "has no rows of the test split. Give the complete"),
    (scienceqa, "problems.json", '{"1": ', r"not valid JSON \(Expecting value.* The original layout of ScienceQA"),
    (scienceqa, "problems.json", {"7": {}}, "has no `12`. The original layout of ScienceQA"),
    (scienceqa, "problems.json", {"7": {}, "12": {}}, "problem 12 has no `image`. The original layout of ScienceQA"),
    (scienceqa, "pid_splits.json", {"train": []}, "has no list `test`. The original layout of ScienceQA"),
    (scienceqa, "pid_splits.json", {"test": []}, "has no rows of the test split. Give the complete files"),
]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("task, name, content, message", DAMAGES)
def test_a_damaged_file_of_a_published_data_set_is_named(
    task, name, content, message, streaming, original, coco, tmp_path
):
    folder = {coco_captions: coco, scienceqa: original}.get(task, tmp_path / "vqav2")
    if task is vqav2:
        save_vqav2(folder)
    assert (folder / name).is_file()
    (folder / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        task.load("test", str(folder), streaming)


def test_vqav2_is_scored_by_the_type_of_answer():
    said = [("yes/no", "yes"), ("yes/no", "maybe"), ("number", "no"), ("yes/no", "NO!")]
    records = [{"answers": ANSWERS, "answer_type": kind, "prediction": text} for kind, text in said]
    scores = vqav2.score(records, 4)
    assert vqav2.CARD["score"] in scores
    assert scores.pop("yes/no") == pytest.approx((100 + 0 + 60) / 3)
    assert scores == {"number": pytest.approx(60), "other": None, "average": pytest.approx(55), "count": 4}
    with pytest.raises(ValueError, match="4 predictions for a split of 5 rows"):
        vqav2.score(records, 5)


# --- Your own questions ---


EXAMPLE = ROOT / "examples" / "vqa"
CHOICE = {"question": "Which?", "choices": ["a cat", "a dog"], "answer": "a dog", "context": "It barks."}
FREE = {"question": "What?", "answer": "A red car."}


def test_the_example_has_ten_rows_of_all_kinds():
    rows = [row for split in ("train", "test") for row in vqa.load(split, str(EXAMPLE))]
    assert len(rows) == 10
    kinds = Counter((row["image"] is not None, row["choices"] is not None) for row in rows)
    assert set(kinds) == {(True, True), (True, False), (False, True), (False, False)}
    assert all(file.stat().st_size < 4096 for file in EXAMPLE.glob("images/*"))


def test_own_questions_are_asked_with_options_or_without():
    assert vqa.prompt(CHOICE, "It barks.") == "Question: Which?\nContext: It barks.\nOptions: (A) a cat (B) a dog"
    assert (vqa.answer(CHOICE), vqa.options(CHOICE)) == ("The answer is B.", [" A", " B"])
    assert vqa.prompt(FREE, "") == "Question: What?\nContext: N/A"
    assert (vqa.answer(FREE), vqa.options(FREE)) == ("The answer is A red car.", None)
    assert (vqa.context(CHOICE), vqa.context(FREE)) == ("It barks.", "")


@pytest.mark.parametrize("layout", ["jsonl", "save_to_disk", "parquet"])
def test_every_layout_of_own_questions_gives_the_same_rows_streamed_or_not(layout, tmp_path):
    folder, expected = EXAMPLE, vqa.load("train", str(EXAMPLE))
    if layout == "save_to_disk":
        folder = tmp_path / "saved"
        DatasetDict(train=expected).save_to_disk(folder)
    if layout == "parquet":
        folder = tmp_path / "hub"
        folder.mkdir()
        expected.to_parquet(folder / "train.parquet")
    whole, streamed = (vqa.load("train", str(folder), streaming=streaming) for streaming in (False, True))
    assert isinstance(whole, Dataset) and isinstance(streamed, IterableDataset)
    assert undecoded(whole) == undecoded(streamed)
    assert whole.features == streamed.features == vqa.FEATURES
    assert has_image(whole) == [True, True, True, True, False, False]
    texts = [[task(row) for task in (vqa.context, vqa.answer, vqa.options)] for row in whole]
    assert texts == [[task(row) for task in (vqa.context, vqa.answer, vqa.options)] for row in expected]


def test_a_data_set_may_lack_the_columns_that_a_row_may_lack(tmp_path):
    rows = Dataset.from_list([{"question": "Why?", "answer": "so"}])
    DatasetDict(test=rows).save_to_disk(tmp_path)
    row = vqa.load("test", str(tmp_path), columns="image=none")[0]
    assert vqa.prompt(row, vqa.context(row)) == "Question: Why?\nContext: N/A"
    assert (vqa.answer(row), vqa.options(row)) == ("The answer is so.", None)


def test_a_data_set_may_have_more_columns_and_no_choices_as_an_empty_list(tmp_path):
    others = {"prediction": "so", "choice": "a", "when": datetime.now(), "mask": PILImage.new("L", (2, 2))}
    rows = Dataset.from_list([{"question": "Why?", "answer": "so", "choices": [], **others}])
    DatasetDict(test=rows.cast_column("choices", List(Value("string")))).save_to_disk(tmp_path)
    for streaming in (False, True):
        (row,) = vqa.load("test", str(tmp_path), streaming=streaming, columns="image=none")
        absent = dict.fromkeys(("image", "images", "choices", "answers", "context"))
        assert row == {"question": "Why?", "answer": "so", **absent}
    assert vqa.prompt(row, "") == "Question: Why?\nContext: N/A"
    assert (vqa.answer(row), vqa.options(row)) == ("The answer is so.", None)


def test_images_are_looked_for_from_their_file_and_not_opened(tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    write_lines(tmp_path / "test.jsonl", [{**FREE, "image": "broken.png"}, {**FREE, "image": None}])
    rows = undecoded(vqa.load("test", str(tmp_path)))
    assert [row["image"] for row in rows] == [{"path": str(tmp_path / "broken.png"), "bytes": None}, None]


@pytest.mark.parametrize(
    "spoil", [lambda file: file.write_text("no image"), lambda file: file.unlink()], ids=["broken", "missing"]
)
def test_an_unreadable_image_does_not_stop_loading(spoil, original, coco, tmp_path):
    write_image(tmp_path / "own.png")
    write_lines(tmp_path / "test.jsonl", [{**FREE, "image": "own.png"}])
    for file in [*original.glob("images/*/*/*"), *coco.glob("*/*"), tmp_path / "own.png"]:
        spoil(file)
    assert has_image(vqa.load("test", str(tmp_path))) == [True]
    assert has_image(scienceqa.load("test", str(original))) == [False, True]
    assert has_image(coco_captions.load("test", str(coco), streaming=True)) == [True]


def test_own_questions_need_a_path_the_split_and_good_rows(tmp_path):
    with pytest.raises(ValueError, match="path is None"):
        vqa.load("train")
    write_lines(tmp_path / "train.jsonl", [FREE, {"question": "Why?"}, {"answer": "so"}])
    with pytest.raises(ValueError, match="no split `test`. It has: train.*--holdout 0.05"):
        vqa.load("test", str(tmp_path))
    with pytest.raises(ValueError, match="train.jsonl:2: there is no `answer`.*\n`python -m tasks check .*lists all"):
        vqa.load("train", str(tmp_path))


@pytest.mark.parametrize(
    "prediction, answer, is_right",
    [
        (" The red car.", "a red car", True),
        (" red, car", "Red car", True),
        (" red", "red car", False),
        (" 3.5", "35", False),
        (" -5.", "5", False),
        (" -5.", "-5", True),
        *((said, answer, False) for said, answer in [(" .5.", "-.5"), (" $5", "-$5"), (" 5", "- 5"), (" 5", "5‰")]),
        *((said, answer, True) for said, answer in [(" -5.", "- 5"), ("(- $.5)", "-$.5"), (" 5 - $3", "5-$3")]),
        *((said, answer, True) for said, answer in [(" Red - blue.", "red blue"), (" Yes, 5", "yes 5")]),
        (" 23.", "2*3", False),
        (" 1020.", "10\u201320", False),
        (" 5", "5!", False),
        (" 5!", "5!", True),
        (" 1 - 2.", "1-2", True),
        (" 2 * 3", "2*3", True),
        (" 3+4", "3 + 4", True),
        (" 3 : 00", "3:00", True),
        (" 5 -3", "5-3", False),
        (" 3, 4", "34", False),
        (' "5" (or 6)?', "5 or 6", True),
        (" A.", "A", True),  # an article is kept where there is nothing else
        (" the", "A", False),
        (" +.", "+", True),
        (" Ärger!", "ärger", True),
        (" e\u0301te\u0301", "été", True),
        (" की", "का", False),
        (" C++.", "C#", False),
        *((said, answer, False) for said, answer in [(" A", "A-"), (" A+", "A-"), (" O.", "O-"), (" ½", "-½")]),
        *((said, answer, True) for said, answer in [(" B-.", "b-"), (" -½.", "-½"), (" a T-shirt", "t-shirt")]),
        (" plan b - maybe", "plan b maybe", True),
        *((f" {number}.", f"-{number}", False) for number in ("x", "2x", "√2", "π", "∞", "(3)", "a/2", "$x")),
        *((said, said.replace("-", ""), False) for said in ("y = -x", "y=-x", "(-x)", '"-x"', "2*-x", "e^-x", "1,-x")),
        *((said, said.replace("-", ""), False) for said in ("AB-", "(AB-)", "AB-, I think", "Cl-.", "O2-", "SO4 2-")),
        *(
            (said, said.replace("-", ""), True)
            for said in ("co-op", "U.S.-based", "x--y", "red -- blue", "- hen", "hen -")
        ),
        *((said, said.replace("**", ""), False) for said in ("2**3", "x**2", "2**x", "(x)**2", "x**-1")),
        (" 2 ** 3", "2 3", False),
        (" 2 ** 3", "2**3", True),
        (" 3...5", "3.5", False),
        (" **red** car", "red car", True),
        (" (3), (4)", "3 4", True),
        ("..", ".", True),
        (" ?.", ".", False),
    ],
)
def test_free_answers_are_compared_without_case_punctuation_and_articles(prediction, answer, is_right):
    records = [{"question": "?", "answer": answer, "choices": None, "prediction": prediction, "has_image": False}]
    assert vqa.score(records, 1)["free"] == 100 * is_right


def test_own_questions_are_scored_by_kind():
    records = [
        {**CHOICE, "prediction": " B.", "has_image": True},
        {**CHOICE, "prediction": " a dog", "has_image": False},  # no letter
        {**FREE, "prediction": " the red car", "has_image": True},
        {**FREE, "prediction": " ", "has_image": True},
    ]
    scores = vqa.score(records, 4)
    assert vqa.CARD["score"] in scores
    assert scores.pop("image") == pytest.approx(200 / 3)
    assert scores == {"no image": 0, "choices": 50, "free": 50, "average": 50, "unparsed": 50, "count": 4}
    assert vqa.score(records[:1], 1)["free"] is None
    with pytest.raises(ValueError, match="4 predictions for a split of 5 rows"):
        vqa.score(records, 5)


# --- easy-VQA ---


def save_easy_vqa(folder, sizes=(("train", 20), ("test", 2))):
    """The layout of easy-VQA with 20 / 2 pictures and a question of each type about each of them."""
    for part, size in sizes:
        questions = []
        for number in range(size):
            write_image(folder / "data" / part / "images" / f"{number}.png")
            shape = ("triangle", "circle")[number % 2]
            pairs = ("is it a square?", "no"), ("what shape is present?", shape), ("what color is it?", "red")
            questions += [[question, answer, number] for question, answer in pairs]
        (folder / "data" / part / "questions.json").write_text(json.dumps(questions))


def test_easy_vqa_validates_on_training_pictures_that_are_not_trained_on(tmp_path):
    save_easy_vqa(tmp_path)
    splits = {split: easy_vqa.load(split, str(tmp_path)) for split in ("train", "validation", "test")}
    assert {split: len(rows) for split, rows in splits.items()} == {"train": 57, "validation": 3, "test": 6}
    assert not set(splits["train"]["image_id"]) & set(splits["validation"]["image_id"])
    assert all(f"data{os.sep}test" in row["image"]["path"] for row in undecoded(splits["test"]))
    again = easy_vqa.load("validation", str(tmp_path), streaming=True)
    assert isinstance(again, IterableDataset) and undecoded(again) == undecoded(splits["validation"])
    row = splits["test"][1]
    assert easy_vqa.prompt(row, easy_vqa.context(row)) == "what shape is present?"
    assert (easy_vqa.answer(row), easy_vqa.options(row), row["image"].size) == ("triangle", None, (8, 8))
    with pytest.raises(ValueError, match="split is 'val'"):
        easy_vqa.load("val", str(tmp_path))


EASY_VQA_FAULTS = [
    ("questions.json", None, FileNotFoundError, "questions.json is missing. easy-VQA is read from"),
    ("images/1.png", None, FileNotFoundError, "1.png is missing. easy-VQA is read from"),
    ("questions.json", "[1,", ValueError, "not JSON in UTF-8: Expecting value"),
    ("questions.json", "[]", ValueError, "no rows"),
    ("questions.json", '[["?", "no", 0], ["?", "pink", 0]]', ValueError, "row 1: .*pink.* not a row.*\n.*first of 1"),
    ("questions.json", '[["?", "no", "0"]]', ValueError, "row 0: .* is not a row"),
    ("questions.json", '[["", "no", 0]]', ValueError, "row 0: .* is not a row"),
    ("questions.json", '["no"]', ValueError, "row 0: 'no' is not a row"),
]


@pytest.mark.parametrize("name, text, error, message", EASY_VQA_FAULTS)
def test_faults_of_easy_vqa_are_named(name, text, error, message, tmp_path):
    save_easy_vqa(tmp_path)
    file = tmp_path / "data" / "test" / name
    file.unlink()
    if text is not None:
        file.write_text(text)
    with pytest.raises(error, match=message):
        easy_vqa.load("test", str(tmp_path))


def test_easy_vqa_is_scored_by_the_type_of_question():
    said = [("yes", " Yes."), ("no", " yes"), ("circle", " a circle")]
    said += [("red", " green"), ("gray", " gray"), ("red", "")]
    records = [{"answer": answer, "prediction": prediction} for answer, prediction in said]
    scores = easy_vqa.score(records, 6)
    assert scores.pop("colour") == pytest.approx(100 / 3)
    assert scores == {"yes/no": 50, "shape": 100, "average": 50, "count": 6}
    assert easy_vqa.CARD["score"] in scores
    assert easy_vqa.score(records[:1], 1)["shape"] is None
    with pytest.raises(ValueError, match="6 predictions for a split of 7 rows"):
        easy_vqa.score(records, 7)


def test_easy_vqa_is_downloaded_once_and_only_if_its_checksum_is_right(tmp_path, monkeypatch):
    """The registry is a folder with a wheel that holds the tiny data."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(OSError, match="pip download.*failed(.|\n)*--data_path"):
        easy_vqa.load("test")
    save_easy_vqa(tmp_path / "easy_vqa")
    wheel = tmp_path / "easy_vqa-1.0-py3-none-any.whl"
    with ZipFile(wheel, "w") as archive:
        for file in (tmp_path / "easy_vqa").rglob("*.*"):
            archive.write(file, file.relative_to(tmp_path))
        archive.writestr("easy_vqa/__init__.py", "raise ImportError")
        archive.writestr("easy_vqa-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: easy-vqa\nVersion: 1.0\n")
        archive.writestr("easy_vqa-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    with pytest.raises(ValueError, match="has the SHA-256"):
        easy_vqa.load("test")
    monkeypatch.setattr(easy_vqa, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    assert len(easy_vqa.load("test")) == 6
    wheel.unlink()
    assert len(easy_vqa.load("train")) == 57
    kept = {path.name for path in (tmp_path / "cache" / "dehvf").iterdir()}
    assert kept - {"easy-vqa-1.0.lock"} == {"easy-vqa-1.0"}
    assert not list((tmp_path / "cache").rglob("*.py"))


# --- Pairs of easy-VQA ---


def test_pairs_of_easy_vqa_show_the_same_shape_half_of_the_time(tmp_path):
    save_easy_vqa(tmp_path, [("train", 120), ("test", 4)])
    seen = {}
    for split, size in {"train": 1140, "validation": 12, "test": 8}.items():
        rows = easy_vqa_pairs.load(split, str(tmp_path))
        assert len(rows) == size and Counter(rows["answer"]) == {"yes": size / 2, "no": size / 2}
        for row in undecoded(rows):
            left, right = (Path(image["path"]) for image in row["images"])
            assert row["image"]["path"] == str(left)
            assert row["answer"] == ("yes" if int(left.stem) % 2 == int(right.stem) % 2 else "no")
            seen.setdefault(split, set()).update((left, right))
        assert undecoded(easy_vqa_pairs.load(split, str(tmp_path), streaming=True)) == undecoded(rows)
    assert not seen["train"] & (seen["validation"] | seen["test"])


def test_pairs_of_easy_vqa_need_two_shapes(tmp_path):
    save_easy_vqa(tmp_path, [("test", 1)])
    with pytest.raises(ValueError, match="test split shows fewer than two shapes"):
        easy_vqa_pairs.load("test", str(tmp_path))


def test_pairs_of_easy_vqa_are_scored_by_answer():
    said = [("yes", " Yes."), ("yes", "no"), ("no", " no")]
    scores = easy_vqa_pairs.score([{"answer": answer, "prediction": text} for answer, text in said], 3)
    assert scores == {"yes": 50, "no": 100, "average": pytest.approx(200 / 3), "count": 3}
    with pytest.raises(ValueError, match="1 predictions for a split of 2 rows"):
        easy_vqa_pairs.score([{"answer": "no", "prediction": ""}], 2)


# --- NLVR2 ---


def save_nlvr2(folder):
    """The published files with two statements about each of two pairs of photos, and the photos in folders below."""
    for part in ("train", "dev", "test1"):
        lines = []
        for pair, sentence in itertools.product((0, 1), repeat=2):
            lines.append({"sentence": f"It is {sentence}.", "label": str(pair == sentence)})
            lines[-1] |= {"identifier": f"{part}-7-{pair}-{sentence}", "left_url": "http://a", "right_url": "http://b"}
            for number, colour in enumerate(("red", "blue")):
                write_image(folder / "images" / part / f"{part}-7-{pair}-img{number}.png", colour)
        write_lines(folder / f"{part}.json", lines)


def save_nlvr2_of_the_hub(folder):
    """Subsets in the columns of the Hub, and with its names, several of which speak of the same split."""
    (folder / "data").mkdir(parents=True)
    names = {"balanced_dev": "dev", "balanced_test_public": "test1", "unbalanced_test_public": "test1"}
    images = {"left_image": image_bytes("red"), "right_image": image_bytes("blue")}
    for name, part in names.items():
        rows = [
            {"question": f"It is {sentence}.", "answer": str(pair == sentence)}
            | {"identifier": f"{part}-7-{pair}-{sentence}"}
            | {column: {"bytes": content, "path": None} for column, content in images.items()}
            for pair, sentence in itertools.product((0, 1), repeat=2)
        ]
        rows = Dataset.from_list(rows).cast_column("left_image", Image()).cast_column("right_image", Image())
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    splits = "".join(f"  - split: {name}\n    path: data/{name}-*\n" for name in names)
    (folder / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files:\n{splits}---\n")


@pytest.mark.parametrize("save", [save_nlvr2, save_nlvr2_of_the_hub])
@pytest.mark.parametrize("streaming", [False, True])
def test_nlvr2_has_two_images_a_row(save, streaming, tmp_path):
    save(tmp_path)
    for split in ("validation", "test") if save is save_nlvr2_of_the_hub else ("train", "validation", "test"):
        rows = undecoded(nlvr2.load(split, str(tmp_path), streaming))
        assert [row["label"] for row in rows] == ["True", "False", "False", "True"]
        for row in rows:
            assert row.keys() == nlvr2.FEATURES.keys()
            left, right = (read_image(image).getpixel((0, 0)) for image in row["images"])
            assert (left, right) == ((255, 0, 0), (0, 0, 255)) and read_image(row["image"]).getpixel((0, 0)) == left
    assert rows[1]["identifier"] == "test1-7-0-1"
    expected = "Statement: It is 1.\nIs it true of the left and the right image?"
    assert nlvr2.prompt(rows[1], nlvr2.context(rows[1])) == expected
    assert (nlvr2.answer(rows[1]), nlvr2.options(rows[1])) == ("The answer is False.", [" True", " False"])


def test_what_is_wrong_with_nlvr2_is_named(command, tmp_path):
    with pytest.raises(ValueError, match="path is None.*lil-lab/nlvr"):
        nlvr2.load("test")
    with pytest.raises(ValueError, match="split is 'dev'"):
        nlvr2.load("dev", str(tmp_path))
    save_nlvr2(tmp_path)
    code, output = command("check", tmp_path)
    assert code == 0 and output.count("4 good rows, 4 with an image") == 3
    lost = tmp_path / "images" / "test1" / "test1-7-1-img0.png"
    lost.unlink()
    assert len(nlvr2.load("test", str(tmp_path))) == 4, "it is counted in training and named in evaluation"
    faulty = {"sentence": " ", "label": "maybe", "identifier": "7-1", "left_url": ""}
    lines = (tmp_path / "test1.json").read_text()
    (tmp_path / "test1.json").write_text(lines + json.dumps(faulty) + "\n{\n")
    code, output = command("check", tmp_path)
    assert code == 1 and output.count("test1-7-1-img0.png cannot be read: there is no such file") == 2
    for text in ("test1.json:5: the statement is ' '", "the label is 'maybe'", "the identifier is '7-1'", "not JSON"):
        assert text in output
    with pytest.raises(ValueError, match="test1.json:5: the statement.*\n.*first of 4 faults: `python -m tasks check"):
        nlvr2.load("test", str(tmp_path))
    shutil.rmtree(tmp_path / "images")
    with pytest.raises(FileNotFoundError, match="There are no photos.*NLVR2 is read from"):
        nlvr2.load("test", str(tmp_path))


def test_the_check_command_reads_nlvr2_of_the_hub(command, tmp_path):
    save_nlvr2_of_the_hub(tmp_path)
    code, output = command("check", tmp_path)
    assert code == 0 and "read with --task nlvr2" in output and output.count("4 good rows, 4 with an image") == 2
    assert "Train with `--max_images 2`" in output and "no test split" not in output


def test_nlvr2_is_scored_by_row_and_by_statement():
    """A statement is the same in rows whose identifiers differ in the third part alone."""
    rows = ("1-0-0", "True", " True."), ("1-1-0", "False", " false"), ("1-0-1", "True", " True")
    rows += ("1-1-1", "True", " False."), ("2-0-0", "False", " perhaps")
    records = [{"identifier": f"dev-{row}", "label": label, "prediction": text} for row, label, text in rows]
    scores = nlvr2.score(records, 5)
    assert nlvr2.CARD["score"] in scores
    assert scores == {"accuracy": 60, "consistency": pytest.approx(100 / 3), "unparsed": 20, "count": 5}
    with pytest.raises(ValueError, match="5 predictions for a split of 6 rows"):
        nlvr2.score(records, 6)


# --- python -m tasks ---


@pytest.fixture
def command(capsys, monkeypatch):
    """Runs `python -m tasks` with these words in this process, and returns its exit code and what it printed."""

    def run_command(*words) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["tasks", *map(str, words)])
        monkeypatch.setattr(sys.stdout, "reconfigure", lambda **_: None, raising=False)
        with pytest.raises(SystemExit) as ended:
            main()
        printed, code = capsys.readouterr().out, ended.value.code
        return (code, printed) if isinstance(code, int) else (1, printed + code)

    return run_command


def test_the_check_command_counts_the_rows_of_the_example():
    output = run(sys.executable, "-m", "tasks", "check", "examples/vqa")
    assert output.startswith("examples/vqa: JSON Lines, read with --task vqa")
    assert "examples/vqa/test.jsonl: 4 good rows, 2 with an image, 2 with choices" in output
    assert "examples/vqa/train.jsonl: 6 good rows, 4 with an image, 3 with choices" in output
    assert "longest texts in characters: question 28, choices 10, answer 16, context 47" in output


FAULTS = [
    (b'{"question": "Why?", "answer": }', "not JSON: Expecting value at character 32"),
    (b'{"question": "Wh\xe4t?", "answer": "so"}', "not UTF-8 text"),
    ([1, 2], "is not a row"),
    ({"answer": "so"}, "there is no `question`"),
    ({"question": "Why?"}, "there is no `answer`"),
    ({"question": " ", "answer": "so"}, "`question` is ' '"),
    ({"question": "Why?", "answer": True}, "`answer` is True"),
    ({"question": "Why?", "answer": ["so", " "]}, "`answers` is ['so', ' ']"),
    ({"question": "Why?", "answers": "['so', 'thus']"}, """`answers` is "['so', 'thus']", which is not JSON"""),
    ({"question": "Why?", "answers": "['so' 'thus']"}, """`answers` is "['so' 'thus']", which is not JSON"""),
    ({"question": "Why \ud83d?", "answer": "so"}, "half of a surrogate pair"),
    ({"question": "<image>\nWhy?", "answer": "so"}, "there is no image"),
    ({**FREE, "context": ["so"]}, "`context` is ['so']"),
    ({**CHOICE, "choices": "a dog"}, "`choices` is 'a dog'"),
    ({**CHOICE, "choices": ["a dog", None]}, "`choices` is ['a dog', None]"),
    ({**CHOICE, "choices": ["a dog"]}, "`choices` has 1 texts"),
    ({**CHOICE, "choices": ["a dog", *map(str, range(26))]}, "`choices` has 27 texts"),
    ({**CHOICE, "choices": ["a dog", "a cat", "a cat"]}, "`choices` repeats 'a cat'"),
    ({**CHOICE, "choices": ["a dog", "a cat", " a cat"]}, "`choices` repeats 'a cat'"),
    ({**CHOICE, "answer": "A dog"}, "`answer` is 'A dog', which is none of"),
    ({**FREE, "image": 3}, "`image` is 3"),
    ({**FREE, "image": ""}, "`image` is ''"),
    (
        {"question": "<image>Why?", "answer": "so", "images": ["good.png", "good.png"]},
        "`question` and `context` have 1 `<image>`, but the row has 2 images",
    ),
    ({**FREE, "question": "<image>Why?", "context": "<image>", "image": "good.png"}, "have 2 `<image>`, but the row"),
    ({**FREE, "answer": "<image>"}, "the answer or option '<image>' has `<image>`, which only a question may have"),
    ({**CHOICE, "choices": ["a dog", "<image> a cat"]}, "the answer or option '<image> a cat' has `<image>`"),
    ({**FREE, "image": "lost.png"}, "lost.png cannot be read: there is no such file"),
    ({**FREE, "image": "broken.png"}, "broken.png cannot be read"),
    ({**FREE, "image": "cut.png"}, "cut.png cannot be read"),
]


def test_the_check_command_names_every_bad_row_and_no_other(command, tmp_path):
    (tmp_path / "broken.png").write_text("no image")
    write_image(tmp_path / "good.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "good.png").read_bytes()[:-30])
    good = json.dumps({**CHOICE, "image": "good.png", "id": 5}).encode()
    lines = [good, b""]
    for fault, _ in FAULTS:
        lines += [fault if isinstance(fault, bytes) else json.dumps(fault).encode(), good]
    file = tmp_path / "train.jsonl"
    file.write_bytes(b"\n".join(lines))
    code, output = command("check", file)
    assert code == 1
    _, *faults, summary, longest, unread, note, missing, total = output.splitlines()
    for number, (fault, (_, text)) in enumerate(zip(faults, FAULTS, strict=True)):
        assert fault.startswith(f"{file}:{3 + 2 * number}: ") and text in fault
        assert fault.endswith(".")  # what to do
    count = len(FAULTS) + 1
    assert summary == f"{file}: {count} good rows, {count} with an image, {count} with choices"
    assert longest == "longest texts in characters: question 6, choices 5, answer 5, context 9"
    assert unread.startswith("note: columns that are not read: ") and "id" in unread
    assert note == f"note: {len(FAULTS)} times a row that is repeated, the first at {file}:4"
    assert "no test split" in missing and total == f"{len(FAULTS)} faults"


def test_the_check_command_names_all_faults_of_one_row(command, tmp_path):
    write_image(tmp_path / "good.png")
    bad = {"choices": ["a"], "context": 3, "image": "lost.png"}
    write_lines(tmp_path / "test.jsonl", [bad, {**FREE, "image": "good.png"}])
    _, output = command("check", tmp_path)
    for text in ("no `question`", "no `answer`", "`context` is 3", "has 1 texts", "lost.png cannot be read"):
        assert text in output
    assert output.count("test.jsonl:1: ") == 5


def test_the_check_command_reads_easy_vqa(command, tmp_path):
    save_easy_vqa(tmp_path)
    _, output = command("check", tmp_path)
    assert "questions.json: 6 good rows, 6 with an image" in output and "60 good rows" in output
    (tmp_path / "data" / "test" / "images" / "1.png").write_text("no image")
    (tmp_path / "data" / "train" / "questions.json").write_text('[["?", "pink", 0], ["?", "red", 0]]')
    _, output = command("check", tmp_path)
    for text in ("row 5: The image", "train/questions.json: row 0: ['?', 'pink', 0] is not a row", "4 faults"):
        assert text in output


def test_the_check_command_refuses_what_holds_no_rows(command, tmp_path):
    assert "has no data that this task reads" in command("check", tmp_path)[1]
    assert "There is no file or folder" in command("check", tmp_path / "lost.jsonl")[1]
    (tmp_path / "train.jsonl").write_text("\n")
    assert "train.jsonl: no rows" in command("check", tmp_path)[1]


@pytest.fixture
def answered(tmp_path):
    """A folder as `train.py` leaves it before scoring."""
    rows = digits.load("test", max_samples=12)
    letters = ["ABCD"[row["answer"]] for row in rows]
    wrong = [" B" if letter == "A" else " A" for letter in letters[9:]]
    predictions = [f" {letter}" for letter in letters[:9]] + wrong
    records = make_records(digits, rows, predictions, choices=[row["answer"] for row in rows])
    write_lines(tmp_path / "predictions.jsonl", records)
    (tmp_path / "results.json").write_text(json.dumps({"task": "digits", "size": 12, "seed": 3}))
    return tmp_path


def test_scoring_a_folder_writes_both_scores_and_can_be_repeated(answered, command):
    results = score_folder(answered)
    assert results["scores"]["average"] == 75 and results["scores_by_likelihood"]["average"] == 100
    assert (results["task"], results["size"], results["seed"]) == ("digits", 12, 3)
    written = (answered / "results.json").read_text()
    assert json.loads(written) == results
    code, output = command("score", answered)
    assert code == 0
    assert (answered / "results.json").read_text() == written
    greedy, likelihood = output.splitlines()
    assert greedy.startswith("scores: ") and "average 75.00" in greedy
    assert likelihood.startswith("scores_by_likelihood: ") and "average 100.00" in likelihood


def test_answers_without_a_choice_have_no_score_by_likelihood(answered):
    score_folder(answered)
    records = [json.loads(line) for line in (answered / "predictions.jsonl").read_text().splitlines()]
    del records[5]["choice"]
    write_lines(answered / "predictions.jsonl", records)
    assert "scores_by_likelihood" not in score_folder(answered)


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("predictions.jsonl", lambda text: text[:-20], r"predictions.jsonl, line 12 is not valid JSON"),
        ("predictions.jsonl", lambda text: text.replace('"index": 1,', '"index": 0,'), "each row of the split once"),
        ("predictions.jsonl", lambda text: text + "3\n", "line 13 has 3 in place of a JSON object"),
        (
            "predictions.jsonl",
            lambda text: text.replace('"prediction"', '"answered"', 1),
            "predictions.jsonl, line 1 has no `prediction`. A line needs answer, choices, expected, ",
        ),
        ("predictions.jsonl", lambda text: text.replace('"grade"', '"level"'), "jsonl, line 1 has no `grade`"),
        (
            "predictions.jsonl",
            lambda text: text + '{"prediction": null, ' + text.splitlines()[0].replace('"prediction"', '"said"')[1:],
            "predictions.jsonl, line 13 has the `prediction` None. Make it a text",
        ),
        ("predictions.jsonl", lambda text: "", "predictions.jsonl has no answers. Run the evaluation again"),
        ("results.json", lambda text: "{}", "results.json has no `size`, which `train.py` writes"),
        ("results.json", lambda text: text[:-1], "results.json is not valid JSON"),
    ],
)
def test_scoring_names_the_damaged_file(answered, name, change, message):
    text = (answered / name).read_text()
    (answered / name).write_text(change(text))
    with pytest.raises(ValueError, match=message):
        score_folder(answered)
    (answered / name).write_text(text + "\n")
    score_folder(answered)


def test_scoring_refuses_a_folder_that_lacks_an_answer_or_a_file(answered, command):
    lines = (answered / "predictions.jsonl").read_text().splitlines(keepends=True)
    (answered / "predictions.jsonl").write_text("".join(lines[:-1]))
    with pytest.raises(ValueError, match="11 predictions for a split of 12 rows"):
        score_folder(answered)
    (answered / "results.json").unlink()
    assert "results.json is missing" in command("score", answered)[1]


@pytest.mark.slow
def test_the_check_command_names_a_cache_folder_that_cannot_be_created():
    command = [sys.executable, "-m", "tasks", "check", "examples/vqa"]
    environment = {**os.environ, "HF_MODULES_CACHE": "/dev/null/modules"}
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode != 0
    assert "folder /dev/null/modules" in process.stderr and "HF_HOME" in process.stderr.splitlines()[-1]
    assert "cannot be read" not in process.stdout + process.stderr
