# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Draws the figure of the method in the README. Needs matplotlib.

    python docs/figures/method.py        # writes docs/figures/method.png
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from PIL import Image


FOLDER = Path(__file__).resolve().parent
IMAGE = FOLDER.parents[1] / "examples" / "vqa" / "images" / "circle.png"
FROZEN, TRAINED, EDGE = "#e3e7ec", "#f6b26b", "#4a4f57"
GROUPS = ("#cfe2f3", "#9fc5e8", "#6fa8dc", "#3d85c6")  # shallow to deep
NUM_LAYERS = 8  # drawn of each model, two in a group


def box(axis, x, y, width, height, colour, text="", size=11):
    shape = "round,pad=0,rounding_size=0.6"
    axis.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, facecolor=colour, edgecolor=EDGE))
    text_colour = "white" if colour == GROUPS[-1] else "black"
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=size, color=text_colour)


def arrow(axis, start, end, **style):
    style = {"arrowstyle": "-|>", "mutation_scale": 13, "color": EDGE, "linewidth": 1.2, **style}
    axis.add_patch(FancyArrowPatch(start, end, shrinkA=0, shrinkB=0, **style))


def row(layer: int) -> float:
    """Lower edge of a layer, with a gap between groups."""
    return 13 + 4 * layer + 1.2 * (layer // 2)


def layer_name(layer: int, last: str) -> str:
    return {NUM_LAYERS - 1: last, NUM_LAYERS - 2: last + "{-}1"}.get(layer, str(layer + 1))


def draw() -> Figure:
    figure = Figure(figsize=(12, 6), dpi=150)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 120), ylim=(0, 60))
    axis.set_axis_off()
    centre = {"ha": "center", "va": "center"}
    titles = (
        (13, "vision encoder", "$N$ layers, run once per image"),
        (44.5, "fuser and projector", "one of each for all layers"),
        (68.5, "visual memory", "a key and a value per patch"),
        (98, "language model", "$D$ layers, no image tokens"),
    )
    for x, title, note in titles:
        axis.text(x, 56.6, title, fontsize=13, weight="bold", **centre)
        axis.text(x, 53.8, note, fontsize=10.5, **centre)

    with Image.open(IMAGE) as image:
        axis.imshow(np.asarray(image.convert("RGB")), extent=(10.5, 17.5, 2, 9), zorder=2)
    axis.plot((10.5, 17.5, 17.5, 10.5, 10.5), (2, 2, 9, 9, 2), color=EDGE, linewidth=1, zorder=3)
    arrow(axis, (14, 9.2), (14, row(0) - 0.2))
    for layer in range(NUM_LAYERS):
        y = row(layer)
        box(axis, 6, y, 16, 3.4, GROUPS[layer // 2], f"layer ${layer_name(layer, 'N')}$")
        box(axis, 3.3, y + 0.5, 2.3, 2.4, TRAINED)
    axis.text(1.6, row(3) + 4, "vision adapters", fontsize=10.5, rotation=90, **centre)

    for group in range(4):
        y = row(2 * group)
        box(axis, 32, y, 25, 7.4, TRAINED)
        axis.text(44.5, y + 5.4, f"group {group + 1}: weights $w_{{l,p}}$", fontsize=11, **centre)
        axis.text(44.5, y + 2.4, r"$F_{l,p}=\sum_j\,w_{l,p,j}\;F_j$", fontsize=12, **centre)
        arrow(axis, (22.2, y + 4.6), (31.8, y + 4.6))
    # The penultimate layer is a candidate of every group
    axis.plot((22.2, 27, 27), (row(6) + 1.7, row(6) + 1.7, row(0) + 1.7), color=EDGE, linestyle="--", linewidth=1.2)
    for group in range(3):
        y = row(2 * group) + 1.7
        arrow(axis, (27, y), (31.8, y), linestyle="--")

    for layer in range(NUM_LAYERS):
        colour, y, name = GROUPS[layer // 2], row(layer), layer_name(layer, "D")
        arrow(axis, (57.2, y + 1.7), (62.3, y + 1.7))
        box(axis, 62.5, y, 5.8, 3.4, colour, f"$K_{{{name}}}$", 10.5)
        box(axis, 68.7, y, 5.8, 3.4, colour, f"$V_{{{name}}}$", 10.5)
        arrow(axis, (74.7, y + 1.7), (81.3, y + 1.7))
        box(axis, 81.5, y, 8, 3.4, colour, "$K$   $V$", 10.5)
        box(axis, 89.8, y, 10.6, 3.4, FROZEN, "FFN")
        box(axis, 102, y, 12.5, 3.4, FROZEN, "attention")
    arrow(axis, (108.2, 9.4), (108.2, row(0) - 0.2))
    axis.text(108.2, 8, "text tokens", fontsize=11, **centre)
    axis.text(82, 9.6, r"$\mathrm{FFN}\,'(x)=\mathrm{FFN}(x)+s\;\varphi(x\,K^{\top})\,V$", fontsize=13, **centre)
    axis.text(44.5, 10.4, "$l$: language layer, $p$: key or value", fontsize=10.5, **centre)

    for x, colour, name in ((27, TRAINED, "trained: a few MB"), (47, FROZEN, "frozen")):
        box(axis, x, 2.6, 2.6, 2.2, colour)
        axis.text(x + 3.4, 3.6, name, fontsize=11, va="center")
    for group, colour in enumerate(GROUPS):
        box(axis, 58 + 2.8 * group, 2.6, 2.6, 2.2, colour)
    axis.text(70, 3.6, "shallow to deep: frozen encoder layers and their memory", fontsize=11, va="center")
    return figure


if __name__ == "__main__":
    draw().savefig(FOLDER / "method.png")
