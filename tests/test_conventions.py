"""The conventions of transformers' own model files, as its linter checks them."""

import json
import subprocess
import sys

from tiny import ROOT


# Rules that the shipped files break on purpose
EXCEPTIONS = {
    "TRF014": "remote code is refused for base models, explicitly, since it would be asked for in a terminal",
    "TRF019": "the newer place of a processor's defaults is not read before transformers 5.23",
    "TRF028": "the licence is a file of its own, which the header of each file names",
    "TRF041": "the switches of the config are the ablations of the paper, and its docstring says what each one does",
    "TRF057": "`auto_docstring` is for files inside transformers; here the docstrings are written out",
}


def test_the_shipped_files_follow_the_conventions_of_transformers(tmp_path):
    files = sorted(ROOT.glob("*_dehvf.py"))
    report = tmp_path / "findings.json"
    command = [sys.executable, "-m", "mlinter", "--no-cache", "--no-progress", "--output-json", report, *files]
    subprocess.run(command, capture_output=True)  # exits with 1 for any finding
    findings = json.loads(report.read_text())["findings"]
    assert [finding["message"] for finding in findings if finding["rule"] not in EXCEPTIONS] == []
    assert EXCEPTIONS.keys() == {finding["rule"] for finding in findings}
