"""The tensors of a pool: for each layer the factors of all slots, stacked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pylora.serving.adapter_file import LayerFactors
from pylora.serving.memory import reserve
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

    A slot's factors lie side by side, layer after layer, so that a load writes one stretch of memory. All of it is
    taken at once: pages that are first touched by a load take longer than the rest of it, and memory that the system
    does not have is better missed before there are requests.
    """

    def __init__(self, layers: Mapping[str, LayerShape], num_slots: int, max_rank: int, dtype: torch.dtype) -> None:
        self._ranks = torch.zeros(len(layers), num_slots, dtype=torch.int32)
        self._scalings = torch.zeros(len(layers), num_slots)
        self._slot_size = slot_bytes(layers, max_rank, dtype) // dtype.itemsize
        self._memory = reserve((num_slots, self._slot_size), dtype).zero_()
        self._first = self._memory.storage_offset()
        self._places: dict[str, tuple[int, int]] = {}  # of a layer's A and B in a slot
        self.layers: dict[str, LayerStack] = {}
        place = 0
        for row, (name, shape) in enumerate(layers.items()):
            a_place, b_place = place, place + max_rank * shape.in_features
            place = b_place + max_rank * shape.out_features
            self._places[name] = a_place, b_place
            self.layers[name] = LayerStack(
                self._pool(num_slots, max_rank, shape.in_features, a_place),
                self._pool(num_slots, max_rank, shape.out_features, b_place),
                self._ranks[row],
                self._scalings[row],
            )

    def _pool(self, num_slots: int, max_rank: int, width: int, place: int) -> Tensor:
        return self._memory.as_strided((num_slots, max_rank, width), (self._slot_size, width, 1), self._first + place)

    def write(self, slot: int, adapter: Mapping[str, LayerFactors]) -> int:
        """Copy an adapter into a slot that nobody reads, B transposed and both converted to the stacks' dtype.

        Returns:
            bytes of its factors in the stacks.
        """
        ranks, scalings = [0] * len(self.layers), [0.0] * len(self.layers)
        targets: list[Tensor] = []
        sources: list[Tensor] = []
        place = self._first + slot * self._slot_size
        for row, (name, (a_place, b_place)) in enumerate(self._places.items()):
            factors = adapter.get(name)
            if factors is None:
                continue
            rank, width = factors.a.shape
            outputs = factors.b.shape[0]
            # as_strided: one call where indexing and slicing are two, of hundreds in a load. B's slot is turned and not
            # the file's tensor: torch copies 1.4 times as fast that way round for 16 columns.
            targets.append(self._memory.as_strided((rank, width), (width, 1), place + a_place))
            targets.append(self._memory.as_strided((outputs, rank), (1, outputs), place + b_place))
            sources += factors[:2]
            ranks[row], scalings[row] = rank, factors.scaling
        torch._foreach_copy_(targets, sources)
        self._ranks[:, slot] = torch.tensor(ranks, dtype=torch.int32)
        self._scalings[:, slot] = torch.tensor(scalings)
        return sum(map(Tensor.numel, sources)) * self._memory.itemsize
