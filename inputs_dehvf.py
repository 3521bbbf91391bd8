# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Checks and converts the arguments of a call, and finds the instruction in its text."""

import torch
from torch import nn

from .configuration_dehvf import DehvfConfig


# Arguments of a call that determine what its texts read
IMAGE_ARGUMENTS = ("pixel_values", "image_mask", "visual_memory", "adapter_names", "instruction_mask")


def check_tensor(name: str, value):
    if not isinstance(value, torch.Tensor):
        raise ValueError(f"`{name}` is a {type(value).__name__}. Give a `torch.Tensor`.")


def check_is_not_empty(pixel_values: torch.Tensor):
    """Raises `ValueError` if there is no image, as in a batch that only has rows for texts with an image."""
    check_tensor("pixel_values", pixel_values)
    if not pixel_values.numel():
        raise ValueError(
            f"`pixel_values` has the shape {tuple(pixel_values.shape)}, which is no image. Give one row per text, and "
            "mark texts without an image in `image_mask`, or leave out `pixel_values` if no text has one."
        )


def check_pixel_values(config: DehvfConfig, pixel_values: torch.Tensor):
    """Raises `ValueError` if images do not have the shape that the adapter was made for."""
    config.validate_memory_slots()  # `image_size` may have been changed since
    size = (config.vision_config.num_channels, config.resolution, config.resolution)
    _check_shape("pixel_values", pixel_values, size)


def as_encoder_input(pixel_values: torch.Tensor, vision_tower: nn.Module, device: torch.device) -> torch.Tensor:
    """Pixels on the device and in the dtype of the encoder: BEiT, for example, does not convert them itself."""
    dtype = next(vision_tower.parameters(), pixel_values).dtype  # there are none in `nn.DataParallel`
    if device.type == "meta":  # the weights are offloaded
        device = pixel_values.device
    return pixel_values.to(device, dtype)


def check_visual_memory(config: DehvfConfig, visual_memory: torch.Tensor, batch_size: int | None = None):
    """Raises `ValueError` if the memory does not have this adapter's shape, or does not have one row per text."""
    if config.visual_prompts == "none":
        raise ValueError('There is no visual memory with `visual_prompts="none"`: no image enters the memory slots.')
    check_tensor("visual_memory", visual_memory)
    sizes = (config.text_config.num_hidden_layers, len(config.memory_positions))
    num_images = max(1, visual_memory.shape[3] // config.num_patches) if visual_memory.ndim == 5 else 1
    num_patches = num_images * config.num_patches
    _check_shape("visual_memory", visual_memory, (*sizes, num_patches, config.projector_hidden_size + 1))
    check_num_images(config, num_images)
    if batch_size is not None and visual_memory.shape[0] not in (1, batch_size):
        raise ValueError(
            f"There are {visual_memory.shape[0]} rows of images and {batch_size} texts. Give one row per text, and "
            "mark texts without an image in `image_mask`, as this model's processor does."
        )


def check_num_images(config: DehvfConfig, num_images: int):
    """Raises `ValueError` if a sample has more images than the adapter was made for."""
    if num_images > config.max_encoded_images:
        tiles = "" if config.image_tiles is None else f", image_tiles={config.image_tiles}"
        raise ValueError(
            f"A sample has {num_images} images, but this adapter reads at most {config.max_encoded_images} "
            f"(max_images={config.max_images}{tiles}). Give fewer, or make an adapter with a larger `max_images`."
        )


def check_instruction(config: DehvfConfig, instruction: torch.Tensor | None, num_images: int):
    """Raises `ValueError` if the fuser needs the user's text and it is missing for some image."""
    given = "none" if instruction is None else f"one for {instruction.shape[0]} texts"
    if config.reads_instruction and (instruction is None or instruction.shape[0] != num_images):
        raise ValueError(
            f"The fuser of this model reads the user's text, so each of the {num_images} images needs an "
            f"`instruction`, but {given} was given. Pass `model.get_instruction_features(input_ids, "
            "attention_mask)`, one row per row of `pixel_values`."
        )


def check_image_mask(image_mask: torch.Tensor, expected: tuple[int, ...], of_what: str):
    check_tensor("image_mask", image_mask)
    if tuple(image_mask.shape) != tuple(expected):
        raise ValueError(
            f"`image_mask` has the shape {tuple(image_mask.shape)}, but there are {' x '.join(map(str, expected))} "
            f"{of_what}. Give one boolean for each, false where it has no image."
        )


def check_instruction_is_marked(model: nn.Module, pixel_values, instruction_mask):
    """Raises `ValueError` in training if the fuser reads the user's text without knowing where the answers begin."""
    if model.training and model.config.reads_instruction and pixel_values is not None and instruction_mask is None:
        raise ValueError(
            "The fuser of this model reads the user's text, but the training batch does not say which tokens are the "
            "user's: the fuser would read the answers too. Give `labels`, or `instruction_mask` of the shape of "
            "`input_ids` with 1 for tokens of the user. Trainers that compute the loss themselves, as with "
            "`label_smoothing_factor` and in TRL, do not pass `labels`: add `instruction_mask` in the collator."
        )


def check_instruction_is_whole(config: DehvfConfig, pixel_values: torch.Tensor | None, cache):
    """Raises `ValueError` if the fuser needs the user's text and a part of it is only in the cache."""
    if config.reads_instruction and pixel_values is not None and cache is not None and cache.get_seq_length():
        raise ValueError(
            "The fuser of this model reads the user's text, but a call with a filled cache only has the rest of it. "
            "Instead of `pixel_values`, give `visual_memory=outputs.image_outputs` of the first call or, if that was "
            "`generate`, encode the image before both calls: `visual_memory = model.get_image_features(pixel_values, "
            "instruction=model.get_instruction_features(input_ids, attention_mask))`."
        )


def check_no_image(image_mask: torch.Tensor | None):
    """Raises `ValueError` if `image_mask` marks images but the call has none."""
    if image_mask is None:
        return
    check_tensor("image_mask", image_mask)
    if image_mask.any():
        raise ValueError(
            f"`image_mask` says that {int(image_mask.sum())} samples have an image, but neither `pixel_values` nor "
            "`visual_memory` was given. Give one of them, or remove `image_mask`."
        )


def check_one_of(**given):
    names = [f"`{name}`" for name, value in given.items() if value is not None]
    if len(names) > 1:
        raise ValueError(f"Both {' and '.join(names)} were given. Give one of them.")


def find_instruction(labels: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
    """
    Mask of the user's tokens, `(batch_size, sequence_length)`: tokens without a label that are not padding. In a text
    in which all tokens have labels, all are the user's, as in a call without labels. A mask that is not that of these
    tokens, as with a filled cache, is returned as it is: like in a call without labels, it is refused if it is read.
    """
    if attention_mask is not None and attention_mask.shape[1:] != labels.shape[1:]:
        return attention_mask
    is_token = torch.ones_like(labels, dtype=torch.bool) if attention_mask is None else attention_mask.bool()
    is_instruction = (labels == -100) & is_token
    return is_instruction.where(is_instruction.any(dim=1, keepdim=True), is_token)


def find_positions(attention_mask: torch.Tensor | None, num_tokens: int, cache) -> torch.Tensor | None:
    """
    Positions of the last `num_tokens` tokens of each text that count from the end of its padding, as `generate` counts
    them, `(batch_size, num_tokens)`. `None` if `attention_mask` is not that of all tokens, including the cached ones.
    """
    num_cached = 0 if cache is None else cache.get_seq_length()
    if attention_mask is None or attention_mask.shape[1:] != (num_cached + num_tokens,):
        return None
    return (attention_mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -num_tokens:]


def mean_embedding(inputs_embeds: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """
    The mean over the tokens of each text, `(batch_size, hidden_size)`, in float32.

    Args:
        mask: `(batch_size, sequence_length)`, 1 or true for the tokens to average. By default all.

    Raises:
        ValueError: if the mask has another shape, as the `attention_mask` of a text that is continued from a cache.
    """
    inputs_embeds = inputs_embeds.float()
    if mask is None:
        return inputs_embeds.mean(dim=1)
    if mask.shape != inputs_embeds.shape[:2]:
        raise ValueError(
            f"The mask of the user's text has the shape {tuple(mask.shape)}, but the texts have the shape "
            f"{tuple(inputs_embeds.shape[:2])}. Pass `instruction_mask` of this shape or, to continue a text, the "
            "`visual_memory` of its beginning."
        )
    weights = mask.to(inputs_embeds.dtype)[..., None]
    return (weights * inputs_embeds).sum(dim=1) / weights.sum(dim=1).clamp(min=1)


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]):
    check_tensor(name, tensor)
    if tuple(tensor.shape[1:]) != expected:
        advice = {
            "pixel_values": "Make it with this model's own processor, or make the adapter with another `image_size`.",
            "visual_memory": "Make it with this model's own `get_image_features`.",
        }
        raise ValueError(
            f"`{name}` has the shape {tuple(tensor.shape)}, but this model takes (batch_size, "
            f"{', '.join(map(str, expected))}). {advice[name]}"
        )
