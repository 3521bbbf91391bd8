"""The benchmarks: what they would run, that they go on where they stopped, and what they make of results."""

import json

import pytest

from benchmarks import RESULTS, memory, operations, paper_tables, speed
from training.arguments import parse_arguments


ROWS = [(table, name) for table, rows in paper_tables.TABLES.items() for name in rows]


@pytest.fixture
def runs(tmp_path, monkeypatch):
    monkeypatch.setattr(paper_tables, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(paper_tables, "RESULTS", tmp_path / "results")
    return tmp_path


def write_run(row, seed, image_accuracy):
    folder = paper_tables.folder_of(row, seed)
    folder.mkdir(parents=True)
    (folder / "flags.json").write_text(json.dumps(paper_tables.flags_of(row, seed)))
    scores = dict.fromkeys(paper_tables.COLUMNS, 50.0) | {"IMG": image_accuracy}
    (folder / "results.json").write_text(json.dumps({"scores": scores, "trained_parameters": 1234}))


@pytest.mark.parametrize("table, name", ROWS)
def test_every_row_of_the_tables_parses(table, name):
    flags = paper_tables.flags_of(paper_tables.TABLES[table][name], 1)
    assert parse_arguments(paper_tables.words_of(flags))[-1].seed == 1


def test_the_papers_orders_name_rows_that_are_there():
    assert {(table, name) for table, *names in paper_tables.PAPER_ORDER for name in names} <= set(ROWS)


def test_rows_that_change_the_same_are_one_run():
    folders = {paper_tables.folder_of(row, 0) for rows in paper_tables.TABLES.values() for row in rows.values()}
    assert len(folders) == 17


def test_a_run_with_other_flags_or_without_scores_is_not_taken(runs, monkeypatch):
    write_run({}, 0, 60.0)
    assert paper_tables.read_run({}, 0)["scores"]["IMG"] == 60
    assert paper_tables.read_run({}, 1) is None
    monkeypatch.setattr(paper_tables, "SMALL", {"max_samples": 7})
    assert paper_tables.read_run({}, 0) is None


def test_the_report_tells_means_spreads_and_orders_that_do_not_hold(runs):
    rows = paper_tables.TABLES["Methods (the paper's Tables 1 and 2)"]
    for seed in paper_tables.SEEDS:
        write_run(rows["DEHVF"], seed, 60.0 + seed)
        write_run(rows["MemVP"], seed, 70.0 + seed)
        write_run(rows["LLaVA-LoRA"], seed, 50.0 + 15 * seed)
    seconds = {"machine": "a machine", "methods": {"DEHVF": {"training": 0.1, "inference": 0.25}}}
    (paper_tables.RUNS / "seconds.json").write_text(json.dumps(seconds))
    paper_tables.write_report()
    table = (paper_tables.RESULTS / "paper_tables.md").read_text()
    assert "| DEHVF | 1,234 | 3 |" in table and "61.0 ± 1.0" in table and "| 0.100 | 0.250 |" in table
    assert "| DEHVF | MemVP | -10.0 | **reversed** in every seed |" in table
    assert "| MemVP | LLaVA-LoRA | +6.0 | not decided: seeds overlap |" in table
    assert (paper_tables.RESULTS / "paper_tables.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.extended
def test_a_second_start_trains_nothing_again(runs, monkeypatch, capsys):
    monkeypatch.setattr(paper_tables, "SMALL", {"max_samples": 32, "per_device_train_batch_size": 16})
    monkeypatch.setattr(paper_tables, "SEEDS", (0,))
    monkeypatch.setattr(paper_tables, "TABLES", {"one": {"DEHVF": {}, "MemVP": {"method": "memvp"}}})
    assert paper_tables.train_missing() == []
    assert paper_tables.train_missing() == []
    printed = capsys.readouterr().out
    assert "0 runs are there, 2 are missing" in printed and "2 runs are there, 0 are missing" in printed


@pytest.mark.parametrize("module", [memory, operations, paper_tables, speed], ids=lambda module: module.__name__)
def test_the_reports_that_lie_here_are_written_from_their_numbers(module):
    name = module.__name__.removeprefix("benchmarks.")
    report = json.loads((RESULTS / f"{name}.json").read_text())
    assert module.markdown(report) == (RESULTS / f"{name}.md").read_text()
