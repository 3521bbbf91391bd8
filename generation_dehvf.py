# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Overrides of `generate`: images are encoded once, and the result is passed to every step."""

from functools import wraps

from torch import nn
from transformers import GenerationMixin

from .injection_dehvf import MixedLayerMemory
from .inputs_dehvf import IMAGE_ARGUMENTS


class DehvfGenerationMixin(GenerationMixin):
    """
    `GenerationMixin` for [`DehvfForConditionalGeneration`]. `causal_lm_class` is the class of the language model with
    its head.
    """

    @wraps(GenerationMixin.prepare_inputs_for_generation)  # `generate` reads the names of its arguments
    def prepare_inputs_for_generation(self, *args, **kwargs):
        # As the language model's own class does it: Phi-3 drops a cache whose rotary embeddings have become invalid,
        # and BLOOM has its own `create_masks_for_generate`. Made for each step, since `peft` may replace the model
        causal_lm = self.causal_lm_class.__new__(self.causal_lm_class)
        nn.Module.__init__(causal_lm)
        causal_lm.config = self.model.language_model.config
        setattr(causal_lm, causal_lm.base_model_prefix, self.model.language_model)
        return causal_lm.prepare_inputs_for_generation(*args, **kwargs)

    def _expand_inputs_for_generation(self, expand_size=1, is_encoder_decoder=False, input_ids=None, **model_kwargs):
        """
        Encodes the images before the batch is expanded, so that all beams of a sample share one run of the encoder.
        The memory is then converted into the form that the FFNs read, which is passed to every step.
        """
        images = {name: model_kwargs.pop(name, None) for name in IMAGE_ARGUMENTS}
        if not self.model.is_disabled:
            embeds, mask = model_kwargs.get("inputs_embeds"), images.pop("instruction_mask")
            embeds = self.get_input_embeddings()(input_ids) if embeds is None else embeds
            mask = model_kwargs.get("attention_mask") if mask is None else mask
            cache = model_kwargs.get("cache", model_kwargs.get("past_key_values"))  # depending on the release
            model_kwargs["layer_memories"], _ = self.model.read_images(
                embeds, mask, **images, copies=expand_size, cache=cache
            )
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )

    def _get_candidate_generator(self, *args, model_kwargs: dict, **kwargs):
        """An `assistant_model` drafts tokens from the text only; this model, which reads the image, verifies them."""
        model_kwargs = {name: value for name, value in model_kwargs.items() if name != "layer_memories"}
        return super()._get_candidate_generator(*args, model_kwargs=model_kwargs, **kwargs)

    def _get_logits_processor(self, generation_config, *args, model_kwargs=None, **kwargs):
        """Raises `ValueError` for guidance with `adapter_names`, which its calls without the prompt would ignore."""
        memories, scale = (model_kwargs or {}).get("layer_memories"), generation_config.guidance_scale
        if scale not in (None, 1) and memories and isinstance(memories[0], MixedLayerMemory):
            raise ValueError(
                f"`guidance_scale={scale}` runs the model a second time, with the active adapter for all samples. "
                "Call `set_adapter` (or `disable_adapter`) instead of giving `adapter_names`."
            )
        return super()._get_logits_processor(generation_config, *args, model_kwargs=model_kwargs, **kwargs)

    def generate_batch(self, inputs, *args, **kwargs):
        """
        Continuous batching. Raises `ValueError` for images, which all requests of a row would read, and inside
        `disable_adapter`, which applies to one thread, while the requests are answered in another.
        """
        if self.model.is_disabled:
            raise ValueError(
                "`generate_batch` answers in another thread, in which the adapter is not disabled. Call `generate` "
                "inside `disable_adapter`."
            )
        if given := [name for name in IMAGE_ARGUMENTS if kwargs.get(name) is not None]:
            raise ValueError(
                f"`generate_batch` was called with `{given[0]}`, but it packs several requests into one row, in which "
                "each would read the image of all. Call `generate`, with one row for each request."
            )
        return super().generate_batch(inputs, *args, **kwargs)
