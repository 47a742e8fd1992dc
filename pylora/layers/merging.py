"""Merging into and unmerging from the base weight, in plain torch.

Numerics: W + delta_1 + ... + delta_n is summed in f32 (f64 for an f64 weight) and rounded once to W's dtype. Everything
is computed before the first write.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from pylora.layers.base_weight import BaseWeight
from pylora.layers.tuner_layer import BaseTunerLayer


class Delta(NamedTuple):
    """What one adapter adds: scaling * b @ a to the weight, and `bias` (already scaled) to the base bias."""

    adapter_name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None


class MergedValues(NamedTuple):
    """The rounded weight ([out, in]) and bias that a merge would store; `bias` is None where no adapter changes it."""

    weight: torch.Tensor
    bias: torch.Tensor | None


def check_adapters_to_merge(
    module: BaseTunerLayer, adapter_names: list[str] | None = None, *, warn: bool = True
) -> list[str]:
    """The adapters still to be merged into `module`: `adapter_names`, or the active ones, less the merged ones.

    Args:
        module: The layer.
        adapter_names: Names to merge; None means the active adapters.
        warn: Whether to warn about adapters that are merged already.

    Raises:
        TypeError: `adapter_names` is a string.
    """
    if isinstance(adapter_names, str):
        raise TypeError(f"adapter_names should be a list of strings, got {adapter_names!r}.")
    names = list(module.active_adapters if adapter_names is None else adapter_names)
    if not module.merged:
        return names
    merged = module.merged_adapters
    names = [name for name in names if name not in merged]
    if warn and names:
        warnings.warn(
            f"Already following adapters were merged {','.join(merged)}. "
            f"You are now additionally merging {','.join(names)}.",
            stacklevel=3,
        )
    elif warn:
        warnings.warn("All adapters are already merged, nothing to do.", stacklevel=3)
    return names


def _accumulator(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` wide enough to sum in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _add_product(total: torch.Tensor, delta: Delta, sign: float) -> None:
    a = delta.a.to(device=total.device, dtype=total.dtype)
    b = delta.b.to(device=total.device, dtype=total.dtype)
    total.addmm_(b, a, alpha=sign * float(delta.scaling))


def _require_finite(tensor: torch.Tensor, adapter_name: str) -> None:
    if not torch.isfinite(tensor).all():
        raise ValueError(f"NaNs detected in the merged weights. The adapter {adapter_name} seems to be broken")


@torch.no_grad()
def merged_values(weight: BaseWeight, bias: torch.Tensor | None, deltas: list[Delta], safe_merge: bool) -> MergedValues:
    """The weight and bias with all deltas added; nothing is written.

    Args:
        weight: The base weight.
        bias: The base layer's bias, if it has one.
        deltas: What to add, in order.
        safe_merge: Check after each adapter that the rounded values are finite.

    Raises:
        ValueError: `safe_merge` and a value is NaN or infinite; the message names the adapter that made it so.
    """
    total = _accumulator(weight.read())
    total_bias = None if bias is None else _accumulator(bias.detach())
    bias_changed = False
    for delta in deltas:
        _add_product(total, delta, 1.0)
        if safe_merge:
            _require_finite(total.to(weight.dtype), delta.adapter_name)
        if delta.bias is not None and total_bias is not None:
            total_bias += delta.bias
            bias_changed = True
            if safe_merge and bias is not None:
                _require_finite(total_bias.to(bias.dtype), delta.adapter_name)
    return MergedValues(total.to(weight.dtype), total_bias if bias_changed else None)


@torch.no_grad()
def merge_into_base(weight: BaseWeight, bias: torch.Tensor | None, deltas: list[Delta], safe_merge: bool) -> None:
    """Add the deltas to the base weight and bias; see `merged_values` for numerics and errors."""
    values = merged_values(weight, bias, deltas, safe_merge)
    weight.write(values.weight)
    if values.bias is not None and bias is not None:
        bias.copy_(values.bias)


@torch.no_grad()
def unmerge_from_base(weight: BaseWeight, bias: torch.Tensor | None, deltas: list[Delta]) -> None:
    """Subtract the deltas that `merge_into_base` added; exact up to one rounding of each weight."""
    total = _accumulator(weight.read())
    total_bias = None if bias is None else _accumulator(bias.detach())
    bias_changed = False
    for delta in deltas:
        _add_product(total, delta, -1.0)
        if delta.bias is not None and total_bias is not None:
            total_bias -= delta.bias
            bias_changed = True
    weight.write(total)
    if bias_changed and bias is not None and total_bias is not None:
        bias.copy_(total_bias)
