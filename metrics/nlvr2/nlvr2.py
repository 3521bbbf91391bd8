"""Accuracy and consistency on NLVR2, as in its official script."""

import datasets
import evaluate


class NLVR2(evaluate.Metric):
    """
    predictions: what the model said, one text per statement and pair of images; "True" or "False" at its start.
    references: the label, "True" or "False", and the identifier, "split-set-pair-sentence".
    size: the number of rows in the split, if any other number of predictions is an error.

    Returns, in per cent: `accuracy`; `consistency`, the share of statements that are judged correctly for all of
    their pairs; and `unparsed`, the share of predictions that are neither, which count as wrong. `count` is the number
    scored.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Suhr et al., A Corpus for Reasoning about Natural Language Grounded in Photographs, ACL 2019",
            inputs_description=NLVR2.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {"label": datasets.Value("string"), "identifier": datasets.Value("string")},
                }
            ),
        )

    def _compute(self, predictions, references, size=None):
        if size is not None and len(predictions) != size:
            raise ValueError(
                f"There are {len(predictions)} predictions for a split of {size} rows. Score each row once."
            )
        said = [parse(text) for text in predictions]
        hits, statements = [], {}
        for label, row in zip(said, references):
            hits.append(label == row["label"])
            split, number, _, sentence = row["identifier"].split("-")
            statements.setdefault((split, number, sentence), []).append(hits[-1])
        return {
            "accuracy": 100 * sum(hits) / len(hits),
            "consistency": 100 * sum(map(all, statements.values())) / len(statements),
            "unparsed": 100 * said.count(None) / len(said),
            "count": len(hits),
        }


def parse(text):
    """The label that a text begins with, in any case; None if it begins with another word."""
    word = (text.split() or [""])[0].rstrip(".,;!").capitalize()
    return word if word in ("True", "False") else None
