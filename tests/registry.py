"""
What the tests take from the package registry and the repository does not hold: the tests of transformers, and old
releases of it. Both are fetched once, into the user's cache. `python tests/registry.py` fetches them before a run.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

import transformers
from filelock import FileLock


CACHE = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dehvf"

OLDEST_TRANSFORMERS = "5.17.0"  # that the shipped files run with, see pyproject.toml
OLD_HUB = "1.33.0"  # the newest huggingface_hub that it accepts

# Modules that the tests import, but the source distribution leaves out, with a stand-in for each
LEFT_OUT = {
    "transformers_tests/__init__": "",
    "transformers_tests/exporters/test_export": "class ExportTesterMixin:\n    pass\n",
    "transformers_tests/generation/test_utils": "class GenerationTesterMixin:\n    pass\n",
    "transformers_tests/utils/test_configuration_utils": "config_common_kwargs = {}\n",
    "fetch_hub_objects_for_ci": "def url_to_local_path(url):\n    return url\n",
}


def pip(*arguments):
    """
    Runs pip.

    Raises:
        OSError: if it fails, as it does without a registry.
    """
    command = [sys.executable, "-m", "pip", "--quiet", *map(str, arguments)]
    process = subprocess.run(command, capture_output=True, text=True)
    if process.returncode:
        raise OSError(process.stderr[-500:])


def fetch(name: str, fill) -> Path:
    """The folder `name` of the cache. If it is missing, `fill(folder)` makes it; an interrupted one leaves nothing."""
    CACHE.mkdir(parents=True, exist_ok=True)
    with FileLock(CACHE / f"{name}.lock"):  # each worker of pytest-xdist comes here
        if not (CACHE / name).exists():
            with TemporaryDirectory(dir=CACHE) as folder:
                fill(Path(folder))
                shutil.copytree(folder, CACHE / name)
    return CACHE / name


def transformers_tests() -> Path:
    """
    A folder for `sys.path` with the tests of the installed transformers as the package `transformers_tests`.
    `TRANSFORMERS_TESTS` names another one, for instance with `generation/test_utils.py` of a git checkout in it.
    """
    if folder := os.environ.get("TRANSFORMERS_TESTS"):
        return Path(folder)

    def fill(folder: Path):
        with TemporaryDirectory() as download:
            requirement = f"transformers=={transformers.__version__}"
            pip("download", "--no-deps", "--no-binary", ":all:", "--dest", download, requirement)
            (archive,) = Path(download).glob("*.tar.gz")
            with tarfile.open(archive) as opened:
                if hasattr(tarfile, "data_filter"):  # the first releases of Python 3.11 lack it
                    opened.extraction_filter = tarfile.data_filter
                opened.extractall(download)
            shutil.move(archive.with_suffix("").with_suffix("") / "tests", folder / "transformers_tests")
        for module, stand_in in LEFT_OUT.items():
            file = folder / f"{module}.py"
            file.parent.mkdir(exist_ok=True)
            file.write_text(stand_in)

    return fetch(f"tests-{transformers.__version__}", fill)


def oldest_release() -> Path:
    """A folder for `PYTHONPATH` with the oldest supported release, which takes all else from this environment."""

    def fill(folder: Path):
        requirements = f"transformers=={OLDEST_TRANSFORMERS}", f"huggingface_hub=={OLD_HUB}"
        pip("install", "--no-deps", "--target", folder, *requirements)

    return fetch(f"transformers-{OLDEST_TRANSFORMERS}-huggingface_hub-{OLD_HUB}", fill)


if __name__ == "__main__":
    print(transformers_tests(), oldest_release(), sep="\n")
