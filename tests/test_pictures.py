"""Figures of a trained adapter: the arrays, what is drawn of them, and the command."""

import json
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from tiny import (
    ABLATIONS,
    DEHVF_SIZES,
    NUM_PATCHES,
    NUM_TEXT_LAYERS,
    NUM_VISION_LAYERS,
    TEXT_BACKBONES,
    VISION_BACKBONES,
    DehvfForConditionalGeneration,
    save_tiny_bases,
    tiny_inputs,
    tiny_model,
    tiny_processor,
    vision_parts,
)
from torch.nn import functional as F

from demo import pictures
from tasks import get_task


WITH_IMAGES = {name: values for name, values in ABLATIONS.items() if values.get("visual_prompts") != "none"}
INSTRUCTION = {"fuser_query": "instruction"}


# --- arrays ---


def slow_slot_activations(model, inputs, position):
    """Method steps 1 to 8 with every key built, one row after another: `(batch, language layers, patches)`."""
    pixel_values = inputs["pixel_values"] if inputs["pixel_values"].ndim == 4 else inputs["pixel_values"][:, 0]
    dehvf, config, read = model.model, model.config, []
    layers = dehvf.language_model.layers
    hooks = [layer.mlp.register_forward_hook(lambda mlp, args, output: read.append(args[0])) for layer in layers]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    weights = torch.tensor(pictures.fusion_weights(model, inputs))
    instruction = pictures.instruction_of(model, inputs)
    encoded = model.get_image_features(pixel_values, instruction=instruction, output_hidden_states=True)
    hidden = encoded.hidden_states[1:]
    norm = vision_parts(dehvf)[1]
    patches = [norm(states)[:, -NUM_PATCHES:] for states in hidden]
    down, up = dehvf.projector.down, dehvf.projector.up
    activations = torch.zeros(len(inputs["input_ids"]), NUM_TEXT_LAYERS, NUM_PATCHES)
    for row in range(len(activations)):
        for layer in range(NUM_TEXT_LAYERS):
            mixed = sum(weights[row, layer, 0, j] * patches[j][row] for j in range(NUM_VISION_LAYERS))
            prompts = F.linear(F.silu(down(mixed)), up.weight, up.bias)
            keys = dehvf.memory_slots.key[:NUM_PATCHES]
            if config.visual_prompts != "values":
                keys = keys + config.visual_scale * prompts
            mlp = layers[layer].mlp
            activations[row, layer] = getattr(mlp, mlp.activation_name)(keys @ read[layer][row, position])
    return activations.detach().numpy()


@pytest.mark.parametrize(
    "values",
    [
        *({"model_type": name} for name in TEXT_BACKBONES),
        *WITH_IMAGES.values(),
        *({"vision_type": name} for name in VISION_BACKBONES),
    ],
    ids=str,
)
def test_the_arrays_are_those_of_the_method(values):
    model, inputs = tiny_model(**values), tiny_inputs()
    before = model(**inputs).logits
    for position in (-1, 3):
        activations = pictures.slot_activations(model, inputs, position)
        np.testing.assert_allclose(activations, slow_slot_activations(model, inputs, position), rtol=1e-4, atol=1e-5)
    weights = pictures.fusion_weights(model, inputs)
    assert weights.shape == (2, NUM_TEXT_LAYERS, len(model.config.memory_positions), NUM_VISION_LAYERS)
    assert weights.sum(axis=-1) == pytest.approx(1, abs=1e-6)
    for layers, candidates in pictures.groups(model):
        assert weights[:, layers][..., candidates].sum(axis=-1) == pytest.approx(1, abs=1e-6)
    assert torch.equal(model(**inputs).logits, before), "looking changes nothing"


def test_of_several_images_or_tiles_the_first_is_shown_as_it_was_read_with_the_others():
    model, inputs = tiny_model(image_tiles="1x2"), tiny_inputs()
    views = torch.stack([tiny_inputs(seed=seed)["pixel_values"] for seed in (0, 1, 2)], dim=1)
    # An image without tiles in a batch with one that has them
    several = {**inputs, "pixel_values": views, "image_mask": torch.tensor([[True, True, True], [True, False, False]])}
    np.testing.assert_allclose(
        pictures.fusion_weights(model, several), pictures.fusion_weights(model, inputs), atol=1e-6
    )
    activations = pictures.slot_activations(model, several)
    np.testing.assert_allclose(activations, slow_slot_activations(model, several, -1), rtol=1e-4, atol=1e-5)
    alone = pictures.slot_activations(model, inputs)
    np.testing.assert_allclose(activations[1], alone[1], atol=1e-5)
    assert abs(activations[0] - alone[0]).max() > 1e-3
    several["image_mask"][1, 0] = False
    with pytest.raises(ValueError, match="A row of the inputs has no image"):
        pictures.fusion_weights(model, several)


def test_threads_see_their_own_activations_and_a_failure_leaves_no_hook():
    model = tiny_model()
    batches = [tiny_inputs(seed=seed) for seed in range(4)] * 8
    alone = [pictures.slot_activations(model, inputs) for inputs in batches]
    with ThreadPoolExecutor(4) as threads:
        together = list(threads.map(lambda inputs: pictures.slot_activations(model, inputs), batches))
    np.testing.assert_allclose(together, alone, atol=1e-6)
    with pytest.raises(ValueError, match="input_ids"):
        pictures.slot_activations(model, {**batches[0], "input_ids": None})
    assert not any(layer.mlp._forward_pre_hooks for layer in model.model.language_model.layers)


def test_fusion_weights_follow_the_question_where_the_fuser_reads_it():
    model, inputs = tiny_model(**INSTRUCTION), tiny_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    padded = {name: F.pad(inputs[name], (3, 0)) for name in ("input_ids", "attention_mask")}
    weights = pictures.fusion_weights(model, inputs)
    assert abs(weights - pictures.fusion_weights(model, other)).max() > 1e-4
    np.testing.assert_allclose(pictures.fusion_weights(model, {**inputs, **padded}), weights, atol=1e-6)


@pytest.mark.parametrize(
    "values, expected",
    [
        ({}, [([0, 1], [0, 1, 2, 4]), ([2, 3], [3, 4, 5])]),
        ({"layer_fusion": "penultimate"}, [([0, 1, 2, 3], [4])]),
    ],
)
def test_groups_are_runs_of_language_layers_with_their_candidates(values, expected):
    groups = pictures.groups(tiny_model(**values))
    assert [(layers.tolist(), candidates.tolist()) for layers, candidates in groups] == expected


@pytest.mark.parametrize("look", [pictures.fusion_weights, pictures.slot_activations])
@pytest.mark.parametrize(
    "values, change, message",
    [
        ({}, {"image_mask": torch.tensor([True, False])}, "A row of the inputs has no image"),
        ({}, {"pixel_values": None}, "A row of the inputs has no image"),
        ({"visual_prompts": "none"}, {}, "nothing to draw"),
    ],
)
def test_inputs_without_visual_memory_are_refused(look, values, change, message):
    with pytest.raises(ValueError, match=message):
        look(tiny_model(**values), {**tiny_inputs(), **change})


# --- what is drawn ---


def is_blank(file) -> bool:
    with Image.open(file) as image:
        return len(image.convert("RGB").getcolors(image.width * image.height)) < 20


def texts_cut_off(figure) -> list[str]:
    """Titles and labels of a drawn figure that do not fit on it."""
    texts = [*figure.texts]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
    (left, bottom), (right, top) = figure.bbox.min, figure.bbox.max
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [text for text, box in boxes if box.x0 < left or box.y0 < bottom or box.x1 > right or box.y1 > top]


@pytest.mark.parametrize(
    "values",
    [
        # Three settings that draw differently; the others with the extended tests
        pytest.param(values, id=name, marks=() if name in ("full", "mean", "instruction") else pytest.mark.extended)
        for name, values in WITH_IMAGES.items()
    ],
)
def test_every_ablation_is_drawn(values, tmp_path):
    model = tiny_model(**values)
    weights = pictures.fusion_weights(model, tiny_inputs())
    for draw in (pictures.draw_fusion_weights, pictures.draw_fusion_curves, pictures.draw_group_means):
        figure = draw(weights, model, "Mean over 200 images of the validation split of scienceqa")
        figure.savefig(tmp_path / "a.png")
        assert not is_blank(tmp_path / "a.png") and not texts_cut_off(figure)


def test_maps_and_curves_show_the_mean_weight_of_each_candidate_and_no_other_layer():
    model = tiny_model()
    weights = pictures.fusion_weights(model, tiny_inputs())
    *maps, bar = pictures.draw_fusion_weights(weights, model, "2 images").axes
    assert [axis.get_title() for axis in maps] == ["memory keys", "memory values"]
    assert bar.get_ylabel() == "mean weight"
    candidate = np.array([[1, 1, 1, 0, 1, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2, dtype=bool)
    charts = pictures.draw_fusion_curves(weights, model, "2 images").axes
    for axis, chart, mean in zip(maps, charts, weights.mean(axis=0).swapaxes(0, 1)):
        drawn = axis.images[0].get_array()
        assert (np.ma.getmaskarray(drawn) == ~candidate).all()
        assert drawn.data[candidate] == pytest.approx(mean[candidate])
        assert axis.images[0].get_clim()[0] == 0
        frames = sorted((*frame.get_xy(), frame.get_width(), frame.get_height()) for frame in axis.patches)
        assert frames == [(-0.5, -0.5, 3, 2), (2.5, 1.5, 3, 2), (3.5, -0.5, 1, 2)]
        curves = sorted((*line.get_xdata(), *line.get_ydata()) for line in chart.lines if line.get_marker() == "o")
        expected = [(0, 1, *mean[:2, j]) for j in (0, 1, 2, 4)] + [(2, 3, *mean[2:, j]) for j in (3, 4, 5)]
        np.testing.assert_allclose(curves, sorted(expected), rtol=1e-6)


def test_bars_are_the_mean_weights_of_a_group_over_images_and_its_language_layers():
    model = tiny_model()
    weights = pictures.fusion_weights(model, tiny_inputs())
    axes = pictures.draw_group_means(weights, model, "2 images").axes
    groups = [("layers 0–1", slice(0, 2), [0, 1, 2, 4]), ("layers 2–3", slice(2, 4), [3, 4, 5])]
    assert [axis.get_title() for axis in axes] == [f"language {name}" for name, *_ in groups]
    for axis, (_, layers, candidates) in zip(axes, groups):
        assert [int(label.get_text()) for label in axis.get_xticklabels()] == candidates
        bars = {container.get_label(): container for container in axis.containers}  # and error bars
        for position, name in enumerate(("keys", "values")):
            expected = [weights[:, layers, position, layer].mean() for layer in candidates]
            np.testing.assert_allclose([bar.get_height() for bar in bars[name]], expected, rtol=1e-5)
            assert sum(expected) == pytest.approx(1, abs=1e-5)


def test_a_patch_is_coloured_at_its_place_by_its_sign():
    activations = np.zeros((2, 16))
    activations[0, 3], activations[1, 12] = 2, -1  # northeast in layer 0, southwest in layer 1
    pixels = np.ones((18, 18, 3))  # two columns and two rows more than whole patches
    figure = pictures.draw_slot_activations(activations, pixels, 4, "$title", [0, 1])
    first, second = (axis.images[0].get_array() for axis in figure.subfigs[1].axes[:2])
    red, blue = first[0:4, 12:16], second[12:16, 0:4]
    assert (red[..., 0] > 3 * red[..., 2]).all() and (blue[..., 2] > 1.2 * blue[..., 0]).all()
    assert blue.sum() > red.sum(), "on one scale, -1 is half as dark as 2"
    for panel, coloured in ((first, red), (second, blue)):
        assert (coloured == coloured[0, 0]).all()
        assert (np.ptp(panel, axis=-1) > 1e-2).sum() == 16, "no other patch is coloured"
    assert figure.subfigs[1].axes[-1].get_ylim() == (-2, 2)


def test_a_deep_language_model_is_shown_in_twelve_layers(tmp_path):
    activations = np.random.default_rng(0).normal(size=(40, 16))
    figure = pictures.draw_slot_activations(activations, np.ones((16, 16, 3)), 4, "a long question " * 30)
    figure.savefig(tmp_path / "a.png")
    assert not texts_cut_off(figure)
    titles = [axis.get_title().split("\n")[0] for axis in figure.subfigs[1].axes if axis.get_title()]
    assert len(titles) == 12 and titles[0] == "language layer 0" and titles[-1] == "language layer 39"


# --- the command ---


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """
    Untrained adapters with and without visual prompts and one that says one token, and four rows in ScienceQA's
    columns, two with an image.
    """
    folder = tmp_path_factory.mktemp("pictures")
    bases = save_tiny_bases(folder, max_position_embeddings=512)
    for name, values in {"dehvf": {}, "blind": {"visual_prompts": "none"}, "brief": {}}.items():
        model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **{**DEHVF_SIZES, **values})
        if name == "brief":
            model.generation_config.eos_token_id = list(range(model.config.get_text_config().vocab_size))
        model.save_pretrained(folder / name)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
    rows = {
        "image": [None, image] * 2,
        "question": ["what is it?", "what costs $5 or $6?"] * 2,
        "choices": [["one", "two"]] * 4,
        "answer": [0, 1] * 2,
        "hint": ["", "a hint"] * 2,
        "subject": ["natural science"] * 4,
        "grade": ["grade2"] * 4,
    }
    test = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    datasets.DatasetDict(test=test, train=test.select([0, 2])).save_to_disk(str(folder / "data"))
    return folder


def arguments_of(folder, adapter, *flags) -> list[str]:
    data, output = folder / "data", folder / "figures"
    arguments = [folder / adapter, "--task", "scienceqa", "--data_path", data, "--output_dir", output, *flags]
    return [str(argument) for argument in arguments]


def test_the_command_writes_four_figures(folder, capsys):
    pictures.main(arguments_of(folder, "dehvf"))
    files = sorted((folder / "figures").iterdir())
    assert [file.stem for file in files] == ["fusion_curves", "fusion_groups", "fusion_weights", "slot_activations"]
    assert not any(is_blank(file) for file in files)
    assert str(folder / "figures") in capsys.readouterr().out


def test_own_data_is_read_with_the_columns_and_the_held_out_rows_of_training(folder, capsys):
    rows = [{"prompt": f"what {number}?", "label": "red", "image": "red.png"} for number in range(4)]
    (folder / "own").mkdir()
    Image.new("RGB", (20, 20), "red").save(folder / "own" / "red.png")
    (folder / "own" / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = ["--task", "vqa", "--data_path", folder / "own", "--columns", "question=prompt,answer=label"]
    flags += ["--holdout", "0.25", "--output_dir", folder / "own-figures"]
    pictures.main([str(argument) for argument in (folder / "dehvf", *flags)])
    assert len(list((folder / "own-figures").iterdir())) == 4


@pytest.mark.parametrize("values", [{}, INSTRUCTION], ids=["network", "instruction"])
@pytest.mark.parametrize("token", [0, 2])
def test_what_is_drawn_is_read_at_the_token_before(values, token, folder):
    model, processor, task = tiny_model(max_position_embeddings=512, **values), tiny_processor(), get_task("scienceqa")
    model.generation_config.eos_token_id = None
    test = datasets.load_from_disk(str(folder / "data"))["test"].cast_column("image", datasets.Image(decode=False))
    row = {**test[1], "index": 1}
    drawn, title = pictures.look_for_token(model, processor, task, row, token)

    inputs = pictures.make_inputs(processor, task, [row], "cpu")
    length = inputs["input_ids"].shape[1]
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[:, : length + token + 1]
    question = F.pad(inputs["instruction_mask"], (0, token))  # the answer's tokens are not the user's
    texts = {"input_ids": tokens[:, :-1], "attention_mask": torch.ones_like(question), "instruction_mask": question}
    expected = slow_slot_activations(model, {**texts, "pixel_values": inputs["pixel_values"]}, -1)[0]
    np.testing.assert_allclose(drawn, expected, rtol=1e-4, atol=1e-5)

    word = processor.tokenizer.decode(tokens[0, -1])
    for part in (f"to say [{word.strip()}]", "(row 1)", "what costs $5 or $6?", "a hint", "(A) one (B) two", "is B."):
        assert part in title


@pytest.mark.parametrize(
    "adapter, flags, message",
    [
        ("dehvf", ["--row", "2"], "--row is 2, but this row of the test split has no image"),
        ("dehvf", ["--row", "4"], "--row is 4, but the rows of the test split are 0 to 3"),
        ("dehvf", ["--split", "train"], "No row of the train split has an image"),
        ("brief", ["--token", "2"], "--token is 2, but the tokens of the answer are 0 to 0"),
        ("dehvf", ["--layers", "1", "4"], r"--layers names \[4\], but the language layers are 0 to 3"),
        ("dehvf", ["--output_dir", __file__], f"--output_dir {__file__} cannot be created .* Name another"),
        ("blind", [], 'trained with `visual_prompts="none"`.*nothing to draw'),
        ("text", [], "is a `llama`.*Pass a DEHVF adapter"),
        ("nothing", [], "`adapter .*/nothing`: there is no such folder"),
    ],
)
def test_what_cannot_be_drawn_is_named(adapter, flags, message, folder, monkeypatch):
    if adapter != "brief":
        monkeypatch.setattr("transformers.AutoModelForImageTextToText.from_pretrained", lambda *args, **kwargs: 1 / 0)
    monkeypatch.setattr(sys, "argv", ["pictures.py", *arguments_of(folder, adapter, *flags)])
    with pytest.raises(SystemExit, match=message):
        runpy.run_path(pictures.__file__, run_name="__main__")


def test_wrong_flags_and_missing_packages_are_reported_before_anything_is_loaded(monkeypatch, tmp_path, capsys):
    for flag, number in (("--num_samples", "0"), ("--token", "-1")):
        with pytest.raises(SystemExit):
            pictures.main(["no-such-folder", flag, number])
        assert f"{flag} is {number}, but" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="There is no folder org/name.*`--revision main` was given"):
        pictures.main(["org/name", "--revision", "main"])
    with pytest.raises(ValueError, match="is a folder, which has no commits"):
        pictures.main([str(tmp_path), "--revision", 40 * "0"])
    with pytest.raises(ImportError, match="pip install matplotlib"):
        pictures.main([str(tmp_path)])
