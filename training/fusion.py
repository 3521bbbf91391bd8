# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Statistics of the fusion weights (method step 4): their entropy, and how much they differ between language layers,
between keys and values, and between images. If they do not differ, a constant vector would work as well.
"""

from collections import deque

import torch


# Weights with a standard deviation below this are called constant. The mean of four weights is 0.25.
CONSTANT = 0.005


def layers_of_groups(rows: list[list[int]]) -> list[list[int]]:
    """The language layers of each group, which have the same candidates."""
    groups = {}
    for layer, row in enumerate(rows):
        groups.setdefault(tuple(row), []).append(layer)
    return list(groups.values())


def fusion_figures(weights: torch.Tensor, rows: list[list[int]]) -> dict[str, float]:
    """
    Args:
        weights: `(num_images, num_language_layers, num_positions, num_candidates)`, as the fuser returns them.
        rows: the candidates of each language layer, see [`LayerHierarchy`]. Layers with the same candidates are
            compared with each other.

    Returns:
        `entropy`, in nats, of a weight vector (equal weights of M candidates have log M), and `std_over_layers`,
        `std_over_positions`, `std_over_images`: the standard deviation of a weight over the language layers of a
        group, over key and value, and over images. Each is averaged over all other dimensions.
    """
    weights = weights.float().cpu()
    groups = layers_of_groups(rows)
    parts = [weights[:, layers, :, : len(rows[layers[0]])] for layers in groups]  # without fillers

    def std(dimension: int, parts: list[torch.Tensor]) -> float:
        deviations = [part.std(dimension, correction=0).flatten() for part in parts]
        return round(torch.cat(deviations).mean().item(), 5) if deviations else 0.0

    return {
        "entropy": round(torch.special.entr(weights).sum(-1).mean().item(), 4),
        "std_over_layers": std(1, [part for part in parts if part.shape[1] > 1]),
        "std_over_positions": std(2, parts),
        "std_over_images": std(0, parts),
    }


def describe_fusion(figures: dict[str, float]) -> str:
    """Describes the statistics in words, and what it means if the weights of a trained adapter are constant."""
    words = (
        f"Fusion weights: entropy {figures['entropy']:.3f}, standard deviation {figures['std_over_layers']:.4f} over "
        f"layers, {figures['std_over_positions']:.4f} over positions, {figures['std_over_images']:.4f} over images."
    )
    constant = [name for name in ("layers", "images") if figures[f"std_over_{name}"] < CONSTANT]
    if not constant:
        return words
    return (
        f"{words} They hardly depend on {' and '.join(constant)}: fixed weights would work as well, so this adapter "
        f"does not show that adapting the weights to {' and '.join(constant)} helps."
    )


class FusionRecorder:
    """Forward hook that keeps the fuser's weights of the last batches until their statistics are requested."""

    def __init__(self, model):
        self.weights = deque(maxlen=256)
        fuser = getattr(model.base_model, "fuser", None)  # baselines and constant weights have none
        if fuser is not None:
            self.rows = model.base_model.hierarchy.rows
            fuser.register_forward_hook(self)

    def __call__(self, module, arguments, weights: torch.Tensor):
        self.weights.append(weights.detach())

    def figures(self) -> dict[str, float]:
        """The statistics of the images in this process since the last call; empty if there were none."""
        weights = list(self.weights)
        self.weights.clear()
        return fusion_figures(torch.cat(weights), self.rows) if weights else {}
