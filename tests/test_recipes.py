"""Every recipe is started as it is, but for the places of data and bases and the sizes that tiny bases ask for."""

import dataclasses
import json
import re
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from test_tasks import save_easy_vqa, save_karpathy, save_nlvr2, save_vqav2
from test_train import make_rows
from tiny import DEHVF_SIZES, IMAGE_SIZE, ROOT, DehvfConfig, DehvfForConditionalGeneration, save_tiny_bases
from transformers import AutoModel, AutoModelForCausalLM, LlamaConfig

import baselines
import dehvf
import train
from training.arguments import parse_arguments
from training.flags import DEFAULT_RECIPE, read_recipe, recipes


RECIPES = [recipe for recipe in recipes() if recipe != DEFAULT_RECIPE]  # test_readme.py runs that one
PAPER_RECIPES = [recipe for recipe in RECIPES if "llama" in recipe.stem]
BASELINE_SIZES = {"lora_rank": 2, "lavin_image_tokens": 2, "adaption_prompt_length": 3}


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory):
    """Bases of 8 layers, which 8 groups need, an adapter on them, and data for each task."""
    from datasets import DatasetDict

    folder = tmp_path_factory.mktemp("stand_ins")
    vision, text = save_tiny_bases(folder, num_vision_layers=8, num_hidden_layers=8, max_position_embeddings=512)
    adapter = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    adapter.save_pretrained(folder / "adapter")
    DatasetDict(train=make_rows(), validation=make_rows(2), test=make_rows(4)).save_to_disk(str(folder / "scienceqa"))
    save_karpathy(folder / "coco_captions")
    save_easy_vqa(folder / "easy_vqa")
    save_easy_vqa(folder / "easy_vqa_pairs")
    save_nlvr2(folder / "nlvr2")
    save_vqav2(folder / "vqav2")
    (folder / "chat").mkdir()
    shutil.copy(ROOT / "examples" / "vqa" / "images" / "circle.png", folder / "chat")
    messages = [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "a circle"}]
    for split in ("train", "test"):
        row = json.dumps({"image": "circle.png", "messages": messages})
        (folder / "chat" / f"{split}.jsonl").write_text(4 * f"{row}\n")
    return vision, text, folder


# Of the rows that only change a value of `DehvfConfig`, the others are extended
SAME_KIND = ("1-groups", "2-groups", "8-groups", "13b", "keys-only", "values-only", "same-keys-and-values")
SAME_KIND += ("mean-weights", "learnable-tokens", "no-visual-prompts", "layer-instruction")


def mark(recipe):
    marks = pytest.mark.extended if recipe.stem.endswith(SAME_KIND) else ()
    return pytest.param(recipe, id=recipe.stem, marks=marks)


@pytest.mark.parametrize("recipe", list(map(mark, RECIPES)))
def test_each_recipe_starts(recipe, stand_ins, tmp_path, capsys):
    vision, text, data = stand_ins
    own = read_recipe(recipe)
    sizes = {name: value for name, value in DEHVF_SIZES.items() if name != "num_groups" or name not in own}
    sizes = {} if own.get("method") in baselines.METHODS else sizes
    for size in dataclasses.fields(baselines.BaselineArguments):
        if size.name in BASELINE_SIZES and own.get("method") in size.metadata["help"].partition(":")[0].split(", "):
            sizes[size.name] = BASELINE_SIZES[size.name]
    sizes |= {"image_size": IMAGE_SIZE} if "image_size" in own else {}
    new = {"vision_model": vision, "text_model": text, **sizes}
    flags = {
        **({"adapter": data / "adapter"} if "adapter" in own else new),
        "data_path": data / own["task"],
        "dtype": "float32",
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "dataloader_num_workers": 0,
        "save_strategy": "no",
        "output_dir": tmp_path / "output",
    }
    train.main([str(recipe), *(str(word) for name, value in flags.items() for word in (f"--{name}", value))])
    rate = own.get("learning_rate") or own["base_learning_rate"] * 2 / 256
    assert f"learning rate {float(rate):g}" in capsys.readouterr().out, "the absolute rate"
    results = json.loads((tmp_path / "output" / "results.json").read_text())
    assert results["size"] == results["scores"]["count"]
    trained = sum(tensor.numel() for tensor in load_file(tmp_path / "output" / "model.safetensors").values())
    assert trained == results["trained_parameters"]


def test_a_recipe_says_only_what_differs_from_its_base():
    for recipe in RECIPES:
        values = yaml.safe_load(recipe.read_text())
        if "base" in values:
            base = read_recipe(ROOT / "recipes" / values.pop("base"))
            assert all(base.get(name) != value for name, value in values.items()), recipe


LLAMA_13B = {"hidden_size": 5120, "intermediate_size": 13824, "num_hidden_layers": 40, "num_attention_heads": 40}


def count_trained(recipe) -> int:
    """Trained parameters of a recipe's row at its full size, built on the meta device."""
    _, _, model_args, adapter_args, baseline_args, _ = parse_arguments([str(recipe)])
    text = LlamaConfig(**LLAMA_13B) if model_args.text_model.endswith("13b") else LlamaConfig()
    config = DehvfConfig(text_config=text, **dataclasses.asdict(adapter_args))
    with torch.device("meta"):
        if model_args.method in baselines.METHODS:
            bases = AutoModel.from_config(config.vision_config), AutoModelForCausalLM.from_config(text)
            model = baselines.assemble(model_args.method, *bases, baseline_args)
        else:
            model = DehvfForConditionalGeneration(config)
    return dehvf.adapters.count_parameters(model)[0]


@torch.no_grad()
def test_a_recipe_chooses_the_image_size_and_memory_slots_follow(tmp_path):
    recipe = tmp_path / "large-images.yaml"
    recipe.write_text(f"base: {ROOT / 'recipes' / 'scienceqa-llama7b.yaml'}\nimage_size: 336\n")
    _, _, _, adapter_args, _, _ = parse_arguments([str(recipe)])
    with torch.device("meta"):
        model = DehvfForConditionalGeneration(DehvfConfig(**dataclasses.asdict(adapter_args)))
        memory = model.get_image_features(torch.zeros(1, 3, 336, 336)).pooler_output
    model.config.save_pretrained(tmp_path)
    config = DehvfConfig.from_pretrained(tmp_path)
    assert (config.image_size, config.vision_config.image_size, config.num_memory_slots) == (336, 224, 576)
    assert model.model.memory_slots.key.shape == (576, 4096) and memory.shape[3] == 576
    assert DehvfConfig(image_size=112).num_memory_slots == 320 == DehvfConfig().num_memory_slots


def test_the_docs_name_each_recipe_with_its_trained_parameters():
    named = {}
    for line in (ROOT / "docs" / "paper-tables.md").read_text().splitlines():
        if re.match(r"\|.*`\w+-llama", line):
            _, _, names, counts, *_ = line.split("|")
            named |= zip(re.findall(r"`([\w-]+)`", names), re.findall(r"\d[\d,]*\d", counts), strict=True)
    assert named.keys() == {recipe.stem for recipe in PAPER_RECIPES}
    for recipe in PAPER_RECIPES:
        assert f"{count_trained(recipe):,}" == named[recipe.stem], recipe.stem
