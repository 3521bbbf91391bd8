# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
The baselines of the paper's tables, and ADEM-VL and IGVA, on the same frozen bases and data as DEHVF. `train.py`
builds them in the same way:

    model = build("llava-lora", "openai/clip-vit-large-patch14", "huggyllama/llama-7b", lora_rank=8)

Each method is the LLaVA class of `transformers` with the loaded bases as vision tower and language model. Its trained
modules are in a separate file: `llava.py`, `llava_lora.py`, `lavin.py`, `llama_adapter.py`, `llama_adapter_v2.py`,
`adem_vl.py`, `igva.py`. Shared code is in this file.

Letters at the end of a line give shapes: B samples, I images, n tokens per image, T tokens, L language layers,
A prompt length, h language width.
"""

import math
import os
import shutil
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlavaConfig, LlavaForConditionalGeneration
from transformers.activations import ACT2FN
from transformers.hf_argparser import HfArg
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_NAME

from dehvf import DehvfConfig, bases, files, injection, layouts


METHODS = {
    **{"llava": "llava", "llava-lora": "llava_lora", "lavin": "lavin", "llama-adapter": "llama_adapter"},
    **{"llama-adapter-v2": "llama_adapter_v2", "adem-vl": "adem_vl", "igva": "igva"},
}
# Language models that all methods can adapt: their layers pass further keyword arguments to `self_attn`
TEXT_TYPES = ("llama", "mistral")
# Vision encoders that all methods support; LaVIN and ADEM-VL find the modules of their layers by name
VISION_TYPES = ("clip_vision_model", "siglip_vision_model", "dinov2")


@dataclass
class BaselineArguments:
    """
    Sizes of the baselines. The defaults match the trained parameters of the 7B rows of the paper's tables: 4.4 M
    (LLaVA-LoRA), 3.8 M (LaVIN), 1.8 M (LLaMA-Adapter) and 14 M (LLaMA-Adapter V2). The defaults for ADEM-VL (4.5 M,
    for ScienceQA at 7B) and IGVA are those of their authors. "ours" marks values that no source gives. Each help text
    begins with the methods that use the value.

    Raises:
        ValueError: if a value cannot work with any base models.
    """

    lora_rank: int = HfArg(default=8, help="llava-lora, igva: rank (ours, matches the paper's count).")
    lora_alpha: float = HfArg(default=16, help="llava-lora, igva: scale times rank (LLaVA's train.py).")
    lora_dropout: float = HfArg(default=0.05, help="llava-lora, igva: dropout (LLaVA's train.py).")
    lora_target_modules: list[str] = HfArg(
        default_factory=lambda: ["q_proj", "v_proj"],
        help="llava-lora, igva: adapted linear layers of the language model (LoRA, arXiv 2106.09685).",
    )
    lora_projector_size: int = HfArg(
        default=40, help="llava-lora: hidden width of the projector (ours, matches the paper's count)."
    )
    lavin_adapter_size: int = HfArg(default=8, help="lavin: width of the adapters (scripts/finetuning_sqa_7b.sh).")
    lavin_adapter_dropout: float = HfArg(default=0.1, help="lavin: dropout inside the adapters (mm_adapter.py).")
    lavin_temperature: float = HfArg(
        default=10.0, help="lavin: temperature of the routers (scripts/finetuning_sqa_7b.sh)."
    )
    lavin_image_tokens: int = HfArg(
        default=6, help="lavin: class tokens per image, from as many evenly spaced layers (arXiv 2305.15023)."
    )
    lavin_projector_size: int = HfArg(default=128, help="lavin: hidden width of the visual adapter (train.py there).")
    adaption_prompt_length: int = HfArg(
        default=10, help="llama-adapter, llama-adapter-v2: prompts per layer (arXiv 2303.16199)."
    )
    adaption_prompt_layers: int | None = HfArg(
        default=None,
        help="llama-adapter, llama-adapter-v2: topmost layers with prompts; by default all but two, or all but one "
        "for llama-adapter-v2, as there.",
    )
    adaption_image_layers: int = HfArg(
        default=4, help="llama-adapter: vision layers whose class tokens make the image feature (ours)."
    )
    adaption_projector_size: int = HfArg(
        default=64, help="llama-adapter: hidden width of the projector (ours, matches the paper's count)."
    )
    adapter_v2_prompts: int = HfArg(
        default=20, help="llama-adapter-v2: prompts made from an image (arXiv 2304.15010)."
    )
    adapter_v2_size: int = HfArg(
        default=288, help="llama-adapter-v2: width of the blocks that make them (ours, matches the paper's count)."
    )
    adapter_v2_layers: int = HfArg(
        default=8, help="llama-adapter-v2: number of these blocks (llama_adapter.py there, v_depth)."
    )
    adapter_v2_heads: int = HfArg(
        default=16, help="llama-adapter-v2: attention heads of these blocks (v_num_heads there)."
    )
    adem_adapter_size: int = HfArg(
        default=12, help="adem-vl: width of the vision adapters (README there, --adapter_dim)."
    )
    adem_adapter_scale: float = HfArg(
        default=0.1, help="adem-vl: scale of what the vision adapters add (adem/build.py there)."
    )
    adem_adapter_dropout: float = HfArg(
        default=0.1, help="adem-vl: dropout inside the vision adapters (adem/adapter.py there)."
    )
    adem_projector_size: int = HfArg(
        default=128, help="adem-vl: hidden width of both projectors (train.py there, --hidden_proj)."
    )
    adem_pool_sizes: list[int] = HfArg(
        default_factory=lambda: [1, 2],
        help="adem-vl: for each scale the side of the squares of patches that are averaged. 1 and 2 turn 16 x 16 "
        "patches into 16 x 16 and 8 x 8 (down_sample_num 256 64 in their README).",
    )
    adem_image_scale: float = HfArg(
        default=0.01, help="adem-vl: scale of the projected patches (README there, --beta)."
    )
    adem_memory_scale: float = HfArg(
        default=0.1, help="adem-vl: scale of what the language FFNs read (README there, --alpha)."
    )
    adem_drop_ratio: float = HfArg(
        default=0.1,
        help="adem-vl: fraction of each token's scores, the lowest ones, set to zero (README there, --drop_ratio).",
    )
    igva_num_groups: int = HfArg(default=4, help="igva: groups of vision layers (scripts/v1_5/finetune_balance.sh).")
    igva_hidden_size: int = HfArg(
        default=1024, help="igva: width of the aggregator (same script, --aggregator_hidden_dim)."
    )
    igva_num_layers: int = HfArg(
        default=4, help="igva: blocks of the aggregator (same script, --aggregator_num_transformers)."
    )
    igva_num_heads: int = HfArg(
        default=4, help="igva: attention heads of the aggregator (same script, --aggregator_num_heads)."
    )

    def __post_init__(self):
        values = vars(self)
        for field in fields(BaselineArguments):
            name, value = field.name, values[field.name]
            if field.type in (int, int | None) and value is not None and value < 1:
                raise ValueError(f"`{name}` is {value}, but must be at least 1.")
            if field.type is float and not math.isfinite(value):
                raise ValueError(f"`{name}` is {value}, but must be a finite number.")
            if name.endswith(("_dropout", "_drop_ratio")) and not 0 <= value < 1:
                raise ValueError(f"`{name}` is {value}, but must lie in [0, 1).")
        if values["lavin_temperature"] <= 0:
            raise ValueError(f"`lavin_temperature` is {values['lavin_temperature']}, but must be more than 0.")
        if values["lavin_adapter_size"] % 2:
            raise ValueError(f"`lavin_adapter_size` is {values['lavin_adapter_size']}, but must be even.")
        for size, heads in (("adapter_v2_size", "adapter_v2_heads"), ("igva_hidden_size", "igva_num_heads")):
            if values[size] % values[heads]:
                raise ValueError(
                    f"`{size}` is {values[size]}, which is not a multiple of `{heads}`, {values[heads]}. Change one "
                    "of them."
                )


# --- shared modules ---


class Projector(nn.Module):
    """
    A two-layer network from vision to language width, `(num_images, num_tokens, in_size)` to `(num_images, num_tokens,
    out_size)`. It replaces the projector of LLaVA, which has 21 M parameters at 7B. Initialised as in LaVIN.
    """

    def __init__(self, in_size: int, size: int, out_size: int, hidden_act: str):
        super().__init__()
        self.down = nn.Linear(in_size, size)
        self.act = ACT2FN[hidden_act]
        self.up = nn.Linear(size, out_size)
        for linear in (self.down, self.up):
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.up(self.act(self.down(features.to(self.down.weight.dtype))))


def class_features(hidden_states: torch.Tensor, has_class_token: bool) -> torch.Tensor:
    """
    The class tokens of hidden states, `(num_images, num_tokens, width)` to `(num_images, width)`. For a vision encoder
    without a class token (SigLIP), the means over the patches, as in DEHVF.
    """
    return hidden_states[:, 0] if has_class_token else hidden_states.mean(dim=1)


class ClassTokenProjector(Projector):
    """
    Reads the concatenated hidden states of several layers, as LLaVA passes them for a list in `vision_feature_layer`,
    and projects their [`class_features`]: one token for every `layers_per_token` layers.
    """

    def __init__(self, vision_config, layers_per_token: int, size: int, out_size: int, hidden_act: str):
        super().__init__(layers_per_token * vision_config.hidden_size, size, out_size, hidden_act)
        self.has_class_token = layouts.find_vision_layout(vision_config).has_class_token

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        features = class_features(features, self.has_class_token)
        return super().forward(features.unflatten(-1, (-1, self.down.in_features)))


def spread_layers(num_layers: int, number: int) -> list[int]:
    """`number` evenly spaced layers of `1..num_layers`, including the last one: 6 of 24 are 4, 8, ..., 24."""
    if not 1 <= number <= num_layers:
        raise ValueError(
            f"Class tokens of {number} vision layers are needed (`lavin_image_tokens`, `adaption_image_layers`), but "
            f"the vision encoder has {num_layers} layers. Set it to 1 to {num_layers}."
        )
    return [num_layers * (index + 1) // number for index in range(number)]


def make_contiguous(module: nn.Module, arguments: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """
    A forward pre-hook of the head. For a slice of the hidden states (`logits_to_keep`), `nn.Linear` with a frozen
    weight multiplies each row separately. In bfloat16 on a CPU it also copies the weight for each row, which takes
    longer than the layers.
    """
    return (arguments[0].contiguous(),)


class FrozenBasesForConditionalGeneration(LlavaForConditionalGeneration):
    """
    The LLaVA class of `transformers` with loaded, frozen bases. Subclasses add the trained modules; only these are
    saved.

    Args:
        vision_tower, causal_lm (`PreTrainedModel`): the bases, of a type in `VISION_TYPES` and `TEXT_TYPES`.
        projector (`nn.Module`): replaces `multi_modal_projector`.
        image_size (`int`, *optional*): side of the images in pixels, as in [`DehvfConfig`].
        config_values: fields of `LlavaConfig` about the features of the vision tower.

    Raises:
        ValueError: if `image_size` is not a positive multiple of the patch size.
    """

    def __init__(self, vision_tower, causal_lm, projector: nn.Module, image_size: int | None, **config_values):
        config = LlavaConfig(
            vision_config=vision_tower.config,
            text_config=causal_lm.config,
            image_token_index=causal_lm.config.vocab_size,  # the first unused token id; it has no embedding
            attn_implementation=causal_lm.config._attn_implementation,  # otherwise it is reset in the bases
            image_size=image_size,
            **config_values,
        )
        DehvfConfig.validate_image_size(config)  # it has the fields that the check needs
        with torch.device("meta"):  # all modules that LLaVA builds itself are replaced
            super().__init__(config)
        self.vision_layout = layouts.find_vision_layout(vision_tower.config)
        self.model.vision_tower = vision_tower
        self.model.language_model = causal_lm.base_model
        self.lm_head = causal_lm.get_output_embeddings()
        self.lm_head.register_forward_pre_hook(make_contiguous)
        self.generation_config = bases.drop_ignored_values(causal_lm.generation_config, causal_lm.name_or_path)
        self.requires_grad_(False)
        self.model.multi_modal_projector = projector

    @property
    def resolution(self) -> int:
        """Side of an image in pixels."""
        return self.config.image_size or self.config.vision_config.image_size

    @property
    def interpolation(self) -> dict:
        """Arguments of the vision encoder for images of a size other than its own."""
        return {} if self.resolution == self.config.vision_config.image_size else self.vision_layout.interpolation

    @property
    def grid_size(self) -> int:
        """Number of patches along the side of an image."""
        return self.resolution // self.config.vision_config.patch_size

    def image_features(
        self, pixel_values: torch.Tensor | None = None, image_mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """
        Args:
            pixel_values: `(batch_size, num_channels, height, width)`; by default one blank image.
            image_mask: `(batch_size,)` booleans, false for rows without an image, which are removed. By default all
                true.

        Returns:
            `torch.Tensor` of shape `(num_images, num_image_tokens, language_hidden_size)`.
        """
        images = self.select_images(pixel_values, image_mask)
        return torch.stack(self.model.get_image_features(images, **self.interpolation).pooler_output)

    def select_images(self, pixel_values: torch.Tensor | None, image_mask: torch.Tensor | None) -> torch.Tensor:
        """The images among the rows, or one blank image if there are none."""
        if pixel_values is None:
            size, channels = self.resolution, self.config.vision_config.num_channels
            return torch.zeros(1, channels, size, size, device=self.device)
        return pixel_values.flatten(0, -4) if image_mask is None else pixel_values[image_mask]

    def activation_checkpointing_enable(self, activation_checkpointing_kwargs=None, **kwargs):
        arguments = injection.checkpointing_arguments(activation_checkpointing_kwargs)
        super().activation_checkpointing_enable(arguments, **kwargs)

    def _trained_names(self) -> set[str]:
        return {name for name, parameter in self.named_parameters() if parameter.requires_grad}

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict=None, **kwargs):
        """Writes the trained tensors (`model.safetensors`) and the config; `load_trained` reads them."""
        names = self._trained_names()
        trained = {name: tensor for name, tensor in (state_dict or self.state_dict()).items() if name in names}
        kwargs.setdefault("max_shard_size", "1TB")  # `load_trained` and the checksum expect one file
        super().save_pretrained(
            save_directory, is_main_process, state_dict=trained, save_original_format=False, **kwargs
        )
        if is_main_process:  # safetensors denies other users access
            shutil.copymode(Path(save_directory) / CONFIG_NAME, Path(save_directory) / SAFE_WEIGHTS_NAME)

    def load_trained(self, folder: str | os.PathLike):
        """
        Reads what `save_pretrained` wrote.

        Raises:
            ValueError: if the saved model has another method or other values, or other tensors are trained.
            OSError, ValueError: as in [`read_tensors`].
        """
        saved = AutoConfig.from_pretrained(folder)
        for name in ("method", "image_size", *(field.name for field in fields(BaselineArguments))):
            own, other = (getattr(config, name, None) for config in (self.config, saved))
            if own != other:
                raise ValueError(
                    f"{folder} was saved with `{name}={other}`, but this model has `{name}={own}`. Build the model "
                    "with the method and values of the saved one."
                )
        (tensors, _), names = files.read_tensors(Path(folder) / SAFE_WEIGHTS_NAME), self._trained_names()
        if differing := sorted(tensors.keys() ^ names):
            raise ValueError(
                f"The tensors in {folder} and the {len(names)} trained here differ in {len(differing)} names, among "
                f"them {differing[0]}. Build the model on the bases of the saved one."
            )
        self.load_state_dict(tensors, strict=False)


class ImageTokensForConditionalGeneration(FrozenBasesForConditionalGeneration):
    """A method whose rows contain the ids `image_tokens` for each image; its features replace their embeddings."""

    @property
    def image_tokens(self) -> list[int]:
        """The placeholders of one image in `input_ids`."""
        return [self.config.image_token_id] * self.config.image_seq_length

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        features: torch.Tensor | None = None,
        **kwargs,
    ):
        """
        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, if any sample has an image, or `(batch_size,
                num_images, num_channels, height, width)`, which only LLaVA and LLaVA-LoRA read.
            image_mask: `(batch_size,)` or `(batch_size, num_images)` booleans: which samples have which images. By
                default all.
            features: the result of `image_features`, if it has been computed.

        The other arguments and the output are those of `LlavaForConditionalGeneration`.

        Raises:
            ValueError: if `input_ids` have more or fewer placeholders than the images need.
        """
        embed = self.get_input_embeddings()
        if pixel_values is None:
            inputs_embeds = embed(input_ids)  # B T h
            if self.training:
                # DDP fails if parameters have no gradient, so without images the vision path runs with zero effect
                inputs_embeds = inputs_embeds + (0 * self.image_features().sum()).to(inputs_embeds.dtype)
        else:
            inputs_embeds = embed(input_ids.masked_fill(input_ids == self.config.image_token_id, 0))
            if features is None:
                features = self.image_features(pixel_values, image_mask)
            features = features.to(inputs_embeds.dtype)  # I n h
            placeholders = self.model.get_placeholder_mask(input_ids, inputs_embeds, features)
            inputs_embeds = inputs_embeds.masked_scatter(placeholders, features)
        named = {"attention_mask": attention_mask, "position_ids": position_ids, "logits_to_keep": logits_to_keep}
        return super().forward(inputs_embeds=inputs_embeds, **named, **kwargs)


# --- building ---


def assemble(method: str, vision_tower, causal_lm, arguments: BaselineArguments, image_size: int | None = None):
    """
    Creates new trained modules, in fp32, on loaded bases.

    Args:
        method: one of `METHODS`.
        vision_tower, causal_lm, image_size: see [`FrozenBasesForConditionalGeneration`].

    Raises:
        ValueError: if the method does not exist, a base has an unsupported type, or a value does not fit the bases.
    """
    for base, known in ((vision_tower, VISION_TYPES), (causal_lm, TEXT_TYPES)):
        if base.config.model_type not in known:
            raise ValueError(f"The baselines support {', '.join(known)}, not `{base.config.model_type}`.")
    with causal_lm.device:
        return _method_module(method).assemble(vision_tower, causal_lm, arguments, image_size)


def _method_module(method: str):
    if method not in METHODS:
        raise ValueError(f"There is no baseline `{method}`. Baselines: {', '.join(METHODS)}.")
    return import_module(f".{METHODS[method]}", __name__)  # imported here, so that other methods do not need peft


def build(
    method: str,
    vision_model: str,
    text_model: str,
    *,
    dtype="auto",
    attn_implementation: str | None = None,
    vision_model_revision: str | None = None,
    text_model_revision: str | None = None,
    image_size: int | None = None,
    **method_values,
) -> FrozenBasesForConditionalGeneration:
    """
    Loads the bases and creates a new baseline on them.

    Args:
        vision_model, text_model: Hub id or folder of the vision encoder and of the language model.
        dtype, attn_implementation: for the bases, as in `from_pretrained`.
        vision_model_revision, text_model_revision: commits of those repositories.
        image_size: side of the images in pixels, by default the vision encoder's own.
        method_values: fields of [`BaselineArguments`].

    Raises:
        ValueError: as [`assemble`].
    """
    _method_module(method)  # reports an unknown method or a missing peft before the bases are loaded
    arguments = BaselineArguments(**method_values)
    options = {"dtype": dtype, "attn_implementation": attn_implementation}
    vision_tower = _load_base(AutoModel, "vision", vision_model, vision_model_revision, **options)
    causal_lm = _load_base(AutoModelForCausalLM, "text", text_model, text_model_revision, **options)
    model = assemble(method, vision_tower, causal_lm, arguments, image_size)
    facts = {"method": method, **vars(arguments)}
    for key, location, base in (("vision", vision_model, vision_tower), ("text", text_model, causal_lm)):
        facts[f"{key}_model_id"] = os.path.abspath(location) if os.path.isdir(location) else location
        facts[f"{key}_model_revision"] = getattr(base.config, "_commit_hash", None)
    model.config.update(facts)  # recorded in the results of a run
    return model.eval()


def _load_base(auto_class, key: str, location: str, revision: str | None, **options):
    config = bases.load_base_config(location, key, revision)
    return auto_class.from_pretrained(location, config=config, revision=revision, **options)
