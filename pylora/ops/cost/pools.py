"""What `sgmv_` and `bgmv_` cannot do without. Shapes as there; `ranks` are those of the slots that tokens use."""

from __future__ import annotations

from collections.abc import Sequence

from pylora.ops.cost import BYTES, Cost


def add(
    tokens_of_slots: Sequence[int],
    ranks: Sequence[int],
    in_features: int,
    out_features: int,
    dtype: str = "float32",
    pool_dtype: str = "float32",
) -> Cost:
    """y += scaling (x Aᵀ) B: reads x, y and the factors of the slots once, writes y.

    Args:
        tokens_of_slots: Tokens of each slot; a slot without tokens is not read.
        ranks: Rank of each slot.
        in_features: Columns of x.
        out_features: Columns of y.
        dtype: Of x and y.
        pool_dtype: Of the factors.
    """
    width = in_features + out_features
    used = [(tokens, rank) for tokens, rank in zip(tokens_of_slots, ranks, strict=True) if tokens > 0]
    tokens = sum(tokens for tokens, _ in used)
    flops = sum(2 * tokens * rank * width for tokens, rank in used)
    factors = sum(rank * width for _, rank in used)
    return Cost(flops, BYTES[dtype] * tokens * (in_features + 2 * out_features) + BYTES[pool_dtype] * factors)
