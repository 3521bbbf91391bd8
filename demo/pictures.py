# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Draws figures of a trained adapter as PNG files: its fusion weights and slot activations.

    python demo/pictures.py outputs/digits --output_dir outputs/digits/pictures
    python demo/pictures.py outputs/own --task vqa --data_path examples/vqa --row 0 --layers 0 3 7

    fusion_weights.png      which vision layers each language layer's memory is mixed from, mean over images
    fusion_curves.png       the same as curves over language layers, with their spread over images
    fusion_groups.png       the same for each group, mean over its language layers as well
    slot_activations.png    how much each language layer read each patch of one image for one token of the answer

Layers, rows and tokens are counted from 0. If a row has several images or tiles, all of them are read, but the figures
show its first image as a whole. `fusion_weights` and `slot_activations` return the arrays that are drawn.
"""

import argparse
import itertools
import sys
import textwrap
import threading
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor


sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tasks import NAMES, get_task  # noqa: E402
from training.data import Collator, load_rows, read_image, read_images  # noqa: E402
from training.encoding import RowEncoder  # noqa: E402
from training.flags import check_is_pinned, check_place  # noqa: E402


BATCH_SIZE = 32
MAX_LAYERS = 12  # number of layers shown for a deep language model, unless `--layers` is given


# --- arrays ---


def check_config(config, layers: list[int] | None = None):
    """Raises `ValueError` if the model has no visual memory, or not all of these language layers."""
    if getattr(config, "visual_prompts", None) in (None, "none"):
        given = f"a `{config.model_type}`" if config.model_type != "dehvf" else 'trained with `visual_prompts="none"`'
        raise ValueError(
            f"The model is {given}: it has no visual memory, so there is nothing to draw. Pass a DEHVF adapter that "
            "was trained with visual prompts."
        )
    num_layers = config.get_text_config().num_hidden_layers
    if wrong := [layer for layer in layers or [] if not 0 <= layer < num_layers]:
        raise ValueError(f"--layers names {wrong}, but the language layers are 0 to {num_layers - 1}.")


def load_adapter(adapter: str, revision: str | None = None, layers: list[int] | None = None):
    """A model, on a GPU if there is one, and its processor. Raises `ValueError` as [`check_config`]."""
    source = {"revision": revision, "trust_remote_code": True}
    check_config(AutoConfig.from_pretrained(adapter, **source), layers)
    model = AutoModelForImageTextToText.from_pretrained(adapter, **source)
    model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu")
    return model, AutoProcessor.from_pretrained(adapter, **source)


def first_images(model, inputs) -> torch.Tensor:
    """The pixels of each row's first image, without its tiles. Raises `ValueError` if there is nothing to draw."""
    check_config(model.config)
    pixel_values, mask = inputs.get("pixel_values"), inputs.get("image_mask")
    has_several = pixel_values is not None and pixel_values.ndim == 5
    if has_several and mask is not None:
        mask = mask[:, 0]
    if pixel_values is None or (mask is not None and not mask.all()):
        raise ValueError("A row of the inputs has no image, so nothing can be drawn for it. Remove such rows.")
    return pixel_values[:, 0] if has_several else pixel_values


def instruction_of(model, inputs) -> torch.Tensor | None:
    if not model.config.reads_instruction:
        return None
    return model.get_instruction_features(
        inputs["input_ids"], inputs.get("instruction_mask", inputs.get("attention_mask"))
    )


@torch.no_grad()
def fusion_weights(model, inputs) -> np.ndarray:
    """
    The weights of the vision layers in each language layer's memory (method step 4).

    Args:
        model: `DehvfForConditionalGeneration`.
        inputs: keyword arguments of the model's `forward` with `pixel_values`, and with the texts if `fuser_query`
            reads them.

    Returns:
        Array of shape `(batch_size, num_language_layers, num_positions, num_vision_layers)`, for the first image of
        each row of the inputs. Its rows sum to one.

    Raises:
        ValueError: if the model has no visual prompts, or a row has no image.
    """
    pixel_values = first_images(model, inputs)
    return model.model.get_fusion_weights(pixel_values, instruction_of(model, inputs)).float().cpu().numpy()


@torch.no_grad()
def slot_activations(model, inputs, position: int = -1) -> np.ndarray:
    """
    How strongly one token reads the memory slot of each patch, `phi(x K^T)` of method step 8.

    Args:
        model: `DehvfForConditionalGeneration`.
        inputs: keyword arguments of the model's `forward`, with `input_ids` and `pixel_values`.
        position: position in `input_ids` of the token that reads. It predicts the next token.

    Returns:
        Array of shape `(batch_size, num_language_layers, num_patches)`, patches of the first image row by row, without
        a unit. A negative activation subtracts the slot's value; SiLU, for example, goes down to -0.28. With
        `visual_prompts="values"` the keys do not depend on the image.

    Raises:
        ValueError: if the model has no visual prompts, or a row has no image.
    """
    first_images(model, inputs)
    num_patches, activations, thread = model.config.num_patches, [], threading.get_ident()

    def keep(ffn, args):
        if threading.get_ident() == thread:  # other threads may use the model at the same time
            slots = ffn.slot_activations(args[0][:, [position]], ffn.memory)  # (batch_size, 1, num_memory_slots)
            activations.append(slots[:, 0, :num_patches].float())

    ffns = model.model.text_layout.ffns(model.model.language_model)
    hooks = [ffn.register_forward_pre_hook(keep) for ffn in ffns]
    try:
        model(**inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(activations, dim=1).cpu().numpy()


def groups(model) -> list[tuple[np.ndarray, np.ndarray]]:
    """Consecutive language layers with the same candidate vision layers, and these candidates, sorted."""
    rows = [tuple(sorted(set(row))) for row in model.model.hierarchy.rows]
    runs = itertools.groupby(range(len(rows)), key=lambda layer: rows[layer])
    return [(np.array(list(layers)), np.array(row)) for row, layers in runs]


def position_names(model) -> list[str]:
    if model.config.visual_prompts == "shared":
        return ["keys and values"]
    return [("keys", "values")[position] for position in model.config.memory_positions]


def encoder_view(processor, image) -> np.ndarray:
    """The whole image as the vision encoder gets it, without normalisation: `(height, width, 3)` from 0 to 1."""
    pixels = processor(images=image, do_normalize=False, return_tensors="np")["pixel_values"][0]
    pixels = pixels[0] if pixels.ndim == 4 else pixels  # before its tiles
    return pixels.transpose(1, 2, 0).clip(0, 1)


# --- figures ---


def new_figure(width: float, height: float):
    """Creates a figure (sizes in inches) without `pyplot`, which needs a display and has global state."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("Drawing needs matplotlib, which is not installed: pip install matplotlib") from error
    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def count_layers(axis):
    from matplotlib.ticker import MaxNLocator

    axis.set_major_locator(MaxNLocator(nbins=16, integer=True))


def add_note(figure, model, text: str):
    """Explains a figure below it."""
    config = model.config
    if config.layer_fusion != "penultimate" and not isinstance(config.layer_mapping, list):
        text += (
            f"\nThe penultimate vision layer, {config.vision_config.num_hidden_layers - 2}, is a candidate of every "
            "group;\nin its own group it counts twice, and its two weights are added."
        )
    figure.supxlabel(text, fontsize="small")


def draw_fusion_weights(weights: np.ndarray, model, title: str):
    """
    Heat maps of the mean over images, one for each position, with a frame around the candidates of each group.

    Args:
        weights: `(num_images, num_language_layers, num_positions, num_vision_layers)`, see [`fusion_weights`].
        model: the model that the weights belong to.
        title: second line of the title, which describes the images.

    Returns:
        `matplotlib.figure.Figure`, whose `savefig` writes a file.
    """
    from matplotlib.patches import Rectangle

    mean = weights.mean(axis=0)
    num_positions = mean.shape[1]
    drawn = np.full(mean.shape, np.nan)  # layers that are not candidates stay blank
    figure = new_figure(1.5 + 5.5 * num_positions, 6)
    axes = figure.subplots(1, num_positions, sharey=True, squeeze=False)[0]
    for layers, candidates in groups(model):
        part = slice(layers[0], layers[-1] + 1)
        drawn[part, :, candidates] = mean[part, :, candidates]
        # One frame around the group's run and one around the penultimate layer, unless they touch
        for run in np.split(candidates, np.flatnonzero(np.diff(candidates) > 1) + 1):
            corner = (run[0] - 0.5, layers[0] - 0.5)
            for axis in axes:
                axis.add_patch(Rectangle(corner, len(run), len(layers), fill=False, edgecolor="black", clip_on=False))
    for index, (axis, name) in enumerate(zip(axes, position_names(model))):
        image = axis.imshow(
            drawn[:, index], origin="lower", aspect="auto", cmap="viridis", vmin=0, vmax=np.nanmax(drawn)
        )
        axis.set(title=f"memory {name}", xlabel="vision layer", facecolor="0.88")
        count_layers(axis.xaxis)
        count_layers(axis.yaxis)
    axes[0].set_ylabel("language layer")
    figure.colorbar(image, ax=list(axes), label="mean weight", fraction=0.05)
    figure.suptitle(f"Vision layers that the memory of each language layer is mixed from\n{title}", parse_math=False)
    what = "Framed: the candidates of a group of language layers. Grey: not a candidate"
    add_note(figure, model, f"{what}. Layers are counted from 0.")
    return figure


def draw_fusion_curves(weights: np.ndarray, model, title: str):
    """
    The weights of each group's candidates over its language layers: a line for the mean over images, and a band from
    the 10th to the 90th percentile. Arguments and result as in [`draw_fusion_weights`].
    """
    mean = weights.mean(axis=0)
    low, high = np.quantile(weights, (0.1, 0.9), axis=0)
    num_layers, num_positions, num_vision_layers = mean.shape
    styles = curve_styles(max(len(candidates) for _, candidates in groups(model)))
    figure = new_figure(11, 1.5 + 3.2 * num_positions)
    axes = figure.subplots(num_positions, 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    entries = {}
    for index, (axis, name) in enumerate(zip(axes, position_names(model))):
        for layers, candidates in groups(model):
            axis.axvline(layers[-1] + 0.5, color="0.7", linewidth=0.8)
            for place, vision_layer in enumerate(candidates):
                label, style = styles[place]
                if vision_layer == num_vision_layers - 2:
                    label, style = f"penultimate layer ({vision_layer})", {"color": "black", "linestyle": "--"}
                curve = (layers, index, vision_layer)
                (entries[label],) = axis.plot(layers, mean[curve], marker="o", markersize=4, **style)
                axis.fill_between(layers, low[curve], high[curve], color=style["color"], alpha=0.2, linewidth=0)
                if len(layers) == 1:  # the band would have no width
                    axis.vlines(layers, low[curve], high[curve], color=style["color"], alpha=0.2, linewidth=8)
        axis.set(ylabel=f"fusion weight, {name}", xlim=(-0.5, num_layers - 0.5))
        count_layers(axis.xaxis)
    name_groups(axes[0], model)
    axes[0].set_ylim(bottom=0)
    axes[-1].set_xlabel("language layer")
    names = sorted(entries, key=lambda label: (label.startswith("penultimate"), len(label), label))
    figure.legend([entries[name] for name in names], names, loc="outside right center", title="vision layer")
    figure.suptitle(
        f"Weights of the vision layers over language layers\n{title}, with the 10th to 90th percentile as a band",
        parse_math=False,
    )
    what = "Between two grey lines: a group, with its run of vision layers above"
    add_note(figure, model, f"{what}. Layers are counted from 0.")
    return figure


def draw_group_means(weights: np.ndarray, model, title: str):
    """
    Bars of the mean weight of each group's candidates over images and the group's language layers, with an error bar
    for the standard deviation over these layers. Arguments and result as in [`draw_fusion_weights`].
    """
    by_layer = weights.mean(axis=0)
    num_positions, names = by_layer.shape[1], position_names(model)
    runs = groups(model)
    num_columns = min(len(runs), 4)
    num_rows = -(-len(runs) // num_columns)
    width = max(3.2, 0.4 * max(len(candidates) for _, candidates in runs))
    figure = new_figure(max(8, 1.5 + width * num_columns), 1.6 + 2.8 * num_rows)
    axes = figure.subplots(num_rows, num_columns, sharey=True, squeeze=False).flatten()
    for axis, (layers, candidates) in zip(axes, runs):
        places = np.arange(len(candidates))
        for index, name in enumerate(names):
            of_group = by_layer[layers, index][:, candidates]
            shift = (index - (num_positions - 1) / 2) * 0.8 / num_positions
            bars = {"width": 0.8 / num_positions, "yerr": of_group.std(axis=0), "error_kw": {"elinewidth": 0.8}}
            axis.bar(places + shift, of_group.mean(axis=0), label=name, **bars)
        axis.set_xticks(places, candidates)
        span = f"layers {layers[0]}–{layers[-1]}" if len(layers) > 1 else f"layer {layers[0]}"
        axis.set_title(f"language {span}", fontsize="medium")
        axis.set_xlabel("vision layer")
    for axis in axes[len(runs) :]:
        axis.set_axis_off()
    axes[0].set(ylabel="mean fusion weight", ylim=(0, None))
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", title="memory")
    figure.suptitle(f"Vision layers that the memory of each group is mixed from\n{title}", parse_math=False)
    what = "Error bars: standard deviation over the group's language layers"
    add_note(figure, model, f"{what}. Layers are counted from 0.")
    return figure


def curve_styles(num_candidates: int) -> list[tuple[str, dict]]:
    """Label and colour of each position in a group's layers, the same in all groups."""
    from matplotlib import colormaps

    shades = np.linspace(0, 0.9, num_candidates)
    return [
        (f"layer {place} of the group's run", {"color": colormaps["viridis"](x)}) for place, x in enumerate(shades)
    ]


def name_groups(axis, model):
    """Writes the vision layers of each group above it, as a range if they are consecutive."""
    is_grouped = not isinstance(model.config.layer_mapping, list)
    penultimate = model.config.vision_config.num_hidden_layers - 2
    for layers, candidates in groups(model):
        run = candidates[candidates != penultimate] if is_grouped else candidates
        if len(run):
            is_run = len(run) > 1 and run[-1] - run[0] == len(run) - 1
            text = f"vision {run[0]}–{run[-1]}" if is_run else f"vision {', '.join(map(str, run))}"
            place = {"transform": axis.get_xaxis_transform(), "horizontalalignment": "center"}
            axis.text((layers[0] + layers[-1]) / 2, 1.02, text, fontsize="small", **place)


def draw_slot_activations(activations: np.ndarray, pixels: np.ndarray, patch_size: int, title: str, layers=None):
    """
    The image, the mean over language layers, and single language layers on one scale. Red is positive, blue is
    negative, white is zero.

    Args:
        activations: `(num_language_layers, num_patches)`, see [`slot_activations`].
        pixels: `(height, width, 3)`, see [`encoder_view`].
        patch_size: in pixels.
        title: lines above the picture.
        layers: language layers to show. By default all, or `MAX_LAYERS` evenly spaced ones.

    Returns:
        `matplotlib.figure.Figure`.
    """
    num_layers = len(activations)
    if layers is None:
        layers = np.unique(np.linspace(0, num_layers - 1, min(num_layers, MAX_LAYERS)).round().astype(int))
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
    for edge in np.arange(patch_size, len(pixels) - 1, patch_size) - 0.5:
        picture.axhline(edge, color="white", linewidth=0.4, alpha=0.6)
        picture.axvline(edge, color="white", linewidth=0.4, alpha=0.6)
    average = activations.mean(axis=0)
    image = draw_patches(mean, average, pixels, patch_size, np.abs(average).max())
    mean.set_title(f"mean over {num_layers} layers", fontsize="medium")
    left.colorbar(image, ax=mean, label="mean activation", fraction=0.046)

    axes = right.subplots(num_rows, num_columns, squeeze=False).flatten()
    limit = np.abs(activations[layers]).max()
    for axis, layer in zip(axes, layers):
        image = draw_patches(axis, activations[layer], pixels, patch_size, limit)
        low, high = activations[layer].min(), activations[layer].max()
        axis.set_title(f"language layer {layer}\n{low:.2g} to {high:.2g}", fontsize="small")
    for axis in axes[len(layers) :]:
        axis.set_axis_off()
    right.colorbar(image, ax=list(axes), label="activation $\\phi(x \\cdot k)$ (no unit)", fraction=0.03)
    figure.supxlabel(
        "$x$: input of the language layer's FFN at the token before. $k$: key of the patch's memory slot.\n"
        "Red: the slot's value is added to the FFN's output; white: it is not used; blue: it is subtracted.\n"
        "All language layers share one scale, the mean has its own. The brightness is that of the image.",
        fontsize="small",
    )
    return figure


def draw_patches(axis, values: np.ndarray, pixels: np.ndarray, patch_size: int, limit: float):
    """Colours each patch by its value, shaded by the image. Returns the mappable for the colour bar."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    grey = pixels.mean(axis=-1)
    # A light shade, so that the colours can still be compared with the bar
    shaded = np.repeat((0.75 + 0.25 * (grey - grey.min()) / (np.ptp(grey) or 1))[..., None], 3, axis=-1)
    colours = ScalarMappable(Normalize(-limit, limit), "RdBu_r")
    side = round(len(values) ** 0.5)
    patches = colours.to_rgba(values.reshape(side, side))[..., :3].repeat(patch_size, 0).repeat(patch_size, 1)
    # The encoder ignores the pixels right of and below the last whole patch
    shaded[: len(patches), : len(patches)] *= patches
    axis.imshow(shaded)
    axis.set(xticks=[], yticks=[])
    return colours


# --- the command ---


def choose_row(dataset, split: str, number: int | None) -> dict:
    """The row with this number, or the first row with an image, with its number as `index`."""
    if number is None:
        number = next((index for index, row in enumerate(dataset) if row["image"] is not None), None)
        if number is None:
            raise ValueError(f"No row of the {split} split has an image, so there is nothing to draw.")
    if not 0 <= number < len(dataset):
        raise ValueError(f"--row is {number}, but the rows of the {split} split are 0 to {len(dataset) - 1}.")
    if dataset[number]["image"] is None:
        raise ValueError(f"--row is {number}, but this row of the {split} split has no image. Choose another.")
    return {**dataset[number], "index": number}


def make_inputs(processor, task, rows: list[dict], device) -> dict[str, torch.Tensor]:
    """The inputs of the model in evaluation: images, prompts and the prefix of the answer."""
    encode = RowEncoder(task, "chosen", processor, max_prompt_length=sys.maxsize, training=False)
    samples = [{**encode(row, index), "index": index, "image": read_images(row)} for index, row in enumerate(rows)]
    batch = Collator(processor, instruction_mask=True)(samples)
    return {name: batch[name].to(device) for name in batch.keys() - {"index", "options"}}


@torch.no_grad()
def look_for_token(model, processor, task, row: dict, token: int) -> tuple[np.ndarray, str]:
    """
    Generates an answer, and computes the slot activations at the token before token number `token` of the answer.

    Returns:
        Activations of shape `(num_language_layers, num_patches)`, and the lines of a title.

    Raises:
        ValueError: if the answer has no such token.
    """
    inputs = make_inputs(processor, task, [row], model.device)
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=max(task.MAX_NEW_TOKENS, token + 1), do_sample=False)
    num_tokens = tokens.shape[1] - length
    if token >= num_tokens:
        raise ValueError(f"--token is {token}, but the tokens of the answer are 0 to {num_tokens - 1}.")
    read = tokens[:, : length + token]  # the last of these predicts the token
    question = F.pad(inputs["instruction_mask"], (0, token))
    texts = {"input_ids": read, "attention_mask": torch.ones_like(read), "instruction_mask": question}
    activations = slot_activations(model, {**inputs, **texts})[0]

    # Decoded from the start of the answer, since a tokenizer may drop the space before the first word
    ends = (length + token, length + token + 1, None)
    before, until, answer = (processor.tokenizer.decode(tokens[0, length:end]) for end in ends)
    word = until[len(before) :]
    marked = f"{before}[{word}]{answer[len(until) :]}".replace("[ ", " [", 1).strip()
    context = textwrap.shorten(task.context(row), 200, placeholder=" …")
    title = (
        f"What the language model read to say [{word.strip()}] (row {row['index']})\n"
        f"{task.prompt(row, context)}\n"
        f"The model answers: {task.ANSWER_PREFIX.strip()} {marked}   Expected: {task.answer(row)}"
    )
    return activations, title


def parse_arguments(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("adapter", help="folder or Hub id of trained adapters")
    parser.add_argument("--revision", help="commit of an adapter on the Hub, in 40 hex digits")
    parser.add_argument("--task", choices=NAMES, default="digits", help="task that reads the data")
    parser.add_argument("--data_path", help="Hub id or folder of the data, if the task has no default")
    parser.add_argument("--columns", help="columns with other names, as in train.py: question=prompt,answer=label")
    parser.add_argument("--holdout", type=float, help="fraction of the train split to test on, as in train.py")
    parser.add_argument("--split", choices=("train", "validation", "test"), default="test")
    parser.add_argument("--num_samples", type=int, default=200, help="maximum number of images to average over")
    parser.add_argument("--row", type=int, help="row to draw; by default the first with an image")
    parser.add_argument("--token", type=int, default=0, help="token of the answer to draw")
    parser.add_argument("--layers", type=int, nargs="+", help=f"layers to draw; by default up to {MAX_LAYERS}")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/pictures"))
    # Further arguments that `load_rows` reads
    parser.set_defaults(captions=None, max_samples=None, streaming=False, only_images=False)
    options = parser.parse_args(arguments)
    if options.num_samples < 1:
        parser.error(f"--num_samples is {options.num_samples}, but a mean needs at least 1.")
    if options.token < 0:
        parser.error(f"--token is {options.token}, but the tokens of an answer are counted from 0.")
    return options


def main(arguments=None):
    options = parse_arguments(arguments)
    check_place("adapter", options.adapter)
    check_is_pinned(options.adapter, options.revision)
    new_figure(1, 1)  # fails before anything is loaded if matplotlib is missing
    task = get_task(options.task)
    dataset = load_rows(task, options.split, options)
    row = choose_row(dataset, options.split, options.row)
    try:
        options.output_dir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output_dir {options.output_dir} cannot be created ({error}). Name another.") from error
    model, processor = load_adapter(options.adapter, options.revision, options.layers)

    activations, title = look_for_token(model, processor, task, row, options.token)
    pixels = encoder_view(processor, read_image(row["image"]))
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
    draw_group_means(weights, model, title).savefig(options.output_dir / "fusion_groups.png")
    names = "fusion_weights.png, fusion_curves.png, fusion_groups.png and slot_activations.png"
    print(f"Wrote {names} to {options.output_dir}")


if __name__ == "__main__":
    try:
        main()
    except (ImportError, OSError, ValueError) as error:  # not an error of this program
        sys.exit(str(error))
