"""The benchmarks: the runs that they start, how they resume, and the reports that they write."""

import dataclasses
import json
import random
import re
import shutil
import sys
from importlib import import_module

import pytest
import torch
from PIL import Image
from test_tasks import save_easy_vqa
from tiny import IMAGE_SIZE, NUM_PATCHES, PATCH_SIZE, save_tiny_bases, tiny_processor
from transformers import AutoModelForCausalLM

import baselines
from benchmarks import (
    RESULTS,
    cuda_graphs,
    describe_machine,
    memory,
    operations,
    paper_tables,
    pretrained,
    read_report,
    resolutions,
    scaling,
    serving,
    speed,
    start,
)
from dehvf import processing
from examples import emoji
from tasks import coco_captions, easy_vqa
from training.arguments import parse_arguments


ROWS = [(table, name) for table, rows in paper_tables.TABLES.items() for name in rows]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path / "results")
    return tmp_path


def write_run(row, seed, image_accuracy, fusion=None):
    folder = paper_tables.folder_of(row, seed)
    folder.mkdir(parents=True)
    (folder / "flags.json").write_text(json.dumps(paper_tables.flags_of(row, seed)))
    scores = dict.fromkeys(paper_tables.COLUMNS, 50.0) | {"IMG": image_accuracy}
    results = {"scores": scores, "trained_parameters": 1234, "fusion": fusion, "versions": {"torch": f"2.{seed}"}}
    (folder / "results.json").write_text(json.dumps(results))


@pytest.mark.parametrize("table, name", ROWS)
def test_every_row_of_the_tables_parses(table, name):
    flags = paper_tables.flags_of(paper_tables.TABLES[table][name], 1)
    assert parse_arguments(paper_tables.words_of(flags))[-1].seed == 1


def test_the_orders_of_the_paper_refer_to_existing_rows():
    assert {(table, name) for table, *names in paper_tables.PAPER_ORDER for name in names} <= set(ROWS)


def test_rows_with_the_same_flags_share_a_run():
    folders = {paper_tables.folder_of(row, 0) for rows in paper_tables.TABLES.values() for row in rows.values()}
    assert len(folders) == 26


def test_a_run_with_other_flags_or_another_seed_is_not_reused(runs, monkeypatch):
    row = {}
    write_run(row, 0, 60.0)
    assert paper_tables.read_run(row, 0)["scores"]["IMG"] == 60
    assert paper_tables.read_run(row, 1) is None
    monkeypatch.setattr(paper_tables, "SMALL", {"max_samples": 7})
    assert paper_tables.read_run(row, 0) is None


def test_the_report_has_means_deviations_and_reversed_orders(runs):
    rows = paper_tables.TABLES["Methods (the paper's Tables 1 and 2)"]
    for seed in paper_tables.SEEDS:
        figures = {"std_over_layers": 0.01 + seed / 100, "std_over_images": 0.2}
        write_run(rows["DEHVF"], seed, 60.0 + seed, figures)
        write_run(rows["MemVP"], seed, 70.0 + seed)
        write_run(rows["LLaVA-LoRA"], seed, 50.0 + 15 * seed)
    seconds = {"machine": "a machine", "methods": {"DEHVF": {"training": 0.1, "inference": 0.25}}}
    (paper_tables.RUNS / "seconds.json").write_text(json.dumps(seconds))
    paper_tables.write_report()
    table = (paper_tables.RESULTS / "paper_tables.md").read_text()
    assert "Trained with torch 2.0 and 2.1 and 2.2." in table
    assert "| DEHVF | 1,234 | 3 |" in table and "61.0 ± 1.0" in table and "| 0.100 | 0.250 |" in table
    assert "| 0.010 to 0.030 | 0.200 |" in table and "| 50.0 ± 0.0 | – | – |" in table
    assert "| DEHVF | MemVP | -10.0 | **reversed** in every seed |" in table
    assert "| MemVP | LLaVA-LoRA | +6.0 | not decided: seeds overlap |" in table
    assert (paper_tables.RESULTS / "paper_tables.png").stat().st_size > 10_000


def test_rows_with_fewer_runs_on_this_machine_are_taken_from_the_earlier_report(runs, monkeypatch):
    rows = paper_tables.TABLES["Methods (the paper's Tables 1 and 2)"]
    monkeypatch.setattr(paper_tables, "measure_seconds", lambda: pytest.fail("measured"))
    with pytest.raises(SystemExit, match="There is no report in .* Run it without `--report`"):
        paper_tables.write_report(only_existing=True)
    for name in ("DEHVF", "MemVP"):
        for seed in (0, 1):
            write_run(rows[name], seed, 60.0)
    seconds = {"machine": "a machine", "methods": {"DEHVF": {"training": 0.1}}}
    (paper_tables.RUNS / "seconds.json").write_text(json.dumps(seconds))
    monkeypatch.setattr("benchmarks.describe_machine", lambda: {"processor": "that of the runs"})
    paper_tables.write_report()
    monkeypatch.setattr("benchmarks.describe_machine", lambda: {"processor": "another one"})
    shutil.rmtree(paper_tables.RUNS)
    write_run(rows["DEHVF"], 0, 70.0)
    for seed in (0, 1):
        write_run(rows["MemVP"], seed, 80.0)
    paper_tables.write_report(only_existing=True)
    report = read_report(paper_tables.RESULTS, "paper_tables")
    tables = report["tables"]["Methods (the paper's Tables 1 and 2)"]
    assert (tables["DEHVF"]["scores"]["IMG"], tables["MemVP"]["scores"]["IMG"]) == ([60.0, 60.0], [80.0, 80.0])
    assert (report["seconds"], report["seconds_machine"]) == (seconds["methods"], "a machine")
    assert report["machine"] == {"processor": "that of the runs"}


@pytest.mark.slow
@pytest.mark.extended
def test_finished_runs_are_not_trained_again(runs, monkeypatch, capsys):
    monkeypatch.setattr(paper_tables, "SMALL", {"max_samples": 32, "per_device_train_batch_size": 16})
    monkeypatch.setattr(paper_tables, "SEEDS", (0,))
    monkeypatch.setattr(paper_tables, "TABLES", {"one": {"DEHVF": {}, "MemVP": {"method": "memvp"}}})
    assert paper_tables.train_missing() == []
    assert paper_tables.train_missing() == []
    printed = capsys.readouterr().out
    assert "0 runs are finished, 2 are missing" in printed and "2 runs are finished, 0 are missing" in printed


@pytest.fixture
def bench(tmp_path, monkeypatch):
    vision, text = save_tiny_bases(tmp_path)
    save_easy_vqa(tmp_path / "easy_vqa")
    monkeypatch.setattr(easy_vqa, "download", lambda: tmp_path / "easy_vqa")
    sizes = {"image_size": IMAGE_SIZE, "num_memory_slots": NUM_PATCHES}
    rows = {name: dataclasses.replace(row, batch_size=4, steps=2) for name, row in pretrained.ROWS.items()}
    for name, value in {
        **{"VISION_MODEL": vision, "TEXT_MODEL": text, "RUNS": tmp_path / "runs", "RESULTS": tmp_path / "results"},
        **{"SETTING": {**pretrained.SETTING, **sizes}, "ROWS": rows},
    }.items():
        monkeypatch.setattr(pretrained, name, value)

    def load_processor(image_size):
        processor = tiny_processor()
        processing.set_image_size(processor.image_processor, image_size)
        return processor

    monkeypatch.setattr(pretrained, "load_processor", load_processor)
    return load_bench(IMAGE_SIZE)


def load_bench(image_size):
    processor = pretrained.load_processor(image_size)
    task = pretrained.TASKS["easy-VQA"]
    questions = {split: pretrained.load_questions(task, split, processor) for split in ("train", "test")}
    return pretrained.Bench(questions, *pretrained.load_bases("cpu"))


# One row for each method and one with a variant of the fuser; the extended tests train all rows
EASY_VQA_ROWS = pretrained.TABLES[pretrained.EASY_VQA_TABLE]
FIRST_ROWS = {(row.method, row.fuser == "the paper's"): name for name, row in reversed(EASY_VQA_ROWS.items())}.values()


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in FIRST_ROWS else pytest.mark.extended) for name in EASY_VQA_ROWS],
)
def test_rows_on_pretrained_bases_train_and_do_not_read_the_answer(name, bench):
    row = pretrained.ROWS[name]
    run = pretrained.Run(row, 0, bench)
    batch = next(run.batches())
    run.model.eval()
    logits, labels = run.logits(batch)
    assert (labels != -100).any(dim=1).all()
    is_first = (labels != -100).cumsum(dim=1) <= 1  # the prompt and the first answer token
    if row.method in baselines.METHODS:  # `Run.logits` inserts their images without a check on the host
        inputs = {name: batch[name] for name in ("input_ids", "pixel_values")}
        if row.method == "igva":
            inputs["instruction_mask"] = (batch["labels"] != -100).cumsum(dim=1) == 0
        torch.testing.assert_close(run.model(**inputs).logits[:, -logits.shape[1] - 1 : -1], logits)
    batch["input_ids"] = torch.where(batch["labels"] != -100, 3, batch["input_ids"])
    torch.testing.assert_close(run.logits(batch)[0][is_first], logits[is_first])
    file = pretrained.file_of(name, 0)
    file.parent.mkdir(parents=True)
    before = [parameter.detach().clone() for parameter in run.parameters]
    assert sum(1 for _ in run.train(file)) == 2
    assert not all(map(torch.equal, before, run.parameters))
    found = pretrained.read_run(file, row)
    assert [point["step"] for point in found["curve"]] == [1, 2] and 0 <= found["scores"]["average"] <= 100
    assert ("replaced" in found) == (getattr(run.model.model, "fuser", None) is not None)
    assert pretrained.read_run(file, dataclasses.replace(row, steps=3)) is None


def test_simultaneous_runs_on_pretrained_bases_equal_single_runs(bench, capsys):
    rows = {name: pretrained.ROWS[name] for name in ("DEHVF", "MemVP", "LLaVA-LoRA")}
    pretrained.train_missing(rows, [0, 1], at_once=4)
    assert "0 runs are finished, 6 are missing" in capsys.readouterr().out
    for name, row in rows.items():
        file = pretrained.file_of(name, 1)
        together = pretrained.read_run(file, row)
        for _ in pretrained.Run(row, 1, bench).train(file):
            pass
        alone = pretrained.read_run(file, row)
        assert alone.pop("seconds_per_step") > 0 and together.pop("seconds_per_step") > 0
        assert alone == together
    pretrained.train_missing(rows, [0, 1], at_once=4)
    assert "6 runs are finished, 0 are missing" in capsys.readouterr().out


def found_runs(rows):
    return pretrained.find_runs(rows, read_report(pretrained.RESULTS, "pretrained")["runs"])


def test_the_report_on_pretrained_bases_includes_stopped_runs_and_those_of_an_earlier_report(bench):
    for name, average in (("DEHVF", 96.0), ("MemVP", 80.0)):
        point = {"step": 5, "loss": 0.1, **dict.fromkeys(easy_vqa.ANSWERS, average), "average": average}
        row = dataclasses.asdict(pretrained.ROWS[name])
        run = {"row": row, "seed": 0, "machine": "a machine", "curve": [point]}
        pretrained.file_of(name, 0).parent.mkdir(parents=True)
        pretrained.file_of(name, 0).write_text(json.dumps({**run, "trained_parameters": 1234}))
    pretrained.write_report({name: pretrained.ROWS[name] for name in ("DEHVF", "MemVP")})
    table = (pretrained.RESULTS / "pretrained.md").read_text()
    assert "| DEHVF | 1,234 | 0 | 20 | 96.0 | 96.0 | 96.0 | 96.0 | 20 (1 of 1) |" in table
    assert "| MemVP | 1,234 | 0 | 20 | 80.0 | 80.0 | 80.0 | 80.0 | – (0 of 1) |" in table
    pretrained.file_of("MemVP", 0).unlink()
    newer = {**run, "row": dataclasses.asdict(pretrained.ROWS["DEHVF"]), "curve": [{**point, "average": 70.0}]}
    pretrained.file_of("DEHVF", 0).write_text(json.dumps({**newer, "trained_parameters": 1234}))
    rows = {"DEHVF": pretrained.ROWS["DEHVF"], "MemVP": pretrained.ROWS["MemVP"]}
    pretrained.write_report(rows)
    averages = {name: [run["curve"][-1]["average"] for run in runs] for name, runs in found_runs(rows).items()}
    assert averages == {"DEHVF": [70.0], "MemVP": [80.0]}
    changed = {name: dataclasses.replace(row, steps=3) for name, row in rows.items()}
    assert found_runs(changed) == {}


@pytest.fixture
def drawings(tmp_path, monkeypatch):
    """A few drawings instead of Noto Emoji."""
    folder = tmp_path / "emoji"
    (folder / "images").mkdir(parents=True)
    for split, kinds in {"train": ("face", "flag", "food", "animal"), "test": ("flag", "face")}.items():
        rows = []
        for number, kind in enumerate(kinds):
            Image.new("RGBA", (9, 9), (50 * number, 0, 0)).save(folder / "images" / f"{split}-{number}.png")
            for question, answer in emoji.questions(kind, random.Random(0)):
                messages = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                rows.append({"image": f"images/{split}-{number}.png", "messages": messages})
        random.Random(0).shuffle(rows)
        (folder / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.setattr(pretrained, "EMOJI", folder)


def test_rows_of_the_emoji_table_are_trained_on_the_drawings(bench, drawings):
    row = dataclasses.replace(pretrained.ROWS["emoji: DEHVF"], batch_size=4, steps=2)
    pretrained.train_missing({"emoji: DEHVF": row}, [0], at_once=1)
    pretrained.train_missing({"emoji: DEHVF": row}, [0, 1], at_once=1, only_scores=True, dtype="bfloat16")
    run = pretrained.read_run(pretrained.file_of("emoji: DEHVF", 0), row)
    assert run["scores"].keys() == {"kind", "yes/no", "average"} and run["replaced_questions"] == 6
    pretrained.write_report({"emoji: DEHVF": row})
    report = (pretrained.RESULTS / "pretrained.md").read_text()
    assert f"## {pretrained.EMOJI_TABLE}" in report
    table = report.split("## Replaced")[0]
    rows = [line.strip("| ").split(" | ") for line in table.splitlines() if line.startswith("| emoji")]
    assert [row[0] for row in rows] == ["emoji: DEHVF", "emoji: DEHVF, bfloat16"]
    assert [row[2:4] for row in rows] == [["0", "8"], ["0, 1", "8"]], "seeds and questions"
    assert rows[0][7] == "– (0 of 1)" and rows[1][7] == "–", "only the first run was evaluated during training"
    assert rows[0][-2] != "–" and rows[1][-2] == "–", "and only its weights were replaced"


@pytest.mark.extended
def test_resolutions_are_measured_trained_and_reported(bench, drawings, monkeypatch):
    def row(size):
        values = {"image_size": size, "num_memory_slots": (size // PATCH_SIZE) ** 2}
        return pretrained.Row(values=values, batch_size=4, steps=2, task="emoji")

    rows = {f"{size} px": row(size) for size in (8, 16, 24)}
    monkeypatch.setattr(resolutions, "ROWS", rows)
    monkeypatch.setattr(resolutions, "RESULTS", pretrained.RESULTS)

    def in_this_process(name):  # its resident set may not grow for such small models
        return {part: number or 1 for part, number in resolutions.measure_memory(name, "cpu").items()}

    monkeypatch.setattr(resolutions, "memory_in_a_fresh_process", in_this_process)
    measured = resolutions.measure("cpu")
    sizes = measured["sizes"].values()
    assert [size["patches"] for size in sizes] == [4, 16, 36]
    assert len({size["memory"]["visual memory"] / size["patches"] for size in sizes}) == 1
    values_of = resolutions.measured_rows({"measured": measured})
    deviations = {name: resolutions.deviation_from_line([4, 16, 36], values) for name, values in values_of.items()}
    assert deviations["10⁹ operations: vision encoder"] > 1, "attention"
    for part in ("DEHVF, once per image", "language model", "memory lookup"):
        assert deviations[f"10⁹ operations: {part}"] == pytest.approx(0, abs=1e-6)

    assert load_bench(24).train.pixel_values.dtype == torch.float16
    pretrained.train_missing({"24 px": rows["24 px"]}, [0], at_once=1, only_scores=True)
    resolutions.write_report(measured, pretrained.find_runs(rows, {}))
    table = (resolutions.RESULTS / "resolutions.md").read_text()
    assert "| patches and memory slots | 4 | 16 | 36 | |" in table
    assert re.search(r"\| accuracy in %: kind \| – \| – \| \d+\.\d \| \|", table)
    assert (resolutions.RESULTS / "resolutions.png").stat().st_size > 10_000


MODULES = [cuda_graphs, memory, operations, paper_tables, pretrained, resolutions, scaling, serving, speed, start]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: module.__name__)
def test_the_committed_reports_are_written_from_their_numbers(module):
    name = module.__name__.removeprefix("benchmarks.")
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert module.markdown(report) == (RESULTS / f"{name}.md").read_text()


@pytest.mark.parametrize(
    "module, flag, number",
    [
        *((module, "--nonsense", 3) for module in MODULES),
        *(
            (pretrained, "--at-once", 0),
            (resolutions, "--at-once", 0),
            (speed, "--threads", 0),
            (start, "--rounds", 0),
        ),
        *((serving, "--rounds", 0), (serving, "--rounds", -1), (serving, "--threads", 0)),
    ],
)
def test_wrong_flags_are_refused_before_anything_is_measured(module, flag, number, monkeypatch, capsys):
    for name in ("measure", "measure_start", "servers", "train_missing", "require_bases"):
        monkeypatch.setattr(module, name, lambda *args: pytest.fail("measured"), raising=False)
    monkeypatch.setattr(pretrained, "require_bases", lambda: pytest.fail("measured"))
    monkeypatch.setattr(sys, "argv", [module.__name__, flag, str(number)])
    with pytest.raises(SystemExit) as ended:
        module.main()
    expected = f"unrecognized arguments: {flag}" if flag == "--nonsense" else f"argument {flag}: it is {number}, but"
    assert ended.value.code == 2 and expected in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", [file.stem for file in RESULTS.parent.glob("*.py") if "save_report(RES" in file.read_text()]
)
def test_a_report_that_cannot_be_written_is_refused_before_measuring(name, monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    module = import_module(f"benchmarks.{name}")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "file" / "results")
    monkeypatch.setattr(module, "save_report", lambda *_: pytest.fail("too late"))
    monkeypatch.setattr(sys, "argv", [name])
    with pytest.raises(SystemExit, match="The report cannot be written to .*file. Use a folder that you can write to"):
        module.main()


def test_the_machine_is_described_without_git(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert describe_machine()["commit"] is None


def test_the_report_on_captions_is_written_from_its_numbers():
    report = json.loads((RESULTS / "captions.json").read_text())
    assert start.captions_markdown(report) == (RESULTS / "captions.md").read_text()


@pytest.mark.extended
def test_steps_for_cuda_graphs_compute_the_same_loss(tmp_path, monkeypatch, capsys):
    preset = speed.PRESETS["tiny"]
    side = preset.patches_per_side[0]
    text = speed.random_base(AutoModelForCausalLM, speed.make_config(preset, side).text_config, preset)
    model = speed.build_all((speed.LLAVA,), preset, side, text)[speed.LLAVA]
    inputs = speed.make_inputs(model, preset, side, 2, 6)
    expected = model(**inputs).loss
    torch.testing.assert_close(speed.forward_on_device(model, **inputs).loss, expected)

    monkeypatch.setattr(cuda_graphs, "RESULTS", tmp_path)
    monkeypatch.setattr(sys, "argv", ["cuda_graphs", "--preset", "tiny"])
    cuda_graphs.main()
    printed = capsys.readouterr().out
    for name in cuda_graphs.METHODS:
        assert f"\n| {name} | " in printed


def test_the_slowest_part_limits_a_step_under_an_engine():
    needs = {"bases": 1000 * 10**9, "adapters": 16 * 10**6, "activations": 0, "layer": 10**9, "dtype": 2}
    assert scaling.received("DDP, ZeRO-2", needs, 8) == 2 * 7 / 8 * 4 * 10**6
    assert scaling.received("FSDP2", needs, 64) == pytest.approx(2 * 63 / 64 * (4 * 10**6 + 10**12))
    assert scaling.received(scaling.HYBRID, needs, 64) == 2 * 63 / 64 * 4 * 10**6 + 2 * 7 / 8 * 10**12
    config = scaling.configs()["7B"]
    facts = {"operations_per_second": 1e14, "launching_a_step_of_7b": 0.2, "seconds_per_image": 0.01}
    engines = (("DDP, ZeRO-2", 8), ("FSDP2", 64), (scaling.HYBRID, 64))
    steps = {engine: scaling.step(config, needs, engine, gpus, facts) for engine, gpus in engines}
    assert [one["limit"] for one in steps.values()] == ["memory", "network", "network"]
    seconds = steps["FSDP2"]["seconds"]
    assert seconds["launches"] == 0.2
    assert steps["FSDP2"]["images_per_second"] == pytest.approx(64 * 32 / seconds["network"])


@pytest.mark.slow
@pytest.mark.extended
def test_the_compared_servers_answer_under_load(tmp_path):
    pytest.importorskip("uvicorn", reason="pip install -r requirements-app.txt")
    vision, text = save_tiny_bases(tmp_path)
    setting = serving.Setting(str(vision), str(text), IMAGE_SIZE, NUM_PATCHES + 4, (1, 3), (1, 2), (1, 2), 2)
    with serving.servers((serving.TEXT_ONLY, serving.DEHVF, serving.MERGED), setting, threads=1) as urls:
        report = {"note": "", "known": serving.measure_known(urls, setting)}
        report["load"] = serving.measure_load(urls, setting, rounds=2)
    serving.draw(report, tmp_path / "serving.png")
    assert [(row["clients"], row["answer_tokens"]) for row in report["load"]] == [(1, 1), (1, 2), (3, 1), (3, 2)]
    for row in report["load"]:
        for samples in row["samples"].values():
            assert [len(sample["whole"]) for sample in samples] == [
                row["clients"] * (2 if row["clients"] > 1 else 1)
            ] * 2
            assert all(first <= whole for sample in samples for first, whole in zip(sample["first"], sample["whole"]))
    for row in report["known"]:
        assert all(len(seconds) == 2 and min(seconds) > 0 for seconds in row["samples"].values())
    lines = [line for line in serving.markdown(report).splitlines() if line.startswith("| 3 ")]
    assert ["met" in line for line in lines] == [True, False, True, False]


def test_the_prompt_of_llava_has_a_placeholder_for_each_patch(tmp_path):
    vision, text = save_tiny_bases(tmp_path)
    setting = serving.Setting(str(vision), str(text), IMAGE_SIZE)
    model, processor = serving.build(serving.MERGED, setting)
    engine = serving.make_engine_class(model)(model, processor, None, max_context_tokens=128, max_batch_size=1)
    chat = [{"role": "user", "content": [{"type": "text", "text": "ab"}]}]
    inputs = engine._encode(chat, [Image.new("RGB", (20, 20))])
    placeholders = inputs["input_ids"][0] == model.config.image_token_id
    assert placeholders.nonzero().flatten().tolist() == list(range(1, NUM_PATCHES + 1))  # after the first token
    assert inputs["attention_mask"].shape == inputs["input_ids"].shape
    assert model.generate(**inputs, max_new_tokens=3).shape[1] == len(placeholders) + 3


@pytest.mark.extended
def test_the_requested_number_of_captions_is_written(tmp_path):
    start.write_captions(tmp_path, 12)
    assert (
        len(coco_captions.load("train", str(tmp_path))) == 15 and len(coco_captions.load("test", str(tmp_path))) == 10
    )
    found = start.rows_in_a_fresh_process(tmp_path, tmp_path / "cache")
    assert all(way["per_second"] > 0 for way in found.values()) and list((tmp_path / "cache").glob("**/*.arrow"))


def test_a_run_that_ends_before_its_first_step_is_not_measured(tmp_path):
    with pytest.raises(RuntimeError, match="train.py --no_such_flag 1 .*` ended before its first step"):
        start.measure_run([sys.executable], "--no_such_flag", "1", cache=tmp_path)


def test_the_start_up_report_says_which_targets_are_met():
    names = (start.OWN, start.SHIPPED, start.LOADING, start.HELP, start.STARTING)
    memory = [{"VmHWM": 2_000_000, "RssAnon": 1_000_000}] * 2
    report = {
        **{"rounds": 3, "first_run": 99.0, "captions": 10, "measured_on": "a machine"},
        "seconds": {name: [seconds, 9.0, seconds] for name, seconds in zip(names, (5.0, 7.5, 2.0, 4.1, 11.0))},
        "rows": {"from the file": {"per_second": 1234.0, "bytes": 5.0}},
        "runs": {2: [{"seconds": 30.0, "memory": memory}, {"seconds": 20.0, "memory": memory}]},
    }
    text = start.markdown(report)
    assert f"| {start.LOADING} | 2.0 | 2.0 to 9.0 | ≤ 3: met |" in text
    assert f"| {start.HELP} | 4.1 | 4.1 to 9.0 | ≤ 4: not met |" in text
    assert "| the shipped files alone | 2.5 | | ≤ 1: not met |" in text
    text = start.captions_markdown(report)
    assert "| 2 | filled | 20 | 2, 2 | 1, 1 |" in text and "| from the file | 1,234 | 5 |" in text
