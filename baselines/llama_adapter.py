# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
LLaMA-Adapter with images (arXiv 2303.16199): learned prompts that the attention of the topmost language layers reads
in addition to the sequence, through a gate that is initialised to zero (peft's adaption prompt). A feature of the
image is added to the prompts of all these layers; no token is added to the sequence.

As in that paper, the image feature is computed from the concatenated class tokens of several layers of the vision
encoder by a small network. If the encoder has no class token, the mean over the patches is used. The paper specifies
neither the layers nor the network. We use four evenly spaced layers and 64 hidden units. Trained parameters for
LLaMA-7B and CLIP ViT-L/14 (1.8 M in the paper):

    prompts of 30 layers          30 x 10 x 4096 = 1,228,800
    gates, one for each head of these layers             960
    projector 4 x 1024 -> 64 -> 4096                 528,448
    sum                                            1,758,208

In the paper, 30 of 32 layers have prompts and the lowest two do not; here this is the default for any depth. The gate
is `tanh(gate)` for each head, as in the authors' code; peft has one number per layer and no tanh.
"""

from collections.abc import Callable

import torch
from torch.nn import functional as F
from transformers.utils.versions import require_version


require_version("peft>=0.21", "The baselines llama-adapter and llama-adapter-v2 need it: pip install peft")

from peft.tuners.adaption_prompt import AdaptedAttention  # noqa: E402
from peft.tuners.adaption_prompt.utils import llama_compute_query_states  # noqa: E402

from . import (  # noqa: E402
    BaselineArguments,
    ClassTokenProjector,
    FrozenBasesForConditionalGeneration,
    spread_layers,
)


def read_prompts(
    attention, prompts: torch.Tensor, gate: torch.Tensor, project: Callable[[torch.Tensor], torch.Tensor], **kwargs
) -> torch.Tensor:
    """
    The attention output of prompts, whose keys and values have no position.

    Args:
        attention: attention module of a language layer; `kwargs` are its arguments.
        prompts: `(batch_size or 1, num_prompts, hidden_size)`.
        gate: factor of the output of each head, `(num_heads, 1, 1)` or `(batch_size, num_heads, 1, 1)`.
        project: the output projection.

    Returns:
        `torch.Tensor` of shape `(batch_size, sequence_length, hidden_size)`.
    """
    query = llama_compute_query_states(model=attention, **kwargs)  # B heads T head_dim
    prompts = prompts.to(query.dtype).expand(len(query), -1, -1)  # B A h
    key, value = (
        projection(prompts).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for projection in (attention.k_proj, attention.v_proj)
    )
    attended = gate * F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    return project(attended.to(query.dtype).transpose(1, 2).flatten(2))


class ImageAdaptedAttention(AdaptedAttention):
    """
    peft's adapted attention, with separate prompts for each sample, and in fp32.

    It inherits from peft the parameter `adaption_prompt`, `(1, prompt_length, hidden_size)`, with its initialisation,
    and the wrapped attention, `model`. `adaption_gate`, `(num_heads, 1, 1)`, is as in the authors' code.
    """

    def __init__(self, attention, prompt_length: int):
        super().__init__(attention.config.model_type, prompt_length, attention)
        self.adaption_prompt.data = self.adaption_prompt.data.float()  # peft creates them in the dtype of the base
        self.adaption_gate = torch.nn.Parameter(torch.zeros(attention.config.num_attention_heads, 1, 1))

    def forward(self, visual_prompt: torch.Tensor | None = None, **kwargs):
        """Adds `visual_prompt`, `(batch_size or 1, 1, hidden_size)`, to all prompts. `kwargs` go to the attention."""
        output, *rest = self.model(**kwargs)
        prompts = self.adaption_prompt if visual_prompt is None else self.adaption_prompt + visual_prompt
        gate, project = self.adaption_gate.tanh(), self.model.o_proj
        return output + read_prompts(self.model, prompts, gate, project, **kwargs), *rest


class VisualPromptForConditionalGeneration(FrozenBasesForConditionalGeneration):
    """A method whose `visual_prompt` is computed from the image and passed to each language layer."""

    def layers_with_prompts(self, number: int | None, default: int, most: int) -> torch.nn.ModuleList:
        """The topmost `number` language layers, or `default`. Raises `ValueError` if not between 1 and `most`."""
        layers = self.model.language_model.layers
        number = default if number is None else number
        if not 1 <= number <= most:
            raise ValueError(
                f"`adaption_prompt_layers` is {number}, but the language model has {len(layers)} layers. Set it to a "
                f"number from 1 to {most}."
            )
        return layers[-number:]

    def visual_prompt(self, pixel_values: torch.Tensor | None, image_mask: torch.Tensor | None) -> torch.Tensor | None:
        """`image_features` of each sample, `(batch_size, num_tokens, hidden_size)`, zeros where it has no image."""
        if pixel_values is None:
            # DDP fails if parameters have no gradient, so without images the vision path runs with zero effect
            return 0 * self.image_features() if self.training else None
        features = self.image_features(pixel_values, image_mask)  # I n h
        if image_mask is None:
            return features
        rows = image_mask.nonzero().flatten()
        return features.new_zeros(len(image_mask), *features.shape[1:]).index_copy(0, rows, features)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_prompt: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, if any sample has an image.
            image_mask: `(batch_size,)` booleans: which samples have one. By default all.
            visual_prompt: the result of the method `visual_prompt`, if already computed; replaces both.

        The other arguments and the output are those of `LlavaForConditionalGeneration`.
        """
        if visual_prompt is None:
            visual_prompt = self.visual_prompt(pixel_values, image_mask)
        if position_ids is None and attention_mask is not None:
            # The keys of the prompts have no position, so padding on the left must not shift the queries
            position_ids = (attention_mask.cumsum(dim=1) - 1).clamp(min=0)[:, -input_ids.shape[1] :]
        named = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return super().forward(input_ids=input_ids, visual_prompt=visual_prompt, **named, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Encodes images once and passes `visual_prompt`, which is expanded for beams like other inputs."""
        images = (model_kwargs.pop(name, None) for name in ("pixel_values", "image_mask"))
        model_kwargs["visual_prompt"] = self.visual_prompt(*images)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


class LlamaAdapterForConditionalGeneration(VisualPromptForConditionalGeneration):
    """
    LLaMA-Adapter. Its visual prompt is one token, which is added to all learned prompts.

    Raises:
        ValueError: if `adaption_prompt_layers` is not between 1 and the number of language layers.
    """

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        vision, act, number = vision_tower.config, "silu", arguments.adaption_image_layers
        width, depth = causal_lm.config.hidden_size, causal_lm.config.num_hidden_layers
        layers = spread_layers(vision.num_hidden_layers, number)
        features = {"vision_feature_layer": layers, "vision_feature_select_strategy": "full"}
        projector = ClassTokenProjector(vision, number, arguments.adaption_projector_size, width, act)
        super().__init__(vision_tower, causal_lm, projector, image_size, projector_hidden_act=act, **features)
        for layer in self.layers_with_prompts(arguments.adaption_prompt_layers, default=depth - 2, most=depth):
            layer.self_attn = ImageAdaptedAttention(layer.self_attn, arguments.adaption_prompt_length)


assemble = LlamaAdapterForConditionalGeneration
