# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The configuration of DEHVF (arXiv 2508.17638). Each field is documented with its meaning, the paper's symbol and the
source of its default. Functions that only depend on the configuration are here too.
"""

import filecmp
import math
import random
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from huggingface_hub.dataclasses import strict
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN


if TYPE_CHECKING:
    # Not executed. Because of this import, `transformers` also copies the other `*_dehvf.py` files when it loads a
    # config, so that `shared` can compare them
    from .modeling_dehvf import DehvfForConditionalGeneration as DehvfForConditionalGeneration

# Written to every config.json, so that a saved folder is loaded with its own code and not with the code of the
# repository that it once came from.
AUTO_MAP = {
    "AutoConfig": "configuration_dehvf.DehvfConfig",
    "AutoModel": "modeling_dehvf.DehvfForConditionalGeneration",
    "AutoModelForImageTextToText": "modeling_dehvf.DehvfForConditionalGeneration",
    "AutoModelForMultimodalLM": "modeling_dehvf.DehvfForConditionalGeneration",
    "AutoProcessor": "processing_dehvf.DehvfProcessor",
}


CLIP_VIT_L_14 = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
CLIP_VIT_L_14 |= {"image_size": 224, "patch_size": 14}
NUM_MEMORY_SLOTS = 320  # the paper's at 7B, whose images have 256 patches

# What is read from the configs of the base models
BASE_SIZES = {
    "vision_config": ("hidden_size", "num_hidden_layers", "image_size", "patch_size", "num_channels"),
    "text_config": ("hidden_size", "num_hidden_layers", "vocab_size"),
}
# In training, the rotary embeddings of DINOv3 and Sapiens 2 are those of positions that these values change at random
AUGMENTATIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")
# Far more than any model has. A larger number means a damaged config, and building so many layers would never end.
MAX_LAYERS = 1000


def _base_config(given: dict | PreTrainedConfig | None, model_type: str, defaults: dict) -> PreTrainedConfig:
    if isinstance(given, PreTrainedConfig):
        return given
    values = dict(defaults if given is None else given)
    return AutoConfig.for_model(values.pop("model_type", model_type), **values)


def _check_sizes(base_config: PreTrainedConfig, key: str):
    """Raises `ValueError` if a base model has no single size, for example because its layers differ in width."""
    for name in BASE_SIZES[key]:
        if not isinstance(size := getattr(base_config, name, None), int) or size < 1:
            raise ValueError(
                f"DEHVF cannot extend `{base_config.model_type}` (`{key}`): its config has `{name}={size}`, but a "
                "whole number of at least 1 is needed, for all layers and square images. Give another "
                f"`{key[:-7]}_model`; docs/bases.md lists the types that work."
            )


def disable_noise(base_config: PreTrainedConfig) -> PreTrainedConfig:
    """
    Removes dropout and the augmentation of positions from the config of a frozen base, or from one of its modules,
    since they would only add noise to the input of the adapters. The base must still be switched by `train()`, because
    layers in eval mode are never checkpointed.
    """
    for name, value in vars(base_config).items():
        if "drop" in name and isinstance(value, float):
            setattr(base_config, name, 0.0)
        elif name in AUGMENTATIONS:
            setattr(base_config, name, None)
    return base_config


def shared(cls: type) -> type:
    """
    Class decorator: returns the same class from another loaded copy of this file, if there is one.

    `transformers` copies each remote code file that it loads, together with its imports, into a separate folder.
    Without this decorator, `AutoConfig` and `AutoModel` would load two different `DehvfConfig` classes, and
    `isinstance` checks would fail.
    """
    file_name, own_folder = cls.__module__.rpartition(".")[2], Path(sys.modules[cls.__module__].__file__).parent
    for name, module in list(sys.modules.items()):
        if name.rpartition(".")[2] == file_name and hasattr(module, cls.__name__):
            folder = Path(module.__file__).parent
            common = {file.name for file in own_folder.glob("*_dehvf.py") if (folder / file.name).is_file()}
            if not filecmp.cmpfiles(own_folder, folder, common, shallow=False)[1]:  # the files that differ
                return getattr(module, cls.__name__)
    return cls


@shared
@strict
class DehvfConfig(PreTrainedConfig):
    r"""
    Configuration of [`DehvfForConditionalGeneration`]. The defaults are for LLaMA-7B with CLIP ViT-L/14 and give
    4,163,783 trained parameters.

    The bases:
        vision_config (`dict` or `PreTrainedConfig`): the frozen vision encoder, CLIP ViT-L/14 by default.
        text_config (`dict` or `PreTrainedConfig`): the frozen language model, LLaMA-7B by default.
        vision_model_id, text_model_id (`str`, *optional*): Hub id or folder that the frozen weights are loaded from.
        vision_model_revision, text_model_revision (`str`, *optional*): commit of those repositories; `None` for a
            folder.
        merged_base (`bool`): whether the frozen weights are saved with the adapters, in `vision_model` and
            `text_model`, and are loaded from there.
        image_size (`int`, *optional*): side in pixels of the square images that the vision encoder is given. It may be
            any multiple of the patch size; the position embeddings are interpolated. Defaults to the encoder's own
            size, which need not be a multiple.
        max_images (`int`): maximum number of images per sample. If it is larger than 1, each image after the first has
            a learned embedding that is added to its slots.
        image_tiles (`str`, *optional*): rows and columns of tiles, such as `"2x2"`, that an image larger than
            `image_size` is cut into. The vision encoder is given the tiles in addition to the whole image, as further
            images of the sample, as in LLaVA-NeXT.

    The hierarchy and its fuser (method steps 2 to 5):
        num_groups (`int`, K): number of groups into which the layers of both models are split, in order of depth
            (paper: 4).
        layer_fusion (`str`): how a language layer weights the candidates of its group. `"adaptive"`: the fuser
            computes the weights for each image; `"mean"`: equal weights; `"penultimate"`: only the penultimate vision
            layer, which is MemVP.
        layer_mapping (`str` or `list[list[int]]`): which group a language layer reads. `"hierarchical"`: shallow
            layers read shallow groups, deep layers read deep groups; `"random"`: each group is read by the same number
            of layers, chosen at random. Alternatively, a list of vision layers, counted from 0, for each language
            layer, which replaces the groups and to which the penultimate layer is not added.
        layer_mapping_seed (`int`): random seed of `layer_mapping="random"`.
        fuser_query (`str`): query of the fuser. `"network"`: the input embedding network, for each language layer and
            position; `"tokens"`: one learned vector for each language layer and position; `"instruction"`: the input
            embedding network with the user's text instead of the language layer (as in IGVA, arXiv 2501.08443);
            `"layer+instruction"`: with the sum of both.
        layer_embedding_size (`int`): width of the embeddings that enter the input embedding network (64, chosen to
            match the paper's parameter count).
        fuser_hidden_size (`int`, r): width of the fuser (paper: 64).
        fuser_num_layers (`int`, k): blocks of the fuser (paper: 4).
        fuser_num_heads (`int`): attention heads of the fuser (paper: 4).
        fuser_intermediate_size (`int`): hidden width of the fuser's FFNs (256, chosen to match the parameter count).
        fuser_hidden_act (`str`): activation in the fuser's FFNs and in the input embedding network.

    The visual memory (method steps 6 to 9):
        visual_prompts (`str`): which memory slots contain visual features. `"keys_and_values"`; `"shared"`: keys and
            values contain the same features; `"keys"`; `"values"`; `"none"`: slots contain only position embeddings.
        num_memory_slots (`int`, *optional*, S): entries appended to each FFN, at least the number of patches (7B: 320,
            13B: 400). By default 320, or the number of patches if there are more.
        projector_hidden_size (`int`): hidden width of the projector (MemVP: 128).
        projector_initializer (`str`): initialization of the projector's weights: `"normal"`, with `initializer_range`;
            `"xavier"` (uniform), as in MemVP's code; or `"zero"`: normal, except that `W_2` is zero, so that the
            language model is unchanged at first.
        visual_scale (`float`, lambda): scale of the visual features (MemVP: 0.01).
        memory_scale (`float`, s): scale of what the memory adds to an FFN (MemVP's LLaMA code: 0.1).
        memory_form (`str`): how FFNs read visual features. `"factored"`: in the width of the projector, which gives
            the same result and is nearly always cheaper; `"materialised"`: as keys and values of full width, which are
            computed in each FFN; `"auto"`: the one that takes fewer operations, see `MemoryFFN`.
        memory_dropout (`float`): dropout on the activations of the slots in training (MemVP: 0.1).

    The vision adapters (method step 10):
        vision_adapter_size (`int`): width of the adapter beside each FFN of the vision encoder (MemVP: 12).
        vision_adapter_scale (`float`): scale of the output of these adapters (MemVP: 0.1).
        vision_adapter_dropout (`float`): dropout on their hidden activations in training (MemVP: 0.1).

    initializer_range (`float`): standard deviation of the initial weights of the projector, the vision adapters and
        the key position embeddings. The fuser and its query are initialized like PyTorch's own modules.

    Raises:
        ValueError: if a value is invalid, or values contradict each other; the message says which and what to change.
    """

    model_type = "dehvf"
    keys_to_ignore_at_inference = ["past_key_values", "cache", "image_outputs"]
    sub_configs = {"vision_config": AutoConfig, "text_config": AutoConfig}

    vision_config: dict | PreTrainedConfig | None = None
    text_config: dict | PreTrainedConfig | None = None
    vision_model_id: str | None = None
    text_model_id: str | None = None
    vision_model_revision: str | None = None
    text_model_revision: str | None = None
    merged_base: bool = False
    image_size: int | None = None
    max_images: int = 1
    image_tiles: str | None = None

    num_groups: int = 4
    layer_fusion: Literal["adaptive", "mean", "penultimate"] = "adaptive"
    layer_mapping: Literal["hierarchical", "random"] | list[list[int]] = "hierarchical"
    layer_mapping_seed: int = 0
    fuser_query: Literal["network", "tokens", "instruction", "layer+instruction"] = "network"
    layer_embedding_size: int = 64
    fuser_hidden_size: int = 64
    fuser_num_layers: int = 4
    fuser_num_heads: int = 4
    fuser_intermediate_size: int = 256
    fuser_hidden_act: str = "gelu"

    visual_prompts: Literal["keys_and_values", "shared", "keys", "values", "none"] = "keys_and_values"
    num_memory_slots: int | None = None
    projector_hidden_size: int = 128
    projector_initializer: Literal["normal", "xavier", "zero"] = "normal"
    visual_scale: float | int = 0.01
    memory_scale: float | int = 0.1
    memory_form: Literal["auto", "factored", "materialised"] = "auto"
    memory_dropout: float | int = 0.1

    vision_adapter_size: int = 12
    vision_adapter_scale: float | int = 0.1
    vision_adapter_dropout: float | int = 0.1

    initializer_range: float | int = 0.02
    tie_word_embeddings: bool = False

    def __post_init__(self, **kwargs):
        self.vision_config = _base_config(self.vision_config, "clip_vision_model", CLIP_VIT_L_14)
        self.text_config = _base_config(self.text_config, "llama", {})
        for key in BASE_SIZES:
            _check_sizes(getattr(self, key), key)
        if self.num_memory_slots is None:
            self.num_memory_slots = max(NUM_MEMORY_SLOTS, self.num_patches)
        # By default each base keeps its own implementation: `None` would also be set on the configs of loaded bases,
        # whose layers would then attend without a causal mask
        kwargs.setdefault("attn_implementation", {})
        super().__post_init__(**kwargs)
        self.auto_map = dict(AUTO_MAP)
        self.tie_word_embeddings = bool(getattr(self.text_config, "tie_word_embeddings", False))
        disable_noise(self.vision_config)
        disable_noise(self.text_config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, **kwargs):
        """
        As in `transformers`.

        Raises:
            OSError: if there is no config, or it is not valid JSON.
            ValueError: if it is not a DEHVF config, or has invalid values.
        """
        try:
            return super().from_pretrained(pretrained_model_name_or_path, **kwargs)
        except (OSError, ValueError):
            raise
        except Exception as error:  # a config from elsewhere can be wrong in more ways than could be listed
            raise ValueError(
                f"The config in {pretrained_model_name_or_path} cannot be used ({type(error).__name__}: {error}). "
                f"Check the arguments ({', '.join(kwargs)}), and use the `config.json` of the adapter."
            ) from error

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in `transformers`. Raises an error for the config of another model, or if a given value is invalid."""
        if (model_type := config_dict.get("model_type")) != cls.model_type:
            raise ValueError(
                f"The config has `model_type={model_type!r}`, but configs of DEHVF adapters have {cls.model_type!r}. "
                "Load it with the class that it was made for."
            )
        found = super().from_dict(config_dict, **kwargs)
        # `transformers` sets the values in `kwargs` on a config that it has already validated
        (found[0] if isinstance(found, tuple) else found).validate()
        return found

    @property
    def _attn_implementation(self) -> str | None:
        return super()._attn_implementation

    @_attn_implementation.setter
    def _attn_implementation(self, value: str | dict | None):
        """Raises `ValueError` for keys other than those of the base models, which would have no effect."""
        if isinstance(value, dict) and (unknown := value.keys() - {"", *BASE_SIZES}):
            raise ValueError(
                f"`attn_implementation` has the key {min(unknown)!r}. Give one value for both base models, or a dict "
                f"with the keys {' and '.join(map(repr, BASE_SIZES))}."
            )
        PreTrainedConfig._attn_implementation.fset(self, value)

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return self.vision_config.image_size if self.image_size is None else self.image_size

    @property
    def num_patches(self) -> int:
        """Patches per image (n)."""
        return (self.resolution // self.vision_config.patch_size) ** 2

    @property
    def max_encoded_images(self) -> int:
        """Maximum number of images that the vision encoder is given for a sample: `max_images`, with their tiles."""
        return self.max_images * (1 + math.prod(read_tiles(self.image_tiles)))

    @property
    def image_token_id(self) -> int:
        """An id that no token has, since there are no image tokens. TRL's `GRPOTrainer` reads it."""
        return -1

    @property
    def memory_positions(self) -> list[int]:
        """The positions, key (0) and value (1), that have their own features."""
        positions = {"keys_and_values": [0, 1], "keys": [0], "values": [1], "shared": [0], "none": []}
        return positions[self.visual_prompts]

    @property
    def reads_instruction(self) -> bool:
        """Whether the memory of an image also depends on the question."""
        adaptive = self.layer_fusion == "adaptive" and self.visual_prompts != "none"
        return adaptive and "instruction" in self.fuser_query

    def validate_numbers(self):
        """Each size is positive, each dropout a probability, and the fuser's width splits evenly into heads."""
        sizes = ("max_images", "num_groups", "layer_embedding_size", "fuser_hidden_size", "fuser_num_layers")
        sizes += ("fuser_num_heads", "fuser_intermediate_size", "num_memory_slots", "projector_hidden_size")
        for name in (*sizes, "vision_adapter_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be at least 1.")
        for name in ("memory_dropout", "vision_adapter_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must lie in [0, 1).")
        for name in ("visual_scale", "memory_scale", "vision_adapter_scale", "initializer_range"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"`{name}` is {getattr(self, name)}, but must be a finite number.")
        if self.initializer_range < 0:
            raise ValueError(f"`initializer_range` is {self.initializer_range}, but must be at least 0.")
        if self.fuser_hidden_size % self.fuser_num_heads:
            raise ValueError(
                f"`fuser_hidden_size={self.fuser_hidden_size}` is not a multiple of "
                f"`fuser_num_heads={self.fuser_num_heads}`. Change one of them."
            )
        depths = {"fuser_num_layers": self.fuser_num_layers}
        depths |= {f"{key}.num_hidden_layers": getattr(self, key).num_hidden_layers for key in self.sub_configs}
        for name, depth in depths.items():
            if depth > MAX_LAYERS:
                raise ValueError(f"`{name}` is {depth}, but must be at most {MAX_LAYERS}.")

    def validate_groups(self):
        """Each group gets at least one layer of both models."""
        if isinstance(self.layer_mapping, list):
            return  # the lists replace the groups
        for key in ("vision_config", "text_config"):
            num_layers = getattr(self, key).num_hidden_layers
            if num_layers < max(self.num_groups, 2):
                raise ValueError(
                    f"`{key}` has {num_layers} layers, too few for `num_groups={self.num_groups}`: each group needs "
                    "at least one layer, and the penultimate layer must exist. Lower `num_groups` or use a deeper "
                    "model."
                )

    def validate_layer_mapping(self):
        """An explicit mapping lists existing vision layers for each language layer."""
        if not isinstance(self.layer_mapping, list):
            return
        num_text_layers, num_vision_layers = self.text_config.num_hidden_layers, self.vision_config.num_hidden_layers
        if self.layer_fusion == "penultimate":
            raise ValueError(
                '`layer_mapping` lists vision layers, but `layer_fusion="penultimate"` reads only the penultimate '
                'layer. Remove `layer_mapping`, or set `layer_fusion` to "adaptive" or "mean".'
            )
        if len(self.layer_mapping) != num_text_layers:
            raise ValueError(
                f"`layer_mapping` has {len(self.layer_mapping)} lists, but the language model has {num_text_layers} "
                "layers. Give one list of vision layers for each."
            )
        for layer, candidates in enumerate(self.layer_mapping):
            if not candidates or not all(0 <= candidate < num_vision_layers for candidate in candidates):
                raise ValueError(
                    f"`layer_mapping` has {candidates} for language layer {layer}, but each needs one or more of the "
                    f"vision layers 0 to {num_vision_layers - 1}."
                )

    def validate_image_size(self):
        """An image is a whole number of patches, or has the encoder's own size, of which it may drop the rest."""
        patch_size = self.vision_config.patch_size
        if self.image_size in (None, self.vision_config.image_size):
            return
        if self.image_size < 1 or self.image_size % patch_size:
            nearest = max(round(self.image_size / patch_size), 1) * patch_size
            raise ValueError(
                f"`image_size` is {self.image_size}, but must be a positive multiple of the vision encoder's patch "
                f"size, {patch_size}. The nearest is {nearest}."
            )

    def validate_image_tiles(self):
        """Tiles are given as rows and columns."""
        read_tiles(self.image_tiles)

    def validate_memory_slots(self):
        """Each patch has a slot."""
        if self.visual_prompts != "none" and self.num_memory_slots < self.num_patches:
            raise ValueError(
                f"`num_memory_slots={self.num_memory_slots}` is less than the {self.num_patches} patches of an image "
                f"(image_size {self.resolution}, patch_size {self.vision_config.patch_size}). Raise "
                f"`num_memory_slots` to at least {self.num_patches}, or lower `image_size`."
            )

    def validate_activation(self):
        """The fuser's activation exists."""
        if self.fuser_hidden_act not in ACT2FN:
            raise ValueError(f"`fuser_hidden_act` is {self.fuser_hidden_act!r}. Give one of {', '.join(ACT2FN)}.")


# Values that the modules of an adapter keep from when they were built, and that change no name or shape of a tensor
BUILT_IN_VALUES = ("num_groups", "layer_fusion", "layer_mapping", "layer_mapping_seed", "visual_prompts")
BUILT_IN_VALUES += ("fuser_num_heads", "fuser_hidden_act", "vision_adapter_scale", "vision_adapter_dropout")


def read_tiles(image_tiles: str | None) -> tuple[int, int]:
    """The numbers of rows and columns of tiles, 0 without tiles. Raises `ValueError` for another form than '2x2'."""
    if image_tiles is None:
        return 0, 0
    if not (found := re.fullmatch(r"([1-9])x([1-9])", image_tiles)):
        raise ValueError(
            f"`image_tiles` is {image_tiles!r}, but must be rows and columns from 1 to 9, such as '2x2', or None."
        )
    return int(found[1]), int(found[2])


def split_into_runs(num_layers: int, num_groups: int) -> list[range]:
    """Cuts layers `0..num_layers-1` into consecutive runs whose lengths differ by at most one, longer ones first."""
    short, extra = divmod(num_layers, num_groups)
    starts = [group * short + min(group, extra) for group in range(num_groups + 1)]
    return [range(start, end) for start, end in zip(starts, starts[1:])]


def candidate_layers(config: DehvfConfig) -> list[list[int]]:
    """
    The vision layers, counted from 0, that each language layer may read (method step 2): the layers of its group, then
    the penultimate layer; or the layers that `layer_mapping` lists.
    """
    if isinstance(config.layer_mapping, list):
        return [list(candidates) for candidates in config.layer_mapping]
    num_vision_layers = config.vision_config.num_hidden_layers
    penultimate = num_vision_layers - 2
    if config.layer_fusion == "penultimate":
        groups = [[penultimate]] * config.num_groups
    else:
        groups = [[*run, penultimate] for run in split_into_runs(num_vision_layers, config.num_groups)]
    text_runs = split_into_runs(config.text_config.num_hidden_layers, config.num_groups)
    rows = [group for group, run in zip(groups, text_runs) for _ in run]
    if config.layer_mapping == "random":
        random.Random(config.layer_mapping_seed).shuffle(rows)
    return rows


DehvfConfig.register_for_auto_class()

__all__ = ["DehvfConfig"]
