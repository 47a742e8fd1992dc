"""A layer's slots as the kernels take them, and the ranks they really have: vLLM pads every adapter to the largest."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.serving.memory import reserve


class LayerSlots:
    """The stacked factors of a layer.

    A slot's rank is counted when the slot is first used after something was written to the factors: from A's last row
    back to the first that is not zero, so that one row is read of an adapter that fills its slot.

    Args:
        a_stacked: of each slice `[num_slots, 1, max_rank, in_features]`; empty where only B is wanted.
        b_stacked: of each slice `[num_slots, 1, out_features, max_rank]`; empty where only A is wanted.

    Attributes:
        a_pool, b_pool: the same without the dimension of size 1.
        out_features: of all slices together.
        full_ranks: int32 `[num_slots]`, max_rank everywhere.
    """

    def __init__(self, a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor]) -> None:
        self._given = (a_stacked, b_stacked)
        self._stacked = (*a_stacked, *b_stacked)
        # Inference tensors count no writes, and a compiled graph serves what is written later.
        self._counts_ranks = not torch.compiler.is_compiling() and not self._stacked[0].is_inference()
        if not torch.compiler.is_compiling():
            for each in a_stacked:
                _move(each, each.shape)
            for each in b_stacked:
                _move(each, (*each.shape[:2], each.shape[3], each.shape[2]))
        self.a_pool = [each.squeeze(1) for each in a_stacked]
        self.b_pool = [each.squeeze(1) for each in b_stacked]
        self.out_features = sum(each.shape[1] for each in self.b_pool)
        self._max_rank = self.a_pool[0].shape[1] if self.a_pool else self.b_pool[0].shape[2]
        self._num_slots = self._stacked[0].shape[0]
        self.full_ranks = torch.full((self._num_slots,), self._max_rank, dtype=torch.int32)
        self._counted = self.a_pool or [pool.transpose(1, 2) for pool in self.b_pool]  # [num_slots, max_rank, width]
        self._scalings: dict[float, Tensor] = {}
        self._ranks = self.full_ranks.clone()
        self._known: set[int] = set()
        self._seen_writes = -1
        self._seen_slots: Sequence[int] = ()

    def is_of(self, a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor]) -> bool:
        """Whether this is made of these tensors."""
        a, b = self._given
        if a is a_stacked and b is b_stacked and type(a) is type(b) is tuple:  # as vLLM's layers keep them
            return True
        given = (*a_stacked, *b_stacked)
        return len(given) == len(self._stacked) and all(map(_is, given, self._stacked))

    def scalings(self, scale: float) -> Tensor:
        """float32 `[num_slots]`, all `scale`: vLLM has multiplied each adapter's own into B."""
        scalings = self._scalings.get(scale)
        if scalings is None:
            scalings = self._scalings[scale] = torch.full((self._num_slots,), scale)
        return scalings

    def ranks(self, used: Sequence[int]) -> Tensor:
        """The ranks of the slots in `used`; of others they may be out of date.

        Args:
            used: slots; the same object as long as they are the same.

        Returns:
            int32 `[num_slots]`, valid until the next call. Where slices differ, the largest of theirs.
        """
        if not self._counts_ranks:
            return self.full_ranks
        writes = 0
        for each in self._counted:
            writes += each._version
        if writes == self._seen_writes and used is self._seen_slots:
            return self._ranks
        if writes != self._seen_writes:
            self._known.clear()
        for slot in used:
            if slot not in self._known:
                self._ranks[slot] = max(self._count(each[slot]) for each in self._counted)
                self._known.add(slot)
        self._seen_writes, self._seen_slots = writes, used
        return self._ranks

    def _count(self, factor: Tensor) -> int:
        """The rank of one slot, of [max_rank, width]."""
        if factor[-1].any():
            return self._max_rank
        rows = factor.any(1).nonzero()
        return int(rows[-1]) + 1 if len(rows) else 0


@torch.inference_mode(False)
def _move(stacked: Tensor, laid_out: Sequence[int]) -> None:
    """Give a tensor other memory, in which its last two dimensions may be exchanged; shape and values stay.

    What vLLM writes through the tensor goes there from now on. The kernels read a B of rows [rank, out] 1.7 times as
    fast as one of rows [out, rank].
    """
    if stacked.is_inference() or not stacked.is_contiguous():
        return
    memory = reserve(tuple(laid_out), stacked.dtype)
    moved = memory if memory.shape == stacked.shape else memory.transpose(2, 3)
    moved.copy_(stacked)
    stacked.set_(moved)  # type: ignore[call-overload]


def _is(a: Tensor, b: Tensor) -> bool:
    return a is b
