# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
LLaMA-Adapter V2 (arXiv 2304.15010, code in OpenGVLab/LLaMA-Adapter): the attention of the first language layer reads
prompts that are computed from the image, and the attention of all other layers reads learned prompts, both through a
gate that is initialised to zero. The norms of the language model are trained too, and so are a scale and a bias for
each of its linear layers:

    W x   becomes   scale * (W x + bias)

As in the code (`llama_adapter_v2_multimodal7b`), learned queries and all tokens of the last vision layer, projected to
the queries' width, run through transformer blocks, and the resulting queries are projected to prompts. These have 60 M
parameters in the code; the paper, with 14 M in total, gives no sizes. We use the blocks of the code at a smaller
width. Trained parameters for LLaMA-7B and CLIP ViT-L/14:

    prompts of 31 layers                       31 x 10 x 4096 = 1,269,760
    gates, one for each head of all layers                          1,024
    scales and biases                         32 x 2 x 42,496 = 2,719,744
    norms                                           65 x 4096 =   266,240
    queries, blocks and projections                             9,486,048
    sum                                                        13,742,816

In the code the image reaches all layers with prompts, and there are biases but no scales (or, in
`llama_adapter_v2_chat65b`, scales of the inputs of linear layers). Here both are as in the paper. There are two
differences:

- The paper alternates between training the visual parts and the gates on captions and the other parts on text. Here
  all parts are trained on one data set.
- The tokens of the vision encoder are the output of its final norm. In the code they also run through CLIP's
  projection.
"""

import torch
from torch import nn

from . import BaselineArguments
from .llama_adapter import ImageAdaptedAttention, VisualPromptForConditionalGeneration, read_prompts


class TunedLinear(nn.Module):
    """A frozen linear layer with a trained scale and bias, in fp32."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.linear = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.scale = nn.Parameter(torch.ones(linear.out_features, device=linear.weight.device))
        self.bias = nn.Parameter(torch.zeros(linear.out_features, device=linear.weight.device))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.scale * (self.linear(inputs) + self.bias)).to(inputs.dtype)

    def without_bias(self, inputs: torch.Tensor) -> torch.Tensor:
        """The output without the bias: its change when `inputs` are added to other inputs."""
        return (self.scale * nn.functional.linear(inputs, self.linear.weight)).to(inputs.dtype)


class TunedNorm(nn.Module):
    """A norm of the language model whose weight is trained, in fp32."""

    def __init__(self, norm: nn.Module):
        super().__init__()
        self.norm = norm.float().requires_grad_(True)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return self.norm(hidden_states).to(hidden_states.dtype)


class LearnedPromptAttention(ImageAdaptedAttention):
    """The attention of LLaMA-Adapter with tuned linear layers and without an image."""

    def forward(self, visual_prompt: torch.Tensor | None = None, **kwargs):
        output, *rest = self.model(**kwargs)
        gate, project = self.adaption_gate.tanh(), self.model.o_proj.without_bias
        return output + read_prompts(self.model, self.adaption_prompt, gate, project, **kwargs), *rest


class VisualPromptAttention(nn.Module):
    """The attention of the first layer, `model`, with prompts that are computed from the image only."""

    def __init__(self, attention):
        super().__init__()
        self.model = attention
        self.adaption_gate = nn.Parameter(torch.zeros(attention.config.num_attention_heads, 1, 1))

    def forward(self, visual_prompt: torch.Tensor | None = None, **kwargs):
        """visual_prompt: `(batch_size or 1, num_prompts, hidden_size)`, all zeros for a sample without an image."""
        output, *rest = self.model(**kwargs)
        if visual_prompt is None:
            return output, *rest
        has_image = visual_prompt.any(dim=-1).any(dim=-1)[:, None, None, None]
        gate, project = has_image * self.adaption_gate.tanh(), self.model.o_proj.without_bias
        return output + read_prompts(self.model, visual_prompt, gate, project, **kwargs), *rest


class VisualPrompter(nn.Module):
    """Computes prompts from the tokens of an image."""

    def __init__(self, vision_size: int, text_size: int, arguments: BaselineArguments):
        super().__init__()
        size, heads = arguments.adapter_v2_size, arguments.adapter_v2_heads
        self.queries = nn.Parameter(torch.randn(arguments.adapter_v2_prompts, size))
        self.down, self.down_norm = nn.Linear(vision_size, size), nn.LayerNorm(size)
        block = {"dropout": 0.0, "activation": "gelu", "batch_first": True, "norm_first": True}
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(size, heads, 4 * size, **block) for _ in range(arguments.adapter_v2_layers)
        )
        self.up, self.up_norm = nn.Linear(size, text_size), nn.LayerNorm(text_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """`(num_images, num_tokens, vision_size)` to `(num_images, num_prompts, text_size)`."""
        tokens = self.down_norm(self.down(features))
        states = torch.cat((self.queries.expand(len(tokens), -1, -1), tokens), dim=1)
        for block in self.blocks:
            states = block(states)
        return self.up_norm(self.up(states[:, : len(self.queries)]))


class LlamaAdapterV2ForConditionalGeneration(VisualPromptForConditionalGeneration):
    """
    LLaMA-Adapter V2. The image prompts are computed in this class, so the projector of LLaVA is an identity.

    Raises:
        ValueError: if `adaption_prompt_layers` is not between 1 and the number of language layers minus one.
    """

    def __init__(self, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
        features = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
        super().__init__(vision_tower, causal_lm, nn.Identity(), image_size, **features)
        text = self.model.language_model
        self.prompter = VisualPrompter(vision_tower.config.hidden_size, text.config.hidden_size, arguments)
        below = len(text.layers) - 1
        for layer in self.layers_with_prompts(arguments.adaption_prompt_layers, default=below, most=below):
            layer.self_attn = LearnedPromptAttention(layer.self_attn, arguments.adaption_prompt_length)
        text.layers[0].self_attn = VisualPromptAttention(text.layers[0].self_attn)
        for name, module in list(text.named_modules()):
            parent, _, child = name.rpartition(".")
            if isinstance(module, nn.Linear):
                setattr(text.get_submodule(parent), child, TunedLinear(module))
            elif child.endswith("norm"):
                setattr(text.get_submodule(parent), child, TunedNorm(module))

    def image_features(
        self, pixel_values: torch.Tensor | None = None, image_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """As in the base class. Returns prompts, `(num_images, num_prompts, language_hidden_size)`."""
        features = super().image_features(pixel_values, image_mask)  # I n c
        features = self.model.vision_tower.get_submodule(self.vision_layout.norm)(features)
        return self.prompter(features.to(self.prompter.queries.dtype))


assemble = LlamaAdapterV2ForConditionalGeneration
