# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Finds the parts of a base model that DEHVF extends and reads: its layers, their FFNs, the activation, the final norm
and the tokens before the patches.

They are found by rules on an empty copy of the model, which is built from its config on the meta device, and checked
by running this copy, which only computes shapes. A model that is not supported is thus refused before its weights are
loaded. The tables below contain only what cannot be found in this way.
"""

import copy
import inspect
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import NamedTuple

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedConfig
from transformers.activations import GELUActivation

from .configuration_dehvf import DehvfConfig


# Modules that define activations. Some models define their own GELU.
ACTIVATION_MODULES = (GELUActivation.__module__, nn.GELU.__module__)
# The two halves of an FFN that is not a single module
SPLIT_FFN = ("intermediate", "output")
# Words in the names of modules by which unsupported kinds of models are recognised
EXPERTS, CROSS_ATTENTION = ("expert", "router"), ("encoder_attn", "cross_attn", "crossattention")
STATE_SPACE = ("mamba", "mixer", "lstm", "time_shift")
# Rotary embeddings whose frequencies follow the positions of a call, which an empty copy does not have
ROPE_OF_POSITIONS = ("dynamic", "longrope")
# Reasons that cannot be found from the modules of a model or its shapes
TEXT_REFUSALS = {
    "dory": "it runs some of its layers several times",
    "moshi": "it reads text and audio tokens side by side",
    "xlnet": "its hidden states have the tokens first and the batch second",
}
VISION_REFUSALS = {"vit_mae": "it drops random patches of each image"}


class TextLayout(NamedTuple):
    """The names of the modules of a language model that DEHVF extends."""

    layers: str  # the list of layers
    ffn: str  # in each layer
    activation: str  # in each FFN

    def ffns(self, language_model: nn.Module) -> list[nn.Module]:
        """The FFNs of all layers."""
        return [layer.get_submodule(self.ffn) for layer in language_model.get_submodule(self.layers)]


class VisionLayout(NamedTuple):
    """The names of the modules of a vision encoder that DEHVF extends and reads."""

    layers: str  # the list of layers
    ffn: str | tuple[str, str]  # in each layer; or its two halves
    norm: str | None  # the norm after the last layer
    num_prefix_tokens: int  # tokens before the patches: the class token, registers, ...
    interpolation: dict  # arguments of `forward` for images of another size than the encoder's own

    @property
    def has_class_token(self) -> bool:
        """Whether there is a class token, at position 0."""
        return self.num_prefix_tokens > 0


class Refusal(Exception):
    """The reason why a base model cannot be extended."""


def check_layouts(config: DehvfConfig):
    """Raises `ValueError` if one of the base models cannot be extended."""
    find_text_layout(config.text_config)
    find_vision_layout(config.vision_config, config.image_size)


def _explained(key: str, requirement: str):
    """Decorator of a function of a base model's config: caches its results, and adds advice to its refusals."""

    def decorate(find: Callable):
        found = {}

        @wraps(find)
        def find_or_explain(base_config: PreTrainedConfig, *args):
            identity = type(base_config), base_config.to_json_string(use_diff=False), args
            if identity not in found:
                try:
                    found[identity] = find(base_config, *args)
                except Refusal as refusal:
                    raise ValueError(
                        f"DEHVF cannot extend `{base_config.model_type}` (`{key}_config`): {refusal}. {requirement} "
                        f"Give another `{key}_model`; docs/bases.md lists the types that work."
                    ) from refusal.__cause__
            return found[identity]

        return find_or_explain

    return decorate


@_explained("text", "DEHVF supports decoders whose layers each have one FFN module with one activation.")
def find_text_layout(text_config: PreTrainedConfig) -> TextLayout:
    """Finds the modules of a language model. Raises `ValueError` that says why if it cannot be extended."""
    if reason := TEXT_REFUSALS.get(text_config.model_type):
        raise Refusal(reason)
    if getattr(text_config, "hidden_size_per_layer_input", None):
        raise Refusal("each of its layers reads token ids besides hidden states (`hidden_size_per_layer_input`)")
    if getattr(text_config, "is_encoder_decoder", False):
        raise Refusal("it is an encoder-decoder model")
    if (inner := text_config.get_text_config()) is not text_config:
        raise Refusal(f"it is made of several models; its language model is of the type `{inner.model_type}`")
    causal_lm = _empty_copy(text_config, MODEL_FOR_CAUSAL_LM_MAPPING, "a causal language model")
    base, head = causal_lm.base_model, causal_lm.get_output_embeddings()
    if base is causal_lm:
        raise Refusal("its head and its layers are one model")
    layers = _find_layers(base)
    ffn, activation = _find_ffns(base.get_submodule(layers))
    own = {id(parameter) for module in (base, head) for parameter in module.parameters()}
    if any(id(parameter) not in own for parameter in causal_lm.parameters()):
        raise Refusal("its head is more than one matrix")
    names = inspect.signature(base.forward).parameters.keys()
    if "inputs_embeds" not in names:
        raise Refusal("it does not take `inputs_embeds`")
    if not names & {"cache", "past_key_values"}:  # which of them depends on the release
        raise Refusal("it has no cache of earlier tokens for `generate`")
    layout = TextLayout(layers, ffn, activation)
    states = torch.empty(2, 3, text_config.hidden_size, device="meta")
    # With a cache, since without one the creation of masks reads values
    arguments = {"inputs_embeds": states, "use_cache": True}
    with _recorded(layout.ffns(base)) as calls:
        outputs = _run(base, "`inputs_embeds`", **arguments)
    if outputs.last_hidden_state.shape != states.shape:
        raise Refusal(f"its hidden states have the width {outputs.last_hidden_state.shape[-1]}, not `hidden_size`")
    _check_calls(calls, text_config.num_hidden_layers, tuple(states.shape))
    return layout


@_explained("vision", "DEHVF supports stacks of layers with an FFN each, whose only input is square images.")
def find_vision_layout(vision_config: PreTrainedConfig, image_size: int | None = None) -> VisionLayout:
    """
    Finds the modules of a vision encoder.

    Args:
        image_size: side of the images, if it differs from the encoder's own.

    Raises:
        ValueError: if it cannot be extended, or does not take images of this size; the message says why.
    """
    if reason := VISION_REFUSALS.get(vision_config.model_type):
        raise Refusal(reason)
    tower = _empty_copy(vision_config, MODEL_MAPPING, "a vision encoder")
    names = inspect.signature(tower.forward).parameters
    if "pixel_values" not in names:
        raise Refusal("it does not take `pixel_values`")
    layers = _find_layers(tower)
    stack = tower.get_submodule(layers)
    if all(hasattr(layer, name) for layer in stack for name in SPLIT_FFN):
        ffn = SPLIT_FFN
    else:
        ffn, _ = _find_ffns(stack, needs_activation=False)
    interpolation = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in names else {}
    own_size, width = vision_config.image_size, vision_config.hidden_size
    first = ffn if isinstance(ffn, str) else ffn[0]
    lengths = {}  # number of tokens that are not patches, by image size
    for side in {own_size, image_size or own_size}:
        pixel_values = torch.empty(2, vision_config.num_channels, side, side, device="meta")
        arguments = {} if side == own_size else interpolation
        with _recorded(stack) as states, _recorded(layer.get_submodule(first) for layer in stack) as calls:
            _run(tower, f"images of {side} pixels", pixel_values, **arguments)
        shape = states[0][-1] if states else None
        if shape is None or len(shape) != 3 or shape[::2] != (2, width):
            raise Refusal(f"its layers give hidden states of shape {shape}, not (batch, tokens, {width})")
        _check_calls(calls, vision_config.num_hidden_layers, shape, checks_output=isinstance(ffn, str))
        lengths[side] = shape[1] - (side // vision_config.patch_size) ** 2
    if len(set(lengths.values())) != 1 or min(lengths.values()) < 0:
        raise Refusal(
            f"it does not give one hidden state for each patch (image sizes: {', '.join(map(str, lengths))})"
        )
    return VisionLayout(layers, ffn, _find_norm(tower, layers), lengths[own_size], interpolation)


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def _empty_copy(base_config: PreTrainedConfig, mapping, kind: str) -> nn.Module:
    """The model of a config on the meta device. Does not use `from_config`, which shards the model under ZeRO-3."""
    base_config = copy.deepcopy(base_config)
    base_config._attn_implementation = "eager"
    rope = getattr(base_config, "rope_parameters", None) or {}
    for parameters in (rope, *rope.values()):  # some models have them for each type of layer
        if isinstance(parameters, dict) and parameters.get("rope_type") in ROPE_OF_POSITIONS:
            parameters["rope_type"] = "default"
    if type(base_config) not in mapping:
        raise Refusal(f"transformers has no class for it that is {kind}")
    try:
        with torch.device("meta"):
            return mapping[type(base_config)](base_config).eval()
    except Exception as error:  # a config from elsewhere can be wrong in more ways than could be listed
        raise Refusal(f"it cannot be built from its config ({_first_line(error)})") from error


def _find_layers(base: nn.Module) -> str:
    """The name of the only list of modules with children that is not inside another one."""
    stacks = []
    for name, module in base.named_modules():
        is_stack = isinstance(module, nn.ModuleList) and any(list(layer.children()) for layer in module)
        if is_stack and not any(name.startswith(f"{stack}.") for stack in stacks):
            stacks.append(name)
    if len(stacks) != 1:
        found = f"it has several stacks of layers ({', '.join(stacks)})" if stacks else "it has no list of layers"
        raise Refusal(found)
    return stacks[0]


def _find_ffns(layers: nn.ModuleList, needs_activation: bool = True) -> tuple[str, str | None]:
    """The names of the FFN in each layer and of the activation in the FFN."""
    parts = {name.lower() for layer in layers for name, _ in layer.named_modules()}
    if any(word in part for part in parts for word in EXPERTS):
        raise Refusal("its FFNs are a mixture of experts, and each token passes through some of them")
    if any(word in part for part in parts for word in CROSS_ATTENTION):
        raise Refusal("its layers read an encoder (cross-attention)")
    if needs_activation and all(hasattr(layer, name) for layer in layers for name in SPLIT_FFN):
        raise Refusal("its FFNs are two modules each (`intermediate` and `output`), as in encoders")
    places = {tuple(_ffns_of(layer)) for layer in layers}
    if not needs_activation and places == {()} and all(hasattr(layer, "mlp") for layer in layers):
        return "mlp", None
    found = {len(place) for place in places}
    if found == {1} and len(places) == 1:
        return places.pop()[0]
    if any(word in part for part in parts for word in STATE_SPACE):
        raise Refusal("it is a state space model, and not all of its layers have an FFN")
    if found == {0}:
        raise Refusal("its layers have no FFN module that contains its activation as a module")
    raise Refusal("its layers differ in their FFNs, or have several")


def _ffns_of(layer: nn.Module) -> Iterator[tuple[str, str]]:
    for name, module in layer.named_children():
        activations = [child for child, part in module.named_children() if _is_activation(part)]
        has_convolution = any(isinstance(part, nn.Conv1d) for part in module.modules())  # as token mixers have
        has_weights = any(parameter.dim() == 2 for parameter in module.parameters())
        if len(activations) == 1 and has_weights and not has_convolution:
            yield name, activations[0]


def _is_activation(module: nn.Module) -> bool:
    return type(module).__module__ in ACTIVATION_MODULES or "GELU" in type(module).__name__.upper()


def _find_norm(tower: nn.Module, layers: str) -> str | None:
    """The norm that is registered after the list of layers, or after a module that contains the list."""
    path = layers.split(".")
    for depth in range(len(path)):
        names = [name for name, _ in tower.get_submodule(".".join(path[:depth])).named_children()]
        for name in names[names.index(path[depth]) + 1 :]:
            if "norm" in name:
                return ".".join((*path[:depth], name))
    return None


@contextmanager
def _recorded(modules: Iterable[nn.Module]):
    """Yields a list of calls: the index of the module, and the shapes of its first input and of its output."""
    calls, hooks = [], []

    def record(index, module, args, kwargs, output):
        given = next(iter((*args, *kwargs.values())))
        returned = output[0] if isinstance(output, tuple) else output
        calls.append((index, tuple(given.shape), tuple(returned.shape)))

    for index, module in enumerate(modules):
        hooks.append(module.register_forward_hook(partial(record, index), with_kwargs=True))
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


def _run(base: nn.Module, what: str, *args, **kwargs):
    try:
        with torch.no_grad():
            return base(*args, **kwargs)
    except Exception as error:  # whatever the model does with inputs that it does not expect
        raise Refusal(f"it does not run on {what} alone ({_first_line(error)})") from error


def _check_calls(calls: list[tuple], num_layers: int, shape: tuple[int, ...], checks_output: bool = True):
    if [index for index, *_ in calls] != list(range(num_layers)):
        raise Refusal("its layers do not run their FFNs one after another and exactly once")
    for _, given, returned in calls:
        if given != shape or checks_output and returned != shape:
            raise Refusal(
                f"its FFNs take tensors of shape {given} and return {returned}, but its hidden states have {shape}"
            )
