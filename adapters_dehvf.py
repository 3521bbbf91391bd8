# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""Loads, checks and saves adapters and visual memories."""

import copy
import os
import threading
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional as F
from transformers import GenerationConfig
from transformers.dynamic_module_utils import custom_object_save
from transformers.utils import (
    CONFIG_NAME,
    GENERATION_CONFIG_NAME,
    PROCESSOR_NAME,
    SAFE_WEIGHTS_NAME,
    ModelOutput,
    cached_file,
    logging,
)

from .bases_dehvf import (
    BASE_NAMES,
    assemble_causal_lm,
    check_base_can_be_saved,
    drop_ignored_values,
    fetch_merged_bases,
    find_changes,
    has_file,
    has_same_tensors,
    hub_arguments,
    load_base_config,
    load_bases,
    read_parameters,
    sample_tensors,
    save_base,
    share_placement,
    take_given_base,
)
from .configuration_dehvf import DehvfConfig
from .files_dehvf import check_before_writing, digest, read_tensors, write_tensors
from .inputs_dehvf import check_visual_memory
from .layouts_dehvf import check_layouts
from .memory_dehvf import as_visual_memory
from .processing_dehvf import IMAGE_OPTIONS, DehvfProcessor


logger = logging.get_logger(__name__)

CHANGES = threading.RLock()  # held while an adapter is added, removed, activated or saved; calls need no lock
# The modules of `DehvfModel` whose parameters are trained and saved; no others are
ADAPTER_MODULES = ("vision_adapters", "fuser_query", "fuser", "projector", "memory_slots")
# Arguments of `save_pretrained` in `transformers` that make no difference for an adapter
WITHOUT_EFFECT = {"save_function", "safe_serialization", "token", "save_peft_format", "save_original_format"}
WITHOUT_EFFECT |= {"distributed_checkpoint"}
# Arguments of `from_pretrained` and fields of the config that only a saved adapter has
NOT_OF_A_NEW_ADAPTER = {"config", "revision", "subfolder", "state_dict", "output_loading_info", "merged_base"}
PREFIX = "model."  # of parameter names in a file, as in `DehvfForConditionalGeneration`


def is_adapter_name(name: str) -> bool:
    """Whether the parameter with this full name belongs to the adapter (and not to a frozen base model)."""
    return name.removeprefix(PREFIX).partition(".")[0] in ADAPTER_MODULES


def absolute_place(place: str | os.PathLike) -> str:
    """A Hub id, or the absolute path of a folder, so that a saved config works in every working directory."""
    return os.path.abspath(place) if os.path.isdir(place) else str(place)


def plain_name(name: str) -> str:
    """The name of a parameter without the prefix that `torch.compile` adds to modules that it has wrapped."""
    return name.replace("_orig_mod.", "")


def check_no_peft(location, source: dict, found=None):
    """Raises `ValueError` if a folder, or its `subfolder`, has an adapter of `peft`, or one was `found` elsewhere."""
    folder = found or os.path.join(location, *filter(None, [source.get("subfolder")]))
    if found or os.path.isfile(os.path.join(folder, "adapter_config.json")):
        raise ValueError(
            f"{folder} has an adapter of `peft` (`adapter_config.json`), which would be ignored. Load the DEHVF "
            "adapter that it was trained on, from a folder without such a file, and then "
            f"`peft.PeftModel.from_pretrained(model, {str(folder)!r})`."
        )


def load_adapter_tensors(location, source: dict) -> dict[str, torch.Tensor]:
    file = cached_file(location, SAFE_WEIGHTS_NAME, _raise_exceptions_for_missing_entries=False, **source)
    if file is None:
        raise OSError(
            f"{location} has no {SAFE_WEIGHTS_NAME}, so there is no adapter to load. To create a new one use "
            "`DehvfForConditionalGeneration.from_vision_text_pretrained(vision_model, text_model)`; for random "
            "weights of the same shapes use `AutoModel.from_config(config, trust_remote_code=True)`."
        )
    return read_tensors(file)[0]


def check_adapter_tensors(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], location):
    problems = [f"missing: {name}" for name in expected.keys() - tensors.keys()]
    problems += [f"unexpected: {name}" for name in tensors.keys() - expected.keys()]
    for name in expected.keys() & tensors.keys():
        given, asked = tuple(tensors[name].shape), tuple(expected[name].shape)
        if given != asked:
            problems.append(f"wrong shape: {name} is {given}, the config asks for {asked}")
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise ValueError(
            f"The adapter in {location} does not fit its config ({len(problems)} problems):\n  {shown}\n"
            "Use the config that it was made with."
        )


def check_image_tiles(tensors: dict[str, torch.Tensor], saved: str | None, given: str | None, location):
    """Raises `ValueError` if an adapter with embeddings of images is loaded for other tiles than the saved ones."""
    if saved != given and any(f"{PREFIX}memory_slots.image_{part}" in tensors for part in ("key", "value")):
        raise ValueError(
            f"The adapter in {location} was saved with `image_tiles={saved}`, but `image_tiles={given}` was given. "
            "Its embeddings of images and tiles are in the order of the saved tiles, so others would read them. Load "
            "it without `image_tiles`, or make a new adapter with `from_vision_text_pretrained`."
        )


def add_image_embeddings(tensors: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Adds the embeddings of further images than the saved adapter has. They start at zero, as in a new adapter."""
    for name in (f"{PREFIX}memory_slots.image_{part}" for part in ("key", "value")):
        if name in expected:
            given = tensors.get(name, torch.empty(0, expected[name].shape[1]))
            tensors[name] = F.pad(given, (0, 0, 0, max(0, len(expected[name]) - len(given))))


def count_parameters(model) -> tuple[int, int]:
    """The numbers of trained and of all parameters. ZeRO-3 leaves empty tensors and keeps the number in `ds_numel`."""
    sizes = [(getattr(p, "ds_numel", p.numel()), p.requires_grad) for p in model.parameters()]
    return sum(size for size, trained in sizes if trained), sum(size for size, _ in sizes)


class AdapterMixin:
    """
    Loading and saving, for [`DehvfModel`] and [`DehvfForConditionalGeneration`]. The class has a method
    `from_bases(config, vision_tower, causal_lm)`; `base_model` is its [`DehvfModel`].
    """

    _has_merged_bases = False  # whether the base models were loaded from the folder of the adapter
    _given_bases = {}  # "vision" or "text" -> place of this base model that was passed to `from_pretrained`
    _base_samples = None  # samples of the base models as they were loaded, see `sample_tensors`

    # --- loading ---

    @classmethod
    def from_vision_text_pretrained(cls, vision_model: str | os.PathLike, text_model: str | os.PathLike, **kwargs):
        """
        Creates a new adapter on pretrained base models.

        Args:
            vision_model, text_model: Hub id or folder of the vision encoder and of the language model.
            kwargs: fields of [`DehvfConfig`] go to the config (`num_memory_slots=400`,
                `text_model_revision="0123abc"`, `text_model_id="org/name"` if `text_model` is a copy of it); all
                others go to `from_pretrained` of the base models (`dtype`, `device_map`, `quantization_config`,
                `attn_implementation`, `token`, `local_files_only`, ...).

        Raises:
            OSError: if a base model cannot be found.
            TypeError: if there is no such argument.
            ValueError: if a base model is not supported, or a config value is invalid.
        """
        if wrong := kwargs.keys() & NOT_OF_A_NEW_ADAPTER:
            raise TypeError(
                f"`from_vision_text_pretrained` has no argument `{min(wrong)}`, since it creates a new adapter on two "
                "base models. Give the fields of DehvfConfig one by one, such as `num_memory_slots=400`, the commits "
                "of the base models as `vision_model_revision=` and `text_model_revision=`, and `merge_base=True` to "
                "`save_pretrained`."
            )
        if wrong := kwargs.keys() & {"vision_config", "text_config"}:
            raise TypeError(
                f"`from_vision_text_pretrained` has no argument `{min(wrong)}`, since it reads the configs of the "
                "base models. To use other values, save the base model with them in its config, and pass "
                "its folder."
            )
        own = DehvfConfig.__dataclass_fields__.keys() - {"dtype"}
        fields = {name: kwargs.pop(name) for name in list(kwargs) if name in own}
        places = {"vision": vision_model, "text": text_model}
        for key, place in places.items():
            places[key] = absolute_place(place)
            fields[f"{key}_model_id"] = fields.get(f"{key}_model_id") or places[key]
            revision = fields.get(f"{key}_model_revision")
            fields[f"{key}_config"] = load_base_config(places[key], key, revision, **hub_arguments(kwargs))
        config = DehvfConfig(**fields)
        check_layouts(config)  # before loading the base models, which may have many GB
        model = cls._from_places(config, places, kwargs)
        model.base_model.set_source("default", None, hub_arguments(kwargs))
        return model

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path, *model_args, config=None, vision_model=None, text_model=None, **kwargs
    ):
        """
        Loads the adapter, and the frozen base models from their own repositories at the revisions in the config.
        `revision` and `subfolder` apply to the adapter only.

        Args:
            pretrained_model_name_or_path: Hub id, or folder written by `save_pretrained`. With `None`, all weights,
                including those of the base models, are taken from `state_dict`.
            vision_model, text_model: Hub ids or folders of the base models, which replace those in the config.
            config: a config, or its Hub id or folder, which replaces the config of the adapter. Fields of
                [`DehvfConfig`] cannot be given together with a config; set them on it.
            kwargs: as in [`from_vision_text_pretrained`]; `generation_config`, `output_loading_info`. `max_images` may
                be larger than in the saved config: the embeddings of the further images then start at zero. The
                `image_tiles` of an adapter that has embeddings of images must stay the same.

        Raises:
            OSError: if there is no adapter, its file is damaged, or a base model cannot be found.
            TypeError: if there is no such argument, or a field is given together with a config.
            ValueError: if the adapter or a base model does not fit the config, a tensor of the adapter is not finite,
                or of a dtype other than float32, bfloat16 or float16, the config is not a DEHVF config, or there is an
                adapter of `peft`.
        """
        location = pretrained_model_name_or_path
        if location is None:
            model = super().from_pretrained(None, *model_args, config=config, **kwargs)
            model.freeze_bases()
            return model
        generation_config, wants_info = kwargs.pop("generation_config", None), kwargs.pop("output_loading_info", False)
        source = {name: kwargs.pop(name) for name in ("revision", "subfolder") if name in kwargs}
        source |= hub_arguments(kwargs)
        dtype = {name: kwargs.pop(name) for name in ("dtype", "torch_dtype") if name in kwargs}  # not the config's
        check_no_peft(location, source, (kwargs.pop("adapter_kwargs", None) or {}).get("_adapter_model_path"))
        for name in ("_from_auto", "_from_pipeline", "trust_remote_code"):
            kwargs.pop(name, None)
        if config is None or isinstance(config, str | os.PathLike):
            place = location if config is None else config
            config, kwargs = DehvfConfig.from_pretrained(place, return_unused_kwargs=True, **{**kwargs, **source})
            kwargs |= hub_arguments(source)
        elif fields := kwargs.keys() & DehvfConfig.__dataclass_fields__.keys():
            raise TypeError(
                f"`{min(fields)}` was given together with a config. Set it on the config: "
                f"`config.{min(fields)} = {kwargs[min(fields)]!r}`."
            )
        else:
            config = copy.deepcopy(config)  # as in `transformers`: another model may be made from it too
        # Before loading the base models, which may have many GB, so that mistakes are reported at once
        tensors, expected = load_adapter_tensors(location, source), cls._empty_adapter(config, location).state_dict()
        if config.max_encoded_images > 1 and has_file(location, CONFIG_NAME, **source):
            saved = DehvfConfig.get_config_dict(location, **source)[0]
            check_image_tiles(tensors, saved.get("image_tiles"), config.image_tiles, location)
            if config.max_images > saved.get("max_images", 1):
                add_image_embeddings(tensors, expected)
        check_adapter_tensors(tensors, expected, location)
        given = {"vision": vision_model, "text": text_model}
        given = {key: absolute_place(place) for key, place in given.items() if place is not None}
        for key, place in given.items():
            if getattr(config, f"{key}_model_id") is None:
                setattr(config, f"{key}_model_id", place)
        places = cls._find_bases(config, location, given, source)
        if config.merged_base:  # then the base models come from the same repository, and no pickle may be read from it
            kwargs["use_safetensors"] = True
        model = cls._from_places(config, places, {**dtype, **kwargs})
        trained = {name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()}
        model.base_model.load_state_dict(trained, strict=False)
        model.name_or_path = model.config.name_or_path = str(location)
        model.base_model.set_source("default", location, source)
        model._has_merged_bases, model._given_bases = config.merged_base and len(given) < len(places), given
        if generation_config is not None:
            model.generation_config = generation_config
        elif has_file(location, GENERATION_CONFIG_NAME, **source):  # else the language model's own stays
            own = GenerationConfig.from_pretrained(location, **source)
            model.generation_config = drop_ignored_values(own, location)
        if wants_info:  # all problems that it could list have raised errors above
            return model, {key: set() for key in ("missing_keys", "unexpected_keys", "mismatched_keys", "error_msgs")}
        return model

    @staticmethod
    def take_given_bases(config: DehvfConfig, **bases):
        """See [`take_given_base`]; `vision` or `text` is `None` if it is not given."""
        for key, base in bases.items():
            if base is not None:
                take_given_base(config, key, base)

    @staticmethod
    def _find_bases(config: DehvfConfig, location, given: dict, source: dict) -> dict[str, str]:
        """The Hub ids or folders of the base models: given by the user, merged, or from the config."""
        places = {"vision": config.vision_model_id, "text": config.text_model_id}
        if config.merged_base and len(given) < len(places):
            places = fetch_merged_bases(location, **source)
        places |= given
        for key in (key for key, place in places.items() if place is None):
            raise ValueError(
                f"The config in {location} has no `{key}_model_id`, so the frozen base model cannot be found. Pass "
                f"`{key}_model=` with its Hub id or folder."
            )
        return places

    @classmethod
    def _from_places(cls, config: DehvfConfig, places: dict[str, str], kwargs: dict):
        """Creates a new adapter on base models that are loaded from these places."""
        vision_tower, causal_lm = load_bases(config, places["vision"], places["text"], **kwargs)
        with vision_tower.device:
            model = cls.from_bases(config, vision_tower, causal_lm)
        share_placement(causal_lm, model)
        # The Trainer only trains quantized models that are marked as having adapters
        model._hf_peft_config_loaded = getattr(model, "is_quantized", False)
        model._base_samples = model._sample_bases()
        return model.eval()

    @classmethod
    def _empty_adapter(cls, config: DehvfConfig, location) -> nn.ModuleDict:
        """The modules of an adapter with this config, named as in a file, on the meta device."""
        try:
            check_layouts(config)
            with torch.device("meta"):
                return nn.ModuleDict({PREFIX[:-1]: nn.ModuleDict(cls.build_adapter(config).modules())})
        except Exception as error:  # a config from elsewhere can be wrong in more ways than could be listed
            raise ValueError(
                f"No adapter can be built from the config in {location} ({type(error).__name__}: {error}). Load it "
                "with the config that it was saved with."
            ) from error

    # --- saving ---

    def adapter_state_dict(self) -> dict[str, torch.Tensor]:
        """The trained tensors by their full names, which `save_pretrained` writes."""
        parameters = read_parameters(nn.ModuleDict(self.base_model.active.modules()))
        return {PREFIX + plain_name(name): parameter.detach() for name, parameter in parameters.items()}

    def save_pretrained(
        self,
        save_directory,
        is_main_process: bool = True,
        state_dict=None,
        push_to_hub: bool = False,
        merge_base: bool = False,
        max_shard_size: int | str = "50GB",
        **kwargs,
    ):
        """
        Writes the adapter (`model.safetensors`), the config with the ids and revisions of both base models, the code,
        and the processor. The processor is loaded from the folder of the adapter or from the base models, and not
        written if the folder already has one. The frozen base models are not written; if they were changed, a warning
        says so.

        Args:
            state_dict: the tensors to save, as passed by the Trainer; frozen tensors in it are ignored.
            merge_base: also write the base models, to the subfolders `vision_model` and `text_model`, for machines
                that should not download other repositories. If the adapter is saved there again, they are kept if
                they equal the base models, and otherwise no longer used.
            max_shard_size: maximum size of the files of the base models; the adapter is one file.
            kwargs: further arguments that `transformers` or `accelerate` pass, which have no effect.

        Raises:
            TypeError: if there is no such argument.
            ValueError: if the adapter's modules are wrapped by other modules, or do not fit its config, for example
                because it was changed after they were built; if a tensor of the adapter (or, with `merge_base`, of a
                base model) is missing or empty, for example because ZeRO-3 partitions were not gathered; or if
                `push_to_hub` is set, since it would not upload a card.
        """
        if push_to_hub:
            raise ValueError(
                "`save_pretrained` only writes a folder. `model.push_to_hub(repo_id)` uploads the adapter, processor "
                "and card to the Hub, in one commit."
            )
        if unknown := kwargs.keys() - WITHOUT_EFFECT:
            raise TypeError(
                f"`save_pretrained` has no argument `{min(unknown)}`. It always writes one `{SAFE_WEIGHTS_NAME}`; "
                "`merge_base=True` also writes the base models, in files of up to `max_shard_size`."
            )
        with CHANGES:  # the tensors and the config of the same adapter
            self._save(save_directory, is_main_process, state_dict, merge_base, max_shard_size)

    def _save(self, save_directory, is_main_process: bool, state_dict, merge_base: bool, max_shard_size: int | str):
        tensors = self._check_before_saving(save_directory, is_main_process, state_dict, merge_base)
        has_processor = self._has_processor(save_directory)
        is_needed = is_main_process and (merge_base or not has_processor)
        processor = self._load_processor() if is_needed else None
        if merge_base:
            self._save_bases(save_directory, is_main_process, processor, max_shard_size)
        if not is_main_process:
            return
        has_bases = merge_base or self._are_bases_in(save_directory)
        if not merge_base:
            self._warn_of_changed_bases(has_bases)
        os.makedirs(save_directory, exist_ok=True)
        config = copy.copy(self.config)
        config.merged_base = has_bases
        # FSDP2 replaces the class of a model by a subclass
        model_class = next(cls for cls in type(self).__mro__ if not cls.__module__.startswith("torch."))
        config.architectures = [model_class.__name__]
        config.dtype = str(self.base_model.memory_slots.key.dtype).removeprefix("torch.")
        # Before the config, so that an interrupted save does not leave a config that does not match the tensors
        write_tensors(tensors, os.path.join(save_directory, SAFE_WEIGHTS_NAME))
        custom_object_save(model_class, save_directory)
        config.save_pretrained(save_directory)
        if self.can_generate():
            self.generation_config.save_pretrained(save_directory)
        if processor is not None and not has_processor:
            processor.save_pretrained(save_directory)

    def _check_before_saving(
        self, save_directory, is_main_process: bool = True, state_dict=None, merge_base: bool = False
    ) -> dict[str, torch.Tensor]:
        """The tensors to save. Raises `ValueError` as in `save_pretrained`."""
        if merge_base and self is self.base_model:
            raise ValueError(
                f"`merge_base` also saves the head of the language model, which {type(self).__name__} does not have. "
                "Load the adapter as DehvfForConditionalGeneration and save that."
            )
        if self.config is not self.base_model.config:
            raise ValueError(
                "The adapter was switched with `model.base_model.set_adapter`, so this model still has the config of "
                f"another one. Call `model.set_adapter({self.base_model.active_adapter!r})` before saving."
            )
        if self.can_generate():
            self.generation_config.validate(strict=True)
        for name, value in self.base_model.active.built_in_values.items():
            if str(changed := getattr(self.config, name)) != value:
                raise ValueError(
                    f"`config.{name}` was changed from {value} to {changed} after the model was built, which has no "
                    "effect on this model, but would have one on the model that is loaded from the folder. Change it "
                    "back before saving, and give another value to `from_pretrained` or `from_vision_text_pretrained`."
                )
        own = self.adapter_state_dict()
        expected = self._empty_adapter(self.config, save_directory).state_dict()
        if differing := own.keys() ^ expected.keys():
            raise ValueError(
                f"The modules of the adapter do not match its config, so it could not be loaded again. "
                f"{len(differing)} names differ, such as {min(differing)}. If `config.max_images` or "
                "`config.image_tiles` was changed, change it back. If `peft` or a parametrization wraps the modules, "
                "save with `peft`, or merge or remove the wrappers first."
            )
        prefix = PREFIX if state_dict and self is self.base_model else ""
        given = {prefix + plain_name(name): tensor for name, tensor in (state_dict or own).items()}
        tensors = {name: tensor for name, tensor in given.items() if name in own}
        empty = [name for name in own if name not in tensors or not tensors[name].numel()]
        if is_main_process and empty:
            raise ValueError(
                f"{len(empty)} of {len(own)} adapter tensors are missing or empty, among them {empty[0]}. Nothing was "
                "written. `state_dict` needs the names of `model.state_dict()`, without the prefix of a wrapper such "
                "as `module.`. Under ZeRO-3 gather the parameters first, or set "
                '"stage3_gather_16bit_weights_on_model_save" to true.'
            )
        if is_main_process:
            check_adapter_tensors(tensors, expected, "this model")
            check_before_writing(tensors)
        return tensors

    def _sample_bases(self) -> dict[str, tuple]:
        named = ((plain_name(name), parameter) for name, parameter in self.named_parameters())
        layers = filter(None, (self.get_input_embeddings(), self.get_output_embeddings()))
        embeddings = [layer.weight for layer in layers if hasattr(layer, "weight")]
        return sample_tensors(((name, p) for name, p in named if not is_adapter_name(name)), embeddings)

    def _warn_of_changed_bases(self, has_bases: bool):
        """Warns if the base models differ from those that are loaded next time; `has_bases` as in the folder."""
        before, now = self._base_samples, self._sample_bases()
        # Then the copies in the folder equal these base models, except quantized ones, which cannot be compared
        are_kept = has_bases and not getattr(self, "is_quantized", False)
        if before is None and not are_kept and self is not self.base_model:
            logger.warning(
                "The base models of this model were given to its constructor, or made at random. Only the adapter is "
                f"saved, for {self.config.text_model_id} and {self.config.vision_model_id} of its config. If their "
                "weights differ, save with `model.save_pretrained(folder, merge_base=True)` to keep them."
            )
        if before is not None and not are_kept and (changed := find_changes(before, now)):
            resized = [name for name in changed if name in before and name in now and before[name][0] != now[name][0]]
            lost = "these changes are lost"
            if resized and not has_bases:
                lost += f", and the adapter cannot be loaded, since {resized[0]} has another shape"
            logger.warning(
                f"{len(changed)} tensors of the base models have changed or been overwritten since they were loaded, "
                f"such as {changed[0]}. Only the adapter is saved, so {lost}, unless the values are the same. Save "
                "with `model.save_pretrained(folder, merge_base=True)` to keep them."
            )
        for key, place in self._given_bases.items():
            if place != (named := getattr(self.config, f"{key}_model_id")):
                logger.warning_once(
                    f"The {BASE_NAMES[key]} was loaded from {place}, but the adapter is saved for "
                    f"{'its copy in the folder' if has_bases else named}. If their weights differ, set "
                    f"`model.config.{key}_model_id = {place!r}` (and `{key}_model_revision` to its commit or `None`) "
                    "before saving, or save with `merge_base=True`."
                )
        if self._has_merged_bases and not has_bases:
            logger.warning(
                f"The base models were loaded from their copies in {self.name_or_path}. Only the adapter is saved, "
                f"and the config names {self.config.text_model_id} and {self.config.vision_model_id}. If the copies "
                "had been changed, save with `model.save_pretrained(folder, merge_base=True)` to keep them."
            )

    def _are_bases_in(self, folder) -> bool:
        """Whether `merge_base` has already written these base models to a folder."""
        there = self._config_in(folder)
        names = [f"{key}_model_{what}" for key in ("vision", "text") for what in ("id", "revision")]
        if not there.get("merged_base", False) or any(there.get(n) != getattr(self.config, n) for n in names):
            return False
        # The copy also has the head, which `DehvfModel` does not have
        causal_lm = assemble_causal_lm(self.base_model.language_model, self.get_output_embeddings())
        bases = {"vision_model": self.base_model.vision_tower, "text_model": causal_lm}
        return all(has_same_tensors(base.state_dict(), os.path.join(folder, name)) for name, base in bases.items())

    @staticmethod
    def _config_in(folder) -> dict:
        """The values of the config in a folder; none if there is no config."""
        has_config = os.path.isfile(os.path.join(folder, CONFIG_NAME))
        return DehvfConfig.get_config_dict(folder)[0] if has_config else {}

    def _has_processor(self, folder) -> bool:
        """Whether a folder has a processor that was not saved for an adapter on other base models or images."""
        if not os.path.isfile(os.path.join(folder, PROCESSOR_NAME)):
            return False
        there, model = self._config_in(folder), self.base_model
        own = {name: [getattr(self.config, name)] for name in ("vision_model_id", "text_model_id", *IMAGE_OPTIONS)}
        # The config may have been changed to name the repository of which the base model is a local copy
        own["vision_model_id"].append(model.vision_tower.name_or_path)
        own["text_model_id"].append(model.language_model.name_or_path)
        return all(there.get(name, values[0]) in values for name, values in own.items())

    def _load_processor(self) -> DehvfProcessor | None:
        """The processor to save with the active adapter; `None` if none can be loaded."""
        location, source = self.base_model.sources.get(self.base_model.active_adapter, (None, {}))
        config = self.config
        options = {name: getattr(config, name) for name in IMAGE_OPTIONS}
        places = [location]
        try:
            if location is not None and has_file(location, PROCESSOR_NAME, **source):
                return DehvfProcessor.from_pretrained(location, **options, **source)
            if location is not None and os.path.isabs(location) and not os.path.isdir(location):
                logger.warning(
                    f"{location}, from which the adapter was loaded, no longer exists. If its processor differed from "
                    "those of the base models, save yours into the same folder, `processor.save_pretrained(folder)`."
                )
            places = [self.base_model.vision_tower.name_or_path, self.base_model.language_model.name_or_path]
            known = {
                config.vision_model_id: config.vision_model_revision,
                config.text_model_id: config.text_model_revision,
            }
            revisions = map(known.get, places)  # `None` for a base model that was loaded from another place
            return DehvfProcessor.from_vision_text_pretrained(*places, *revisions, **options, **hub_arguments(source))
        except Exception as error:  # `tokenizers`, for example, raises this class for a file that it cannot read
            logger.warning_once(
                f"The adapter is saved without a processor, since none can be loaded from {' and '.join(places)} "
                f"({error}). Save yours into the same folder, `processor.save_pretrained(folder)`."
            )

    def _save_bases(self, save_directory, is_main_process: bool, processor, max_shard_size: int | str):
        """Writes each base model to a separate folder, with its processor files."""
        causal_lm = assemble_causal_lm(self.base_model.language_model, self.lm_head)
        causal_lm.generation_config = self.generation_config
        share_placement(self, causal_lm)
        bases = {"vision": self.base_model.vision_tower, "text": causal_lm}
        for key, base in bases.items():  # before one is written
            check_base_can_be_saved(base, key)
        folders = {key: os.path.join(save_directory, f"{key}_model") for key in bases}
        for key, base in bases.items():
            save_base(base, folders[key], is_main_process, max_shard_size=max_shard_size)
        if processor is not None:
            processor.image_processor.save_pretrained(folders["vision"])
            processor.tokenizer.save_pretrained(folders["text"])

    # --- visual memory ---

    def join_visual_memories(self, samples: Sequence[Sequence[torch.Tensor | ModelOutput]]) -> torch.Tensor:
        """
        Joins the visual memories of single images into the memory of samples with several images, so that each image
        is encoded once and compared with many others.

        Args:
            samples: for each sample a list of the results of `get_image_features` for its images, each with a batch
                size of one. An empty list stands for a sample without an image.

        Returns:
            `torch.Tensor` of shape `(batch_size, num_language_layers, num_positions, num_images * num_patches,
            projector_hidden_size + 1)`, padded with zeros if a sample has fewer images than others. Pass it to
            `forward` or `generate` as `visual_memory=`.

        Raises:
            ValueError: if there is no memory, a memory has a batch size other than one, or a sample has too many
                images.
        """
        samples = [[as_visual_memory(memory) for memory in sample] for sample in samples]
        memories = [memory for sample in samples for memory in sample]
        for memory in memories:
            check_visual_memory(self.config, memory)
        if not memories or any(len(memory) != 1 for memory in memories):
            raise ValueError(
                f"The memories have the shapes {[tuple(memory.shape) for memory in memories]}. Give at least one, and "
                "each as a batch of one: `visual_memory[[row]]` takes a row of several."
            )
        # A tile always has the same index, also after an image that is too small for tiles
        length = self.config.max_encoded_images // self.config.max_images * self.config.num_patches
        joined = [memories[0][:, :, :, :0] for _ in samples]
        for row, sample in enumerate(samples):
            for memory in sample:
                padded = F.pad(joined[row], (0, 0, 0, -joined[row].shape[3] % length))
                joined[row] = torch.cat((padded, memory), dim=3)
        size = max(memory.shape[3] for memory in joined)
        visual_memory = torch.cat([F.pad(memory, (0, 0, 0, size - memory.shape[3])) for memory in joined])
        check_visual_memory(self.config, visual_memory)
        return visual_memory

    def save_visual_memory(self, visual_memory: torch.Tensor | ModelOutput, file: str | os.PathLike):
        """Writes a result of `get_image_features` to a file, which `load_visual_memory` reads in another process."""
        visual_memory = as_visual_memory(visual_memory)
        check_visual_memory(self.config, visual_memory)
        tensors = {"visual_memory": visual_memory, "vision_encoder": self._sample_encoder()}
        check_before_writing({"visual_memory": visual_memory})
        write_tensors(tensors, file, self._memory_origin())

    def load_visual_memory(self, file: str | os.PathLike) -> torch.Tensor:
        """
        Reads a file written by `save_visual_memory`.

        Returns:
            `torch.Tensor`, the `pooler_output` of `get_image_features`, on the model's device.

        Raises:
            OSError: if the file is damaged.
            ValueError: if the memory was encoded with another adapter, vision encoder or image size, or other settings
                of the config (the message names the differences); or if it is not finite.
        """
        tensors, found = read_tensors(file)
        origin = self._memory_origin()
        differing = [f"{n} is {found.get(n)}, here {value}" for n, value in origin.items() if found.get(n) != value]
        encoder, sample = tensors.get("vision_encoder"), self._sample_encoder()
        # Up to rounding to bfloat16, since the encoder may be loaded in any dtype
        if encoder is None or encoder.shape != sample.shape or not encoder.isclose(sample, 2**-7, 1e-6).all():
            differing.append("the vision encoder has other weights")
        if "visual_memory" not in tensors:
            differing.append("it has no tensor of that name")
        if differing:
            raise ValueError(
                f"The visual memory in {file} was not encoded by this model: {'; '.join(differing)}. Encode the "
                "images again with `get_image_features`, or load the adapter that the memory was made with."
            )
        check_visual_memory(self.config, tensors["visual_memory"])
        # A copy, since the tensor is mapped to the file and would change if the file was overwritten
        return tensors["visual_memory"].to(self.device, copy=True)

    def _memory_origin(self) -> dict[str, str]:
        """Everything that the memory of an image and its use depend on, except the weights of the vision encoder."""
        config, values = self.config, self.base_model.active.built_in_values
        return {
            "adapters": f"{digest(self.adapter_state_dict())} in {self.base_model.memory_slots.key.dtype}",
            "image size": f"{config.resolution} with patches of {config.vision_config.patch_size}",
            **{name: value for name, value in values.items() if name != "vision_adapter_dropout"},
        }

    def _sample_encoder(self) -> torch.Tensor:
        """A few values of each tensor of the vision encoder, to recognise another encoder."""
        parameters = read_parameters(self.base_model.vision_tower).values()
        return torch.cat([parameter.detach().flatten()[:8].float().cpu() for parameter in parameters])

    def dequantize(self, dtype=None):
        """As in `transformers`. The default dtype is that of the language model."""
        model = super().dequantize(dtype or self.get_input_embeddings().weight.dtype)
        del self.config.text_config.quantization_config  # or the saved base model would be loaded as quantized
        return model

    # --- methods that `peft` models have ---

    def print_trainable_parameters(self):
        """Prints how many parameters are trained, as `peft` does."""
        trained, total = count_parameters(self)
        print(f"trainable params: {trained:,d} || all params: {total:,d} || trainable%: {100 * trained / total:.4f}")

    def add_adapter(self, adapter_config, adapter_name: str | None = None):
        """Raises `ValueError` before anything is changed, since `save_pretrained` writes no `peft` adapter."""
        raise ValueError(
            f"`add_adapter` was called with a {type(adapter_config).__name__}, but this model's own adapters are "
            "loaded with `load_adapter(folder_or_id, name)`. To train one of `peft` on top, wrap the model: "
            "`peft.get_peft_model(model, config)`."
        )

    def disable_adapters(self):
        """Raises `ValueError`: the inherited method would only look for adapters of `peft`."""
        raise ValueError(
            "Disable the adapter in a block, `with model.disable_adapter():`, or for single samples with "
            '`adapter_names=["__base__"]`.'
        )

    def enable_adapters(self):
        """Raises `ValueError`, see `disable_adapters`."""
        raise ValueError("The active adapter is always enabled, except in a block `with model.disable_adapter():`.")

    def get_adapter_state_dict(self, *args, **kwargs):
        """Raises `ValueError`, see `disable_adapters`."""
        raise ValueError("`model.adapter_state_dict()` returns the tensors of the active adapter.")

    def merge_and_unload(self, *args, **kwargs):
        """Raises `ValueError`: what the adapter adds depends on the image, so it cannot be merged into weights."""
        raise ValueError(
            "The adapter cannot be merged into the weights of the base model, since what it adds depends on the "
            "image. `model.save_pretrained(folder, merge_base=True)` writes everything as one folder."
        )
