# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The projector and the slots of the visual memory, and the memory of samples with several images.

Each image of a sample has a slot for each of its patches; the slots after the patches exist once per sample. The
memory of several images is therefore the concatenation of the memories of single images along the patches, and FFNs
read it like the memory of one image with more patches. If a sample has fewer images than other samples of its batch,
its memory is padded with zeros, also in the last column, which otherwise contains ones. The slots of missing images
are masked out, except those of the first image: a sample without any image reads only their position embeddings
(method step 9).

Letters at the end of a line give shapes, as in `modeling_dehvf.py`; I is the number of images of a sample.
"""

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_outputs import BaseModelOutputWithPooling

from .configuration_dehvf import DehvfConfig
from .inputs_dehvf import check_image_mask, check_instruction, check_num_images, check_tensor


class ProjectorBasis(nn.Module):
    """
    `W_2` and `b_2`, which are applied in the FFNs: `(language_hidden_size, projector_hidden_size + 1)`. The module
    takes no input; it is not an `nn.Linear`, since `peft` would wrap it.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__()
        linear = nn.Linear(in_features, out_features)
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self) -> torch.Tensor:
        return torch.cat((self.weight, self.bias[:, None]), dim=1)


class VisualProjector(nn.Module):
    """
    The two-layer network `g(F) = W_2 SiLU(W_1 F + b_1) + b_2` from vision to language width (method step 6).

    It is never run as a whole. Fusion is linear with weights that sum to one, so `down` is applied once to each vision
    layer and its outputs are fused; `W_2` is applied in the FFNs. The memory of an image then has the width of the
    projector instead of the language model (in exact arithmetic the result is the same).
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        self.down = nn.Linear(config.vision_config.hidden_size, config.projector_hidden_size)
        self.up = ProjectorBasis(config.projector_hidden_size, config.text_config.hidden_size)


class MemorySlots(nn.Module):
    """
    Position embeddings of the slots, `s_key` and `s_value`, shared by all layers (method step 7) and by all images of
    a sample. Each image after the first has an additional embedding, which is added to the embeddings of its slots.
    """

    def __init__(self, config: DehvfConfig):
        super().__init__()
        shape = (config.num_memory_slots, config.text_config.hidden_size)
        self.key = nn.Parameter(torch.empty(shape))
        self.value = nn.Parameter(torch.empty(shape))
        self.image_key = self.image_value = None
        if config.max_encoded_images > 1 and config.visual_prompts != "none":
            shape = (config.max_encoded_images - 1, config.text_config.hidden_size)
            self.image_key = nn.Parameter(torch.empty(shape))
            self.image_value = nn.Parameter(torch.empty(shape))

    def forward(self, dtype: torch.dtype, num_patches: int, num_images: int) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Slots of keys and values for samples with `num_images` images of `num_patches` patches: those of the patches,
        then the others. Raises `ValueError` if the adapter was built for fewer images.
        """
        num_embedded = 1 if self.image_key is None else 1 + len(self.image_key)
        if num_images > num_embedded:
            raise ValueError(
                f"A sample has {num_images} images, but this model was built for at most {num_embedded}. A change of "
                "`config.max_images` or `config.image_tiles` has no effect on a model. Give the value to "
                "`from_pretrained` instead."
            )
        if self.image_key is None:
            # Copies, since under ZeRO-3 a parameter is only available while its own module runs
            return self.key.to(dtype, copy=True), self.value.to(dtype, copy=True)
        pairs = (self.key, self.image_key), (self.value, self.image_value)
        return tuple(self._repeat(slots, images, num_patches, num_images).to(dtype) for slots, images in pairs)

    @staticmethod
    def _repeat(slots: torch.Tensor, images: torch.Tensor, num_patches: int, num_images: int) -> torch.Tensor:
        # Also with one image, so that all parameters get a gradient in every batch, as DDP requires
        images = F.pad(images, (0, 0, 1, 0))[:num_images]  # I h
        patch_slots, other_slots = slots.split((num_patches, len(slots) - num_patches))
        return torch.cat(((patch_slots + images[:, None]).flatten(0, 1), other_slots))


def as_visual_memory(features: torch.Tensor | BaseModelOutputWithPooling | None) -> torch.Tensor | None:
    """Returns the `pooler_output` of a result of `get_image_features`, or the tensor that was given."""
    if isinstance(features, BaseModelOutputWithPooling):
        return features.pooler_output
    if features is not None:
        check_tensor("visual_memory", features)
    return features


def count_images(config: DehvfConfig, visual_memory: torch.Tensor | None) -> int:
    """Number of images for which each sample has slots, at least 1: samples without an image have slots too."""
    return 1 if visual_memory is None else visual_memory.shape[3] // config.num_patches


def find_slot_mask(config: DehvfConfig, visual_memory: torch.Tensor | None, num_slots: int) -> torch.Tensor | None:
    """
    1 for slots that are read and 0 for slots of images that a sample does not have, `(batch_size, 1, num_slots)`.
    `None` if there are only slots for one image, which are always read.
    """
    if count_images(config, visual_memory) == 1:
        return None
    is_there = visual_memory[:, 0, 0, config.num_patches :, -1].detach()  # B (I-1)n
    num_others = num_slots - visual_memory.shape[3]
    # `len` would make the number of samples a constant of an exported graph
    ones = [is_there.new_ones(is_there.shape[0], size) for size in (config.num_patches, num_others)]
    return torch.cat((ones[0], is_there, ones[1]), dim=1)[:, None]


def mask_images(
    config: DehvfConfig, visual_memory: torch.Tensor, image_mask: torch.Tensor, num_texts: int
) -> torch.Tensor:
    """Sets the memory to zero where `image_mask`, `(num_texts,)` or `(num_texts, num_images)`, is false."""
    num_images = count_images(config, visual_memory)
    check_tensor("image_mask", image_mask)
    if image_mask.ndim == 1:
        check_image_mask(image_mask, (num_texts,), "texts")
        # Not a product, in which a NaN of a masked image would remain
        mask = image_mask.to(visual_memory.device, torch.bool).view(-1, 1, 1, 1, 1)
        return torch.where(mask, visual_memory, 0)
    check_image_mask(image_mask, (num_texts, num_images), "texts and images")
    mask = image_mask.to(visual_memory.device, torch.bool).repeat_interleave(config.num_patches, dim=1)
    return torch.where(mask[:, None, None, :, None], visual_memory, 0)


def flatten_images(
    config: DehvfConfig, pixel_values: torch.Tensor, image_mask: torch.Tensor | None, instruction: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """
    Flattens the images of all samples into one batch, B I C H W to BI C H W, together with the mask and the
    instruction of each image.

    Raises:
        ValueError: if a sample has more images than the adapter reads, or `image_mask` or `instruction` do not fit.
    """
    batch_size, num_images = pixel_values.shape[:2]
    check_num_images(config, num_images)
    if image_mask is not None:
        check_image_mask(image_mask, (batch_size, num_images), "images in `pixel_values`")
        image_mask = image_mask.flatten()
    if config.reads_instruction:
        check_instruction(config, instruction, batch_size)
        instruction = instruction.repeat_interleave(num_images, dim=0)
    return pixel_values.flatten(0, 1), image_mask, instruction


def join_images(memory: torch.Tensor, num_images: int) -> torch.Tensor:
    """Joins the memories of the images of all samples, BI D P n c+1, to those of the samples, B D P In c+1."""
    return memory.unflatten(0, (-1, num_images)).movedim(1, 3).flatten(3, 4)


def drop_absent_images(
    pixel_values: torch.Tensor | None, image_mask: torch.Tensor | None
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """Removes the images after the last one that any sample has, and their dimension if one image remains."""
    if pixel_values is None or image_mask is None or image_mask.ndim == 1:
        return pixel_values, image_mask
    present = image_mask.any(dim=0).nonzero().flatten().tolist()
    num_images = max(present, default=0) + 1
    if num_images == 1:
        return pixel_values[:, 0], image_mask[:, 0]
    return pixel_values[:, :num_images], image_mask[:, :num_images]
