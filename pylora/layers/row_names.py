"""The adapters of a batch's rows, sorted once and shared by all layers of a call."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch

from pylora.ops import BatchPlan


class RowNames(list[str]):
    """One adapter name, or "__base__", for each row of a batch; a list of them, not to be changed.

    Args:
        names: The names.

    Attributes:
        rows_of: Name -> its rows, rising; names in order of first appearance.
    """

    def __init__(self, names: Iterable[str]) -> None:
        super().__init__(names)
        self.rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(self):
            self.rows_of.setdefault(name, []).append(row)
        order = [row for rows in self.rows_of.values() for row in rows]
        indptr = [0]
        for rows in self.rows_of.values():
            indptr.append(indptr[-1] + len(rows))
        self._order = torch.tensor(order, dtype=torch.int32)
        self._indptr = torch.tensor(indptr, dtype=torch.int32)
        self._plans: dict[tuple[object, ...], BatchPlan] = {}

    @classmethod
    def of(cls, names: Iterable[str]) -> RowNames:
        """`names` itself where it has been sorted already; else sorted, or as the same names were a few calls ago."""
        if isinstance(names, cls):
            return names
        return cls(names) if torch.compiler.is_compiling() else _sorted(tuple(names))

    def plan(self, served: tuple[str, ...], device: torch.device | None = None) -> BatchPlan:
        """The plan for adapters `served`, which have slots in this order; other rows have none. Kept: most layers of a
        model serve the same. With a device it is in that one's memory, where ops on a GPU read it without the host.
        """
        key = served if device is None else (served, device)
        plan = self._plans.get(key)
        if plan is None:
            slot_of = {name: slot for slot, name in enumerate(served)}
            slots = torch.tensor([slot_of.get(name, -1) for name in self.rows_of], dtype=torch.int32)
            plan = BatchPlan(self._order, self._indptr, slots)
            self._plans[key] = plan = plan if device is None else plan.to(device)
        return plan


@functools.lru_cache(maxsize=8)
def _sorted(names: tuple[str, ...]) -> RowNames:
    return RowNames(names)
