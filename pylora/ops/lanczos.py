"""Golub-Kahan-Lanczos bidiagonalisation of a large matrix, the accuracy of what it has found, and products with WᵀW.

Maths and numerics: csrc/lanczos/README.md and lanczos.h. Definition: reference/lanczos.py.
"""

import torch
from torch import Tensor

from pylora._native import C


def bidiagonalise_(
    matrix: Tensor,
    basis: Tensor,
    left: Tensor,
    diagonal: Tensor,
    above: Tensor,
    locked: int,
    begin: int,
    end: int,
    seed: int = 0,
) -> None:
    """Steps [begin, end) of W V = U B with orthonormal V [columns, steps] and an upper bidiagonal B. CPU only.

    Each step reads W once. V is orthogonalised against all earlier vectors (Simon and Zha,
    https://doi.org/10.1137/S1064827597327309); where it spans an invariant space it goes on with a random vector, which
    comes from `seed` and not from torch's generator. A value that is not finite ends the iteration: `diagonal` and
    `above` are NaN from there on.

    Args:
        matrix: W, [rows, columns], float32 or float64, column stride 1.
        basis: [more than locked + end, columns], W's dtype, contiguous; rows 0 to `locked` are orthonormal vectors that
            V is kept orthogonal to, row locked + j becomes v_j. Written.
        left: [rows], W's dtype: the last left vector, to be kept between calls. Written.
        diagonal: [at least end], float64: B[j, j]. Written.
        above: [at least end], float64: B[j, j + 1], 0 where V started anew. Written.
        locked: Number of locked vectors.
        begin: Steps that are done already; 0 starts.
        end: Steps after the call.
        seed: Of the start vector.

    Raises:
        ValueError: a shape or stride does not fit; the message names the argument and both values.
        TypeError: a dtype does not fit.
    """
    if torch.compiler.is_compiling():
        torch.ops.pylora.bidiagonalise_(matrix, basis, left, diagonal, above, locked, begin, end, seed)
    else:
        C.bidiagonalise_(matrix, basis, left, diagonal, above, locked, begin, end, seed)


def gram_product(matrix: Tensor, x: Tensor) -> Tensor:
    """Wᵀ(W X) for a narrow X, reading W once. Without derivatives.

    Args:
        matrix: W, [rows, columns], float32 or float64, column stride 1.
        x: X, [columns, width], W's dtype, any strides.

    Returns:
        [columns, width], contiguous.

    Raises:
        ValueError: a shape or stride does not fit; the message names the argument and both values.
        TypeError: a dtype does not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pylora.gram_product(matrix, x)
    return C.gram_product(matrix, x)


def ritz_residuals(diagonal: Tensor, above: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The largest singular values of B, and how well their triplets, seen as W's, satisfy Wᵀu = σv. CPU only.

    Args:
        diagonal: [steps], float64, contiguous.
        above: [steps], float64, contiguous; the last one belongs to the step that comes next.
        rank: 0 to steps.

    Returns:
        values: [rank], float64, descending.
        residuals: [rank], float64: |above[-1] · u[-1]|. All NaN where an input is not finite.

    Raises:
        ValueError: a shape or `rank` does not fit.
        TypeError: a dtype does not fit.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pylora.ritz_residuals(diagonal, above, rank)
    return C.ritz_residuals(diagonal, above, rank)


@torch.library.register_fake("pylora::bidiagonalise_")
def _fake_bidiagonalise(
    matrix: Tensor,
    basis: Tensor,
    left: Tensor,
    diagonal: Tensor,
    above: Tensor,
    locked: int,
    begin: int,
    end: int,
    seed: int,
) -> None:
    return None


@torch.library.register_fake("pylora::gram_product")
def _fake_gram_product(matrix: Tensor, x: Tensor) -> Tensor:
    return matrix.new_empty(matrix.shape[1], x.shape[1])


@torch.library.register_fake("pylora::ritz_residuals")
def _fake_ritz_residuals(diagonal: Tensor, above: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    return diagonal.new_empty(rank), diagonal.new_empty(rank)
