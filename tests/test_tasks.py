"""Tasks and metrics: what is asked, and how it is scored."""

from collections import Counter

import evaluate
import numpy as np
import pytest
from tiny import ROOT

from tasks import NAMES, digits, get_task, scienceqa


SCIENCEQA_COLUMNS = (
    "image question choices answer hint task grade subject topic category skill lecture solution".split()
)


@pytest.fixture(scope="module")
def rows():
    return {split: digits.load(split, size=1000) for split in ("train", "validation", "test")}


@pytest.mark.parametrize("name", NAMES)
def test_every_task_has_the_interface(name):
    task = get_task(name)
    for attribute in "COLUMNS ANSWER_PREFIX MAX_NEW_TOKENS load context prompt answer score".split():
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
    left, right = digits.load("test", size=50), digits.load("test", size=50)
    assert left.data.table == right.data.table
    assert digits.load("test", seed=1, size=50).data.table != left.data.table


def test_half_of_digits_is_text_and_the_rest_needs_the_image(rows):
    images = np.array(scienceqa.rows_with_image(rows["train"]))
    assert 0.4 < images.mean() < 0.6
    kinds = Counter(np.array(rows["train"]["skill"])[images])
    assert {"digit by colour", "colour by place", "count", "sum", "difference", "largest"} <= kinds.keys()
    hints = np.array([bool(hint) for hint in rows["train"]["hint"]])
    for has_image in (True, False):
        for has_hint in (True, False):
            assert ((images == has_image) & (hints == has_hint)).sum() > 20


def test_digits_teaches_what_there_is_before_what_follows_from_it():
    skills = [skill for skill in digits.load("train", size=2000)["skill"] if skill in digits.PICTURE_SKILLS]
    assert {"digit present", "colour present", "place present"} == set(skills[:100])
    assert {"count", "sum", "place by digit"} <= set(skills[-300:])


def test_correct_letters_of_digits_are_balanced(rows):
    images = np.array(scienceqa.rows_with_image(rows["train"]))
    counts = np.bincount(np.array(rows["train"]["answer"])[images], minlength=4) / images.sum()
    assert (abs(counts - 0.25) < 0.05).all()


def test_the_text_of_an_image_question_does_not_give_its_answer_away():
    """The best guess from question and options alone: the option that was right most often for this question."""
    train, test = digits.load("train", size=6000), digits.load("test", size=2000)

    def image_questions(rows):
        columns = rows.remove_columns("image")
        return [row for row, has_image in zip(columns, scienceqa.rows_with_image(rows)) if has_image]

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


@pytest.mark.parametrize("arguments", [{"split": "dev"}, {"split": "test", "size": 0}, {"split": "test", "path": "x"}])
def test_digits_refuses_what_it_does_not_have(arguments):
    with pytest.raises(ValueError, match="dev|at least 1|run time"):
        digits.load(**arguments)


# --- ScienceQA's prompt and score ---


ROW = {"question": "Why?", "hint": "", "choices": ["so", "not so"], "answer": 1}


def test_prompt_and_answer_are_the_papers():
    assert scienceqa.prompt(ROW, "") == "Question: Why?\nContext: N/A\nOptions: (A) so (B) not so"
    assert scienceqa.prompt(ROW, "It rains.") == "Question: Why?\nContext: It rains.\nOptions: (A) so (B) not so"
    assert scienceqa.answer(ROW) == "The answer is B."


def reference(answer=0, subject="natural science", grade="grade1", hint=False, image=False, num_choices=2):
    return {
        "answer": answer,
        "num_choices": num_choices,
        "subject": subject,
        "grade": grade,
        "has_hint": hint,
        "has_image": image,
    }


def metric():
    return evaluate.load(str(ROOT / "metrics" / "scienceqa"), keep_in_memory=True)


def test_the_nine_columns_count_their_own_questions():
    references = [
        reference(0, "natural science", "grade1", hint=True),
        reference(1, "natural science", "grade7", image=True),
        reference(0, "social science", "grade6", hint=True, image=True),
        reference(1, "language science", "grade12"),
    ]
    scores = metric().compute(predictions=[" A", " A", " B", " B."], references=references)
    assert scores == {
        "NAT": 50,
        "SOC": 0,
        "LAN": 100,
        "TXT": 50,
        "IMG": 0,
        "NO": 100,
        "G1-6": 50,
        "G7-12": 50,
        "average": 50,
        "unparsed": 0,
        "count": 4,
    }


@pytest.mark.parametrize(
    "text, choice",
    [(" A", 0), ("B", 1), (" (B)", 1), (" B.", 1), ("A\n", 0), ("And", None), ("C", None), ("", None), (" b", None)],
)
def test_an_answer_that_names_no_option_is_counted_as_such(text, choice):
    scores = metric().compute(predictions=[text], references=[reference(answer=choice or 0)])
    assert scores["unparsed"] == (100 if choice is None else 0)
    assert scores["average"] == (0 if choice is None else 100)
    assert scores["SOC"] is None
