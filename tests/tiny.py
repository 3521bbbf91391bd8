"""Tiny random models for all tests: the whole method at width 32, in milliseconds."""

import os
import subprocess
import sys
from inspect import signature
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    CLIPImageProcessorPil,
    PreTrainedTokenizerFast,
)

from dehvf import ROOT, DehvfConfig, DehvfForConditionalGeneration, DehvfProcessor


IMAGE_SIZE, PATCH_SIZE, NUM_VISION_LAYERS, NUM_TEXT_LAYERS, VOCAB_SIZE = 16, 4, 6, 4, 64
NUM_PATCHES = (IMAGE_SIZE // PATCH_SIZE) ** 2

TEXT_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_TEXT_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # so that a tiny model's logits differ enough to be compared
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TEXT_BACKBONES = {
    "llama": {"tie_word_embeddings": False},
    "mistral": {"sliding_window": None},
    "qwen2": {},
    "qwen3": {},
    "gemma": {},
    "gemma2": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "gemma3_text": {"query_pre_attn_scalar": 8, "sliding_window": 8},
    "phi": {"num_key_value_heads": 4, "partial_rotary_factor": 0.5},
    "starcoder2": {"sliding_window": None},
}
VISION_BACKBONES = {
    "clip_vision_model": {},
    "siglip_vision_model": {},
    "dinov2": {"mlp_ratio": 2, "layerscale_value": 0.5, "drop_path_rate": 0.5},
}
VISION_SIZES = {
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": NUM_VISION_LAYERS,
    "num_attention_heads": 4,
    "image_size": IMAGE_SIZE,
    "patch_size": PATCH_SIZE,
}
DEHVF_SIZES = {
    "num_groups": 2,
    "layer_embedding_size": 8,
    "fuser_hidden_size": 16,
    "fuser_num_layers": 2,
    "fuser_intermediate_size": 32,
    "num_memory_slots": NUM_PATCHES + 4,
    "projector_hidden_size": 8,
    "visual_scale": 1.0,
    "memory_scale": 0.5,
    "vision_adapter_size": 4,
    "initializer_range": 0.2,
}
ABLATIONS = {
    "full": {},
    "no visual prompts": {"visual_prompts": "none"},
    "mean": {"layer_fusion": "mean"},
    "penultimate": {"layer_fusion": "penultimate"},
    "shared": {"visual_prompts": "shared"},
    "keys": {"visual_prompts": "keys"},
    "values": {"visual_prompts": "values"},
    "tokens": {"fuser_query": "tokens"},
    "instruction": {"fuser_query": "instruction"},
    "layer and instruction": {"fuser_query": "layer+instruction"},
    "random mapping": {"layer_mapping": "random", "layer_mapping_seed": 3},
    "explicit mapping": {"layer_mapping": [[1], [0, 2, 3], [3], [1, 3]]},
    "explicit mapping, mean": {"layer_mapping": [[1], [0, 2, 3], [3], [1, 3]], "layer_fusion": "mean"},
}


def run(*command, folder: Path = ROOT) -> str:
    """Runs a command in its own process, in `folder`, with this Python and no network. Returns what it printed."""
    path = os.pathsep.join((os.path.dirname(sys.executable), os.environ["PATH"]))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PATH": path}
    process = subprocess.run(list(map(str, command)), cwd=folder, env=environment, capture_output=True, text=True)
    assert process.returncode == 0, process.stderr[-4000:]
    return process.stdout


def tiny_text_config(model_type: str = "llama", **values):
    return AutoConfig.for_model(model_type, **{**TEXT_SIZES, **TEXT_BACKBONES[model_type], **values})


def tiny_vision_config(vision_type: str, **values):
    return AutoConfig.for_model(vision_type, **{**VISION_SIZES, **VISION_BACKBONES[vision_type], **values})


def tiny_config(model_type: str = "llama", vision_type: str = "clip_vision_model", **values):
    text = {name: values.pop(name) for name in list(values) if name in TEXT_SIZES and name != "initializer_range"}
    return DehvfConfig(
        text_config=tiny_text_config(model_type, **text),
        vision_config=tiny_vision_config(vision_type),
        **{**DEHVF_SIZES, **values},
    )


def tiny_model(model_type: str = "llama", seed: int = 0, **values):
    """
    A model in eval mode. Parts that start at zero get random values, for a zero would hide a wrong term from a test.
    """
    torch.manual_seed(seed)
    model = DehvfForConditionalGeneration(tiny_config(model_type, **values)).eval()
    for parameter in model.parameters():
        if parameter.requires_grad and not parameter.any():
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def vision_parts(dehvf) -> tuple[torch.nn.ModuleList, torch.nn.Module]:
    """The layers and the final norm of the vision encoder of a `DehvfModel`."""
    tower = dehvf.vision_tower
    if tower.config.model_type == "dinov2":
        return tower.encoder.layer, tower.layernorm
    return tower.encoder.layers, tower.post_layernorm


def tiny_inputs(
    batch_size: int = 2, length: int = 7, seed: int = 0, image_size: int = IMAGE_SIZE
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "input_ids": torch.randint(3, VOCAB_SIZE, (batch_size, length), generator=generator),
        "attention_mask": torch.ones(batch_size, length, dtype=torch.long),
        "pixel_values": torch.randn(batch_size, 3, image_size, image_size, generator=generator),
    }


def cache_name(model) -> str:
    """The argument of the language model for its cache, which depends on the release of transformers."""
    parameters = signature(type(model.model.language_model).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def relative_error(tensor: torch.Tensor, expected: torch.Tensor) -> float:
    return ((tensor - expected).norm() / expected.norm()).item()


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, and one for each option's letter with the space before it."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors

    letters = (" A", " B", " C", " D")
    characters = "abcdefghijklmnopqrstuvwxyzABCDEFGHOQRT 0123456789.?:(),\n"
    vocabulary = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", "<unk>", *characters, *letters])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r" [ABCD](?![A-Za-z])|[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_image_processor() -> CLIPImageProcessorPil:
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    return CLIPImageProcessorPil(size={"shortest_edge": IMAGE_SIZE}, crop_size=size)


def tiny_processor():
    return DehvfProcessor(tiny_image_processor(), tiny_tokenizer())


def save_tiny_bases(
    folder: Path,
    seed: int = 0,
    num_vision_layers: int = NUM_VISION_LAYERS,
    vision_type: str = "clip_vision_model",
    **text_values,
) -> tuple[Path, Path]:
    """Writes a vision encoder and a language model as their own repositories would be. Returns their folders."""
    torch.manual_seed(seed)
    vision, text = folder / "vision", folder / "text"
    vision_config = tiny_vision_config(vision_type, num_hidden_layers=num_vision_layers)
    AutoModel.from_config(vision_config).save_pretrained(vision)
    tiny_image_processor().save_pretrained(vision)
    AutoModelForCausalLM.from_config(tiny_text_config(**text_values)).save_pretrained(text)
    tiny_tokenizer().save_pretrained(text)
    return vision, text
