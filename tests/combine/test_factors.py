"""Combining one layer's factors, against dense arithmetic in f64."""

import pytest
import torch

from pylora.combine import COMBINATIONS, Combination, Term, combine_terms
from pylora.combine import factors as module

RANKS = {"cat": [3, 5], "svd": [3, 5]}


def terms(out=20, inner=30, ranks=(4, 4), dtype=torch.float32, groups=1, kernel=()):
    generator = torch.Generator().manual_seed(0)
    ones = (1,) * len(kernel)
    return [
        Term(
            torch.randn(rank, inner, *kernel, generator=generator).to(dtype),
            torch.randn(out, rank // groups, *ones, generator=generator).to(dtype),
            scaling,
            weight,
            groups,
        )
        for rank, scaling, weight in zip(ranks, (2.0, 0.5), (1.5, -0.7), strict=True)
    ]


def delta(a, b, groups=1):
    """[out, in · kernel] in f64; a grouped B sees its own rows of A only."""
    a, b = a.double().flatten(1), b.double().flatten(1)
    return torch.cat([y @ x for x, y in zip(a.chunk(groups), b.chunk(groups), strict=True)])


def total(parts):
    return sum(part.weight * part.scaling * delta(part.a, part.b, part.groups) for part in parts)


@pytest.mark.parametrize("kernel", [(), (3,), (3, 2), (1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_cat_and_svd_are_exact(dtype, kernel):
    parts = terms(ranks=(3, 5), dtype=dtype, kernel=kernel)
    expected = total(parts)
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 0.02, torch.float64: 1e-12}[dtype]
    for kind, rank in (("cat", 8), ("cat", 11), ("svd", 8), ("svd", 12)):
        a, b = combine_terms(parts, Combination(kind, rank))
        assert a.dtype == b.dtype == dtype
        assert a.shape == (rank, 30, *kernel)
        assert b.shape == (20, rank, *(1 for _ in kernel))
        assert (delta(a, b) - expected).abs().max() < tolerance * expected.abs().max()


def test_svd_is_the_best_approximation():
    parts = terms(ranks=(6, 6))
    a, b = combine_terms(parts, Combination("svd", 5))
    u, s, vh = torch.linalg.svd(total(parts), full_matrices=False)
    best = (u[:, :5] * s[:5]) @ vh[:5]
    assert (delta(a, b) - best).abs().max() < 1e-5 * s[0]
    assert (a @ a.t() - torch.eye(5)).abs().max() < 1e-5


def test_svd_of_factors_that_are_wider_than_the_layer():
    parts = terms(out=6, inner=7, ranks=(5, 5))
    a, b = combine_terms(parts, Combination("svd", 6))
    expected = total(parts)
    assert (delta(a, b) - expected).abs().max() < 1e-5 * expected.abs().max()


def test_svd_never_forms_the_delta(monkeypatch):
    monkeypatch.setattr(module, "top_singular_triplets", lambda *args: pytest.fail("a dense decomposition"))
    combine_terms(terms(), Combination("svd", 4))


@pytest.mark.parametrize("kind", sorted(kind for kind in COMBINATIONS if kind.endswith("_svd")))
@pytest.mark.parametrize("size", [20, 400])
def test_svd_kinds_decompose_the_pruned_sum(kind, size):
    parts = terms(out=size, inner=size + 10)
    torch.manual_seed(0)
    a, b = combine_terms(parts, Combination(kind, 4, density=0.5))
    torch.manual_seed(0)
    arithmetic = module._ARITHMETIC[kind.removesuffix("_svd")]
    deltas = [part.scaling * (part.b @ part.a) for part in parts]
    dense = arithmetic(deltas, torch.tensor([part.weight for part in parts]), Combination(kind, 4, density=0.5))
    u, s, vh = torch.linalg.svd(dense.double(), full_matrices=False)
    assert (delta(a, b) - (u[:, :4] * s[:4]) @ vh[:4]).abs().max() < 2e-5 * s[0]


def test_clamp():
    parts = terms()
    a, b = combine_terms(parts, Combination("svd", 4))
    clamped_a, clamped_b = combine_terms(parts, Combination("svd", 4, svd_clamp=0.9))
    u, s, vh = torch.linalg.svd(total(parts).float(), full_matrices=False)
    limit = torch.quantile(torch.cat([(u[:, :4] * s[:4]).flatten(), vh[:4].flatten()]), 0.9)
    assert max(clamped_a.abs().max(), clamped_b.abs().max()) <= limit * 1.0001
    assert b.abs().max() > limit
    assert torch.allclose(clamped_a.abs(), a.abs().clamp(max=limit), atol=1e-5)


def test_quantile_of_many_numbers(monkeypatch):
    values = torch.randn(1001, generator=torch.Generator().manual_seed(0))
    for q in (0.0, 0.1, 0.5, 0.999, 1.0):
        expected = torch.quantile(values, q)
        low = (values.sort().values)[int(q * 1000)]
        assert torch.isclose(module._quantile(values, q), expected)
        assert low <= expected
    many = torch.linspace(0, 1, 2**24 + 5)
    assert abs(float(module._quantile(many, 0.25)) - 0.25) < 1e-6


class TestGroups:
    @pytest.mark.parametrize("rank", [12, 16])
    def test_cat(self, rank):
        parts = terms(ranks=(4, 8), groups=4, kernel=(3,))
        a, b = combine_terms(parts, Combination("cat", rank))
        expected = total(parts)
        assert a.shape == (rank, 30, 3)
        assert b.shape == (20, rank // 4, 1)
        assert (delta(a, b, 4) - expected).abs().max() < 1e-5 * expected.abs().max()

    def test_linear_of_one_is_exact(self):
        parts = terms(ranks=(4, 8), groups=4, kernel=(3,))[:1]
        a, b = combine_terms(parts, Combination("linear", 8))
        expected = total(parts)
        assert (delta(a, b, 4) - expected).abs().max() < 1e-5 * expected.abs().max()

    def test_svd_is_refused(self):
        with pytest.raises(NotImplementedError, match="groups > 1"):
            combine_terms(terms(groups=2, kernel=(3,)), Combination("svd", 4))


def test_unequal_ranks_on_one_layer():
    with pytest.raises(RuntimeError, match="equal rank"):
        combine_terms(terms(ranks=(3, 4)), Combination("linear", 4))


def test_a_negative_weight_negates():
    part = terms()[0]._replace(weight=-1.0)
    a, b = combine_terms([part], Combination("linear", 4))
    assert torch.allclose(b @ a, -part.scaling * part.b @ part.a, atol=1e-5)
