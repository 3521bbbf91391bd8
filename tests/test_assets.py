"""The backbones of the default recipe are small, know their texts, and cannot answer about a picture."""

import numpy as np
import pytest
from tiny import ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets import make_assets


@pytest.fixture(scope="module")
def accuracy():
    folder = ROOT / "assets" / "language_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    teller = make_assets.Teller(model, tokenizer)
    return lambda rows: make_assets.language_accuracy(model, teller, tokenizer, rows)


def draw(shown):
    return list(make_assets.draw_rows(np.random.default_rng(5), 400, shown))


def test_both_backbones_together_are_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in (ROOT / "assets").glob("*_model/*")) <= 10_000_000


def test_the_language_model_knows_its_texts_and_cannot_know_pictures(accuracy):
    texts = [(row, marks) for row, marks in draw(shown=0) if row["skill"] in make_assets.digits.TEXT_SKILLS]
    assert accuracy(texts) > 0.85
    assert accuracy([(row, []) for row, _ in draw(shown=1)]) < 0.35


def test_the_language_model_takes_a_scene_that_it_is_told(accuracy):
    assert accuracy(draw(shown=1)) > 0.7
