# Copyright 2026 The DEHVF authors. Licensed under the Apache License, Version 2.0 (see LICENSE).
"""
Several adapters on one pair of base models: loading, switching, selecting one for each sample, disabling.

A call keeps the adapter with which it began, and nothing that other threads read is changed in place: dicts are
replaced by new ones. Adapters can therefore be loaded, switched and deleted while other threads generate.
"""

import copy
import threading
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import nn
from transformers import GenerationConfig
from transformers.utils import GENERATION_CONFIG_NAME, logging

from .adapters_dehvf import (
    ADAPTER_MODULES,
    CHANGES,
    PREFIX,
    absolute_place,
    check_adapter_tensors,
    check_no_peft,
    load_adapter_tensors,
)
from .bases_dehvf import check_base, drop_ignored_values, has_file, hub_arguments
from .configuration_dehvf import DehvfConfig


logger = logging.get_logger(__name__)

ADAPTER_FIELDS = ("hierarchy", *ADAPTER_MODULES)  # the modules of an adapter, including those without parameters
BASE_MODEL = "__base__"  # used instead of the name of an adapter


class _Disabled(threading.local):
    """Lists with a model whose adapters are disabled in this thread, or empty ones where this has ended."""

    def __init__(self):  # not a class attribute: `torch.compile` guards instance attributes
        self.entries = ()


_DISABLED = _Disabled()


class AdapterSet:
    """
    The adapters of a [`DehvfModel`]: `adapters` contains all of them by name, `active` is the active one, and
    `active_adapter` is its name. The modules of the active adapter are also attributes of the model (`fuser`,
    `projector`, ...), so that the model has their parameters.
    """

    adapters, active, active_adapter = {}, None, None
    sources = {}  # name -> folder or Hub id (`None` if new), and the arguments with which it was loaded
    _is_disabled_replica = False

    def get_adapter(self, adapter_name: str):
        """Raises `ValueError` if none of this name is loaded."""
        adapters = self.adapters
        if adapter_name not in adapters:
            raise ValueError(
                f"No adapter {adapter_name!r} is loaded. Loaded: {', '.join(adapters)}. Load it with "
                "`load_adapter(folder_or_id, name)`."
            )
        return adapters[adapter_name]

    def add_adapter_modules(self, adapter_name: str, adapter):
        """Adds an adapter, in the dtype of the active adapter or else in float32."""
        dtype = torch.float32 if self.active is None else self.active.memory_slots.key.dtype
        for module in adapter.modules().values():
            module.to(dtype).train(self.training)
        with CHANGES:
            if adapter_name in self.adapters:
                raise ValueError(f"An adapter {adapter_name!r} was loaded in the meantime. Choose another name.")
            self.adapters = {**self.adapters, adapter_name: adapter}

    def set_source(self, adapter_name: str, location, source: dict):
        """Where an adapter was loaded from. Its processor is loaded from there when the adapter is saved."""
        source = {name: value for name, value in source.items() if name != "force_download"}  # not again
        self.sources = {**self.sources, adapter_name: (location and absolute_place(location), source)}

    def activate_adapter(self, adapter_name: str):
        """See [`SwitchingMixin.set_adapter`]."""
        with CHANGES:
            adapter = self.get_adapter(adapter_name)
            # Replaced in one step, so that another thread that iterates over the modules sees one adapter only
            others = {name: module for name, module in self._modules.items() if name not in ADAPTER_FIELDS}
            self._modules = {**others, **adapter.modules()}
            self.active, self.active_adapter, self.config = adapter, adapter_name, adapter.config

    def remove_adapter(self, adapter_name: str):
        """See [`SwitchingMixin.delete_adapter`]."""
        with CHANGES:
            self.adapters = {name: adapter for name, adapter in self.adapters.items() if name != adapter_name}

    def __setattr__(self, name, value):
        """If a module of the active adapter is replaced, for example by `peft`, calls use the new module too."""
        super().__setattr__(name, value)
        if name in ADAPTER_FIELDS:
            with CHANGES:
                self.active = replace(self.active, **{name: value})
                self.adapters = {**self.adapters, self.active_adapter: self.active}

    def add_module(self, name, module):
        setattr(self, name, module)  # `nn.Module` would bypass `__setattr__`

    def train(self, mode: bool = True):
        """Also sets the mode of inactive adapters, so that switching changes none in place."""
        for adapter in self.adapters.values():
            for module in adapter.modules().values():
                module.train(mode)
        return super().train(mode)

    def _apply(self, fn, recurse=True):
        """Moves or converts inactive adapters together with the model."""
        for adapter in self.adapters.values():
            for module in adapter.modules().values() if adapter is not self.active else ():
                module._apply(fn, recurse)
        return super()._apply(fn, recurse)

    @contextmanager
    def disabled_in_this_thread(self):
        """See [`SwitchingMixin.disable_adapter`]."""
        entry = [self]
        _DISABLED.entries = (*filter(None, _DISABLED.entries), entry)
        try:
            yield
        finally:
            # Emptied and not removed: the contexts of two coroutines may not end in reverse order, and that of a
            # generator may end in another thread
            entry.clear()

    @property
    def is_disabled(self) -> bool:
        return self._is_disabled_replica or any(model is self for entry in _DISABLED.entries for model in entry)

    def _replicate_for_data_parallel(self):
        """`nn.DataParallel` runs each replica in a thread of its own."""
        replica = super()._replicate_for_data_parallel()
        replica._is_disabled_replica = self.is_disabled
        return replica


class SwitchingMixin:
    """Several adapters, for both model classes; `base_model` is the [`DehvfModel`]."""

    generation_configs = {}  # those of inactive adapters by name

    @property
    def adapter_names(self) -> list[str]:
        """The names of all loaded adapters, the active one first."""
        model = self.base_model
        return [model.active_adapter, *(name for name in model.adapters if name != model.active_adapter)]

    def active_adapters(self) -> list[str]:
        """The name of the active adapter, in a list as in `transformers`."""
        return [self.base_model.active_adapter]

    def load_adapter(self, pretrained_model_name_or_path, adapter_name: str, **kwargs):
        """
        Loads a further adapter for the current base models. Its config may differ, but not its base models. If their
        ids or commits differ, there is only a warning, since copies of a model may have different names. The first
        adapter is called `"default"` and stays active until `set_adapter` is called.

        Args:
            pretrained_model_name_or_path: Hub id or folder that `save_pretrained` wrote.
            adapter_name: its name in this model.
            kwargs: `revision`, `subfolder`, `token`, `cache_dir`, `local_files_only`, `force_download`.

        Raises:
            OSError: if there is no adapter.
            TypeError: if there is no such argument.
            ValueError: if the name is taken or not a string, the adapter does not fit its config, it was made for base
                models of other sizes, there is an adapter of `peft`, or the active adapter is offloaded.
        """
        if not isinstance(adapter_name, str) or not adapter_name:
            raise ValueError(f"`adapter_name` is {adapter_name!r}. Give a name, a string that is not empty.")
        if adapter_name in (taken := [*self.adapter_names, BASE_MODEL]):
            raise ValueError(
                f"The name {adapter_name!r} is taken. Choose another, or free it with `delete_adapter`. Taken are: "
                f"{', '.join(taken)}."
            )
        device = self.base_model.memory_slots.key.device
        if device.type == "meta":
            raise ValueError("The active adapter is offloaded. Load further adapters before `dispatch_model`.")
        kwargs.pop("trust_remote_code", None)
        if unknown := kwargs.keys() - {"revision", "subfolder"} - hub_arguments(kwargs).keys():
            raise TypeError(f"`load_adapter` has no argument `{min(unknown)}`. See its docstring for those it has.")
        check_no_peft(pretrained_model_name_or_path, kwargs)
        tensors = load_adapter_tensors(pretrained_model_name_or_path, kwargs)
        config = DehvfConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
        self._take_over_bases(config, adapter_name)
        empty = self._empty_adapter(config, pretrained_model_name_or_path)
        check_adapter_tensors(tensors, empty.state_dict(), pretrained_model_name_or_path)
        with torch.device("meta"):  # without drawing random numbers, since other threads may be drawing some
            adapter = self.build_adapter(config)
        modules = nn.ModuleDict(adapter.modules()).to_empty(device=device)
        modules.load_state_dict({name.removeprefix(PREFIX): tensor for name, tensor in tensors.items()})
        adapter.hierarchy.reset_parameters()
        own = copy.deepcopy(getattr(self, "text_generation_config", None))
        if self.can_generate() and has_file(pretrained_model_name_or_path, GENERATION_CONFIG_NAME, **kwargs):
            own = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **kwargs)
            own = drop_ignored_values(own, pretrained_model_name_or_path)
        with CHANGES:
            self.base_model.add_adapter_modules(adapter_name, adapter)
            self.base_model.set_source(adapter_name, pretrained_model_name_or_path, kwargs)
            self.generation_configs = {**self.generation_configs, adapter_name: own}

    def _take_over_bases(self, config: DehvfConfig, adapter_name: str):
        """Sets the base models of a config to those of this model, and warns if it was made for others."""
        config._attn_implementation = self.config._attn_implementation
        if config.merged_base:
            logger.warning(
                f"The adapter {adapter_name!r} was saved with its own copies of the base models, which are not "
                "loaded. If they had been changed, its answers will be wrong."
            )
        for key in ("vision", "text"):
            check_base(getattr(self.config, f"{key}_config"), getattr(config, f"{key}_config"), "this model")
            names = [f"{key}_model_id", f"{key}_model_revision"]
            (asked, commit), (there, own_commit) = ([getattr(one, n) for n in names] for one in (config, self.config))
            if asked != there or commit and own_commit and commit != own_commit:
                logger.warning(
                    f"The adapter {adapter_name!r} was made for the {key} model {asked} (commit {commit}), but this "
                    f"model has {there} (commit {own_commit}). If their weights differ, its answers will be wrong."
                )
            for name in (f"{key}_config", *names):
                setattr(config, name, getattr(self.config, name))

    def set_adapter(self, adapter_name: str | list[str]):
        """
        Activates an adapter: calls use it by default, and it is trained and saved. If a generation config was saved
        with it, `generation_config` becomes its own. Calls that are running in other threads finish with the adapter
        with which they began. As in `transformers`, its name may be in a list.

        Raises:
            ValueError: if none of this name is loaded, or several names are given.
        """
        if isinstance(adapter_name, (list, tuple)):
            if len(adapter_name) != 1:
                raise ValueError(
                    f"One adapter is active at a time. Got {adapter_name}. Give one name, or `adapter_names=` in a "
                    "call, with a name for each sample."
                )
            (adapter_name,) = adapter_name
        with CHANGES:
            previous = self.base_model.active_adapter
            self.base_model.activate_adapter(adapter_name)
            self.config = self.base_model.config
            if self.can_generate():
                self.generation_configs = {**self.generation_configs, previous: self.generation_config}
                self.generation_config = self.generation_configs.get(adapter_name, self.generation_config)

    def delete_adapter(self, adapter_names: str | list[str]):
        """Removes adapters. Raises `ValueError` if none of this name is loaded, or it is active."""
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        with CHANGES:
            for name in names:  # before any is removed
                if self.base_model.get_adapter(name) is self.base_model.active:
                    raise ValueError(f"The adapter {name!r} is active. Call `set_adapter` with another name first.")
            for name in names:
                self.base_model.remove_adapter(name)
                self.generation_configs = {key: own for key, own in self.generation_configs.items() if key != name}

    @contextmanager
    def disable_adapter(self):
        """
        Inside this context the model computes the same as its language model, bit for bit, and ignores images. This
        applies to calls in the same thread, including other coroutines while this one waits, and not to calls in
        other threads, such as those of `asyncio.to_thread` and executors. To disable the adapter for single threads,
        coroutines or samples of a batch, use `adapter_names=["__base__"]`.
        """
        with self.base_model.disabled_in_this_thread():
            yield
