# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
DEHVF: dynamic embedding of hierarchical visual features (arXiv 2508.17638) for stock `transformers` models.

The file follows the data: pixels -> features of all vision layers -> fuser -> visual memory -> FFNs of the frozen
language model. An image is encoded once. Its `visual_memory`, one tensor with the batch first, is read by every FFN in
every forward pass.

Letters at the end of a line give shapes: B samples, N vision layers (N' of them read), D language layers, K groups, M
candidates per group, P positions (key and value), n patches, S memory slots, T tokens, d vision width, h language
width, r fuser width, c projector width.
"""

import copy
from dataclasses import dataclass, fields, replace

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from transformers import AutoModel, AutoModelForCausalLM
from transformers import initialization as init
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.modeling_utils import PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.generic import can_return_tuple

from .adapters_dehvf import AdapterMixin, is_adapter_name
from .bases_dehvf import drop_ignored_values
from .configuration_dehvf import BUILT_IN_VALUES, DehvfConfig
from .fuser_dehvf import (
    FuserLinear,
    HierarchicalVisualFuser,
    InputEmbeddingNetwork,
    LayerHierarchy,
    LearnableQueryTokens,
)
from .generation_dehvf import DehvfGenerationMixin
from .hub_dehvf import HubMixin
from .injection_dehvf import (
    AdaptedFFN,
    CheckpointingMixin,
    LayerMemory,
    MemoryFFN,
    MixedLayerMemory,
    VisionAdapter,
    ZeroLinear,
    extend_layers,
    run_extended,
)
from .inputs_dehvf import (
    as_encoder_input,
    check_image_mask,
    check_instruction,
    check_instruction_is_marked,
    check_instruction_is_whole,
    check_is_not_empty,
    check_no_image,
    check_one_of,
    check_pixel_values,
    check_visual_memory,
    find_instruction,
    find_positions,
    mean_embedding,
)
from .layouts_dehvf import VisionLayout, find_text_layout, find_vision_layout
from .memory_dehvf import (
    MemorySlots,
    ProjectorBasis,
    VisualProjector,
    as_visual_memory,
    count_images,
    drop_absent_images,
    find_slot_mask,
    flatten_images,
    join_images,
    mask_images,
)
from .outputs_dehvf import DehvfCausalLMOutputWithPast, DehvfModelOutputWithPast, compute_logits, keep_positions
from .switching_dehvf import BASE_MODEL, AdapterSet, SwitchingMixin


# --- one adapter: all that is trained, and what encodes images (method steps 1 to 7 and 10) ---


@dataclass(frozen=True, eq=False)
class Adapter:
    """
    The modules of one adapter and its config. A call keeps the adapter with which it began, so that other threads may
    activate another one. Modules that the config does not use are `None`, since DDP fails if parameters get no
    gradient.
    """

    config: DehvfConfig
    vision_layout: VisionLayout
    hierarchy: LayerHierarchy
    memory_slots: MemorySlots
    built_in_values: dict[str, str]
    projector: VisualProjector | None = None
    vision_adapters: nn.ModuleList | None = None
    fuser_query: InputEmbeddingNetwork | LearnableQueryTokens | None = None
    fuser: HierarchicalVisualFuser | None = None

    @classmethod
    def build(cls, config: DehvfConfig) -> "Adapter":
        layout = find_vision_layout(config.vision_config, config.image_size)
        values = {name: str(getattr(config, name)) for name in BUILT_IN_VALUES}
        adapter = cls(config, layout, LayerHierarchy(config), MemorySlots(config), values)
        if config.visual_prompts == "none":
            return adapter
        num_layers_read = max(adapter.hierarchy.layers_read) + 1
        adapter = replace(
            adapter,
            projector=VisualProjector(config),
            vision_adapters=nn.ModuleList(VisionAdapter.from_config(config) for _ in range(num_layers_read)),
        )
        if config.layer_fusion != "adaptive":
            return adapter
        query = (LearnableQueryTokens if config.fuser_query == "tokens" else InputEmbeddingNetwork)(config)
        return replace(adapter, fuser_query=query, fuser=HierarchicalVisualFuser(config))

    def modules(self) -> dict[str, nn.Module]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, nn.Module)}

    def hierarchical_features(self, vision_tower, pixel_values: torch.Tensor, **kwargs):
        """
        Method step 1, and `W_1` and `b_1` of step 6. Returns class features B N d, projected patches B N' n c of the
        layers that are read, and the encoder's output.
        """
        layout = self.vision_layout
        norm = nn.Identity() if layout.norm is None else vision_tower.get_submodule(layout.norm)
        if self.config.resolution != self.config.vision_config.image_size:
            kwargs |= layout.interpolation
        # Methods, since `accelerate` moves modules among the arguments. Layers that are not read have no adapter
        adapters = [adapter.__call__ for adapter in self.vision_adapters]
        adapters += [None] * (self.hierarchy.num_vision_layers - len(adapters))
        hidden_states = []
        outputs = run_extended(vision_tower, adapters, pixel_values, layer_outputs=hidden_states, **kwargs)
        class_features, patches = [], []
        for layer, hidden in enumerate(hidden_states):
            hidden = norm(hidden).to(self.projector.down.weight.dtype)  # B 1+registers+n d
            class_features.append(hidden[:, 0] if layout.has_class_token else hidden.mean(dim=1))
            if layer in self.hierarchy.layers_read:
                patches.append(self.projector.down(hidden[:, layout.num_prefix_tokens :]))
        return torch.stack(class_features, dim=1), torch.stack(patches, dim=1), outputs

    def fusion_weights(self, class_features: torch.Tensor, instruction: torch.Tensor | None) -> torch.Tensor:
        """Weights of all vision layers (method step 4 or its ablations): B D P N."""
        hierarchy = self.hierarchy
        if self.config.layer_fusion == "adaptive":
            weights = self.fuser(self.fuser_query(instruction), class_features, hierarchy.candidates, hierarchy.valid)
        else:
            positions = len(self.config.memory_positions)
            weights = hierarchy.mean_weights().expand(class_features.shape[0], -1, positions, -1)
        return hierarchy.spread(weights)

    def encode(self, vision_tower, pixel_values: torch.Tensor, instruction: torch.Tensor | None, **kwargs):
        """Method steps 1 to 6: the visual memory of images, B D P n c+1, and the encoder's output."""
        class_features, patches, outputs = self.hierarchical_features(vision_tower, pixel_values, **kwargs)
        weights = self.fusion_weights(class_features, instruction).index_select(-1, self.hierarchy.read_index)
        memory = F.silu(torch.einsum("bdpj,bjnc->bdpnc", weights.to(patches.dtype), patches))
        return torch.cat((memory, memory.new_ones(*memory.shape[:-1], 1)), dim=-1), outputs

    def layer_memories(self, visual_memory: torch.Tensor | None, dtype: torch.dtype) -> tuple[LayerMemory, ...]:
        """The memories of the FFNs of all language layers (method step 7), computed once per call of `generate`."""
        config = self.config
        key_features = value_features = [None] * config.text_config.num_hidden_layers
        if visual_memory is not None:  # it may have been encoded by a model in another dtype
            visual_memory = visual_memory.to(dtype)
        num_images = count_images(config, visual_memory)
        keys, values = self.memory_slots(dtype, config.num_patches, num_images)  # S h, S of all images
        slot_mask = find_slot_mask(config, visual_memory, len(keys))
        if visual_memory is not None:
            basis = (config.visual_scale * self.projector.up()).to(dtype).T  # c+1 h
            # `unbind`, since the backward of an index per layer would fill a whole memory with zeros each time
            positions = visual_memory.unbind(2)  # P times B D n c+1
            if config.visual_prompts != "values":
                key_features, keys = positions[0].unbind(1), torch.cat((keys, basis))
            if config.visual_prompts != "keys":
                value_features, values = positions[-1].unbind(1), torch.cat((values, basis))
        values = values.T.contiguous()
        how = {"form": config.memory_form, "scale": config.memory_scale, "dropout": config.memory_dropout}
        pairs = zip(key_features, value_features)
        return tuple(LayerMemory(*pair, keys, values, slot_mask, **how) for pair in pairs)


# --- the models ---


class DehvfPreTrainedModel(AdapterMixin, SwitchingMixin, HubMixin, CheckpointingMixin, PreTrainedModel):
    config_class = DehvfConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _skip_keys_device_placement = ["past_key_values", "cache"]
    _supports_flash_attn = True
    _supports_sdpa = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True

    build_adapter = Adapter.build

    @torch.no_grad()
    def _init_weights(self, module: nn.Module):
        if isinstance(module, (FuserLinear, InputEmbeddingNetwork, LearnableQueryTokens, LayerHierarchy)):
            module.reset_parameters()
            return
        super()._init_weights(module)
        std = self.config.initializer_range
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)  # at first the vision encoder is unchanged
        elif isinstance(module, ProjectorBasis):
            init.normal_(module.weight, std=std)
            init.zeros_(module.bias)
        elif isinstance(module, VisualProjector) and self.config.projector_initializer == "xavier":
            for part in (module.down, module.up):
                init.xavier_uniform_(part.weight)
        elif isinstance(module, VisualProjector) and self.config.projector_initializer == "zero":
            init.zeros_(module.up.weight)  # `memory_slots.value` is zero too: at first the memory has no effect
        elif isinstance(module, MemorySlots):
            init.normal_(module.key, std=std)
            init.zeros_(module.value)  # as in MemVP: at first the memory has almost no effect
            if module.image_key is not None:  # at first all images are read in the same way
                init.zeros_(module.image_key)
                init.zeros_(module.image_value)

    @classmethod
    def is_custom_code(cls) -> bool:
        """
        Whether `_init_weights` skips modules without own parameters, here and in the base models, since it might
        overwrite loaded values. `transformers.initialization`, which is used above, does not overwrite them.
        """
        return False

    def post_init(self):
        super().post_init()
        # The list of CLIP also contains modules of its text tower, and FSDP fails if it does not find a module
        present = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = [name for name in self._no_split_modules or () if name in present]

    def freeze_bases(self):
        """Sets `requires_grad` to true for the parameters of the adapter only."""
        for name, parameter in self.named_parameters():
            parameter.requires_grad_(is_adapter_name(name))


class DehvfModel(AdapterSet, DehvfPreTrainedModel):
    """
    The frozen base models and the adapters, without a head.

    The modules of the active adapter are its attributes (`fuser`, `projector`, ...), see [`AdapterSet`].

    Args:
        config ([`DehvfConfig`]): sizes and switches. It takes over the configs of given base models, without dropout.
        vision_tower, language_model (`PreTrainedModel`, *optional*): base models without heads; random if not given.

    Raises:
        ValueError: if a base model cannot be extended, or is of another type or size than in `config`.
    """

    def __init__(self, config: DehvfConfig, vision_tower=None, language_model=None):
        super().__init__(config)
        self.take_given_bases(config, vision=vision_tower, text=language_model)
        adapter = self.build_adapter(config)
        self.text_layout, self.vision_layout = find_text_layout(config.text_config), adapter.vision_layout
        self.vision_tower = vision_tower or AutoModel.from_config(config.vision_config)
        self.language_model = language_model or AutoModel.from_config(config.text_config)
        embeddings = [module for module in self.language_model.modules() if isinstance(module, nn.Embedding)]
        # As in GPT-2; CTRL has a table that is not trained
        self.has_position_embeddings = len(embeddings) > 1 or config.text_config.model_type == "ctrl"
        self.add_adapter_modules("default", adapter)
        self.activate_adapter("default")
        self.gradient_checkpointing = False
        self.freeze_bases()
        self.post_init()

    @classmethod
    def from_bases(cls, config: DehvfConfig, vision_tower: PreTrainedModel, causal_lm: PreTrainedModel):
        return cls(config, vision_tower, causal_lm.base_model)

    def __setattr__(self, name, value):
        """Extends the layers of a base model that is set, also if it replaces another one."""
        super().__setattr__(name, value)
        if name == "vision_tower":
            layout = self.vision_layout
            extend_layers(value.get_submodule(layout.layers), layout.ffn, AdaptedFFN)
        elif name == "language_model":
            layout = self.text_layout
            layers = value.get_submodule(layout.layers)
            extend_layers(layers, layout.ffn, MemoryFFN, activation_name=layout.activation)

    # --- encode ---

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module):
        self.language_model.set_input_embeddings(value)

    def get_instruction_features(
        self,
        input_ids: torch.LongTensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """
        Features of the user's text for `get_image_features`: the normalised mean of its word embeddings, since the
        scale of embeddings differs between language models. (IGVA uses an additional sentence encoder.)

        Args:
            input_ids, inputs_embeds: `(batch_size, sequence_length)` tokens, or their embeddings.
            instruction_mask: `(batch_size, sequence_length)`, 1 or true for tokens of the user. By default all.

        Returns:
            `torch.Tensor` of shape `(batch_size, language_hidden_size)`, in float32.
        """
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        mean = mean_embedding(inputs_embeds, instruction_mask)
        return F.layer_norm(mean, mean.shape[-1:])  # B h

    @can_return_tuple
    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """
        Encodes images into visual memory once, for any number of questions. If you keep the result, use
        `torch.no_grad()`: otherwise it also keeps the activations for the encoder's backward, 84 times its size at 7B.

        Args:
            pixel_values: `(batch_size, num_channels, height, width)`, or `(batch_size, num_images, num_channels,
                height, width)` for samples with several images.
            image_mask: `(batch_size,)` or `(batch_size, num_images)` booleans, false if a sample has no image; its
                `pixel_values` are then ignored. By default all are true.
            instruction: `(batch_size, language_hidden_size)`, the result of `get_instruction_features`. Required if
                `fuser_query` reads the user's text; the memory then is for this question only.
            kwargs: arguments of the vision encoder (`output_hidden_states`, ...).

        Returns:
            The vision encoder's output for the samples with an image, with the visual memory as `pooler_output`: a
            `torch.Tensor` of shape `(batch_size, num_language_layers, num_positions, num_patches,
            projector_hidden_size + 1)`, for each language layer `SiLU(W_1 F_{l,p} + b_1)` and a last column of ones
            for `b_2`. The patches of several images are concatenated; samples without an image have zeros. The dtype
            is the language model's. It is `None` with `visual_prompts="none"`. Pass the output or this tensor to
            `forward` or `generate` as `visual_memory=`.

        Raises:
            ValueError: if `pixel_values` has another image size or more images than the adapter, `image_mask` or
                `instruction` has another batch size, or a required instruction is missing.
        """
        return self._encode(self.active, pixel_values, image_mask, instruction, **kwargs)

    def _encode(self, adapter: Adapter, pixel_values, image_mask, instruction, **kwargs) -> BaseModelOutputWithPooling:
        check_is_not_empty(pixel_values)
        if pixel_values.ndim == 5:
            images = flatten_images(adapter.config, pixel_values, image_mask, instruction)
            outputs = self._encode(adapter, *images, **kwargs)  # of all samples as one batch
            if outputs.pooler_output is not None:
                outputs.pooler_output = join_images(outputs.pooler_output, pixel_values.shape[1])
            return outputs
        check_pixel_values(adapter.config, pixel_values)
        if image_mask is not None:
            check_image_mask(image_mask, pixel_values.shape[:1], "rows of `pixel_values`")
            image_mask = image_mask.bool()
        if adapter.config.visual_prompts == "none":
            return BaseModelOutputWithPooling()
        check_instruction(adapter.config, instruction, pixel_values.shape[0])
        pixel_values = as_encoder_input(pixel_values, self.vision_tower, adapter.memory_slots.key.device)
        keeps_all = image_mask is None or torch.compiler.is_compiling()  # where shapes cannot depend on values
        rows = slice(None)
        if not keeps_all:
            rows = image_mask.to(pixel_values.device).nonzero().flatten()
        if image_mask is not None and (keeps_all or not len(rows)):
            # Rows without an image are encoded, and their pixels may be NaN
            pixel_values = pixel_values.masked_fill(~image_mask.to(pixel_values.device).view(-1, 1, 1, 1), 0)
        if not keeps_all and not len(rows):
            rows = rows.new_zeros(1)  # see `_needs_images`
        instruction = instruction[rows] if adapter.config.reads_instruction else None
        memory, outputs = adapter.encode(self.vision_tower, pixel_values[rows], instruction, **kwargs)
        memory = memory.to(self.get_input_embeddings().weight.dtype)
        if image_mask is not None:
            if keeps_all or len(rows) < len(image_mask) or not image_mask.any():
                memory = memory * image_mask.to(memory)[rows].view(-1, 1, 1, 1, 1)
            if not keeps_all and len(rows) < len(image_mask):
                memory = memory.new_zeros(len(image_mask), *memory.shape[1:]).index_copy(0, rows, memory)
        return BaseModelOutputWithPooling(
            last_hidden_state=outputs.last_hidden_state,
            pooler_output=memory,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    @torch.no_grad()
    def get_fusion_weights(self, pixel_values: torch.Tensor, instruction: torch.Tensor | None = None) -> torch.Tensor:
        """
        The weights of the vision layers in the memory of each language layer, for each image (method step 4).

        Args:
            pixel_values, instruction: as in `get_image_features`, with one image for each sample.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_language_layers, num_positions, num_vision_layers)`. Each row
            sums to one; the weights of other groups are zero.

        Raises:
            ValueError: if the config has `visual_prompts="none"`; or as in `get_image_features`.
        """
        adapter = self.active  # another thread may activate another one in the meantime
        if adapter.config.visual_prompts == "none":
            raise ValueError('There are no fusion weights with `visual_prompts="none"`: no image enters the memory.')
        check_pixel_values(adapter.config, pixel_values)
        check_instruction(adapter.config, instruction, pixel_values.shape[0])
        pixel_values = as_encoder_input(pixel_values, self.vision_tower, adapter.memory_slots.key.device)
        class_features = adapter.hierarchical_features(self.vision_tower, pixel_values)[0]
        return adapter.fusion_weights(class_features, instruction)

    # --- read ---

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_memory: torch.Tensor | BaseModelOutputWithPooling | None = None,
        attention_mask: torch.Tensor | None = None,
        instruction_mask: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        layer_memories: tuple[LayerMemory | MixedLayerMemory, ...] | None = None,
        **kwargs,
    ) -> DehvfModelOutputWithPast:
        """
        Args:
            pixel_values: as in `get_image_features`, if any sample has an image.
            image_mask: as in `get_image_features`, also for `visual_memory`. By default all are true.
            instruction_mask: `(batch_size, sequence_length)`, 1 for tokens of the user, for a `fuser_query` that reads
                them. By default `attention_mask`.
            visual_memory: result of `get_image_features`, instead of `pixel_values`. One row is used for all texts.
            adapter_names: for each sample the name of its adapter, or `"__base__"` for none. Only for inference.
            layer_memories: computed by `generate` from the arguments above, once for all tokens.

        All other arguments are those of the language model. A cache (`past_key_values`) does not contain the image:
        pass `pixel_values` or `visual_memory` again with each call that continues from it, for a fuser that reads the
        user's text `visual_memory`, since the call does not have all of that text.

        Raises:
            ValueError: if there is no text, the numbers of images, texts and adapter names differ, an adapter does not
                exist, or two arguments exclude each other.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError(
                "Give one of `input_ids` and `inputs_embeds`: the tokens of a text read the image, so each call "
                "needs a text. `get_image_features(pixel_values)` encodes an image alone."
            )
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
        image_outputs = None
        if self.is_disabled:
            layer_memories = None
        else:
            cache = kwargs.get("cache", kwargs.get("past_key_values"))  # depending on the release
            if self.has_position_embeddings and kwargs.get("position_ids") is None:
                kwargs["position_ids"] = find_positions(attention_mask, inputs_embeds.shape[1], cache)
            if layer_memories is None:
                check_instruction_is_marked(self, pixel_values, instruction_mask)
                mask = attention_mask if instruction_mask is None else instruction_mask
                states = {
                    name: kwargs[name] for name in ("output_hidden_states", "output_attentions") if name in kwargs
                }
                layer_memories, image_outputs = self.read_images(
                    inputs_embeds, mask, pixel_values, image_mask, visual_memory, adapter_names, cache=cache, **states
                )
        outputs = run_extended(
            self.language_model, layer_memories, inputs_embeds=inputs_embeds, attention_mask=attention_mask, **kwargs
        )
        return DehvfModelOutputWithPast.from_language_model(outputs, image_outputs)

    def read_images(
        self,
        inputs_embeds,
        instruction_mask,
        pixel_values,
        image_mask,
        visual_memory,
        adapter_names,
        copies: int = 1,
        cache=None,
        **kwargs,
    ) -> tuple[tuple[LayerMemory | MixedLayerMemory, ...], BaseModelOutputWithPooling | None]:
        """
        The memory that the FFNs read in a batch, with each row repeated `copies` times, and the result of
        `get_image_features`. The arguments are those of `forward`; `cache` contains the beginning of the texts.
        """
        check_one_of(pixel_values=pixel_values, visual_memory=visual_memory)
        check_one_of(visual_memory=visual_memory, adapter_names=adapter_names)
        if adapter_names is not None:
            parts = inputs_embeds, instruction_mask, pixel_values, image_mask
            return self._mix_layer_memories(adapter_names, parts, copies, cache), None
        adapter = self.active
        parts = inputs_embeds, instruction_mask, pixel_values, image_mask, as_visual_memory(visual_memory)
        image_outputs = self._image_outputs(adapter, *parts, cache, **kwargs)
        visual_memory = as_visual_memory(image_outputs)
        if visual_memory is not None and copies > 1 and visual_memory.shape[0] > 1:
            visual_memory = visual_memory.repeat_interleave(copies, dim=0)
        return adapter.layer_memories(visual_memory, inputs_embeds.dtype), image_outputs

    def _image_outputs(
        self, adapter, inputs_embeds, instruction_mask, pixel_values, image_mask, visual_memory, cache, **kwargs
    ) -> BaseModelOutputWithPooling | None:
        """The result of `get_image_features` for a batch, for a given visual memory or for pixels."""
        check_instruction_is_whole(adapter.config, pixel_values, cache)
        if pixel_values is None and visual_memory is None:
            check_no_image(image_mask)
            if not self._needs_images:
                return None
            config, num_texts = adapter.config, inputs_embeds.shape[0]
            blank = inputs_embeds.new_zeros(1, config.vision_config.num_channels, config.resolution, config.resolution)
            pixel_values = blank.expand(num_texts, -1, -1, -1)
            image_mask = torch.zeros(num_texts, dtype=torch.bool, device=blank.device)
        if pixel_values is not None:
            instruction = None
            if adapter.config.reads_instruction:
                instruction = self.get_instruction_features(None, instruction_mask, inputs_embeds)
            outputs = self._encode(adapter, pixel_values, image_mask, instruction, **kwargs)
        else:
            if image_mask is not None:  # applies to the texts; the memory may have been encoded without it
                visual_memory = mask_images(adapter.config, visual_memory, image_mask, inputs_embeds.shape[0])
            outputs = BaseModelOutputWithPooling(pooler_output=visual_memory)
        if outputs.pooler_output is not None:
            check_visual_memory(adapter.config, outputs.pooler_output, inputs_embeds.shape[0])
            moved = {"pooler_output": outputs.pooler_output.to(inputs_embeds.device)}
            outputs = BaseModelOutputWithPooling(**{**outputs, **moved})  # a copy: other threads may use the original
        return outputs

    @property
    def _needs_images(self) -> bool:
        """
        Whether a batch without any image encodes a blank one, which has no effect. Half of ScienceQA has no image, and
        all processes must run the same modules at each step: in training (DDP), and if the base models are sharded
        (ZeRO-3, FSDP2).
        """
        is_divided = isinstance(next(self.vision_tower.parameters(), None), DTensor)  # none in `nn.DataParallel`
        return self.training or is_deepspeed_zero3_enabled() or is_divided

    def _mix_layer_memories(self, adapter_names: list[str], parts, copies: int, cache) -> tuple[MixedLayerMemory, ...]:
        """The memory that the FFNs read if each sample has its own adapter, which also encodes its image."""
        if self.training:
            raise ValueError("`adapter_names` is for inference. To train, make one adapter active with `set_adapter`.")
        if len(adapter_names) != len(parts[0]):
            raise ValueError(
                f"`adapter_names` has {len(adapter_names)} names for {len(parts[0])} texts. Give one for each."
            )
        for name, part in zip(("instruction_mask", "pixel_values", "image_mask"), parts[1:]):
            if part is not None and len(part) != len(adapter_names):
                raise ValueError(f"`{name}` has {len(part)} rows for {len(adapter_names)} texts. Give one for each.")
        memories, all_rows = [], []
        for name in dict.fromkeys(adapter_names):
            if name == BASE_MODEL:
                continue
            adapter, own = self.get_adapter(name), [row for row, other in enumerate(adapter_names) if other == name]
            rows = torch.tensor(own, device=parts[0].device)
            own_parts = [None if part is None else part[rows.to(part.device)] for part in parts]
            own_parts[2:] = drop_absent_images(*own_parts[2:])  # this adapter may read fewer images than the others
            visual_memory = as_visual_memory(self._image_outputs(adapter, *own_parts, None, cache))
            if visual_memory is not None:
                visual_memory = visual_memory.repeat_interleave(copies, dim=0)
            memories.append(adapter.layer_memories(visual_memory, parts[0].dtype))
            all_rows.append((copies * rows[:, None] + torch.arange(copies, device=rows.device)).flatten())
        num_layers = self.config.text_config.num_hidden_layers
        return tuple(
            MixedLayerMemory(tuple(memory[layer] for memory in memories), tuple(all_rows))
            for layer in range(num_layers)
        )


class DehvfForConditionalGeneration(DehvfPreTrainedModel, DehvfGenerationMixin):
    """
    DEHVF with the language model's head: what both `AutoModel` and `AutoModelForImageTextToText` give.

    Args:
        config ([`DehvfConfig`]): sizes and switches. It takes over the configs of given base models, without dropout.
        vision_tower, causal_lm (`PreTrainedModel`, *optional*): loaded base models; built at random if not given.
    """

    _tp_plan = {"lm_head": "colwise_gather_output"}

    def __init__(self, config: DehvfConfig, vision_tower=None, causal_lm=None):
        super().__init__(config)
        causal_lm = causal_lm or AutoModelForCausalLM.from_config(config.text_config)
        self.model = DehvfModel(config, vision_tower, causal_lm.base_model)
        self.lm_head = causal_lm.get_output_embeddings()
        self.causal_lm_class = type(causal_lm)
        for name in ("_is_stateful", "_can_compile_fullgraph"):  # what its cache and its code allow in `generate`
            setattr(self, name, getattr(causal_lm, name))
        self.generation_config = drop_ignored_values(causal_lm.generation_config, causal_lm.name_or_path)
        # For adapters that were saved without one
        self.text_generation_config = copy.deepcopy(causal_lm.generation_config)
        embeddings = self.get_input_embeddings()
        name = next(name for name, module in self.named_modules() if module is embeddings)
        # A loaded head may differ from the embeddings although the config says that they are tied
        is_tied = embeddings.weight.is_meta or self.lm_head.weight is embeddings.weight
        self._tied_weights_keys = {"lm_head.weight": f"{name}.weight"} if is_tied else {}
        self.freeze_bases()
        self.post_init()

    def post_init(self):
        super().post_init()
        # Checkpoints do not contain these, and the Trainer does not warn of it when it loads one
        self._keys_to_ignore_on_save = {name for name in self.state_dict() if not is_adapter_name(name)}

    @classmethod
    def from_bases(cls, config: DehvfConfig, vision_tower: PreTrainedModel, causal_lm: PreTrainedModel):
        return cls(config, vision_tower, causal_lm)

    def get_image_features(
        self,
        pixel_values: torch.Tensor,
        image_mask: torch.Tensor | None = None,
        instruction: torch.Tensor | None = None,
        **kwargs,
    ) -> BaseModelOutputWithPooling:
        """See [`DehvfModel.get_image_features`]."""
        return self.model.get_image_features(pixel_values, image_mask, instruction, **kwargs)

    def get_instruction_features(self, input_ids=None, instruction_mask=None, inputs_embeds=None) -> torch.Tensor:
        """See [`DehvfModel.get_instruction_features`]."""
        return self.model.get_instruction_features(input_ids, instruction_mask, inputs_embeds)

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_mask: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        visual_memory: torch.Tensor | BaseModelOutputWithPooling | None = None,
        instruction_mask: torch.Tensor | None = None,
        adapter_names: list[str] | None = None,
        labels: torch.LongTensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs,
    ) -> DehvfCausalLMOutputWithPast:
        """
        Args:
            labels: `(batch_size, sequence_length)` token ids, -100 for tokens without a loss.
            logits_to_keep: positions for which logits and loss are computed, see [`keep_positions`].

        All others as in [`DehvfModel.forward`]. With `labels`, the user's tokens are those without a label by default.
        """
        reads_instruction = self.model.config.reads_instruction or adapter_names is not None  # one of them may
        if reads_instruction and instruction_mask is None and labels is not None:
            instruction_mask = find_instruction(labels, attention_mask)
        outputs = self.model(
            input_ids=input_ids,
            pixel_values=pixel_values,
            image_mask=image_mask,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            visual_memory=visual_memory,
            instruction_mask=instruction_mask,
            adapter_names=adapter_names,
            **kwargs,
        )
        text_config, loss = self.config.text_config, None
        # Contiguous, since `nn.Linear` multiplies each row of a slice separately, which takes 8 times as long in a
        # backward pass on a CPU. In bfloat16 it also copies the weight of the head for each row.
        hidden_states = keep_positions(outputs.last_hidden_state, logits_to_keep).contiguous()
        logits = compute_logits(self.lm_head, hidden_states, text_config)
        if labels is not None:
            # Of all tokens, since the token after a kept one need not be kept
            shifted = keep_positions(F.pad(labels[:, 1:], (0, 1), value=-100), logits_to_keep).contiguous()
            shifted = {"shift_labels": shifted, "vocab_size": text_config.vocab_size, **kwargs}
            loss = self.loss_function(logits, keep_positions(labels, logits_to_keep), **shifted)
        # The cache among these is `past_key_values` or `cache`, depending on the release
        rest = {name: value for name, value in outputs.items() if name != "last_hidden_state"}
        return DehvfCausalLMOutputWithPast(loss=loss, logits=logits, **rest)


DehvfForConditionalGeneration.register_for_auto_class("AutoModelForImageTextToText")
# With label smoothing, the Trainer only shifts the labels of the classes that are listed there
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["dehvf"] = DehvfForConditionalGeneration.__name__

__all__ = ["DehvfConfig", "DehvfForConditionalGeneration", "DehvfModel", "DehvfPreTrainedModel"]
