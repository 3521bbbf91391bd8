# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Counts the operations for the first token of an answer, by part, with DEHVF and with LLaVA-1.5: in closed form, and
with torch's counter in a forward of the models (the paper's Figure 2, and its figure of 6 %).

    python -m benchmarks.operations

This takes seconds and needs no weights: the models of 7B and 13B run on the meta device, which only computes shapes.
The results are written to `benchmarks/results`: `operations.json`, `.md` and `.png`.

The count is for one prompt and one image. A multiplication and an addition are two operations, as in torch. Only
matrix products are counted, not norms, activations and softmax. The causal mask does not reduce the count of
attention, and logits are computed for the last token only.
"""

import argparse
import re
from contextlib import contextmanager
from pathlib import Path
from unittest.mock import patch

import torch
from torch.fx.experimental import _config as fx_config
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaConfig, LlavaForConditionalGeneration

from benchmarks import RESULTS, heading, machine_in_words, require_writable, save_report, table
from dehvf import ROOT, DehvfConfig, DehvfForConditionalGeneration


LLAMA_7B, LLAMA_13B = "config.json", "presets/dehvf-llama13b.json"
# Name -> preset, patches per side, memory slots. The paper gives slots for 256 patches; 576 patches need at least 576
SHAPES = {
    "LLaMA-7B, 256 visual tokens, 320 slots": (LLAMA_7B, 16, 320),
    "LLaMA-7B, 576 visual tokens, 576 slots": (LLAMA_7B, 24, 576),
    "LLaMA-13B, 256 visual tokens, 400 slots": (LLAMA_13B, 16, 400),
    "LLaMA-13B, 576 visual tokens, 576 slots": (LLAMA_13B, 24, 576),
}
NUM_TEXT_TOKENS = 32  # as in the paper
PAPER_SHARE = 6  # in %, of LLaVA-1.5 at 576 visual tokens

LANGUAGE_MODEL = ("attention", "FFN", "lm_head")
LANGUAGE_SIDE = (*LANGUAGE_MODEL, "memory lookup")


def load_config(file: str, patches_per_side: int, num_memory_slots: int):
    """The preset in `file`, for images of another size."""
    config = DehvfConfig.from_json_file(ROOT / file)
    config.num_memory_slots = num_memory_slots
    config.vision_config.image_size = patches_per_side * config.vision_config.patch_size
    return config


# --- closed forms, for CLIP, LLaMA and the full DEHVF. The letters are those of modeling_dehvf.py ---


def product(rows: int, inner: int, columns: int) -> int:
    """Operations of a matrix product, `(rows, inner) @ (inner, columns)`."""
    return 2 * rows * inner * columns


def vision_encoder(vision) -> int:
    patches, d = (vision.image_size // vision.patch_size) ** 2, vision.hidden_size
    tokens = patches + 1
    attention = 4 * product(tokens, d, d) + 2 * product(tokens, d, tokens)
    ffn = 2 * product(tokens, d, vision.intermediate_size)
    embedding = product(patches, vision.num_channels * vision.patch_size**2, d)
    return embedding + vision.num_hidden_layers * (attention + ffn)


def language_model(text, tokens: int) -> dict[str, int]:
    query, key = text.num_attention_heads * text.head_dim, text.num_key_value_heads * text.head_dim
    attention = product(tokens, text.hidden_size, 2 * query + 2 * key) + 2 * product(tokens, query, tokens)
    return {
        "attention": text.num_hidden_layers * attention,
        "FFN": text.num_hidden_layers * 3 * product(tokens, text.hidden_size, text.intermediate_size),
        "lm_head": product(1, text.hidden_size, text.vocab_size),
    }


def fuser(config) -> int:
    r, layers = config.fuser_hidden_size, config.vision_config.num_hidden_layers
    queries = 2 * config.text_config.num_hidden_layers  # D P
    candidates = -(-layers // config.num_groups) + 1  # M
    width = 2 * config.layer_embedding_size
    query_network = product(queries, width, width) + product(queries, width, r)
    projections = 2 * product(queries, r, r) + 2 * product(layers, r, r)
    attention = 2 * product(queries, r, candidates)
    ffn = 2 * product(queries, r, config.fuser_intermediate_size)
    blocks = config.fuser_num_layers * (projections + attention + ffn)
    class_features = product(layers, config.vision_config.hidden_size, r)
    return query_network + class_features + blocks + product(queries, r, candidates)


def memory_lookup(config, tokens: int) -> int:
    """Factored, as in `MemoryFFN.lookup`: each token is multiplied with the slots, with `W_2` and with the patches."""
    h, columns = config.text_config.hidden_size, config.projector_hidden_size + 1
    slots = product(tokens, h, config.num_memory_slots)
    visual = product(tokens, h, columns) + product(tokens, columns, config.num_patches)
    return config.text_config.num_hidden_layers * 2 * (slots + visual)


def materialised_lookup(config, tokens: int) -> int:
    """Materialised: `K_l` and `V_l` are computed once for the image, then each token is multiplied with them."""
    h, columns = config.text_config.hidden_size, config.projector_hidden_size + 1
    build = product(config.num_patches, columns, h)
    return config.text_config.num_hidden_layers * 2 * (build + product(tokens, h, config.num_memory_slots))


def break_even(config) -> float:
    """
    The number of text tokens per image above which the materialised form has fewer operations.

    With `c` columns, the factored form needs `c (h + n)` more multiplications per token, and the materialised form
    `c n h` more per image. The slots cost the same in both.
    """
    n, h = config.num_patches, config.text_config.hidden_size
    return n * h / (n + h)


def dehvf(config, text_tokens: int) -> dict[str, int]:
    """Part -> operations of the full method: with the query network, and with images in both keys and values."""
    vision, n, c = config.vision_config, config.num_patches, config.projector_hidden_size
    layers, d = vision.num_hidden_layers, vision.hidden_size
    return {
        "vision encoder": vision_encoder(vision),
        "vision adapters": layers * 2 * product(n + 1, d, config.vision_adapter_size),
        "projector": layers * product(n, d, c),  # only `down`
        "fuser": fuser(config),
        "fusing": product(2 * config.text_config.num_hidden_layers, layers, n * c),
        **language_model(config.text_config, text_tokens),
        "memory lookup": memory_lookup(config, text_tokens),
    }


def llava(config, text_tokens: int) -> dict[str, int]:
    """Part -> operations of LLaVA-1.5 on the same bases, with a projector of two layers and one token per patch."""
    n, d, h = config.num_patches, config.vision_config.hidden_size, config.text_config.hidden_size
    return {
        "vision encoder": vision_encoder(config.vision_config),
        "projector": product(n, d, h) + product(n, h, h),
        **language_model(config.text_config, n + text_tokens),
    }


# --- torch's counter ---


@contextmanager
def meta_device():
    """Creates tensors and models without values. Checks that would read values assume that they pass."""
    every_row_has_an_image = fx_config.patch(meta_nonzero_assume_all_nonzero=True)
    placeholders_fit = patch.dict("os.environ", TRANSFORMERS_DISABLE_TORCH_CHECK="1")
    with torch.device("meta"), every_row_has_an_image, placeholders_fit:
        yield


def build_dehvf(config):
    return DehvfForConditionalGeneration(config).eval()


def build_llava(config):
    bases = {"vision_config": config.vision_config, "text_config": config.text_config}
    return LlavaForConditionalGeneration(LlavaConfig(**bases, image_token_index=0)).eval()


def count(model, text_tokens: int, image_tokens: int = 0) -> dict[str, int]:
    """
    Part -> operations that torch counts in a forward, assigned by module.

    Args:
        model: the result of `build_dehvf` or `build_llava`.
        image_tokens: number of placeholders before the text, for `build_llava`.
    """
    vision = model.config.vision_config
    ids = torch.tensor([[0] * image_tokens + [1] * text_tokens])
    size = getattr(model.config, "resolution", vision.image_size)
    pixels = torch.zeros(1, vision.num_channels, size, size)
    # The counter does not know the fused attention kernels of CPUs, so attention runs as matrix products
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(input_ids=ids, pixel_values=pixels, logits_to_keep=1)
    counts = {name: sum(by_kind.values()) for name, by_kind in counter.get_flop_counts().items()}

    def inside(modules: str) -> int:
        return sum(number for name, number in counts.items() if re.fullmatch(rf"\w+\.{modules}", name))

    adapters, ffns = inside(r"model\.vision_adapters\.\d+"), inside(r"model\.language_model\.layers\.\d+\.mlp")
    parts = {
        "vision encoder": inside(r"model\.vision_tower") - adapters,
        "vision adapters": adapters,
        "projector": inside(r"model\.(projector\.down|multi_modal_projector)"),
        "fuser": inside(r"model\.(fuser|fuser_query)"),
        "attention": inside(r"model\.language_model") - ffns,
        "FFN": (ffn := inside(r"model\.language_model\.layers\.\d+\.mlp\.(gate|up|down)_proj")),
        "lm_head": inside("lm_head"),
        "memory lookup": ffns - ffn,
    }
    parts["fusing"] = counts["Global"] - sum(parts.values())  # the operations outside the modules above
    return {part: number for part, number in parts.items() if number}


# --- results ---


def total(parts: dict[str, int], names=None) -> int:
    return sum(number for part, number in parts.items() if names is None or part in names)


def language_sides(config, text_tokens: int = NUM_TEXT_TOKENS) -> dict[str, int]:
    """Method -> operations of the language model and of the memory lookup in it."""
    text = total(language_model(config.text_config, text_tokens))
    return {
        "LLaVA-1.5": total(llava(config, text_tokens), LANGUAGE_SIDE),
        "DEHVF": text + memory_lookup(config, text_tokens),
        "DEHVF, materialised": text + materialised_lookup(config, text_tokens),
        "text alone": text,
    }


def measure(shape: tuple) -> dict:
    config = load_config(*shape)
    with meta_device():
        counted = {
            "DEHVF": count(build_dehvf(config), NUM_TEXT_TOKENS),
            "LLaVA-1.5": count(build_llava(config), NUM_TEXT_TOKENS, config.num_patches),
        }
    closed = {"DEHVF": dehvf(config, NUM_TEXT_TOKENS), "LLaVA-1.5": llava(config, NUM_TEXT_TOKENS)}
    sides = language_sides(config)
    encoder = closed["LLaVA-1.5"]["vision encoder"]
    ours, theirs = total(closed["DEHVF"]), total(closed["LLaVA-1.5"])
    return {
        "operations": {
            name: {
                part: {"closed_form": number, "torch": counted[name].get(part, 0)} for part, number in parts.items()
            }
            for name, parts in closed.items()
        },
        "materialised_lookup": materialised_lookup(config, NUM_TEXT_TOKENS),
        "break_even_text_tokens": break_even(config),
        "percent_of_llava": {
            "language side": {name: 100 * side / sides["LLaVA-1.5"] for name, side in sides.items()},
            "all but the vision encoder": 100 * (ours - encoder) / (theirs - encoder),
            "all": 100 * ours / theirs,
        },
    }


def sweep() -> dict[str, list]:
    """`language_sides` at 7B for increasing numbers of visual tokens, with one slot for each."""
    rows = {"visual tokens": []}
    for side in range(10, 33):
        config = load_config(LLAMA_7B, side, side**2)
        rows["visual tokens"].append(config.num_patches)
        for name, number in language_sides(config).items():
            rows.setdefault(name, []).append(number)
    return rows


def markdown(report: dict) -> str:
    shares, lookups, parts = [], [], []
    for name, shape in report["shapes"].items():
        share, models = shape["percent_of_llava"], shape["operations"]
        side = [share["language side"][key] for key in ("text alone", "DEHVF", "DEHVF, materialised")]
        numbers = [*side, share["all but the vision encoder"], share["all"]]
        shares.append([name, *(f"{number:.2f}" for number in numbers)])
        lookup = models["DEHVF"]["memory lookup"]["closed_form"], shape["materialised_lookup"]
        numbers = [f"{number / 1e9:.2f}" for number in lookup]
        lookups.append([name, *numbers, f"{shape['break_even_text_tokens']:.1f}"])
        rows = []
        for part in models["DEHVF"]:
            cells = [part]
            for found in (model.get(part) for model in models.values()):
                if found is None:
                    cells += ["–", "–", "–"]
                else:
                    closed, counted = found["closed_form"], found["torch"]
                    cells += [f"{closed / 1e9:.3f}", f"{counted / 1e9:.3f}", f"{100 * (closed / counted - 1):.3f} %"]
            rows.append(cells)
        head = [word for model in models for word in (model, "torch counts", "difference")]
        parts += ["", f"## {name}", "", "10⁹ operations.", "", *table(("", *head), rows)]
    columns = ("language side: text alone", "DEHVF", "DEHVF, materialised", "all but the vision encoder", "all")
    lines = [
        *heading(report["command"], report["note"]),
        *(f"## In % of LLaVA-1.5, at {NUM_TEXT_TOKENS} text tokens", ""),
        *table(("", *columns), shares),
        *("", f"The paper gives {PAPER_SHARE} % for a text length of 32, without the number of visual tokens."),
        *("", "## Memory lookup, factored or materialised", ""),
        f"10⁹ operations at {NUM_TEXT_TOKENS} text tokens, and the number of text tokens per image above which the",
        *("materialised form has fewer.", ""),
        *table(("", "factored", "materialised", "break-even"), lookups),
        *parts,
    ]
    return "\n".join(lines) + "\n"


def draw(report: dict, file: Path):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 4.6), dpi=130, layout="constrained")
    absolute, relative = figure.subplots(1, 2)
    rows = report["figure"]
    tokens, theirs = rows["visual tokens"], rows["LLaVA-1.5"]
    styles = {
        "LLaVA-1.5": {"color": "tab:orange"},
        "DEHVF, materialised": {"color": "tab:blue", "linestyle": "--"},
        "DEHVF": {"color": "tab:blue"},
        "text alone": {"color": "grey", "linestyle": ":"},
    }
    for name, style in styles.items():
        absolute.plot(tokens, [number / 1e12 for number in rows[name]], label=name, **style)
        if name != "LLaVA-1.5":
            shares = [100 * number / other for number, other in zip(rows[name], theirs)]
            relative.plot(tokens, shares, label=name, **style)
    relative.plot(576, PAPER_SHARE, "x", color="black", label=f"the paper's {PAPER_SHARE} %")
    absolute.set(title="Language side (the paper's Figure 2)", ylabel="operations, in 10¹²")
    relative.set(title="The same, in % of LLaVA-1.5", ylabel="operations, in % of LLaVA-1.5")
    for axis in (absolute, relative):
        axis.set_xlabel("visual tokens (and memory slots)")
        axis.set_ylim(0)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=9)
    relative.set(xlim=(256, 1024), ylim=(0, 12))  # with fewer tokens, the text dominates and the curves coincide
    figure.suptitle(f"Operations of one image and {NUM_TEXT_TOKENS} text tokens, LLaMA-7B and CLIP ViT-L/14")
    figure.savefig(file)


def main():
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    require_writable(RESULTS)
    report = {
        "command": "python -m benchmarks.operations",
        "text_tokens": NUM_TEXT_TOKENS,
        "shapes": {name: measure(shape) for name, shape in SHAPES.items()},
        "figure": sweep(),
    }
    report["note"] = (
        "Operations of the forward that computes the first token of an answer, for one prompt and one image: in "
        "closed form, and as counted by torch for models on the meta device. A multiplication and an addition are two "
        "operations; only matrix products are counted; the causal mask does not reduce the count of attention; logits "
        "are computed for the last token only. The language side is attention, FFN, lm_head and memory lookup, "
        "without LLaVA's projector and without the computation that DEHVF does once per image. Both methods run all "
        "layers of the vision encoder, as transformers does, although LLaVA does not need the last one. The paper "
        "gives the number of memory slots for 256 visual tokens only; for 576 we use 576, the smallest possible "
        f"number. {machine_in_words()}."
    )
    save_report(RESULTS, "operations", report, markdown, draw)


if __name__ == "__main__":
    main()
