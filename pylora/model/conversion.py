"""`convert_to_lora`: adapters rewritten as plain LoRA of a chosen rank, scaling included."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pylora.checkpoint.files import StrPath, staged_files
from pylora.checkpoint.save import stage_weights
from pylora.combine import triplets_of_product
from pylora.config import LoraConfig, PeftType
from pylora.init import SingularTriplets
from pylora.layers import BaseTunerLayer, tuner_layers, walk
from pylora.layers.merging import merged_values
from pylora.model.factor_access import factors_of
from pylora.model.modules_to_save import ModulesToSaveWrapper

_PREFIX = "base_model.model."


def convert_to_lora(
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> tuple[LoraConfig, dict[str, torch.Tensor]]:
    """Approximate an adapter by a plain LoRA adapter, layer by layer, as well as its rank allows.

    For a LoRA adapter this changes the rank; DoRA and other variants are rewritten as what they add to the base weight.
    The scaling goes into the factors, so that the new adapter's is 1. Dense layers only, as in PEFT.

    Args:
        model: A model with adapters.
        rank: An int: the rank of every layer. A float from 0 to 1: for each layer the smallest rank whose squared
            singular values make up this share of all.
        adapter_name: The adapter to convert.
        progressbar: Show one.
        compile_kwargs: Arguments for `torch.compile`, to compile the decomposition.

    Returns:
        The new adapter's configuration, and its tensors by checkpoint key without the adapter's name.

    Raises:
        ValueError: The rank is 0, negative, a float outside 0 to 1 or larger than a layer; or the adapter has biases.
        TypeError: The model has no layer that can be converted, or one that cannot.
        KeyError: There is no such adapter.
    """
    _check_rank(rank)
    _check_layers(model, adapter_name)
    source: Any = getattr(model, "peft_config", {}).get(adapter_name)
    _check_source(source)
    layers = [
        (visit.name, visit.module)
        for visit in walk(model)
        if isinstance(visit.module, BaseTunerLayer) and adapter_name in getattr(visit.module, "lora_A", ())
    ]
    if not layers:
        raise KeyError(adapter_name)
    config = _new_config(source, rank)
    decompose = triplets_of_product if compile_kwargs is None else torch.compile(triplets_of_product, **compile_kwargs)
    if progressbar:
        from tqdm import tqdm

        layers = tqdm(layers, desc="Converting to LoRA")
    tensors: dict[str, torch.Tensor] = {}
    with torch.no_grad():
        for name, layer in layers:
            a, b = _converted(layer, rank, adapter_name, decompose)
            _enter(config, name.removeprefix(_PREFIX), a.shape[0], rank)
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a, b
    if source is not None and source.modules_to_save:
        config.modules_to_save = copy.copy(source.modules_to_save)
        tensors.update(_trained_modules(model, adapter_name))
    return config, tensors


def save_as_lora(
    path: StrPath,
    model: nn.Module,
    rank: int | float,
    adapter_name: str = "default",
    progressbar: bool = False,
    compile_kwargs: Mapping[str, Any] | None = None,
) -> None:
    """Write what `convert_to_lora` gives as an adapter: adapter_model.safetensors and adapter_config.json.

    Args:
        path: The folder; it is made if it does not exist. Either both files are written or none.
        model, rank, adapter_name, progressbar, compile_kwargs: See `convert_to_lora`, also for errors.
    """
    config, tensors = convert_to_lora(model, rank, adapter_name, progressbar, compile_kwargs)
    with staged_files() as stage:
        folder = stage.folder(Path(path))
        stage_weights(tensors, folder, safe_serialization=True)
        config.save_pretrained(folder)


def _check_rank(rank: int | float) -> None:
    if isinstance(rank, float):
        if not 0 < rank <= 1:
            raise ValueError(
                f"If rank is a float, it is interpreted as a threshold. It must be between 0 and 1 but got {rank}."
            )
    elif rank == 0:
        raise ValueError("Passing a rank of 0 doesn't make sense, please pass a valid value.")
    elif rank < 0:
        raise ValueError(f"rank: expected a positive number, got {rank}")


def _check_layers(model: nn.Module, adapter_name: str) -> None:
    layers = tuner_layers(model)
    unsupported = {repr(type(layer)) for layer in layers if not layer.supports_lora_conversion(adapter_name)}
    if unsupported:
        raise TypeError(
            f"Some module types on this model do not support LoRA conversion: {', '.join(sorted(unsupported))}."
        )
    if not layers:
        raise TypeError("Could not detect any layer that supports LoRA conversion.")


def _check_source(source: Any) -> None:
    if source is None:
        return
    if source.peft_type == PeftType.LORA:
        warnings.warn(
            "Converting a PEFT adapter to LoRA that is already a LoRA adapter. There is typically no need for that.",
            stacklevel=3,
        )
    if source.bias != "none" or source.lora_bias:
        field = "bias" if source.bias != "none" else "lora_bias"
        raise ValueError(
            f"The adapter's config sets {field}={getattr(source, field)}, this is not supported right now."
        )


def _new_config(source: Any, rank: int | float) -> LoraConfig:
    r = rank if isinstance(rank, int) else 1
    if source is None:
        # PEFT's alpha: with the default one a rank that is not 8 would not have scaling 1.
        return LoraConfig(r=r, lora_alpha=r, target_modules=[], exclude_modules=[])
    return LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=copy.copy(source.target_modules),
        exclude_modules=[],
        base_model_name_or_path=source.base_model_name_or_path,
        layers_pattern=source.layers_pattern,
        layers_to_transform=source.layers_to_transform,
    )


def _enter(config: Any, name: str, layer_rank: int, rank: int | float) -> None:
    """A rank that is not the general one needs patterns, and so does a name that a regular expression has to match."""
    if layer_rank != rank or isinstance(config.target_modules, str):
        config.rank_pattern[name] = layer_rank
        config.alpha_pattern[name] = layer_rank
    else:
        config.target_modules.add(name)


def _converted(layer: Any, rank: int | float, name: str, decompose: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The layer's new A and B, in the adapter's dtype."""
    a, b = factors_of(layer, name)
    dtype = a.dtype
    if name in layer.lora_variant:
        weight = layer._base_weight()
        change = merged_values(weight, None, layer._deltas([name]), safe_merge=False).weight - weight.read()
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        found = SingularTriplets(*torch.linalg.svd(change, full_matrices=False))
    else:
        wide = torch.promote_types(dtype, torch.float32)
        found = decompose(b.to(wide) * layer.scaling[name], a.to(wide))
    largest = min(a.shape[1], b.shape[0])
    kept = rank if isinstance(rank, int) else _rank_for(found.s, rank)
    if kept > largest:
        raise ValueError(
            f"The chosen rank {kept} is larger than the weight shape ({largest}), please choose a lower rank."
        )
    new_a, new_b = a.new_zeros(kept, a.shape[1]), b.new_zeros(b.shape[0], kept)
    known = min(kept, found.s.shape[0])
    new_a[:known] = found.vh[:known]
    new_b[:, :known] = found.u[:, :known] * found.s[:known]
    return new_a, new_b


def _rank_for(s: torch.Tensor, share: float) -> int:
    """The smallest number of leading singular values whose squares make up `share` of all, at least 1."""
    energy = torch.cumsum(s**2, dim=0)
    return min(int(torch.searchsorted(energy, share * energy[-1])) + 1, s.shape[0])


def _trained_modules(model: nn.Module, adapter_name: str) -> dict[str, torch.Tensor]:
    tensors = {}
    for visit in walk(model):
        wrapper = visit.module
        if isinstance(wrapper, ModulesToSaveWrapper) and adapter_name in wrapper.modules_to_save:
            for name, parameter in wrapper.modules_to_save[adapter_name].named_parameters():
                tensors[f"{visit.name}.{name}"] = parameter.data
    return tensors
