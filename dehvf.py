# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Imports the `*_dehvf.py` files of this checkout in the same way as `trust_remote_code=True` does.

`train.py`, `tests/` and `benchmarks/` import the classes from here: the files use relative imports, so a plain `import
modeling_dehvf` fails, and loading two files separately would load their common imports twice.
"""

from importlib import import_module
from pathlib import Path

from filelock import FileLock
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.utils import HF_MODULES_CACHE


ROOT = Path(__file__).resolve().parent
try:
    Path(HF_MODULES_CACHE).mkdir(parents=True, exist_ok=True)
except OSError as error:
    raise OSError(
        f"The folder {HF_MODULES_CACHE}, to which transformers copies code, cannot be created: {error}. Set the "
        "environment variable HF_HOME to a folder that you can write to."
    ) from error
with FileLock(Path(HF_MODULES_CACHE) / "dehvf.lock"):  # processes of one run copy the same files into this cache
    DehvfForConditionalGeneration = get_class_from_dynamic_module(
        "modeling_dehvf.DehvfForConditionalGeneration", str(ROOT)
    )
_package = DehvfForConditionalGeneration.__module__.rpartition(".")[0]


def _load(names: str):
    return (import_module(f"{_package}.{name}_dehvf") for name in names.split())


configuration, images, processing, files, inputs = _load("configuration images processing files inputs")
bases, layouts, injection, fuser, memory = _load("bases layouts injection fuser memory")
adapters, switching, hub, modeling = _load("adapters switching hub modeling")
DehvfConfig, DehvfProcessor, DehvfModel = configuration.DehvfConfig, processing.DehvfProcessor, modeling.DehvfModel
