"""The Lanczos ops as their definitions, in f64."""

import torch
from torch import Tensor


def bidiagonal(diagonal: Tensor, above: Tensor) -> Tensor:
    """B [steps, steps]; the last element of `above` is left out."""
    return torch.diag(diagonal.double()) + torch.diag(above.double()[:-1], 1)


def bidiagonalise(matrix: Tensor, start: Tensor, steps: int) -> tuple[Tensor, Tensor, Tensor]:
    """V [steps, columns], B's diagonal and what is above it [steps], from the unit vector `start`, without restarts."""
    matrix = matrix.double()
    vectors = [start.double()]
    diagonal: list[Tensor] = []
    above: list[Tensor] = []
    left = matrix.new_zeros(matrix.shape[0])
    for _ in range(steps):
        left = matrix @ vectors[-1] - (above[-1] * left if above else 0)
        diagonal.append(left.norm())
        left = left / diagonal[-1]
        right = matrix.T @ left
        for _ in range(2):
            for vector in vectors:
                right = right - (vector @ right) * vector
        above.append(right.norm())
        vectors.append(right / above[-1])
    return torch.stack(vectors[:-1]), torch.stack(diagonal), torch.stack(above)


def gram_product(matrix: Tensor, x: Tensor) -> Tensor:
    """Wᵀ(W X)."""
    return matrix.double().T @ (matrix.double() @ x.double())


def ritz_residuals(diagonal: Tensor, above: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Singular values of B, and |above[-1] · u[-1]| for their left vectors u."""
    u, s, _ = torch.linalg.svd(bidiagonal(diagonal, above))
    return s[:rank], (above[-1].double() * u[-1, :rank]).abs()
