"""Pictures of a trained adapter: the arrays behind them, what is drawn of them, and the command."""

import sys

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
    DehvfForConditionalGeneration,
    save_tiny_bases,
    tiny_inputs,
    tiny_model,
    tiny_processor,
)
from torch.nn import functional as F

from demo import pictures
from tasks import get_task


SEEING = {name: values for name, values in ABLATIONS.items() if values.get("visual_prompts") != "none"}
INSTRUCTION = {"fuser_query": "instruction"}


# --- arrays ---


def slow_slot_activations(model, inputs, position):
    """Method steps 1 to 8 with every key built, for one row after another: `(batch, language layers, patches)`."""
    dehvf, config = model.model, model.config
    read = []
    hooks = [
        layer.mlp.register_forward_hook(lambda mlp, args, output: read.append(args[0]))
        for layer in dehvf.language_model.layers
    ]
    model(**inputs)
    for hook in hooks:
        hook.remove()
    weights = torch.tensor(pictures.fusion_weights(model, inputs))
    hidden = dehvf.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states[1:]
    patches = [dehvf.vision_tower.post_layernorm(states)[:, -NUM_PATCHES:] for states in hidden]
    down, up = dehvf.projector.down, dehvf.projector.up
    activations = torch.zeros(len(inputs["input_ids"]), NUM_TEXT_LAYERS, NUM_PATCHES)
    for row in range(len(activations)):
        for layer in range(NUM_TEXT_LAYERS):
            mlp = dehvf.language_model.layers[layer].mlp
            mixed = sum(weights[row, layer, 0, j] * patches[j][row] for j in range(NUM_VISION_LAYERS))
            prompts = F.linear(F.silu(down(mixed)), up.weight, up.bias)
            for patch in range(NUM_PATCHES):
                key = dehvf.memory_slots.key[patch]
                if config.visual_prompts != "values":
                    key = key + config.visual_scale * prompts[patch]
                activation = getattr(mlp, mlp.activation_name)
                activations[row, layer, patch] = activation(read[layer][row, position] @ key)
    return activations.detach()


@pytest.mark.parametrize(
    "values",
    [*({"model_type": name} for name in TEXT_BACKBONES), *SEEING.values()] + [{"vision_type": "siglip_vision_model"}],
    ids=str,
)
def test_slot_activations_are_those_of_keys_that_are_built(values):
    model, inputs = tiny_model(**values), tiny_inputs()
    for position in (-1, 3):
        activations = pictures.slot_activations(model, inputs, position)
        assert activations.shape == (2, NUM_TEXT_LAYERS, NUM_PATCHES)
        torch.testing.assert_close(
            torch.tensor(activations), slow_slot_activations(model, inputs, position), rtol=1e-4, atol=1e-5
        )


def test_looking_leaves_nothing_behind():
    model, inputs = tiny_model(), tiny_inputs()
    before = model(**inputs).logits
    with pytest.raises(TypeError):
        pictures.slot_activations(model, {**inputs, "input_ids": None})
    pictures.slot_activations(model, inputs)
    assert not any(layer.mlp._forward_pre_hooks for layer in model.model.language_model.layers)
    assert torch.equal(model(**inputs).logits, before)


@pytest.mark.parametrize("values", SEEING.values(), ids=SEEING)
def test_fusion_weights_sum_to_one_within_the_group(values):
    model = tiny_model(**values)
    weights = pictures.fusion_weights(model, tiny_inputs())
    assert weights.shape == (2, NUM_TEXT_LAYERS, len(model.config.memory_positions), NUM_VISION_LAYERS)
    assert weights.sum(axis=-1) == pytest.approx(1, abs=1e-6)
    for layers, candidates in pictures.groups(model):
        assert weights[:, layers][..., candidates].sum(axis=-1) == pytest.approx(1, abs=1e-6)


def test_fusion_weights_follow_the_question_where_the_fuser_reads_it():
    model, inputs = tiny_model(**INSTRUCTION), tiny_inputs()
    other = {**inputs, "input_ids": inputs["input_ids"].flip(0)}
    padded = {name: F.pad(inputs[name], (3, 0)) for name in ("input_ids", "attention_mask")}
    weights = pictures.fusion_weights(model, inputs)
    assert abs(weights - pictures.fusion_weights(model, other)).max() > 1e-4
    np.testing.assert_allclose(pictures.fusion_weights(model, {**inputs, **padded}), weights, atol=1e-6)


def test_groups_are_runs_of_language_layers_with_their_candidates():
    plain = [(layers.tolist(), candidates.tolist()) for layers, candidates in pictures.groups(tiny_model())]
    assert plain == [([0, 1], [0, 1, 2, 4]), ([2, 3], [3, 4, 5])]
    alike = pictures.groups(tiny_model(layer_fusion="penultimate"))
    assert [(layers.tolist(), candidates.tolist()) for layers, candidates in alike] == [([0, 1, 2, 3], [4])]


# --- what is drawn ---


def is_blank(file) -> bool:
    with Image.open(file) as image:
        return len(image.convert("RGB").getcolors(image.width * image.height)) < 20


def texts_cut_off(figure) -> list[str]:
    """Titles and labels that do not fit on a picture that was drawn."""
    texts = [*figure.texts]
    for axis in figure.axes:
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
    (left, bottom), (right, top) = figure.bbox.min, figure.bbox.max
    boxes = [(text.get_text(), text.get_window_extent()) for text in texts if text.get_text()]
    return [text for text, box in boxes if box.x0 < left or box.y0 < bottom or box.x1 > right or box.y1 > top]


@pytest.mark.parametrize("values", SEEING.values(), ids=SEEING)
def test_every_ablation_is_drawn(values, tmp_path):
    model = tiny_model(**values)
    weights = pictures.fusion_weights(model, tiny_inputs())
    for draw in (pictures.draw_fusion_weights, pictures.draw_fusion_curves):
        figure = draw(weights, model, "Mean over 200 images of the validation split of scienceqa")
        figure.savefig(tmp_path / "a.png")
        assert not is_blank(tmp_path / "a.png") and not texts_cut_off(figure)


def test_a_heat_map_shows_the_mean_weight_of_each_candidate_and_no_other_layer():
    model = tiny_model()
    weights = pictures.fusion_weights(model, tiny_inputs())
    *maps, bar = pictures.draw_fusion_weights(weights, model, "2 images").axes
    assert [axis.get_title() for axis in maps] == ["memory keys", "memory values"]
    assert bar.get_ylabel() == "mean weight"
    for position, axis in enumerate(maps):
        drawn = axis.images[0].get_array()
        candidate = np.array([[1, 1, 1, 0, 1, 0]] * 2 + [[0, 0, 0, 1, 1, 1]] * 2, dtype=bool)
        assert (np.ma.getmaskarray(drawn) == ~candidate).all()
        assert drawn.data[candidate] == pytest.approx(weights.mean(axis=0)[:, position][candidate])
        assert axis.images[0].get_clim()[0] == 0
        frames = sorted((*frame.get_xy(), frame.get_width(), frame.get_height()) for frame in axis.patches)
        assert frames == [(-0.5, -0.5, 3, 2), (2.5, 1.5, 3, 2), (3.5, -0.5, 1, 2)]


def test_curves_show_the_mean_weights_of_each_group():
    model = tiny_model()
    weights = pictures.fusion_weights(model, tiny_inputs())
    figure = pictures.draw_fusion_curves(weights, model, "2 images")
    for position, axis in enumerate(figure.axes):
        curves = [line for line in axis.lines if line.get_marker() == "o"]
        drawn = sorted((*line.get_xdata(), *line.get_ydata()) for line in curves)
        mean = weights.mean(axis=0)[:, position]
        expected = [(0, 1, *mean[:2, j]) for j in (0, 1, 2, 4)] + [(2, 3, *mean[2:, j]) for j in (3, 4, 5)]
        np.testing.assert_allclose(drawn, sorted(expected), rtol=1e-6)


def test_a_patch_is_coloured_where_it_is_and_its_sign_decides_how():
    activations = np.zeros((2, 16))
    activations[0, 3], activations[1, 12] = 2, -1  # northeast in layer 0, southwest in layer 1
    pixels = np.ones((18, 18, 3))  # two columns and two rows more than whole patches
    figure = pictures.draw_slot_activations(activations, pixels, 4, "$title", [0, 1])
    first, second = (axis.images[0].get_array() for axis in figure.subfigs[1].axes[:2])
    red, blue = first[0:4, 12:16], second[12:16, 0:4]
    assert (red[..., 0] > 3 * red[..., 2]).all() and (blue[..., 2] > 1.2 * blue[..., 0]).all()
    assert (red == red[0, 0]).all() and (blue == blue[0, 0]).all()
    assert blue.sum() > red.sum(), "on one scale, -1 is half as dark as 2"
    for panel, coloured in ((first, red), (second, blue)):
        grey = np.ptp(panel, axis=-1) < 1e-2
        assert (~grey).sum() == 16 and np.ptp(coloured[0, 0]) > 0.1
    scale = figure.subfigs[1].axes[-1]
    assert scale.get_ylim() == (-2, 2)


def test_a_deep_language_model_is_shown_in_twelve_layers(tmp_path):
    activations = np.random.default_rng(0).normal(size=(40, 16))
    figure = pictures.draw_slot_activations(activations, np.ones((16, 16, 3)), 4, "a long question " * 30)
    figure.savefig(tmp_path / "a.png")
    assert not texts_cut_off(figure)
    titles = [axis.get_title().split("\n")[0] for axis in figure.subfigs[1].axes if axis.get_title()]
    assert len(titles) == 12 and titles[0] == "language layer 0" and titles[-1] == "language layer 39"


# --- the command ---


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with an untrained adapter, as `train.py` saves one."""
    folder = tmp_path_factory.mktemp("adapter")
    bases = save_tiny_bases(folder, max_position_embeddings=512)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **DEHVF_SIZES)
    model.save_pretrained(folder / "dehvf")
    blind = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **DEHVF_SIZES, visual_prompts="none")
    blind.save_pretrained(folder / "blind")
    return folder


@pytest.fixture
def data(tmp_path):
    """Four rows in ScienceQA's columns, the odd ones with an image."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 20, 3), dtype=np.uint8))
    rows = {
        "image": [None, image, None, image],
        "question": ["what is it?", "what costs $5 or $6?"] * 2,
        "choices": [["one", "two"]] * 4,
        "answer": [0, 1] * 2,
        "hint": ["", "a hint"] * 2,
        "subject": ["natural science"] * 4,
        "grade": ["grade2"] * 4,
    }
    test = datasets.Dataset.from_dict(rows).cast_column("image", datasets.Image())
    splits = datasets.DatasetDict(test=test, train=test.select([0, 2]))
    splits.save_to_disk(str(tmp_path / "data"))
    return tmp_path / "data"


def draw(folder, data, *flags):
    output = data.parent / "pictures"
    arguments = [folder, "--task", "scienceqa", "--data_path", data, "--output_dir", output, *flags]
    pictures.main([str(argument) for argument in arguments])
    return output


def test_the_command_writes_three_pictures(adapter, data, capsys):
    output = draw(adapter / "dehvf", data)
    files = sorted(output.iterdir())
    assert [file.name for file in files] == ["fusion_curves.png", "fusion_weights.png", "slot_activations.png"]
    assert not any(is_blank(file) for file in files)
    assert str(output) in capsys.readouterr().out


def first_row(data):
    row = datasets.load_from_disk(str(data))["test"].cast_column("image", datasets.Image(decode=False))[1]
    return {**row, "index": 1}


@pytest.mark.parametrize("values", [{}, INSTRUCTION], ids=["network", "instruction"])
@pytest.mark.parametrize("token", [0, 2])
def test_what_is_drawn_is_what_the_model_did_when_it_said_the_token(values, token, data, monkeypatch):
    model, processor, task = tiny_model(max_position_embeddings=512, **values), tiny_processor(), get_task("scienceqa")
    model.generation_config.eos_token_id = None
    row = first_row(data)
    drawn, title = pictures.look_for_token(model, processor, task, row, token)

    steps = [[] for _ in range(NUM_TEXT_LAYERS)]
    for seen, layer in zip(steps, model.model.language_model.layers):
        slots = layer.mlp.slot_activations
        monkeypatch.setattr(
            layer.mlp,
            "slot_activations",
            lambda *args, slots=slots, seen=seen: seen.append(slots(*args)) or seen[-1],
        )
    inputs = pictures.make_inputs(processor, task, [row], "cpu")
    tokens = model.generate(**inputs, max_new_tokens=3, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    expected = torch.stack([seen[token][0, -1, :NUM_PATCHES] for seen in steps])
    torch.testing.assert_close(torch.tensor(drawn), expected.detach(), rtol=1e-4, atol=1e-5)

    words = processor.tokenizer.decode(tokens[: token + 1])
    word = processor.tokenizer.decode(tokens[token : token + 1])
    assert words.endswith(word) and f"to say [{word.strip()}]" in title
    for part in ("(row 1)", "what costs $5 or $6?", "a hint", "(A) one (B) two", "Expected: The answer is B."):
        assert part in title


def test_nothing_is_drawn_of_an_adapter_without_visual_prompts(adapter, data):
    with pytest.raises(ValueError, match='trained with `visual_prompts="none"`.*nothing to draw'):
        draw(adapter / "blind", data)
    with pytest.raises(ValueError, match="nothing to draw"):
        pictures.slot_activations(tiny_model(visual_prompts="none"), tiny_inputs())


def test_nothing_is_drawn_of_another_model(adapter, data):
    with pytest.raises(ValueError, match="is a `llama`.*Give a DEHVF adapter"):
        draw(adapter / "text", data)


@pytest.mark.parametrize("look", [pictures.fusion_weights, pictures.slot_activations])
def test_inputs_without_an_image_are_refused(look):
    inputs = tiny_inputs()
    with pytest.raises(ValueError, match="A row of the inputs has no image"):
        look(tiny_model(), {**inputs, "image_mask": torch.tensor([True, False])})
    del inputs["pixel_values"]
    with pytest.raises(ValueError, match="A row of the inputs has no image"):
        look(tiny_model(), inputs)


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--row", "2"], "Row 2 of the test split has no image"),
        (["--row", "4"], "Row 4 was asked for, but the test split has only 0 to 3"),
        (["--split", "train"], "No row of the train split has an image"),
        (["--token", "-1"], "Token -1 of the answer was asked for, but it has only 0 to 0"),
        (["--layers", "1", "4"], r"Language layers \[4\] were asked for, but there are only 0 to 3"),
    ],
)
def test_what_is_not_there_is_named(flags, message, adapter, data):
    with pytest.raises(ValueError, match=message):
        draw(adapter / "dehvf", data, *flags)


def test_a_mean_over_no_image_is_refused(adapter, data, capsys):
    with pytest.raises(SystemExit):
        draw(adapter / "dehvf", data, "--num_samples", "0")
    assert "--num_samples is 0" in capsys.readouterr().err


def test_a_missing_matplotlib_comes_out_before_anything_is_loaded(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        pictures.main(["no-such-folder"])
