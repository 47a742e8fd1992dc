"""An adapter's factors on a layer, whether modules hold them or the layer itself does."""

from __future__ import annotations

import torch
from torch import nn

from pylora.layers import LoraLayer


def factors_of(layer: LoraLayer, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the adapter as they are stored, without a graph.

    Raises:
        KeyError: The adapter is not on this layer.
    """
    entries = [getattr(layer, attr)[name] for attr in layer.factor_names]
    a, b = (getattr(entry, "weight", entry).detach() for entry in entries)
    return a, b


def set_factors(layer: LoraLayer, name: str, a: torch.Tensor, b: torch.Tensor) -> None:
    """Make `a` and `b` the frozen factors of an adapter that the layer has."""
    for attr, value in zip(layer.factor_names, (a, b), strict=True):
        container = getattr(layer, attr)
        parameter = nn.Parameter(value, requires_grad=False)
        if isinstance(container[name], nn.Parameter):
            container[name] = parameter
        else:
            container[name].weight = parameter
