"""What the README says to run is run, in its order, and does what it says."""

import json
import re
import shlex

import pytest
from tiny import ROOT, run


README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
BASH = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)


def find(text: str) -> list[str]:
    """The words of the last command in the only block of the shell that has this text."""
    (command,) = [command for command in BASH if text in command]
    return shlex.split(command.split(" && ")[-1])


@pytest.fixture(scope="module")
def main_job() -> str:
    """The README's first command, without the installation. Leaves `outputs/digits` for the blocks that follow."""
    command = find("requirements.txt")
    assert command == ["accelerate", "launch", "train.py"]
    return run(*command)


@pytest.mark.slow
def test_the_main_job_scores_every_question_of_the_test_split(main_job):
    scores = json.loads((ROOT / "outputs" / "digits" / "results.json").read_text())["scores"]
    assert scores["count"] == 1000
    assert scores["unparsed"] < 1


@pytest.mark.slow
def test_the_main_job_sees(main_job):
    scores = json.loads((ROOT / "outputs" / "digits" / "results.json").read_text())["scores"]
    assert scores["IMG"] >= 90, scores


@pytest.mark.slow
def test_the_lines_that_it_ends_with_answer_a_question_about_an_image(main_job):
    code = main_job[main_job.index("from PIL import Image") :]
    assert re.search(r"Response: The answer is [ABCD]\.$", run("python", "-c", code).strip())


@pytest.mark.slow
def test_each_block_of_python_runs_and_own_data_trains(main_job):
    for code in PYTHON:
        run("python", "-c", code)
    run(*find("outputs/own-data"))
    assert json.loads((ROOT / "outputs" / "own" / "results.json").read_text())["size"] == 2


@pytest.mark.slow
def test_two_processes_under_zero_2_train(tmp_path):
    command = (*find("--use_deepspeed"), "--max_samples", 64, "--num_train_epochs", 1, "--output_dir", tmp_path)
    assert "parameters are trained" in run(*command)


def test_every_recipe_that_the_readme_names_is_there():
    for recipe in re.findall(r"recipes/[\w-]+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
