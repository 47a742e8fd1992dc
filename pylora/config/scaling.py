"""The factor on B·A·x."""

from __future__ import annotations

import math


def scaling_for(rank: int, alpha: float, use_rslora: bool = False) -> float:
    """alpha / rank, or alpha / sqrt(rank) for rank-stabilised LoRA (https://arxiv.org/abs/2312.03732, section 3).

    Raises:
        ValueError: `rank` is not positive.
    """
    if rank <= 0:
        raise ValueError(f"`r` should be a positive integer value but the value passed is {rank}")
    return alpha / math.sqrt(rank) if use_rslora else alpha / rank
