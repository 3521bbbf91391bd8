"""BLEU and CIDEr of image captions, by the COCO caption evaluation."""

import datasets
import evaluate
from pycocoevalcap.bleu.bleu import Bleu
from pycocoevalcap.cider.cider import Cider
from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer


class CocoCaptions(evaluate.Metric):
    """
    predictions: one caption per image.
    references: all captions that people gave to the image, one list per image.
    size: the number of images in the split, if any other number of predictions is an error.

    Returns BLEU-1 to BLEU-4 and CIDEr after PTB tokenization, all multiplied by 100, as in papers (`scale`). The
    maximum of BLEU is 100, that of CIDEr 1000; the latter weighs n-grams by how rare they are in the given references.
    `count` is the number of images scored. Needs Java.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Chen et al., Microsoft COCO Captions, 2015, arXiv 1504.00325",
            inputs_description=CocoCaptions.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": datasets.List(datasets.Value("string")),
                }
            ),
        )

    def _compute(self, predictions, references, size=None):
        if size is not None and len(predictions) != size:
            raise ValueError(
                f"There are {len(predictions)} predictions for a split of {size} rows. Score each row once."
            )
        candidates = tokenize([[caption] for caption in predictions])
        references = tokenize(references)
        bleu, _ = Bleu(4).compute_score(references, candidates, verbose=0)
        cider, _ = Cider().compute_score(references, candidates)
        scores = {f"BLEU-{order}": 100 * float(value) for order, value in enumerate(bleu, 1)}
        return {**scores, "CIDEr": 100 * float(cider), "scale": 100, "count": len(predictions)}


def tokenize(groups):
    """Lists of captions -> {index of the list: its captions as tokens with spaces between}."""
    # One caption a line: pycocoevalcap replaces line feeds alone, and any other break would shift what follows
    captions = {index: [{"caption": " ".join(text.split())} for text in group] for index, group in enumerate(groups)}
    tokens = PTBTokenizer().tokenize(captions)
    if [len(group) for group in tokens.values()] != [len(group) for group in groups]:
        raise RuntimeError(
            f"The PTB tokenizer returned {sum(map(len, tokens.values()))} of {sum(map(len, groups))} captions. It is "
            "a Java program: see its output above, and check that `java -version` works."
        )
    return tokens
