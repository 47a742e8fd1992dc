"""What the schemes that look at the base weight share."""

from __future__ import annotations

from collections.abc import Collection

import torch

from pylora.init.registry import Factors


def read_base(factors: Factors, readable: Collection[torch.dtype], complaint: str) -> torch.Tensor:
    """The base weight in f32, [out_features, in_features]. It may alias the storage.

    Args:
        factors: Of the new adapter.
        readable: The dtypes to accept.
        complaint: The message where it has another one.

    Raises:
        TypeError: the base weight has another dtype.
        ValueError: the caller of `init_adapter` gave no base weight.
    """
    if factors.base is None:
        raise ValueError("init_adapter: base: expected access to the base weight, which this scheme reads; got None")
    if factors.base.stored.dtype not in readable:
        raise TypeError(complaint)
    return factors.base.open().read().to(torch.float32)


def fill(factors: Factors, a: torch.Tensor, b: torch.Tensor) -> None:
    """Write a [rows, in_features] and b [out_features, rows]; fewer rows than the rank leave zeros."""
    rank = a.shape[0]
    for target, value in ((factors.a.flatten(1), a), (factors.b.flatten(1).t(), b.t())):
        target[:rank] = value
        target[rank:] = 0
