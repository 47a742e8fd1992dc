"""What `sgmv` and `bgmv` share in Python: pools given singly or as slices of one product."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Pool = Tensor | Sequence[Tensor]


def as_slices(pool: Pool) -> list[Tensor]:
    """One pool as a list of one, several as a list."""
    return [pool] if isinstance(pool, Tensor) else list(pool)


def is_out_first(op: str, b_layout: str) -> bool:
    """Whether B is kept `[num_slots, out, rank]`.

    Raises:
        ValueError: The layout has another name than "rank_out" and "out_rank".
    """
    if b_layout not in ("rank_out", "out_rank"):
        raise ValueError(f"{op}: b_layout: expected 'rank_out' or 'out_rank', got {b_layout!r}")
    return b_layout == "out_rank"


def shrink_result(v: Tensor, a_pool: Pool) -> Tensor:
    """v without the dimension of slices, where there is one pool."""
    return v[0] if isinstance(a_pool, Tensor) else v


def expand_input(v: Tensor, b_pool: Pool) -> Tensor:
    """v with the dimension of slices."""
    return v[None] if isinstance(b_pool, Tensor) else v


def fake_v(x: Tensor, a_pool: list[Tensor]) -> Tensor:
    """A tensor like v, for tracing."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((len(a_pool), x.shape[0], a_pool[0].shape[1]), dtype=dtype)
