"""The tensors of a pool: for each layer the factors of all slots, stacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pylora.serving.adapter_file import LayerFactors
from pylora.serving.spec import LayerShape


@dataclass(frozen=True)
class LayerStack:
    """The adapters of one layer, by slot, as `pylora.ops.bgmv_` and `sgmv_` take them.

    Attributes:
        a_pool: `[num_slots, max_rank, in_features]`.
        b_pool: `[num_slots, max_rank, out_features]`.
        ranks: int32 `[num_slots]`; 0 where the slot's adapter leaves the layer alone.
        scalings: float32 `[num_slots]`.
    """

    a_pool: Tensor
    b_pool: Tensor
    ranks: Tensor
    scalings: Tensor


def slot_bytes(layers: Mapping[str, LayerShape], max_rank: int, dtype: torch.dtype) -> int:
    """Bytes that one slot takes in all stacks."""
    return sum(shape.in_features + shape.out_features for shape in layers.values()) * max_rank * dtype.itemsize


class Stacks:
    """The stacks of all layers.

    The memory is reserved and not touched: the system backs a slot's pages when they are first written.
    """

    def __init__(self, layers: Mapping[str, LayerShape], num_slots: int, max_rank: int, dtype: torch.dtype) -> None:
        self._itemsize = dtype.itemsize
        self._ranks = torch.zeros(len(layers), num_slots, dtype=torch.int32)
        self._scalings = torch.zeros(len(layers), num_slots)
        self.layers = {
            name: LayerStack(
                torch.empty(num_slots, max_rank, shape.in_features, dtype=dtype),
                torch.empty(num_slots, max_rank, shape.out_features, dtype=dtype),
                self._ranks[row],
                self._scalings[row],
            )
            for row, (name, shape) in enumerate(layers.items())
        }

    def write(self, slot: int, adapter: Mapping[str, LayerFactors]) -> int:
        """Copy an adapter into a slot that nobody reads, B transposed and both converted to the stacks' dtype.

        Returns:
            bytes of its factors in the stacks.
        """
        ranks, scalings = [0] * len(self.layers), [0.0] * len(self.layers)
        written = 0
        for row, (name, stack) in enumerate(self.layers.items()):
            factors = adapter.get(name)
            if factors is None:
                continue
            rank, width = factors.a.shape
            outputs = factors.b.shape[0]
            # as_strided: one call where indexing and slicing are two, of hundreds in a load. B's slot is turned and not
            # the file's tensor: torch's copy_ is 1.4 times as fast that way round for 16 columns.
            a, b = stack.a_pool, stack.b_pool
            a.as_strided((rank, width), (width, 1), slot * a.stride(0)).copy_(factors.a)
            b.as_strided((outputs, rank), (1, outputs), slot * b.stride(0)).copy_(factors.b)
            ranks[row], scalings[row] = rank, factors.scaling
            written += rank * (width + outputs)
        self._ranks[:, slot] = torch.tensor(ranks, dtype=torch.int32)
        self._scalings[:, slot] = torch.tensor(scalings)
        return written * self._itemsize
