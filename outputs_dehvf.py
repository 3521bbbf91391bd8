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


def compute_logits(lm_head: nn.Module, hidden_states: torch.Tensor, text_config: PreTrainedConfig) -> torch.Tensor:
    """
    Computes the logits bit for bit as the language model itself does: some models scale or cap the output of their
    head with values of their config.

    Args:
        hidden_states: `(batch_size, num_tokens, language_hidden_size)`.
    """
    scaling = getattr(text_config, "logits_scaling", None)
    if text_config.model_type == "minicpm3":
        return lm_head(hidden_states / scaling)
    logits = lm_head(hidden_states)
    if text_config.model_type == "hyperclovax":
        logits = logits * scaling
    elif scaling is not None:  # Granite
        logits = logits / scaling
    for name in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        if (scale := getattr(text_config, name, None)) is not None:
            logits = logits * scale
    for name in ("final_logit_softcapping", "logits_soft_cap"):  # Gemma 2; RecurrentGemma
        if (cap := getattr(text_config, name, None)) is not None:
            logits = cap * torch.tanh(logits / cap)
    return logits
