"""ScienceQA (Lu et al., 2022) in the columns of `derek-thomas/ScienceQA`: multiple choice, half with an image."""

from pathlib import Path

from datasets import Dataset, load_dataset, load_from_disk


COLUMNS = ("image", "question", "choices", "answer", "hint", "subject", "grade")
ANSWER_PREFIX = " The answer is"
MAX_NEW_TOKENS = 1
METRIC = Path(__file__).parents[1] / "metrics" / "scienceqa"


def load(split: str, path: str | None = None) -> Dataset:
    """`path` is a Hub id, or a folder that `save_to_disk` wrote with the same splits and columns."""
    if path is not None and Path(path).is_dir():
        return load_from_disk(path)[split]
    return load_dataset(path or "derek-thomas/ScienceQA", split=split)


def context(row: dict) -> str:
    return row["hint"]


def prompt(row: dict, context: str) -> str:
    options = " ".join(f"({letter(index)}) {choice}" for index, choice in enumerate(row["choices"]))
    return f"Question: {row['question']}\nContext: {context or 'N/A'}\nOptions: {options}"


def answer(row: dict) -> str:
    return f"The answer is {letter(row['answer'])}."


def letter(index: int) -> str:
    return "ABCDEFGHIJKLMNOPQRSTUVWXYZ"[index]


def score(predictions: list[str], rows: Dataset) -> dict[str, float]:
    """The nine columns of the ScienceQA table, in per cent, and the share of answers that are no letter."""
    import evaluate

    columns = rows.remove_columns("image") if "image" in rows.column_names else rows
    references = [
        {
            "answer": row["answer"],
            "num_choices": len(row["choices"]),
            "subject": row["subject"],
            "grade": row["grade"],
            "has_hint": bool(row["hint"]),
            "has_image": has_image,
        }
        for row, has_image in zip(columns, rows_with_image(rows))
    ]
    # In memory and under a name of its own, since processes that score side by side would share a file
    metric = evaluate.load(str(METRIC), keep_in_memory=True)
    return metric.compute(predictions=predictions, references=references)


def rows_with_image(rows: Dataset) -> list[bool]:
    """Which rows have an image, without decoding any."""
    from datasets import Image

    undecoded = rows.select_columns("image").cast_column("image", Image(decode=False))
    return [row["image"] is not None for row in undecoded]
