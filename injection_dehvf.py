# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
How the FFNs of stock `transformers` layers are extended: by adapters in the vision encoder, by memory slots in the
language model.

The classes of layers and FFNs are replaced by subclasses of themselves, so parameters, names, hooks and `isinstance`
stay as they were. What an FFN adds differs from call to call, and the FFN of a stock layer takes one argument. So it
travels in two steps, and nothing of it is ever kept on a module: `run_extended` lays out the extensions of all layers
for the current thread, each layer takes its own as an argument, and its FFN finds it for as long as that layer runs.
The argument makes gradient checkpointing work: when a layer is run again during backward, it brings its extension
along, in whichever thread that happens.
"""

import threading
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from types import MethodType

import torch
from torch import nn
from torch.nn import functional as F
from transformers.utils import ModelOutput

from .configuration_dehvf import DehvfConfig


class _Running(threading.local):
    """What runs in this thread. A `ContextVar` would do as well, but `torch.compile` cannot trace one."""

    def __init__(self):  # not as attributes of the class: `torch.compile` guards what the instance has
        self.extensions = None  # of each layer of the base model that runs
        self.extension = None  # of the layer that runs
        self.layer_outputs = None  # of the layers that ran


_RUNNING = _Running()


def run_extended(base_model: nn.Module, extensions, *args, layer_outputs: list | None = None, **kwargs):
    """
    Runs a base model whose layers were extended by `extend_layers`.

    Args:
        extensions: for each layer what its FFN adds, or `None`; or `None` to run the base model as it is.
        layer_outputs: a list to append the output of each layer to. `output_hidden_states` gives the same, but through
            hooks that cannot be pickled, and behind a lock at which `torch.compile` breaks the graph.
    """
    outer = _RUNNING.extensions, _RUNNING.layer_outputs
    _RUNNING.extensions, _RUNNING.layer_outputs = extensions, layer_outputs
    try:
        return base_model(*args, **kwargs)
    finally:
        _RUNNING.extensions, _RUNNING.layer_outputs = outer


def current_extension():
    """What the FFN of the layer that runs in this thread adds, e.g. a [`LayerMemory`]; `None` if nothing."""
    return _RUNNING.extension


class _Extended:
    """Base of the classes that are put in front of a stock class."""

    def __reduce_ex__(self, protocol):
        # `pickle` cannot find a class that was made at run time by its name
        return _new_extended, type(self).parts, vars(self)


class ExtendedLayer(_Extended):
    """Put in front of the class of an encoder or decoder layer: hands the layer's extension to its FFN."""

    def __call__(self, *args, **kwargs):
        if _RUNNING.extensions is not None:
            kwargs["extension"] = _RUNNING.extensions[self.extension_index]
        output = super().__call__(*args, **kwargs)
        if _RUNNING.layer_outputs is not None:
            _RUNNING.layer_outputs.append(output[0] if isinstance(output, tuple) else output)
        return output

    def forward(self, *args, extension=None, **kwargs):
        outer, _RUNNING.extension = _RUNNING.extension, extension
        try:
            return super().forward(*args, **kwargs)
        finally:
            _RUNNING.extension = outer


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class VisionAdapter(nn.Module):
    """
    What is added to one FFN of the vision encoder: `scale * up(GELU(down(x)))` (method step 10, from MemVP).

    Args:
        width: hidden size of the vision encoder.
        size: hidden width of the adapter.
        scale: of what is added.
        dropout: probability, on the hidden activations.
    """

    def __init__(self, width: int, size: int, scale: float, dropout: float):
        super().__init__()
        self.down = nn.Linear(width, size, bias=False)
        self.up = ZeroLinear(size, width, bias=False)
        self.dropout = nn.Dropout(dropout)
        self.scale = scale

    @classmethod
    def from_config(cls, config: DehvfConfig) -> "VisionAdapter":
        size, scale, dropout = config.vision_adapter_size, config.vision_adapter_scale, config.vision_adapter_dropout
        return cls(config.vision_config.hidden_size, size, scale, dropout)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = self.down(hidden_states.to(self.down.weight.dtype))
        return (self.scale * self.up(self.dropout(F.gelu(hidden)))).to(hidden_states.dtype)


class AdaptedFFN(_Extended):
    """
    Put in front of the class of a vision FFN: adds what its adapter computes (method step 10). DINOv2 multiplies the
    sum by its layer scale.
    """

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output, adapter = super().forward(hidden_states, *args, **kwargs), current_extension()
        return output if adapter is None else output + adapter(hidden_states)


class AdaptedFFNStart(_Extended):
    """Put in front of the class of the first half of a vision FFN that is two modules: runs the adapter."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if (adapter := current_extension()) is not None:
            _RUNNING.extension = adapter(hidden_states)
        return super().forward(hidden_states)


class AdaptedFFNEnd(_Extended):
    """Put in front of the class of the second half: adds what the adapter gave in the first."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        output, adapted = super().forward(*args, **kwargs), current_extension()
        return output if adapted is None else output + adapted


@dataclass
class LayerMemory(ModelOutput):
    """
    What the FFN of one language layer reads. `num_patches` and `num_memory_slots` are those of all images of a sample.

    Args:
        key_features (`torch.Tensor` of shape `(batch_size, num_patches, projector_hidden_size + 1)`, *optional*):
            visual features of the keys; `None` where keys carry no image. A batch size of 1 serves a whole batch.
        value_features: likewise of the values.
        key_matrix (`torch.Tensor` of shape `(num_memory_slots + projector_hidden_size + 1, language_hidden_size)`):
            the key slots and, unless they carry no image, lambda times `W_2` and `b_2`, so that tokens are multiplied
            by both at once. The same for all layers.
        value_matrix (`torch.Tensor` of shape `(language_hidden_size, num_memory_slots + projector_hidden_size + 1)`):
            likewise.
        slot_mask (`torch.Tensor` of shape `(batch_size, 1, num_memory_slots)`, *optional*): 0 for slots that are not
            read, where samples have different numbers of images, else 1.
        form (`str`), scale (`float`), dropout (`float`): `memory_form`, `memory_scale` and `memory_dropout`.
    """

    key_features: torch.Tensor | None = None
    value_features: torch.Tensor | None = None
    key_matrix: torch.Tensor | None = None
    value_matrix: torch.Tensor | None = None
    slot_mask: torch.Tensor | None = None
    form: str | None = None
    scale: float | None = None
    dropout: float | None = None

    def is_materialised(self, hidden_states: torch.Tensor) -> bool:
        """Whether these tokens read keys and values in full, see [`MemoryFFN`]."""
        features = self.value_features if self.key_features is None else self.key_features
        if features is None or self.form == "factored":
            return False
        if self.form == "materialised":
            return True
        # Backward would need the keys and values of all layers at once, and an exported graph serves all lengths
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        (num_images, num_patches, _), (batch_size, num_tokens, width) = features.shape, hidden_states.shape
        return batch_size * num_tokens * (width + num_patches) > num_images * num_patches * width


@dataclass
class MixedLayerMemory(ModelOutput):
    """
    What the FFN of one language layer reads where samples of a batch have adapters of their own.

    Args:
        memories (`tuple[LayerMemory]`): one for each adapter.
        rows (`tuple[torch.LongTensor]`): for each of them the rows of the batch that read it.
    """

    memories: tuple[LayerMemory, ...] | None = None
    rows: tuple[torch.Tensor, ...] | None = None


class MemoryFFN(_Extended):
    """
    Put in front of the class of a language model's FFN: appends memory slots to it (method step 8).

    On a two-matrix FFN this is concatenating the keys to `W_1` and the values to `W_2` (paper, equation 13); in a
    gated FFN the appended units have a gate of one.

    An image's visual features F (n c+1) and the shared basis W (h c+1) can be read in two ways with the same result.
    Factored, `(x W) F^T`: `T (h + n) (c + 1)` products for T tokens of the image, keys and values alike. Materialised,
    `x (W F^T)`: `n h (c + 1)` products whatever T is, since the slots themselves have to be read in both. So the first
    is cheaper up to `T = n h / (n + h)`: at 7B 241 tokens, and always in decoding.
    """

    @property
    def memory(self) -> LayerMemory | MixedLayerMemory | None:
        """What this FFN reads in the call that runs in this thread."""
        return current_extension()

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output, memory = super().forward(hidden_states, *args, **kwargs), self.memory
        if memory is None:
            return output
        if isinstance(memory, MixedLayerMemory):
            for own_memory, rows in zip(memory.memories, memory.rows):
                read = self.lookup(hidden_states[rows], own_memory)
                output = output.index_add(0, rows, read, alpha=own_memory.scale)
            return output
        return torch.add(output, self.lookup(hidden_states, memory), alpha=memory.scale)

    def lookup(self, hidden_states: torch.Tensor, memory: LayerMemory) -> torch.Tensor:
        """`phi(x K^T) V`; hidden_states and result: B T h."""
        weights = F.dropout(self.slot_activations(hidden_states, memory), memory.dropout, self.training)
        if memory.value_features is None:
            return F.linear(weights, memory.value_matrix)  # B T h
        num_patches = memory.value_features.shape[1]
        first, rest = _split(weights, num_patches)
        if memory.is_materialised(hidden_states):
            slots, basis = _split(memory.value_matrix, weights.shape[-1])
            patch_slots, other_slots = _split(slots, num_patches)
            values = patch_slots + basis @ memory.value_features.mT  # B h n
            return first @ values.mT + F.linear(rest, other_slots)
        visual = first @ memory.value_features  # B T c+1
        return F.linear(torch.cat((weights, visual), dim=-1), memory.value_matrix)

    def slot_activations(self, hidden_states: torch.Tensor, memory: LayerMemory) -> torch.Tensor:
        """`phi(x K^T)`: how much each slot is read, B T S. The first n slots belong to the patches, row by row."""
        # Slots past the patches have no visual part, and a sample without an image has rows of zeros
        if memory.key_features is None:
            scores = F.linear(hidden_states, memory.key_matrix)  # B T S
        else:
            num_patches, width = memory.key_features.shape[1:]
            num_slots = len(memory.key_matrix) - width
            if memory.is_materialised(hidden_states):
                slots, basis = _split(memory.key_matrix.T, num_slots)
                patch_slots, other_slots = _split(slots, num_patches)
                keys = patch_slots.T + memory.key_features @ basis.T  # B n h
                first, rest = hidden_states @ keys.mT, hidden_states @ other_slots
            else:
                scores, inner = _split(F.linear(hidden_states, memory.key_matrix), num_slots)
                first, rest = _split(scores, num_patches)
                # This way round since both factors lie in memory as they are read, also for a single token
                first = first + (memory.key_features @ inner.mT).mT
            scores = torch.cat((first, rest), dim=-1)
        activations = getattr(self, self.activation_name)(scores)
        return activations if memory.slot_mask is None else activations * memory.slot_mask


def _split(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `size` columns, and the others. Its backward writes the gradient once, unlike that of two slices."""
    return tensor.split((size, tensor.shape[-1] - size), dim=-1)


def extend_layers(layers: Iterable[nn.Module], ffn: str | tuple[str, str], ffn_class: type, **attributes):
    """
    Extends the layers of a base model.

    Args:
        ffn: the name of the FFN in each layer; or of its two halves, which only vision adapters extend.
        ffn_class: [`AdaptedFFN`] or [`MemoryFFN`].
        attributes: set on each FFN.
    """
    for index, layer in enumerate(layers):
        _extend(layer, ExtendedLayer, extension_index=index)
        if isinstance(ffn, str):
            _extend(layer.get_submodule(ffn), ffn_class, **attributes)
        else:
            _extend(layer.get_submodule(ffn[0]), AdaptedFFNStart)
            _extend(layer.get_submodule(ffn[1]), AdaptedFFNEnd)


def _extend(module: nn.Module, behaviour: type, **attributes):
    if isinstance(module, behaviour):  # a base model that another model has extended serves both
        return
    module.__class__ = _extended_class(behaviour, type(module))
    vars(module).update(attributes)
    if hasattr(module, "_old_forward"):  # the hook of a dispatched base model calls the `forward` that it found
        module._old_forward = MethodType(type(module).forward, module)


@cache
def _extended_class(behaviour: type, base: type) -> type:
    return type(base.__name__, (behaviour, base), {"parts": (behaviour, base)})


def _new_extended(behaviour: type, base: type) -> nn.Module:
    extended = _extended_class(behaviour, base)
    return extended.__new__(extended)


def checkpointing_arguments(given: dict | None) -> dict:
    """
    Arguments of `torch.utils.checkpoint.checkpoint`, which is re-entrant by default.

    Raises:
        ValueError: if `use_reentrant=True` was given.
    """
    if (given or {}).get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` was given, but re-entrant checkpointing drops the gradients of arguments passed by "
            "keyword, and the visual memory is one: the adapter would not learn. Set `use_reentrant` to False."
        )
    return {**(given or {}), "use_reentrant": False}
