# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Output classes of both models, and the logits as the language model computes them."""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling, CausalLMOutputWithPast
from transformers.utils import ModelOutput

from .memory_dehvf import as_visual_memory


class VisualMemoryOutput:
    """For outputs with a field `image_outputs`."""

    @property
    def visual_memory(self) -> torch.Tensor | None:
        """
        The encoded images, `(batch_size, num_language_layers, num_positions, num_patches, projector_hidden_size + 1)`.
        Pass it as `visual_memory=` to ask again without running the encoder.
        """
        return as_visual_memory(self.image_outputs)


@dataclass
class DehvfModelOutputWithPast(VisualMemoryOutput, BaseModelOutputWithPast):
    """
    Adds to the language model's output:
        image_outputs (`BaseModelOutputWithPooling`, *optional*): the encoded images, as returned by
            `get_image_features`.
    """

    image_outputs: BaseModelOutputWithPooling | None = None

    @classmethod
    def from_language_model(cls, outputs: ModelOutput, image_outputs: BaseModelOutputWithPooling | None):
        # Without fields that only some language models have, such as `cross_attentions` of GPT-2
        own = {name: value for name, value in outputs.items() if name in cls.__dataclass_fields__}
        return cls(**own, image_outputs=image_outputs)


@dataclass
class DehvfCausalLMOutputWithPast(VisualMemoryOutput, CausalLMOutputWithPast):
    """Adds `image_outputs`, as in [`DehvfModelOutputWithPast`]."""

    image_outputs: BaseModelOutputWithPooling | None = None


# The types of language models that change the output of their head, and the value of their config that they use
FACTORS = {
    **dict.fromkeys(("cohere", "cohere2", "cohere_compass_text"), "logit_scale"),
    "falcon_h1": "lm_head_multiplier",
    "hyperclovax": "logits_scaling",
}
DIVISORS = dict.fromkeys(("granite", "granite_swa"), "logits_scaling")
CAPS = {
    **dict.fromkeys(
        ("gemma2", "gemma3_text", "gemma4_unified_text", "nanochat", "vaultgemma"), "final_logit_softcapping"
    ),
    "recurrent_gemma": "logits_soft_cap",
}


def keep_positions(tensor: torch.Tensor, logits_to_keep: int | torch.Tensor) -> torch.Tensor:
    """
    The positions of `tensor`, `(batch_size, num_tokens, ...)`, for which logits are computed, as in `transformers`.

    Args:
        logits_to_keep: the number of last positions, 0 for all; positions of all samples, `(num_positions,)`, or of
            each, `(batch_size, num_positions)`; or a mask, `(batch_size, num_tokens)` booleans, whose positions are
            returned in one dimension.
    """
    if isinstance(logits_to_keep, int):
        return tensor[:, slice(-logits_to_keep, None)]
    if logits_to_keep.ndim == 1:
        return tensor[:, logits_to_keep]
    if logits_to_keep.dtype == torch.bool:
        return tensor[logits_to_keep]
    return torch.take_along_dim(tensor, logits_to_keep.view(*logits_to_keep.shape, *[1] * (tensor.ndim - 2)), dim=1)


def compute_logits(lm_head: nn.Module, hidden_states: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """
    Computes the logits bit for bit as the language model itself does: some types scale or cap the output of their head
    with a value of their config. Others ignore a value of the same name, as MPT does.

    Args:
        hidden_states: `(batch_size, num_tokens, language_hidden_size)`, or without the first dimension.
    """
    model_type = text_config.model_type
    if model_type == "minicpm3":
        hidden_states = hidden_states / text_config.logits_scaling
    logits = lm_head(hidden_states)
    factor, divisor, cap = (
        getattr(text_config, names.get(model_type, ""), None) for names in (FACTORS, DIVISORS, CAPS)
    )
    if factor is not None:
        logits = logits * factor
    if divisor is not None:
        logits = logits / divisor
    if cap is not None:
        logits = cap * torch.tanh(logits / cap)
    return logits
