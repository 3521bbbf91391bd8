# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Tensors in safetensors files: one function reads them, one writes them, and one takes their checksum."""

import hashlib
import json
import os
import threading
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save


FILE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors and their names, independent of their device."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return sha256.hexdigest()


def check_before_writing(tensors: dict[str, torch.Tensor]):
    """Raises `ValueError` if a tensor could not be loaded again, before it replaces a valid file."""
    for name, tensor in tensors.items():
        if tensor.dtype not in FILE_DTYPES:
            raise ValueError(f"`{name}` has the dtype {tensor.dtype}. Convert it to one of {FILE_DTYPES}.")
        if not tensor.isfinite().all():
            raise ValueError(
                f"`{name}` has infinite or NaN values. Nothing was written, since it could not be loaded."
            )


def write_tensors(tensors: dict[str, torch.Tensor], file: str | os.PathLike, metadata: dict[str, str] | None = None):
    """
    Writes a safetensors file with a digest of its tensors. Equal tensors and metadata give identical files.
    """
    tensors = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    # `accelerate` only loads files with this `format`
    content = save(tensors, metadata={"format": "pt", **(metadata or {}), "sha256": digest(tensors)})
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))  # safetensors writes it in no fixed order
    header = json.dumps(header, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    unfinished = f"{file}.{os.getpid()}.{threading.get_ident()}.tmp"
    try:
        with open(unfinished, "wb") as opened:  # creates the file with the default mode; safetensors uses 0600
            opened.write(len(header).to_bytes(8, "little") + header)
            opened.write(memoryview(content)[start:])
        os.replace(unfinished, file)
    except BaseException:  # such as a full disk
        Path(unfinished).unlink(missing_ok=True)
        raise


def read_tensors(file: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Tensors and metadata of a safetensors file.

    Raises:
        OSError: if it cannot be opened, or is damaged: truncated, not a safetensors file, or its tensors do not match
            the stored SHA-256. Files of other programs, which have no SHA-256, are read without this check.
        ValueError: if a tensor is not of `FILE_DTYPES`, or not finite.
    """
    remedy = "Copy or download it again (in a clone: `git lfs pull`), or use an earlier checkpoint."
    open(file, "rb").close()  # safetensors says of a file that must not be read that it does not exist
    try:
        with safe_open(file, framework="pt") as opened:
            metadata = opened.metadata() or {}
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}
    except SafetensorError as error:
        raise OSError(f"{file} is damaged and cannot be read: {error}. {remedy}") from error
    for name, tensor in tensors.items():
        if tensor.dtype not in FILE_DTYPES:
            raise ValueError(f"`{name}` in {file} has the dtype {tensor.dtype}. Save it as one of {FILE_DTYPES}.")
    if "sha256" in metadata and metadata["sha256"] != digest(tensors):
        raise OSError(f"{file} is damaged: its tensors differ from those that were saved. {remedy}")
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            raise ValueError(
                f"`{name}` in {file} has infinite or NaN values. If training had diverged when it was saved, use an "
                "earlier checkpoint and a lower learning rate."
            )
    return tensors, metadata
