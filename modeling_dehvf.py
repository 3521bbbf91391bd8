# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
DEHVF: dynamic embedding of hierarchical visual features (arXiv 2508.17638) for stock `transformers` models.

The file runs with the data: pixels -> features of all vision layers -> fuser -> visual memory -> FFNs of the frozen
language model. `encode` happens once per image, `read` in every FFN of every forward; between them stands one tensor,
`visual_memory`, batch first.

Letters at the end of a line give shapes: B samples, N vision layers (N' of them read), D language layers, K groups, M
candidates per group, P positions (key and value), n patches, S memory slots, T tokens, d vision width, h language
width, r fuser width, c projector width.
"""

import hashlib
import os
import random
import re
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from inspect import signature
from itertools import zip_longest
from tempfile import TemporaryDirectory
from types import MethodType
from typing import NamedTuple

import torch
import transformers
from huggingface_hub import (
    CommitInfo,
    ModelCard,
    ModelCardData,
    file_exists,
    hf_hub_download,
    snapshot_download,
    upload_folder,
)
from huggingface_hub.errors import HFValidationError, HTTPError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, GenerationConfig, GenerationMixin
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.integrations import deepspeed_config, is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.modeling_utils import PreTrainedModel, local_torch_dtype
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_NAME,
    cached_file,
    logging,
)
from transformers.utils.generic import can_return_tuple
from transformers.utils.hub import resolve_revision

from .configuration_dehvf import DehvfConfig, disable_dropout
from .processing_dehvf import DehvfProcessor, open_repository


logger = logging.get_logger(__name__)

# `model_type` of the language models whose FFNs DEHVF can extend -> name of the activation inside `layer.mlp`.
TEXT_LAYOUTS = {
    "llama": "act_fn",
    "mistral": "act_fn",
    "qwen2": "act_fn",
    "qwen3": "act_fn",
    "gemma": "act_fn",
    "gemma2": "act_fn",
    "gemma3_text": "act_fn",
    "phi": "activation_fn",
    "starcoder2": "act",
}
# `model_type` of the vision encoders -> whether position 0 is a class token. All keep their layers in
# `encoder.layers`, the FFN in `layer.mlp`, and the final norm in `post_layernorm`.
VISION_LAYOUTS = {"clip_vision_model": True, "siglip_vision_model": False}

# What is trained and saved: parameters below these modules of `DehvfModel`, and no others.
ADAPTER_MODULES = ("vision_adapters", "fuser_query", "fuser", "projector", "memory_slots")
# What they may be stored in, by the names of the safetensors format
FILE_DTYPES = ("F32", "BF16", "F16")


def check_layouts(config: DehvfConfig):
    """Raises `ValueError` if DEHVF does not know how the layers of a base are built."""
    for key, layouts in (("text_config", TEXT_LAYOUTS), ("vision_config", VISION_LAYOUTS)):
        if (model_type := getattr(config, key).model_type) not in layouts:
            raise ValueError(
                f"The layers of `{model_type}` (`{key}`) are not supported. Supported are: {', '.join(layouts)}."
            )


def is_adapter_name(name: str) -> bool:
    """Whether a parameter, by its full name, belongs to the adapters (and not to a frozen base)."""
    return not set(ADAPTER_MODULES).isdisjoint(name.split("."))


@dataclass
class DehvfModelOutputWithPast(BaseModelOutputWithPast):
    """
    Adds to the language model's output:
        visual_memory (`torch.Tensor` of shape `(batch_size, num_language_layers, num_positions, num_patches,
            projector_hidden_size + 1)`, *optional*): what the images were encoded to. Pass it back as
            `visual_memory=` to ask again without encoding again.
    """

    visual_memory: torch.Tensor | None = None


@dataclass
class DehvfCausalLMOutputWithPast(CausalLMOutputWithPast):
    """Adds `visual_memory`, as in [`DehvfModelOutputWithPast`]."""

    visual_memory: torch.Tensor | None = None


# ---------------------------------------------------------------------------------------------------------------------
# Encode: method steps 1 to 7 and 10
# ---------------------------------------------------------------------------------------------------------------------


class VisionAdapter(nn.Module):
    """What is added to one FFN of the vision encoder: `scale * up(GELU(down(x)))` (method step 10, from MemVP)."""

    def __init__(self, config: DehvfConfig):
        super().__init__()
        self.down = nn.Linear(config.vision_config.hidden_size, config.vision_adapter_size, bias=False)
        self.up = nn.Linear(config.vision_adapter_size, config.vision_config.hidden_size, bias=False)
        self.dropout = nn.Dropout(config.vision_adapter_dropout)
        self.scale = config.vision_adapter_scale

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden = self.down(hidden_states.to(self.down.weight.dtype))
        return (self.scale * self.up(self.dropout(F.gelu(hidden)))).to(hidden_states.dtype)


class AdaptedVisionFFN:
    """Put in front of the class of a vision FFN by `_specialise`; `vision_adapter` is set beside it."""

    vision_adapter: VisionAdapter | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output = super().forward(hidden_states)
        return output if self.vision_adapter is None else output + self.vision_adapter(hidden_states)


def split_into_runs(num_layers: int, num_groups: int) -> list[range]:
    """Cuts layers `0..num_layers-1` into consecutive runs whose lengths differ by at most one, longer ones first."""
    short, extra = divmod(num_layers, num_groups)
    starts = [group * short + min(group, extra) for group in range(num_groups + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]


def candidate_layers(config: DehvfConfig) -> list[list[int]]:
    """
    The vision layers, counted from 0, that each language layer may draw from (method step 2): those of its own group,
    then the penultimate one.
    """
    num_vision_layers = config.vision_config.num_hidden_layers
    penultimate = num_vision_layers - 2
    if config.layer_fusion == "penultimate":
        groups = [[penultimate]] * config.num_groups
    else:
        groups = [[*run, penultimate] for run in split_into_runs(num_vision_layers, config.num_groups)]
    text_runs = split_into_runs(config.text_config.num_hidden_layers, config.num_groups)
    rows = [group for group, run in zip(groups, text_runs) for _ in run]
    if config.layer_mapping == "random":
        random.Random(config.layer_mapping_seed).shuffle(rows)
    return rows


def hierarchy(config: DehvfConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """
    `candidate_layers` as tensors, both of shape `(num_language_layers, num_candidates)`: the layers, where short rows
    are filled up with layer 0; and booleans, false where there is such a filler.
    """
    rows = candidate_layers(config)
    width = max(map(len, rows))
    candidates = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    valid = torch.tensor([[True] * len(row) + [False] * (width - len(row)) for row in rows])
    return candidates, valid


class InputEmbeddingNetwork(nn.Module):
    """
    The fuser's query for language layer `l` and position `p`: `MLP([e_l ; e_p])` (method step 3). With
    `visual_prompts="shared"` there is one position, and no `e_p`. Where the query reads the user's text, a projection
    of it stands in place of `e_l`, or is added to it.
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        size = config.layer_embedding_size
        self.num_layers = config.text_config.num_hidden_layers
        self.positions = config.memory_positions
        reads_layer = config.fuser_query != "instruction"
        self.layer_embedding = nn.Parameter(torch.empty(self.num_layers, size)) if reads_layer else None
        reads_text = config.fuser_query != "network"
        self.instruction_proj = nn.Linear(config.text_config.hidden_size, size) if reads_text else None
        # One row each for key and value, also where only one of them carries an image, as the paper's counts have it
        shared = config.visual_prompts == "shared"
        self.position_embedding = None if shared else nn.Parameter(torch.empty(2, size))
        width = size if shared else 2 * size
        self.linear_1 = nn.Linear(width, 2 * size)
        self.act = ACT2FN[config.fuser_hidden_act]
        self.linear_2 = nn.Linear(2 * size, config.fuser_hidden_size)

    def forward(self, instruction: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            instruction: `(num_images, language_hidden_size)`, the user's text, where it is read.

        Returns:
            `(num_images or 1, num_language_layers, num_positions, fuser_hidden_size)`.
        """
        parts = []
        if self.layer_embedding is not None:
            parts.append(self.layer_embedding[None])  # 1 D e
        if self.instruction_proj is not None:
            instruction = self.instruction_proj(instruction.to(self.instruction_proj.weight.dtype))  # B e
            parts.append(instruction[:, None].expand(-1, self.num_layers, -1))  # B D e
        embedding = sum(parts).unsqueeze(2).expand(-1, -1, len(self.positions), -1)  # B D P e
        if self.position_embedding is not None:
            position_embedding = self.position_embedding[self.positions].expand_as(embedding)
            embedding = torch.cat((embedding, position_embedding), dim=-1)  # B D P 2e
        return self.linear_2(self.act(self.linear_1(embedding)))  # B D P r


class LearnableQueryTokens(nn.Module):
    """The ablation of the input embedding network: one free vector per language layer and position."""

    def __init__(self, config: DehvfConfig):
        super().__init__()
        num_layers, num_positions = config.text_config.num_hidden_layers, len(config.memory_positions)
        self.tokens = nn.Parameter(torch.empty(num_layers, num_positions, config.fuser_hidden_size))

    def forward(self, instruction: None) -> torch.Tensor:
        return self.tokens.clone()[None]  # 1 D P r; a copy as in `MemorySlots`


class FuserBlock(nn.Module):
    """Cross-attention, then FFN, each followed by residual and layer norm (method step 4; IGVA, arXiv 2501.08443)."""

    def __init__(self, config: DehvfConfig):
        super().__init__()
        size = config.fuser_hidden_size
        self.num_heads = config.fuser_num_heads
        self.q_proj = nn.Linear(size, size)
        self.k_proj = nn.Linear(size, size)
        self.v_proj = nn.Linear(size, size)
        self.out_proj = nn.Linear(size, size)
        self.attention_norm = nn.LayerNorm(size)
        self.linear_1 = nn.Linear(size, config.fuser_intermediate_size)
        self.act = ACT2FN[config.fuser_hidden_act]
        self.linear_2 = nn.Linear(config.fuser_intermediate_size, size)
        self.ffn_norm = nn.LayerNorm(size)

    def forward(
        self, query: torch.Tensor, features: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """query: B D P r; features: B N r, mapped to keys and values before each layer takes its candidates."""
        attended = F.scaled_dot_product_attention(
            self._split_heads(self.q_proj(query)),
            self._split_heads(self.k_proj(features)[:, candidates]),  # B D heads M r/heads
            self._split_heads(self.v_proj(features)[:, candidates]),
            attn_mask=valid[:, None, None],  # D 1 1 M
        )
        query = self.attention_norm(query + self.out_proj(attended.transpose(-3, -2).flatten(-2)))
        return self.ffn_norm(query + self.linear_2(self.act(self.linear_1(query))))

    def _split_heads(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class HierarchicalVisualFuser(nn.Module):
    """
    Decides, for each image, which vision layers a language layer's memory is made of (method step 4). One fuser
    serves all language layers and both positions, in one batch.
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        self.in_proj = nn.Linear(config.vision_config.hidden_size, config.fuser_hidden_size)
        self.blocks = nn.ModuleList(FuserBlock(config) for _ in range(config.fuser_num_layers))
        self.head = nn.Linear(config.fuser_hidden_size, hierarchy(config)[0].shape[1])

    def forward(
        self, query: torch.Tensor, class_features: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            query: `(num_images or 1, num_language_layers, num_positions, fuser_hidden_size)`.
            class_features: `(num_images, num_vision_layers, vision_hidden_size)`.
            candidates, valid: `(num_language_layers, num_candidates)`, see [`hierarchy`].

        Returns:
            Weights of shape `(num_images, num_language_layers, num_positions, num_candidates)` that sum to one.
        """
        features = self.in_proj(class_features)  # B N r
        query = query.expand(features.shape[0], -1, -1, -1)  # B D P r
        for block in self.blocks:
            query = block(query, features, candidates, valid)
        scores = self.head(query).masked_fill(~valid[:, None], float("-inf"))
        return scores.softmax(dim=-1)  # B D P M


class ProjectorBasis(nn.Linear):
    """`W_2` and `b_2`, given out rather than applied: `(language_hidden_size, projector_hidden_size + 1)`."""

    def forward(self) -> torch.Tensor:
        return torch.cat((self.weight, self.bias[:, None]), dim=1)


class VisualProjector(nn.Module):
    """
    The two-layer network `g(F) = W_2 SiLU(W_1 F + b_1) + b_2` from vision to language width (method step 6).

    It is never run as a whole. Fusing is linear with weights that sum to one, so `down` is applied to each vision
    layer once and its results are fused; `W_2` is left to the reading FFN. An image's memory is then as wide as the
    projector and not as the language model (method.md, "An exact identity").
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        self.down = nn.Linear(config.vision_config.hidden_size, config.projector_hidden_size)
        self.up = ProjectorBasis(config.projector_hidden_size, config.text_config.hidden_size)


class MemorySlots(nn.Module):
    """Position embeddings of the slots, `s_key` and `s_value`, shared by all layers (method step 7)."""

    def __init__(self, config: DehvfConfig):
        super().__init__()
        shape = (config.num_memory_slots, config.text_config.hidden_size)
        self.key = nn.Parameter(torch.empty(shape))
        self.value = nn.Parameter(torch.empty(shape))

    def forward(self, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        # Copies, since under ZeRO-3 a parameter is there only while its own module runs
        return self.key.to(dtype, copy=True), self.value.to(dtype, copy=True)


def build_adapters(config: DehvfConfig) -> dict[str, nn.Module]:
    """
    All that is trained, by name. Only what the config's switches leave in use, since DDP stops at parameters that get
    no gradient.
    """
    adapters = {"memory_slots": MemorySlots(config)}
    if config.visual_prompts == "none":
        return adapters
    adapters["projector"] = VisualProjector(config)
    num_layers_read = config.vision_config.num_hidden_layers - (config.layer_fusion == "penultimate")
    adapters["vision_adapters"] = nn.ModuleList(VisionAdapter(config) for _ in range(num_layers_read))
    if config.layer_fusion == "adaptive":
        learned_tokens = config.fuser_query == "tokens"
        adapters["fuser_query"] = (LearnableQueryTokens if learned_tokens else InputEmbeddingNetwork)(config)
        adapters["fuser"] = HierarchicalVisualFuser(config)
    return adapters


# ---------------------------------------------------------------------------------------------------------------------
# Read: method steps 8 and 9
# ---------------------------------------------------------------------------------------------------------------------


class MemoryView(NamedTuple):
    """
    What an FFN reads. A whole batch's view goes to the decoder layers, `layer(i)` of it to the FFN of layer `i`.

    key_features: `(batch_size, num_patches, projector_hidden_size + 1)`, in the whole view one for each language
        layer; `None` where keys carry no image.
    value_features: likewise.
    keys: `(num_memory_slots + projector_hidden_size + 1, language_hidden_size)`: the key slots and, unless they carry
        no image, lambda times `W_2` and `b_2`, so that tokens are multiplied by both at once.
    values: `(language_hidden_size, num_memory_slots + projector_hidden_size + 1)`, likewise.
    form, scale, dropout: as the config has them.
    materialised: whether keys and values are made in full before they are read.
    """

    key_features: tuple[torch.Tensor, ...] | torch.Tensor | None
    value_features: tuple[torch.Tensor, ...] | torch.Tensor | None
    keys: torch.Tensor
    values: torch.Tensor
    form: str
    scale: float
    dropout: float
    materialised: bool = False

    def read_by(self, batch_size: int, num_tokens: int) -> "MemoryView":
        """The same, as so many tokens read it: by fewer operations, see [`MemoryFFN`], unless a form is forced."""
        features = self.key_features or self.value_features
        # To train, full keys and values would have to be kept in every layer, which is worse than some operations
        if features is None or self.form == "factored" or self.form == "auto" and torch.is_grad_enabled():
            return self
        (num_images, num_patches, _), width = features[0].shape, self.keys.shape[-1]
        fewer = batch_size * num_tokens * (width + num_patches) > num_images * num_patches * width
        return self._replace(materialised=fewer or self.form == "materialised")

    def layer(self, index: int) -> "MemoryView":
        return self._replace(
            key_features=self.key_features and self.key_features[index],
            value_features=self.value_features and self.value_features[index],
        )


class MixedMemoryView(NamedTuple):
    """What an FFN reads where samples of a batch have adapters of their own: `views[i]` is for the rows `rows[i]`."""

    views: tuple[MemoryView, ...]
    rows: tuple[torch.Tensor, ...]

    def read_by(self, batch_size: int, num_tokens: int) -> "MixedMemoryView":
        return self._replace(
            views=tuple(view.read_by(len(rows), num_tokens) for view, rows in zip(self.views, self.rows))
        )

    def layer(self, index: int) -> "MixedMemoryView":
        return self._replace(views=tuple(view.layer(index) for view in self.views))


class MemoryFFN:
    """
    Put in front of the class of a language model's FFN by `_specialise`: appends memory slots to it (method step 8).

    On a two-matrix FFN this is concatenating the keys to `W_1` and the values to `W_2` (paper, equation 13); in a
    gated FFN the appended units have a gate of one.

    An image's visual features F (n c+1) and the shared basis W (h c+1) can be read in two ways with the same result.
    Factored, `(x W) F^T`: `T (h + n) (c + 1)` products for T tokens of the image, keys and values alike. Materialised,
    `x (W F^T)`: `n h (c + 1)` products whatever T is, since the slots themselves have to be read in both. So the first
    is cheaper up to `T = n h / (n + h)`: at 7B 241 tokens, and always in decoding.
    """

    memory_view: MemoryView | MixedMemoryView | None = None

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        output, view = super().forward(hidden_states), self.memory_view
        if isinstance(view, MixedMemoryView):
            for own_view, rows in zip(view.views, view.rows):
                read = self.lookup(hidden_states[rows], own_view)
                output = output.index_add(0, rows, read, alpha=own_view.scale)
            return output
        return output if view is None else torch.add(output, self.lookup(hidden_states, view), alpha=view.scale)

    def lookup(self, hidden_states: torch.Tensor, view: MemoryView) -> torch.Tensor:
        """`phi(x K^T) V` without ever building `K` or `V`. hidden_states and result: B T h."""
        weights = F.dropout(self.slot_activations(hidden_states, view), view.dropout, self.training)
        if view.value_features is None:
            return F.linear(weights, view.values)  # B T h
        num_patches = view.value_features.shape[1]
        first, rest = _split(weights, num_patches)
        if view.materialised:
            slots, basis = _split(view.values, weights.shape[-1])
            patch_slots, other_slots = _split(slots, num_patches)
            values = patch_slots + basis @ view.value_features.mT  # B h n
            return first @ values.mT + F.linear(rest, other_slots)
        visual = first @ view.value_features  # B T c+1
        return F.linear(torch.cat((weights, visual), dim=-1), view.values)

    def slot_activations(self, hidden_states: torch.Tensor, view: MemoryView) -> torch.Tensor:
        """`phi(x K^T)`: how much each slot is read, B T S. The first n slots belong to the patches, row by row."""
        # Slots past the patches have no visual part, and a sample without an image has rows of zeros.
        if view.key_features is None:
            scores = F.linear(hidden_states, view.keys)  # B T S
        else:
            num_patches, width = view.key_features.shape[1:]
            num_slots = len(view.keys) - width
            if view.materialised:
                slots, basis = _split(view.keys.T, num_slots)
                patch_slots, other_slots = _split(slots, num_patches)
                keys = patch_slots.T + view.key_features @ basis.T  # B n h
                first, rest = hidden_states @ keys.mT, hidden_states @ other_slots
            else:
                scores, inner = _split(F.linear(hidden_states, view.keys), num_slots)
                first, rest = _split(scores, num_patches)
                # This way round since both factors lie in memory as they are read, also for a single token
                first = first + (view.key_features @ inner.mT).mT
            scores = torch.cat((first, rest), dim=-1)
        return getattr(self, self.activation_name)(scores)


def _split(tensor: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first `size` columns, and the others. Its backward writes the gradient once, unlike that of two slices."""
    return tensor.split((size, tensor.shape[-1] - size), dim=-1)


class MemoryLayer:
    """
    Put in front of the class of a decoder layer by `_specialise`: hands the memory on to the layer's FFN.

    The memory arrives as an argument, and is handed on inside `forward`. So when gradient checkpointing runs the
    layer again during backward, its FFN finds the memory of that very forward, however many came in between.
    """

    def forward(self, *args, memory_view: MemoryView | MixedMemoryView | None = None, **kwargs):
        self.mlp.memory_view = memory_view if memory_view is None else memory_view.layer(self.memory_index)
        try:
            return super().forward(*args, **kwargs)
        finally:
            self.mlp.memory_view = None


def _specialise(module: nn.Module, behaviour: type, **attributes) -> None:
    """
    Makes `module` an instance of a subclass of its own class, with `behaviour` in front. Weights, their names, hooks
    and `isinstance` stay as they were, which a wrapping module could not promise.
    """
    module.__class__ = _subclass(behaviour, type(module))
    # Past `nn.Module.__setattr__`, which would register a module given here a second time, under a second name
    vars(module).update(attributes)
    if hasattr(module, "_old_forward"):  # a dispatched base: accelerate's hook calls the `forward` that it found
        module._old_forward = MethodType(type(module).forward, module)


@cache
def _subclass(behaviour: type, base: type) -> type:
    return type(base.__name__, (behaviour, base), {})


# ---------------------------------------------------------------------------------------------------------------------
# The model
# ---------------------------------------------------------------------------------------------------------------------


class DehvfPreTrainedModel(PreTrainedModel):
    config_class = DehvfConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, VisionAdapter):
            init.zeros_(module.up.weight)  # the encoder starts as it is
        elif isinstance(module, MemorySlots):
            init.normal_(module.key, std=std)
            init.zeros_(module.value)  # as in MemVP: the memory starts almost silent
        elif isinstance(module, InputEmbeddingNetwork):
            if module.layer_embedding is not None:
                init.normal_(module.layer_embedding, std=std)
            if module.position_embedding is not None:
                init.normal_(module.position_embedding, std=std)
        elif isinstance(module, LearnableQueryTokens):
            init.normal_(module.tokens, std=std)
        elif isinstance(module, DehvfModel):
            candidates, valid = hierarchy(self.config)
            init.copy_(module.candidates, candidates)
            init.copy_(module.valid_candidates, valid)

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        refuse_reentrant_checkpointing(activation_checkpointing_kwargs)
        super().activation_checkpointing_enable(activation_checkpointing_kwargs, **kwargs)


def refuse_reentrant_checkpointing(activation_checkpointing_kwargs: dict | None):
    """Raises `ValueError` if re-entrant checkpointing is asked for."""
    if (activation_checkpointing_kwargs or {}).get("use_reentrant"):
        raise ValueError(
            "`use_reentrant=True` was given, but re-entrant checkpointing drops the gradients of arguments passed by "
            "keyword, and what the adapters read is one: they would not learn. Set `use_reentrant` to False."
        )


class DehvfModel(DehvfPreTrainedModel):
    """
    The frozen bases, the adapters between them, and no head.

    Args:
        config ([`DehvfConfig`]): sizes and switches.
        vision_tower, language_model (`PreTrainedModel`, *optional*): loaded bases; built at random if not given.

    Raises:
        ValueError: if DEHVF does not know the layout of a base.
    """

    # Of the class, so that a model is complete without a call that would set it; see `disable_adapter`
    adapter_enabled = True

    def __init__(self, config: DehvfConfig, vision_tower=None, language_model=None):
        super().__init__(config)
        check_layouts(config)
        self.vision_tower = vision_tower or AutoModel.from_config(config.vision_config)
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        for module in (*self.vision_tower.modules(), *self.language_model.modules()):
            module._is_hf_initialized = True  # loaded weights are never initialised again
        self._inject(config)
        with local_torch_dtype(torch.float32, type(self).__name__):  # adapters are fp32 whatever the bases are
            self._mount(build_adapters(config))
        self.active_adapter, self._shelf = "default", {}
        self.gradient_checkpointing = False
        self.post_init()

    def _inject(self, config: DehvfConfig):
        """Extends the FFNs of both bases, whose own parameters keep their names."""
        for index, layer in enumerate(self.language_model.layers):
            _specialise(layer, MemoryLayer, memory_index=index)
            _specialise(
                layer.mlp,
                MemoryFFN,
                activation_name=TEXT_LAYOUTS[config.text_config.model_type],
            )
        for layer in self.vision_tower.encoder.layers:
            _specialise(layer.mlp, AdaptedVisionFFN)

    def _mount(self, adapters: dict[str, nn.Module]):
        """Puts adapters into their places, instead of those that are there. `self.config` must be theirs."""
        for name in ADAPTER_MODULES:
            self._modules.pop(name, None)
        for name, module in adapters.items():
            self.add_module(name, module)
        vision_adapters = adapters.get("vision_adapters", ())
        for layer, adapter in zip_longest(self.vision_tower.encoder.layers, vision_adapters):
            vars(layer.mlp)["vision_adapter"] = adapter  # past `nn.Module.__setattr__`, as in `_specialise`
        self.vision_layers_read = sorted(set().union(*candidate_layers(self.config)))  # N' <= N of them
        candidates, valid = hierarchy(self.config)
        device = adapters["memory_slots"].key.device
        self.register_buffer("candidates", candidates.to(device), persistent=False)  # D M
        self.register_buffer("valid_candidates", valid.to(device), persistent=False)  # D M

    @property
    def adapter_names(self) -> list[str]:
        """Of all adapters that are loaded, the active ones first."""
        return [self.active_adapter, *self._shelf]

    def shelve(self, adapter_name: str, config: DehvfConfig, adapters: dict[str, nn.Module]):
        """Keeps adapters that are not active, outside of this model's modules."""
        self._shelf[adapter_name] = config, adapters

    def set_adapter(self, adapter_name: str):
        """See [`DehvfForConditionalGeneration.set_adapter`]."""
        self._check_adapter_name(adapter_name)
        if adapter_name != self.active_adapter:
            active = {name: self._modules[name] for name in ADAPTER_MODULES if name in self._modules}
            self.shelve(self.active_adapter, self.config, active)
            like = self.memory_slots.key  # in device and dtype
            self.active_adapter, (self.config, adapters) = adapter_name, self._shelf.pop(adapter_name)
            self._mount({name: module.to(like).train(self.training) for name, module in adapters.items()})

    def delete_adapter(self, adapter_name: str):
        """See [`DehvfForConditionalGeneration.delete_adapter`]."""
        self._check_adapter_name(adapter_name)
        if adapter_name == self.active_adapter:
            raise ValueError(f"The adapters {adapter_name!r} are active. Call `set_adapter` with another name before.")
        del self._shelf[adapter_name]

    def _check_adapter_name(self, adapter_name: str):
        if adapter_name not in self.adapter_names:
            raise ValueError(
                f"No adapters {adapter_name!r} are loaded, but {', '.join(self.adapter_names)}. Load them with "
                "`load_adapter(folder_or_id, name)`."
            )

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_instruction_features(
        self,
        input_ids: torch.LongTensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        The user's text as `get_image_features` takes it: the mean of its word embeddings, normalised, since language
        models differ in how large their embeddings are. (IGVA takes a sentence encoder, which we would have to add.)

        Args:
            input_ids, inputs_embeds: `(batch_size, sequence_length)` tokens, or their embeddings.
            instruction_mask: `(batch_size, sequence_length)`, 1 or true where the tokens are the user's. By default
                all are.

        Returns:
            `torch.Tensor` of shape `(batch_size, language_hidden_size)`, in float32.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        inputs_embeds = inputs_embeds.float()
        if instruction_mask is None:
            return F.layer_norm(inputs_embeds.mean(dim=1), inputs_embeds.shape[-1:])
        weights = instruction_mask.to(inputs_embeds.dtype)[..., None]
        mean = (weights * inputs_embeds).sum(dim=1) / weights.sum(dim=1).clamp(min=1)
        return F.layer_norm(mean, mean.shape[-1:])  # B h

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """
        Encodes images into visual memory, once, for any number of questions. To keep it, call this under
        `torch.no_grad()`: else it holds on to what the encoder's backward would need, 84 times its size at 7B.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`.
            image_mask: `(batch_size,)` booleans, false for samples without an image, whose rows of `pixel_values` are
                not looked at. By default all samples have one.
            instruction: `(batch_size, language_hidden_size)`, the result of `get_instruction_features`. Needed where
                `fuser_query` reads the user's text, which makes the memory one of this question alone.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_language_layers, num_positions, num_patches,
            projector_hidden_size + 1)`: for each language layer `SiLU(W_1 F_{l,p} + b_1)` and a last column of ones
            that carries `b_2`. A sample without an image has zeros. In the language model's dtype. `None` with
            `visual_prompts="none"`.

        Raises:
            ValueError: if `pixel_values` does not have the encoder's shape, `image_mask` or `instruction` another
                batch size, or an instruction is needed and missing.
        """
        vision = self.config.vision_config
        _check_shape("pixel_values", pixel_values, (vision.num_channels, vision.image_size, vision.image_size))
        if image_mask is None:
            image_mask = pixel_values.new_ones(len(pixel_values), dtype=torch.bool)
        else:
            _check_image_mask(image_mask, len(pixel_values), "rows of `pixel_values`")
        if self.config.visual_prompts == "none":
            return None
        self._check_instruction(instruction, len(pixel_values))
        rows = image_mask.nonzero().flatten()
        if is_blank := not len(rows):
            rows = rows.new_zeros(1)  # see `forward`: the vision path is run even for no image at all
        class_features, patches = self._hierarchical_features(pixel_values[rows])
        instruction = instruction[rows] if self.config.reads_instruction else None
        weights = self._fusion_weights(class_features, instruction)[..., self.vision_layers_read]  # B D P N'
        memory = F.silu(torch.einsum("bdpj,bjnc->bdpnc", weights.to(patches.dtype), patches))
        memory = torch.cat((memory, memory.new_ones(*memory.shape[:-1], 1)), dim=-1)  # B D P n c+1
        memory = (0 * memory if is_blank else memory).to(self.get_input_embeddings().weight.dtype)
        if len(rows) == len(image_mask):
            return memory
        return memory.new_zeros(len(image_mask), *memory.shape[1:]).index_copy(0, rows, memory)

    @torch.no_grad()
    def get_fusion_weights(self, pixel_values: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        """
        What each language layer's memory is mixed from, for each image (method step 4), to be looked at.

        Args:
            pixel_values, instruction: as in `get_image_features`.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_language_layers, num_positions, num_vision_layers)`. Each row
            sums to one; layers of other groups have zero.

        Raises:
            ValueError: if the config says `visual_prompts="none"`, so that nothing is mixed; or as in
                `get_image_features`.
        """
        if self.config.visual_prompts == "none":
            raise ValueError('There are no fusion weights with `visual_prompts="none"`: no image enters the memory.')
        self._check_instruction(instruction, len(pixel_values))
        return self._fusion_weights(self._hierarchical_features(pixel_values)[0], instruction)

    def _check_instruction(self, instruction: torch.Tensor | None, num_images: int):
        given = "none" if instruction is None else f"one for {len(instruction)} texts"
        if self.config.reads_instruction and (instruction is None or len(instruction) != num_images):
            raise ValueError(
                f"The fuser of this model reads the user's text, so each of the {num_images} images needs an "
                f"`instruction`, but {given} was given. Pass `model.get_instruction_features(input_ids, "
                "attention_mask)`, one row per row of `pixel_values`."
            )

    def _hierarchical_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Method step 1, and `W_1`, `b_1` of step 6. Returns class features B N d, and projected patches B N' n c of the
        layers that are read.
        """
        hidden_states = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[1:]
        has_class_token = VISION_LAYOUTS[self.config.vision_config.model_type]
        class_features, patches = [], []
        for layer, hidden in enumerate(hidden_states):
            hidden = self.vision_tower.post_layernorm(hidden).to(self.projector.down.weight.dtype)  # B 1+n d
            class_features.append(hidden[:, 0] if has_class_token else hidden.mean(dim=1))
            if layer in self.vision_layers_read:
                patches.append(self.projector.down(hidden[:, 1:] if has_class_token else hidden))
        return torch.stack(class_features, dim=1), torch.stack(patches, dim=1)

    def _fusion_weights(self, class_features: torch.Tensor, instruction: torch.Tensor | None) -> torch.Tensor:
        """Weights of the candidates (method step 4 or its ablations), spread over all vision layers: B D P N."""
        num_images, num_vision_layers, _ = class_features.shape
        if self.config.layer_fusion == "adaptive":
            weights = self.fuser(self.fuser_query(instruction), class_features, self.candidates, self.valid_candidates)
        else:
            weights = self.valid_candidates / self.valid_candidates.sum(dim=-1, keepdim=True)  # D M
            weights = weights[:, None].expand(num_images, -1, len(self.config.memory_positions), -1)
        # `scatter_add`, since in the last group the penultimate layer stands twice
        index = self.candidates[:, None].expand(weights.shape)
        return weights.new_zeros(*weights.shape[:-1], num_vision_layers).scatter_add(-1, index, weights)

    def _memory_view(self, visual_memory: torch.Tensor | None, dtype: torch.dtype) -> MemoryView:
        """Brings the memory into the form in which FFNs read it, once for all layers, in `generate` for all tokens."""
        key_features = value_features = None
        keys, values = self.memory_slots(dtype)  # S h
        if visual_memory is not None:
            basis = (self.config.visual_scale * self.projector.up()).to(dtype).T  # c+1 h
            # `unbind` and not an index for each layer, whose backward would fill a whole memory with zeros each time
            features = visual_memory.to(dtype).unbind(2)  # P times B D n c+1
            if self.config.visual_prompts != "values":
                key_features = features[0].unbind(1)
                keys = torch.cat((keys, basis))
            if self.config.visual_prompts != "keys":
                value_features = features[-1].unbind(1)
                values = torch.cat((values, basis))
        config = self.config
        return MemoryView(
            key_features,
            value_features,
            keys,
            values.T.contiguous(),
            form=config.memory_form,
            scale=config.memory_scale,
            dropout=config.memory_dropout,
        )

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_memory: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        memory_view: MemoryView | MixedMemoryView | None = None,
        **kwargs,
    ) -> DehvfModelOutputWithPast:
        """
        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, if any sample has an image.
            image_mask: `(batch_size,)` booleans, which samples have one. By default all, also of `visual_memory`.
            instruction_mask: `(batch_size, sequence_length)`, which tokens are the user's, for a `fuser_query` that
                reads them. By default those of `attention_mask`.
            visual_memory: result of `get_image_features`, in place of `pixel_values`. One row serves a whole batch.
            adapter_names: for each sample the adapter that it is to have, of those that `load_adapter` loaded, or
                `"__base__"` for none; not for training, nor for two threads at once, since they take turns in being
                the active ones.
            memory_view: what `generate` makes of all these, once for all tokens.

        All others are those of the language model.

        Raises:
            ValueError: if images, texts or names of adapters differ in number, there is no such adapter, or two are
                given that cannot be.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        if self.adapter_enabled:
            if memory_view is None:
                if self.training and pixel_values is None and visual_memory is None:
                    # Half of ScienceQA has no image. Under ZeRO-3 and DDP all ranks must run the same modules at each
                    # step, so a batch without any image still runs the vision path, on one blank, to zero effect.
                    vision = self.config.vision_config
                    blank = inputs_embeds.new_zeros(1, vision.num_channels, vision.image_size, vision.image_size)
                    pixel_values = blank.expand(len(inputs_embeds), -1, -1, -1)
                    image_mask = torch.zeros(len(inputs_embeds), dtype=torch.bool, device=blank.device)
                mask = attention_mask if instruction_mask is None else instruction_mask
                memory_view, visual_memory = self._view_images(
                    inputs_embeds, mask, pixel_values, image_mask, visual_memory, adapter_names
                )
            kwargs["memory_view"] = memory_view.read_by(*inputs_embeds.shape[:2])
        outputs = self.language_model(inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs)
        return DehvfModelOutputWithPast(**outputs, visual_memory=visual_memory)

    def _view_images(
        self, inputs_embeds, instruction_mask, pixel_values, image_mask, visual_memory, adapter_names, copies: int = 1
    ) -> tuple[MemoryView | MixedMemoryView, torch.Tensor | None]:
        """What the FFNs are to read of a batch, of which `copies` follow each other, and its visual memory."""
        _check_one_of(pixel_values=pixel_values, visual_memory=visual_memory)
        _check_one_of(visual_memory=visual_memory, adapter_names=adapter_names)
        if adapter_names is not None:
            parts = inputs_embeds, instruction_mask, pixel_values, image_mask
            return self._mixed_view(adapter_names, *parts, copies=copies), None
        if pixel_values is not None:
            instruction = None
            if self.config.reads_instruction:
                instruction = self.get_instruction_features(None, instruction_mask, inputs_embeds)
            visual_memory = self.get_image_features(pixel_values, image_mask, instruction)
        if visual_memory is not None:
            self.check_visual_memory(visual_memory, len(inputs_embeds))
            if image_mask is not None and pixel_values is None:  # of texts, which memory need not have been made with
                _check_image_mask(image_mask, len(inputs_embeds), "texts")
                visual_memory = visual_memory * image_mask.to(visual_memory.device).view(-1, 1, 1, 1, 1)
            if copies > 1 and len(visual_memory) > 1:
                visual_memory = visual_memory.repeat_interleave(copies, dim=0)
        return self._memory_view(visual_memory, inputs_embeds.dtype), visual_memory

    def _mixed_view(self, adapter_names, inputs_embeds, *others, copies: int) -> MixedMemoryView:
        """What the FFNs are to read where each sample has the adapter that it names, for its image as well."""
        if self.training:
            raise ValueError("`adapter_names` is for inference. To train, make one adapter active with `set_adapter`.")
        if len(adapter_names) != len(inputs_embeds):
            raise ValueError(
                f"`adapter_names` has {len(adapter_names)} names for {len(inputs_embeds)} texts. Give one for each."
            )
        active, views, all_rows = self.active_adapter, [], []
        try:
            for name in dict.fromkeys(adapter_names):
                if name == "__base__":
                    continue
                self.set_adapter(name)
                own = [index for index, other in enumerate(adapter_names) if other == name]
                rows = torch.tensor(own, device=inputs_embeds.device)
                parts = (None if part is None else part[rows] for part in (inputs_embeds, *others))
                views.append(self._view_images(*parts, None, None, copies)[0])
                all_rows.append((copies * rows[:, None] + torch.arange(copies, device=rows.device)).flatten())
        finally:
            self.set_adapter(active)
        return MixedMemoryView(tuple(views), tuple(all_rows))

    def check_visual_memory(self, visual_memory: torch.Tensor, batch_size: int | None = None):
        """Raises `ValueError` if the memory is not this model's, or has rows for another number of texts."""
        config = self.config
        sizes = (config.text_config.num_hidden_layers, len(config.memory_positions), config.num_patches)
        _check_shape("visual_memory", visual_memory, (*sizes, config.projector_hidden_size + 1))
        if batch_size is not None and len(visual_memory) not in (1, batch_size):
            raise ValueError(
                f"There are {len(visual_memory)} rows of images and {batch_size} texts. Give one row per text, and "
                "mark texts without an image in `image_mask`, as this model's processor does."
            )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]):
    if tuple(tensor.shape[1:]) != expected:
        source = {"pixel_values": "processor", "visual_memory": "`get_image_features`"}[name]
        raise ValueError(
            f"`{name}` has the shape {tuple(tensor.shape)}, but this model takes (batch_size, "
            f"{', '.join(map(str, expected))}). Make it with this model's own {source}."
        )


def _check_image_mask(image_mask: torch.Tensor, expected: int, of_what: str):
    if tuple(image_mask.shape) != (expected,):
        raise ValueError(
            f"`image_mask` has the shape {tuple(image_mask.shape)}, but there are {expected} {of_what}. Give one "
            "boolean for each, false where it has no image."
        )


def _check_one_of(**given):
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Both {' and '.join(names)} were given. Give one of them.")


class DehvfForConditionalGeneration(DehvfPreTrainedModel, GenerationMixin):
    """
    DEHVF with the language model's head: what both `AutoModel` and `AutoModelForImageTextToText` give.

    Args:
        config ([`DehvfConfig`]): sizes and switches.
        vision_tower, causal_lm (`PreTrainedModel`, *optional*): loaded bases; built at random if not given.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    # How the adapters and the bases were fetched: `revision`, `subfolder`, `token`, ... Their place is `name_or_path`
    _adapter_source = {}

    def __init__(self, config: DehvfConfig, vision_tower=None, causal_lm=None):
        super().__init__(config)
        causal_lm = causal_lm or AutoModelForCausalLM.from_config(config.text_config)
        self.model = DehvfModel(config, vision_tower, causal_lm.base_model)
        self.lm_head = causal_lm.get_output_embeddings()
        self.lm_head._is_hf_initialized = True
        self.generation_config = causal_lm.generation_config
        self.post_init()
        # CLIP's list names modules of its text tower too, and FSDP stops at one that it does not find
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules if name in present]
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter_name(name))

    # --- loading and saving ---

    @classmethod
    def from_vision_text_pretrained(cls, vision_model: str | os.PathLike, text_model: str | os.PathLike, **kwargs):
        """
        New adapters on pretrained bases.

        Args:
            vision_model, text_model: Hub id or folder of the vision encoder and of the language model.
            kwargs: fields of [`DehvfConfig`] go to the config (`num_memory_slots=400`,
                `text_model_revision="0123abc"`, `text_model_id="org/name"` if `text_model` is a copy of it); all
                others go to `from_pretrained` of the bases (`dtype`, `device_map`, `quantization_config`,
                `attn_implementation`, `token`, `local_files_only`, ...).
        """
        own = DehvfConfig.__dataclass_fields__.keys() - {"dtype"}
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        places = {"vision": vision_model, "text": text_model}
        for key, place in places.items():
            # A folder by its absolute path, so that a saved config finds it from everywhere
            places[key] = os.path.abspath(place) if os.path.isdir(place) else str(place)
            fields[f"{key}_model_id"] = fields.get(f"{key}_model_id") or places[key]
            revision = fields.get(f"{key}_model_revision")
            with _naming_base(place, key):
                fields[f"{key}_config"] = load_base_config(place, key, revision, _hub_kwargs(kwargs))
        config = DehvfConfig(**fields)
        model = cls._from_bases(config, places["vision"], places["text"], **kwargs)
        model._adapter_source = _once_more(_hub_kwargs(kwargs))
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, vision_model=None, text_model=None, **kwargs
    ):
        """
        Loads the adapters from here and the frozen bases from their own places, at the revisions that the config
        names. `revision` and `subfolder` speak of the adapters alone.

        Args:
            pretrained_model_name_or_path: Hub id or folder that `save_pretrained` wrote.
            vision_model, text_model: where to take the bases from instead: another id, or a folder.
            kwargs: as in [`from_vision_text_pretrained`]; `generation_config`, `output_loading_info`.

        Raises:
            OSError: if there are no adapters, their file is damaged, or a base cannot be found.
            ValueError: if adapters or a base do not fit the config: missing, unexpected or wrong-shaped tensors,
                another width or depth; if adapters are not of `FILE_DTYPES`, or not finite; or if the config says
                what no model has.
        """
        location = pretrained_model_name_or_path
        generation_config, wants_info = kwargs.pop("generation_config", None), kwargs.pop("output_loading_info", False)
        source = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
        source |= _hub_kwargs(kwargs)
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}  # not the config's
        for name in ("adapter_kwargs", "_from_auto", "_from_pipeline", "trust_remote_code"):
            kwargs.pop(name, None)
        if config is None:
            config, kwargs = DehvfConfig.from_pretrained(location, return_unused_kwargs=True, **{**kwargs, **source})
            kwargs |= _hub_kwargs(source)
        # Before the bases, which may be many GB: a mistake here should not cost minutes
        adapters = _load_adapters(location, source)
        _check_adapters(adapters, _empty_adapters(config, location).state_dict(), location)
        places = {"vision": config.vision_model_id, "text": config.text_model_id}
        if config.merged_base and (vision_model is None or text_model is None):
            places = cls._fetch_merged_bases(location, **source)
            kwargs["use_safetensors"] = True  # they came with the adapters, from where no pickle is read
        places |= {key: place for key, place in (("vision", vision_model), ("text", text_model)) if place is not None}
        for key in (key for key, place in places.items() if place is None):
            raise ValueError(
                f"The config in {location} has no `{key}_model_id`, so the frozen base cannot be found. Pass "
                f"`{key}_model=` with its Hub id or folder."
            )
        model = cls._from_bases(config, places["vision"], places["text"], **dtype, **kwargs)
        model.load_state_dict(adapters, strict=False)  # names and shapes were checked above; the bases are loaded
        model.name_or_path = str(location)
        model._adapter_source = _once_more(source)
        if generation_config is not None:
            model.generation_config = generation_config
        elif _has_file(location, GENERATION_CONFIG_NAME, **source):  # else the language model's own stays
            model.generation_config = GenerationConfig.from_pretrained(location, **source)
        if wants_info:  # as `transformers` has it; what would stand in it is an error here
            return model, {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return model

    @staticmethod
    def _fetch_merged_bases(location, subfolder: str = "", **source) -> dict[str, str]:
        """The folders of the bases that `save_pretrained(..., merge_base=True)` put beside the adapters."""
        folder = location
        if not os.path.isdir(location):
            suffixes = ("safetensors", "json", "jinja", "txt", "model")
            patterns = [os.path.join(subfolder, f"*_model/*.{suffix}") for suffix in suffixes]
            folder = snapshot_download(location, allow_patterns=patterns, **source)
        return {key: os.path.join(folder, subfolder, f"{key}_model") for key in ("vision", "text")}

    @classmethod
    def _from_bases(cls, config: DehvfConfig, vision_model, text_model, **kwargs):
        """Loads both bases as `transformers` does (shards, quantisation, ZeRO-3, ...) and puts new adapters on."""
        kwargs.setdefault("dtype", kwargs.pop("torch_dtype", "auto"))  # which it was called before
        # `AutoModel.from_pretrained` has moved `attn_implementation` into the config, which hands it to both bases
        config._attn_implementation = kwargs.pop("attn_implementation", None) or config._attn_implementation
        with torch.random.fork_rng(devices=[]):  # under ZeRO-3 a base draws random numbers before it is loaded
            causal_lm = _load_base(AutoModelForCausalLM, text_model, "text", config, **kwargs)
            shared = {"dtype": kwargs["dtype"], **_hub_kwargs(kwargs)}
            vision_tower = _load_base(AutoModel, vision_model, "vision", config, **shared)
        for module in causal_lm.modules():
            if hasattr(module, "support_avx512bf16_for_cpu"):
                # bitsandbytes repacks 4-bit weights for inference on such CPUs, for good, and has no backward for
                # them: after a first evaluation training would go on without gradients, and without a word
                module.support_avx512bf16_for_cpu = False
        device = _execution_device(causal_lm)
        vision_tower.to(device)
        with device:
            model = cls(config, vision_tower, causal_lm)
        if hasattr(causal_lm, "hf_device_map"):
            model.hf_device_map = causal_lm.hf_device_map
        return model.eval()

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their full names: all that `save_pretrained` writes."""
        return {name: parameter.detach() for name, parameter in self.named_parameters() if is_adapter_name(name)}

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict=None,
        push_to_hub: bool = False,
        merge_base: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ):
        """
        Writes the adapters alone (`model.safetensors`), the config with the ids and revisions of both bases, the
        code, and, unless the folder has one already, the processor: the one that stood beside the adapters where they
        were loaded, or that of the bases. The frozen bases are not written.
        The file of the adapters carries their SHA-256, so that `from_pretrained` notices a damaged byte.
        `push_to_hub` puts the same files, and a card, on the Hub.

        Args:
            state_dict: the tensors to save, as the Trainer gives them; the frozen ones among them are left out.
            merge_base: write the frozen bases too, into `vision_model` and `text_model` of the folder, for a machine
                that must not fetch other repositories. It loads in the same way. Where they lie already, they stay.
            max_shard_size: of the bases, since adapters are one file.
            kwargs: as in `transformers`.

        Raises:
            ValueError: if an adapter tensor is missing or empty, as happens when ZeRO-3 partitions were not gathered;
                likewise of a base with `merge_base`; or with `push_to_hub`, which would leave out the processor.
        """
        if push_to_hub:
            raise ValueError(
                "`save_pretrained` only writes a folder. `model.push_to_hub(repo_id)` puts adapters, processor and "
                "card on the Hub, in one commit."
            )
        own = self.adapter_state_dict()
        adapters = {name: tensor for name, tensor in (state_dict or own).items() if is_adapter_name(name)}
        empty = [name for name in own if name not in adapters or not adapters[name].numel()]
        if is_main_process and empty:
            raise ValueError(
                f"{len(empty)} of {len(own)} adapter tensors are missing or empty, among them {empty[0]}. Nothing was "
                "written. Under ZeRO-3 gather the parameters first, or set "
                '"stage3_gather_16bit_weights_on_model_save" to true.'
            )
        has_processor = os.path.isfile(os.path.join(save_directory, PROCESSOR_NAME))
        processor = None
        if is_main_process and (merge_base or not has_processor):
            processor = self._load_processor()
        if merge_base:
            self._save_bases(save_directory, is_main_process, processor, max_shard_size)
        before = self.config.merged_base
        self.config.merged_base = merge_base or self._are_bases_in(save_directory)
        super().save_pretrained(
            save_directory, is_main_process, state_dict=dict(adapters), save_original_format=False, **kwargs
        )
        self.config.merged_base = before
        if is_main_process:
            # Once more, since there is no way to hand metadata to the line above. The digest alone: several entries
            # would be written in an order of chance, but equal adapters should be equal files
            _save_with_digest(adapters, os.path.join(save_directory, SAFE_WEIGHTS_NAME), {})
        if processor is not None and not has_processor:
            processor.save_pretrained(save_directory)

    def _are_bases_in(self, folder) -> bool:
        """Whether `merge_base` has put these bases into a folder before."""
        if not os.path.isfile(os.path.join(folder, CONFIG_NAME)):
            return False
        there = DehvfConfig.get_config_dict(folder)[0]
        names = [f"{key}_model_{what}" for key in ("vision", "text") for what in ("id", "revision")]
        return there.get("merged_base", False) and all(there.get(n) == getattr(self.config, n) for n in names)

    def _load_processor(self) -> DehvfProcessor | None:
        """The one beside the adapters that were loaded, or else that of the bases; `None` where there is none."""
        location, source = self.name_or_path, self._adapter_source
        if location and _has_file(location, PROCESSOR_NAME, **source):
            return DehvfProcessor.from_pretrained(location, **source)
        bases = (self.model.vision_tower.name_or_path, self.model.language_model.name_or_path)
        ids = (self.config.vision_model_id, self.config.text_model_id)
        revisions = (self.config.vision_model_revision, self.config.text_model_revision)
        pins = (revision if base == known else None for base, known, revision in zip(bases, ids, revisions))
        try:
            return DehvfProcessor.from_vision_text_pretrained(*bases, *pins, **_hub_kwargs(source))
        except (OSError, ValueError) as error:
            logger.warning_once(
                f"The adapters are saved without a processor, since none can be loaded from {' and '.join(bases)} "
                f"({error}). Save yours into the same folder, `processor.save_pretrained(folder)`."
            )
            return None

    def _save_bases(self, save_directory, is_main_process: bool, processor, max_shard_size: int | str):
        """As two whole repositories in folders of their own."""
        if any(not parameter.numel() for parameter in self.parameters()):
            raise ValueError(
                "`merge_base` was given, but ZeRO-3 has divided the bases among the processes. Save the adapters, "
                "load them in a single process, and merge there."
            )
        vision, text = (os.path.join(save_directory, name) for name in ("vision_model", "text_model"))
        for folder, base in ((vision, self.model.vision_tower), (text, self._causal_lm())):
            base.save_pretrained(folder, is_main_process, max_shard_size=max_shard_size)
        if processor is not None:
            processor.image_processor.save_pretrained(vision)
            processor.tokenizer.save_pretrained(text)

    def _causal_lm(self) -> PreTrainedModel:
        """The language model and its head as the one model that they were loaded as."""
        with torch.device("meta"):
            causal_lm = AutoModelForCausalLM.from_config(self.config.text_config)
        setattr(causal_lm, causal_lm.base_model_prefix, self.model.language_model)
        causal_lm.set_output_embeddings(self.lm_head)
        causal_lm.generation_config = self.generation_config
        if hasattr(self, "hf_device_map"):  # so that what is offloaded is fetched
            causal_lm.hf_device_map = self.hf_device_map
        return causal_lm

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: bool | str | None = None,
        merge_base: bool = False,
        tags: list[str] | None = None,
        **kwargs,
    ) -> CommitInfo:
        """
        Puts what `save_pretrained` writes, and a model card, into a repository on the Hub, in one commit. A card that
        somebody wrote stays; one that was written here, for other adapters, is written anew.

        Args:
            repo_id: `org/name`. The repository is made if there is none.
            private: whether it is then private.
            token: of someone who may write there; by default the one that `hf auth login` keeps.
            merge_base: as in `save_pretrained`.
            tags: for the card, beside its own.
            kwargs: as in `huggingface_hub.upload_folder` (`commit_message`, `revision`, `create_pr`, ...).

        Raises:
            TypeError: if `upload_folder` knows no such argument.
            ValueError: if a base is known by its folder alone, in which nobody else would find it.
        """
        config = self.config
        check_hub_ids(vision=config.vision_model_id, text=config.text_model_id)
        options = {"commit_message": "Upload DEHVF adapters", "token": token, **kwargs}
        signature(upload_folder).bind(repo_id=repo_id, folder_path=".", **options)  # before anything is on the Hub
        repo_id = open_repository(repo_id, private, token, kwargs.get("revision"))
        with TemporaryDirectory() as folder:
            self.save_pretrained(folder, merge_base=merge_base)
            with open(os.path.join(folder, SAFE_WEIGHTS_NAME), "rb") as adapters:
                digest = hashlib.file_digest(adapters, "sha256").hexdigest()
            if not _has_card(repo_id, digest, revision=kwargs.get("revision"), token=token):
                card = make_card(
                    repo_id.split("/")[-1],
                    method="dehvf",
                    bases={
                        config.text_model_id: config.text_model_revision,
                        config.vision_model_id: config.vision_model_revision,
                    },
                    trained_parameters=sum(tensor.numel() for tensor in self.adapter_state_dict().values()),
                    code=example_code(repo_id),
                    versions={module.__name__: str(module.__version__) for module in (torch, transformers)},
                    adapter_digest=digest,
                    tags=tags,
                )
                card.save(os.path.join(folder, "README.md"))
            return upload_folder(repo_id=repo_id, folder_path=folder, **options)

    # --- visual memory in files ---

    def save_visual_memory(self, visual_memory: torch.Tensor, file: str | os.PathLike):
        """
        Writes what `get_image_features` returned to a safetensors file, for `load_visual_memory` in another process.

        Args:
            visual_memory: as `get_image_features` returns it.
            file: path of the file.
        """
        self.model.check_visual_memory(visual_memory)
        tensors = {"visual_memory": visual_memory, "vision_encoder": self._sample_encoder()}
        _save_with_digest(tensors, file, self._memory_origin())

    def load_visual_memory(self, file: str | os.PathLike) -> torch.Tensor:
        """
        Reads what `save_visual_memory` wrote.

        Returns:
            `torch.Tensor` as `get_image_features` returns it, on the model's device.

        Raises:
            OSError: if the file is damaged.
            ValueError: if it was encoded by other adapters, another vision encoder or at another image size, to which
                this model's way of reading does not fit; the message names what differs. Or if it is not finite.
        """
        tensors, found = _read_tensors(file)
        differing = [
            f"{name} is {found.get(name)}, here {value}"
            for name, value in self._memory_origin().items()
            if found.get(name) != value
        ]
        encoder, sample = tensors.get("vision_encoder"), self._sample_encoder()
        # As far as rounding to bfloat16 goes, since the encoder may be loaded in any dtype
        if encoder is None or encoder.shape != sample.shape or not encoder.isclose(sample, 2**-7, 1e-6).all():
            differing.append("the vision encoder has other weights")
        if "visual_memory" not in tensors:
            differing.append("it holds no tensor of that name")
        if differing:
            raise ValueError(
                f"The visual memory in {file} was not encoded by this model: {'; '.join(differing)}. Encode the "
                "images again with `get_image_features`, or load the adapters that the memory was made with."
            )
        self.model.check_visual_memory(tensors["visual_memory"])
        # A copy, since what was read is mapped to the file, and would follow it when that is overwritten
        return tensors["visual_memory"].to(self.device, copy=True)

    def _memory_origin(self) -> dict[str, str]:
        """What an image's memory, and the way to read it, depend on, beside the weights of the vision encoder."""
        config, vision = self.config, self.config.vision_config
        # These change what is mixed, but no tensor of the adapters
        settings = ("num_groups", "layer_fusion", "layer_mapping", "layer_mapping_seed", "visual_prompts")
        return {
            "adapters": f"{_digest(self.adapter_state_dict())} in {self.model.memory_slots.key.dtype}",
            "image size": f"{vision.image_size} with patches of {vision.patch_size}",
            **{name: str(getattr(config, name)) for name in settings},
        }

    def _sample_encoder(self) -> torch.Tensor:
        """A few numbers of each of the vision encoder's tensors, by which another one is told."""
        parameters = self.model.vision_tower.parameters()
        return torch.cat([parameter.detach().flatten()[:8].float().cpu() for parameter in parameters])

    # --- several adapters on the same bases ---

    def load_adapter(self, pretrained_model_name_or_path, adapter_name: str, **kwargs):
        """
        Loads further adapters onto the bases that are there. They may have another config, but not other bases: of
        those with another id or commit is warned, since copies may go by several. The first adapters are called
        `"default"` and stay active until `set_adapter` says otherwise.

        Args:
            pretrained_model_name_or_path: Hub id or folder that `save_pretrained` wrote.
            adapter_name: what to call them here.
            kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            OSError: if there are no adapters.
            ValueError: if the name is taken, the adapters do not fit their config, or were made for bases of another
                shape.
        """
        if adapter_name in (*self.model.adapter_names, "__base__"):
            raise ValueError(
                f"The name {adapter_name!r} is taken. Choose another, or free it with `delete_adapter`. Taken are: "
                f"{', '.join((*self.model.adapter_names, '__base__'))}."
            )
        tensors = _load_adapters(pretrained_model_name_or_path, kwargs)
        config = DehvfConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        config._attn_implementation = self.config._attn_implementation
        for key in ("vision", "text"):
            _check_base(getattr(self.config, f"{key}_config"), getattr(config, f"{key}_config"), "this model")
            names = [f"{key}_model_id", f"{key}_model_revision"]
            (asked, commit), (there, own_commit) = ([getattr(one, n) for n in names] for one in (config, self.config))
            if asked != there or commit and own_commit and commit != own_commit:
                logger.warning(
                    f"The adapters {adapter_name!r} were made for the {key} model {asked} (commit {commit}), not for "
                    f"{there} (commit {own_commit}), and meet other weights here if these differ."
                )
            for name in (f"{key}_config", *names):
                setattr(config, name, getattr(self.config, name))
        adapters = _empty_adapters(config, pretrained_model_name_or_path)
        _check_adapters(tensors, adapters.state_dict(), pretrained_model_name_or_path)
        adapters.to_empty(device=self.model.memory_slots.key.device).load_state_dict(tensors)
        self.model.shelve(adapter_name, config, dict(adapters["model"].items()))

    def set_adapter(self, adapter_name: str):
        """
        Makes these adapters the active ones: those that images and texts meet, and that are trained and saved.

        Raises:
            ValueError: if none of this name are loaded.
        """
        self.model.set_adapter(adapter_name)
        self.config = self.model.config

    def delete_adapter(self, adapter_name: str):
        """
        Forgets adapters that are not active.

        Raises:
            ValueError: if none of this name are loaded, or they are active.
        """
        self.model.delete_adapter(adapter_name)

    def active_adapters(self) -> list[str]:
        """The name of the active adapters, in a list as `transformers` has it."""
        return [self.model.active_adapter]

    # --- computing ---

    @contextmanager
    def disable_adapter(self):
        """Inside this context the model is its language model alone, bit for bit, and images are not looked at."""
        before, self.model.adapter_enabled = self.model.adapter_enabled, False
        try:
            yield
        finally:
            self.model.adapter_enabled = before

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
    ) -> torch.Tensor | None:
        """See [`DehvfModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_mask, instruction)

    def get_instruction_features(self, input_ids=None, instruction_mask=None, inputs_embeds=None) -> torch.Tensor:
        """See [`DehvfModel.get_instruction_features`]."""
        return self.model.get_instruction_features(input_ids, instruction_mask, inputs_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values=None,
        inputs_embeds: torch.Tensor | None = None,
        visual_memory: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DehvfCausalLMOutputWithPast:
        """
        Args:
            labels: `(batch_size, sequence_length)` token ids, -100 where no loss is taken.
            logits_to_keep: compute logits for the last so many positions only; 0 is all.

        All others as in [`DehvfModel.forward`]; with `labels`, the tokens without a loss are the user's by default.
        """
        reads_instruction = self.config.reads_instruction or adapter_names is not None  # one of them may
        if reads_instruction and instruction_mask is None and labels is not None:
            instruction_mask = labels == -100
            if attention_mask is not None:
                instruction_mask = instruction_mask & attention_mask.bool()
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_mask=image_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            visual_memory=visual_memory,
            instruction_mask=instruction_mask,
            adapter_names=adapter_names,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(outputs.last_hidden_state[:, kept])
        text_config = self.config.text_config
        if softcap := getattr(text_config, "final_logit_softcapping", None):  # Gemma 2
            logits = softcap * torch.tanh(logits / softcap)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=text_config.vocab_size, **kwargs)
        return DehvfCausalLMOutputWithPast(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            visual_memory=outputs.visual_memory,
        )

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """
        Encodes before the batch is expanded, so that all beams of a sample share one run of the encoder. What is
        expanded is brought into the form in which it is read, which is then handed to every step.
        """
        names = ("pixel_values", "image_mask", "visual_memory", "adapter_names", "instruction_mask")
        images = {name: model_kwargs.pop(name, None) for name in names}
        if self.model.adapter_enabled:
            embeds, mask = model_kwargs.get("inputs_embeds"), images.pop("instruction_mask")
            embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
            mask = model_kwargs.get("attention_mask") if mask is None else mask
            if images["pixel_values"] is not None:
                images["pixel_values"] = images["pixel_values"].to(self.device)
            view, _ = self.model._view_images(embeds, mask, **images, copies=expand_size)
            model_kwargs["memory_view"] = view
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """An `assistant_model` drafts from the text alone; this model, which sees, decides."""
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "memory_view"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)


def _digest(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 of tensors and their names, whatever device they are on."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(name.encode() + tensor.float().cpu().numpy().tobytes())
    return digest.hexdigest()


def _hub_kwargs(kwargs: dict) -> dict:
    """Those that say how to look for files, which concerns the bases as much as the adapters."""
    return {n: kwargs[n] for n in ("cache_dir", "force_download", "local_files_only", "token") if n in kwargs}


def _once_more(source: dict) -> dict:
    """How to look for files again: what was downloaded by force need not be so twice."""
    return {name: value for name, value in source.items() if name != "force_download"}


def _has_file(location, name: str, **source) -> bool:
    """Whether there is such a file, as far as is known here and now."""
    quietly = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    try:
        return cached_file(location, name, **quietly, **source) is not None
    except OSError:  # neither a folder (any more) nor an id
        return False


@contextmanager
def _naming_base(location, key: str):
    """Says which base could not be fetched, and what to do: the user has asked for other files, the adapters."""
    try:
        yield
    except (OSError, HTTPError) as error:
        kind = {"vision": "vision encoder", "text": "language model"}[key]
        raise OSError(
            f"The {kind} {location}, which the adapters need, could not be loaded. If it is private or gated, ask for "
            f"access on its page, log in (`hf auth login`) or pass `token=`. If you have a copy, pass `{key}_model=` "
            f"with its folder. If the connection broke, try again: files that arrived whole are kept.\n"
            f"{error.__cause__ or error}"  # what the Hub said, which `transformers` has at times only guessed from
        ) from error


def load_base_config(location, key: str, revision, hub_kwargs: dict):
    """
    The config of a base (`key` is `"vision"` or `"text"`), without dropout; of a two-tower model such as CLIP, the
    config of the tower that is meant.
    """
    config = AutoConfig.from_pretrained(location, revision=revision, **hub_kwargs)
    return disable_dropout(getattr(config, f"{key}_config", config))


def _load_base(auto_class, location, key: str, config: DehvfConfig, **kwargs) -> PreTrainedModel:
    """Loads a base and leaves its config and its commit in `config`. A base of another shape is refused before."""
    revision = None
    if str(location) == getattr(config, f"{key}_model_id"):  # the pinned commit does not speak of an override
        pinned = getattr(config, f"{key}_model_revision")
        revision = resolve_revision(location, pinned, **_once_more(_hub_kwargs(kwargs)))
        setattr(config, f"{key}_model_revision", getattr(revision, "resolved", revision))
    with _naming_base(location, key):
        found = load_base_config(location, key, revision, _hub_kwargs(kwargs))
    expected = getattr(config, f"{key}_config")
    _check_base(found, expected, location)
    found._attn_implementation = expected._attn_implementation
    dtype = found.dtype if kwargs["dtype"] == "auto" else kwargs["dtype"]
    with _naming_base(location, key), _zero3_dtype(dtype):
        base, info = auto_class.from_pretrained(
            location, config=found, revision=revision, output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise ValueError(
            f"{location} lacks {len(missing)} tensors of the {type(base).__name__} that the adapters need, among them "
            f"{missing[0]}; they would be random. Give the repository or folder of the whole model, and of no other."
        )
    base.config._name_or_path = getattr(config, f"{key}_model_id")  # a saved config tells no folder of this machine
    setattr(config, f"{key}_config", base.config)
    return base


def _check_base(found, expected, location):
    for name in ("model_type", "hidden_size", "num_hidden_layers", "vocab_size", "image_size", "patch_size"):
        sizes = getattr(found, name, None), getattr(expected, name, None)
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"The base in {location} has `{name}={sizes[0]}`, but the adapters were made for `{name}={sizes[1]}`. "
                "Give the base that the adapters were trained on."
            )


def _execution_device(causal_lm: PreTrainedModel) -> torch.device:
    """Where a base computes. Weights that `device_map` offloads are on the meta device between their uses."""
    places = getattr(causal_lm, "hf_device_map", {"": causal_lm.device}).values()
    return torch.device(next((place for place in places if place not in ("cpu", "disk")), "cpu"))


def _save_with_digest(tensors: dict[str, torch.Tensor], file: str | os.PathLike, metadata: dict[str, str]):
    tensors = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    save_file(tensors, file, metadata={**metadata, "sha256": _digest(tensors)})


def _read_tensors(file: str | os.PathLike) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """
    Tensors and metadata of a safetensors file.

    Raises:
        OSError: if it is damaged: cut short, no safetensors file, or other tensors than its SHA-256 speaks of. A file
            without one, as other programs write it, is read as it is.
        ValueError: if a tensor is not of `FILE_DTYPES`, or not finite.
    """
    remedy = "Copy or download it once more, or take an earlier checkpoint."
    try:
        with safe_open(file, framework="pt") as opened:
            metadata, names = opened.metadata() or {}, list(opened.keys())
            dtypes = {name: opened.get_slice(name).get_dtype() for name in names}
            if wrong := [name for name in names if dtypes[name] not in FILE_DTYPES]:
                raise ValueError(
                    f"`{wrong[0]}` in {file} is of type {dtypes[wrong[0]]}, but must be one of "
                    f"{', '.join(FILE_DTYPES)}. Save it as one of these."
                )
            tensors = {name: opened.get_tensor(name) for name in names}
    except SafetensorError as error:
        raise OSError(f"{file} is damaged and cannot be read: {error}. {remedy}") from error
    if "sha256" in metadata and metadata["sha256"] != _digest(tensors):
        raise OSError(f"{file} is damaged: its tensors are not those that were saved. {remedy}")
    if wrong := [name for name, tensor in tensors.items() if not tensor.isfinite().all()]:
        raise ValueError(
            f"`{wrong[0]}` in {file} holds numbers that are infinite or not a number. If training had diverged when "
            "it was saved, take an earlier checkpoint, and a lower learning rate."
        )
    return tensors, metadata


@contextmanager
def _zero3_dtype(dtype: torch.dtype | str | None):
    """
    ZeRO-3 divides a base among the processes as it loads, in the dtype that DeepSpeed trains in: float32, or the
    adapters would not be in it. Inside this context it is the base's own.
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


def _load_adapters(location, source: dict) -> dict[str, torch.Tensor]:
    file = cached_file(location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **source)
    if file is None:
        raise OSError(
            f"{location} has no {SAFE_WEIGHTS_NAME}, so there are no adapters to load. To start new adapters use "
            "`DehvfForConditionalGeneration.from_vision_text_pretrained(vision_model, text_model)`; for random "
            "weights of the same shapes use `AutoModel.from_config(config, trust_remote_code=True)`."
        )
    return _read_tensors(file)[0]


def _empty_adapters(config: DehvfConfig, location) -> nn.ModuleDict:
    """The adapters that the config asks for, by their full names, without values however large it says they are."""
    try:
        check_layouts(config)
        with torch.device("meta"):
            return nn.ModuleDict({DehvfPreTrainedModel.base_model_prefix: nn.ModuleDict(build_adapters(config))})
    except Exception as error:  # a config from elsewhere can be wrong in more ways than could be listed
        raise ValueError(
            f"No adapters can be built from the config in {location} ({type(error).__name__}: {error}). Load them "
            "with the config that they were saved with."
        ) from error


def _check_adapters(adapters: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], location):
    problems = [f"missing: {name}" for name in expected.keys() - adapters.keys()]
    problems += [f"unexpected: {name}" for name in adapters.keys() - expected.keys()]
    for name in expected.keys() & adapters.keys():
        given, asked = tuple(adapters[name].shape), tuple(expected[name].shape)
        if given != asked:
            problems.append(f"wrong shape: {name} is {given}, the config asks for {asked}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise ValueError(
            f"The adapters in {location} do not fit the config beside them ({len(problems)} problems):\n  {shown}\n"
            "Load them with the config that they were saved with."
        )


# ---------------------------------------------------------------------------------------------------------------------
# The model card
# ---------------------------------------------------------------------------------------------------------------------


CARD_MARK = "<!-- Written for adapters with the SHA-256 {}. Without this line your own text stays. -->"


def is_hub_id(location) -> bool:
    """Whether this is an id on the Hub (`org/name`), and not a folder."""
    try:
        validate_repo_id(location)
    except HFValidationError:
        return False
    return location is not None and not os.path.isdir(location)


def check_hub_ids(**bases: str | None):
    """Raises `ValueError` if a base (`vision=`, `text=`) has no id under which everyone finds it."""
    for key, location in bases.items():
        if not is_hub_id(location):
            raise ValueError(
                f"Adapters on the Hub name their bases by Hub id, but `{key}_model_id` is {location!r}. Say which "
                f"repository that is a copy of: `--{key}_model_id org/name` of train.py, or `model.config."
                f'{key}_model_id = "org/name"`, and its commit likewise as `{key}_model_revision`.'
            )


def example_code(repo_id: str) -> str:
    """Lines of Python that load adapters from the Hub and ask them about an image."""
    return f"""\
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

name = {repo_id!r}
revision = "main"  # better the commit whose code you have read, in 40 hex digits
model = AutoModelForImageTextToText.from_pretrained(name, revision=revision, trust_remote_code=True)
processor = AutoProcessor.from_pretrained(name, revision=revision, trust_remote_code=True)
message = {{"role": "user", "content": "What is in the image?"}}
question = processor.apply_chat_template([message], add_generation_prompt=True)
inputs = processor(images=Image.open("image.png"), text=question, return_tensors="pt")
answer = model.generate(**inputs, max_new_tokens=10, do_sample=False)[:, inputs["input_ids"].shape[1] :]
print(question + processor.batch_decode(answer, skip_special_tokens=True)[0])
"""


def _has_card(repo_id: str, adapter_digest: str, **source) -> bool:
    """Whether there is a card to leave as it is: `make_card`'s for these adapters, or anybody's own."""
    if not file_exists(repo_id, "README.md", **source):
        return False
    with open(hf_hub_download(repo_id, "README.md", **source), encoding="utf-8") as card:
        made_for = re.search(CARD_MARK.format("(.*)"), card.read())
    return made_for is None or made_for[1] == adapter_digest


def make_card(
    name: str,
    method: str,
    bases: dict[str, str | None],
    trained_parameters: int,
    code: str | None,
    versions: dict[str, str],
    adapter_digest: str,
    sections: str = "",
    tags: list[str] | None = None,
    **metadata,
) -> ModelCard:
    """
    A model card with valid metadata.

    Args:
        bases: id or folder of language model and vision encoder -> commit. The metadata names those on the Hub alone.
        code: lines of Python that use the adapters, if anyone can.
        versions: of the packages that they were made with.
        adapter_digest: SHA-256 of the adapters' file, by which a later push tells whether the card speaks of it.
        sections: Markdown to stand before the versions.
        metadata: further fields of `huggingface_hub.ModelCardData`, such as `datasets` and `eval_results`.
    """
    known = [base for base in bases if is_hub_id(base)]
    data = ModelCardData(
        base_model=known or None,
        base_model_relation="adapter" if known else None,
        library_name="transformers",
        pipeline_tag="image-text-to-text",
        tags=list(dict.fromkeys([method, "adapter", "vision-language", *(tags or [])])),
        **metadata,
    )
    commits = "\n".join(f"| `{base}` | {commit or 'not pinned'} |" for base, commit in bases.items())
    use = (
        "## Use\n\n`trust_remote_code=True` runs the `*_dehvf.py` files of this repository: read them first, and pin "
        f"the commit that you have read.\n\n```python\n{code}```\n\n"
        if code
        else ""
    )
    return ModelCard(
        f"---\n{data.to_yaml()}\n---\n{CARD_MARK.format(adapter_digest)}\n\n# {name}\n\n"
        f"Adapters of the method `{method}`: {trained_parameters:,} trained parameters. The frozen bases are "
        f"loaded from their own repositories:\n\n| base | commit |\n|---|---|\n{commits}\n\n"
        f"{use}{sections}## Versions\n\n"
        + "\n".join(f"- {package} {number}" for package, number in versions.items())
        + "\n"
    )


DehvfForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")

__all__ = ["DehvfForConditionalGeneration", "DehvfModel", "DehvfPreTrainedModel"]
