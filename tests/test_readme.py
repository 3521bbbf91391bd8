"""What the README and docs/ say to run is run, in its order, and does what they say."""

import ast
import io
import json
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from contextlib import redirect_stdout

import numpy as np
import pytest
import yaml
from PIL import Image
from tiny import ROOT, DehvfForConditionalGeneration, DehvfProcessor, run


PAGES = {page.name: page.read_text(encoding="utf-8") for page in (ROOT / "README.md", *(ROOT / "docs").glob("*.md"))}
README = PAGES["README.md"]
# Each command of the pages, and where it is run if not below
COMMANDS = {
    "accelerate launch train.py": None,
    "pytest -n 4 --dist loadfile": "by whoever runs the tests",
    "accelerate launch train.py recipes/scienceqa-llama7b.yaml": "test_recipes.py, with stand-ins for bases and data",
    "python -m tasks check examples/vqa": "test_tasks.py",
    "accelerate launch train.py --task vqa --data_path examples/vqa --output_dir outputs/own": None,
    "accelerate launch train.py recipes/easy-vqa-smollm2.yaml --task vqa --data_path examples/vqa --image_size 224 "
    "--num_memory_slots 320 --output_dir outputs/own-smollm2": None,
    "python -m tasks score outputs/digits": None,
    "accelerate launch train.py --adapter outputs/digits --num_train_epochs 0 --output_dir outputs/digits-again": None,
    "accelerate launch --num_processes 2 --use_deepspeed train.py --deepspeed ds_config.json": None,
    "python demo/pictures.py outputs/digits --output_dir outputs/digits/pictures": None,
    "python demo/app.py": "test_app.py",
    "python demo/serve.py outputs/digits --trust-remote-code --port 8000": "test_serving.py",
}


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", PAGES[page], re.DOTALL)


def find(text: str) -> list[str]:
    """The words of the only command above that has these words."""
    (command,) = [command for command, place in COMMANDS.items() if f" {text} " in f" {command} " and place is None]
    return shlex.split(command)


def results(folder: str) -> dict:
    return json.loads((ROOT / "outputs" / folder / "results.json").read_text(encoding="utf-8"))


# --- the main job and what follows it ---


@pytest.fixture(scope="module")
def main_job() -> str:
    """The README's first command without the installation. Leaves `outputs/digits` for what follows."""
    command = shlex.split(blocks("README.md", "bash")[0].split(" && ")[-1])
    assert command == ["accelerate", "launch", "train.py"]
    return run(*command)


@pytest.mark.slow
def test_the_main_job_scores_every_question_and_reads_the_images(main_job):
    scores, fusion = results("digits")["scores"], results("digits")["fusion"]
    assert scores["count"] == 1000 and scores["unparsed"] < 1
    assert scores["IMG"] >= 90, scores
    assert fusion["std_over_layers"] > 0.02, "the fusion weights differ between layers"
    # With other seeds they may be constant. If they are, a message says so
    is_constant = min(fusion["std_over_layers"], fusion["std_over_images"]) < 0.005
    assert ("They hardly depend on" in main_job) == is_constant, fusion


@pytest.mark.slow
def test_the_code_that_it_prints_answers_a_question_about_an_image(main_job):
    code = main_job[main_job.index("from PIL import Image") :]
    assert re.search(r"Response: The answer is [ABCD]\.$", run("python", "-c", code).strip())


@pytest.mark.slow
def test_the_readme_shows_what_the_main_jobs_adapters_answer(main_job, monkeypatch):
    (code,), (answer,) = blocks("README.md", "python"), blocks("README.md", "text")
    monkeypatch.chdir(ROOT)
    with redirect_stdout(io.StringIO()) as output:
        exec(code, {})
    assert output.getvalue().strip() == answer.strip()


@pytest.mark.slow
@pytest.mark.extended
def test_the_main_jobs_adapters_are_evaluated_again(main_job):
    run(*find("--adapter"))
    for name in ("scores", "scores_by_likelihood", "adapter_sha256"):
        assert results("digits-again")[name] == results("digits")[name]


@pytest.mark.slow
def test_the_main_jobs_adapters_are_scored_and_drawn_again(main_job):
    assert f"average {results('digits')['scores']['average']:.2f}" in run(*find("tasks score"))
    printed = run(*find("demo/pictures.py"))
    for name in ("fusion_weights.png", "fusion_curves.png", "fusion_groups.png", "slot_activations.png"):
        assert name in printed and (ROOT / "outputs" / "digits" / "pictures" / name).stat().st_size > 10_000


@pytest.mark.slow
def test_the_server_gives_a_client_the_answer_that_its_page_shows(main_job, monkeypatch):
    pytest.importorskip("openai", reason="pip install -r requirements-app.txt")
    (code,), (answer,) = blocks("serving.md", "python"), blocks("serving.md", "text")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = "demo/serve.py", "outputs/digits", "--trust-remote-code", "--port", str(port)
    server = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        monkeypatch.chdir(ROOT)
        with redirect_stdout(io.StringIO()) as output:  # the client tries again until the server listens
            exec(code.replace("8000/v1", f"{port}/v1").replace('"none")', '"none", max_retries=20)'), {})
        assert output.getvalue().strip() == answer.strip()
    finally:
        server.terminate()
        server.wait()


# --- the other pages ---


@pytest.mark.slow
def test_own_data_is_trained_on():
    run(*find("outputs/own"))
    assert results("own")["size"] == 4


@pytest.mark.slow
@pytest.mark.skipif(not (ROOT / "assets" / "real").exists(), reason="python -m assets.real_bases was not run")
def test_own_data_is_trained_on_with_pretrained_bases(tmp_path):
    run(*find("outputs/own-smollm2"), "--max_steps", 1, "--output_dir", tmp_path)
    assert json.loads((tmp_path / "results.json").read_text())["size"] == 4


@pytest.mark.slow
def test_a_new_task_is_one_more_file(tmp_path):
    (code,) = blocks("new-task.md", "python")
    copy = shutil.copytree(ROOT, tmp_path / "copy", ignore=shutil.ignore_patterns("outputs", ".*"))
    (copy / "tasks" / "scans.py").write_text(code)
    flags = ("--task", "scans", "--max_samples", 64, "--output_dir", tmp_path / "output")
    run("accelerate", "launch", "train.py", *flags, folder=copy)
    scans = json.loads((tmp_path / "output" / "results.json").read_text())
    assert scans["scores"]["count"] == 64 and "scores_by_likelihood" in scans


@pytest.mark.slow
def test_two_processes_under_zero_2_train(tmp_path):
    command = (*find("--use_deepspeed"), "--max_samples", 64, "--num_train_epochs", 1, "--output_dir", tmp_path)
    assert "parameters are trained" in run(*command)


@pytest.mark.slow
def test_the_blocks_of_the_usage_page_run_in_its_order_and_print_what_it_shows(main_job, tmp_path):
    shutil.copytree(ROOT / "outputs" / "digits", tmp_path / "outputs" / "digits")
    for name in ("assets", "dehvf.py"):  # instead of a clone, into which the blocks would write
        (tmp_path / name).symlink_to(ROOT / name)
    code = "\n".join(blocks("usage.md", "python"))
    printed = run("python", "-W", "error::FutureWarning", "-c", code, folder=tmp_path)
    shown = blocks("usage.md", "text")
    assert len(shown) == 2 and all(output in printed for output in shown)


@pytest.mark.extended
@pytest.mark.slow
@pytest.mark.parametrize("reads_question", [False, True])
def test_the_blocks_of_the_trl_page_train_and_save_an_adapter(reads_question, tmp_path):
    for name in ("assets", "dehvf.py"):
        (tmp_path / name).symlink_to(ROOT / name)
    code, collator = blocks("trl.md", "python")
    if reads_question:
        code = code.replace("num_memory_slots=32", 'num_memory_slots=32, fuser_query="layer+instruction"')
        code = code.replace("trainer.train()", f"{collator}\ntrainer.train()")
    run("python", "-c", code, folder=tmp_path)
    model = DehvfForConditionalGeneration.from_pretrained(
        tmp_path / "outputs" / "trl",
        vision_model=ROOT / "assets/vision_model",
        text_model=ROOT / "assets/language_model",
    )
    assert model.config.num_memory_slots == 32
    assert DehvfProcessor.from_pretrained(tmp_path / "outputs" / "trl").tokenizer.padding_side == "left"


# --- the pages themselves ---


def test_every_command_of_the_pages_is_run_somewhere():
    lines = "".join(block for page in PAGES for block in blocks(page, "bash")).splitlines()
    assert {line.split(" && ")[-1] for line in lines} == set(COMMANDS)


def test_links_recipes_and_the_front_matter_name_files_that_exist():
    for name, text in PAGES.items():
        folder = ROOT if name == "README.md" else ROOT / "docs"
        for target in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (folder / target).exists(), f"{name}: {target}"
        for recipe in re.findall(r"`(?:recipes/)?((?:scienceqa|coco|digits)[\w-]*llama[\w-]+)", text):
            assert (ROOT / "recipes" / f"{recipe}.yaml").is_file(), f"{name}: {recipe}"
    card = yaml.safe_load(README.split("---")[1])
    assert (ROOT / card["app_file"]).is_file() and card["sdk_version"] in (ROOT / "requirements-app.txt").read_text()


def test_the_page_on_trust_names_the_packages_that_the_shipped_files_import():
    imported = set()
    for file in ROOT.glob("*_dehvf.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    (named,) = re.findall("They import the standard library, (.*?) and nothing else", PAGES["hub.md"], re.DOTALL)
    packages = {*re.findall("`(.*?)`", named), *(["PIL"] if "Pillow" in named else [])}
    assert imported - sys.stdlib_module_names == packages


def test_the_map_names_what_is_there():
    (tree,) = re.findall(r"```\n(config\.json.*?)```", PAGES["map.md"], re.DOTALL)
    named = {name.rstrip("/") for line in tree.splitlines() for name in line[:26].replace(",", " ").split()}
    there = {path.name for path in ROOT.iterdir()}
    assert named <= there
    assert {name for name in there - named if name.endswith("_dehvf.py")} == set()


def test_the_figure_of_the_method_is_what_its_script_draws(tmp_path):
    script = runpy.run_path(str(ROOT / "docs" / "figures" / "method.py"))
    script["draw"]().savefig(tmp_path / "method.png")
    drawn, stored = (
        np.asarray(Image.open(file).convert("L"), dtype=float)
        for file in (tmp_path / "method.png", ROOT / "docs" / "figures" / "method.png")
    )
    assert drawn.shape == stored.shape and abs(drawn - stored).mean() < 1
