"""What the README says to run is run, in its order, and does what it says."""

import json
import re
import shlex
import shutil

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
def test_the_block_that_asks_about_an_image_answers(main_job):
    (code,) = [code for code in PYTHON if "AutoProcessor" in code]
    assert "The answer is" in run("python", "-c", code)


@pytest.mark.slow
def test_the_main_jobs_adapters_are_scored_and_evaluated_again(main_job):
    first = json.loads((ROOT / "outputs" / "digits" / "results.json").read_text())
    assert f"average {first['scores']['average']:.2f}" in run(*find("tasks score"))
    run(*find("--adapter"))
    again = json.loads((ROOT / "outputs" / "digits-again" / "results.json").read_text())
    for name in ("scores", "scores_by_likelihood", "adapter_sha256"):
        assert again[name] == first[name]


@pytest.mark.slow
def test_the_main_jobs_adapters_are_drawn(main_job):
    printed = run(*find("pictures.py"))
    for name in ("fusion_weights.png", "fusion_curves.png", "slot_activations.png"):
        assert name in printed and (ROOT / "outputs" / "digits" / "pictures" / name).stat().st_size > 10_000


@pytest.mark.slow
def test_own_data_is_checked_and_trained_on():
    assert "6 good rows" in run(*find("tasks check"))
    run(*find("--data_path examples/vqa"))
    assert json.loads((ROOT / "outputs" / "own" / "results.json").read_text())["size"] == 4


@pytest.mark.slow
def test_a_new_task_is_one_more_file(tmp_path):
    (code,) = [code for code in PYTHON if code.startswith("# tasks/scans.py")]
    assert len(code.splitlines()) < 40
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("outputs", ".*"))
    (copy / "tasks" / "scans.py").write_text(code)
    flags = ("--task", "scans", "--max_samples", 64, "--output_dir", tmp_path / "output")
    run("accelerate", "launch", "train.py", *flags, folder=copy)
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["scores"]["count"] == 64 and "scores_by_likelihood" in results


@pytest.mark.slow
def test_two_processes_under_zero_2_train(tmp_path):
    command = (*find("--use_deepspeed"), "--max_samples", 64, "--num_train_epochs", 1, "--output_dir", tmp_path)
    assert "parameters are trained" in run(*command)


def test_every_recipe_that_the_readme_names_is_there():
    for recipe in re.findall(r"recipes/[\w-]+\.yaml", README):
        assert (ROOT / recipe).is_file(), recipe
