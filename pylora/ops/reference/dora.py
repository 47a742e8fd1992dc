"""The dora ops as their definitions (csrc/dora/dora.h), in f64 and differentiable by autograd."""

import torch
from torch import Tensor

from pylora.ops.reference.lora import lora_dropout


def dora_row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The Euclidean norm of each row of weight + scaling * b a, f64; 0 for rows without elements."""
    return (weight.double() + scaling * (b.double() @ a.double())).square().sum(1).sqrt()


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """magnitude / norms * (drop(x) weight^T + scaling * drop(x) a^T b^T) + (x - drop(x)) weight^T + bias, f64.

    The norms are rounded to magnitude's dtype first, and are 1 where they are 0.
    """
    norms = norms.to(magnitude.dtype).double()
    factor = magnitude.double() / torch.where(norms == 0, 1.0, norms)
    dropped = lora_dropout(x, dropout_p, rng)
    z = dropped @ weight.double().T + scaling * (dropped @ a.double().T @ b.double().T)
    y = factor * z + (x.double() - dropped) @ weight.double().T
    return y if bias is None else y + bias.double()
