"""The row norms of W + scaling · B·A, without the product B·A."""

from __future__ import annotations

from typing import Any

import torch

from pylora.ops import dora_row_norms

_OP_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))


def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: Any) -> torch.Tensor:
    """The Euclidean norm of each row of W + scaling · B·A (`pylora.ops.dora_row_norms`), wherever the tensors are.

    Args:
        weight: W [out, in], any strides and floating dtype.
        a: A [rank, in].
        b: B [out, rank].
        scaling: A number, or a tensor with one.

    Returns:
        [out], f64, on the weight's device. No gradient flows through it. On the meta device if one of the arguments is.
    """
    weight, a, b = weight.detach(), a.detach(), b.detach()
    if weight.is_meta or a.is_meta or b.is_meta:
        return torch.empty(weight.shape[0], dtype=torch.float64, device="meta")
    if weight.dtype not in _OP_DTYPES:
        weight = weight.float()
    wide = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    if a.dtype is not b.dtype or a.dtype not in _OP_DTYPES:
        a, b = a.to(wide), b.to(wide)
    if isinstance(scaling, torch.Tensor):  # reading it would break a compiled graph, or wait for a device
        b, scaling = b.to(wide) * scaling.detach().to(device=b.device, dtype=wide), 1.0
        a = a.to(wide)
    return dora_row_norms(weight, a.to(weight.device), b.to(weight.device), float(scaling))
