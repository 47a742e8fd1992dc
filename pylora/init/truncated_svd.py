"""The first singular triplets of a matrix, exactly, without the decomposition of the whole matrix."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from pylora.ops import bidiagonalise_, gram_product, ritz_residuals

# Below this size, or with a rank above this share of it, LAPACK's whole decomposition is as fast.
_SMALLEST = 320
_LARGEST_SHARE = 0.1
# Bounds on ‖Wᵀu − σv‖ / σ₁: what the iteration aims at, and what f32 arithmetic may make of it.
_TOLERANCE = 1e-6
_ACCEPTED = 1e-5
# Steps that look for a singular direction that was missed, and how far above σ_r one has to be to matter.
_PROBE_STEPS = 24
_PROBE_MARGIN = 1.01
# How far apart the parts of a basis may be after a product with WᵀW: of the smallest, f32 leaves 1e-5.
_LARGEST_SPREAD = 100.0


class SingularTriplets(NamedTuple):
    """W ≈ u · diag(s) · vh with the largest singular values first.

    Attributes:
        u: [rows, rank], orthonormal columns.
        s: [rank].
        vh: [rank, columns], orthonormal rows.
    """

    u: torch.Tensor
    s: torch.Tensor
    vh: torch.Tensor


@torch.no_grad()
def top_singular_triplets(matrix: torch.Tensor, rank: int) -> SingularTriplets:
    """The `rank` largest singular triplets of `matrix`, to the accuracy of the dtype.

    For a small part of a large matrix: Golub-Kahan-Lanczos bidiagonalisation from a fixed start vector, with full
    reorthogonalisation of the right vectors (Simon and Zha, https://doi.org/10.1137/S1064827597327309), each step
    reading the matrix once (`pylora.ops.bidiagonalise_`). The residuals of the result are checked, and a deflated probe
    looks for a direction that a multiple singular value may have hidden; where either fails, and for small
    matrices, the whole matrix is decomposed. No random number is taken from torch's global generator.

    Args:
        matrix: [rows, columns], float32 or float64.
        rank: How many; more than min(rows, columns) are cut to that.

    Raises:
        torch.linalg.LinAlgError: the matrix has values that are not finite.
    """
    if matrix.shape[0] < matrix.shape[1]:
        flipped = top_singular_triplets(matrix.t(), rank)
        return SingularTriplets(flipped.vh.t(), flipped.s, flipped.u.t())
    columns = matrix.shape[1]
    if columns >= _SMALLEST and rank <= _LARGEST_SHARE * columns:
        found = _iterate(matrix, rank)
        if found is not None:
            return found
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False)
    return SingularTriplets(u[:, :rank], s[:rank], vh[:rank])


@torch.no_grad()
def randomised_triplets(matrix: torch.Tensor, rank: int, iterations: int) -> SingularTriplets:
    """What `torch.svd_lowrank(matrix, rank, niter=iterations)` computes, from the same random numbers.

    Halko et al., https://arxiv.org/abs/0909.4061, algorithm 5.1. An iteration multiplies by WᵀW at once
    (`pylora.ops.gram_product`) and makes the basis orthonormal once, which spans the same space, as long as the basis'
    directions stay close enough in length; with the first that do not, it goes on with both products by themselves.

    Args:
        matrix: [rows, columns], float32 or float64.
        rank: How many; more than min(rows, columns) are cut to that.
        iterations: Subspace iterations, 0 or more.
    """
    if matrix.shape[0] < matrix.shape[1]:
        flipped = randomised_triplets(matrix.t(), rank, iterations)
        return SingularTriplets(flipped.vh.t(), flipped.s, flipped.u.t())
    if matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    basis = torch.randn(matrix.shape[1], rank, dtype=matrix.dtype, device=matrix.device)
    for done in range(iterations):
        q, r = torch.linalg.qr(gram_product(matrix, basis))
        lengths = r.diagonal().abs()
        if lengths.numel() and not lengths.max() <= _LARGEST_SPREAD * lengths.min():
            return _ritz_left(matrix, _both_sides(matrix, basis, iterations - done))
        basis = q
    return _ritz_left(matrix, torch.linalg.qr(matrix @ basis).Q)


def _both_sides(matrix: torch.Tensor, right: torch.Tensor, iterations: int) -> torch.Tensor:
    """An orthonormal basis of (W Wᵀ)^iterations · W · right, made orthonormal after each product. [rows, rank]."""
    q = torch.linalg.qr(matrix @ right).Q
    for _ in range(iterations):
        q = torch.linalg.qr((q.t() @ matrix).t()).Q
        q = torch.linalg.qr(matrix @ q).Q
    return q


def _ritz_left(matrix: torch.Tensor, q: torch.Tensor) -> SingularTriplets:
    """The triplets of q·qᵀ·W for orthonormal columns q."""
    v, s, uh = torch.linalg.svd((q.t() @ matrix).t(), full_matrices=False)
    return SingularTriplets(q @ uh.t(), s, v.t())


def _product(matrix: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """matrix · narrow, arranged so that the large operand is read in the order of its storage."""
    return matrix @ narrow if matrix.is_contiguous() else (narrow.t() @ matrix.t()).t()


def _iterate(matrix: torch.Tensor, rank: int) -> SingularTriplets | None:
    """The triplets by iteration, or None where it does not find them."""
    if matrix.device.type == "cpu" and matrix.stride(1) != 1:
        matrix = matrix.contiguous()
    lanczos = _Bidiagonalisation(matrix, seed=0, steps=min(matrix.shape[1], 16 * rank + 40))
    check_at = 2 * rank + 16
    while not lanczos.converged(rank):
        if not lanczos.extend(check_at):
            return None
        check_at = int(check_at * 1.15)
    found = _rayleigh_ritz(matrix, lanczos.right_vectors(rank))
    residual = (found.u.t() @ matrix - found.vh * found.s[:, None]).norm(dim=1).max()
    if not residual <= _ACCEPTED * found.s[0]:
        return None
    probe = _Bidiagonalisation(matrix, seed=1, steps=_PROBE_STEPS, locked=found.vh)
    probe.extend(_PROBE_STEPS)
    known = max(_PROBE_MARGIN * float(found.s[-1]), _ACCEPTED * float(found.s[0]))
    return found if probe.largest() <= known else None


def _rayleigh_ritz(matrix: torch.Tensor, right: torch.Tensor) -> SingularTriplets:
    """The best triplets within the space that the orthonormal rows of `right` span."""
    q, core = torch.linalg.qr(_product(matrix, right.t()))
    u, s, vh = torch.linalg.svd(core)
    return SingularTriplets(q @ u, s, vh @ right)


class _Bidiagonalisation:
    """W·V = U·B with an upper bidiagonal B, built column by column; V is kept orthonormal, U is not kept.

    Args:
        matrix: W, on the CPU with neighbouring columns side by side in memory.
        seed: Of the start vector.
        steps: The largest number of columns.
        locked: Orthonormal rows that V stays orthogonal to.
    """

    def __init__(self, matrix: torch.Tensor, seed: int, steps: int, locked: torch.Tensor | None = None) -> None:
        self._matrix = matrix
        self._seed = seed
        self._locked = 0 if locked is None else locked.shape[0]
        self._basis = matrix.new_empty(self._locked + steps + 1, matrix.shape[1])
        if locked is not None:
            self._basis[: self._locked] = locked
        self._left = matrix.new_zeros(matrix.shape[0])
        self._diagonal = torch.zeros(steps, dtype=torch.float64, device="cpu")
        self._above = torch.zeros(steps, dtype=torch.float64, device="cpu")
        self._steps = 0

    def extend(self, steps: int) -> bool:
        """Go on until B has `steps` columns; False when there is no room for more, or a value is not finite."""
        room = self._diagonal.shape[0]
        if self._steps == room:
            return False
        end = min(steps, room)
        state = (self._basis, self._left, self._diagonal, self._above)
        bidiagonalise_(self._matrix, *state, self._locked, self._steps, end, self._seed)
        self._steps = end
        return math.isfinite(float(self._above[end - 1]))

    def converged(self, rank: int) -> bool:
        """Whether the residuals of the first `rank` triplets of B, seen as triplets of W, are small enough."""
        if self._steps < rank:
            return False
        values, residuals = ritz_residuals(self._diagonal[: self._steps], self._above[: self._steps], rank)
        return float(residuals.max()) <= _TOLERANCE * float(values[0])

    def largest(self) -> float:
        """The largest singular value of B; NaN where it is not finite."""
        values, _ = ritz_residuals(self._diagonal[: self._steps], self._above[: self._steps], min(self._steps, 1))
        return float(values.sum())

    def right_vectors(self, rank: int) -> torch.Tensor:
        """The first right singular vectors of W that B knows of, [rank, columns]."""
        core = torch.diag(self._diagonal[: self._steps]) + torch.diag(self._above[: self._steps - 1], 1)
        # The vectors of BᵀB: what squaring loses of small values is below what f32 and _TOLERANCE leave.
        _, vectors = torch.linalg.eigh(core.t() @ core)
        chosen = vectors[:, -rank:].flip(1).t()
        return chosen.to(self._basis) @ self._basis[self._locked : self._locked + self._steps]
