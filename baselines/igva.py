# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
IGVA (arXiv 2501.08443, code in YiZheng-zy/IGVA): the image tokens of LLaVA are computed from several layers of the
vision encoder, with weights that depend on the instruction.

The vision layers are divided into groups, and the hidden states of each group are averaged. A fuser, whose query is
the instruction and whose keys and values are the groups' class tokens, computes one weight per group. The weighted sum
of the groups' patches is concatenated with the patches of the penultimate layer, and a projector maps each patch to
one token. With a ReLU and an FFN of the fuser's width, our [`FuserBlock`] computes the same as the authors'
`QueryTransformer`.

There are two differences from the authors' code. They train the whole language model; here LoRA adapts it, as in
`llava_lora.py`. They encode the instruction with a sentence encoder (`sentence-transformers`); here it is the mean of
the language model's embeddings of its tokens.
"""

from types import SimpleNamespace

import torch
from torch import nn

from dehvf import configuration, fuser, inputs

from . import BaselineArguments, ImageTokensForConditionalGeneration, Projector, class_features
from .llava_lora import add_lora


class Aggregator(nn.Module):
    """Computes one weight for each group of vision layers, from class tokens and an instruction."""

    def __init__(self, vision_size: int, text_size: int, arguments: BaselineArguments):
        super().__init__()
        size = arguments.igva_hidden_size
        sizes = SimpleNamespace(
            fuser_hidden_size=size,
            fuser_num_heads=arguments.igva_num_heads,
            fuser_intermediate_size=size,
            fuser_hidden_act="relu",
        )
        self.instruction_proj = nn.Linear(text_size, size)
        self.class_proj = nn.Linear(vision_size, size)
        self.blocks = nn.ModuleList(fuser.FuserBlock(sizes) for _ in range(arguments.igva_num_layers))
        self.head = nn.Linear(size, arguments.igva_num_groups)

    def forward(self, class_tokens: torch.Tensor, instruction: torch.Tensor) -> torch.Tensor:
        """
        Args:
            class_tokens: `(num_images, num_groups, vision_size)`.
            instruction: `(num_images, text_size)`.

        Returns:
            `torch.Tensor` of shape `(num_images, num_groups)`. Rows sum to one.
        """
        # A fuser with one language layer and one position, whose candidates are all groups
        candidates = torch.arange(class_tokens.shape[1], device=class_tokens.device)[None]
        query, features = self.instruction_proj(instruction)[:, None, None], self.class_proj(class_tokens)
        for block in self.blocks:
            query = block(query, features, candidates, torch.ones_like(candidates, dtype=torch.bool))
        return self.head(query)[:, 0, 0].softmax(dim=-1)


class IgvaForConditionalGeneration(ImageTokensForConditionalGeneration):
    """
    LLaVA with IGVA's aggregator and projector, and LoRA on the language model.

    Raises:
        ValueError: if there are more groups than layers.
    """

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        vision, width, act = vision_tower.config, causal_lm.config.hidden_size, "gelu"
        projector = Projector(2 * vision.hidden_size, width, width, act)
        super().__init__(vision_tower, causal_lm, projector, image_size, projector_hidden_act=act)
        if arguments.igva_num_groups > vision.num_hidden_layers:
            raise ValueError(
                f"`igva_num_groups` is {arguments.igva_num_groups}, but the vision encoder has "
                f"{vision.num_hidden_layers} layers. Give 1 to {vision.num_hidden_layers}."
            )
        self.config.image_seq_length = self.grid_size**2
        self.config.reads_instruction = True
        self.groups = configuration.split_into_runs(vision.num_hidden_layers, arguments.igva_num_groups)
        self.aggregator = Aggregator(vision.hidden_size, width, arguments)
        add_lora(self, arguments)

    def instruction(
        self, input_ids: torch.LongTensor, attention_mask: torch.Tensor | None, instruction_mask: torch.Tensor | None
    ) -> torch.Tensor:
        """
        The mean embedding of each sample's instruction, `(batch_size, text_size)`.

        Args:
            instruction_mask: `(batch_size, sequence_length)`, 1 for its tokens. By default `attention_mask`.
                Placeholders are never part of it.
        """
        mask = attention_mask if instruction_mask is None else instruction_mask
        is_text = input_ids != self.config.image_token_id
        if mask is not None:
            is_text = is_text & mask.bool()
        return inputs.mean_embedding(self.get_input_embeddings()(input_ids * is_text), is_text)

    def group_features(self, pixel_values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns:
            The mean hidden states of each group, `(num_images, num_groups, num_tokens, vision_size)`, and those of
            the penultimate layer, `(num_images, num_tokens, vision_size)`.
        """
        vision_tower = self.model.vision_tower
        pixel_values = pixel_values.to(vision_tower.dtype)
        states = vision_tower(pixel_values, output_hidden_states=True, **self.interpolation).hidden_states
        means = [torch.stack([states[1 + layer] for layer in group]).mean(dim=0) for group in self.groups]
        return torch.stack(means, dim=1), states[-2]

    def image_features(
        self,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """As in the base class. `instruction` is the result of the method `instruction`; by default zeros."""
        images = self.select_images(pixel_values, image_mask)
        if instruction is None:
            instruction = torch.zeros(len(images), self.config.text_config.hidden_size, device=images.device)
        elif image_mask is not None:
            instruction = instruction[image_mask]
        dtype = self.aggregator.head.weight.dtype
        groups, penultimate = (states.to(dtype) for states in self.group_features(images))
        has_class_token = self.vision_layout.has_class_token
        class_tokens = class_features(groups.flatten(0, 1), has_class_token).unflatten(0, groups.shape[:2])
        weights = self.aggregator(class_tokens, instruction.to(dtype))  # I K
        fused = torch.einsum("ik,iknd->ind", weights, groups)
        features = torch.cat((penultimate, fused), dim=-1)[:, int(has_class_token) :]
        return self.model.multi_modal_projector(features)  # I n h

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        instruction_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        As [`ImageTokensForConditionalGeneration.forward`], with two more arguments.

        Args:
            instruction_mask: see the method `instruction`. With labels, the default is the tokens without a label.
            instruction: the result of that method, if already computed.
        """
        features = None
        if pixel_values is not None:
            if instruction is None:
                if instruction_mask is None and "labels" in kwargs:
                    instruction_mask = inputs.find_instruction(kwargs["labels"], attention_mask)
                instruction = self.instruction(input_ids, attention_mask, instruction_mask)
            features = self.image_features(pixel_values, image_mask, instruction)
        arguments = input_ids, pixel_values, image_mask, attention_mask, position_ids, logits_to_keep
        return super().forward(*arguments, features=features, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """Reads the prompt once and passes `instruction`, which is expanded for beams like other inputs."""
        masks = model_kwargs.get("attention_mask"), model_kwargs.pop("instruction_mask", None)
        model_kwargs["instruction"] = self.instruction(input_ids, *masks)
        return super()._expand_inputs_for_generation(expand_size, is_encoder_decoder, input_ids, **model_kwargs)


assemble = IgvaForConditionalGeneration
