"""Selection by magnitude as its definition."""

import torch
from torch import Tensor


def keep_largest(x: Tensor, count: int) -> Tensor:
    """Zeros, but for the `count` numbers of x that torch.topk finds by magnitude."""
    flat = x.reshape(-1)
    out = torch.zeros_like(flat)
    kept = flat.abs().topk(count).indices
    out[kept] = flat[kept]
    return out.view(x.shape)
