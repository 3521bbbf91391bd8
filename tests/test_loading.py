"""What is saved, and that it is loaded again: in a fresh process, without the source tree, without a network."""

import itertools
import json
import os
import pty
import shutil
import subprocess
import sys
import textwrap
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import MagicMock

import pytest
import torch
from accelerate import dispatch_model
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file
from test_train import scienceqa, tiny_flags  # noqa: F401
from tiny import (
    DEHVF_SIZES,
    IMAGE_SIZE,
    ROOT,
    VISION_BACKBONES,
    DehvfForConditionalGeneration,
    DehvfProcessor,
    save_tiny_bases,
    tiny_config,
    tiny_inputs,
    tiny_model,
)
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    GenerationConfig,
)

import dehvf


CODE_FILES = sorted(file.name for file in ROOT.glob("*_dehvf.py"))


def run_fresh(code: str, folder, **arguments) -> str:
    """Runs `code` in a new process outside the checkout, with empty caches and no network."""
    environment = {
        **{name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        "HF_HOME": str(folder / "fresh_home"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    shutil.rmtree(folder / "fresh_home", ignore_errors=True)
    code = "import json, sys\nargs = json.loads(sys.argv[1])\n" + textwrap.dedent(code)
    arguments = json.dumps({name: str(value) for name, value in arguments.items()})
    process = subprocess.run(
        [sys.executable, "-c", code, arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Base models, and an adapter on them that a process saved whose source tree is gone."""
    folder = tmp_path_factory.mktemp("saved")
    vision, text = save_tiny_bases(folder)
    source = folder / "source"
    source.mkdir()
    for name in [*CODE_FILES, "config.json"]:
        shutil.copy(ROOT / name, source)
    torch.save(tiny_inputs(), folder / "inputs.pt")
    run_fresh(
        """
        import torch
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        model_class = get_class_from_dynamic_module("modeling_dehvf.DehvfForConditionalGeneration", args["source"])
        torch.manual_seed(0)
        model = model_class.from_vision_text_pretrained(args["vision"], args["text"], **json.loads(args["sizes"]))
        torch.nn.init.normal_(model.model.memory_slots.value)
        model.save_pretrained(args["target"])
        with torch.no_grad():
            logits = model(**torch.load("inputs.pt")).logits
        torch.save(logits, "logits.pt")
        """,
        folder,
        source=source,
        vision=vision,
        text=text,
        target=folder / "adapter",
        sizes=json.dumps(DEHVF_SIZES),
    )
    shutil.rmtree(source)
    return folder


def test_a_fresh_process_gets_the_processor_identical_logits_and_a_pipeline_that_answers(saved):
    """The processor first: test_hub.py begins with the model."""
    model = AutoModelForImageTextToText.from_pretrained(saved / "adapter", trust_remote_code=True)
    with torch.no_grad():
        memory = model.get_image_features(tiny_inputs()["pixel_values"])
    model.save_visual_memory(memory, saved / "memory.safetensors")
    answer = run_fresh(
        """
        from PIL import Image
        from transformers import AutoProcessor
        processor = AutoProcessor.from_pretrained("adapter", trust_remote_code=True)
        assert type(processor).__name__ == "DehvfProcessor", type(processor)
        image = Image.new("RGB", (20, 30), "red")
        inputs = processor(images=image, text="what?", return_tensors="pt")
        assert set(inputs) == {"input_ids", "attention_mask", "pixel_values"}, set(inputs)
        assert inputs["pixel_values"].shape == (1, 3, 16, 16)

        import torch, transformers
        config = transformers.AutoConfig.from_pretrained("adapter", trust_remote_code=True)
        assert type(config).__name__ == "DehvfConfig", type(config)
        inputs, expected = torch.load("inputs.pt"), torch.load("logits.pt")
        for auto_class in (transformers.AutoModel, transformers.AutoModelForImageTextToText):
            model = auto_class.from_pretrained("adapter", trust_remote_code=True)
            assert type(model).__name__ == "DehvfForConditionalGeneration" and not model.training
            memory = model.load_visual_memory("memory.safetensors")
            with torch.no_grad():
                assert torch.equal(model(**inputs).logits, expected)
                assert torch.equal(model(inputs["input_ids"], visual_memory=memory).logits, expected)
        assert "bitsandbytes" not in sys.modules, "it is for those who ask for it"
        model.save_pretrained("again")
        model = transformers.AutoModel.from_pretrained("again", trust_remote_code=True)
        with torch.no_grad():
            assert torch.equal(model(**inputs).logits, expected)

        answer = transformers.pipeline("image-text-to-text", "adapter", trust_remote_code=True)
        message = {"role": "user", "content": [{"type": "image", "image": image}, {"type": "text", "text": "what?"}]}
        options = {"max_new_tokens": 4, "suppress_tokens": [0, 1, 2, 3]}
        chat = answer([message], return_full_text=False, generate_kwargs=dict(options))
        plain = answer(image, text="what?\\nResponse:", return_full_text=False, generate_kwargs=dict(options))
        assert chat[0]["generated_text"] == plain[0]["generated_text"]
        tokens = processor.tokenizer(chat[0]["generated_text"], add_special_tokens=False).input_ids
        print(len(tokens))
        """,
        saved,
    )
    assert int(answer) == 4
    assert sorted(path.name for path in (saved / "again").iterdir()) == saved_names(saved)


def saved_names(saved) -> list[str]:
    return sorted(path.name for path in (saved / "adapter").iterdir())


def test_the_folder_holds_the_adapter_alone(saved):
    folder = saved / "adapter"
    assert saved_names(saved) == sorted(
        [*CODE_FILES, "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors"]
        + ["processor_config.json", "tokenizer.json", "tokenizer_config.json"]
    )
    tensors = load_file(folder / "model.safetensors")
    assert {name.split(".")[1] for name in tensors} == set(dehvf.adapters.ADAPTER_MODULES)
    # The header of a safetensors file names each tensor, which weighs in tiny models alone
    adapter_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    header_bytes = 8 + int.from_bytes((folder / "model.safetensors").read_bytes()[:8], "little")
    assert (folder / "model.safetensors").stat().st_size == adapter_bytes + header_bytes
    config = json.loads((folder / "config.json").read_text())
    assert config["vision_model_id"] == str(saved / "vision") and config["text_model_id"] == str(saved / "text")
    assert "vision_model_revision" in config and "text_model_revision" in config
    models = {"AutoModel", "AutoModelForImageTextToText", "AutoModelForMultimodalLM"}
    assert set(config["auto_map"]) == {"AutoConfig", "AutoProcessor", *models}
    assert not any("--" in reference for reference in config["auto_map"].values())


def test_base_tensors_equal_their_own_files(saved):
    model = AutoModel.from_pretrained(saved / "adapter", trust_remote_code=True)
    text = load_file(saved / "text" / "model.safetensors")
    vision = load_file(saved / "vision" / "model.safetensors")
    language_model = model.model.language_model
    assert torch.equal(language_model.layers[1].mlp.up_proj.weight, text["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(language_model.embed_tokens.weight, text["model.embed_tokens.weight"])
    assert torch.equal(model.lm_head.weight, text["lm_head.weight"])
    name = next(name for name in vision if name.endswith("encoder.layers.2.mlp.fc1.weight"))
    assert torch.equal(model.model.vision_tower.encoder.layers[2].mlp.fc1.weight, vision[name])


def test_a_clip_with_both_towers_gives_its_vision_tower(saved, tmp_path):
    """`openai/clip-vit-large-patch14` holds a text tower too."""
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig

    vision_config = AutoConfig.from_pretrained(saved / "vision")
    text_config = CLIPTextConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=10)
    clip = CLIPModel(CLIPConfig(text_config=text_config.to_dict(), vision_config=vision_config.to_dict()))
    clip.save_pretrained(tmp_path / "clip")
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(tmp_path / "clip", saved / "text", **DEHVF_SIZES)
    expected = dict(clip.vision_model.named_parameters())
    for name, parameter in model.model.vision_tower.named_parameters():
        assert torch.equal(parameter, expected[name]), name


def test_a_revision_of_the_adapters_never_reaches_a_base(saved, monkeypatch):
    model = AutoModel.from_pretrained(saved / "adapter", trust_remote_code=True)
    module = sys.modules[type(model).__module__.replace("modeling", "bases")]
    revisions = {}
    for name in ("AutoModel", "AutoModelForCausalLM", "AutoConfig"):
        original = getattr(module, name).from_pretrained

        def spy(location, *args, original=original, revision=None, **kwargs):
            revisions.setdefault(str(location), set()).add(revision)
            return original(location, *args, **kwargs)

        monkeypatch.setattr(getattr(module, name), "from_pretrained", spy)
    config = AutoConfig.from_pretrained(saved / "adapter", trust_remote_code=True)
    config.text_model_revision, config.vision_model_revision = "text-commit", "vision-commit"
    revisions.clear()
    type(model).from_pretrained(saved / "adapter", config=config, revision="adapter-commit")
    assert revisions == {str(saved / "text"): {"text-commit"}, str(saved / "vision"): {"vision-commit"}}


@pytest.mark.parametrize("tie", [True, False])
def test_tied_embeddings_stay_tied(tmp_path, tie):
    vision, text = save_tiny_bases(tmp_path, tie_word_embeddings=tie)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    assert (model.lm_head.weight is model.model.language_model.embed_tokens.weight) == tie


def test_a_head_that_differs_from_tied_embeddings_is_kept(tmp_path):
    """As `transformers` keeps both if a checkpoint has both, whatever its config says."""
    vision, text = save_tiny_bases(tmp_path, tie_word_embeddings=True)
    stock = AutoModelForCausalLM.from_pretrained(text)
    stock.set_output_embeddings(torch.nn.Linear(32, 64, bias=False))
    stock.save_pretrained(text)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    inputs = tiny_inputs()
    expected = AutoModelForCausalLM.from_pretrained(text)(inputs["input_ids"]).logits
    with model.disable_adapter():
        assert torch.equal(model(**inputs).logits, expected)
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    merged = DehvfForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(**inputs).logits, model(**inputs).logits)


def test_values_for_a_base_model_that_have_no_effect_are_named(saved, monkeypatch):
    messages = []
    monkeypatch.setattr(dehvf.bases.logger, "warning", messages.append)
    config = dehvf.DehvfConfig.from_pretrained(saved / "adapter")
    DehvfForConditionalGeneration.from_pretrained(saved / "adapter", config=config)
    assert not messages
    config.text_config.rms_norm_eps = 1.0
    DehvfForConditionalGeneration.from_pretrained(saved / "adapter", config=config)
    (message,) = messages
    assert "have no effect: `rms_norm_eps=1.0` (there 1e-06)" in message


@pytest.mark.parametrize("sizes", [("1GB", "30KB", "1GB"), ("30KB", "60KB", "1GB", "30KB")], ids=str)
def test_base_models_that_are_merged_again_replace_all_files_of_the_earlier_ones(sizes, tmp_path):
    model = model_on_new_bases(tmp_path)
    for size in sizes:
        with torch.no_grad():
            for parameter in (model.lm_head.weight, model.model.vision_tower.encoder.layers[0].mlp.fc1.weight):
                parameter.mul_(1.5)
        model.save_pretrained(tmp_path / "merged", merge_base=True, max_shard_size=size)
        again = DehvfForConditionalGeneration.from_pretrained(tmp_path / "merged")
        assert torch.equal(again(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
        for folder in (tmp_path / "merged" / "text_model", tmp_path / "merged" / "vision_model"):
            index, files = folder / "model.safetensors.index.json", {"model.safetensors"}
            if index.exists():
                files = set(json.loads(index.read_text())["weight_map"].values())
            assert {file.name for file in folder.glob("*.safetensors")} == files


def test_bases_can_be_taken_from_elsewhere(saved, tmp_path):
    other_vision, other_text = save_tiny_bases(tmp_path, seed=1)
    model = AutoModel.from_pretrained(
        saved / "adapter", trust_remote_code=True, vision_model=other_vision, text_model=str(other_text)
    )
    assert torch.equal(model.lm_head.weight, load_file(other_text / "model.safetensors")["lm_head.weight"])
    assert model.config.text_model_id == str(saved / "text"), "what the base is has not changed, only where"
    adapters = load_file(saved / "adapter" / "model.safetensors")
    assert all(torch.equal(tensor, adapters[name]) for name, tensor in model.adapter_state_dict().items())


def test_saving_with_a_base_that_the_config_does_not_name_warns(saved, tmp_path, monkeypatch):
    messages = []
    monkeypatch.setattr(dehvf.adapters.logger, "warning_once", messages.append)
    other = save_tiny_bases(tmp_path, seed=1)[1]
    model = DehvfForConditionalGeneration.from_pretrained(saved / "adapter", text_model=other)
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    assert not messages
    model.save_pretrained(tmp_path / "saved")
    assert f"The language model was loaded from {other}, but the adapter is saved for {saved / 'text'}" in messages[0]
    model.config.text_model_id = str(other)
    model.save_pretrained(tmp_path / "saved")
    assert len(messages) == 1
    config = dehvf.DehvfConfig.from_pretrained(saved / "adapter")
    config.text_model_id = None
    model = DehvfForConditionalGeneration.from_pretrained(saved / "adapter", config=config, text_model=other)
    model.save_pretrained(tmp_path / "saved")
    assert len(messages) == 1
    again = DehvfForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


def test_dtype_is_that_of_the_bases_and_adapters_are_fp32(saved):
    model = AutoModelForImageTextToText.from_pretrained(
        saved / "adapter", trust_remote_code=True, dtype=torch.bfloat16, attn_implementation="eager"
    )
    assert model.model.language_model.config._attn_implementation == "eager"
    adapters = model.adapter_state_dict()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if name in adapters else torch.bfloat16), name
        assert parameter.requires_grad == (name in adapters), name
    assert model(**tiny_inputs()).logits.isfinite().all()


@pytest.mark.parametrize("prefix", ["model", "model.language_model"])
def test_a_dispatched_base_reads_the_memory(prefix, saved, tmp_path):
    """accelerate's hooks sit on the base's modules before they are extended."""
    expected = torch.load(saved / "logits.pt")
    device_map = {f"{prefix}.{name}": "cpu" for name in ("embed_tokens", "norm", "rotary_emb")} | {"lm_head": "cpu"}
    device_map |= {f"{prefix}.layers.{index}": "cpu" if index < 2 else "disk" for index in range(4)}
    if prefix != "model":  # as `infer_auto_device_map` of accelerate makes it for the loaded model
        device_map |= {"model.vision_tower": "cpu", "model.projector": "cpu"}
    model = AutoModel.from_pretrained(
        saved / "adapter", trust_remote_code=True, device_map=device_map, offload_folder=tmp_path
    )
    assert hasattr(model.model.language_model.layers[3].mlp.up_proj, "_hf_hook")
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, expected)
    model = AutoModel.from_pretrained(saved / "adapter", trust_remote_code=True)
    dispatch_model(model, {"model": "disk", "lm_head": "cpu"}, main_device="cpu", offload_dir=tmp_path / "all")
    with torch.no_grad():
        torch.testing.assert_close(model(**tiny_inputs()).logits, expected)


def test_the_checkout_is_the_7b_preset():
    config = AutoConfig.from_pretrained(ROOT, trust_remote_code=True)
    assert (config.text_model_id, config.vision_model_id) == ("huggyllama/llama-7b", "openai/clip-vit-large-patch14")
    assert (config.text_config.num_hidden_layers, config.text_config.hidden_size) == (32, 4096)
    assert (config.vision_config.num_hidden_layers, config.num_patches) == (24, 256)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config, trust_remote_code=True)
    assert hasattr(model, "generate")


def test_processor_is_made_from_the_bases_where_none_was_saved(saved, tmp_path):
    shutil.copytree(saved / "adapter", tmp_path / "bare")
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        (tmp_path / "bare" / name).unlink()
    processor = AutoProcessor.from_pretrained(tmp_path / "bare", trust_remote_code=True)
    assert type(processor).__name__ == "DehvfProcessor"
    assert processor.tokenizer("abc").input_ids == [1, 4, 5, 6]


# --- what must be refused ---


@pytest.fixture
def broken(saved, tmp_path):
    """A copy of the saved folder to break."""
    shutil.copytree(saved, tmp_path / "copy")
    config = json.loads((tmp_path / "copy" / "adapter" / "config.json").read_text())
    ids = {f"{key}_model_id": str(tmp_path / "copy" / key) for key in ("vision", "text")}
    (tmp_path / "copy" / "adapter" / "config.json").write_text(json.dumps(config | ids))
    return tmp_path / "copy"


def rewrite(file, change):
    """Changes the tensors of a file, or the values of a config."""
    if file.suffix == ".json":
        file.write_text(json.dumps(json.loads(file.read_text()) | change))
    else:
        tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})


def drop_layer_2(tensors):
    tensors.pop(next(name for name in tensors if ".2." in name))


@pytest.mark.parametrize(
    "file, change, message",
    [
        ("adapter", lambda tensors: tensors.pop("model.projector.up.bias"), "missing: model.projector.up.bias"),
        ("adapter", lambda tensors: tensors.update({"model.extra": torch.zeros(1)}), "unexpected: model.extra"),
        (
            "adapter",
            lambda tensors: tensors.update({"model.memory_slots.key": torch.zeros(3, 32)}),
            r"wrong shape: model.memory_slots.key is \(3, 32\), the config asks for \(20, 32\)",
        ),
        # `transformers` would fill these with random numbers
        ("vision", drop_layer_2, "vision lacks 1 tensors of the .*layers.2"),
        ("text", drop_layer_2, "text lacks 1 tensors of the .*layers.2"),
    ],
)
def test_files_that_do_not_fit_are_refused(broken, file, change, message):
    rewrite(broken / file / "model.safetensors", change)
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(broken / "adapter", trust_remote_code=True)


@pytest.mark.parametrize("name, value", [("hidden_size", 64), ("num_hidden_layers", 5), ("vocab_size", 65)])
def test_a_base_model_of_another_shape_is_refused(broken, name, value):
    rewrite(broken / "text" / "config.json", {name: value})
    with pytest.raises(ValueError, match=f"`{name}={value}`, but the adapter was made for"):
        AutoModel.from_pretrained(broken / "adapter", trust_remote_code=True)


def test_missing_files_are_named(broken, tmp_path):
    def load(folder, **options):
        return AutoModel.from_pretrained(folder, trust_remote_code=True, **options)

    with pytest.raises(OSError, match="nowhere"):
        load(broken / "adapter", text_model=str(tmp_path / "nowhere"))
    (broken / "adapter" / "model.safetensors").unlink()
    for folder in (broken / "adapter", ROOT):
        with pytest.raises(OSError, match="no adapter to load.*from_vision_text_pretrained"):
            load(folder)
    tiny_model().save_pretrained(tmp_path / "without ids")
    with pytest.raises(ValueError, match="Pass `vision_model=`"):
        load(tmp_path / "without ids")


def test_an_incomplete_model_is_not_saved(tmp_path):
    model, folder = tiny_model(), tmp_path / "saved"
    divided = {name: tensor.new_empty(0) for name, tensor in model.state_dict().items()}  # as ZeRO-3 leaves them
    with pytest.raises(ValueError, match="missing or empty.*ZeRO-3"):
        model.save_pretrained(folder, state_dict=divided)
    with pytest.raises(ValueError, match="`model.push_to_hub.repo_id.` uploads the adapter, processor and card"):
        model.save_pretrained(folder, push_to_hub=True)
    for name in ("variant", "merge_bases"):
        with pytest.raises(TypeError, match=f"no argument `{name}`. It always writes one `model.safetensors`"):
            model.save_pretrained(folder, **{name: "fp16"})
    model.lm_head.weight.data = torch.empty(0)
    with pytest.raises(ValueError, match="in a single process, and merge there"):
        model.save_pretrained(folder, merge_base=True)
    with pytest.raises(ValueError, match="has the dtype torch.float64. Convert it to one of"):
        tiny_model().double().save_pretrained(folder)
    model = tiny_model()
    model.config.fuser_hidden_size = 8
    with pytest.raises(ValueError, match="this model does not fit its config .*\n  wrong shape: model.fuser."):
        model.save_pretrained(folder)
    assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()


def test_a_save_that_fails_leaves_the_old_adapter(tmp_path, monkeypatch):
    model = model_on_new_bases(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved" / "config.json").read_bytes()
    model.config.memory_scale = 9.0
    monkeypatch.setattr(dehvf.adapters, "write_tensors", MagicMock(side_effect=OSError("No space left on device")))
    with pytest.raises(OSError, match="No space"):
        model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "config.json").read_bytes() == before


def test_threads_may_write_the_same_file(tmp_path):
    file, tensors = tmp_path / "a.safetensors", {"a": torch.ones(1000)}
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: dehvf.files.write_tensors(tensors, file), range(200)))
    assert torch.equal(dehvf.files.read_tensors(file)[0]["a"], tensors["a"]) and os.listdir(tmp_path) == [file.name]


@pytest.mark.parametrize("values", [{}, {"tie_word_embeddings": True}, {"vision_type": "dinov2"}], ids=str)
def test_a_merged_folder_needs_no_other(tmp_path, values):
    bases = save_tiny_bases(tmp_path, **values)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **DEHVF_SIZES)
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    for folder in bases:
        shutil.rmtree(folder)
    moved = shutil.move(tmp_path / "merged", tmp_path / "elsewhere")
    again = AutoModel.from_pretrained(moved, trust_remote_code=True)
    assert torch.equal(again(**tiny_inputs()).logits, model(**tiny_inputs()).logits)
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert AutoProcessor.from_pretrained(moved, trust_remote_code=True)
    again.save_pretrained(moved)
    assert AutoModel.from_pretrained(moved, trust_remote_code=True), "bases that lie there stay"
    # What is saved of it elsewhere names the same ones as before
    again.save_pretrained(tmp_path / "adapter")
    assert AutoProcessor.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    with pytest.raises(OSError, match="text"):
        AutoModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    given = {"vision_model": moved / "vision_model", "text_model": moved / "text_model"}
    third = AutoModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True, **given)
    assert torch.equal(third(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


@pytest.mark.parametrize("vision_type", VISION_BACKBONES)
def test_the_image_size_is_saved_with_the_adapter_and_its_processor(tmp_path, vision_type):
    bases = save_tiny_bases(tmp_path, vision_type=vision_type)
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **DEHVF_SIZES, image_size=8)
    model.save_pretrained(tmp_path / "adapter")
    inputs = tiny_inputs(image_size=8)
    again = AutoModel.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    for _ in range(2):  # the saved processor, and one made of those of the bases
        processor = AutoProcessor.from_pretrained(tmp_path / "adapter", trust_remote_code=True)
        found = processor(images=[Image.new("RGB", (30, 20))], return_tensors="pt")
        assert found["pixel_values"].shape == (1, 3, 8, 8)
        (tmp_path / "adapter" / "processor_config.json").unlink(missing_ok=True)


def test_offloaded_base_models_are_merged_into_shards(tmp_path):
    model_on_new_bases(tmp_path).save_pretrained(tmp_path / "a")
    offloaded = DehvfForConditionalGeneration.from_pretrained(
        tmp_path / "a", device_map={"": "disk"}, offload_folder=tmp_path / "offload"
    )
    offloaded.save_pretrained(tmp_path / "merged", merge_base=True, max_shard_size="30KB")
    assert [path.name for path in (tmp_path / "merged").glob("*.safetensors*")] == ["model.safetensors"]
    assert len([*(tmp_path / "merged" / "text_model").glob("*.safetensors")]) > 1
    merged = DehvfForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged(**tiny_inputs()).logits, offloaded(**tiny_inputs()).logits)


def model_on_new_bases(folder, seed: int = 0):
    bases = save_tiny_bases(folder, seed=seed)
    return DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **DEHVF_SIZES)


def test_a_custom_processor_is_saved_with_the_adapters(tmp_path):
    model = model_on_new_bases(tmp_path)
    model.save_pretrained(tmp_path / "first")
    processor = AutoProcessor.from_pretrained(tmp_path / "first", trust_remote_code=True)
    processor.chat_template = "{{ 'mine' }}"
    processor.save_pretrained(tmp_path / "first")
    model.config.text_model_id = "org/name"  # of which the language model is a copy
    model.save_pretrained(tmp_path / "first")
    loaded = DehvfForConditionalGeneration.from_pretrained(tmp_path / "first", text_model=tmp_path / "text")
    loaded.save_pretrained(tmp_path / "second")
    loaded.save_pretrained(tmp_path / "first", merge_base=True)
    for name in ("first", "second"):
        found = AutoProcessor.from_pretrained(tmp_path / name, trust_remote_code=True)
        assert found.chat_template == "{{ 'mine' }}", name


@pytest.mark.parametrize("values", [{"max_images": 2}, {"image_size": IMAGE_SIZE // 2}])
def test_the_processor_is_saved_with_the_values_of_the_model(tmp_path, values):
    model_on_new_bases(tmp_path).save_pretrained(tmp_path / "first")
    model = DehvfForConditionalGeneration.from_pretrained(tmp_path / "first", **values)
    for folder in ("first", "second"):  # the first already has a processor, with other values
        model.save_pretrained(tmp_path / folder)
        processor = DehvfProcessor.from_pretrained(tmp_path / folder)
        image = Image.new("RGB", (50, 40))
        images = [[image] * model.config.max_images]
        assert model(**processor(images=images, text="a", return_tensors="pt")).logits.isfinite().all()
    assert DehvfProcessor.from_pretrained(tmp_path / "first", image_size=32).image_processor.crop_size["height"] == 32


@pytest.mark.parametrize(
    "name, value",
    [("num_groups", 1), ("layer_mapping", "random"), ("fuser_num_heads", 2), ("fuser_hidden_act", "relu")]
    + [("vision_adapter_scale", 1.0), ("vision_adapter_dropout", 0.0), ("layer_fusion", "mean")],
)
def test_a_value_that_a_model_does_not_use_is_not_saved_with_it(name, value, tmp_path):
    model = tiny_model()
    setattr(model.config, name, value)
    with pytest.raises(ValueError, match=f"`config.{name}` was changed from .* to {value} after.*Change it back"):
        model.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_an_invalid_generation_config_is_found_before_anything_is_replaced(tmp_path):
    model = model_on_new_bases(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    before = {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir() if file.is_file()}
    model.generation_config.temperature = 0.7  # without `do_sample`
    model.config.memory_scale = 3.0
    with pytest.raises(ValueError, match="GenerationConfig is invalid"):
        model.save_pretrained(tmp_path / "saved")
    assert {file.name: file.read_bytes() for file in (tmp_path / "saved").iterdir() if file.is_file()} == before


def edit_generation_config(folder, **values):
    file = folder / "generation_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


@pytest.mark.parametrize(
    "values", [{"temperature": 0.9, "top_p": 0.6}, {"pad_token_id": -1, "length_penalty": 2.0, "output_scores": True}]
)
def test_generation_values_without_effect_of_a_base_or_an_adapter_do_not_block_saving(tmp_path, monkeypatch, values):
    vision, text = save_tiny_bases(tmp_path)
    edit_generation_config(text, **values)
    messages = []
    monkeypatch.setattr(dehvf.bases.logger, "warning", messages.append)

    def check_and_save(model, folder, source):
        assert len(messages) == 1 and f"The generation_config.json of {source} has" in messages.pop()
        model.generation_config.eos_token_id = [2, 7]
        for merge_base in (False, True):
            model.save_pretrained(folder, merge_base=merge_base)
        assert json.loads((folder / "generation_config.json").read_text()).keys().isdisjoint(values)

    model = DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **DEHVF_SIZES)
    check_and_save(model, tmp_path / "new", text)
    causal_lm = AutoModelForCausalLM.from_pretrained(text)
    vision_tower = AutoModel.from_pretrained(vision)
    check_and_save(DehvfForConditionalGeneration(model.config, vision_tower, causal_lm), tmp_path / "given", text)
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "generation_config.json").unlink()  # so that the base's is used
    model = DehvfForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    check_and_save(model, tmp_path / "loaded", text)
    edit_generation_config(tmp_path / "new", **values)
    model.load_adapter(tmp_path / "new", "edited")
    model.set_adapter("edited")
    check_and_save(model, tmp_path / "switched", tmp_path / "new")
    edit_generation_config(tmp_path / "loaded", **values)
    check_and_save(
        DehvfForConditionalGeneration.from_pretrained(tmp_path / "loaded"), tmp_path / "again", tmp_path / "loaded"
    )


@pytest.mark.parametrize(
    "name, value", [("visual_scale", 0.3), ("memory_scale", 2.0), ("memory_form", "materialised")]
)
def test_values_that_a_model_uses_may_be_changed(name, value, tmp_path):
    model = model_on_new_bases(tmp_path)
    setattr(model.config, name, value)
    model.save_pretrained(tmp_path / "saved")
    again = DehvfForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**tiny_inputs()).logits, model(**tiny_inputs()).logits)


def test_a_folder_that_was_used_for_other_bases_gets_a_new_processor(tmp_path):
    for seed, side in enumerate(("one", "other")):
        (tmp_path / side).mkdir()
        model = model_on_new_bases(tmp_path / side, seed=seed)
        if side == "one":
            model.save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "other" / "text")
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained(tmp_path / "other" / "text")
    model.save_pretrained(tmp_path / "saved")
    assert "<new>" in DehvfProcessor.from_pretrained(tmp_path / "saved").tokenizer.get_vocab()


def test_each_folder_is_loaded_with_its_own_code(saved, tmp_path):
    models = []
    for name, factor in (("old", 1), ("new", 2)):
        shutil.copytree(saved / "adapter", tmp_path / name)
        code = (tmp_path / name / "modeling_dehvf.py").read_text()
        assert code.count("F.silu(torch.einsum(") == 1
        code = code.replace("F.silu(torch.einsum(", f"{factor} * F.silu(torch.einsum(")
        (tmp_path / name / "modeling_dehvf.py").write_text(code)
        models.append(AutoModel.from_pretrained(tmp_path / name, trust_remote_code=True))
    one, two = (model.get_image_features(tiny_inputs()["pixel_values"]).pooler_output for model in models)
    torch.testing.assert_close(two[..., :-1], 2 * one[..., :-1])
    models[1].save_pretrained(tmp_path / "again")
    assert "2 * F.silu(" in (tmp_path / "again" / "modeling_dehvf.py").read_text()


def test_bases_in_a_folder_are_taken_for_those_of_the_adapters_only_if_they_are(tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "other").mkdir()
    one, other = model_on_new_bases(tmp_path / "one"), model_on_new_bases(tmp_path / "other", seed=1)
    one.save_pretrained(tmp_path / "saved", merge_base=True)
    one.save_pretrained(tmp_path / "saved")
    assert AutoConfig.from_pretrained(tmp_path / "saved", trust_remote_code=True).merged_base
    other.save_pretrained(tmp_path / "saved")
    logits = DehvfForConditionalGeneration.from_pretrained(tmp_path / "saved")(**tiny_inputs()).logits
    assert torch.equal(logits, other(**tiny_inputs()).logits)
    (tmp_path / "unrelated" / "text_model").mkdir(parents=True)
    one.save_pretrained(tmp_path / "unrelated")
    assert not AutoConfig.from_pretrained(tmp_path / "unrelated", trust_remote_code=True).merged_base


@pytest.mark.parametrize("name, value", [("memory_scale", float("nan")), ("fuser_num_heads", 3), ("image_size", 17)])
def test_a_value_that_replaces_one_of_the_config_is_checked(saved, name, value):
    for loader in (AutoModel, AutoConfig):
        with pytest.raises(ValueError, match=f"`{name}"):
            loader.from_pretrained(saved / "adapter", trust_remote_code=True, **{name: value})


@pytest.mark.parametrize("loader", [AutoModel, DehvfForConditionalGeneration], ids=["auto", "class"])
def test_arguments_of_from_pretrained_work_as_in_transformers(saved, loader):
    options = {"trust_remote_code": True, "output_loading_info": True, "torch_dtype": torch.bfloat16}
    options["generation_config"] = GenerationConfig(max_new_tokens=3)
    model, info = loader.from_pretrained(saved / "adapter", **options)
    assert model.lm_head.weight.dtype == torch.bfloat16 and model.generation_config.max_new_tokens == 3
    assert info.keys() >= {"missing_keys", "unexpected_keys"} and not any(info.values())


def test_a_config_may_be_given_by_its_folder(saved, tmp_path):
    config = dehvf.DehvfConfig.from_pretrained(saved / "adapter")
    config.memory_scale = 0.25
    config.save_pretrained(tmp_path)
    for place in (config, tmp_path, str(tmp_path)):
        model = DehvfForConditionalGeneration.from_pretrained(saved / "adapter", config=place)
        assert model.config.memory_scale == model.model.config.memory_scale == 0.25
    assert DehvfForConditionalGeneration.from_pretrained(saved / "adapter").config.memory_scale == 0.5
    DehvfForConditionalGeneration.from_pretrained(saved / "adapter", config=config).config.memory_scale = 0.75
    assert config.memory_scale == 0.25


@pytest.mark.parametrize("loader", [AutoModel, DehvfForConditionalGeneration], ids=["auto", "class"])
@pytest.mark.parametrize("field, value", [("memory_scale", 0.7), ("max_images", 2)])
def test_a_field_that_is_given_together_with_a_config_is_refused(saved, loader, field, value):
    config = dehvf.DehvfConfig.from_pretrained(saved / "adapter")
    options = {"config": config, "trust_remote_code": True, field: value}
    with pytest.raises(TypeError, match=f"given together with a config.*`config.{field} = {value}`"):
        loader.from_pretrained(saved / "adapter", **options)


# --- terminals, other users, changed base models ---


def run_in_terminal(folder, *command) -> str:
    """What a command prints that has a terminal for its input and output, at which nobody answers."""
    ours, theirs = pty.openpty()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": str(ROOT)}
    command = [sys.executable, *map(str, command)]
    process = subprocess.Popen(command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    printed = b""
    with open(ours, "rb", buffering=0) as terminal, suppress(OSError):  # as reading ends when the process has
        while chunk := terminal.read(4096):
            printed += chunk
    assert process.wait() == 0, printed[-3000:].decode()
    return printed.decode()


def test_nothing_asks_for_confirmation_in_a_terminal(saved, scienceqa, tmp_path):  # noqa: F811
    flags = tiny_flags(tmp_path, scienceqa[0], tmp_path / "run", adapter=tmp_path / "again", max_steps=1)
    code = f"""if True:
        import sys
        from transformers import AutoModel, AutoProcessor
        model = AutoModel.from_pretrained({str(saved / "adapter")!r}, trust_remote_code=True)
        model.save_pretrained("again")
        model.save_pretrained("merged", merge_base=True)
        AutoProcessor.from_pretrained("again", trust_remote_code=True).save_pretrained("processor")
        sys.path.insert(0, {str(ROOT)!r})
        import train
        train.main({flags})
        print("all " + "done")
    """
    printed = run_in_terminal(tmp_path, "-c", code)
    assert "all done" in printed and "custom code" not in printed and "[y/N]" not in printed
    assert (tmp_path / "run" / "results.json").is_file()


def test_another_user_can_read_what_is_saved(saved, tmp_path):
    model = AutoModel.from_pretrained(saved / "adapter", trust_remote_code=True)
    before = os.umask(0o002)
    try:
        model.save_pretrained(tmp_path / "saved", merge_base=True)
        model.save_visual_memory(
            model.get_image_features(tiny_inputs()["pixel_values"]), tmp_path / "saved" / "memory"
        )
    finally:
        os.umask(before)
    files = [path for path in (tmp_path / "saved").rglob("*") if path.is_file()]
    assert len(files) > 20 and {oct(path.stat().st_mode & 0o777) for path in files} == {oct(0o664)}


@pytest.mark.skipif(not hasattr(os, "setresuid"), reason="this system does not let a process change its user")
def test_a_file_that_this_user_must_not_read_is_named():
    with TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        vision, text = save_tiny_bases(Path(folder))
        dehvf.bases.load_bases(tiny_config(), vision, text)  # imports what the user below may be unable to
        file = text / "model.safetensors"
        file.chmod(0)
        if is_root := os.getuid() == 0:  # who may read every file
            os.setresuid(65534, 65534, 0)
        try:
            with pytest.raises(PermissionError, match=str(file)):
                dehvf.files.read_tensors(file)
            with pytest.raises(OSError, match=f"language model .*no permission to read {file}.\n.*`chmod a.r {file}`"):
                dehvf.bases.load_bases(tiny_config(), vision, text)
        finally:
            if is_root:
                os.setresuid(0, 0, 0)


def merge_lora(model):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model.model.language_model = get_peft_model(model.model.language_model, config).merge_and_unload()


def set_row(model):
    with torch.no_grad():
        model.get_input_embeddings().weight[41] += 0.1


def train_head(model):
    with torch.no_grad():
        model.lm_head.weight.requires_grad_(True).add_(0.01)


def train_adapter(model):
    model.train()(**tiny_inputs(), labels=tiny_inputs()["input_ids"]).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize(
    "change, changed",
    [
        (merge_lora, "model.language_model.layers.0.self_attn.q_proj.weight"),
        (lambda model: model.resize_token_embeddings(70), "lm_head.weight"),
        (set_row, "model.language_model.embed_tokens.weight"),
        (lambda model: set_row(model.to(torch.bfloat16)), "model.language_model.embed_tokens.weight"),
        (train_head, "lm_head.weight"),
        (lambda model: None, None),
        (lambda model: model.to(torch.bfloat16), None),
        (lambda model: model.generate(**tiny_inputs(), max_new_tokens=2), None),
        (train_adapter, None),
    ],
)
def test_a_changed_base_model_is_named_when_only_the_adapter_is_saved(tmp_path, monkeypatch, change, changed):
    model_on_new_bases(tmp_path).save_pretrained(tmp_path / "first")
    model, messages = DehvfForConditionalGeneration.from_pretrained(tmp_path / "first"), []
    monkeypatch.setattr(dehvf.adapters.logger, "warning", messages.append)
    change(model)
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    model.save_pretrained(tmp_path / "merged")
    assert not messages
    model.save_pretrained(tmp_path / "second")
    assert len(messages) == (changed is not None)
    assert all(f"such as {changed}" in message and "merge_base=True" in message for message in messages)
    merged = DehvfForConditionalGeneration.from_pretrained(tmp_path / "merged")
    assert torch.equal(merged.lm_head.weight, model.lm_head.weight.to(merged.lm_head.weight.dtype))
    messages.clear()
    merged.save_pretrained(tmp_path / "merged")
    assert not messages
    merged.save_pretrained(tmp_path / "third")
    assert [f"loaded from their copies in {tmp_path / 'merged'}" in message for message in messages] == [True]


def test_base_models_that_were_not_loaded_are_named_when_only_the_adapter_is_saved(tmp_path, monkeypatch):
    loaded, messages = model_on_new_bases(tmp_path), []
    monkeypatch.setattr(dehvf.adapters.logger, "warning", messages.append)
    model = DehvfForConditionalGeneration(loaded.config)
    model.save_pretrained(tmp_path / "merged", merge_base=True)
    model.save_pretrained(tmp_path / "merged")
    assert not messages
    for place in (loaded.config.text_model_id, None):
        model.config.text_model_id = place
        model.save_pretrained(tmp_path / "saved")
        assert f"given to its constructor, or made at random. Only the adapter is saved, for {place}" in messages[0]
        messages.clear()


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
def test_a_folder_with_an_adapter_of_peft_is_refused(tmp_path):
    model_on_new_bases(tmp_path).save_pretrained(tmp_path / "saved")
    model = AutoModel.from_pretrained(tmp_path / "saved", trust_remote_code=True)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"])).save_pretrained(tmp_path / "lora")
    (tmp_path / "alone").mkdir()
    shutil.copy(tmp_path / "lora" / "adapter_config.json", tmp_path / "alone")
    calls = [lambda folder: AutoModel.from_pretrained(folder, trust_remote_code=True)]
    for load in (DehvfForConditionalGeneration.from_pretrained, partial(model.load_adapter, adapter_name="lora")):
        calls += [load, lambda folder, load=load: load(folder.parent, subfolder=folder.name)]
    shutil.copytree(tmp_path / "saved", tmp_path / "both")
    shutil.copy(tmp_path / "lora" / "adapter_config.json", tmp_path / "both")
    for folder, load in itertools.product((tmp_path / name for name in ("lora", "alone", "both")), calls):
        with pytest.raises(ValueError, match=f"{folder} has an adapter of `peft`.*PeftModel.from_pretrained"):
            load(folder)


@pytest.mark.parametrize("change", [set_row, lambda model: model.get_input_embeddings().weight.data[39999].fill_(5.0)])
def test_a_changed_row_of_large_embeddings_is_named(change, tmp_path, monkeypatch):
    bases = save_tiny_bases(tmp_path, vocab_size=40000)
    model, messages = DehvfForConditionalGeneration.from_vision_text_pretrained(*bases, **DEHVF_SIZES), []
    monkeypatch.setattr(dehvf.adapters.logger, "warning", messages.append)
    change(model)
    model.save_pretrained(tmp_path / "saved")
    assert (
        "1 tensors of the base models have changed or been overwritten" in messages[0]
        and "embed_tokens.weight" in messages[0]
    )


def test_an_adapter_on_resized_embeddings_is_said_to_need_them(tmp_path, monkeypatch):
    model, messages = model_on_new_bases(tmp_path), []
    monkeypatch.setattr(dehvf.adapters.logger, "warning", messages.append)
    model.resize_token_embeddings(70)
    model.save_pretrained(tmp_path / "saved")
    assert "the adapter cannot be loaded, since" in messages[0] and "merge_base=True" in messages[0]


def test_copies_of_base_models_are_compared_by_their_weights(tmp_path, monkeypatch):
    changed, plain, messages = model_on_new_bases(tmp_path), model_on_new_bases(tmp_path), []
    monkeypatch.setattr(dehvf.adapters.logger, "warning", messages.append)
    with torch.no_grad():
        for parameter in changed.model.language_model.parameters():
            parameter.mul_(1.2)
    load, inputs = DehvfForConditionalGeneration.from_pretrained, tiny_inputs()
    changed.save_pretrained(tmp_path / "changed", merge_base=True)
    plain.save_pretrained(tmp_path / "plain", merge_base=True)
    load(tmp_path / "changed").save_pretrained(tmp_path / "plain")
    assert "loaded from their copies in" in messages.pop()
    load(tmp_path / "changed", vision_model=tmp_path / "vision").save_pretrained(tmp_path / "third")
    assert "loaded from their copies in" in messages.pop()
    plain.save_pretrained(tmp_path / "changed")
    assert torch.equal(load(tmp_path / "changed")(**inputs).logits, plain(**inputs).logits)
    assert not messages


@pytest.mark.parametrize(
    "tensor_of",
    [
        lambda model: model.lm_head.weight,
        lambda model: model.get_input_embeddings().weight[-1:],
        lambda model: model.model.vision_tower.encoder.layers[5].mlp.fc2.weight[-1:],
    ],
    ids=["head", "last token", "last row of the encoder"],
)
def test_copies_of_base_models_are_compared_to_the_last_value(tmp_path, tensor_of):
    changed, plain = model_on_new_bases(tmp_path), model_on_new_bases(tmp_path)
    tensor_of(changed).data.mul_(-1)
    changed.save_pretrained(tmp_path / "saved", merge_base=True)
    changed.model.save_pretrained(tmp_path / "saved")
    assert dehvf.DehvfConfig.from_pretrained(tmp_path / "saved").merged_base
    plain.save_pretrained(tmp_path / "saved")
    loaded = DehvfForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert not loaded.config.merged_base and torch.equal(tensor_of(loaded), tensor_of(plain))


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # of peft
@pytest.mark.parametrize("part", ["language_model", "vision_tower"])
def test_base_models_with_wrapped_modules_are_not_merged(part, tmp_path):
    model = model_on_new_bases(tmp_path)
    get_peft_model(model, LoraConfig(target_modules=rf".*{part}.*q_proj"))
    with pytest.raises(
        ValueError, match="lacks .* tensors that it is loaded with, such as .*Merge or remove the wrapp"
    ):
        model.save_pretrained(tmp_path / "merged", merge_base=True)
    assert not [*tmp_path.glob("merged/**/*.safetensors")]


def test_an_adapter_that_is_not_finite_replaces_none(tmp_path):
    model = model_on_new_bases(tmp_path)
    model.save_pretrained(tmp_path / "saved")
    before = (tmp_path / "saved" / "model.safetensors").read_bytes()
    visual_memory = model.get_image_features(tiny_inputs()["pixel_values"]).pooler_output
    with torch.no_grad():
        model.model.memory_slots.key[0, 0] = torch.nan
    with pytest.raises(ValueError, match="`model.memory_slots.key` has infinite or NaN values. Nothing was written"):
        model.save_pretrained(tmp_path / "saved")
    assert (tmp_path / "saved" / "model.safetensors").read_bytes() == before
    with pytest.raises(ValueError, match="`visual_memory` has infinite or NaN values"):
        model.save_visual_memory(visual_memory * torch.nan, tmp_path / "memory")
    assert not (tmp_path / "memory").exists()


def test_a_custom_processor_is_found_from_another_folder_or_named_as_missing(tmp_path, monkeypatch):
    model, messages = model_on_new_bases(tmp_path), []
    model.save_pretrained(tmp_path / "first")
    processor = DehvfProcessor.from_pretrained(tmp_path / "first", image_fit="pad")
    processor.save_pretrained(tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    loaded = DehvfForConditionalGeneration.from_pretrained("first")
    monkeypatch.chdir(tmp_path.parent)
    loaded.save_pretrained(tmp_path / "second")
    assert DehvfProcessor.from_pretrained(tmp_path / "second").image_fit == "pad"
    shutil.rmtree(tmp_path / "first")
    monkeypatch.setattr(dehvf.adapters.logger, "warning", messages.append)
    loaded.save_pretrained(tmp_path / "third")
    assert [
        f"{tmp_path / 'first'}, from which the adapter was loaded, no longer" in message for message in messages
    ] == [True]


def break_tokenizer(text):
    """As one of a newer release of `tokenizers`, which raises `Exception` for it."""
    (text / "tokenizer.json").write_text((text / "tokenizer.json").read_text().replace("WordLevel", "NewModel"))


def remove_crop_size(vision):
    file = vision / "preprocessor_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "crop_size": None}))


@pytest.mark.parametrize(
    "break_file, place",
    [
        (break_tokenizer, "text"),
        (remove_crop_size, "vision"),
        (break_tokenizer, "adapter"),
        (lambda folder: (folder / "tokenizer.json").write_text("version https://git-lfs.github.com/spec"), "adapter"),
    ],
)
def test_an_adapter_is_saved_where_its_processor_cannot_be_loaded(break_file, place, tmp_path, monkeypatch):
    bases, messages = save_tiny_bases(tmp_path), []
    model = DehvfForConditionalGeneration.from_vision_text_pretrained(
        *bases, image_size=32, **{**DEHVF_SIZES, "num_memory_slots": 64}
    )
    if place == "adapter":
        model.save_pretrained(tmp_path / "adapter")
        model = DehvfForConditionalGeneration.from_pretrained(tmp_path / "adapter")
    break_file(tmp_path / place)
    monkeypatch.setattr(dehvf.adapters.logger, "warning_once", messages.append)
    model.save_pretrained(tmp_path / "saved")
    assert [f"{tmp_path / place}" in message and "saved without a processor" in message for message in messages] == [1]
    inputs = tiny_inputs(image_size=32)
    again = DehvfForConditionalGeneration.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)


def test_a_misspelt_argument_is_named_with_a_similar_one(saved):
    vision, text = saved / "vision", saved / "text"
    calls = {
        "`memory_scal` .* Did you mean `memory_scale`": lambda: AutoModel.from_pretrained(
            saved / "adapter", trust_remote_code=True, memory_scal=3
        ),
        "no argument `text_config`, since it reads the configs": lambda: (
            DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, text_config={})
        ),
        "`num_memory_slot` .* Did you mean `num_memory_slots`": lambda: (
            DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, num_memory_slot=3)
        ),
        **{
            f"no argument `{name}`, since it creates a new adapter .* `text_model_revision=`": lambda name=name: (
                DehvfForConditionalGeneration.from_vision_text_pretrained(vision, text, **{name: "main"})
            )
            for name in ("revision", "config", "subfolder", "merged_base")
        },
        "`image_fitt`. Did you mean `image_fit`": lambda: AutoProcessor.from_pretrained(
            saved / "adapter", trust_remote_code=True, image_fitt="pad"
        ),
        "`max_image`. Did you mean `max_images`": lambda: DehvfProcessor.from_vision_text_pretrained(
            vision, text, max_image=2
        ),
    }
    for message, call in calls.items():
        with pytest.raises(TypeError, match=message):
            call()


def test_the_model_without_head_saves_by_its_own_names_and_merges_nothing(tmp_path):
    model = model_on_new_bases(tmp_path).model
    model.save_pretrained(tmp_path / "saved", state_dict=model.state_dict())
    again = type(model).from_pretrained(tmp_path / "saved")
    assert all(torch.equal(tensor, again.state_dict()[name]) for name, tensor in model.state_dict().items())
    with pytest.raises(ValueError, match="Load the adapter as DehvfForConditionalGeneration"):
        model.save_pretrained(tmp_path / "merged", merge_base=True)


def test_an_adapter_is_saved_with_its_own_config_while_others_are_activated(tmp_path):
    model, done = model_on_new_bases(tmp_path), []
    model.save_pretrained(tmp_path / "default")
    other = DehvfForConditionalGeneration.from_vision_text_pretrained(
        tmp_path / "vision", tmp_path / "text", **{**DEHVF_SIZES, "memory_scale": 0.9}
    )
    with torch.no_grad():
        other.model.memory_slots.key.fill_(1.0)
    other.save_pretrained(tmp_path / "other")
    model.load_adapter(tmp_path / "other", "other")

    def switch():
        while not done:
            model.set_adapter("other")
            model.set_adapter("default")

    with ThreadPoolExecutor(1) as pool:
        switching = pool.submit(switch)
        for number in range(10):
            model.save_pretrained(tmp_path / f"saved {number}")
        done.append(True)
        switching.result()
    for number in range(10):
        folder = tmp_path / f"saved {number}"
        is_other = json.loads((folder / "config.json").read_text())["memory_scale"] == 0.9
        assert (load_file(folder / "model.safetensors")["model.memory_slots.key"] == 1).all() == is_other


def test_tensors_whose_values_cannot_be_read_are_not_sampled():
    class Quantized(torch.Tensor):  # like those of torchao
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is torch.Tensor.flatten:
                raise NotImplementedError("dispatch: aten.view")
            return super().__torch_function__(function, types, args, kwargs or {})

    tensors = torch.nn.Linear(2, 2)
    tensors.weight = torch.nn.Parameter(torch.ones(2, 2).as_subclass(Quantized), requires_grad=False)
    samples = dehvf.bases.sample_tensors(tensors.named_parameters())
    assert samples["weight"][2] is None and samples["bias"][2] is not None
