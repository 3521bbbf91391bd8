# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""The frozen base models: how they are found, checked, loaded and saved."""

import os
import shutil
from collections.abc import Iterable
from contextlib import contextmanager

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from torch.distributed.tensor import DTensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import CONFIG_NAME, cached_file
from transformers.utils.hub import extract_commit_hash

from .configuration_dehvf import DehvfConfig, disable_dropout


BASE_NAMES = {"vision": "vision encoder", "text": "language model"}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
# What `transformers` sets on a quantized model, and what it and `peft` look for on the outer one
QUANTIZATION_ATTRIBUTES = (
    *("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"),
    *("is_4bit_serializable", "is_8bit_serializable"),
)


def hub_arguments(arguments: dict) -> dict:
    """Those that say how files are fetched, which holds for the adapter and for the base models."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}


def has_file(location, name: str, **source) -> bool:
    """Whether a repository or folder has a file, as far as can be found out without raising an error."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        return cached_file(location, name, **options, **source) is not None
    except OSError:  # neither a folder nor a repository
        return False


# --- loading ---


def load_base_config(location, key: str, revision, **hub_kwargs):
    """
    The config of a base model (`key` is `"vision"` or `"text"`) without dropout; of a two-tower model such as CLIP,
    the config of the tower that is meant.
    """
    with _explain_base_errors(location, key):
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False, **hub_kwargs)
    return disable_dropout(getattr(config, f"{key}_config", config))


def find_commit(location, revision: str | None, **source) -> str | None:
    """The commit that a branch or tag of a repository on the Hub stands for; `None` for a folder."""
    return extract_commit_hash(cached_file(location, CONFIG_NAME, revision=revision, **source), None)


def load_bases(config: DehvfConfig, vision_model, text_model, **kwargs) -> tuple[PreTrainedModel, PreTrainedModel]:
    """
    Loads the vision encoder and the language model as `transformers` does (shards, quantization, ZeRO-3, ...). Their
    configs and commits are written to `config`.

    Raises:
        OSError: if a base model cannot be found.
        ValueError: if it lacks tensors, has another size than `config` says, or is a model with remote code.
    """
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))
    if attn_implementation := kwargs.pop("attn_implementation", None):
        config._attn_implementation = attn_implementation  # a string, or a dict with an entry for each sub-config
    with torch.random.fork_rng(devices=[]):  # under ZeRO-3 a base model draws random numbers before it is loaded
        causal_lm = _load_base(AutoModelForCausalLM, text_model, "text", config, **kwargs)
        shared = {name: kwargs[name] for name in ("dtype", "use_safetensors") if name in kwargs}
        vision_tower = _load_base(AutoModel, vision_model, "vision", config, **shared, **hub_arguments(kwargs))
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs bitsandbytes repacks 4-bit weights at the first inference, for good, and has no backward
            # for them: training after an evaluation would get no gradients
            module.support_avx512bf16_for_cpu = False
    vision_tower.to(execution_device(causal_lm))
    return vision_tower, causal_lm


def _load_base(auto_class, location, key: str, config: DehvfConfig, **kwargs) -> PreTrainedModel:
    revision = None
    if str(location) == getattr(config, f"{key}_model_id"):  # the revision does not apply to an override
        revision = getattr(config, f"{key}_model_revision")
        with _explain_base_errors(location, key):
            revision = find_commit(location, revision, **hub_arguments(kwargs)) or revision
        setattr(config, f"{key}_model_revision", revision)
    found = load_base_config(location, key, revision, **hub_arguments(kwargs))
    expected = getattr(config, f"{key}_config")
    check_base(found, expected, location)
    found._attn_implementation = expected._attn_implementation
    dtype = found.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
    with _explain_base_errors(location, key), _zero3_dtype(dtype):
        base, info = auto_class.from_pretrained(
            location, config=found, revision=revision, output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{location} lacks {len(missing)} tensors of the {type(base).__name__} that the adapter needs, such as "
            f"{missing[0]}; they would be random. Give the repository or folder of the complete model."
        )
    base.config._name_or_path = getattr(config, f"{key}_model_id")  # a saved config names no folder of this machine
    setattr(config, f"{key}_config", base.config)
    return base


def check_base(found, expected, location):
    """Raises `ValueError` if a base model has other sizes than the one that an adapter was made for."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "image_size", "patch_size"):
        sizes = getattr(found, name, None), getattr(expected, name, None)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The base model in {location} has `{name}={sizes[0]}`, but the adapter was made for "
                f"`{name}={sizes[1]}`. Give the base model that the adapter was trained on."
            )


@contextmanager
def _explain_base_errors(location, key: str):
    """Says which base model could not be loaded, why, and what to do: the user has named only the adapter."""
    try:
        yield
    except (OSError, HTTPError) as error:
        # What the Hub said, from which `transformers` at times only guesses
        cause = error if isinstance(error, HTTPError) else error.__cause__ or error
        advice = f"If you have a copy of it, pass `{key}_model=` with its folder."
        if isinstance(cause, HTTPError):
            advice += (
                " If it is private or gated, ask for access on its page and log in (`hf auth login`) or pass `token=`."
                " If the connection broke, try again: complete files are kept."
            )
        raise OSError(
            f"The {BASE_NAMES[key]} {location}, which the adapter needs, could not be loaded: {cause}\n{advice}"
        ) from error
    except ValueError as error:
        if "trust_remote_code" not in str(error):
            raise
        raise ValueError(
            f"The {BASE_NAMES[key]} {location} is a model with remote code, which DEHVF cannot extend. Use one whose "
            "class is part of transformers; docs/bases.md lists the types that work."
        ) from error


@contextmanager
def _zero3_dtype(dtype: torch.dtype | str | None):
    """
    Under ZeRO-3 a base model is divided among the processes while it loads, in the dtype that DeepSpeed trains in.
    That is float32, for the adapter's sake. Inside this context it is the base model's own.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    modes, dtype = deepspeed_config(), str(dtype).removeprefix("torch.")
    given = {mode: modes.get(mode, {"enabled": False}) for mode in ("bf16", "fp16")}
    modes.update(bf16={"enabled": dtype == "bfloat16"}, fp16={"enabled": dtype == "float16"})
    try:
        yield
    finally:
        modes.update(given)


def execution_device(causal_lm: PreTrainedModel) -> torch.device:
    """Where a model computes. Weights that `device_map` offloads are on the meta device between their uses."""
    places = getattr(causal_lm, "hf_device_map", {"": causal_lm.device}).values()
    return torch.device(next((place for place in places if place not in ("cpu", "disk")), "cpu"))


def share_placement(source: PreTrainedModel, target: PreTrainedModel):
    """Makes the device map and the quantization of a model known on another one that wraps it, or is part of it."""
    for name in ("hf_device_map", *QUANTIZATION_ATTRIBUTES):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


# --- saving ---


def fetch_merged_bases(location, subfolder: str = "", **source) -> dict[str, str]:
    """The folders of the base models that `save_pretrained(..., merge_base=True)` wrote beside the adapter."""
    folder = location
    if not os.path.isdir(location):
        suffixes = ("safetensors", "json", "jinja", "txt", "model")
        patterns = [os.path.join(subfolder, f"*_model/*.{suffix}") for suffix in suffixes]
        folder = snapshot_download(location, allow_patterns=patterns, **source)
    return {key: os.path.join(folder, subfolder, f"{key}_model") for key in BASE_NAMES}


def assemble_causal_lm(language_model: PreTrainedModel, head: torch.nn.Module, generation_config) -> PreTrainedModel:
    """The language model and its head as the one model that they were loaded as."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(language_model.config)
    setattr(causal_lm, causal_lm.base_model_prefix, language_model)
    causal_lm.set_output_embeddings(head)
    causal_lm.generation_config = generation_config
    return causal_lm


def save_base(base: PreTrainedModel, folder, is_main_process: bool, **kwargs):
    """
    Writes a base model as a repository of its own.

    Raises:
        ValueError: if ZeRO-3 has divided it among the processes.
    """
    if any(not parameter.numel() for parameter in base.parameters()):
        raise ValueError(
            "`merge_base` was given, but ZeRO-3 has sharded the base models across the processes. Save the adapter, "
            "load it in a single process, and merge there."
        )
    base.save_pretrained(folder, is_main_process, **kwargs)
    for file in os.scandir(folder) if is_main_process else ():
        shutil.copymode(os.path.join(folder, CONFIG_NAME), file)  # safetensors hides its files from other users


# --- noticing changes ---


def sample_tensors(tensors: Iterable[tuple[str, torch.Tensor]]) -> dict[str, tuple]:
    """
    Of each tensor, by name, its shape, whether it is trained, and some of its numbers, if this process has them all.
    Of a matrix these are one of each row, so that a single token's new embedding is noticed. Of one with more than
    2**20 numbers they are the first 16: reading others would bring its whole mapped file into memory.
    """
    samples = {}
    for name, tensor in tensors:
        numbers = None
        if not tensor.is_meta and not isinstance(tensor, DTensor):
            row, values = tensor.shape[-1] if tensor.dim() > 1 else 1, tensor.detach().flatten()
            picked = values[:: max(row, len(values) // 512) + 1] if len(values) <= 2**20 else values[:16]
            numbers = picked.to("cpu", copy=True)
        samples[name] = tuple(tensor.shape), tensor.requires_grad, numbers
    return samples


def find_changes(before: dict[str, tuple], now: dict[str, tuple]) -> list[str]:
    """Names of the tensors that were added, removed, resized, trained or given other numbers."""
    return sorted(
        (before.keys() ^ now.keys())
        | {name for name in before.keys() & now.keys() if before[name][:2] != now[name][:2]}
        | {name for name in before.keys() & now.keys() if not _are_close(before[name][2], now[name][2])}
    )


def _are_close(before: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    if before is None or now is None or before.shape != now.shape:
        return True  # offloaded, or of another shape, which is seen as such
    if before.dtype == now.dtype:
        return torch.equal(before, now)
    return torch.allclose(before.double(), now.double(), rtol=2**-7, atol=1e-6)  # only the dtype was changed
