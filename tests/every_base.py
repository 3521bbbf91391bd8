"""
Tiny configs of every causal language model of transformers, and of its vision encoders, and what DEHVF says of each.
`python tests/every_base.py` writes that into docs/bases.md.
"""

import re
import textwrap
from functools import cache
from pathlib import Path

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from dehvf import DehvfConfig, layouts


PAGE = Path(__file__).resolve().parents[1] / "docs" / "bases.md"
BEGIN, END = "<!-- written by tests/every_base.py -->", "<!-- until here -->"

TEXT_TYPES = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name != "dehvf")
VISION_TYPES = (
    *("aimv2_vision_model", "beit", "chinese_clip_vision_model", "clip_vision_model", "convnext", "convnextv2"),
    *("data2vec-vision", "deit", "dinov2", "dinov2_with_registers", "dinov3_convnext", "dinov3_vit", "dpt"),
    *("focalnet", "hiera", "idefics3_vision", "ijepa", "internvl_vision", "levit", "mlcd_vision_model", "mobilevit"),
    *("pixio", "pixtral", "poolformer", "radio", "sam_vision_model", "sapiens2", "siglip2_vision_model"),
    *("siglip_vision_model", "smolvlm_vision", "swin", "tipsv2_vision_model", "videomae", "vit", "vit_mae"),
    *("vit_msn", "vitdet", "yolos"),
)

# Values of a default config that are made small, by the name of the field or the end of it
TEXT_SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "intermediate_size": 48,
    "lora_rank": 16,
    "ffn_dim": 48,
    "dff": 48,
    "n_inner": 48,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_expand": 2, "mamba_d_state": 8, "mamba_n_groups": 1}
LATENT = {"num_key_value_heads": 4, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
# What a type needs besides
TEXT_VALUES = {
    "bamba": {**MAMBA, "attn_layer_indices": [1, 3]},
    "codegen": {"rotary_dim": 4},
    "cohere_compass_text": {"rope_parameters": dict.fromkeys(("full_attention", "sliding_attention"), ROPE)},
    "dbrx": {"attn_config": {"rope_theta": 10000.0}},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "dots3_note_text": {"num_key_value_heads": 4},
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 64},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "gptj": {"rotary_dim": 4},
    "granitemoehybrid": MAMBA,
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "expand": 2},
    "minicpm3": LATENT,
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2},
    "qwen4_exp_text": {
        **{"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8},
        **{"indexer_budget": 4, "indexer_compress_ratio": 2},
    },
    "reformer": {"is_decoder": True, "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 16]},
    "xlnet": {"d_head": 8},
    "youtu": LATENT,
    "zamba": {"num_hidden_layers": 12},
    "zamba2": {"num_hidden_layers": 54},
}
# Models of several parts, whose configs have no sizes of their own
SHARED = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 0, "num_kv_shared_layers": 30}
PARTS = {
    "dots3_note": {},
    "gemma4_assistant": {"text_config": {"model_type": "gemma4_text", "num_hidden_layers": 30, **SHARED}},
    "prophetnet": {},
}

VISION_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}

# What stands in a refusal -> what the page says
REASONS = {
    "mixture of experts": "mixture of experts: which weights a token passes through differs from token to token",
    "no FFN module": "the FFN or its activation is not a separate module",
    "`intermediate` and `output`": "encoders: the FFN is split into two modules, and attention is bidirectional",
    "encoder-decoder": "encoder-decoder models",
    "cross-attention": "encoder-decoder models",
    "state space": "state space models: not every layer has an FFN",
    "several models": "models of several parts, whose language model may be of a type that works",
    "several stacks": "several stacks of layers",
    "its head": "the head is more than one matrix, or is not separate from the layers",
    "token ids besides": "each layer also reads token ids",
    "several times": "some layers run several times",
    "no cache": "no cache for `generate`",
    "side by side": "reads text and audio tokens side by side",
    "tokens first": "the hidden states have the tokens first and the batch second",
    "whole number": "layers of several widths, or images that are not square",
    "hidden states of shape": "the hidden states are not a sequence of tokens",
    "pixels alone": "it needs more inputs than an image, or its shapes depend on values",
    "random patches": "drops random patches",
}


def text_config(model_type: str):
    """The default config of a type with small sizes, 4 layers of width 32."""
    if model_type in PARTS:
        return AutoConfig.for_model(model_type, **PARTS[model_type])
    default = AutoConfig.for_model(model_type)
    values = {name: size for name, size in TEXT_SIZES.items() if name in list(TEXT_SIZES)[:4]}
    for name, value in vars(default).items():
        for end, size in TEXT_SIZES.items():
            if (name == end or name.endswith(f"_{end}")) and (value is not None or end.endswith("id")):
                values[name] = size
    return AutoConfig.for_model(model_type, **{**values, **TEXT_VALUES.get(model_type, {})})


def vision_config(model_type: str):
    """Likewise of a vision encoder: 4 layers of width 32, images of 16 pixels with patches of 4, 4 registers."""
    default = AutoConfig.for_model(model_type)
    sizes = {name: size for name, size in VISION_SIZES.items() if isinstance(getattr(default, name, None), int)}
    registers = {"num_register_tokens": 4} if hasattr(default, "num_register_tokens") else {}
    return AutoConfig.for_model(model_type, **sizes, **registers)


@cache
def find(kind: str, model_type: str):
    """
    What a user of the type gets: the layout, or the `ValueError`.

    Args:
        kind: "text" or "vision".
    """
    try:
        if kind == "text":
            return layouts.find_text_layout(text_config(model_type))
        config = DehvfConfig(vision_config=vision_config(model_type))
        return layouts.find_vision_layout(config.vision_config)
    except ValueError as refusal:
        return refusal


def tables() -> str:
    """The types that work and those that do not, as Markdown."""
    lines = []
    for kind, title, types in (
        ("text", "Language models", TEXT_TYPES),
        ("vision", "Vision encoders", VISION_TYPES),
    ):
        found = {model_type: find(kind, model_type) for model_type in sorted(types)}
        working = [model_type for model_type, result in found.items() if not isinstance(result, ValueError)]
        sentence = f"{title} that work ({len(working)}): {listed(working)}."
        lines += [textwrap.fill(sentence, 119, break_on_hyphens=False), ""]
        lines += [f"| {len(types) - len(working)} do not work because | types |", "|---|---|"]
        refused = {}
        for model_type in (model_type for model_type in found if model_type not in working):
            reason = next(text for part, text in REASONS.items() if part in str(found[model_type]))
            refused.setdefault(reason, []).append(model_type)
        rows = sorted(refused.items(), key=lambda row: (-len(row[1]), row[0]))
        lines += [f"| {reason} | {listed(types_of_reason)} |" for reason, types_of_reason in rows]
        lines.append("")
    return "\n".join(lines)


def listed(types: list[str]) -> str:
    return ", ".join(f"`{model_type}`" for model_type in types)


def split_page() -> tuple[str, str, str]:
    """docs/bases.md before, in and after what is written here."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    inside, after = rest.split(END)
    return before, inside.strip(), after


def working_types(kind: str) -> list[str]:
    """The types that work according to docs/bases.md."""
    title = {"text": "Language models", "vision": "Vision encoders"}[kind]
    sentence = split_page()[1].partition(f"{title} that work")[2].partition("\n\n")[0]
    return re.findall(r"`([^`]+)`", sentence)


if __name__ == "__main__":
    before, _, after = split_page()
    PAGE.write_text(f"{before}{BEGIN}\n\n{tables()}\n{END}{after}", encoding="utf-8")
