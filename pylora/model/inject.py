"""Putting an adapter into a model: resolve the targets, wrap or extend the modules, set what trains.

Either the whole injection succeeds or model, configuration and flags are what they were: every change is entered in a
journal that can be played back.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from pylora.config import pattern_value, require_supported
from pylora.init import at_end, base_updates_at_end, find_init
from pylora.layers import BaseTunerLayer, LoraLayer, ParamWrapper, create_layer, find_factory, tuner_layers, walk
from pylora.layers.tuner_layer import entry_of
from pylora.layers.walk import is_tuner_layer
from pylora.model.lifecycle import unmerge_before_switch
from pylora.model.replicate import replicate_layers
from pylora.model.submodules import find_module
from pylora.model.trainable import check_bias, has_tuner_layers, mark_only_adapters_as_trainable
from pylora.model.trained_modules import add_trained_modules, trains_modules
from pylora.model.tying import tie_factors
from pylora.targeting.parameters import ParameterTarget
from pylora.targeting.resolve import ResolvedTargets, resolve_targets
from pylora.targeting.tied import apply_tying


class Journal:
    """Functions that revert changes, run last first."""

    def __init__(self) -> None:
        self._reverts: list[Callable[[], Any]] = []

    def add(self, revert: Callable[[], Any]) -> None:
        """Enter how to revert the change just made (or about to be made)."""
        self._reverts.append(revert)

    def revert(self) -> None:
        """Revert everything entered."""
        while self._reverts:
            self._reverts.pop()()


@dataclasses.dataclass
class Injection:
    """One adapter on its way into one model.

    Attributes:
        model: The base model.
        config: The adapter's LoraConfig; `target_modules` and `fan_in_fan_out` are written back to it.
        adapter_name: The adapter.
        active_adapters: The names active in the model; the new adapter trains only if it is one of them.
        low_cpu_mem_usage: Make the factors on the meta device, for weights that are loaded afterwards.
        state_dict_keys: If given, the modules are those that these checkpoint keys name.
    """

    model: nn.Module
    config: Any
    adapter_name: str
    active_adapters: list[str]
    low_cpu_mem_usage: bool = False
    state_dict_keys: Iterable[str] | None = None

    def run(self) -> ResolvedTargets:
        """Do it, or raise and leave everything as it was.

        Returns:
            What is adapted.
        """
        self._check()
        first = not has_tuner_layers(self.model)
        journal = Journal()
        try:
            self._record_config(journal)
            if self.config.layer_replication:
                journal.add(replicate_layers(self.model, self.config.layer_replication))
            apply_tying(self.model, self.config)
            targets = resolve_targets(
                self.model,
                self.config,
                is_tuner_layer=lambda module: isinstance(module, BaseTunerLayer),
                state_dict_keys=self.state_dict_keys,
            )
            self.config.target_modules = targets.target_modules
            targets = dataclasses.replace(targets, modules=self._with_tied_last(targets.modules))
            for module in targets.modules.values():
                if not isinstance(module, LoraLayer):
                    find_factory(module, self.config)
            # Changes that a scheme makes to base weights come last, when nothing can fail any more.
            with base_updates_at_end():
                with torch.device("meta") if self.low_cpu_mem_usage else nullcontext():
                    for name, module in targets.modules.items():
                        self._adapt(name, module, journal)
                    for target in targets.parameters:
                        self._adapt_parameter(target, journal)
                tie_factors(self.model, self.config, self.adapter_name)
                self._set_flags(journal, first)
        except BaseException:
            journal.revert()
            raise
        return targets

    def _with_tied_last(self, modules: dict[str, nn.Module]) -> dict[str, nn.Module]:
        """The modules to adapt, behind them those whose adapters are to be tied to the input embedding's."""
        names = getattr(self.config, "target_modules_to_tie", None) or ()
        if self.state_dict_keys is not None:
            names = [name for name in names if name in modules]
        tied = {name: self.model.get_submodule(name) for name in names}
        return {**{name: module for name, module in modules.items() if name not in tied}, **tied}

    def _check(self) -> None:
        require_supported(self.config)
        check_bias(self.config.bias)
        # The name becomes a key of ModuleDicts: let torch refuse it (KeyError, TypeError) before anything is changed.
        nn.ModuleDict()[self.adapter_name] = nn.Identity()
        find_init(self.config.init_lora_weights)

    def _record_config(self, journal: Journal) -> None:
        config, before = self.config, dict(self.config.__dict__)

        def revert() -> None:
            config.__dict__.clear()
            config.__dict__.update(before)

        journal.add(revert)

    def _adapt(self, name: str, module: nn.Module, journal: Journal) -> None:
        if isinstance(module, LoraLayer):
            self._extend(module, name, journal)
            return
        parent_name, _, child_name = name.rpartition(".")
        parent = find_module(self.model, parent_name)
        if isinstance(parent, BaseTunerLayer):
            return  # The output projection of an attention that is a target itself, which adapts both.
        layer: Any = create_layer(
            module,
            self.adapter_name,
            self.config,
            **self._rank_and_alpha(name),
            target_name=name,
            ephemeral_gpu_offload=self.config.runtime_config.ephemeral_gpu_offload,
        )
        if isinstance(parent, nn.TransformerEncoderLayer):
            layer._parent_reads_weight = True
        journal.add(lambda: setattr(parent, child_name, _unloaded(layer)))
        setattr(parent, child_name, layer)

    def _adapt_parameter(self, target: ParameterTarget, journal: Journal) -> None:
        """Extend the wrapper of this parameter, or put a new one around its module and what wraps that already."""
        parent: Any = self.model
        *path, child_name = target.module_name.split(".")
        for part in path:
            parent = parent._modules[part]
            parent = parent.get_base_layer() if isinstance(parent, BaseTunerLayer) else parent
        outermost = module = parent._modules[child_name]
        while isinstance(module, ParamWrapper):
            if module.parameter_name == target.parameter_name:
                self._extend(module, target.key, journal)
                return
            module = module.base_layer
        wrapper = ParamWrapper(
            outermost,
            self.adapter_name,
            target.parameter_name,
            config=self.config,
            **self._rank_and_alpha(target.key),
        )
        journal.add(lambda: setattr(parent, child_name, outermost))
        setattr(parent, child_name, wrapper)

    def _extend(self, layer: LoraLayer, name: str, journal: Journal) -> None:
        inner: nn.Module = layer._modules["base_layer"]
        nested = isinstance(inner, BaseTunerLayer) or inner._modules
        for each in tuner_layers(cast(nn.Module, layer)) if nested else [layer]:
            journal.add(adapter_restorer(each, self.adapter_name))
        layer.update_layer(self.adapter_name, config=self.config, **self._rank_and_alpha(name), target_name=name)

    def _rank_and_alpha(self, name: str) -> dict[str, Any]:
        config = self.config
        return {
            "r": pattern_value(config.rank_pattern, name, config.r),
            "lora_alpha": pattern_value(config.alpha_pattern, name, config.lora_alpha),
        }

    def _set_flags(self, journal: Journal, first: bool) -> None:
        """Activate, and settle what trains. A further adapter changes no flag of what was there before."""
        active, config = self.active_adapters, self.config
        is_active = self.adapter_name in active
        if first:
            modules = [visit.module for visit in walk(self.model)]
            journal.add(_flag_restorer(modules))
            mark_only_adapters_as_trainable(self.model, modules, [config.bias] if is_active else [])
            if trains_modules(config):
                add_trained_modules(self.model, config, self.adapter_name, is_active, journal.add)
                modules = [visit.module for visit in walk(self.model)]
            for layer in filter(is_tuner_layer, modules):
                if active != layer._active_adapter or not isinstance(layer, LoraLayer):
                    layer.set_adapter(active, inference_mode=config.inference_mode)
            return
        if trains_modules(config):
            restore_flags = _flag_restorer(visit.module for visit in walk(self.model))
            add_trained_modules(self.model, config, self.adapter_name, is_active, journal.add)
            restore_flags()
        layers = tuner_layers(self.model)
        at_end(partial(_unmerge_before_switch, layers))
        for layer in layers:
            # A LoRA layer has settled what trains when it got the adapter, if it knew the active ones.
            if layer._active_adapter != active or not isinstance(layer, LoraLayer):
                layer._active_adapter = list(active)
                layer.set_requires_grad(self.adapter_name, is_active and not config.inference_mode)


def _unmerge_before_switch(layers: Iterable[BaseTunerLayer]) -> None:
    for layer in layers:
        unmerge_before_switch(layer)


def _unloaded(layer: Any) -> nn.Module:
    """The module that `layer` wraps, as it was before."""
    if hasattr(layer, "unload_and_optionally_merge_module"):
        return layer.unload_and_optionally_merge_module(merge=False, safe_merge=False, adapter_names=None)
    return layer.get_base_layer()


def _flag_restorer(modules: Iterable[nn.Module]) -> Callable[[], None]:
    """A function that gives every parameter that the modules have now the `requires_grad` it has now."""
    flags = [
        (param, param.requires_grad) for module in modules for param in module._parameters.values() if param is not None
    ]

    def restore() -> None:
        for param, requires_grad in flags:
            if param.requires_grad is not requires_grad:
                param.requires_grad_(requires_grad)

    return restore


def adapter_restorer(layer: BaseTunerLayer, adapter_name: str) -> Callable[[], None]:
    """A function that gives the layer the entries it has now for `adapter_name`, or none."""
    ranks = layer.__dict__.get("r")  # of a LoRA layer; every adapter there is in it
    before: dict[str, Any] = {}
    if ranks is None or adapter_name in ranks:
        found = ((attr, entry_of(container, adapter_name)) for attr, container in _containers(layer))
        before = {attr: entry for attr, entry in found if entry is not None}

    def restore() -> None:
        for attr, container in _containers(layer):
            if attr in before:
                container[adapter_name] = before[attr]
            elif adapter_name in container:
                del container[adapter_name]

    return restore


def _containers(layer: BaseTunerLayer) -> Iterator[tuple[str, Any]]:
    """Everything that is keyed by adapter on a layer."""
    return ((attr, getattr(layer, attr)) for attr in layer.adapter_layer_names + layer.other_param_names)
