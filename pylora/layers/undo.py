"""What a layer keeps of a merge so that it can be taken back: factors, and the undo log where the kernels made one.

The kernels serve plain weights on the CPU and on GPUs that the build has code for. Others (on other devices, of other
types or layouts) are merged in torch, without a log, and unmerged by subtraction.
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pylora.errors import PeftWarning
from pylora.layers.base_weight import BaseWeight
from pylora.layers.merging import (
    Delta,
    changed_bias,
    check_finite,
    merged_values,
    unchanged_bias,
    unmerged_values,
)
from pylora.layers.served import OP_DTYPES, are_plain
from pylora.layers.walk import tuner_layers
from pylora.ops import kernels_serve, merge_, merge_is_finite, unmerge_

_order = itertools.count()
_for_good: ContextVar[bool] = ContextVar("pylora_merge_for_good", default=False)


@contextmanager
def for_good() -> Iterator[None]:
    """Merges in this block are never undone: nothing is kept for it."""
    token = _for_good.set(True)
    try:
        yield
    finally:
        _for_good.reset(token)


@dataclass(eq=False)
class MergeRecord:
    """One merge.

    Attributes:
        deltas: What it added, in order, with factors of its own.
        dtype: The weight's dtype then.
        log: The undo log, uint8, on the device that merged, wherever the weight moves; None where there is none.
        bias: The bias before and after; None where it was not changed.
        order: Later merges have larger numbers.
    """

    deltas: list[Delta]
    dtype: torch.dtype
    log: torch.Tensor | None
    bias: tuple[torch.Tensor, torch.Tensor] | None
    order: int = field(default_factory=lambda: next(_order))

    def log_bytes(self) -> int:
        """Bytes of the undo log."""
        return 0 if self.log is None else self.log.numel()


def merge_log_bytes(model: nn.Module) -> int:
    """Bytes that the undo logs of all merged layers take, on top of copies of the merged adapters' factors.

    Args:
        model: A model with adapters, or any part of one.

    Returns:
        0 where nothing is merged, or where merges are undone by subtraction (weights that the kernels do not serve).
    """
    return sum(record.log_bytes() for layer in tuner_layers(model) for record in getattr(layer, "_merge_records", ()))


def _is_plain(tensor: Any) -> bool:
    return are_plain(tensor) and tensor.dtype in OP_DTYPES and kernels_serve(tensor.device)


def _has_rows(matrix: torch.Tensor) -> bool:
    """Whether the kernels can go through the matrix (or the stack of them) as it is stored."""
    rows, columns = matrix.shape[-2:]
    row_stride, column_stride = matrix.stride()[-2:]
    if column_stride != 1 and columns > 1:
        rows, columns, row_stride, column_stride = columns, rows, column_stride, row_stride
    if column_stride != 1 and columns > 1:
        return False
    return (rows <= 1 or row_stride >= columns) and (matrix.dim() == 2 or len(matrix) <= 1 or matrix.stride(0) != 0)


def _kernel_matrix(weight: BaseWeight) -> torch.Tensor | None:
    """W as [out, in] (or a stack) where it is stored, if the kernels can go through it."""
    matrix = weight.storage()
    return matrix if matrix is not None and _is_plain(matrix) and _has_rows(matrix) else None


def _kernel_args(
    deltas: list[Delta], device: torch.device
) -> tuple[list[Any], list[Any], list[float], list[Any] | None] | None:
    """The deltas as the op takes them for a weight on the device, None where it cannot."""
    tensors = [t for delta in deltas for t in (delta.a, delta.b)]
    scales = [None if delta.row_scale is None else delta.row_scale.factor for delta in deltas]
    given = [*tensors, *(scale for scale in scales if scale is not None)]
    if not all(_is_plain(t) and t.device == device for t in given):
        return None
    if any(delta.a.dtype != delta.b.dtype for delta in deltas):
        return None
    scalings = [float(delta.scaling) for delta in deltas]
    return (
        [d.a for d in deltas],
        [d.b for d in deltas],
        scalings,
        scales if any(s is not None for s in scales) else None,
    )


def _check_finite_weight(
    matrix: torch.Tensor, deltas: list[Delta], a: list[Any], b: list[Any], scalings: list[float], scales: Any
) -> None:
    for i, delta in enumerate(deltas, 1):
        check_finite(merge_is_finite(matrix, a[:i], b[:i], scalings[:i], scales and scales[:i]), delta.adapter_name)


@torch.no_grad()
def check_merge_into_base(weight: BaseWeight, bias: torch.Tensor | None, deltas: list[Delta]) -> None:
    """Raise what `merge_into_base` with `safe_merge` would raise; nothing is written."""
    matrix = _kernel_matrix(weight)
    args = None if matrix is None else _kernel_args(deltas, matrix.device)
    if matrix is None or args is None:
        merged_values(weight, bias, deltas, safe_merge=True)
        return
    _check_finite_weight(matrix, deltas, *args)
    changed_bias(bias, deltas, safe_merge=True)


@torch.no_grad()
def merge_into_base(
    weight: BaseWeight, bias: torch.Tensor | None, deltas: list[Delta], safe_merge: bool
) -> MergeRecord | None:
    """Add the deltas to the base weight and bias; see `merged_values` for numerics and errors.

    Returns:
        What `unmerge_from_base` needs, None inside `for_good`.
    """
    matrix = _kernel_matrix(weight)
    args = None if matrix is None else _kernel_args(deltas, matrix.device)
    log = None
    keep = not _for_good.get()
    if matrix is None or args is None:
        values = merged_values(weight, bias, deltas, safe_merge)
        weight.write(values.weight)
        new_bias = values.bias
    else:
        a, b, scalings, scales = args
        if safe_merge:
            _check_finite_weight(matrix, deltas, a, b, scalings, scales)
        new_bias = changed_bias(bias, deltas, safe_merge)
        log = merge_(matrix, a, b, scalings, scales, log=keep)
    biases = None
    if new_bias is not None and bias is not None:
        before = bias.detach().clone()
        bias.copy_(new_bias)
        biases = before, bias.detach().clone()
    if not keep:
        return None
    return MergeRecord([delta.snapshot() for delta in deltas], weight.dtype, log, biases)


def _unmerge_matrix(matrix: torch.Tensor, record: MergeRecord) -> bool:
    """Take a merge out of W, [out, in], by its log; False, and nothing is changed, where that is impossible."""
    if record.log is None or record.dtype != matrix.dtype:
        return False
    args = _kernel_args(record.deltas, record.log.device)
    if args is None:
        return False
    there = matrix.to(record.log.device)  # the log is of the values, wherever they have moved since
    if not (_is_plain(there) and _has_rows(there)):
        return False
    try:
        unmerge_(there, *args, log=record.log)
    except ValueError as error:
        raise ValueError(
            "unmerge: base weight: expected the values that the merge left, got others: it was changed after the "
            "merge. Nothing has been changed now. `drop_merge_log()` of the layer makes `unmerge` subtract the "
            "adapters instead."
        ) from error
    if there is not matrix:
        matrix.copy_(there)
    return True


@torch.no_grad()
def unmerge_from_base(weight: BaseWeight, bias: torch.Tensor | None, record: MergeRecord) -> None:
    """Take out what the last `merge_into_base` added: bit for bit by its log, else up to one rounding.

    Raises:
        ValueError: The weight is not as the merge left it. Nothing is changed then.
    """
    if record.log is not None and record.dtype != weight.dtype:
        warnings.warn(
            f"The base weight is {weight.dtype} and was {record.dtype} when adapters were merged: they are subtracted, "
            "which need not give the weight from before the merge bit for bit.",
            PeftWarning,
            stacklevel=4,
        )
    matrix = weight.storage()
    exact = matrix is not None and _unmerge_matrix(matrix, record)
    if not exact:
        values = unmerged_values(weight, None, record.deltas[::-1])
        weight.write(values.weight)
    if bias is not None and record.bias is not None:
        bias.copy_(_unmerged_bias(bias, record))


def _unmerged_bias(bias: torch.Tensor, record: MergeRecord) -> torch.Tensor:
    before, after = (None, None) if record.bias is None else record.bias
    if before is None or after is None:
        return bias
    if before.dtype == bias.dtype and torch.equal(after.to(bias.device), bias.detach()):
        return before.to(bias.device)
    # A bias may train while adapters are merged: what it learned stays.
    total = unchanged_bias(bias, record.deltas[::-1])
    return bias if total is None else total


@torch.no_grad()
def without(
    weight: BaseWeight, bias: torch.Tensor | None, records: list[MergeRecord]
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The weight, [out, in], and bias without these merges, the last one first; nothing is written."""
    matrix = weight.read().clone()
    for record in records:
        if bias is not None:
            bias = _unmerged_bias(bias, record)
        if not _unmerge_matrix(matrix, record):
            matrix = unmerged_values(matrix, None, record.deltas[::-1]).weight
    return matrix, bias


@contextmanager
def all_or_nothing(layers: Sequence[Any]) -> Iterator[None]:
    """Merges and unmerges of a model's tuner layers in this block: if it raises, every weight is as it was before.

    Bit for bit where the kernels serve, since merging the same factors again gives the same values; elsewhere up to one
    rounding.
    """
    before = [(layer, list(getattr(layer, "_merge_records", ())), list(layer.merged_adapters)) for layer in layers]
    try:
        yield
    except BaseException:
        _restore(before)
        raise


def _restore(before: list[tuple[Any, list[MergeRecord], list[str]]]) -> None:
    """Take out what has been merged since `before`, and merge again what has been taken out; the last merge first."""
    with_records = [(layer, records) for layer, records, _ in before if hasattr(layer, "_merge_records")]
    added = [
        (record, layer) for layer, records in with_records for record in layer._merge_records if record not in records
    ]
    for record, layer in sorted(added, key=lambda merge: merge[0].order, reverse=True):
        unmerge_from_base(layer._base_weight(), layer._base_bias(), record)
    lost = [
        (record, layer) for layer, records in with_records for record in records if record not in layer._merge_records
    ]
    again: dict[MergeRecord, MergeRecord] = {}
    for record, layer in sorted(lost, key=lambda merge: merge[0].order):
        new = merge_into_base(layer._base_weight(), layer._base_bias(), record.deltas, safe_merge=False)
        assert new is not None
        if record.log is None:  # it had been dropped
            new.log = None
        again[record] = new
    for layer, records in with_records:
        layer._merge_records[:] = [again.get(record, record) for record in records]
    for layer, _, names in before:
        if hasattr(layer, "_merge_records"):
            layer.merged_adapters[:] = names
        elif layer.merged_adapters != names:
            layer.restore_merged(names)
