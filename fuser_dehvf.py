# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The fuser, which computes for each image with which weights the vision layers are mixed into the memory of each
language layer (method steps 2 to 4).

Letters at the end of a line give shapes: B images, N vision layers, D language layers, M candidates per group, P
positions (key and value), e width of the embeddings, r fuser width.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_dehvf import DehvfConfig, candidate_layers


class LayerHierarchy(nn.Module):
    """
    The vision layers that each language layer may read (method step 2, [`candidate_layers`]).

    `candidates` and `valid`, both of shape `(num_language_layers, num_candidates)`: the layers, with short rows padded
    with layer 0; and booleans, false for this padding. `layers_read` lists all N' layers that are read. `read_index`
    is the same list as a tensor, since indexing with a list would copy it to the device in each call.
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        self.rows = candidate_layers(config)
        self.layers_read = sorted(set().union(*self.rows))
        self.num_vision_layers = config.vision_config.num_hidden_layers
        shape = len(self.rows), max(map(len, self.rows))
        self.candidates = nn.Buffer(torch.empty(shape, dtype=torch.long), persistent=False)  # D M
        self.valid = nn.Buffer(torch.empty(shape, dtype=torch.bool), persistent=False)  # D M
        self.read_index = nn.Buffer(torch.empty(len(self.layers_read), dtype=torch.long), persistent=False)  # N'
        self.reset_parameters()

    def reset_parameters(self):
        width = self.candidates.shape[1]
        init.copy_(self.read_index, torch.tensor(self.layers_read))
        init.copy_(self.candidates, torch.tensor([row + [0] * (width - len(row)) for row in self.rows]))
        init.copy_(self.valid, torch.arange(width) < torch.tensor([[len(row)] for row in self.rows]))

    def mean_weights(self) -> torch.Tensor:
        """The same weight for each candidate of a layer: D 1 M."""
        return (self.valid / self.valid.sum(dim=-1, keepdim=True))[:, None]

    def spread(self, weights: torch.Tensor) -> torch.Tensor:
        """Weights of candidates (B D P M) as weights of all vision layers (B D P N)."""
        # `scatter_add`, since in the last group the penultimate layer occurs twice
        index = self.candidates[:, None].expand(weights.shape)
        return weights.new_zeros(*weights.shape[:-1], self.num_vision_layers).scatter_add(-1, index, weights)


class FuserLinear(nn.Linear):
    """
    Initialized like PyTorch's `nn.Linear`, uniform within 1 / sqrt(in_features), instead of with the
    `initializer_range` of the other parts. With standard deviations of 0.02 or 0.05, the queries of all language
    layers are the same after the first layer norm, and they stay the same during training.
    """

    def reset_parameters(self):
        bound = self.in_features**-0.5
        init.uniform_(self.weight, -bound, bound)
        init.uniform_(self.bias, -bound, bound)


class InputEmbeddingNetwork(nn.Module):
    """
    The fuser's query for language layer `l` and position `p`: `MLP([e_l ; e_p])` (method step 3). With
    `visual_prompts="shared"` there is only one position and no `e_p`. If the query reads the user's text, a projection
    of the text replaces `e_l` or is added to it.
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        size = config.layer_embedding_size
        self.num_layers = config.text_config.num_hidden_layers
        self.positions = config.memory_positions
        reads_layer = config.fuser_query != "instruction"
        self.layer_embedding = nn.Parameter(torch.empty(self.num_layers, size)) if reads_layer else None
        reads_text = config.fuser_query != "network"
        self.instruction_proj = FuserLinear(config.text_config.hidden_size, size) if reads_text else None
        # One row each for key and value, even if only one of them contains visual features, as in the paper's counts
        shared = config.visual_prompts == "shared"
        self.position_embedding = None if shared else nn.Parameter(torch.empty(2, size))
        width = size if shared else 2 * size
        self.linear_1 = FuserLinear(width, 2 * size)
        self.act = ACT2FN[config.fuser_hidden_act]
        self.linear_2 = FuserLinear(2 * size, config.fuser_hidden_size)
        self.reset_parameters()

    def reset_parameters(self):
        """The embeddings are initialized like `nn.Embedding`; see [`FuserLinear`]."""
        for embedding in (self.layer_embedding, self.position_embedding):
            if embedding is not None:
                init.normal_(embedding)

    def forward(self, instruction: torch.Tensor | None) -> torch.Tensor:
        """
        Args:
            instruction: `(num_images, language_hidden_size)`, features of the user's text, if the query reads it.

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
            first, last = self.positions[0], self.positions[-1]
            position_embedding = self.position_embedding[first : last + 1].expand_as(embedding)
            embedding = torch.cat((embedding, position_embedding), dim=-1)  # B D P 2e
        return self.linear_2(self.act(self.linear_1(embedding)))  # B D P r


class LearnableQueryTokens(nn.Module):
    """Ablation of the input embedding network: one learned vector per language layer and position."""

    def __init__(self, config: DehvfConfig):
        super().__init__()
        num_layers, num_positions = config.text_config.num_hidden_layers, len(config.memory_positions)
        self.tokens = nn.Parameter(torch.empty(num_layers, num_positions, config.fuser_hidden_size))
        self.reset_parameters()

    def reset_parameters(self):
        init.normal_(self.tokens)

    def forward(self, instruction: None) -> torch.Tensor:
        return self.tokens.clone()[None]  # 1 D P r; a copy as in `MemorySlots`


class FuserBlock(GradientCheckpointingLayer):
    """Cross-attention, then FFN, each followed by residual and layer norm (method step 4; IGVA, arXiv 2501.08443)."""

    def __init__(self, config: DehvfConfig):
        super().__init__()
        size = config.fuser_hidden_size
        self.num_heads = config.fuser_num_heads
        self.q_proj = FuserLinear(size, size)
        self.k_proj = FuserLinear(size, size)
        self.v_proj = FuserLinear(size, size)
        self.out_proj = FuserLinear(size, size)
        self.attention_norm = nn.LayerNorm(size)
        self.linear_1 = FuserLinear(size, config.fuser_intermediate_size)
        self.act = ACT2FN[config.fuser_hidden_act]
        self.linear_2 = FuserLinear(config.fuser_intermediate_size, size)
        self.ffn_norm = nn.LayerNorm(size)

    def forward(
        self, query: torch.Tensor, features: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """query: B D P r; features: B N r."""
        query = self.attention_norm(query + self.attend(query, features, candidates, valid))
        return self.ffn_norm(query + self.linear_2(self.act(self.linear_1(query))))

    def attend(
        self, query: torch.Tensor, features: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """Maps the features to keys and values before selecting the candidates of each layer. Returns B D P r."""
        # Images and language layers form one batch, since inductor only compiles attention with four dimensions
        attended = F.scaled_dot_product_attention(
            self._split_heads(self.q_proj(query).flatten(0, 1)),  # B*D heads P r/heads
            self._split_heads(self.k_proj(features)[:, candidates].flatten(0, 1)),  # B*D heads M r/heads
            self._split_heads(self.v_proj(features)[:, candidates].flatten(0, 1)),
            # `len` would make the number of images a constant of an exported graph
            attn_mask=valid[:, None, None].repeat(features.shape[0], 1, 1, 1),  # B*D 1 1 M
        )
        return self.out_proj(attended.transpose(1, 2).reshape(query.shape))

    def _split_heads(self, hidden: torch.Tensor) -> torch.Tensor:
        return hidden.unflatten(-1, (self.num_heads, -1)).transpose(-3, -2)


class HierarchicalVisualFuser(nn.Module):
    """
    Computes the weights of the vision layers in the memory of each language layer, for each image (method step 4). One
    fuser is used for all language layers and both positions, in one batch.
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        self.in_proj = FuserLinear(config.vision_config.hidden_size, config.fuser_hidden_size)
        self.blocks = nn.ModuleList(FuserBlock(config) for _ in range(config.fuser_num_layers))
        self.head = FuserLinear(config.fuser_hidden_size, max(map(len, candidate_layers(config))))

    def forward(
        self, query: torch.Tensor, class_features: torch.Tensor, candidates: torch.Tensor, valid: torch.Tensor
    ) -> torch.Tensor:
        """
        Args:
            query: `(num_images or 1, num_language_layers, num_positions, fuser_hidden_size)`.
            class_features: `(num_images, num_vision_layers, vision_hidden_size)`.
            candidates, valid: `(num_language_layers, num_candidates)`, see [`LayerHierarchy`].

        Returns:
            Weights of shape `(num_images, num_language_layers, num_positions, num_candidates)` that sum to one.
        """
        features = self.in_proj(class_features)  # B N r
        query = query.expand(features.shape[0], -1, -1, -1)  # B D P r
        for block in self.blocks:
            query = block(query, features, candidates, valid)
        scores = self.head(query).masked_fill(~valid[:, None], float("-inf"))
        return scores.softmax(dim=-1)  # B D P M
