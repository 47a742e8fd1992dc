"""One layer's adapters combined into the factors of one new adapter."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch

from pylora.combine import arithmetic
from pylora.init import SingularTriplets, top_singular_triplets


class Term(NamedTuple):
    """One adapter on one layer, and its weight in the combination.

    Attributes:
        a, b: The factors as the layer keeps them: [rank, in...] and [out, rank, 1...]; with a layer in groups B is
            [out, rank / groups, 1...].
        scaling: The adapter's scaling there.
        weight: Of the adapter, negative to subtract it.
        groups: Of the layer.
        transposed: The layer stores its weight as [in, out]: random pruning draws in the order of storage.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    weight: float
    groups: int = 1
    transposed: bool = False


class Factors(NamedTuple):
    """The new adapter's A and B, of its rank and scaling 1."""

    a: torch.Tensor
    b: torch.Tensor


@dataclass(frozen=True)
class Combination:
    """How to combine: the arguments of `add_weighted_adapter`, see there.

    Attributes:
        kind: The combination type.
        rank: Of the new adapter; kinds that need fewer directions on a layer leave the rest zero.
        svd_clamp: Quantile to clamp the decomposition's numbers to.
        svd_driver: cuSOLVER's method.
        density: Share of numbers that pruning leaves.
        majority_sign_method: How signs are voted on.
    """

    kind: str
    rank: int
    svd_clamp: float | None = None
    svd_driver: str | None = None
    density: float | None = None
    majority_sign_method: arithmetic.SignMethod = "total"


# What combines a list of tensors of one shape, with a tensor of weights and the arguments that the kind takes.
_Arithmetic = Callable[[list[torch.Tensor], torch.Tensor, Combination], torch.Tensor]


def _voting(function: Callable[..., torch.Tensor]) -> _Arithmetic:
    return lambda tensors, weights, how: function(tensors, weights, how.density, how.majority_sign_method)


def _pruning(function: Callable[..., torch.Tensor]) -> _Arithmetic:
    return lambda tensors, weights, how: function(tensors, weights, how.density)


_ARITHMETIC: dict[str, _Arithmetic] = {
    "linear": lambda tensors, weights, how: arithmetic.task_arithmetic(tensors, weights),
    "ties": _voting(arithmetic.ties),
    "dare_linear": _pruning(arithmetic.dare_linear),
    "dare_ties": _voting(arithmetic.dare_ties),
    "magnitude_prune": _pruning(arithmetic.magnitude_prune),
}

EQUAL_RANK_KINDS = frozenset(_ARITHMETIC)
SVD_KINDS = frozenset(("svd", *(f"{name}_svd" for name in _ARITHMETIC if name != "linear")))
COMBINATIONS = frozenset((*EQUAL_RANK_KINDS, *SVD_KINDS, "cat"))


@torch.no_grad()
def combine_terms(terms: list[Term], how: Combination) -> Factors:
    """The factors of the new adapter on one layer, in the dtype of the first term's A.

    Args:
        terms: The layer's adapters that take part, at least one.
        how: The combination; its kind is one of `COMBINATIONS`.

    Raises:
        NotImplementedError: a kind that decomposes deltas, on a layer in groups.
        RuntimeError: a kind that needs equal ranks, and the layer's ranks differ.
    """
    if how.kind == "cat":
        a, b = _concatenate(terms)
    elif how.kind in EQUAL_RANK_KINDS:
        a, b = _factor_by_factor(terms, how)
    else:
        a, b = _decompose(terms, how)
    dtype, groups = terms[0].a.dtype, terms[0].groups
    return Factors(_padded_a(a, how.rank, groups).to(dtype), _padded_b(b, how.rank // groups).to(dtype))


def _concatenate(terms: list[Term]) -> tuple[torch.Tensor, torch.Tensor]:
    """[w₁s₁A₁; w₂s₂A₂; ...] and [B₁, B₂, ...]; in groups the rows of one group stay together."""
    groups = terms[0].groups
    rows = [(term.a * term.weight * term.scaling).unflatten(0, (groups, -1)) for term in terms]
    return torch.cat(rows, dim=1).flatten(0, 1), torch.cat([term.b for term in terms], dim=1)


def _factor_by_factor(terms: list[Term], how: Combination) -> tuple[torch.Tensor, torch.Tensor]:
    """The kind's arithmetic on all A and on all B. The root of weight · scaling goes to each, its sign to A."""
    if len({(term.a.shape, term.b.shape) for term in terms}) > 1:
        raise RuntimeError(
            f"combination_type={how.kind!r}: expected adapters of equal rank on every layer, got "
            f"{[term.a.shape[0] for term in terms]}: use 'svd' or 'cat'"
        )
    device = terms[0].a.device
    factors = [term.weight * term.scaling for term in terms]
    for_a = torch.tensor([math.copysign(math.sqrt(abs(f)), f) for f in factors], device=device)
    for_b = torch.tensor([math.sqrt(abs(f)) for f in factors], device=device)
    combine = _ARITHMETIC[how.kind]
    return combine([t.a for t in terms], for_a, how), combine([t.b for t in terms], for_b, how)


def _decompose(terms: list[Term], how: Combination) -> tuple[torch.Tensor, torch.Tensor]:
    """The first directions of the combined delta: Vh in A, U·S in B."""
    if terms[0].groups > 1:
        raise NotImplementedError(
            f"combination_type={how.kind!r} is not supported for convolutions with groups > 1: use 'linear' or 'cat'"
        )
    exact = how.svd_clamp is not None or how.svd_driver is not None
    wide = [_widened(term) for term in terms]
    if how.kind == "svd" and not exact:
        u, s, vh = _of_sum_of_products(wide, how.rank)
    else:
        deltas = [_as_stored(term.scaling * (term.b @ term.a), term) for term in wide]
        weights = torch.tensor([float(term.weight) for term in wide], device=deltas[0].device)
        kind = "linear" if how.kind == "svd" else how.kind.removesuffix("_svd")
        delta = _as_stored(_ARITHMETIC[kind](deltas, weights, how), wide[0])
        u, s, vh = _whole(delta, how) if exact else top_singular_triplets(delta, how.rank)
    b, a = u[:, : how.rank] * s[: how.rank], vh[: how.rank]
    if how.svd_clamp is not None:
        limit = _quantile(torch.cat([b.flatten(), a.flatten()]), how.svd_clamp)
        a, b = a.clamp(-limit, limit), b.clamp(-limit, limit)
    first = terms[0]
    return a.reshape(-1, *first.a.shape[1:]), b.reshape(first.b.shape[0], -1, *first.b.shape[2:])


def _as_stored(delta: torch.Tensor, term: Term) -> torch.Tensor:
    """The view between [out, in] and the layer's own layout."""
    return delta.t() if term.transposed else delta


def _widened(term: Term) -> Term:
    """The factors as matrices, in f32 or f64."""
    dtype = torch.promote_types(term.a.dtype, torch.float32)
    return term._replace(a=term.a.flatten(1).to(dtype), b=term.b.flatten(1).to(dtype))


def _of_sum_of_products(terms: list[Term], rank: int) -> SingularTriplets:
    """The first triplets of Σ w·s·B·A."""
    a = torch.cat([term.a for term in terms])
    b = torch.cat([term.b * (term.weight * term.scaling) for term in terms], dim=1)
    if a.shape[0] >= min(a.shape[1], b.shape[0]):
        return top_singular_triplets(b @ a, rank)
    u, s, vh = triplets_of_product(b, a)
    return SingularTriplets(u[:, :rank], s[:rank], vh[:rank])


def triplets_of_product(b: torch.Tensor, a: torch.Tensor) -> SingularTriplets:
    """All singular triplets of b·a, as many as there are rows in `a` or fewer: both factors are orthogonalised, and the
    small core between them is decomposed. The product is never formed unless it is the smaller of the two.

    Args:
        b: [out, inner], f32 or f64.
        a: [inner, in], of that dtype.
    """
    if a.shape[0] >= min(a.shape[1], b.shape[0]):
        return SingularTriplets(*torch.linalg.svd(b @ a, full_matrices=False))
    q_a, r_a = torch.linalg.qr(a.t())
    q_b, r_b = torch.linalg.qr(b)
    u, s, vh = torch.linalg.svd(r_b @ r_a.t())
    return SingularTriplets(q_b @ u, s, vh @ q_a.t())


def _whole(delta: torch.Tensor, how: Combination) -> SingularTriplets:
    """LAPACK's or cuSOLVER's own decomposition: a quantile over signed numbers depends on the signs it chooses."""
    return SingularTriplets(*torch.linalg.svd(delta, full_matrices=False, driver=how.svd_driver))


def _quantile(values: torch.Tensor, q: float) -> torch.Tensor:
    """`torch.quantile`, also of more numbers than that takes (2^24)."""
    if values.numel() <= 2**24:
        return torch.quantile(values, q)
    place = q * (values.numel() - 1)
    below = int(place)
    low = torch.kthvalue(values, below + 1).values
    high = torch.kthvalue(values, min(below + 2, values.numel())).values
    return torch.lerp(low, high, place - below)


def _padded_a(a: torch.Tensor, rank: int, groups: int) -> torch.Tensor:
    """`a` with zero rows up to `rank`, at the end of each group."""
    if a.shape[0] == rank:
        return a.contiguous()
    padded = a.new_zeros(groups, rank // groups, *a.shape[1:])
    padded[:, : a.shape[0] // groups] = a.unflatten(0, (groups, -1))
    return padded.flatten(0, 1)


def _padded_b(b: torch.Tensor, columns: int) -> torch.Tensor:
    if b.shape[1] == columns:
        return b.contiguous()
    padded = b.new_zeros(b.shape[0], columns, *b.shape[2:])
    padded[:, : b.shape[1]] = b
    return padded
