"""
Your own questions, with or without an image, with options or a free answer. Read from JSON Lines, JSON, CSV or
Parquet, from a folder that `save_to_disk` wrote, or from the Hub, see docs/own-data.md and examples/vqa:

    {"question": "What shape is shown?", "image": "images/circle.png", "answer": "a circle"}
    {"question": "Which is larger?", "choices": ["a hen", "a cow"], "answer": "a cow", "context": "Both are adult."}

`question` is a text. `answer` is a text, a number, a class label, or a list of texts, which all count as correct and
of which the first is trained on (such a list may also be a separate column, `answers`). The other columns may be null
or missing: `image` is an image or a file name relative to the folder of the data, and `images` is a list of them;
`choices` are 2 to 26 texts, one of which is the answer; `context` is a text, the only one that may be shortened. Other
columns are ignored. `python -m tasks check FOLDER` lists invalid rows.
"""

import math
import re
import reprlib
import sys
import unicodedata
from functools import partial

import numpy as np
from datasets import Features, List, Value

from tasks import _sources, _values, check_size, scienceqa


COLUMNS = ("image", "question", "answer")
ANSWER_PREFIX = scienceqa.ANSWER_PREFIX
MAX_NEW_TOKENS = 20
CARD = scienceqa.CARD

FEATURES = Features(
    {**_values.IMAGE_FEATURES, "question": Value("string"), "choices": List(Value("string"))}
    | {"answer": Value("string"), "answers": List(Value("string")), "context": Value("string")}
)
FIELDS = {
    "image": ("images", "image", "file_name"),  # the last is the name in `metadata.jsonl` of an image folder
    "question": ("question",),
    "choices": ("choices",),
    "answer": ("answer", "answers"),
    "answers": ("answers",),
    "context": ("context",),
}
REQUIRED = ("question", "answer")
LOST = ("history", "system", "system_prompt", "tools")
NUMBER = r"(?:[$€£¥₹₩₽] *)?\.?[\d¼-¾⅐-⅞]"  # how one begins: 5, .5, $5, ½
# Punctuation that is a part of an answer
SIGNS = "|".join(
    (
        rf"[-–](?={NUMBER})",
        r"""(?<![^\s([{<>=+*/^,"'])[-–](?=[^\s–-])""",  # at the start of a word: -x, (-√2), y=-x
        r"(?<=\w)[-–](?![^\s.,;:!?)\]}])",  # at its end: A-, Cl-
        r"[.,:/](?=\d)",  # 3.5, 10:30, 1/2
        r"(?<=\d)[^\w\s]+(?=\d)|(?<=\d)_(?=\d)",  # 2*3
        r"(?<=[\w)])\*\*(?=[\w(-])",  # x**2, but not **red**
        r"(?<=\d)!",
        r"[#%‰]",
    )
)


load = partial(_sources.load, sys.modules[__name__])


def parse(record: dict, num_images: int | None) -> tuple[dict, list[str]]:
    """A row without its images, and the faults of its texts."""
    question, in_question = _values.remove_markers(record["question"])
    context, in_context = _values.remove_markers(record["context"])
    answer, answers, answer_faults = read_answers(record["answer"], record["answers"])
    choices = numbers_to_texts(_values.as_list(record["choices"]))
    if isinstance(context, str) and not context.strip():
        context = None
    faults = _values.find_text_faults("`question`", question) + answer_faults
    faults += _values.find_marker_faults("`question` and `context` have", in_question + in_context, num_images)
    texts = [text for value in (answer, answers, choices) for text in (value if isinstance(value, list) else [value])]
    if marked := [text for text in texts if _values.remove_markers(text)[1]]:
        faults.append(f"the answer or option {marked[0]!r} has `<image>`, which only a question may have. Remove it.")
    faults += _values.find_text_faults("`context`", context) if context is not None else []
    faults += find_choice_faults(choices, [answer, *(other for other in answers or () if other != answer)])
    faults += find_index_faults(choices, record["answer"])
    row = {"question": question, "choices": choices or None, "answer": answer, "answers": answers, "context": context}
    return row, faults


def read_answers(answer, answers) -> tuple[object, object, list[str]]:
    """
    The answer that is trained on, all correct answers (`None` if there is only one), and what is wrong with them.

    Args:
        answer: value of the column `answer`, or that of `answers` if there is no such column.
        answers: value of the column `answers`.
    """
    if answer == answers:  # there is one column
        given = {"answers": answers}
        answer, answers = _values.as_list(answers), None
    else:
        given = {"answer": answer, "answers": answers}
        if is_list_of_texts(decoded := _values.as_list(answer)):  # another list may be an answer, such as [0.5, 1]
            answer = decoded
        answers = _values.as_list(answers)
    is_separate = answers is not None
    if is_separate and not isinstance(answers, list | dict):
        answers = [answers]
    if isinstance(answer, list):
        answers = [*answer, *(other for other in answers or () if other not in answer)]
        answer = answer[0] if answer else None
    faults = _values.find_text_faults("`answer`", number_to_text(answer))
    if isinstance(answer, float) and math.isinf(answer):
        faults.append(f"`answer` is {answer}. Give a finite number, or a text in quotes.")
    answer, answers = number_to_text(answer), numbers_to_texts(answers)
    for name, value in given.items():
        if isinstance(value, str) and re.match(r"\[\s*['\"]", value.strip()) and _values.as_list(value) is value:
            faults.append(f'`{name}` is {reprlib.repr(value)}, which is not JSON. Write a list as ["red", "blue"].')
    if isinstance(answers, dict) or not all(map(_values.is_text, answers or ())):
        faults.append(f"`answers` is {reprlib.repr(answers)}. Make it a list of texts, none of them blank.")
    elif is_separate and answers and _values.is_text(answer) and normalise(answer) not in map(normalise, answers):
        faults.append(f"`answer` is {answer!r}, which is none of `answers`, {reprlib.repr(answers)}. Add it to them.")
    return answer, answers, faults


def is_list_of_texts(value) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(element, str) for element in value)


def number_to_text(value):
    """Converts a number to a text (1e-05 to "0.00001"), and NaN to `None`. Other values are returned unchanged."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    if isinstance(value, int):
        return str(value)
    return np.format_float_positional(value, trim="-") if value == value else None


def numbers_to_texts(values):
    """Converts the numbers in a list to texts. Other values are returned unchanged."""
    return [number_to_text(value) for value in values] if isinstance(values, list) else values


def find_index_faults(choices, answer) -> list[str]:
    """A fault if the answer is a number that can be read as an index or as an option."""
    if not isinstance(choices, list) or isinstance(answer, bool | str) or number_to_text(answer) not in choices:
        return []
    index = int(answer)
    if index != answer or not 0 <= index < len(choices) or choices[index] == number_to_text(answer):
        return []
    return [
        f"`answer` is the number {answer}, which may be the option {number_to_text(answer)!r} or the index of the "
        f"option {choices[index]!r}. Write the option as a text, in quotes."
    ]


def find_choice_faults(choices, answers: list) -> list[str]:
    if not choices and isinstance(choices, list | None):  # in Arrow, an empty list may mean none
        return []
    if not isinstance(choices, list) or not all(map(_values.is_text, choices)):
        advice = 'Make it a list of texts, none of them blank, such as ["red", "blue"] with double quotes in CSV.'
        return [f"`choices` is {reprlib.repr(choices)}. {advice}"]
    faults = []
    if not 2 <= len(choices) <= 26:
        faults.append(f"`choices` has {len(choices)} texts. Give 2 to 26 of them, or none for a free answer.")
    bare = [choice.strip() for choice in choices]
    if repeated := sorted({choice for choice in bare if bare.count(choice) > 1}):
        faults.append(f"`choices` repeats {', '.join(map(repr, repeated))}. Give each option once.")
    wrong = [answer for answer in answers if _values.is_text(answer) and answer not in choices]
    return faults + [
        f"`answer` is {answer!r}, which is none of {choices}. Write it exactly as in `choices`." for answer in wrong
    ]


def context(row: dict) -> str:
    return row.get("context") or ""


def prompt(row: dict, context: str) -> str:
    if row.get("choices"):
        return scienceqa.prompt(row, context)
    return f"Question: {row['question']}\nContext: {context or 'N/A'}"


def answer(row: dict) -> str:
    if row.get("choices"):
        return scienceqa.answer_of(row["choices"].index(row["answer"]))
    answer = row["answer"].strip()
    return f"The answer is {answer.removesuffix('.') or answer}."


def options(row: dict) -> list[str] | None:
    return scienceqa.options(row) if row.get("choices") else None


def score(records: list[dict], size: int) -> dict[str, float | None]:
    """
    Accuracy in per cent of the rows with and without an image, with options and with a free answer, and of all
    (`average`). With options, the letter is compared; free answers are compared after `normalise`, and each of
    `answers` is correct. `unparsed` is the percentage of predictions that name no option or are empty; they count as
    wrong.
    """
    from metrics.scienceqa.scienceqa import parse

    check_size(records, size)
    said, hits = [], []
    for record in records:
        choices, text, wanted = record.get("choices"), record["prediction"], record["answer"]
        if not choices:
            said.append(normalise(text) or None)
            hits.append(said[-1] in map(normalise, record.get("answers") or [wanted]))
        else:
            said.append(parse(text, len(choices)))
            hits.append(said[-1] is not None and choices[said[-1]] in (record.get("answers") or [wanted]))

    def accuracy(belongs):
        part = [hit for hit, record in zip(hits, records) if belongs(record)]
        return 100 * sum(part) / len(part) if part else None

    return {
        "image": accuracy(lambda record: record["has_image"]),
        "no image": accuracy(lambda record: not record["has_image"]),
        "choices": accuracy(lambda record: record.get("choices")),
        "free": accuracy(lambda record: not record.get("choices")),
        "average": accuracy(lambda record: True),
        "unparsed": 100 * sum(text is None for text in said) / len(said),
        "count": len(said),
    }


def normalise(text: str) -> str:
    """Lower case, without punctuation and articles (" The red car." -> "red car"), unless nothing is left."""
    text = unicodedata.normalize("NFC", text).lower().strip()
    text = re.sub(r"(?<=\d),(?=\d{3}(?!\d))", "", text.removesuffix(".") or text)  # as in VQAv2's script
    text = re.sub(rf"(?<=\d) +([-–+*/:=^×÷]+) +(?={NUMBER})", r"\1", text)  # "1 - 2" -> "1-2"
    text = re.sub(rf"(?<!\w)([-–−+]) +(?={NUMBER})", r"\1", text)  # "- 5" -> "-5"
    places = {place for sign in re.finditer(SIGNS, text) for place in range(*sign.span())}
    kept = [
        sign for place, sign in enumerate(text) if place in places or not unicodedata.category(sign).startswith("P")
    ]
    words = "".join(kept).split() or text.split()
    return " ".join([word for word in words if word not in ("a", "an", "the")] or words)
