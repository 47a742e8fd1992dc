"""sgmv and bgmv as their definitions (csrc/cpu/segments.h), in f64 and differentiable by autograd. B is [slots, rank,
out].
"""

import torch
from torch import Tensor


def bgmv(
    y: Tensor, x: Tensor, a_pool: Tensor, b_pool: Tensor, ranks: Tensor, scalings: Tensor, token_slots: Tensor
) -> Tensor:
    """y with each token's low-rank product added, f64."""
    rows = []
    for row, token, slot in zip(y.double(), x.double(), token_slots.tolist(), strict=True):
        if slot >= 0:
            rank = ranks[slot]
            v = a_pool[slot, :rank].double() @ token
            row = row + scalings[slot].double() * (v @ b_pool[slot, :rank].double())
        rows.append(row)
    return torch.stack(rows) if rows else y.double()


def sgmv(
    y: Tensor,
    x: Tensor,
    a_pool: Tensor,
    b_pool: Tensor,
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
) -> Tensor:
    """As `bgmv`, with the slot of each segment."""
    token_slots = torch.repeat_interleave(segment_slots, segment_indptr.diff().long())
    return bgmv(y, x, a_pool, b_pool, ranks, scalings, token_slots)
