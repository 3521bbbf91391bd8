# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Finds, checks, loads and saves the frozen base models."""

import os
import re
import shutil
from collections.abc import Iterable
from contextlib import contextmanager
from copy import deepcopy
from difflib import get_close_matches
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from huggingface_hub.errors import HTTPError
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_utils import PreTrainedModel
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    SAFE_WEIGHTS_INDEX_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.hub import extract_commit_hash

from .configuration_dehvf import DehvfConfig, disable_noise


logger = logging.get_logger(__name__)

BASE_NAMES = {"vision": "vision encoder", "text": "language model"}
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token")
# Attributes that `transformers` sets on a quantized model; it and `peft` also read them from the outer model
QUANTIZATION_ATTRIBUTES = (
    *("hf_quantizer", "is_quantized", "quantization_method", "is_loaded_in_4bit", "is_loaded_in_8bit"),
    *("is_4bit_serializable", "is_8bit_serializable"),
)


def hub_arguments(arguments: dict) -> dict:
    """The arguments about downloading files, which apply to the adapter and to the base models."""
    return {name: arguments[name] for name in HUB_ARGUMENTS if name in arguments}


def has_file(location, name: str, **source) -> bool:
    """Whether a repository or folder has a file. Returns `False` if this cannot be determined."""
    options = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        return cached_file(location, name, **options, **source) is not None
    except OSError:  # neither a folder nor a repository
        return False


# --- loading ---


def load_base_config(location, key: str, revision, **hub_kwargs):
    """The config of a base model (`"vision"` or `"text"`) without noise; of a two-tower model, that of the tower."""
    with _explain_base_errors(location, key):
        config = AutoConfig.from_pretrained(location, revision=revision, trust_remote_code=False, **hub_kwargs)
    return disable_noise(getattr(config, f"{key}_config", config))


def find_commit(location, revision: str | None, **source) -> str | None:
    """The commit of a branch or tag of a repository on the Hub; `None` for a folder."""
    return extract_commit_hash(cached_file(location, CONFIG_NAME, revision=revision, **source), None)


def load_bases(config: DehvfConfig, vision_model, text_model, **kwargs) -> tuple[PreTrainedModel, PreTrainedModel]:
    """
    Loads the vision encoder and the language model as `transformers` does (shards, quantization, ZeRO-3, ...). Their
    configs and commits are written to `config`.

    Raises:
        OSError: if a base model cannot be found.
        ValueError: if it lacks tensors, has other sizes than in `config`, or is a model with remote code.
    """
    kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))
    # A repository with a stock model may contain code too, and saved adapters are loaded on the stock model
    kwargs["trust_remote_code"] = False
    if attn_implementation := kwargs.pop("attn_implementation", None):
        config._attn_implementation = attn_implementation  # a string, or a dict with an entry for each sub-config
    with torch.random.fork_rng(devices=[]):  # under ZeRO-3, random numbers are drawn before a base model is loaded
        causal_lm = _load_base(AutoModelForCausalLM, text_model, "text", config, **kwargs)
        shared = {name: kwargs[name] for name in ("dtype", "use_safetensors") if name in kwargs}
        vision_tower = _load_base(AutoModel, vision_model, "vision", config, **shared, **hub_arguments(kwargs))
    for module in causal_lm.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # On such CPUs, bitsandbytes permanently repacks 4-bit weights at the first inference and has no backward
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
    warn_of_other_values(found, expected, location)
    found._attn_implementation = expected._attn_implementation
    dtype = found.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
    if key == "text":
        model_class = auto_class._model_mapping.get(type(found), None)  # if there is none, `from_pretrained` says so
        kwargs = with_names_of_base(kwargs, getattr(model_class, "base_model_prefix", "model"))
    with _explain_base_errors(location, key), _zero3_dtype(dtype):
        base, info = auto_class.from_pretrained(
            location, config=found, revision=revision, output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{location} lacks {len(missing)} tensors of the {type(base).__name__} that the adapter needs, such as "
            f"{missing[0]}; they would be random. Give the repository or folder of the complete model."
        )
    base.config._name_or_path = getattr(config, f"{key}_model_id")  # a saved config must not name a local folder
    setattr(config, f"{key}_config", base.config)
    return base


def drop_ignored_values(config: GenerationConfig, location) -> GenerationConfig:
    """
    Resets the values of a loaded generation config that have no effect or are not valid, such as a `temperature`
    without `do_sample`, and warns of them. `transformers` loads such a config, but refuses to save it once it was
    changed, for example by a Trainer.
    """
    try:
        config.validate(strict=True)
    except ValueError as error:
        ignored = re.findall(r"^- `(\w+)`: ", str(error), re.MULTILINE)
        values = ", ".join(f"`{name}={getattr(config, name)}`" for name in ignored)
        config.update(**dict.fromkeys(ignored))
        logger.warning(
            f"The {GENERATION_CONFIG_NAME} of {location} has values that have no effect or are not valid: {values}. "
            "They are left out, also when the adapter is saved. To use sampling values, pass them to `generate`, "
            "together with `do_sample=True`."
        )
    return config


def with_names_of_base(arguments: dict, prefix: str) -> dict:
    """
    In `device_map` and `quantization_config`, replaces names of the loaded model (`model.language_model.layers.0`) by
    those of the class of its language model (`model.layers.0`), which are valid too.

    Args:
        prefix: the name of the model without head in that class (`base_model_prefix`).
    """

    def rename(name: str) -> str:
        return re.sub(r"^model\.language_model(?=\.|$)", prefix, name)

    device_map = arguments.get("device_map")
    if isinstance(device_map, dict) and any(rename(name) != name for name in device_map):
        # The vision encoder and the adapter are placed on the device of the language model
        own = (name for name in device_map if rename(name) != name or not name.startswith("model."))
        arguments = {**arguments, "device_map": {rename(name): device_map[name] for name in own}}
    if quantization := deepcopy(arguments.get("quantization_config")):
        values = quantization if isinstance(quantization, dict) else vars(quantization)
        for field in ("llm_int8_skip_modules", "modules_to_not_convert"):
            if values.get(field):
                values[field] = [rename(name) for name in values[field]]
        arguments = {**arguments, "quantization_config": quantization}
    return arguments


def check_base(found, expected, location):
    """Raises `ValueError` if a base model is of another type or size than the base model of the adapter."""
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "image_size", "patch_size"):
        sizes = getattr(found, name, None), getattr(expected, name, None)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The base model in {location} has `{name}={sizes[0]}`, but the adapter was made for "
                f"`{name}={sizes[1]}`. Give the base model that the adapter was trained on."
            )


def warn_of_other_values(found, expected, location):
    """Warns if the config of a base model was given other values, such as `rope_parameters`: they have no effect."""
    # Values that depend on how the model was saved and loaded
    ignored = {"architectures", "dtype", "transformers_version", "quantization_config", "use_cache"}
    given, own = ({name: v for name, v in config.to_dict().items() if name[0] != "_"} for config in (expected, found))
    differing = [name for name in given.keys() & own.keys() - ignored if given[name] != own[name]]
    if differing:
        values = ", ".join(f"`{name}={given[name]}` (there {own[name]})" for name in sorted(differing))
        logger.warning(
            f"Some values of the config differ from those of the base model in {location} and have no effect: "
            f"{values}. To use them, save the base model with these values in its config, and pass its folder."
        )


def take_given_base(config: DehvfConfig, key: str, base: PreTrainedModel):
    """
    Checks a base model that was given to a constructor, writes its config to `config`, and removes its noise, as if it
    was loaded. Raises `ValueError` as `check_base`.
    """
    expected, place = getattr(config, f"{key}_config"), f"the {type(base).__name__} that was given"
    check_base(base.config, expected, place)
    for part in (base.config, *base.modules()):  # modules keep the values with which they were built
        disable_noise(part)
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0
    warn_of_other_values(base.config, expected, place)
    setattr(config, f"{key}_config", base.config)


@contextmanager
def _explain_base_errors(location, key: str):
    """Explains which base model could not be loaded, since the user has only named the adapter."""
    try:
        yield
    except (OSError, HTTPError) as error:
        # The error of the Hub is more precise than the message of `transformers`
        cause = error if isinstance(error, HTTPError) else error.__cause__ or error
        advice = f"If you have a copy of it, pass `{key}_model=` with its folder."
        # safetensors says of such a file that it does not exist
        if unreadable := [file for file in Path(location).glob("*.safetensors") if not os.access(file, os.R_OK)]:
            cause = f"you have no permission to read {unreadable[0]}."
            advice = f"Ask its owner for `chmod a+r {unreadable[0]}`, or pass `{key}_model=` with another copy."
        if isinstance(cause, HTTPError):
            advice += (
                " If it is private or gated, ask for access on its page and log in (`hf auth login`) or pass `token=`."
                " If the connection broke, try again: complete files are kept."
            )
        raise OSError(
            f"The {BASE_NAMES[key]} {location}, which the adapter needs, could not be loaded: {cause}\n{advice}"
        ) from error
    except TypeError as error:  # the class of the base model has no such argument
        if (found := re.search(r"unexpected keyword argument '(\w+)'", str(error))) is None:
            raise
        close = get_close_matches(found[1], DehvfConfig.__dataclass_fields__, n=1)
        raise TypeError(
            f"`{found[1]}` is neither a field of DehvfConfig nor an argument that the {BASE_NAMES[key]} takes."
            f"{f' Did you mean `{close[0]}`?' if close else ''}"
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
    Under ZeRO-3, a base model is sharded across the processes while it is loaded, in the training dtype of DeepSpeed.
    This is float32, as the adapter needs. Inside this context it is the dtype of the base model.
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
    """The device on which a model computes. Unused weights that `device_map` offloads are on the meta device."""
    places = getattr(causal_lm, "hf_device_map", {"": causal_lm.device}).values()
    return torch.device(next((place for place in places if place not in ("cpu", "disk")), "cpu"))


def share_placement(source: PreTrainedModel, target: PreTrainedModel):
    """Copies the attributes about device map and quantization to a model that wraps `source` or is part of it."""
    for name in ("hf_device_map", *QUANTIZATION_ATTRIBUTES):
        if hasattr(source, name):
            setattr(target, name, getattr(source, name))


# --- saving ---


def read_parameters(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The parameters of a module by name, also those that `accelerate` has offloaded."""
    parameters = dict(module.named_parameters())
    is_offloaded = any(parameter.is_meta for parameter in parameters.values())
    if is_offloaded and any(hasattr(part, "_hf_hook") for part in module.modules()):
        from accelerate.utils.modeling import get_state_dict_offloaded_model

        loaded = get_state_dict_offloaded_model(module)
        parameters |= {name: loaded.get(name, parameter) for name, parameter in parameters.items()}
    return parameters


def fetch_merged_bases(location, subfolder: str = "", **source) -> dict[str, str]:
    """The folders of the base models that `save_pretrained(..., merge_base=True)` has written beside the adapter."""
    folder = location
    if not os.path.isdir(location):
        suffixes = ("safetensors", "json", "jinja", "txt", "model")
        patterns = [os.path.join(subfolder, f"*_model/*.{suffix}") for suffix in suffixes]
        folder = snapshot_download(location, allow_patterns=patterns, **source)
    return {key: os.path.join(folder, subfolder, f"{key}_model") for key in BASE_NAMES}


def assemble_causal_lm(language_model: PreTrainedModel, head: torch.nn.Module | None) -> PreTrainedModel:
    """Combines the language model and its head into one causal language model, as they were loaded."""
    with torch.device("meta"):
        causal_lm = AutoModelForCausalLM.from_config(language_model.config)
    setattr(causal_lm, causal_lm.base_model_prefix, language_model)
    causal_lm.set_output_embeddings(head)
    return causal_lm


def check_base_can_be_saved(base: PreTrainedModel, key: str):
    """
    Raises `ValueError` if the quantization of a base model cannot be saved, or if the base model lacks tensors of its
    class, so that it could not be loaded again.
    """
    if getattr(base, "is_quantized", False):  # its tensors have other names
        if not base.hf_quantizer.is_serializable():
            method = base.hf_quantizer.quantization_config.quant_method
            raise ValueError(
                f"The {BASE_NAMES[key]} is quantized with {getattr(method, 'value', method)} and cannot be saved in "
                "this form. Load it without quantization to save it with `merge_base=True`, or save only the adapter."
            )
        return
    auto_class = AutoModelForCausalLM if key == "text" else AutoModel
    with torch.device("meta"):
        expected = auto_class.from_config(base.config).state_dict()
    if missing := sorted(expected.keys() - base.state_dict().keys()):
        raise ValueError(
            f"The {BASE_NAMES[key]} lacks {len(missing)} tensors that it is loaded with, such as {missing[0]}, "
            "because modules in it are wrapped, for example by `peft`, `torch.compile` or a parametrization. Merge or "
            "remove the wrappers before saving with `merge_base=True`."
        )


def has_values(tensor: torch.Tensor) -> bool:
    """Whether the values can be read: not those of `DTensor` and of the quantized tensors of torchao."""
    return not tensor.is_meta and type(tensor.data) is torch.Tensor


def has_same_tensors(own: dict[str, torch.Tensor], folder) -> bool:
    """
    Whether there is a copy of a base model in a folder, and all tensors that this process holds equal it, up to
    rounding. Of the copy, one tensor is in memory at a time.
    """
    files = list(Path(folder).glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys() & own.keys():
                tensor = own[name].detach()
                if has_values(tensor) and tensor.numel():
                    if not _is_copy(opened.get_tensor(name), tensor):
                        return False
    return bool(files)


def _is_copy(saved: torch.Tensor, tensor: torch.Tensor) -> bool:
    if saved.is_floating_point() and not tensor.is_floating_point():
        return True  # it was quantized when it was loaded, so that it cannot be compared
    if saved.shape != tensor.shape:
        return False
    # In parts, since converted copies of large embeddings take several GB
    parts = zip(saved.flatten().split(2**24), tensor.flatten().split(2**24))
    return all(_are_close(one, other.cpu()) for one, other in parts)


def save_base(base: PreTrainedModel, folder, is_main_process: bool, **kwargs):
    """Writes a base model to a folder. Raises `ValueError` if ZeRO-3 has sharded it across the processes."""
    if any(not parameter.numel() for parameter in base.parameters()):
        raise ValueError(
            "`merge_base` was given, but ZeRO-3 has sharded the base models across the processes. Save the adapter, "
            "load it in a single process, and merge there."
        )
    # Files of an earlier save, which `transformers` keeps: it would load the single file in place of new shards
    index, single = Path(folder, SAFE_WEIGHTS_INDEX_NAME), Path(folder, SAFE_WEIGHTS_NAME)
    if is_main_process:
        index.unlink(missing_ok=True)
    base.save_pretrained(folder, is_main_process, **kwargs)
    if is_main_process and index.is_file():
        single.unlink(missing_ok=True)
    for file in os.scandir(folder) if is_main_process else ():
        shutil.copymode(os.path.join(folder, CONFIG_NAME), file)  # safetensors denies other users access


# --- noticing changes ---


def sample_tensors(tensors: Iterable[tuple[str, torch.Tensor]], embeddings: Iterable = ()) -> dict[str, tuple]:
    """
    Returns for each tensor, by name, its shape, whether it is trained, and, if this process has the whole tensor, a
    sample of its values and where and how often they were written. For a matrix the sample has one value of each row,
    so that a new embedding of a single token is noticed. For tensors with more than 2**20 values, it has the first 16
    values, and for `embeddings` also the last 16, where new tokens are: reading others would load the whole mapped
    file into memory.
    """
    samples, embedding_ids = {}, {id(tensor) for tensor in embeddings}
    for name, tensor in tensors:
        numbers = written = None
        if has_values(tensor):
            row, values = tensor.shape[-1] if tensor.dim() > 1 else 1, tensor.detach().flatten()
            picked = values[:: max(row, len(values) // 512) + 1] if len(values) <= 2**20 else values[:16]
            if id(tensor) in embedding_ids:
                picked = torch.cat((picked, values[-16:]))
            numbers = picked.to("cpu", copy=True)
            written = None if tensor.is_inference() else (tensor.data_ptr(), tensor._version)
        samples[name] = tuple(tensor.shape), tensor.requires_grad, numbers, written
    return samples


def find_changes(before: dict[str, tuple], now: dict[str, tuple]) -> list[str]:
    """Names of the tensors that were added, removed, resized, trained or written to, or whose values have changed."""
    common = before.keys() & now.keys()
    return sorted((before.keys() ^ now.keys()) | {name for name in common if _has_changed(before[name], now[name])})


def _has_changed(before: tuple, now: tuple) -> bool:
    places = before[3], now[3]
    is_rewritten = None not in places and places[0][0] == places[1][0] and places[0][1] != places[1][1]
    return before[:2] != now[:2] or is_rewritten or not _are_close(before[2], now[2])


def _are_close(before: torch.Tensor | None, now: torch.Tensor | None) -> bool:
    if before is None or now is None or before.shape != now.shape:
        return True  # offloaded, or of another shape, which is compared separately
    if before.dtype == now.dtype:
        return torch.equal(before, now)
    return torch.allclose(before.double(), now.double(), rtol=2**-7, atol=1e-6)  # only the dtype has changed
