"""LoRA+: a larger learning rate for B than for A (https://arxiv.org/abs/2402.12354)."""

from __future__ import annotations

import importlib
from typing import Any

from torch import nn
from torch.optim import Optimizer

_EIGHT_BIT_OPTIMIZERS = frozenset({"Adam8bit", "AdamW8bit", "PagedAdam8bit", "PagedAdamW8bit"})


def create_loraplus_optimizer(
    model: nn.Module,
    optimizer_cls: type[Optimizer],
    *,
    lr: float,
    loraplus_lr_ratio: float,
    loraplus_weight_decay: float = 0.0,
    loraplus_lr_embedding: float = 1e-6,
    **kwargs: Any,
) -> Optimizer:
    """An optimizer over a model's trainable parameters, in four groups with learning rates as LoRA+ sets them.

    The groups, in this order: A and other matrices (`lr`), factors of embeddings (`loraplus_lr_embedding`), B
    (`lr * loraplus_lr_ratio`), and vectors and biases (the same, without weight decay). A group may be empty.

    Args:
        model: a model with LoRA adapters.
        optimizer_cls: the optimizer, for instance `torch.optim.AdamW`.
        lr: learning rate of A.
        loraplus_lr_ratio: the learning rate of B divided by that of A; at least 1, larger for harder tasks.
        loraplus_weight_decay: weight decay of all groups but the last.
        loraplus_lr_embedding: learning rate of the factors of embedding layers.
        **kwargs: further arguments of `optimizer_cls`.

    Returns:
        an instance of `optimizer_cls`. With an 8-bit optimizer of bitsandbytes, embeddings keep 32-bit state.
    """
    undecayed = _layer_norm_parameters(model)
    factors_a, embeddings, factors_b, vectors = [], [], [], []
    for name, param in model.named_parameters():
        if not param.requires_grad:
            continue
        if ".lora_embedding_" in f".{name}":
            embeddings.append(param)
        elif "lora_B" not in name and param.ndim != 1:
            factors_a.append(param)
        elif "bias" in name or id(param) in undecayed:
            vectors.append(param)
        else:
            factors_b.append(param)
    lr_b = lr * loraplus_lr_ratio
    groups = [
        {"params": factors_a, "weight_decay": loraplus_weight_decay, "lr": lr},
        {"params": embeddings, "weight_decay": loraplus_weight_decay, "lr": loraplus_lr_embedding},
        {"params": factors_b, "weight_decay": loraplus_weight_decay, "lr": lr_b},
        {"params": vectors, "weight_decay": 0.0, "lr": lr_b},
    ]
    optimizer: Optimizer = optimizer_cls(groups, lr=lr, **kwargs)  # type: ignore[call-arg]
    if optimizer_cls.__name__ in _EIGHT_BIT_OPTIMIZERS:
        _keep_embeddings_in_32_bits(model)
    return optimizer


def _layer_norm_parameters(model: nn.Module) -> set[int]:
    """The ids of the parameters of layer norms, which get no weight decay."""
    norms = [module for module in model.modules() if isinstance(module, nn.LayerNorm)]
    return {id(param) for norm in norms for param in norm.parameters(recurse=False)}


def _keep_embeddings_in_32_bits(model: nn.Module) -> None:
    manager = importlib.import_module("bitsandbytes").optim.GlobalOptimManager.get_instance()
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            manager.register_module_override(module, "weight", {"optim_bits": 32})
