# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Draws what a trained adapter does with images, into PNG files. Needs matplotlib (`pip install matplotlib`).

    python pictures.py outputs/digits --output_dir outputs/digits/pictures
    python pictures.py outputs/own --task scienceqa --data_path outputs/own-data --row 5 --layers 0 3 7

    fusion_weights.png      which vision layers each language layer's memory is mixed from, mean over images
    fusion_curves.png       the same over language layers, with its spread over images
    slot_activations.png    where the language model looked, in one image, for one token of its answer

Layers, rows and tokens are counted from 0. The functions `fusion_weights` and `slot_activations` give
the arrays behind the pictures.
"""

import argparse
import itertools
import sys
import textwrap
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor

from tasks import NAMES, get_task
from training.data import Collator, RowEncoder, read_image


BATCH_SIZE = 32
MAX_LAYERS = 12  # shown of a deep language model, unless `--layers` names them


# ---------------------------------------------------------------------------------------------------------------------
# Arrays
# ---------------------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fusion_weights(model, inputs) -> np.ndarray:
    """
    What the memory of each language layer is mixed from (method step 4).

    Args:
        model: `DehvfForConditionalGeneration`.
        inputs: keyword arguments of the model's `forward`: `pixel_values`, and what says which tokens are the user's
            where `fuser_query` reads them.

    Returns:
        Array of shape `(num_images, num_language_layers, num_positions, num_vision_layers)`. Rows sum to one.

    Raises:
        ValueError: if the model has no visual prompts, or a row has no image.
    """
    _check_images(model, inputs)
    instruction = None
    if model.config.reads_instruction:
        mask = inputs.get("instruction_mask", inputs.get("attention_mask"))
        instruction = model.model.get_instruction_features(inputs["input_ids"], mask)
    return model.model.get_fusion_weights(inputs["pixel_values"], instruction).float().cpu().numpy()


@torch.no_grad()
def slot_activations(model, inputs, position: int = -1) -> np.ndarray:
    """
    How much each patch's memory slot is read, `phi(x K^T)` of method step 8, while one token is computed.

    Args:
        model: `DehvfForConditionalGeneration`.
        inputs: keyword arguments of the model's `forward`, with `input_ids` and `pixel_values`.
        position: of the token that reads, in `input_ids`. It predicts the token after it; the last one predicts the
            first new token.

    Returns:
        Array of shape `(batch_size, num_language_layers, num_patches)`, patches row by row. No unit. SiLU, for one,
        goes down to -0.28, and what is negative is subtracted. With `visual_prompts="values"` keys carry no image.

    Raises:
        ValueError: if the model has no visual prompts, or a row has no image.
    """
    _check_images(model, inputs)
    activations = []

    def look(mlp, args):
        slots = mlp.slot_activations(args[0][:, [position]], mlp.memory_view)  # (batch_size, 1, num_memory_slots)
        activations.append(slots[:, 0, : model.config.num_patches].float().cpu())

    hooks = [layer.mlp.register_forward_pre_hook(look) for layer in model.model.language_model.layers]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(activations, dim=1).numpy()


def check_config(config):
    """
    Raises:
        ValueError: if no visual memory is read, so that there is nothing to draw.
    """
    if getattr(config, "visual_prompts", None) in (None, "none"):
        given = f"a `{config.model_type}`" if config.model_type != "dehvf" else 'trained with `visual_prompts="none"`'
        raise ValueError(
            f"The model is {given}: it has no visual memory, so there is nothing to draw. Give a DEHVF adapter with "
            "visual prompts."
        )


def _check_images(model, inputs):
    check_config(model.config)
    mask = inputs.get("image_mask")
    if inputs.get("pixel_values") is None or (mask is not None and not mask.all()):
        raise ValueError("A row of the inputs has no image, so nothing can be drawn of it. Leave such rows out.")


# ---------------------------------------------------------------------------------------------------------------------
# Pictures
# ---------------------------------------------------------------------------------------------------------------------


def draw_fusion_weights(weights: np.ndarray, model, title: str):
    """
    Heat maps of the mean over images, one for each position, with a frame around the candidates of each group.

    Args:
        weights: `(num_images, num_language_layers, num_positions, num_vision_layers)`, see [`fusion_weights`].
        model: the model that they are of.
        title: what `weights` are the mean of.

    Returns:
        `matplotlib.figure.Figure`, whose `savefig` writes a file.
    """
    from matplotlib.patches import Rectangle

    mean = weights.mean(axis=0)
    num_layers, num_positions, num_vision_layers = mean.shape
    drawn = np.full(mean.shape, np.nan)
    figure = new_figure(1.5 + 5.5 * num_positions, 6)
    axes = figure.subplots(1, num_positions, sharey=True, squeeze=False)[0]
    for layers, candidates in groups(model):
        drawn[layers[0] : layers[-1] + 1, :, candidates] = mean[layers[0] : layers[-1] + 1, :, candidates]
        # The penultimate vision layer stands apart from the run, but for the last group
        for run in np.split(candidates, np.flatnonzero(np.diff(candidates) > 1) + 1):
            corner = (run[0] - 0.5, layers[0] - 0.5)
            for axis in axes:
                axis.add_patch(Rectangle(corner, len(run), len(layers), fill=False, edgecolor="black", clip_on=False))
    for index, (axis, name) in enumerate(zip(axes, position_names(model))):
        image = axis.imshow(
            drawn[:, index], origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=np.nanmax(drawn)
        )
        axis.set(title=f"memory {name}", xlabel="vision layer", facecolor="0.88")
        _count_layers(axis.xaxis)
        _count_layers(axis.yaxis)
    axes[0].set_ylabel("language layer")
    figure.colorbar(image, ax=list(axes), label="mean weight", fraction=0.05)
    figure.suptitle(f"Vision layers that the memory of each language layer is mixed from\n{title}", parse_math=False)
    figure.supxlabel(
        "Framed: the candidates of a group of language layers. Grey: no candidate. Layers are counted from 0."
        + _penultimate_note(model),
        fontsize="small",
    )
    return figure


def draw_fusion_curves(weights: np.ndarray, model, title: str):
    """
    The weights of a group's candidates over its language layers: the mean over images as a line, the middle 80 % of
    the images as a band. Arguments and result as in [`draw_fusion_weights`].
    """
    from matplotlib import colormaps

    low, high = np.quantile(weights, (0.1, 0.9), axis=0)
    mean = weights.mean(axis=0)
    num_layers, num_positions, num_vision_layers = mean.shape
    penultimate = num_vision_layers - 2
    longest = max(len(candidates) for _, candidates in groups(model))
    figure = new_figure(11, 1.5 + 3.2 * num_positions)
    axes = figure.subplots(num_positions, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for index, (axis, name) in enumerate(zip(axes, position_names(model))):
        for layers, candidates in groups(model):
            axis.axvline(layers[-1] + 0.5, color="0.7", linewidth=0.8)
            for place, vision_layer in enumerate(candidates):
                if vision_layer == penultimate:
                    style = {"color": "black", "linestyle": "--", "label": f"penultimate layer ({penultimate})"}
                else:
                    colour = colormaps["viridis"](place / max(longest - 1, 1) * 0.9)
                    style = {"color": colour, "label": f"layer {place} of the group's run"}
                curve = (layers, index, vision_layer)
                axis.plot(layers, mean[curve], marker="o", markersize=4, **style)
                axis.fill_between(layers, low[curve], high[curve], color=style["color"], alpha=0.2, linewidth=0)
                if len(layers) == 1:  # of whose band nothing would be seen
                    axis.vlines(layers, low[curve], high[curve], color=style["color"], alpha=0.2, linewidth=8)
            run = candidates[candidates != penultimate]
            if len(run) and index == 0:
                first, last = run[0], run[-1]
                axis.text(
                    (layers[0] + layers[-1]) / 2,
                    1.02,
                    f"vision {first}" if first == last else f"vision {first}–{last}",
                    transform=axis.get_xaxis_transform(),
                    horizontalalignment="center",
                    fontsize="small",
                )
        axis.set(ylabel=f"fusion weight, {name}", xlim=(-0.5, num_layers - 0.5))
        _count_layers(axis.xaxis)
    axes[0].set_ylim(bottom=0)
    axes[-1].set_xlabel("language layer")
    entries = {label: line for line, label in zip(*axes[0].get_legend_handles_labels())}
    names = sorted(entries, key=lambda label: (label.startswith("penultimate"), len(label), label))
    figure.legend([entries[name] for name in names], names, loc="outside right center", title="vision layer")
    figure.suptitle(
        f"Weights of the vision layers, over language layers\n{title}, and their 10th to 90th percentile as a band",
        parse_math=False,
    )
    figure.supxlabel(
        "Between two grey lines: a group, with its run of vision layers above. Layers are counted from 0."
        + _penultimate_note(model),
        fontsize="small",
    )
    return figure


def draw_slot_activations(activations: np.ndarray, pixels: np.ndarray, patch_size: int, title: str, layers=None):
    """
    The image, the mean over language layers on it, and some of the layers, all of them on one scale. Red is read,
    blue is negative, white is zero.

    Args:
        activations: `(num_language_layers, num_patches)`, see [`slot_activations`].
        pixels: `(height, width, 3)` from 0 to 1, the image as the vision encoder gets it.
        patch_size: in pixels.
        title: lines above the picture.
        layers: which language layers to show. By default all, or of more than `MAX_LAYERS` so many, evenly spaced.

    Returns:
        `matplotlib.figure.Figure`.

    Raises:
        ValueError: if there is no such layer.
    """
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    num_layers, num_patches = activations.shape
    if layers is None:
        layers = np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).round().astype(int))
    if wrong := [layer for layer in layers if not 0 <= layer < num_layers]:
        raise ValueError(f"Language layers {wrong} were asked for, but there are only 0 to {num_layers - 1}.")
    side = round(num_patches**0.5)
    # The image as a light shade, so that colours on it can still be compared with the bar
    grey = pixels.mean(axis=-1)
    shade = 0.75 + 0.25 * (grey - grey.min()) / (np.ptp(grey) or 1)

    def draw(axis, values, limit):
        colours = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
        shaded = np.repeat(shade[..., None], 3, axis=-1)
        # An encoder takes whole patches alone, and drops what is left on the right and below
        patches = colours.to_rgba(values.reshape(side, side))[..., :3].repeat(patch_size, 0).repeat(patch_size, 1)
        shaded[: len(patches), : len(patches)] *= patches
        axis.imshow(shaded)
        axis.set(xticks=[], yticks=[])
        return colours

    num_columns = min(len(layers), 4)
    num_rows = -(-len(layers) // num_columns)
    heading = [line for part in title.splitlines() for line in textwrap.wrap(part, 150)]
    figure = new_figure(12.5, 0.7 + 0.2 * len(heading) + max(5, 2.5 * num_rows))
    figure.suptitle("\n".join(heading), parse_math=False, x=0.01, horizontalalignment="left", fontsize="medium")
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3.2))

    picture, mean = left.subplots(2, 1)
    picture.imshow(pixels)
    picture.set_title("the image and its patches", fontsize="medium")
    picture.set(xticks=[], yticks=[])
    for edge in np.arange(1, side) * patch_size - 0.5:
        picture.axhline(edge, color="white", linewidth=0.4, alpha=0.6)
        picture.axvline(edge, color="white", linewidth=0.4, alpha=0.6)
    average = activations.mean(axis=0)
    image = draw(mean, average, np.abs(average).max())
    mean.set_title(f"mean over {num_layers} layers", fontsize="medium")
    left.colorbar(image, ax=mean, label="mean activation", fraction=0.046)

    axes = right.subplots(num_rows, num_columns, squeeze=False).flatten()
    limit = np.abs(activations[layers]).max()
    for axis, layer in zip(axes, layers):
        image = draw(axis, activations[layer], limit)
        low, high = activations[layer].min(), activations[layer].max()
        axis.set_title(f"language layer {layer}\n{low:.2g} to {high:.2g}", fontsize="small")
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    right.colorbar(image, ax=list(axes), label="activation $\\phi(x \\cdot k)$ (no unit)", fraction=0.03)
    figure.supxlabel(
        "$x$: what the FFN of a language layer gets where this token is due. $k$: key of the memory slot of a patch.\n"
        "Red: the slot's value is added to the FFN's output; white: it is not; blue: it is subtracted.\n"
        "All language layers are on one scale, the mean is on its own. The brightness is that of the image.",
        fontsize="small",
    )
    return figure


def new_figure(width: float, height: float):
    """A figure, sizes in inches. Without `pyplot`, so that no window and no global state is needed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Pictures are drawn by matplotlib, which is not there: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def groups(model) -> list[tuple[np.ndarray, np.ndarray]]:
    """Consecutive language layers with the same candidates, and these, sorted, each vision layer once."""
    candidates, valid = model.model.candidates.cpu().numpy(), model.model.valid_candidates.cpu().numpy()
    rows = [tuple(np.unique(row[is_valid])) for row, is_valid in zip(candidates, valid)]
    runs = itertools.groupby(range(len(rows)), key=lambda layer: rows[layer])
    return [(np.array(list(layers)), np.array(row)) for row, layers in runs]


def position_names(model) -> list[str]:
    if model.config.visual_prompts == "shared":
        return ["keys and values"]
    return [("keys", "values")[position] for position in model.config.memory_positions]


def _penultimate_note(model) -> str:
    penultimate = model.config.vision_config.num_hidden_layers - 2
    if model.config.layer_fusion == "penultimate":
        return ""
    return (
        f"\nThe penultimate vision layer, {penultimate}, is a candidate of every group;\n"
        "in its own group it stands twice, and both weights are added."
    )


def _count_layers(axis):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=16, integer=True))


# ---------------------------------------------------------------------------------------------------------------------
# The command
# ---------------------------------------------------------------------------------------------------------------------


def choose_row(dataset, split: str, number: int | None) -> dict:
    """One row with its number as `index`: that of the number, or else the first that has an image."""
    if number is None:
        number = next((index for index, row in enumerate(dataset) if row["image"] is not None), None)
        if number is None:
            raise ValueError(f"No row of the {split} split has an image, so there is nothing to draw.")
    if not 0 <= number < len(dataset):
        raise ValueError(f"Row {number} was asked for, but the {split} split has only 0 to {len(dataset) - 1}.")
    if dataset[number]["image"] is None:
        raise ValueError(f"Row {number} of the {split} split has no image to look at. Choose another, or none.")
    return {**dataset[number], "index": number}


def make_inputs(processor, task, rows: list[dict], device) -> dict[str, torch.Tensor]:
    """What `train.py` gives the model when it evaluates it: images, prompts and the answer's prefix."""
    encode = RowEncoder(task, "chosen", processor, max_prompt_length=sys.maxsize, training=False)
    samples = [
        {**encode(row, index), "index": index, "image": read_image(row["image"])} for index, row in enumerate(rows)
    ]
    batch = Collator(processor, instruction_mask=True)(samples)
    return {name: batch[name].to(device) for name in batch.keys() - {"index", "options"}}


@torch.no_grad()
def look_for_token(model, processor, task, row: dict, token: int) -> tuple[np.ndarray, str]:
    """
    Lets the model answer, and looks on while it makes token number `token` of its answer.

    Returns:
        Activations of shape `(num_language_layers, num_patches)`, and lines of text that say what they are.

    Raises:
        ValueError: if the answer has no such token.
    """
    inputs = make_inputs(processor, task, [row], model.device)
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=max(task.MAX_NEW_TOKENS, token + 1), do_sample=False)
    num_tokens = tokens.shape[1] - length
    if not 0 <= token < num_tokens:
        raise ValueError(f"Token {token} of the answer was asked for, but it has only 0 to {num_tokens - 1}.")
    read = tokens[:, : length + token]  # the last of them predicts it
    question = functional.pad(inputs["instruction_mask"], (0, token))
    texts = {"input_ids": read, "attention_mask": torch.ones_like(read), "instruction_mask": question}
    activations = slot_activations(model, {**inputs, **texts})[0]

    # Each from the start of the answer, since a tokenizer may drop the space before the first word that it decodes
    ends = (length + token, length + token + 1, None)
    before, until, answer = (processor.tokenizer.decode(tokens[0, length:end]) for end in ends)
    word = until[len(before) :]
    marked = f"{before}[{word}]{answer[len(until) :]}".replace("[ ", " [", 1).strip()
    context = textwrap.shorten(task.context(row), 200, placeholder=" …")
    title = (
        f"Where the language model looked to say [{word.strip()}] (row {row['index']})\n"
        f"{task.prompt(row, context)}\n"
        f"The model answers: {task.ANSWER_PREFIX.strip()} {marked}   Expected: {task.answer(row)}"
    )
    return activations, title


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or Hub id of trained adapters")
    parser.add_argument("--task", choices=NAMES, default="digits", help="file in tasks/ that reads the data")
    parser.add_argument("--data_path", help="Hub id or folder of the data, if not the task's own")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--num_samples", type=int, default=200, help="images to take the mean weights over, at most")
    parser.add_argument("--row", type=int, help="row to look at; by default the first with an image")
    parser.add_argument("--token", type=int, default=0, help="new token of the model's answer to look at")
    parser.add_argument(
        "--layers", type=int, nargs="+", help=f"language layers to show; by default up to {MAX_LAYERS}"
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pictures"))
    options = parser.parse_args(arguments)
    if options.num_samples < 1:
        parser.error(f"--num_samples is {options.num_samples}, but a mean needs at least 1.")
    return options


def main(arguments=None):
    from datasets import Image

    options = parse_arguments(arguments)
    new_figure(1, 1)  # if matplotlib is missing, it comes out before anything is loaded
    task = get_task(options.task)
    dataset = task.load(options.split, options.data_path).cast_column("image", Image(decode=False))
    row = choose_row(dataset, options.split, options.row)
    check_config(AutoConfig.from_pretrained(options.adapter, trust_remote_code=True))
    model = AutoModelForImageTextToText.from_pretrained(options.adapter, trust_remote_code=True)
    model = model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    processor = AutoProcessor.from_pretrained(options.adapter, trust_remote_code=True)
    options.output_dir.mkdir(parents=True, exist_ok=True)

    activations, title = look_for_token(model, processor, task, row, options.token)
    # Cropped and scaled as the encoder gets it, but not normalised
    seen = processor.image_processor(read_image(row["image"]), do_normalize=False, return_tensors="np")
    pixels = seen["pixel_values"][0].transpose(1, 2, 0).clip(0, 1)
    patch_size = model.config.vision_config.patch_size
    figure = draw_slot_activations(activations, pixels, patch_size, title, options.layers)
    figure.savefig(options.output_dir / "slot_activations.png")

    with_image = (row for row in dataset if row["image"] is not None)
    rows = list(itertools.islice(with_image, options.num_samples))
    batches = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    weights = np.concatenate(
        [fusion_weights(model, make_inputs(processor, task, batch, model.device)) for batch in batches]
    )
    title = f"Mean over {len(rows)} images of the {options.split} split of {options.task}"
    draw_fusion_weights(weights, model, title).savefig(options.output_dir / "fusion_weights.png")
    draw_fusion_curves(weights, model, title).savefig(options.output_dir / "fusion_curves.png")
    print(f"Wrote fusion_weights.png, fusion_curves.png and slot_activations.png to {options.output_dir}")


if __name__ == "__main__":
    main()
