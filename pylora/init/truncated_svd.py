"""The first singular triplets of a matrix, exactly, without the decomposition of the whole matrix."""

from __future__ import annotations

from typing import NamedTuple

import torch

# Below this size, or with a rank above this share of it, LAPACK's whole decomposition is as fast.
_SMALLEST = 320
_LARGEST_SHARE = 0.1
# Bounds on ‖Wᵀu − σv‖ / σ₁: what the iteration aims at, and what f32 arithmetic may make of it.
_TOLERANCE = 1e-6
_ACCEPTED = 1e-5
# Steps that look for a singular direction that was missed, and how far above σ_r one has to be to matter.
_PROBE_STEPS = 24
_PROBE_MARGIN = 1.01


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
    reading the matrix twice. The residuals of the result are checked, and a deflated probe looks for a direction that a
    multiple singular value may have hidden; where either fails, and for small matrices, the whole matrix is decomposed.
    No random number is taken from torch's global generator.

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

    Halko et al., https://arxiv.org/abs/0909.4061, algorithm 5.1. Products with Wᵀ are written as Qᵀ·W, which reads W in
    the order of its storage: twice as fast on a CPU.

    Args:
        matrix: [rows, columns], float32 or float64.
        rank: How many; more than min(rows, columns) are cut to that.
        iterations: Subspace iterations, 0 or more.
    """
    if matrix.shape[0] < matrix.shape[1]:
        flipped = randomised_triplets(matrix.t(), rank, iterations)
        return SingularTriplets(flipped.vh.t(), flipped.s, flipped.u.t())
    start = torch.randn(matrix.shape[1], rank, dtype=matrix.dtype, device=matrix.device)
    q = torch.linalg.qr(_product(matrix, start)).Q
    for _ in range(iterations):
        q = torch.linalg.qr(_product(matrix.t(), q)).Q
        q = torch.linalg.qr(_product(matrix, q)).Q
    u, s, vh = torch.linalg.svd(q.t() @ matrix, full_matrices=False)
    return SingularTriplets(q @ u, s, vh)


def _product(matrix: torch.Tensor, narrow: torch.Tensor) -> torch.Tensor:
    """matrix · narrow, arranged so that the large operand is read in the order of its storage."""
    return matrix @ narrow if matrix.is_contiguous() else (narrow.t() @ matrix.t()).t()


def _iterate(matrix: torch.Tensor, rank: int) -> SingularTriplets | None:
    """The triplets by iteration, or None where it does not find them."""
    generator = torch.Generator().manual_seed(0)
    lanczos = _Bidiagonalisation(matrix, generator, steps=min(matrix.shape[1], 16 * rank + 40))
    check_at = 2 * rank + 16
    while not lanczos.converged(rank):
        if not lanczos.extend(check_at):
            return None
        check_at = int(check_at * 1.15)
    found = _rayleigh_ritz(matrix, lanczos.right_vectors(rank))
    residual = (matrix.t() @ found.u - found.vh.t() * found.s).norm(dim=0).max()
    if not residual <= _ACCEPTED * found.s[0]:
        return None
    probe = _Bidiagonalisation(matrix, generator, steps=_PROBE_STEPS, locked=found.vh)
    probe.extend(_PROBE_STEPS)
    known = max(_PROBE_MARGIN * float(found.s[-1]), _ACCEPTED * float(found.s[0]))
    return found if probe.largest() <= known else None


def _rayleigh_ritz(matrix: torch.Tensor, right: torch.Tensor) -> SingularTriplets:
    """The best triplets within the space that the orthonormal rows of `right` span."""
    q, core = torch.linalg.qr(matrix @ right.t())
    u, s, vh = torch.linalg.svd(core)
    return SingularTriplets(q @ u, s, vh @ right)


class _Bidiagonalisation:
    """W·V = U·B with an upper bidiagonal B, built column by column; V is kept orthonormal, U is not kept.

    Args:
        matrix: W.
        generator: Of the start vector, on the CPU.
        steps: The largest number of columns.
        locked: Orthonormal rows that V stays orthogonal to.
    """

    def __init__(
        self, matrix: torch.Tensor, generator: torch.Generator, steps: int, locked: torch.Tensor | None = None
    ) -> None:
        self._matrix = matrix
        self._transposed = matrix.t()
        self._generator = generator
        self._locked = 0 if locked is None else locked.shape[0]
        self._basis = matrix.new_empty(self._locked + steps + 1, matrix.shape[1])
        if locked is not None:
            self._basis[: self._locked] = locked
        self._diagonal: list[float] = []
        self._above: list[float] = []
        self._left: torch.Tensor | None = None
        self._restart(self._locked)

    def extend(self, steps: int) -> bool:
        """Go on until B has `steps` columns; False when there is no room for more, or a value is not finite."""
        room = self._basis.shape[0] - self._locked - 1
        if len(self._diagonal) == room:
            return False
        while len(self._diagonal) < min(steps, room):
            self._step()
            if not self._above[-1] < float("inf"):
                return False
        return True

    def _step(self) -> None:
        row = self._locked + len(self._diagonal)
        left = torch.mv(self._matrix, self._basis[row])
        if self._left is not None:
            left.add_(self._left, alpha=-self._above[-1])
        alpha = float(left.norm())
        left = left / alpha if alpha > 0 else left
        right = self._orthogonalise(torch.mv(self._transposed, left), row + 1)
        beta = float(right.norm())
        largest = max([alpha, *self._diagonal])
        self._left = left
        self._diagonal.append(alpha)
        if beta <= torch.finfo(right.dtype).eps * largest:
            beta = 0.0
            self._restart(row + 1)
        else:
            torch.div(right, beta, out=self._basis[row + 1])
        self._above.append(beta)

    def _orthogonalise(self, vector: torch.Tensor, rows: int) -> torch.Tensor:
        used = self._basis[:rows]
        for _ in range(2):
            vector = torch.addmv(vector, used.t(), torch.mv(used, vector), alpha=-1)
        return vector

    def _restart(self, row: int) -> None:
        """A random direction for `row`: the first one, or the next when V spans an invariant space."""
        start = torch.randn(self._basis.shape[1], generator=self._generator, dtype=torch.float64, device="cpu")
        vector = self._orthogonalise(start.to(self._basis), row)
        torch.div(vector, vector.norm().clamp_min(torch.finfo(vector.dtype).tiny), out=self._basis[row])

    def _core(self) -> torch.Tensor:
        """B in f64 on the CPU."""
        diagonal = torch.tensor(self._diagonal, dtype=torch.float64, device="cpu")
        above = torch.tensor(self._above[:-1], dtype=torch.float64, device="cpu")
        return torch.diag(diagonal) + torch.diag(above, 1)

    def converged(self, rank: int) -> bool:
        """Whether the residuals of the first `rank` triplets of B, seen as triplets of W, are small enough."""
        if len(self._diagonal) < rank:
            return False
        core = self._core()
        squares, left = torch.linalg.eigh(core @ core.t())
        residual = float(left[-1, -rank:].abs().max()) * self._above[-1]
        return residual <= _TOLERANCE * float(squares[-1].clamp_min(0).sqrt())

    def largest(self) -> float:
        """The largest singular value of B."""
        return float(torch.linalg.svdvals(self._core())[0]) if self._diagonal else 0.0

    def right_vectors(self, rank: int) -> torch.Tensor:
        """The first right singular vectors of W that B knows of, [rank, columns]."""
        _, _, vh = torch.linalg.svd(self._core())
        used = self._basis[self._locked : self._locked + len(self._diagonal)]
        return vh[:rank].to(used) @ used
