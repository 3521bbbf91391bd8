# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
LLaVA (arXiv 2304.08485): each patch of the image becomes a token of the sequence, and the projector and the whole
language model are trained in fp32.

As in LLaVA 1.5, the patches are those of the penultimate vision layer without the class token, and the projector has
two layers of the language model's width and a GELU. Trained parameters for LLaMA-7B and CLIP ViT-L/14:

    language model                                              6,738,415,616
    projector 1024 -> 4096 -> 4096                                 20,979,712
    sum                                                         6,759,395,328
"""

from . import BaselineArguments, ImageTokensForConditionalGeneration, Projector


class PatchTokensForConditionalGeneration(ImageTokensForConditionalGeneration):
    """LLaVA's image tokens. The projector has `projector_size` hidden units; for the others, see the base class."""

    def __init__(self, vision_tower, causal_lm, projector_size: int, image_size: int | None = None):
        vision, act = vision_tower.config, "gelu"
        projector = Projector(vision.hidden_size, projector_size, causal_lm.config.hidden_size, act)
        features = {"projector_hidden_act": act, "vision_feature_layer": -2}
        super().__init__(vision_tower, causal_lm, projector, image_size, **features)
        self.config.image_seq_length = self.grid_size**2
        self.config.vision_feature_select_strategy = "default" if self.vision_layout.has_class_token else "full"


class FullLlavaForConditionalGeneration(PatchTokensForConditionalGeneration):
    """LLaVA with a trained language model."""

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        super().__init__(vision_tower, causal_lm, causal_lm.config.hidden_size, image_size)
        causal_lm.float().requires_grad_(True)


assemble = FullLlavaForConditionalGeneration
