# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Extends the FFNs of stock `transformers` layers: with adapters in the vision encoder and with memory slots in the
language model.

The classes of layers and FFNs are replaced by subclasses of themselves, so parameters, names, hooks and `isinstance`
do not change. The extension of an FFN (what it adds to its output) differs from call to call, but the FFN of a stock
layer takes only one argument. The extension is therefore passed in two steps and never stored on a module:
`run_extended` stores the extensions of all layers for the current thread, each layer receives its own as an argument,
and the FFN reads it from the current thread while the layer runs. Passing it as an argument of the layer makes
gradient checkpointing work: when a layer is recomputed during backward, possibly in another thread, it receives the
same extension.
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
    """State of the current thread. A `ContextVar` would work too, but `torch.compile` cannot trace it."""

    def __init__(self):  # not class attributes: `torch.compile` guards instance attributes
        self.extensions = None  # of all layers of the running base model
        self.extension = None  # of the running layer
        self.is_read = False  # whether the FFN of the running layer has read it
        self.layer_outputs = None  # of the layers that have run


_RUNNING = _Running()


def run_extended(base_model: nn.Module, extensions, *args, layer_outputs: list | None = None, **kwargs):
    """
    Runs a base model whose layers were extended by `extend_layers`.

    Args:
        extensions: for each layer the extension of its FFN, or `None`. `None` runs the base model unchanged.
        layer_outputs: a list to which the output of each layer is appended. `output_hidden_states` returns the same,
            but uses hooks that cannot be pickled and a lock at which `torch.compile` breaks the graph.
    """
    outer = _RUNNING.extensions, _RUNNING.layer_outputs
    _RUNNING.extensions, _RUNNING.layer_outputs = extensions, layer_outputs
    try:
        return base_model(*args, **kwargs)
    finally:
        _RUNNING.extensions, _RUNNING.layer_outputs = outer


def current_extension():
    """The extension of the layer that is running in this thread, e.g. a [`LayerMemory`], or `None`."""
    _RUNNING.is_read = True
    return _RUNNING.extension


class _Extended:
    """Base class of the mixins that are put in front of a stock class."""

    def __reduce_ex__(self, protocol):
        # `pickle` cannot find a class that was created at run time by its name
        return _new_extended, type(self).parts, vars(self)


class ExtendedLayer(_Extended):
    """Mixin for the class of an encoder or decoder layer: passes the layer's extension to its FFN."""

    def __call__(self, *args, **kwargs):
        if _RUNNING.extensions is not None:
            kwargs["extension"] = _RUNNING.extensions[self.extension_index]
        elif not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1:  # during backward
            raise RuntimeError(
                "A checkpoint wrapper around the layers of the base model recomputes them without the image. Use "
                "`model.gradient_checkpointing_enable()` (`--gradient_checkpointing true`) instead of "
                "`checkpoint_wrapper` or FSDP's `activation_checkpointing`."
            )
        output = super().__call__(*args, **kwargs)
        if _RUNNING.layer_outputs is not None:
            _RUNNING.layer_outputs.append(output[0] if isinstance(output, tuple) else output)
        return output

    def forward(self, *args, extension=None, **kwargs):
        outer = _RUNNING.extension, _RUNNING.is_read
        _RUNNING.extension, _RUNNING.is_read = extension, extension is None
        try:
            output = super().forward(*args, **kwargs)
            if not _RUNNING.is_read:  # the image would be ignored
                raise RuntimeError(
                    f"Layer {self.extension_index} of the base model has an FFN that DEHVF has not extended: it was "
                    "replaced after the model was built. Set the whole base model again, as in "
                    "`model.model.language_model = model.model.language_model`, which extends the new FFN. If "
                    "`accelerate` compiles regions of the model, compile the whole model instead."
                )
            return output
        finally:
            _RUNNING.extension, _RUNNING.is_read = outer


class ZeroLinear(nn.Linear):
    """A linear layer whose weights are initialized to zero."""


class VisionAdapter(nn.Module):
    """
    The adapter of one FFN of the vision encoder, which adds `scale * up(GELU(down(x)))` (method step 10, from MemVP).

    Args:
        width: hidden size of the vision encoder.
        size: hidden width of the adapter.
        scale: scale of the output.
        dropout: dropout probability of the hidden activations.
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
    """Mixin for a vision FFN: adds the adapter's output (method step 10). DINOv2 scales the sum by its layer scale."""

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output, adapter = super().forward(hidden_states, *args, **kwargs), current_extension()
        return output if adapter is None else output + adapter(hidden_states)


class AdaptedFFNStart(_Extended):
    """Mixin for the first half of a vision FFN that consists of two modules: runs the adapter."""

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        if (adapter := current_extension()) is not None:
            _RUNNING.extension = adapter(hidden_states)
        return super().forward(hidden_states)


class AdaptedFFNEnd(_Extended):
    """Mixin for the second half: adds the output of the adapter that the first half has run."""

    def forward(self, *args, **kwargs) -> torch.Tensor:
        output, adapted = super().forward(*args, **kwargs), current_extension()
        return output if adapted is None else output + adapted


@dataclass
class LayerMemory(ModelOutput):
    """
    The memory that the FFN of one language layer reads. `num_patches` and `num_memory_slots` count all images of a
    sample.

    Args:
        key_features (`torch.Tensor` of shape `(batch_size, num_patches, projector_hidden_size + 1)`, *optional*):
            visual features of the keys; `None` if the keys contain no image. With a batch size of 1, all samples read
            the same memory.
        value_features: the same for the values.
        key_matrix (`torch.Tensor` of shape `(num_memory_slots + projector_hidden_size + 1, language_hidden_size)`):
            the key slots and, if the keys contain an image, lambda times `W_2` and `b_2`, so that one product with the
            tokens computes both. The same for all layers.
        value_matrix (`torch.Tensor` of shape `(language_hidden_size, num_memory_slots + projector_hidden_size + 1)`):
            the value slots, with `W_2` and `b_2` as above.
        slot_mask (`torch.Tensor` of shape `(batch_size, 1, num_memory_slots)`, *optional*): 0 for slots that are not
            read, if samples have different numbers of images, else 1.
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
        """Whether these tokens read full keys and values, see [`MemoryFFN`]."""
        features = self.value_features if self.key_features is None else self.key_features
        if features is None or self.form == "factored":
            return False
        if self.form == "materialised":
            return True
        # Backward would need the keys and values of all layers at once, and an exported graph is used for all lengths
        if torch.is_grad_enabled() or torch.compiler.is_exporting():
            return False
        (num_images, num_patches, _), (batch_size, num_tokens, width) = features.shape, hidden_states.shape
        return batch_size * num_tokens * (width + num_patches) > num_images * num_patches * width


@dataclass
class MixedLayerMemory(ModelOutput):
    """
    The memory that the FFN of one language layer reads if the samples of a batch have different adapters.

    Args:
        memories (`tuple[LayerMemory]`): one for each adapter.
        rows (`tuple[torch.LongTensor]`): for each memory the rows of the batch that read it.
    """

    memories: tuple[LayerMemory, ...] | None = None
    rows: tuple[torch.Tensor, ...] | None = None


class MemoryFFN(_Extended):
    """
    Mixin for the class of a language model's FFN: appends memory slots to it (method step 8).

    In an FFN with two matrices, this concatenates the keys to `W_1` and the values to `W_2` (paper, equation 13). In a
    gated FFN, the gate of the appended units is one.

    An image's visual features F (n c+1) and the shared basis W (h c+1) can be read in two ways with the same result.
    Factored, `(x W) F^T`: `T (h + n) (c + 1)` products for T tokens of the image, for keys and for values.
    Materialised, `x (W F^T)`: `n h (c + 1)` products for any T. Reading the slots themselves costs the same in both.
    The first is therefore cheaper up to `T = n h / (n + h)`: up to 241 tokens at 7B, and always in decoding.
    """

    @property
    def memory(self) -> LayerMemory | MixedLayerMemory | None:
        """The memory that this FFN reads in the current call of this thread."""
        return current_extension()

    def forward(self, hidden_states: torch.Tensor, *args, **kwargs) -> torch.Tensor:
        output, memory = super().forward(hidden_states, *args, **kwargs), self.memory
        if memory is None:
            return output
        if isinstance(memory, MixedLayerMemory):
            for own_memory, rows in zip(memory.memories, memory.rows):
                read = self.lookup(hidden_states[rows], own_memory)
                # Some FFNs add the residual, which autocast keeps in float32
                output = output.index_add(0, rows, read.to(output.dtype), alpha=own_memory.scale)
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
        """`phi(x K^T)`: the activation of each slot, B T S. The first n slots belong to the patches, row by row."""
        # Slots after the patches have no visual part, and a sample without an image has rows of zeros
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
                # In this order both factors are read in their memory layout, also for a single token
                first = first + (memory.key_features @ inner.mT).mT
            scores = torch.cat((first, rest), dim=-1)
        activations = getattr(self, self.activation_name)(scores)
        return activations if memory.slot_mask is None else activations * memory.slot_mask


def _split(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `size` columns and the rest. Backward writes the gradient once, unlike with two slices."""
    return tensor.split((size, tensor.shape[-1] - size), dim=-1)


def extend_layers(layers: Iterable[nn.Module], ffn: str | tuple[str, str], ffn_class: type, **attributes):
    """
    Extends the layers of a base model.

    Args:
        ffn: the name of the FFN in each layer, or the names of its two halves (vision encoders only).
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
    module = getattr(module, "_orig_mod", module)  # of a layer that `torch.compile` wraps
    if isinstance(module, behaviour):  # the base model is shared with another model that has extended it
        return
    module.__class__ = _extended_class(behaviour, type(module))
    vars(module).update(attributes)
    if hasattr(module, "_old_forward"):  # the hook of a dispatched base model calls the `forward` that it has stored
        module._old_forward = MethodType(type(module).forward, module)


@cache
def _extended_class(behaviour: type, base: type) -> type:
    return type(base.__name__, (behaviour, base), {"parts": (behaviour, base)})


def _new_extended(behaviour: type, base: type) -> nn.Module:
    extended = _extended_class(behaviour, base)
    return extended.__new__(extended)


class CheckpointingMixin:
    """Gradient checkpointing, for both model classes; `base_model` is the `DehvfModel`."""

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        """Raises `ValueError` if re-entrant checkpointing is requested."""
        super().activation_checkpointing_enable(checkpointing_arguments(activation_checkpointing_kwargs), **kwargs)

    def enable_input_require_grads(self):
        """For texts only: the vision encoder is given pixels, and the embeddings of some encoders return tuples."""
        self.base_model.language_model.enable_input_require_grads()

    def disable_input_require_grads(self):
        self.base_model.language_model.disable_input_require_grads()


def checkpointing_arguments(given: dict | None) -> dict:
    """Arguments of torch's `checkpoint`, which is re-entrant by default. Raises `ValueError` if that is asked for."""
    if (given or {}).get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` was given, but re-entrant checkpointing drops the gradients of arguments passed by "
            "keyword, and the visual memory is one: the adapter would not learn. Set `use_reentrant` to False."
        )
    return {**(given or {}), "use_reentrant": False}
