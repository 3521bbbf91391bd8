# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
LLaVA-LoRA: LLaVA's image tokens, as in `llava.py`, and LoRA (peft) on the language model.

The paper gives 4.4 M trained parameters for LLaMA-7B and CLIP ViT-L/14, but does not specify them. Ours:

    LoRA of rank 8 on q_proj and v_proj      32 x 2 x 8 x (4096 + 4096) = 4,194,304
    projector 1024 -> 40 -> 4096             40 x (1024 + 1) + 4096 x (40 + 1) = 208,936
    sum                                      4,403,240

For inference without the additional matrix products of LoRA:

    model.model.language_model = model.model.language_model.merge_and_unload()
"""

from transformers.utils.versions import require_version


require_version("peft>=0.21", "The baselines llava-lora and igva need it: pip install peft")

from peft import LoraConfig, LoraModel  # noqa: E402

from . import BaselineArguments  # noqa: E402
from .llava import PatchTokensForConditionalGeneration  # noqa: E402


def add_lora(model, arguments: BaselineArguments):
    """Wraps the language model of a baseline in a `peft.LoraModel`."""
    lora = LoraConfig(
        r=arguments.lora_rank,
        lora_alpha=arguments.lora_alpha,
        lora_dropout=arguments.lora_dropout,
        target_modules=arguments.lora_target_modules,
    )
    # Not `get_peft_model`, whose `PeftModel` uses a deprecated name of transformers 5
    model.model.language_model = LoraModel(model.model.language_model, lora, "default")
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()  # peft creates them in the dtype of the base


class LlavaLoraForConditionalGeneration(PatchTokensForConditionalGeneration):
    """LLaVA with LoRA on the language model, `model.language_model`, which is a `peft.LoraModel`."""

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        super().__init__(vision_tower, causal_lm, arguments.lora_projector_size, image_size)
        add_lora(self, arguments)


assemble = LlavaLoraForConditionalGeneration
