"""The launchers of csrc/cuda/segments.h as functions of tensors, run in the emulator or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylora.testing.emulator import is_emulated

ITEM_ROWS = 64


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


class Rows(NamedTuple):
    """Which row belongs to which slot: what the kernels take for a plan."""

    fields: dict[str, Any]
    num_rows: int
    max_items: int


def planes(num_bytes: int) -> Tensor:
    """Memory full of NaN."""
    return torch.full((num_bytes,), 0xFF, dtype=torch.uint8)


def shifted(t: Tensor, offset: int) -> Tensor:
    """The same matrix with rows that begin `offset` elements late, and as many foreign elements between them."""
    if offset == 0:
        return t.clone()
    wide = torch.full((t.shape[0], t.shape[1] + offset), torch.nan, dtype=t.dtype)
    wide[:, offset:] = t
    return wide[:, offset:]


class SegmentKernels:
    """`launches` holds what the emulator counted in each launch since it was last emptied: bytes, sectors, mma."""

    def __init__(self, device: ModuleType) -> None:
        self._module = device
        self._ops = device.segments
        self.launches: list[dict[str, Any]] = []

    def _call(self, name: str, **fields: Any) -> None:
        try:
            getattr(self._ops, name)(**fields)
        finally:
            if is_emulated():
                self.launches += self._module.take_launches()

    def _plan(self, name: str, num_runs: int, item_rows: int, **fields: Any) -> dict[str, Any]:
        max_items = self._ops.max_items(fields["num_rows"], num_runs, item_rows)
        items = torch.full((max_items, 4), -9, dtype=torch.int32)
        num_items = torch.full((1,), -9, dtype=torch.int32)
        made = {"items": items, "num_items": num_items}
        self._call(name, **fields, **made, item_rows=item_rows, max_items=max_items)
        return made

    def plan(self, row_slots: Tensor, item_rows: int = ITEM_ROWS) -> Rows:
        """Rows sorted by slot, as a plan that the device builds from segments."""
        slots, order = torch.sort(row_slots, stable=True)
        runs, counts = torch.unique_consecutive(slots, return_counts=True)
        indptr = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).to(torch.int32)
        made = self.segments(indptr, runs.to(torch.int32), len(row_slots), item_rows=item_rows)
        return made._replace(fields={**made.fields, "order": order.to(torch.int32)})

    def segments(
        self,
        indptr: Tensor,
        slots: Tensor,
        num_rows: int,
        num_slots: int = 1 << 20,
        order: Tensor | None = None,
        tokens_per_row: int = 1,
        item_rows: int = ITEM_ROWS,
    ) -> Rows:
        """A plan from segments of neighbouring rows, or of sequences of `tokens_per_row` rows in an order."""
        rows = torch.full((num_rows,), -9, dtype=torch.int32) if tokens_per_row > 1 and order is not None else None
        made = self._plan(
            "plan_segments",
            len(slots),
            item_rows,
            indptr=indptr,
            slots=slots,
            num_rows=num_rows,
            num_segments=len(slots),
            num_slots=num_slots,
            order=order,
            tokens_per_row=tokens_per_row,
            rows=rows,
        )
        return Rows({**made, "order": order if rows is None else rows}, num_rows, len(made["items"]))

    def grouped(self, row_slots: Tensor, num_slots: int, item_rows: int = ITEM_ROWS) -> Rows:
        """A plan that the device sorts from a slot for each row."""
        num_rows = len(row_slots)
        rows = torch.full((num_rows,), -9, dtype=torch.int32)
        starts = torch.full((num_slots,), -9, dtype=torch.int32)
        made = self._plan(
            "group_rows",
            num_slots,
            item_rows,
            slots=row_slots,
            num_rows=num_rows,
            num_slots=num_slots,
            rows=rows,
            starts=starts,
        )
        return Rows({**made, "order": rows}, num_rows, len(made["items"]))

    def one_slot(self, num_rows: int) -> Rows:
        """All rows are slot 0's."""
        return Rows({}, num_rows, -(-num_rows // ITEM_ROWS))

    def _common(
        self, rows: Rows, dtype: torch.dtype, factors: Sequence[Tensor], slots: dict[str, Any]
    ) -> dict[str, Any]:
        return {
            **rows.fields,
            **slots,
            "max_items": rows.max_items,
            "num_rows": rows.num_rows,
            "max_rank": factors[0].shape[1],
            "dtype": dtype,
            "factor_dtype": factors[0].dtype,
        }

    def shrink(
        self,
        rows: Rows,
        x: Tensor,
        factors: Sequence[Tensor],
        num_splits: int | None = None,
        scaled: bool = False,
        dropout: tuple[float, Tensor] | None = None,
        **slots: Any,
    ) -> Tensor:
        """v `[slices, rows, max_rank]`, NaN where nothing was written. factors: `[slots, max_rank, width]` each."""
        max_rank, n = factors[0].shape[1], len(factors)
        v = torch.full((n, rows.num_rows, max_rank), torch.nan, dtype=accumulator(x.dtype))
        width = x.shape[1]
        if num_splits is None:
            num_splits = self._ops.shrink_splits(rows.max_items, max_rank, n, width)
        is_wide = x.dtype == torch.float64
        num_counters, plane_bytes = self._ops.shrink_workspace(rows.max_items, max_rank, n, num_splits, is_wide)
        counters = torch.zeros(num_counters, dtype=torch.int32)
        common = self._common(rows, x.dtype, factors, slots)
        more = {} if dropout is None else {"dropout": dropout}
        self._call(
            "shrink",
            **common,
            **more,
            x=x,
            width=width,
            factors=list(factors),
            v=v,
            scaled=scaled,
            num_splits=num_splits,
            counters=counters,
            planes=planes(plane_bytes),
        )
        assert not counters.any(), "shrink: counters are not zero after the launch"
        return v

    def expand(
        self,
        rows: Rows,
        y: Tensor,
        v: Tensor,
        factors: Sequence[Tensor],
        dropout: tuple[float, Tensor] | None = None,
        **slots: Any,
    ) -> None:
        """Adds to y; the slices' columns side by side."""
        widths = [factor.shape[2] for factor in factors]
        more = {} if dropout is None else {"dropout": dropout}
        self._call(
            "expand",
            **self._common(rows, y.dtype, factors, slots),
            **more,
            y=y,
            v=v,
            factors=list(factors),
            widths=widths,
            columns=[sum(widths[:i]) for i in range(len(widths))],
        )

    def decode(
        self, y: Tensor, x: Tensor, a: Sequence[Tensor], b: Sequence[Tensor], row_slots: Tensor | None, **slots: Any
    ) -> Tensor:
        """Adds to y; returns v. row_slots: a slot a row, or None: all rows are slot 0's."""
        num_rows, width, max_rank, n = x.shape[0], x.shape[1], a[0].shape[1], len(a)
        groups = num_rows if row_slots is not None else -(-num_rows // 8)
        v = torch.full((n, num_rows, max_rank), torch.nan)
        counters = torch.zeros(2 + groups, dtype=torch.int32)
        widths = [factor.shape[2] for factor in b]
        self._call(
            "decode",
            **slots,
            row_slots=row_slots,
            max_items=groups,
            num_rows=num_rows,
            max_rank=max_rank,
            dtype=x.dtype,
            x=x,
            width=width,
            a=list(a),
            b=list(b),
            widths=widths,
            columns=[sum(widths[:i]) for i in range(n)],
            y=y,
            v=v,
            counters=counters,
            planes=planes(self._ops.decode_plane_bytes(groups, max_rank, n, width)),
        )
        assert not counters.any(), "decode: counters are not zero after the launch"
        return v

    def outer(
        self,
        rows: Rows,
        g: Tensor,
        x: Tensor,
        num_slots: int,
        out_dtype: torch.dtype,
        num_splits: int = 0,
        out_first: bool = False,
        dropout: tuple[float, Tensor] | None = None,
        **slots: Any,
    ) -> Tensor:
        """d `[slots, max_rank, width]`, NaN where nothing was written. num_splits 0: what outer_splits says."""
        max_rank, width = g.shape[1], x.shape[1]
        shape = (num_slots, width, max_rank) if out_first else (num_slots, max_rank, width)
        out = torch.full(shape, torch.nan, dtype=out_dtype)
        if out_first:
            out = out.transpose(1, 2)
        is_half, is_wide = x.dtype.itemsize == 2, x.dtype == torch.float64
        splits, num_counters, plane_bytes = self._ops.outer_workspace(
            num_slots, max_rank, width, rows.max_items, is_half, is_wide, num_splits
        )
        counters = torch.zeros(num_counters, dtype=torch.int32)
        more = {} if dropout is None else {"dropout": dropout}
        self._call(
            "outer",
            **rows.fields,
            **slots,
            **more,
            max_items=rows.max_items,
            num_rows=rows.num_rows,
            max_rank=max_rank,
            num_slots=num_slots,
            dtype=x.dtype,
            g=g[None],
            x=x,
            width=width,
            out_dtype=out_dtype,
            out=out,
            num_splits=splits,
            counters=counters,
            planes=planes(plane_bytes),
        )
        assert not counters.any(), "outer: counters are not zero after the launch"
        return out
