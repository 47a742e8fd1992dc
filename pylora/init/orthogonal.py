"""Random A and B whose product is zero: https://datta0.github.io/posts/rethink-lora-init/#orthogonal-initialisation."""

from __future__ import annotations

import torch

from pylora.init.basic import skip_default_draws
from pylora.init.registry import Factors, register_init


@register_init("orthogonal", dense_only=True)
def orthogonal(factors: Factors) -> None:
    """A lives on the even rows of a random orthonormal basis of the rank's space, B on the odd rows: B·A = 0.

    Neither is zero, so both have a gradient from the first step on.

    Raises:
        ValueError: the rank is odd.
    """
    rank, in_features = factors.a.shape
    out_features = factors.b.shape[0]
    if rank % 2:
        raise ValueError(f"Orthogonal initialization requires the LoRA rank to be even, got {rank} instead.")
    skip_default_draws(factors)
    basis, _ = torch.linalg.qr(torch.randn(rank, rank, device="cpu", dtype=torch.float32))
    a = torch.randn(in_features, rank // 2, device="cpu", dtype=torch.float32).mm(basis[0::2]).t() / 10.0
    b = torch.randn(rank // 2, out_features, device="cpu", dtype=torch.float32).t().mm(basis[1::2]) / 10.0
    factors.a.copy_(a)
    factors.b.copy_(b)
