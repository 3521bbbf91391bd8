"""Metrics: how predictions are counted, by hand or by the library's own scorers."""

import evaluate
import pytest
from tiny import ROOT


def metric(name):
    return evaluate.load(str(ROOT / "metrics" / name), keep_in_memory=True)


# --- ScienceQA ---


def reference(answer=0, subject="natural science", grade="grade1", hint=False, image=False, num_choices=2):
    return {
        "answer": answer,
        "num_choices": num_choices,
        "subject": subject,
        "grade": grade,
        "has_hint": hint,
        "has_image": image,
    }


def test_the_nine_columns_count_their_own_questions():
    references = [
        reference(0, "natural science", "grade1", hint=True),
        reference(1, "natural science", "grade7", image=True),
        reference(0, "social science", "grade6", hint=True, image=True),
        reference(1, "language science", "grade12"),
    ]
    scores = metric("scienceqa").compute(predictions=[" A", " A", " B", " B."], references=references)
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


def test_another_grade_counts_in_no_grade_column():
    references = [reference(0, grade=grade) for grade in ("kindergarten", "grade13", "grade6")]
    scores = metric("scienceqa").compute(predictions=[" A", " A", " B"], references=references)
    assert (scores["G1-6"], scores["G7-12"], scores["average"]) == (0, None, pytest.approx(200 / 3))


@pytest.mark.parametrize(
    "text, choice",
    [
        (" A", 0),
        ("B", 1),
        (" (B)", 1),
        (" B.", 1),
        ("A\n", 0),
        ("And", None),
        (" A cat", None),
        ("A, or", 0),
        ("C", None),
        ("", None),
        (" b", None),
    ],
)
def test_an_answer_that_names_no_option_is_counted_as_such(text, choice):
    scores = metric("scienceqa").compute(predictions=[text], references=[reference(answer=choice or 0)])
    assert scores["unparsed"] == (100 if choice is None else 0)
    assert scores["average"] == (0 if choice is None else 100)
    assert scores["SOC"] is None


# --- COCO Captions ---


CAPTIONS = ["A man rides a horse.", "two dogs on a beach", "a red bus, parked"]
REFERENCES = [
    ["A man riding a horse.", "Someone rides a brown horse!"],
    ["Two dogs are on the beach.", "dogs at the sea", "Two dogs playing on a beach"],
    ["a bus that is parked"],
]


def test_bleu_of_a_hand_counted_caption():
    # 4 of 5 words and 2 of 4 pairs are in the reference, which is as long: sqrt(0.8 * 0.5) for BLEU-2
    scores = metric("coco_captions").compute(
        predictions=["a man rides a horse"], references=[["a man feeds a horse"]], size=1
    )
    assert scores["BLEU-1"] == pytest.approx(80)
    assert scores["BLEU-2"] == pytest.approx(100 * (0.8 * 0.5) ** 0.5)
    assert scores["scale"] == 100 and scores["count"] == 1


def test_captions_are_scored_as_the_coco_evaluation_scores_them():
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    tokenize = PTBTokenizer().tokenize
    candidates = tokenize({index: [{"caption": caption}] for index, caption in enumerate(CAPTIONS)})
    references = tokenize({i: [{"caption": caption} for caption in group] for i, group in enumerate(REFERENCES)})
    expected = {f"BLEU-{n}": 100 * v for n, v in enumerate(Bleu(4).compute_score(references, candidates, 0)[0], 1)}
    expected["CIDEr"] = 100 * Cider().compute_score(references, candidates)[0]
    scores = metric("coco_captions").compute(predictions=CAPTIONS, references=REFERENCES)
    assert scores == pytest.approx({**expected, "scale": 100, "count": 3})
    assert 0 < scores["BLEU-4"] < scores["BLEU-1"] < 100 and scores["CIDEr"] > 0


def test_captions_that_equal_a_reference_have_bleu_100():
    scores = metric("coco_captions").compute(
        predictions=[group[0].upper() for group in REFERENCES], references=REFERENCES
    )
    assert [scores[f"BLEU-{n}"] for n in (1, 2, 3, 4)] == pytest.approx([100] * 4)


@pytest.mark.parametrize("caption", ["", "two\ndogs", "two\rdogs", "two\u2028dogs", "two\x85dogs", "two\x0cdogs"])
def test_an_empty_caption_or_a_line_break_in_one_shifts_no_other(caption):
    predictions, references = [caption, *CAPTIONS], [["two dogs"], *REFERENCES]
    scores = metric("coco_captions").compute(predictions=predictions, references=references)
    plain = metric("coco_captions").compute(
        predictions=["two dogs" if caption else "", *CAPTIONS], references=references
    )
    assert scores == plain and scores["BLEU-1"] > 50


def test_a_java_that_does_not_run_is_named(tmp_path, monkeypatch):
    (tmp_path / "java").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "java").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(RuntimeError, match="java -version"):
        metric("coco_captions").compute(predictions=CAPTIONS, references=REFERENCES)


# --- both ---


def test_another_number_of_predictions_than_the_split_has_is_refused():
    with pytest.raises(ValueError, match="2 predictions for a split of 3 rows"):
        metric("scienceqa").compute(predictions=[" A", " B"], references=[reference(), reference()], size=3)
    with pytest.raises(ValueError, match="3 predictions for a split of 2 rows"):
        metric("coco_captions").compute(predictions=CAPTIONS, references=REFERENCES, size=2)
