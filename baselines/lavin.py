# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
LaVIN (arXiv 2305.15023): few image tokens, and mixture-of-modality adapters before the attention in all layers of
both bases. Follows the authors' code, luogen1996/LaVIN at dd0a1bf, with `scripts/finetuning_sqa_7b.sh`. Trained
parameters for LLaMA-7B and CLIP ViT-L/14 (3.8 M in the paper):

    32 adapters of the language model        32 x 81,930 = 2,621,760
    24 adapters of the vision encoder        24 x 20,490 =   491,760
    projector 1024 -> 128 -> 4096                            659,584
    modality tokens, 2 x 4096                                  8,192
    sum                                                    3,781,296

An adapter has a down projection, two up projections in two groups each (RepAdapter, arXiv 2302.08106) and a router:
at width d, 8 (d + 1) + 2 (4 d + d) + 2 (d + 1).

There are three differences; the first one does not change the results:

- In the authors' code, a modality token precedes each sequence. It only attends to itself, no other token attends to
  it, and the routers read it, so their output depends on the modality only. Here both modality tokens run through the
  language model separately, once per forward or per call of `generate`, and sequences and caches do not change.
- In the authors' code, the vision encoder's routers get sequences with the batch second, so they weight each position
  by the first image of the batch. Here they read each image's class token, and samples do not depend on each other. If
  the encoder has no class token, the mean over the patches is used, also for the image tokens.
- In the authors' code, sequences start with the words "Image:" or "Image: N/A". Here all methods get the same text.
"""

import torch
from torch import nn

from . import (
    BaselineArguments,
    ClassTokenProjector,
    ImageTokensForConditionalGeneration,
    class_features,
    spread_layers,
)


class MixtureOfModalityAdapter(nn.Module):
    """
    Adds two adapters' outputs, weighted by `routing`, to the input of an attention module.

    Args:
        width: width of the hidden states.
        size: hidden width of the adapters.
        temperature: divides the router's scores.
        dropout: dropout of the hidden activations in training.
        has_class_token: whether the router reads the first token; otherwise it reads the mean over all tokens.
    """

    def __init__(self, width: int, size: int, temperature: float, dropout: float, has_class_token: bool):
        super().__init__()
        self.down = nn.Linear(width, size)
        self.up = nn.ModuleList(nn.Conv1d(size, width, kernel_size=1, groups=2) for _ in range(2))
        self.router = nn.Linear(width, 2)
        self.dropout = nn.Dropout(dropout)
        self.temperature, self.has_class_token = temperature, has_class_token
        nn.init.xavier_uniform_(self.down.weight)
        nn.init.zeros_(self.down.bias)
        for up in self.up:  # new adapters do not change the bases
            nn.init.zeros_(up.weight)
            nn.init.zeros_(up.bias)

    def route(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """The weights of both adapters, `(batch_size, 2)`, from hidden states `(batch_size, length, width)`."""
        features = class_features(hidden_states, self.has_class_token).to(self.router.weight.dtype)
        return (self.router(features) / self.temperature).softmax(dim=-1)

    def forward(self, hidden_states: torch.Tensor, routing: torch.Tensor | None = None) -> torch.Tensor:
        routing = self.route(hidden_states) if routing is None else routing
        hidden = self.dropout(self.down(hidden_states.to(self.down.weight.dtype))).transpose(1, 2)  # B size T
        added = sum(weight[:, None, None] * up(hidden) for weight, up in zip(routing.unbind(1), self.up))  # B width T
        return hidden_states + added.transpose(1, 2).to(hidden_states.dtype)


def adapt_input(attention: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """
    Forward pre-hook of an attention module with an `adapter`. `routing`, an argument that the language model
    passes to each layer, has the weights of all layers, `(batch_size, num_language_layers, 2)`.
    """
    routing = kwargs.pop("routing", None)
    if routing is not None:
        routing = routing[:, attention.layer_idx]
    if args:  # DINOv2 passes the hidden states by position
        return (attention.adapter(args[0], routing), *args[1:]), kwargs
    kwargs["hidden_states"] = attention.adapter(kwargs["hidden_states"], routing)
    return args, kwargs


class LavinForConditionalGeneration(ImageTokensForConditionalGeneration):
    """LaVIN. Its image tokens are the class tokens of evenly spaced layers."""

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        vision, width, act = vision_tower.config, causal_lm.config.hidden_size, "silu"
        features = {
            "vision_feature_layer": spread_layers(vision.num_hidden_layers, arguments.lavin_image_tokens),
            "vision_feature_select_strategy": "full",
            "image_seq_length": arguments.lavin_image_tokens,
        }
        projector = ClassTokenProjector(vision, 1, arguments.lavin_projector_size, width, act)
        super().__init__(vision_tower, causal_lm, projector, image_size, projector_hidden_act=act, **features)
        self.modality_embedding = nn.Embedding(2, width)  # 0 without an image, 1 with an image
        layout = self.vision_layout
        vision_layers = vision_tower.get_submodule(layout.layers)
        for layer in (*vision_layers, *self.model.language_model.layers):
            attention = layer.attention if hasattr(layer, "attention") else layer.self_attn  # the former in DINOv2
            attention.adapter = MixtureOfModalityAdapter(
                attention.config.hidden_size,
                arguments.lavin_adapter_size,
                arguments.lavin_temperature,
                arguments.lavin_adapter_dropout,
                has_class_token=layout.has_class_token or layer not in vision_layers,
            )
            attention.register_forward_pre_hook(adapt_input, with_kwargs=True)

    def routing(self, image_mask: torch.Tensor | None, batch_size: int) -> torch.Tensor:
        """
        The weights of the language model's adapters for each sample, `(batch_size, num_language_layers, 2)`.

        Args:
            image_mask: `(batch_size,)` booleans: which samples have an image; `None` if none has.
        """
        language_model = self.model.language_model
        tokens = self.modality_embedding(torch.arange(2, device=self.device)[:, None])  # 2 1 h
        tokens = tokens.to(language_model.dtype)  # may differ from that of the vision encoder
        states = language_model(inputs_embeds=tokens, output_hidden_states=True, use_cache=False).hidden_states
        weights = [  # the last state has no layer above it
            layer.self_attn.adapter.route(layer.input_layernorm(state))
            for layer, state in zip(language_model.layers, states)
        ]
        if image_mask is None:
            image_mask = torch.zeros(batch_size, device=tokens.device)
        return torch.stack(weights, dim=1)[image_mask.long()]  # B L 2

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        routing: torch.Tensor | None = None,
        **kwargs,
    ):
        """As [`ImageTokensForConditionalGeneration.forward`]. `routing` is the result of the method `routing`."""
        if routing is None:
            routing = self.routing(_image_mask(pixel_values, image_mask), len(input_ids))
        arguments = input_ids, pixel_values, image_mask, attention_mask, position_ids, logits_to_keep
        return super().forward(*arguments, routing=routing, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Runs the routers once and passes `routing`, which is expanded for beams like other inputs."""
        image_mask = _image_mask(model_kwargs.get("pixel_values"), model_kwargs.get("image_mask"))
        model_kwargs["routing"] = self.routing(image_mask, len(input_ids))
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


def _image_mask(pixel_values: torch.Tensor | None, image_mask: torch.Tensor | None) -> torch.Tensor | None:
    if image_mask is None and pixel_values is not None:
        return pixel_values.new_ones(len(pixel_values))
    return image_mask


assemble = LavinForConditionalGeneration
