"""The launchers of csrc/merge/merge.h for a GPU as functions of tensors, run in the emulator or on a GPU."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pylora.testing.cuda_segments import accumulator, planes
from pylora.testing.emulator import is_emulated

TILE_ROWS, TILE_COLUMNS = 32, 128
EMPTY, SPARSE, BITMAP, DENSE, PENDING = 0, 1, 2, 3, 255


class Adapter(NamedTuple):
    """`a` [rank, in] and `b` [out, rank], or stacks of them."""

    a: Tensor
    b: Tensor
    scaling: float = 1.0
    row_scale: Tensor | None = None


class Answers(NamedTuple):
    """DeviceAnswers."""

    used: int
    pending: int
    changed: int
    not_finite: int


class DeviceLog(NamedTuple):
    """Chunk headers and payloads as a launch leaves them."""

    chunks: Tensor
    data: Tensor

    def kinds(self) -> Tensor:
        return self.chunks.view(-1, 16)[:, 7]

    def header(self, chunk: int) -> tuple[int, int, int, int, int]:
        """Offset, kind, checksum, entries, bytes."""
        row = self.chunks.view(-1, 16)[chunk].numpy().tobytes()
        number = lambda first, last: int.from_bytes(row[first:last], "little")  # noqa: E731
        return number(0, 7), row[7], number(8, 12), number(12, 14), number(14, 16)

    def payload_bytes(self) -> int:
        return sum(self.header(i)[4] for i in range(len(self.chunks) // 16))


class MergeKernels:
    """`launches` holds what the emulator counted since it was last emptied; `answers` what the last call said."""

    def __init__(self, device: ModuleType, tensor_cores: bool = False) -> None:
        self._module, self._ops = device, device.merge
        self.tensor_cores = tensor_cores
        self.launches: list[dict[str, Any]] = []
        self.answers = Answers(0, 0, 0, 0)

    def _call(
        self,
        name: str,
        w: Tensor,
        take_out: Sequence[Adapter] = (),
        put_in: Sequence[Adapter] = (),
        read: DeviceLog | None = None,
        write: DeviceLog | None = None,
        used: int = 0,
        check: bool = False,
    ) -> None:
        fields: dict[str, Any] = {"weight": w, "tensor_cores": self.tensor_cores, "check": check}
        fields["take_out"] = [_adapter(each, w.dtype) for each in take_out]
        fields["put_in"] = [_adapter(each, w.dtype) for each in put_in]
        fields |= {name: log for name, log in (("read", read), ("write", write)) if log is not None}
        answers = torch.tensor([used, 0, 0, 0], dtype=torch.int32)
        workspace = planes(self._ops.workspace_bytes(**fields))
        try:
            getattr(self._ops, name)(**fields, answers=answers, workspace=workspace)
        finally:
            if is_emulated():
                self.launches += self._module.take_launches()
        self.answers = Answers(*answers.tolist())

    def new_log(self, w: Tensor, capacity: int | None = None) -> DeviceLog:
        """All chunks pending; by default the capacity that the op begins with."""
        if capacity is None:
            capacity = self._ops.first_log_capacity(weight=w)
        chunks = torch.full((self._ops.num_chunks(weight=w) * 16,), 255, dtype=torch.uint8)
        return DeviceLog(chunks, planes(max(capacity, 1)))

    def merge(self, w: Tensor, adapters: Sequence[Adapter], log: DeviceLog | None = None, used: int = 0) -> None:
        self._call("change", w, put_in=adapters, write=log, used=used)

    def unmerge(
        self, w: Tensor, adapters: Sequence[Adapter], log: DeviceLog | None = None, check: bool = False
    ) -> None:
        self._call("change", w, take_out=adapters, read=log, check=check)

    def swap(
        self,
        w: Tensor,
        old: Sequence[Adapter],
        old_log: DeviceLog | None,
        new: Sequence[Adapter],
        log: DeviceLog | None,
    ) -> None:
        self._call("change", w, take_out=old, put_in=new, read=old_log, write=log)

    def is_unchanged(self, w: Tensor, log: DeviceLog) -> bool:
        self._call("check_unchanged", w, read=log)
        return self.answers.changed == 0

    def is_finite(self, w: Tensor, adapters: Sequence[Adapter]) -> bool:
        self._call("is_finite", w, put_in=adapters)
        return self.answers.not_finite == 0


def _adapter(adapter: Adapter, dtype: torch.dtype) -> tuple[Tensor, Tensor, float, Tensor | None]:
    scale = None if adapter.row_scale is None else adapter.row_scale.to(accumulator(dtype))
    return adapter.a, adapter.b, adapter.scaling, scale
