"""Which parameters train: the adapters, and biases as `LoraConfig.bias` says; and how many they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn

from pylora.layers import walk
from pylora.layers.walk import is_tuner_layer
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper


def check_bias(bias: str) -> None:
    """Raise NotImplementedError for a `bias` value other than "none", "all" and "..._only"."""
    if bias not in ("none", "all") and not bias.endswith("_only"):
        raise NotImplementedError(f"Requested bias: {bias}, is not implemented.")


def mark_only_adapters_as_trainable(model: nn.Module, modules: Sequence[nn.Module], bias_modes: Iterable[str]) -> None:
    """Freeze everything outside adapters and auxiliary wrappers, then unfreeze the biases asked for.

    Args:
        model: The model, adapters in place.
        modules: Its modules, as `walk` visits them.
        bias_modes: The active adapters' `bias` settings. "none" adds nothing, "all" every bias of the model,
            "lora_only" (or another "..._only") the biases of the wrapped layers.

    Raises:
        NotImplementedError: A mode is none of these; nothing is changed then.
    """
    modes = list(bias_modes)
    for mode in modes:
        check_bias(mode)
    # Auxiliary wrappers look after their own parameters.
    managed: set[nn.Module] = set()
    for module in modules:
        if isinstance(module, AuxiliaryTrainingWrapper):
            managed.update(module.modules())
        if module in managed:
            continue
        for param in module._parameters.values():
            if param is not None and param.requires_grad:
                param.requires_grad = False

    layers = [module for module in modules if is_tuner_layer(module)]
    for mode in modes:
        if mode == "all":
            for name, param in model.named_parameters():
                if name == "bias" or name.endswith(".bias"):
                    param.requires_grad = True
        elif mode != "none":
            for layer in layers:
                bias = getattr(layer, "bias", None)
                if bias is not None:
                    bias.requires_grad = True
    for layer in layers:
        layer._freeze_non_trainable_peft_weights()


def _num_elements(param: Any) -> int:
    """Elements of a parameter as its user counts them, be it partitioned (DeepSpeed) or packed (bitsandbytes)."""
    count = param.numel()
    if count == 0 and hasattr(param, "ds_numel"):
        count = param.ds_numel
    if type(param).__name__ == "Params4bit":
        storage = getattr(param, "quant_storage", None)
        item_bytes = param.element_size() if hasattr(param, "element_size") else storage.itemsize if storage else 1
        count *= 2 * item_bytes
    return count


def count_parameters(model: nn.Module) -> tuple[int, int]:
    """(trainable, all) parameters of the model, shared ones counted once."""
    trainable = total = 0
    for param in model.parameters():
        count = _num_elements(param)
        total += count
        if param.requires_grad:
            trainable += count
    return trainable, total


def has_tuner_layers(model: nn.Module) -> bool:
    """Whether the model carries adapters already."""
    return any(is_tuner_layer(visit.module) for visit in walk(model))
