"""The row norms of W + scaling · B·A, without the product B·A."""

from __future__ import annotations

from typing import Any

import torch

# Rows of W worked on at a time hold about this many elements, so that nothing of W's size is made.
_BLOCK_ELEMENTS = 1 << 22

# Below this share of the row's ‖W‖², the sum of squares has cancelled too far and the row is computed directly.
_CANCELLED = 1e-3


def row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: Any) -> torch.Tensor:
    """The Euclidean norm of each row of W + scaling · B·A.

    By ‖W‖² + 2·scaling·rowdot(W·Aᵀ, B) + scaling²·rowdot(B·(A·Aᵀ), B), put together in f64. Rows in which B·A cancels
    W are computed element by element.

    Args:
        weight: W [out, in], any strides.
        a: A [rank, in].
        b: B [out, rank].
        scaling: A number, or a tensor with one.

    Returns:
        [out], f64. No gradient flows through it. On the meta device if one of the arguments is.
    """
    if torch.compiler.is_compiling():
        # One node of the graph: which rows cancel depends on the data, and would break it.
        as_tensor = torch.as_tensor(scaling, dtype=torch.float64)
        return _traced_row_norms(weight.detach(), a.detach(), b.detach(), as_tensor)
    return _row_norms(weight, a, b, scaling)


@torch.no_grad()
def _row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: Any) -> torch.Tensor:
    if weight.is_meta or a.is_meta or b.is_meta:
        return torch.empty(weight.shape[0], dtype=torch.float64, device="meta")
    device = weight.device
    a, b = a.to(device), b.to(device)
    with torch.autocast(device.type, enabled=False):
        wide_a, wide_b = a.double(), b.double()
        gram = wide_a @ wide_a.t()
        rows = max(1, _BLOCK_ELEMENTS // max(1, weight.shape[1]))
        squares = [
            _block_squares(weight[start : start + rows], wide_a, wide_b[start : start + rows], gram, scaling)
            for start in range(0, weight.shape[0], rows)
        ]
    return torch.cat(squares).sqrt() if squares else torch.empty(0, dtype=torch.float64, device=device)


@torch.library.custom_op("pylora::dora_row_norms", mutates_args=())
def _traced_row_norms(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    return _row_norms(weight, a, b, scaling)


@_traced_row_norms.register_fake
def _(weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: torch.Tensor) -> torch.Tensor:
    return weight.new_empty(weight.shape[0], dtype=torch.float64)


def _block_squares(
    weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, gram: torch.Tensor, scaling: Any
) -> torch.Tensor:
    """Squared norms of the rows of weight + scaling · b·a; `a`, `b` and `gram` = a·aᵀ in f64."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    own = weight.square().sum(1).double()
    cross = ((weight @ a.to(weight.dtype).t()).double() * b).sum(1)
    squares = own + 2 * scaling * cross + scaling**2 * ((b @ gram) * b).sum(1)
    cancelled = (squares < _CANCELLED * own).nonzero().flatten()
    if len(cancelled):
        squares[cancelled] = (weight[cancelled].double() + scaling * (b[cancelled] @ a)).square().sum(1)
    return squares
