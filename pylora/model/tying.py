"""Adapters of modules that share the input embedding's weight: their factors are the embedding adapter's."""

from __future__ import annotations

from typing import Any

from torch import nn


def tie_factors(model: Any, config: Any, adapter_name: str) -> None:
    """Let the adapter of each module in `config.target_modules_to_tie` share the memory of the input embedding's.

    An embedding gets the same parameters. A linear layer, whose factors are the transposed ones in the other order,
    gets parameters that are views of them, as in PEFT: each has a gradient of its own.

    Args:
        model: The base model, adapters in place.
        config: The adapter's LoraConfig, after `apply_tying`.
        adapter_name: The adapter; a module without it is left out.
    """
    names = getattr(config, "target_modules_to_tie", None)
    if not names:
        return
    source: Any = model.get_input_embeddings()
    if adapter_name not in source.lora_embedding_A:
        return
    a, b = source.lora_embedding_A[adapter_name], source.lora_embedding_B[adapter_name]
    group = [source]
    for name in names:
        layer = model.get_submodule(name)
        if adapter_name in layer.lora_embedding_A:
            layer.lora_embedding_A[adapter_name], layer.lora_embedding_B[adapter_name] = a, b
        elif adapter_name in layer.lora_A:
            _share(layer.lora_A[adapter_name], b)
            _share(layer.lora_B[adapter_name], a)
        else:
            continue
        if layer.get_base_layer().weight is source.get_base_layer().weight:
            group.append(layer)
    for layer in group:
        layer._tied_layers[adapter_name] = group


def _share(linear: Any, factor: nn.Parameter) -> None:
    own = linear.weight
    if own.is_meta or own.data_ptr() != factor.data_ptr() or own.dtype != factor.dtype:
        linear.weight = nn.Parameter(factor.detach().t(), requires_grad=own.requires_grad)
