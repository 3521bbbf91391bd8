"""The fusion weights: what they start from, the figures that describe them, and the rate at which they are trained."""

import json
import math

import pytest
import torch
from datasets import DatasetDict
from test_train import make_rows, tiny_flags
from tiny import (
    IMAGE_SIZE,
    NUM_PATCHES,
    NUM_TEXT_LAYERS,
    NUM_VISION_LAYERS,
    ROOT,
    DehvfForConditionalGeneration,
    DehvfProcessor,
    tiny_inputs,
    tiny_model,
)
from torch.nn import functional as F

import train
from benchmarks import fusion
from dehvf import modeling
from tasks import digits
from training.arguments import DehvfTrainingArguments
from training.fusion import DIMENSIONS, FusionRecorder, FusionStatistics, describe_fusion, fusion_figures
from training.trainer import AnswerTrainer


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


def test_what_cannot_be_compared_has_no_deviation():
    torch.manual_seed(0)
    weights = torch.randn(3, 2, 2, 3).softmax(-1)
    cases = {
        "layers": fusion_figures(weights, [[0, 1, 4], [2, 3, 4]]),  # two groups of one layer each
        "positions": fusion_figures(weights[:, :, :1], ROWS[:2]),
        "images": fusion_figures(weights[:1], ROWS[:2]),
    }
    for missing, figures in cases.items():
        assert figures.keys() == {"entropy"} | {f"std_over_{name}" for name in DIMENSIONS if name != missing}
        assert f"over {missing}" not in describe_fusion(figures) and "hardly" not in describe_fusion(figures)
    assert "standard" not in describe_fusion({"entropy": 1.0})


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


def test_figures_of_many_batches_are_those_of_all_images_at_once():
    torch.manual_seed(0)
    weights = with_a_second_group((5 * torch.randn(300, 2, 2, 3)).softmax(-1))
    weights[-1, :, 0] = weights[-1, :, 1]  # the last image differs from the others
    statistics = FusionStatistics(ROWS)
    for image in weights:
        statistics.add(image[None])
    assert statistics.figures() == pytest.approx(fusion_figures(weights, ROWS), abs=2e-5)


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
        figures = recorder.figures()
        weights = model.model.get_fusion_weights(inputs["pixel_values"])
    assert weights.shape[1] == NUM_TEXT_LAYERS
    assert figures == recorder.figures() and figures["entropy"] > 0 and recorder.figures() == {}
    assert FusionRecorder(tiny_model(layer_fusion="mean")).figures() == {}


@pytest.mark.parametrize("is_compiled", [False, True])
def test_the_recorder_does_not_count_blank_images(is_compiled):
    model, inputs = tiny_model(vision_adapter_dropout=0.0).train(), tiny_inputs(3)
    recorder = FusionRecorder(model)
    forward = torch.compile(model, backend="eager") if is_compiled else model
    pixel_values = inputs.pop("pixel_values")
    forward(**inputs)  # in training, this encodes a blank image
    forward(**inputs, pixel_values=pixel_values, image_mask=torch.zeros(3, dtype=torch.bool))
    assert recorder.figures() == {}
    model.model.get_fusion_weights(pixel_values[[0, 2]])
    expected = recorder.figures()
    forward(**inputs, pixel_values=pixel_values, image_mask=torch.tensor([True, False, True]))
    assert recorder.figures() == pytest.approx(expected, abs=2e-5)


@pytest.fixture(scope="module")
def untrained():
    """A new adapter on the embedded base models, and 32 test pictures with their questions."""
    torch.manual_seed(0)
    bases = ROOT / "assets" / "vision_model", ROOT / "assets" / "language_model"
    sizes = {"num_memory_slots": 32, "projector_hidden_size": 32, "initializer_range": 0.05}
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **sizes).eval()
    rows = [row for row in digits.load("test") if row["image"] is not None][:32]
    processor = DehvfProcessor.from_vision_text_pretrained(*bases)
    images, texts = [row["image"] for row in rows], [digits.prompt(row, digits.context(row)) for row in rows]
    return model, processor(images=images, text=texts, return_tensors="pt")


def test_new_weights_differ_over_layers_positions_and_images(untrained):
    model, inputs = untrained
    recorder = FusionRecorder(model)
    model.model.get_fusion_weights(inputs["pixel_values"])
    figures = recorder.figures()
    assert all(figures[f"std_over_{name}"] >= 0.02 for name in ("layers", "positions", "images")), figures


def test_layer_and_position_embeddings_get_gradients_of_like_size(untrained):
    model, inputs = untrained
    model(**inputs, labels=inputs["input_ids"]).loss.backward()
    query = model.model.fuser_query
    layer, position = (e.grad.pow(2).mean().sqrt().item() for e in (query.layer_embedding, query.position_embedding))
    assert position / 10 <= layer <= position * 10, (layer, position)


@pytest.mark.parametrize("ratio", [1.0, 0.1])
def test_the_fuser_is_trained_at_a_rate_of_its_own(ratio, tmp_path):
    model = tiny_model()
    arguments = DehvfTrainingArguments(str(tmp_path), learning_rate=0.01, fuser_lr_ratio=ratio, weight_decay=0.1)
    trainer = AnswerTrainer(model=model, args=arguments, max_new_tokens=1, run={})
    trainer.create_optimizer()
    optimizer = trainer.create_optimizer()  # as with DeepSpeed
    rates = {id(parameter): group["lr"] for group in optimizer.param_groups for parameter in group["params"]}
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert len(rates) == len(trained) == sum(len(group["params"]) for group in optimizer.param_groups)
    for name, parameter in trained.items():
        of_fuser = name.startswith(("model.fuser.", "model.fuser_query."))
        assert rates[id(parameter)] == pytest.approx(0.01 * (ratio if of_fuser else 1)), name
    assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, 0.1}


def test_the_fuser_learns_to_read_the_vision_layer_that_an_image_needs(monkeypatch):
    """
    The patches of each vision layer show a label, and the answer is the label of layer 0 or 1. Only the class features
    say which, and only the fuser reads them, so with the same weights for all images no adapter can answer more than
    1/2 + 1/2 * 1/8 of the questions.
    """
    num_labels, num_rows = 8, 512
    model = tiny_model(num_groups=1, projector_hidden_size=32, memory_dropout=0, memory_scale=1, visual_scale=0.3)
    labels = torch.randint(num_labels, (num_rows, NUM_VISION_LAYERS))
    layer = torch.randint(2, (num_rows,))
    answers = labels.gather(1, layer[:, None]).flatten()
    label_features, layer_features = (torch.randn(number, 24) for number in (num_labels, 2))

    def hierarchical_features(adapter, vision_tower, pixel_values):
        rows = pixel_values[:, 0, 0, 0].long()
        class_features = layer_features[layer[rows], None].expand(-1, NUM_VISION_LAYERS, -1)
        patches = label_features[labels[rows]][:, adapter.hierarchy.layers_read, None].expand(-1, -1, NUM_PATCHES, -1)
        return class_features, adapter.projector.down(patches), vision_tower(pixel_values)

    monkeypatch.setattr(modeling.Adapter, "hierarchical_features", hierarchical_features)

    def logits(rows):
        pixel_values = rows[:, None, None, None].float().expand(-1, 3, IMAGE_SIZE, IMAGE_SIZE)
        return model(input_ids=torch.tensor([[1]]).expand(len(rows), -1), pixel_values=pixel_values).logits[:, 0]

    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=4e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, start_factor=1, end_factor=0, total_iters=200)
    for _ in range(200):
        rows = torch.randint(num_rows, (64,))
        F.cross_entropy(logits(rows), answers[rows]).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.1)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    @torch.no_grad()
    def accuracy(replacement=None):
        fuser, weights = model.model.fuser, []
        with fuser.register_forward_hook(lambda *call: weights.append(call[-1]) or replacement):
            right = logits(torch.arange(num_rows)).argmax(dim=-1) == answers
        return right.float().mean().item(), weights[0]

    own, weights = accuracy()
    replaced = fusion.replacements(weights, model.model.hierarchy.rows)
    others = {name: accuracy(replaced[name])[0] for name in ("mean over images", "another image's", "uniform")}
    assert own > 0.9 and max(others.values()) < 0.65, (own, others)


# --- replaced weights ---


def test_replacements_keep_what_their_names_say():
    torch.manual_seed(0)
    weights = with_a_second_group(torch.randn(4, 2, 2, 3).softmax(-1))
    replaced = fusion.replacements(weights, ROWS)
    figures = {name: fusion_figures(tensor, ROWS) for name, tensor in replaced.items()}
    for name, constant in (
        ("mean over images", ["images"]),
        ("mean over language layers of a group", ["layers"]),
        ("one constant for each group", ["images", "layers", "positions"]),
        ("uniform", ["images", "layers", "positions"]),
    ):
        torch.testing.assert_close(replaced[name].sum(-1), torch.ones(4, 3, 2))
        assert [key for key in ("images", "layers", "positions") if figures[name][f"std_over_{key}"] == 0] == constant
    assert replaced["uniform"][0, 2, 0].tolist() == [0.5, 0.5, 0.0]
    assert replaced["another image's"][0].equal(weights[2])
    assert replaced["another layer's of the group"][:, [1, 0, 2]].equal(weights)


def test_class_features_are_split_into_what_images_share_and_what_differs():
    torch.manual_seed(0)
    shared, own = torch.randn(3, 8), torch.randn(2, 3, 8)
    features = shared + torch.cat((own, -own))
    sizes = fusion.spread_over_images(features)
    assert sizes["mean"] == pytest.approx(shared.square().mean(-1).sqrt().tolist(), abs=1e-3)
    assert sizes["deviation"] == pytest.approx(own.square().mean((0, 2)).sqrt().tolist(), abs=1e-3)


def test_the_benchmark_scores_an_adapter_with_its_own_and_with_other_weights(tmp_path):
    DatasetDict(train=make_rows(4), test=make_rows(6)).save_to_disk(str(tmp_path / "data"))
    output = tmp_path / "output"
    train.main(tiny_flags(tmp_path, tmp_path / "data", output, save_strategy="no"))
    results = json.loads((output / "results.json").read_text())
    data = ["--task", "scienceqa", "--data_path", str(tmp_path / "data"), "--per_device_eval_batch_size", "2"]
    fixed = ["--adapter", str(output), "--num_train_epochs", "0", "--output_dir", str(tmp_path / "other")]
    report = fusion.measure([*data, *fixed])
    assert report["figures"] == results["fusion"]
    assert report["accuracy"]["the adapter's own"] == pytest.approx(results["scores"]["average"], abs=0.01)
    assert len(report["accuracy"]) == 7
    assert {name: len(sizes) for name, sizes in report["class_features"].items()} == {"mean": 6, "deviation": 6}
    train.main(tiny_flags(tmp_path, tmp_path / "data", output, layer_fusion="mean", max_steps=1))
    with pytest.raises(ValueError, match="it has no fuser"):
        fusion.measure([*data, *fixed])
