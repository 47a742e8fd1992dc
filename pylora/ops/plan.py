"""Which rows of a batch use which adapter, sorted once and shared by all layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class BatchPlan(NamedTuple):
    """The rows of a batch, sorted by slot into segments. Make one with `from_slots`, once a batch.

    Attributes:
        order: int32 `[num_rows]`, the rows segment by segment; within one in the batch's order.
        segment_indptr: int32 `[num_segments + 1]`, where each segment starts in `order`.
        segment_slots: int32 `[num_segments]`, the slots, rising; -1 (no adapter) comes first.
    """

    order: Tensor
    segment_indptr: Tensor
    segment_slots: Tensor

    @staticmethod
    def from_slots(token_slots: Tensor | Sequence[int]) -> BatchPlan:
        """Sort rows by slot.

        Args:
            token_slots: `[num_rows]`, integers from -1 on: the slot of each row, or of each sequence where rows are
                sequences. -1: no adapter.

        Raises:
            ValueError: A slot is below -1, or there is more than one dimension.
            TypeError: The slots are no integers.
        """
        if isinstance(token_slots, Tensor):
            if token_slots.dim() != 1:
                raise ValueError(
                    f"BatchPlan: token_slots: expected one dimension, got shape {tuple(token_slots.shape)}"
                )
            if token_slots.is_floating_point() or token_slots.is_complex() or token_slots.dtype == torch.bool:
                raise TypeError(f"BatchPlan: token_slots: expected integers, got {token_slots.dtype}")
            token_slots = token_slots.tolist()
        rows_of: dict[int, list[int]] = {}
        for row, slot in enumerate(token_slots):
            rows_of.setdefault(slot, []).append(row)
        slots = sorted(rows_of)
        if slots and slots[0] < -1:
            raise ValueError(f"BatchPlan: token_slots: expected slots from -1 on, got {slots[0]}")
        order: list[int] = []
        indptr = [0]
        for slot in slots:
            order += rows_of[slot]
            indptr.append(len(order))
        return BatchPlan(_int32(order), _int32(indptr), _int32(slots))

    def to(self, device: torch.device | str) -> BatchPlan:
        """The plan in a device's memory, where the ops on CUDA read it without the host: for CUDA graphs.

        A captured call reads these very tensors. For another batch of as many rows, copy its plan into them; it may
        have fewer segments if the last entries of `segment_indptr` are the number of rows and those slots -1.
        """
        return BatchPlan(*(t.to(device) for t in self))

    @property
    def num_rows(self) -> int:
        """Rows of the batch."""
        return self.order.shape[0]


def _int32(values: list[int]) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)
