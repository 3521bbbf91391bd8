"""Accuracy on VQAv2 over the ten answers of each question, equal to the official script's."""

import re

import datasets
import evaluate


NUMBERS = dict(zip("none zero one two three four five six seven eight nine ten".split(), [0, *range(11)]))
ARTICLES = ("a", "an", "the")
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
# The official table has each of these words under its spellings that lack one apostrophe: "hed've" and "he'dve" are
# "he'd've". Its entries with a capital letter are never met, since words are in lower case by then.
CONTRACTIONS = """
    'ow's'at 'twas ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
    haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've
    mustn't needn't not've o'clock oughtn't shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll
    somebody's someone'd someone'd've someone'll someone's something'd something'd've something'll that's there'd
    there'd've there're there's they'd they'd've they'll they're they've wasn't we'd've we've weren't what'll what're
    what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't
    would've wouldn't wouldn't've y'all y'all'd've y'all'll you'd you'd've you'll you're you've
""".split()
SPELLINGS = {
    word[:place] + word[place + 1 :]: word for word in CONTRACTIONS for place, sign in enumerate(word) if sign == "'"
} | {"somebody'd": "somebodyd"}


class VQAv2(evaluate.Metric):
    """
    predictions: what the model said, one text per question.
    references: the answers that people gave, ten per question, and the type of the answer.
    size: the number of questions in the split, if any other number of predictions is an error.

    Returns accuracies in per cent: of each type of answer ("yes/no", "number", "other"), `None` where the split has
    none, and `average` over all questions. `count` is the number scored.
    """

    def _info(self):
        return evaluate.MetricInfo(
            description=__doc__,
            citation="Goyal et al., Making the V in VQA Matter, CVPR 2017, arXiv 1612.00837",
            inputs_description=VQAv2.__doc__,
            features=datasets.Features(
                {
                    "predictions": datasets.Value("string"),
                    "references": {
                        "answers": datasets.List(datasets.Value("string")),
                        "answer_type": datasets.Value("string"),
                    },
                }
            ),
        )

    def _compute(self, predictions, references, size=None):
        if size is not None and len(predictions) != size:
            raise ValueError(
                f"There are {len(predictions)} predictions for a split of {size} rows. Score each row once."
            )
        rates = [accuracy(text, row["answers"]) for text, row in zip(predictions, references)]
        scores = {}
        for kind in ("yes/no", "number", "other"):
            part = [rate for rate, row in zip(rates, references) if row["answer_type"] == kind]
            scores[kind] = 100 * sum(part) / len(part) if part else None
        return {**scores, "average": 100 * sum(rates) / len(rates), "count": len(rates)}


def accuracy(prediction, answers):
    """
    How far a prediction agrees with the answers that people gave: min(1, matching answers / 3), averaged over all
    subsets that leave out one answer.
    """
    prediction, *answers = (re.sub(r"[\n\t]", " ", text).strip() for text in (prediction, *answers))
    if len(set(answers)) > 1:  # where all agree, the official script compares texts as they are
        prediction, *answers = map(normalise, (prediction, *answers))
    number = answers.count(prediction)
    with_it, without_it = min(1, number / 3), min(1, (number - 1) / 3)  # subsets that have all `number`, or one less
    return ((len(answers) - number) * with_it + number * without_it) / len(answers)


def normalise(text):
    """Without punctuation, capitals and articles, with digits for number words and apostrophes in contractions."""
    has_comma_in_number = re.search(r"\d,\d", text)
    kept = text
    for sign in PUNCTUATION:
        stands_beside_space = f"{sign} " in text or f" {sign}" in text
        kept = kept.replace(sign, "" if stands_beside_space or has_comma_in_number else " ")
    kept = re.sub(r"\.(?!\d)", "", kept, count=32)  # the official script passes a flag as `count`
    words = [str(NUMBERS.get(word, word)) for word in kept.lower().split()]
    return " ".join(SPELLINGS.get(word, word) for word in words if word not in ARTICLES)
