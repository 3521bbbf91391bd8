"""Figures of the fusion weights."""

import math

import pytest
import torch
from tiny import NUM_TEXT_LAYERS, tiny_inputs, tiny_model

from training.fusion import FusionRecorder, describe_fusion, fusion_figures


# Language layers 0 and 1 are a group with three candidates, layer 2 is another with two and a filler
ROWS = [[0, 1, 4], [0, 1, 4], [2, 4]]
EVEN = torch.tensor([1 / 3] * 3).expand(4, 2, 2, 3)


def with_a_second_group(weights):
    return torch.cat((weights, torch.tensor([0.5, 0.5, 0.0]).expand(len(weights), 1, 2, 3)), dim=1)


@pytest.mark.parametrize("differs", ["nothing", "layers", "positions", "images"])
def test_only_the_deviation_over_what_differs_is_above_zero(differs):
    weights = EVEN.clone()
    if differs != "nothing":
        weights.transpose(0, {"images": 0, "layers": 1, "positions": 2}[differs])[0] = torch.tensor([1.0, 0.0, 0.0])
    figures = fusion_figures(with_a_second_group(weights), ROWS)
    above = {name for name, value in figures.items() if name != "entropy" and value}
    assert above == (set() if differs == "nothing" else {f"std_over_{differs}"})


def test_figures_are_those_of_loops_over_their_definitions():
    torch.manual_seed(0)
    first = torch.randn(4, 2, 2, 3).softmax(-1)
    weights = with_a_second_group(first)
    figures = fusion_figures(weights, ROWS)
    vectors = weights.flatten(0, 2).tolist()
    entropies = [-sum(w * math.log(w) for w in vector if w) for vector in vectors]
    assert figures["entropy"] == pytest.approx(sum(entropies) / len(entropies), abs=1e-4)
    pairs = [abs(a - b).item() / 2 for image in first for a, b in zip(image[0].flatten(), image[1].flatten())]
    assert figures["std_over_layers"] == pytest.approx(sum(pairs) / len(pairs), abs=1e-5)
    over_images = first.var(0, correction=0).sqrt().sum().item() / (2 * 2 * 3 + 2 * 2)  # and four that are constant
    assert figures["std_over_images"] == pytest.approx(over_images, abs=1e-5)


def test_constant_weights_are_named():
    alive = {"entropy": 1.0, "std_over_layers": 0.1, "std_over_positions": 0.1, "std_over_images": 0.1}
    assert "hardly" not in describe_fusion(alive)
    assert "hardly depend on images:" in describe_fusion(alive | {"std_over_images": 0.001})
    assert "on layers and images:" in describe_fusion(alive | {"std_over_images": 0.001, "std_over_layers": 0.0})


def test_the_recorder_reads_what_the_model_mixed():
    model, inputs = tiny_model(), tiny_inputs(3)
    recorder = FusionRecorder(model)
    assert recorder.figures() == {}
    with torch.no_grad():
        model(**inputs)
        weights = model.model.get_fusion_weights(inputs["pixel_values"])
    assert weights.shape[1] == NUM_TEXT_LAYERS and recorder.weights[0].equal(recorder.weights[1])
    assert recorder.figures()["entropy"] > 0 and recorder.figures() == {}
    assert FusionRecorder(tiny_model(layer_fusion="mean")).figures() == {}
