# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
ADEM-VL (arXiv 2410.17779): one class token in the sequence, and a memory of patches at two scales that is read by the
FFNs of all language layers. Follows the authors' code, Hao840/ADEM-VL at cec09b8, with the command for ScienceQA in
its README.

For the states x of a token before an FFN, image embeddings E and learned embeddings P_k and P_v, the FFN adds

    0.1 * drop(SiLU(x) SiLU(E + P_k)^T) (E + P_v)

where `drop` sets the lowest 10 % of the token's scores to zero. E is computed from the vision encoder's patches, which
are averaged over squares, projected and multiplied by 0.01. For a sample without an image, E is zero and the FFN still
reads P_k and P_v. Trained parameters for LLaMA-7B and CLIP ViT-L/14:

    23 adapters of the vision encoder        23 x 2 x 12 x 1024 =   565,248
    P_k and P_v                                2 x 320 x 4096 = 2,621,440
    projectors of patches and class token         2 x 659,584 = 1,319,168
    sum                                                         4,505,856

The paper's 4.53 M are 4,530,432: the code also counts an adapter of the 24th vision layer, which it never runs, since
the patches are those of the 23rd layer. This adapter is omitted here. There are two more differences:

- In the authors' code, sequences start with the words "Image:" or "Image: N/A". Here all methods get the same text.
- In the authors' code, the scales are numbers of patches, 256 and 64. Here they are the sides of the averaged squares,
  1 and 2, so that 16 x 16 patches give 16 x 16 and 8 x 8, and other numbers of patches can be used.

If the vision encoder has no class token, the mean over the patches is used.
"""

from functools import partial

import torch
from torch import nn
from torch.nn import functional as F

from dehvf import injection

from . import BaselineArguments, FrozenBasesForConditionalGeneration, Projector, class_features


def read_memory(
    hidden_states: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, drop_ratio: float, scale: float
) -> torch.Tensor:
    """
    Computes the term that is added to the output of a language FFN, from the FFN's input.

    Args:
        hidden_states: `(batch_size, num_tokens, language_hidden_size)`, the shape of the result.
        keys, values: `(batch_size, num_slots, language_hidden_size)`.
        drop_ratio: fraction of each token's scores, the lowest ones, that are set to zero.
        scale: scale of the result.
    """
    scores = F.silu(hidden_states) @ keys.mT  # B T S
    lowest_kept = scores.detach().kthvalue(1 + int(drop_ratio * scores.shape[-1]), dim=-1, keepdim=True).values
    return scale * (scores.masked_fill(scores < lowest_kept, 0) @ values)


class AdemVlForConditionalGeneration(FrozenBasesForConditionalGeneration):
    """
    ADEM-VL. The projectors are applied in this class, so the projector of LLaVA is an identity.

    Raises:
        ValueError: if `adem_pool_sizes` do not divide the grid of patches.
    """

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        vision, width, act = vision_tower.config, causal_lm.config.hidden_size, "silu"
        features = {"vision_feature_layer": -2, "vision_feature_select_strategy": "full", "image_seq_length": 1}
        super().__init__(vision_tower, causal_lm, nn.Identity(), image_size, **features)
        self.pool_sizes, self.image_scale = arguments.adem_pool_sizes, arguments.adem_image_scale
        self.drop_ratio, self.memory_scale = arguments.adem_drop_ratio, arguments.adem_memory_scale
        if not self.pool_sizes or any(size < 1 or self.grid_size % size for size in self.pool_sizes):
            raise ValueError(
                f"`adem_pool_sizes` are {self.pool_sizes}, but an image has {self.grid_size} x "
                f"{self.grid_size} patches. Give one or more divisors of {self.grid_size}."
            )
        self.num_slots = sum((self.grid_size // size) ** 2 for size in self.pool_sizes)
        # The last vision layer has no adapter, since its output is not used
        sizes = arguments.adem_adapter_size, arguments.adem_adapter_scale, arguments.adem_adapter_dropout
        self.vision_adapters = nn.ModuleList(
            injection.VisionAdapter(vision.hidden_size, *sizes) for _ in range(vision.num_hidden_layers - 1)
        )
        for adapter in self.vision_adapters:
            nn.init.zeros_(adapter.up.weight)
        self.patch_projector = Projector(vision.hidden_size, arguments.adem_projector_size, width, act)
        self.class_projector = Projector(vision.hidden_size, arguments.adem_projector_size, width, act)
        self.key_embedding = nn.Parameter(0.02 * torch.randn(self.num_slots, width))
        self.value_embedding = nn.Parameter(torch.zeros(self.num_slots, width))
        vision_layers = vision_tower.get_submodule(self.vision_layout.layers)
        for layers in (vision_layers, self.model.language_model.layers):
            injection.extend_layers(layers, "mlp", injection.AdaptedFFN)

    @property
    def image_tokens(self) -> list[int]:
        """The placeholder of one image in `input_ids`."""
        return [self.config.image_token_id]

    def image_features(
        self, pixel_values: torch.Tensor | None = None, image_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            pixel_values, image_mask: as in [`FrozenBasesForConditionalGeneration.image_features`].

        Returns:
            `torch.Tensor` of shape `(num_images, 1 + num_slots, language_hidden_size)`: the embedding of the class
            token, then E.
        """
        adapters = [*self.vision_adapters, None]
        features = injection.run_extended(super().image_features, adapters, pixel_values, image_mask)
        layout, vision_tower = self.vision_layout, self.model.vision_tower
        features = vision_tower.get_submodule(layout.norm)(features).to(self.key_embedding.dtype)  # I 1+n c, or I n c
        class_token = class_features(features, layout.has_class_token)[:, None]  # I 1 c
        grid = features[:, int(layout.has_class_token) :].mT.unflatten(-1, (self.grid_size, self.grid_size))
        patches = torch.cat([F.avg_pool2d(grid, size).flatten(2) for size in self.pool_sizes], dim=-1).mT  # I S c
        return torch.cat((self.class_projector(class_token), self.image_scale * self.patch_projector(patches)), dim=1)

    def visual_embeds(
        self, input_ids: torch.LongTensor, pixel_values: torch.Tensor | None, image_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        The result of `image_features` for each sample, `(batch_size, 1 + num_slots, language_hidden_size)`, zeros for
        samples without an image.

        Raises:
            ValueError: if a sample with an image does not have one placeholder, or one without an image has any.
        """
        if image_mask is None:
            image_mask = torch.full(input_ids.shape[:1], pixel_values is not None, device=input_ids.device)
        placeholders = (input_ids == self.config.image_token_id).sum(dim=1)
        if not torch.equal(placeholders, image_mask.long()):
            raise ValueError(
                f"The samples have {placeholders.tolist()} placeholders (`image_tokens`), which do not match their "
                f"images, {image_mask.long().tolist()}. Put one into `input_ids` for each image."
            )
        embeds = self.key_embedding.new_zeros(len(input_ids), 1 + self.num_slots, self.key_embedding.shape[-1])
        if pixel_values is not None:
            features = self.image_features(pixel_values, image_mask).to(embeds.dtype)  # I 1+S h
            return embeds.index_copy(0, image_mask.nonzero().flatten(), features)
        # DDP fails if parameters have no gradient, so without images the vision path runs with zero effect
        return embeds + 0 * self.image_features() if self.training else embeds

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        visual_embeds: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, if any sample has an image.
            image_mask: `(batch_size,)` booleans: which samples have one. By default all.
            visual_embeds: the result of the method `visual_embeds`, if already computed; replaces both.

        The other arguments and the output are those of `LlavaForConditionalGeneration`.
        """
        if visual_embeds is None:
            visual_embeds = self.visual_embeds(input_ids, pixel_values, image_mask)
        placeholders = input_ids == self.config.image_token_id  # B T
        inputs_embeds = self.get_input_embeddings()(input_ids.masked_fill(placeholders, 0))  # B T h
        class_token, image = visual_embeds[:, :1], visual_embeds[:, 1:]
        inputs_embeds = torch.where(placeholders[..., None], class_token.to(inputs_embeds.dtype), inputs_embeds)
        memory = partial(
            read_memory,
            keys=F.silu(image + self.key_embedding).to(inputs_embeds.dtype),  # B S h
            values=(image + self.value_embedding).to(inputs_embeds.dtype),
            drop_ratio=self.drop_ratio,
            scale=self.memory_scale,
        )
        named = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        memories = [memory] * len(self.model.language_model.layers)
        return injection.run_extended(super().forward, memories, inputs_embeds=inputs_embeds, **named, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Encodes images once and passes `visual_embeds`, which is expanded for beams like other inputs."""
        images = (model_kwargs.pop(name, None) for name in ("pixel_values", "image_mask"))
        model_kwargs["visual_embeds"] = self.visual_embeds(input_ids, *images)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


assemble = AdemVlForConditionalGeneration
