"""OLoRA: A and B come from the base weight's QR decomposition. Büyükakyüz, https://arxiv.org/abs/2406.01775."""

from __future__ import annotations

import torch

from pylora.init.base_update import BaseUpdate, WithoutProduct
from pylora.init.basic import skip_default_draws
from pylora.init.registry import Factors, register_init
from pylora.init.weight_access import fill, read_base


@register_init("olora", dense_only=True, changes_base=True)
def olora(factors: Factors) -> BaseUpdate:
    """B is Q[:, :rank] and A is R[:rank] of W = Q·R; the base weight loses scaling · B·A.

    Q's first columns depend on W's first columns alone, and R[:rank] is Q[:, :rank]ᵀ·W: a decomposition of a narrow
    matrix and one product, where the whole decomposition costs min(in, out) / rank times as much. Signs are the same.

    Raises:
        TypeError: the base weight is neither f32, f16 nor bf16.
    """
    readable = (torch.float32, torch.float16, torch.bfloat16)
    weight = read_base(factors, readable, f"Unsupported data type for the base layer. Got {_dtype(factors)}.")
    skip_default_draws(factors)
    rank = factors.a.shape[0]
    b, r = torch.linalg.qr(weight[:, :rank])
    a = b.t() @ weight
    # What Qᵀ·W rounds to there is known better: R's triangle, with exact zeros below.
    a[:, :rank] = r
    fill(factors, a, b)
    return WithoutProduct(a, b, factors.scaling)


def _dtype(factors: Factors) -> torch.dtype | None:
    return None if factors.base is None else factors.base.stored.dtype
