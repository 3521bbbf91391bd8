# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Statistics of the fusion weights (method step 4): their entropy, and how much they differ between language layers,
between keys and values, and between images. If they do not differ, a constant vector would work as well.
"""

import torch


# Weights with a standard deviation below this are called constant. The mean of four weights is 0.25.
CONSTANT = 0.005
DIMENSIONS = ("layers", "positions", "images")


def layers_of_groups(rows: list[list[int]]) -> list[list[int]]:
    """The language layers of each group, which have the same candidates."""
    groups = {}
    for layer, row in enumerate(rows):
        groups.setdefault(tuple(row), []).append(layer)
    return list(groups.values())


class FusionStatistics:
    """
    Statistics of the fusion weights of any number of images, from sums over the images seen so far.

    Args:
        rows: the candidates of each language layer, see [`LayerHierarchy`]. Layers with the same candidates are
            compared with each other.
    """

    def __init__(self, rows: list[list[int]]):
        self.groups = [(layers, len(rows[layers[0]])) for layers in layers_of_groups(rows)]
        self.reset()

    def reset(self):
        self.num_images, self.first, self.sums = 0, None, {}

    def add(self, weights: torch.Tensor):
        """
        Args:
            weights: `(num_images, num_language_layers, num_positions, num_candidates)`, as the fuser returns them.
        """
        weights = weights.detach().float()
        if self.first is None:
            self.first = weights[:1]
        shifted = weights - self.first  # for the variance over images, without cancellation
        parts = [weights[:, layers, :, :length] for layers, length in self.groups]  # without fillers
        sums = {
            "entropy": torch.special.entr(weights).sum(-1).mean((1, 2)).sum(),
            "shifted": shifted.sum(0),
            "squares": shifted.square().sum(0),
        }
        for name, dimension in (("layers", 1), ("positions", 2)):
            deviations = [part.std(dimension, correction=0).flatten(1) for part in parts if part.shape[dimension] > 1]
            if deviations:
                sums[name] = torch.cat(deviations, dim=1).mean(1).sum()
        self.num_images += len(weights)
        self.sums = {name: value + self.sums.get(name, 0) for name, value in sums.items()}

    def figures(self) -> dict[str, float]:
        """
        Returns:
            `entropy`, in nats, of a weight vector (equal weights of M candidates have log M), and `std_over_layers`,
            `std_over_positions`, `std_over_images`: the standard deviation of a weight over the language layers of a
            group, over key and value, and over images. Each is averaged over all other dimensions. A standard
            deviation is missing if there is nothing to compare: if each group has one language layer, if only keys
            or only values are mixed, or for one image. Empty if there were no images.
        """
        if not self.num_images:
            return {}
        means = {name: value / self.num_images for name, value in self.sums.items()}
        figures = {"entropy": round(float(means["entropy"]), 4)}
        for name in ("layers", "positions"):
            if name in means:
                figures[f"std_over_{name}"] = round(float(means[name]), 5)
        if self.num_images > 1:
            over_images = (means["squares"] - means["shifted"].square()).clamp(min=0).sqrt()
            parts = [over_images[layers, :, :length].flatten() for layers, length in self.groups]
            figures["std_over_images"] = round(float(torch.cat(parts).mean()), 5)
        return figures


def fusion_figures(weights: torch.Tensor, rows: list[list[int]]) -> dict[str, float]:
    """The figures of [`FusionStatistics`] for weights in one tensor."""
    statistics = FusionStatistics(rows)
    statistics.add(weights)
    return statistics.figures()


def describe_fusion(figures: dict[str, float]) -> str:
    """Describes the statistics in words, and what it means if the weights of a trained adapter are constant."""
    deviations = {name: figures[key] for name in DIMENSIONS if (key := f"std_over_{name}") in figures}
    words = f"Fusion weights: entropy {figures['entropy']:.3f}"
    if deviations:
        words += ", standard deviation " + ", ".join(f"{value:.4f} over {name}" for name, value in deviations.items())
    words += "."
    # Keys and values that are mixed in the same way are no sign of a fuser that ignores its inputs
    constant = [name for name, value in deviations.items() if name != "positions" and value < CONSTANT]
    if not constant:
        return words
    return (
        f"{words} They hardly depend on {' and '.join(constant)}: fixed weights would work as well, so this adapter "
        f"does not show that adapting the weights to {' and '.join(constant)} helps."
    )


class FusionRecorder:
    """Forward hook with the statistics of the fuser's weights until they are requested."""

    def __init__(self, model):
        self.statistics, self.image_mask = None, None
        fuser = getattr(model.base_model, "fuser", None)  # baselines and constant weights have none
        if fuser is not None:
            self.statistics = FusionStatistics(model.base_model.hierarchy.rows)
            model.base_model.register_forward_pre_hook(self._set_mask, with_kwargs=True)
            model.base_model.register_forward_hook(self._clear_mask, always_call=True)
            fuser.register_forward_hook(self)

    def _set_mask(self, module, arguments, inputs: dict):
        self.image_mask = inputs.get("image_mask")
        if inputs.get("pixel_values") is None:
            self.image_mask = torch.zeros(1, dtype=torch.bool)

    def _clear_mask(self, module, arguments, outputs):
        self.image_mask = None

    @torch.compiler.disable
    def __call__(self, module, arguments, weights: torch.Tensor):
        # In training, a batch without images encodes a blank one, whose weights do not count. With some images, the
        # model only encodes these, except if it is compiled
        if self.image_mask is not None:
            is_image = self.image_mask.flatten().bool().to(weights.device)
            if len(is_image) == len(weights):
                weights = weights[is_image]
            elif not is_image.any():
                return
        if len(weights):
            self.statistics.add(weights)

    def figures(self) -> dict[str, float]:
        """The statistics of the images in this process since the last call; empty if there were none."""
        if self.statistics is None:
            return {}
        figures = self.statistics.figures()
        self.statistics.reset()
        return figures
