# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Each benchmark is a module to run, `python -m benchmarks.speed`, whose report stands in `benchmarks/results`."""

import json
from collections.abc import Callable
from pathlib import Path


RESULTS = Path(__file__).parent / "results"


def save_report(folder: Path, name: str, report: dict, markdown: Callable, draw: Callable):
    """
    Writes `name.json`, `name.md` and `name.png` into `folder`, and prints the table.

    Args:
        markdown: makes the text of the report.
        draw: draws the report into a file.
    """
    folder.mkdir(exist_ok=True)
    text = markdown(report)
    (folder / f"{name}.json").write_text(json.dumps(report, indent=1))
    (folder / f"{name}.md").write_text(text)
    draw(report, folder / f"{name}.png")
    print(text)
