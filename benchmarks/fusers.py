# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Variants of the fuser that differ from the paper's formulas (method step 4), compared in `benchmarks.pretrained`.

Letters in shapes are those of `fuser_dehvf.py`: B images, N vision layers, D language layers, M candidates per group,
P positions, r fuser width.
"""

import math

import torch
from torch import nn
from torch.nn import functional as F

from dehvf import fuser


def normalise(features: torch.Tensor) -> torch.Tensor:
    return F.layer_norm(features, features.shape[-1:])


class PreNormBlock(fuser.FuserBlock):
    """Layer norm before attention and FFN instead of after them, so that the residual stream is not normalised."""

    def forward(self, query, features, candidates, valid):
        query = query + self.attend(self.attention_norm(query), features, candidates, valid)
        return query + self.linear_2(self.act(self.linear_1(self.ffn_norm(query))))


class Fuser(fuser.HierarchicalVisualFuser):
    """
    The paper's fuser, with class attributes for the variants.

    pre_norm: the blocks are [`PreNormBlock`]s, and the output of the last one is normalised.
    zero_branches: the residual branches of the blocks are initialised to zero.
    normalised: the query and the features are normalised.
    centred: the mean over the vision layers is subtracted from the features, before query and features are normalised.
    by_key: a candidate's score is the dot product of the query and its features. In the paper's fuser, a linear layer
        computes all scores from the query, without the candidates' features.
    temperature: divisor of the scores.
    """

    pre_norm = zero_branches = normalised = centred = by_key = False
    temperature = 1.0

    def __init__(self, config):
        super().__init__(config)
        width = config.fuser_hidden_size
        if self.by_key:
            self.head = fuser.FuserLinear(width, width)
        for block in self.blocks:
            if self.pre_norm:
                block.__class__ = PreNormBlock
            if self.zero_branches:
                for linear in (block.out_proj, block.linear_2):
                    nn.init.zeros_(linear.weight)
                    nn.init.zeros_(linear.bias)

    def forward(self, query, class_features, candidates, valid):
        features = self.in_proj(class_features)  # B N r
        if self.centred:
            features = features - features.mean(dim=1, keepdim=True)
        if self.normalised or self.centred:
            query, features = normalise(query), normalise(features)
        query = query.expand(features.shape[0], -1, -1, -1)  # B D P r
        for block in self.blocks:
            query = block(query, features, candidates, valid)
        if self.pre_norm:
            query = normalise(query)
        scores = self.head(query)
        if self.by_key:
            keys = normalise(features)[:, candidates]  # B D M r
            scores = torch.einsum("bdpr,bdmr->bdpm", scores, keys) / math.sqrt(keys.shape[-1])
        scores = (scores / self.temperature).masked_fill(~valid[:, None], float("-inf"))
        return scores.softmax(dim=-1)  # B D P M


# Name -> class attributes of `Fuser`
VARIANTS = {
    "pre-norm": {"pre_norm": True},
    "zero branches": {"zero_branches": True},
    "normalised": {"normalised": True},
    "centred": {"centred": True},
    "query · key": {"by_key": True},
    "query · key, centred": {"by_key": True, "centred": True},
    "query · key, centred, pre-norm": {"by_key": True, "centred": True, "pre_norm": True},
    "temperature 1/4": {"temperature": 0.25},
    "temperature 4": {"temperature": 4.0},
}


def replace_fuser(model, name: str):
    """Replaces the fuser of a model with a variant from `VARIANTS`."""
    model.model.fuser = type("Fuser", (Fuser,), VARIANTS[name])(model.config).to(model.device)
