"""`add_weighted_adapter`: a new adapter that combines others, checked before the model is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from pylora.combine import (
    SVD_KINDS,
    Combination,
    Term,
    check_combination,
    combine_terms,
    combined_config,
    combined_rank,
)
from pylora.layers import LoraLayer, tuner_layers, walk
from pylora.model.factor_access import factors_of, set_factors
from pylora.model.modules_to_save import ModulesToSaveWrapper
from pylora.model.snapshot import ModelSnapshot

if TYPE_CHECKING:
    from pylora.model.lora_model import LoraModel


def add_weighted_adapter(
    tuner: LoraModel, adapters: Sequence[str], weights: Sequence[float], adapter_name: str, how: Combination
) -> None:
    """See `LoraModel.add_weighted_adapter`; `how.rank` is `svd_rank`, 0 for none."""
    how = dataclasses.replace(how, kind=_check(tuner, adapters, weights, how))
    configs = [tuner.peft_config[name] for name in adapters]
    how = dataclasses.replace(how, rank=combined_rank(configs, how))
    config: Any = combined_config(configs, how.rank)
    weight_of = list(zip(adapters, map(float, weights), strict=True))

    before, active = ModelSnapshot(tuner.model), tuner.active_adapter
    targeted = list(tuner.targeted_module_names)
    scheme = config.init_lora_weights
    try:
        # A scheme that changes base weights has done that for the adapters that are combined.
        if scheme not in (True, False) and str(scheme).lower() != "gaussian":
            config.init_lora_weights = False
        tuner.peft_config[adapter_name] = config
        tuner.inject_adapter(tuner.model, adapter_name)
        for layer in tuner_layers(tuner.model):
            if isinstance(layer, LoraLayer) and layer._has_adapter(adapter_name):
                _fill(layer, adapter_name, weight_of, how)
        tuner.set_requires_grad(adapter_name, False)
    except BaseException:
        before.restore(adapter_name)
        tuner.peft_config.pop(adapter_name, None)
        tuner.active_adapter, tuner.targeted_module_names = active, targeted
        raise
    config.init_lora_weights = scheme


def _check(tuner: LoraModel, adapters: Sequence[str], weights: Sequence[float], how: Combination) -> str:
    """Raise what can be raised before the model is touched; returns the kind that will be used."""
    for name in adapters:
        if name not in tuner.peft_config:
            raise ValueError(f"Adapter {name} does not exist")
    for name in adapters:
        if getattr(tuner.peft_config[name], "target_parameters", None):
            raise ValueError(
                f"add_weighted_adapter does not support targeting nn.Parameter (problematic adapter '{name}')"
            )
    if not adapters:
        raise ValueError(f"Found no adapter matching the names in {adapters}")
    if len(weights) != len(adapters):
        raise ValueError(f"weights: expected one for each of {len(adapters)} adapters, got {len(weights)}")
    shared = sum(
        sum(name in visit.module.modules_to_save for name in adapters) > 1
        for visit in walk(tuner.model)
        if isinstance(visit.module, ModulesToSaveWrapper)
    )
    if shared:
        raise ValueError(
            "Cannot add weighted adapters if they target the same module with modules_to_save, but found "
            f"{shared} such instance(s)."
        )
    kind = "linear" if len(adapters) == 1 else how.kind
    check_combination(dataclasses.replace(how, kind=kind))
    if kind in SVD_KINDS and how.svd_driver is not None:
        devices = {parameter.device.type for parameter in tuner.model.parameters()}
        if devices != {"cuda"}:
            raise RuntimeError(f"svd_driver: expected None except on CUDA, got {how.svd_driver!r} on {sorted(devices)}")
    return kind


def _fill(layer: LoraLayer, adapter_name: str, weight_of: list[tuple[str, float]], how: Combination) -> None:
    """Give the new adapter on `layer` the combination of those that are there."""
    present = [(name, weight) for name, weight in weight_of if layer._has_adapter(name)]
    if not present:
        raise ValueError(f"No matching LoRAs found: none of the adapters is on {layer}")
    entries = [tuple(getattr(layer, attr)[name] for attr in layer.factor_names) for name, _ in present]
    transposed = layer.factor_names[0] == "lora_embedding_A" or getattr(layer, "fan_in_fan_out", False)
    terms = [
        Term(*factors_of(layer, name), float(layer.scaling[name]), weight, getattr(b, "groups", 1), transposed)
        for (name, weight), (_, b) in zip(present, entries, strict=True)
    ]
    set_factors(layer, adapter_name, *combine_terms(terms, how))
    bias = getattr(getattr(layer, layer.factor_names[1])[adapter_name], "bias", None)
    if bias is not None:
        _fill_bias(bias, [(b.bias, term) for (_, b), term in zip(entries, terms, strict=True) if b.bias is not None])


def _fill_bias(bias: torch.Tensor, sources: list[tuple[torch.Tensor, Term]]) -> None:
    with torch.no_grad():
        bias.zero_()
        for source, term in sources:
            bias.add_(source.to(bias.dtype), alpha=term.weight * term.scaling)
