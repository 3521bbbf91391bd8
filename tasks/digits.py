"""Digits: questions about scenes of real handwritten digits, in the columns of `derek-thomas/ScienceQA`.

The 1,797 scans of `sklearn.datasets.load_digits` are divided so that no two splits share a scan. A scene consists of
one to four scans with different digits and colours in the corners of a noisy picture. About half of the questions are
about such a picture; the others have a story or nothing as their context.

Every question is generated in this order: four options, then the correct one among them, then a scene for which it is
correct. Given the question and the options, all options are therefore equally likely: without the picture, the
accuracy is 25 %.
"""

import io
from collections.abc import Iterator
from functools import cache, partial
from pathlib import Path

import numpy as np
from datasets import Dataset, IterableDataset
from datasets.fingerprint import Hasher
from PIL import Image as PILImage
from sklearn.datasets import load_digits

from tasks.scienceqa import (  # noqa: F401
    ANSWER_PREFIX,
    CARD,
    COLUMNS,
    FEATURES,
    MAX_NEW_TOKENS,
    answer,
    context,
    options,
    prompt,
    score,
)


SIZES = {"train": 52000, "validation": 500, "test": 1000}
SCANS = {"train": 0.7, "validation": 0.1, "test": 0.2}  # share of each digit's scans
SIDE = 64  # of a picture, in pixels

COLOURS = {
    "red": (225, 45, 45),
    "orange": (240, 140, 30),
    "yellow": (235, 225, 60),
    "green": (60, 190, 70),
    "cyan": (60, 215, 220),
    "blue": (65, 90, 235),
    "purple": (180, 60, 215),
    "white": (235, 235, 235),
}
PLACES = ("northwest", "northeast", "southwest", "southeast")  # row-major
POOLS = {"digit": tuple("0123456789"), "colour": tuple(COLOURS), "place": PLACES}

ASK = {
    ("colour", "digit"): "Which digit is {}?",
    ("place", "digit"): "Which digit is in the {}?",
    ("digit", "colour"): "What colour is the {}?",
    ("place", "colour"): "What colour is the digit in the {}?",
    ("digit", "place"): "Where is the {}?",
    ("colour", "place"): "Where is the {} digit?",
    (None, "digit"): "Which digit is there?",
    (None, "colour"): "Which colour is there?",
    (None, "place"): "Where is a digit?",
}
HINTS = (
    "The picture shows digits written by hand.",
    "Each digit has a colour of its own.",
    "The digits differ in size.",
    "The colours may look a little pale.",
)
LECTURES = {
    "seeing": "Things differ in what they are and in what colour they have.",
    "maps": "On a map north is up, south is down, west is left and east is right.",
    "numbers": "Numbers can be counted, put in order, added and subtracted.",
    "reading": "A text may hold more than what is asked for.",
    "words": "Words can be grouped by their meaning.",
}
PEOPLE = ("Ana", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gus", "Hana")
GOODS = ("apples", "pears", "books", "coins", "shells", "stamps")
SPELLED = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
OPPOSITES = (
    "top bottom", "left right", "large small", "day night", "hot cold", "open closed", "early late", "full empty",
    "fast slow", "wet dry", "old new", "high low", "light dark", "loud quiet", "near far", "hard soft",
)  # fmt: skip
KINDS = {
    "a colour": tuple(COLOURS),
    "a number": SPELLED,
    "an animal": ("cat", "dog", "horse", "sheep", "mouse", "duck"),
    "a fruit": ("apple", "pear", "plum", "cherry", "grape", "fig"),
}
# General knowledge: value -> things, the question about the value, the question about the thing
KNOWN = {
    "spelling": (
        {str(digit): (word,) for digit, word in enumerate(SPELLED)},
        "Which digit is {}?",
        "How do you spell {}?",
    ),
    "colours": (
        {
            "red": ("tomato", "cherry", "rose"),
            "orange": ("carrot", "pumpkin", "fox"),
            "yellow": ("banana", "lemon", "sun"),
            "green": ("grass", "frog", "leaf"),
            "cyan": ("lagoon", "glacier", "mint"),
            "blue": ("sky", "sea", "whale"),
            "purple": ("plum", "violet", "grape"),
            "white": ("snow", "milk", "swan"),
        },
        "What colour is the {}?",
        "Which thing is {}?",
    ),
    "countries": (
        {
            "northwest": ("Ireland", "Iceland", "Scotland", "Wales"),
            "northeast": ("Finland", "Estonia", "Latvia", "Russia"),
            "southwest": ("Spain", "Portugal", "Andorra", "Morocco"),
            "southeast": ("Greece", "Turkey", "Cyprus", "Bulgaria"),
        },
        "Where is {}?",
        "Which country is in the {}?",
    ),
    "legs": (
        {
            "0": ("snake", "fish", "worm"),
            "2": ("duck", "hen", "goose"),
            "4": ("dog", "cat", "horse"),
            "6": ("bee", "ant", "fly"),
            "8": ("spider", "crab", "tick"),
        },
        "How many legs has the {}?",
        "Which animal has {} legs?",
    ),
}


# Questions. Each maker returns the question, the options with the correct one first, the solution and the context: the
# marks of a scene, a story or an empty string. A mark is a dict with a digit, its colour and its place.


def draw_marks(rng, digits, size):
    """The first `size` of `digits` as marks with different colours and places."""
    colours, places = rng.permutation(POOLS["colour"]), rng.permutation(PLACES)
    return [{"digit": str(d), "colour": str(c), "place": str(p)} for d, c, p in zip(digits[:size], colours, places)]


def attribute(rng, given, wanted):
    # The scene may contain the other options, so it is not enough to see which values occur
    values = {name: rng.permutation(pool)[:4].tolist() for name, pool in POOLS.items()}
    marks = [dict(zip(values, mark)) for mark in zip(*values.values())][: rng.integers(1, 5)]
    solution = f"The {given} is {marks[0][given]} and the {wanted} is {marks[0][wanted]}."
    return ASK[given, wanted].format(marks[0][given]), values[wanted], solution, marks


def presence(rng, wanted):
    values = {name: rng.permutation(pool).tolist() for name, pool in POOLS.items()}
    choices = values[wanted][:4]
    del values[wanted][1:4]  # the scene contains none of the other options
    marks = [dict(zip(values, mark)) for mark in zip(*values.values())][: rng.integers(1, 5)]
    return ASK[None, wanted], choices, f"There is {choices[0]}.", marks


def count(rng):
    choices = 1 + rng.permutation(4)
    marks = draw_marks(rng, rng.permutation(10), choices[0])
    return "How many digits are there?", choices, f"The number of digits is {choices[0]}.", marks


def extreme(rng, name):
    choices = 1 + rng.permutation(8)[:4]  # 1 to 8: each has a smaller and a larger digit next to it
    beyond = {"largest": range(choices[0]), "smallest": range(choices[0] + 1, 10)}[name]
    others = sorted(rng.permutation(beyond), key=lambda digit: digit not in choices)
    marks = draw_marks(rng, [choices[0], *others], rng.integers(2, 5))
    return f"Which digit is the {name}?", choices, f"The {name} digit is {choices[0]}.", marks


def pair(rng, name):
    lowest, reach, sign = {"sum": (1, 4, 1), "difference": (1, 4, -1)}[name]
    choices = lowest + rng.integers(reach) + rng.permutation(6)[:4]
    pairs = [(a, b) for a in range(10) for b in range(10) if a != b and a + sign * b == choices[0]]
    marks = draw_marks(rng, pairs[rng.integers(len(pairs))], 2)
    return f"What is the {name} of the two digits?", choices, f"The {name} is {choices[0]}.", marks


def arithmetic(rng):
    choices = rng.permutation(10)[:4]
    part = rng.integers(choices[0] + 1)
    whole = choices[0] + rng.integers(10 - choices[0])
    sum = rng.choice([f"{part} + {choices[0] - part}", f"{whole} - {whole - choices[0]}"])
    return f"What is {sum}?", choices, f"{sum} = {choices[0]}.", ""


def compare(rng):
    name = rng.choice(["largest", "smallest"])
    choices = sorted(rng.permutation(10)[:4], reverse=name == "largest")
    return f"Which number is the {name}?", choices, f"The {name} number is {choices[0]}.", ""


def known(rng, name):
    things, ask_value, ask_thing = KNOWN[name]
    values = rng.permutation(list(things))[:4]
    names = [rng.choice(things[value]) for value in values]
    solution = f"What goes with {names[0]} is {values[0]}."
    if rng.random() < 0.5:
        return ask_value.format(names[0]), values, solution, ""
    return ask_thing.format(values[0]), names, solution, ""


def opposite(rng):
    pairs = [rng.permutation(pair.split()) for pair in rng.permutation(OPPOSITES)[:4]]
    word, right = pairs[0]
    return f"What is the opposite of {word}?", [b for _, b in pairs], f"The opposite of {word} is {right}.", ""


def meaning(rng):
    names = rng.permutation(list(KINDS))
    choices = [rng.choice(KINDS[name]) for name in names]
    return f"Which word is {names[0]}?", choices, f"The {choices[0]} is {names[0]}.", ""


def ownership(rng):
    people, numbers, goods = rng.permutation(PEOPLE)[:4], rng.permutation(10)[:4], rng.choice(GOODS)
    story = f"Of {goods} {', '.join(f'{who} has {n}' for who, n in sorted(zip(people, numbers)))}."
    solution = f"{people[0]} has {numbers[0]} {goods}."
    if rng.random() < 0.5:
        return f"Who has {numbers[0]} {goods}?", people, solution, story
    return f"How many {goods} does {people[0]} have?", numbers, solution, story


def describe(rng, marks):
    """The scene in words, mark by mark, in random order."""
    return ", ".join("{colour} {digit} {place}".format(**mark) for mark in rng.permutation(marks)) + "."


NATURAL, SOCIAL, LANGUAGE = "natural science", "social science", "language science"

# skill: (maker, share of the rows in %, subject, topic, category, grade)
PICTURE_SKILLS = {
    "digit present": (partial(presence, wanted="digit"), 8, NATURAL, "seeing", "Presence", 1),
    "colour present": (partial(presence, wanted="colour"), 8, NATURAL, "seeing", "Presence", 1),
    "place present": (partial(presence, wanted="place"), 4, SOCIAL, "maps", "Presence", 1),
    "digit by colour": (partial(attribute, given="colour", wanted="digit"), 5, NATURAL, "seeing", "Attributes", 2),
    "digit by place": (partial(attribute, given="place", wanted="digit"), 5, SOCIAL, "maps", "Places", 2),
    "colour by digit": (partial(attribute, given="digit", wanted="colour"), 5, NATURAL, "seeing", "Attributes", 3),
    "colour by place": (partial(attribute, given="place", wanted="colour"), 4, SOCIAL, "maps", "Places", 1),
    "place by digit": (partial(attribute, given="digit", wanted="place"), 5, SOCIAL, "maps", "Places", 3),
    "place by colour": (partial(attribute, given="colour", wanted="place"), 4, SOCIAL, "maps", "Places", 1),
    "count": (count, 2, NATURAL, "numbers", "Counting", 4),
    "largest": (partial(extreme, name="largest"), 1, NATURAL, "numbers", "Order", 6),
    "smallest": (partial(extreme, name="smallest"), 1, NATURAL, "numbers", "Order", 7),
    "sum": (partial(pair, name="sum"), 1, NATURAL, "numbers", "Arithmetic", 9),
    "difference": (partial(pair, name="difference"), 1, NATURAL, "numbers", "Arithmetic", 11),
}
TEXT_SKILLS = {
    "countries": (partial(known, name="countries"), 7, SOCIAL, "maps", "Places", 8),
    "colours": (partial(known, name="colours"), 6, NATURAL, "seeing", "Attributes", 3),
    "legs": (partial(known, name="legs"), 5, NATURAL, "numbers", "Counting", 4),
    "arithmetic": (arithmetic, 6, NATURAL, "numbers", "Arithmetic", 10),
    "compare": (compare, 4, NATURAL, "numbers", "Order", 7),
    "ownership": (ownership, 4, SOCIAL, "reading", "Stories", 5),
    "spelling": (partial(known, name="spelling"), 5, LANGUAGE, "words", "Spelling", 1),
    "opposite": (opposite, 5, LANGUAGE, "words", "Vocabulary", 8),
    "meaning": (meaning, 4, LANGUAGE, "words", "Vocabulary", 12),
}


# Pictures


@cache
def scans(split):
    """The scans of a split: for each digit an array of shape (number of scans, 8, 8) with values from 0 to 1."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.target))
    first = sum(share for name, share in SCANS.items() if list(SCANS).index(name) < list(SCANS).index(split))
    parts = []
    for digit in range(10):
        images = digits.images[order[digits.target[order] == digit]] / 16
        parts.append(
            images[round(first * len(images)) : round((first + SCANS[split]) * len(images))].astype(np.float32)
        )
    return parts


def render(rng, marks, scans):
    """The picture of the marks, (64, 64, 3), uint8. Each mark is drawn with a random scan of its digit."""
    canvas = np.tile(rng.uniform(0, 70, 3), (SIDE, SIDE, 1))
    for mark in marks:
        pool = scans[int(mark["digit"])]
        side = rng.integers(20, 31)
        ink = PILImage.fromarray(pool[rng.integers(len(pool))]).resize((side, side), PILImage.Resampling.BICUBIC)
        alpha = np.asarray(ink).clip(0, 1)[..., None]
        row, column = divmod(PLACES.index(mark["place"]), 2)
        top, left = np.array([row, column]) * SIDE // 2 + rng.integers(0, SIDE // 2 - side + 1, 2)
        colour = COLOURS[mark["colour"]] + rng.normal(0, 12, 3)
        patch = canvas[top : top + side, left : left + side]
        patch += alpha * (colour - patch)
    return (canvas + rng.normal(0, 14, canvas.shape)).clip(0, 255).astype(np.uint8)


def encode(pixels):
    file = io.BytesIO()
    PILImage.fromarray(pixels).save(file, "BMP")  # noise is hard to compress, and PNG takes ten times as long
    return {"bytes": file.getvalue(), "path": None}


# Rows


def make_row(rng, skill, letter, scans=None):
    """
    One row, with the correct option at index `letter`, and the marks of its scene; the first mark is the one that is
    asked about. Without `scans`, the row of a picture question has no image.
    """
    maker, _, subject, topic, category, grade = (PICTURE_SKILLS | TEXT_SKILLS)[skill]
    question, (right, *others), solution, hint_or_marks = maker(rng)
    others, image, hint, marks = rng.permutation(others), None, hint_or_marks, []
    if skill in PICTURE_SKILLS:
        marks, hint = hint_or_marks, rng.choice(HINTS) if rng.random() < 0.25 else ""
        image = scans and encode(render(rng, marks, scans))
    row = {
        "image": image,
        "question": question,
        "choices": [str(choice) for choice in (*others[:letter], right, *others[letter:])],
        "answer": int(letter),
        "hint": str(hint),
        "task": "closed choice",
        "grade": f"grade{grade}",
        "subject": subject,
        "topic": topic,
        "category": category,
        "skill": skill,
        "lecture": LECTURES[topic],
        "solution": solution,
    }
    return row, marks


def from_easy_to_hard(rng, names):
    """Orders skills as a curriculum: a model must recognise a digit before it can locate or count digits."""

    def position(name):
        if name.endswith("present") and rng.random() < 0.8:  # the rest are repeated later, against forgetting
            return rng.uniform(0, 0.2)
        return rng.uniform(0.15, 1)

    return sorted(names, key=position)


def generate_rows(split: str, size: int, seed: int) -> Iterator[dict]:
    rng = np.random.default_rng([seed, list(SIZES).index(split)])
    skills = PICTURE_SKILLS | TEXT_SKILLS
    names = rng.choice(list(skills), size, p=[share / 100 for _, share, *_ in skills.values()])
    if split == "train":
        names = from_easy_to_hard(rng, names)
    letters = rng.permutation(size) % 4
    for name, letter in zip(names, letters):
        yield make_row(rng, name, letter, scans(split))[0]


def load(
    split: str, path: None = None, streaming: bool = False, max_samples: int | None = None, seed: int = 0
) -> Dataset | IterableDataset:
    """
    The rows of a split, which are the same for the same seed: 52,000 / 500 / 1,000, or `max_samples` if that is less,
    also ordered from easy to hard. All are generated in the first call, also when streaming, and read from the cache
    of `datasets` in later ones.
    """
    if path is not None:
        raise ValueError(
            f"path is {path!r}, but `digits` is generated at run time and has no files. Remove it, or give the task "
            "of these files, such as `--task vqa`."
        )
    if split not in SIZES:
        raise ValueError(f"split is {split!r}, but must be one of {', '.join(SIZES)}.")
    if max_samples is not None and max_samples < 1:
        raise ValueError(f"max_samples is {max_samples}, but must be at least 1.")
    arguments = {"split": split, "size": min(SIZES[split], max_samples or SIZES[split]), "seed": seed}
    fingerprint = Hasher.hash([arguments, Path(__file__).read_text(encoding="utf-8")])
    rows = Dataset.from_generator(generate_rows, FEATURES, gen_kwargs=arguments, fingerprint=fingerprint)
    return rows.to_iterable_dataset() if streaming else rows
