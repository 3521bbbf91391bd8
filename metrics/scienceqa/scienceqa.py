"""Accuracy on ScienceQA, in the nine columns of its table."""

import re

import datasets
import evaluate


SUBJECTS = {"NAT": "natural science", "SOC": "social science", "LAN": "language science"}
GRADES = [f"grade{number}" for number in range(1, 13)]


class ScienceQA(evaluate.Metric):
    """
    predictions: what the model said after "The answer is", one text per question.
    references: the question's facts, see `_info`.
    size: the number of questions in the split, if any other number of predictions is an error.

    Returns accuracies in per cent, `None` where the split has no such question: NAT, SOC, LAN by subject; TXT with a
    hint, IMG with an image, NO with neither; G1-6 and G7-12 by grade; `average` over all questions, also those of
    another grade. `unparsed` is the share of predictions that name no option, also in per cent; they count as wrong.
    `count` is the number scored.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Lu et al., Learn to Explain, NeurIPS 2022, arXiv 2209.09513",
            inputs_description=ScienceQA.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "answer": datasets.Value("int64"),
                        "num_choices": datasets.Value("int64"),
                        "subject": datasets.Value("string"),
                        "grade": datasets.Value("string"),
                        "has_hint": datasets.Value("bool"),
                        "has_image": datasets.Value("bool"),
                    },
                }
            ),
        )

    def _compute(self, predictions, references, size=None):
        if size is not None and len(predictions) != size:
            raise ValueError(
                f"There are {len(predictions)} predictions for a split of {size} rows. Score each row once."
            )
        chosen = [parse(text, row["num_choices"]) for text, row in zip(predictions, references)]
        correct = [choice == row["answer"] for choice, row in zip(chosen, references)]

        def accuracy(belongs):
            hits = [hit for hit, row in zip(correct, references) if belongs(row)]
            return 100 * sum(hits) / len(hits) if hits else None

        scores = {
            name: accuracy(lambda row, subject=subject: row["subject"] == subject)
            for name, subject in SUBJECTS.items()
        }
        scores["TXT"] = accuracy(lambda row: row["has_hint"])
        scores["IMG"] = accuracy(lambda row: row["has_image"])
        scores["NO"] = accuracy(lambda row: not row["has_hint"] and not row["has_image"])
        scores["G1-6"] = accuracy(lambda row: row["grade"] in GRADES[:6])
        scores["G7-12"] = accuracy(lambda row: row["grade"] in GRADES[6:])
        scores["average"] = accuracy(lambda row: True)
        scores["unparsed"] = 100 * sum(choice is None for choice in chosen) / len(chosen)
        scores["count"] = len(chosen)
        return scores


def parse(text, num_choices):
    """The option that a text names, or None: a capital letter at its start that no word follows."""
    match = re.match(r"\s*\(?([A-Z])(?=[.):,\n]|\s*$)", text)
    index = ord(match[1]) - ord("A") if match else None
    return index if index is not None and index < num_choices else None
