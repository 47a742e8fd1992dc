"""Merging into and unmerging from the base weight, in plain torch: what the op of `undo.py` does not serve.

Numerics: W + delta_1 + ... + delta_n is summed in f32 (f64 for an f64 weight) and rounded once to W's dtype; a delta
with a row scale multiplies what is there with it. Everything is computed before the first write.
"""

from __future__ import annotations

import warnings
from typing import NamedTuple

import torch

from pylora.layers.base_weight import BaseWeight
from pylora.layers.tuner_layer import BaseTunerLayer


class RowScale(NamedTuple):
    """A factor for each row of the weight.

    Attributes:
        factor: [out].
        kept_bias: The part of the bias, [out], that is not multiplied; None for all of it, where no adapter has a bias.
        lost: Indices of rows that cannot be divided by their factor again.
        lost_rows: These rows of the weight without adapters, [len(lost), in].
    """

    factor: torch.Tensor
    kept_bias: torch.Tensor | None
    lost: torch.Tensor
    lost_rows: torch.Tensor


class Delta(NamedTuple):
    """What one adapter does: add scaling * b @ a to the weight and `bias` (already scaled) to the base bias, then
    multiply weight and bias by `row_scale`.
    """

    adapter_name: str
    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    bias: torch.Tensor | None = None
    row_scale: RowScale | None = None

    def snapshot(self) -> Delta:
        """The same with factors of its own: what was merged stays known when the adapter trains or is loaded anew."""
        return self._replace(a=self.a.clone(), b=self.b.clone())


class MergedValues(NamedTuple):
    """A weight ([out, in]) and bias, to be stored; `bias` is None where no adapter changes it."""

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


def wide_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor` wide enough to sum in."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32), copy=True)


def _add_product(total: torch.Tensor, delta: Delta, sign: float) -> None:
    a = delta.a.to(device=total.device, dtype=total.dtype)
    b = delta.b.to(device=total.device, dtype=total.dtype)
    add = total.addmm_ if total.dim() == 2 else total.baddbmm_
    add(b, a, alpha=sign * float(delta.scaling))


def add_delta(total: torch.Tensor, delta: Delta) -> None:
    """Put a delta into the [out, in] weight `total`, in place."""
    _add_product(total, delta, 1.0)
    if delta.row_scale is not None:
        total.mul_(delta.row_scale.factor.to(total).unsqueeze(1))


def take_out_delta(total: torch.Tensor, delta: Delta) -> None:
    """Take the delta that was put last into the [out, in] weight `total` out again, in place."""
    if delta.row_scale is not None:
        total.div_(delta.row_scale.factor.to(total).unsqueeze(1))
    _add_product(total, delta, -1.0)


def _changed_bias(total: torch.Tensor, delta: Delta) -> torch.Tensor:
    if delta.bias is not None:
        total = total + delta.bias.to(total)
    if delta.row_scale is not None and delta.row_scale.kept_bias is not None:
        kept = delta.row_scale.kept_bias.to(total)
        total = kept + (total - kept) * delta.row_scale.factor.to(total)
    return total


def _unchanged_bias(total: torch.Tensor, delta: Delta) -> torch.Tensor:
    if delta.row_scale is not None and delta.row_scale.kept_bias is not None:
        kept = delta.row_scale.kept_bias.to(total)
        total = kept + (total - kept) / delta.row_scale.factor.to(total)
    return total if delta.bias is None else total - delta.bias.to(total)


def _wide_bias(bias: torch.Tensor | None, deltas: list[Delta]) -> torch.Tensor | None:
    """A copy of the bias to work on, None where no delta concerns it."""
    if bias is None or all(
        delta.bias is None and (delta.row_scale is None or delta.row_scale.kept_bias is None) for delta in deltas
    ):
        return None
    return wide_copy(bias.detach())


def _require_finite(tensor: torch.Tensor, adapter_name: str) -> None:
    check_finite(bool(torch.isfinite(tensor).all()), adapter_name)


def check_finite(finite: bool, adapter_name: str) -> None:
    """Raise the error of `safe_merge` unless the values are finite."""
    if not finite:
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
    total = wide_copy(weight.read())
    for delta in deltas:
        add_delta(total, delta)
        if safe_merge:
            _require_finite(total.to(weight.dtype), delta.adapter_name)
    return MergedValues(total.to(weight.dtype), changed_bias(bias, deltas, safe_merge))


@torch.no_grad()
def changed_bias(bias: torch.Tensor | None, deltas: list[Delta], safe_merge: bool) -> torch.Tensor | None:
    """The bias, wide, with all deltas put in; None where none concerns it. Errors as `merged_values`."""
    total = _wide_bias(bias, deltas)
    if total is None or bias is None:
        return None
    for delta in deltas:
        total = _changed_bias(total, delta)
        if safe_merge:
            _require_finite(total.to(bias.dtype), delta.adapter_name)
    return total


@torch.no_grad()
def unmerged_values(weight: BaseWeight | torch.Tensor, bias: torch.Tensor | None, deltas: list[Delta]) -> MergedValues:
    """The weight, [out, in], and bias as they were before the deltas, not rounded; nothing is written.

    Args:
        weight: The base weight, or its values.
        bias: The base layer's bias, if it has one.
        deltas: What a merge added, the last first.
    """
    total = wide_copy(weight if isinstance(weight, torch.Tensor) else weight.read())
    for delta in deltas:
        take_out_delta(total, delta)
    for delta in deltas:
        if delta.row_scale is not None:
            total[delta.row_scale.lost] = delta.row_scale.lost_rows.to(total)
    return MergedValues(total, unchanged_bias(bias, deltas))


@torch.no_grad()
def unchanged_bias(bias: torch.Tensor | None, deltas: list[Delta]) -> torch.Tensor | None:
    """The bias, wide, with these deltas taken out, the first one first; None where none concerns it."""
    total = _wide_bias(bias, deltas)
    if total is None:
        return None
    for delta in deltas:
        total = _unchanged_bias(total, delta)
    return total
