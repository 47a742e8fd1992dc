"""The first singular triplets: against the whole decomposition, on spectra that are hard for an iteration."""

import math

import pytest
import torch

from pylora.init import top_singular_triplets
from pylora.init import truncated_svd as module

N = 360  # above the size from which the iteration is used


@pytest.fixture
def iterations(monkeypatch):
    """Counts the decompositions that the iteration gave, [found, given up]."""
    counts = [0, 0]
    iterate = module._iterate

    def counting(matrix, rank):
        found = iterate(matrix, rank)
        counts[found is None] += 1
        return found

    monkeypatch.setattr(module, "_iterate", counting)
    return counts


def orthogonal(rows, columns, seed):
    return torch.linalg.qr(torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)))[0]


def with_spectrum(s):
    return (orthogonal(N + 40, N, 1) * s) @ orthogonal(N, N, 2).t()


def check(matrix, rank, tolerance=3e-6):
    u, s, vh = top_singular_triplets(matrix, rank)
    exact = torch.linalg.svd(matrix.double(), full_matrices=False)
    scale = exact.S[0].clamp_min(1e-30)
    assert u.shape == (matrix.shape[0], rank)
    assert vh.shape == (rank, matrix.shape[1])
    assert ((s - exact.S[:rank]).abs() / scale).max() < tolerance
    assert (vh @ vh.t() - torch.eye(rank, dtype=vh.dtype)).abs().max() < 1e-5
    left = matrix @ vh.t() - u * s
    right = matrix.t() @ u - vh.t() * s
    assert left.norm(dim=0).max() / scale < tolerance
    assert right.norm(dim=0).max() / scale < 1.1e-5
    return u, s, vh, exact


@pytest.mark.parametrize("shape", [(N, N), (N + 200, N), (N, N + 200)])
def test_flat_spectrum(shape, iterations):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    u, s, vh, exact = check(matrix, 8)
    assert iterations == [1, 0]
    expected = (exact.U[:, :8] * exact.S[:8]) @ exact.Vh[:8]
    assert ((u * s) @ vh - expected).abs().max() < 3e-5 * expected.abs().max()


SPECTRA = {
    "steep": torch.logspace(0, -12, N),
    "fewer directions than asked for": torch.cat([torch.tensor([3.0, 2.0, 1.0]), torch.zeros(N - 3)]),
    "multiple": torch.cat([torch.full((5,), 3.0), torch.linspace(1, 0.1, N - 5)]),
    "multiple beyond the rank": torch.cat([torch.full((20,), 3.0), torch.linspace(1, 0.1, N - 20)]),
    "all equal": torch.ones(N),
    "far apart": torch.cat([torch.tensor([1e6, 1.0]), torch.linspace(0.5, 0.1, N - 2)]),
}


@pytest.mark.parametrize("kind", SPECTRA)
def test_hard_spectra(kind):
    check(with_spectrum(SPECTRA[kind]), 8)


def test_exactly_repeated_direction_is_found():
    """Blocks that the start vector sees alike give exact multiples, which one Krylov space holds once."""
    matrix = torch.eye(N)
    matrix[:4] *= 5
    _, s, _ = top_singular_triplets(matrix, 6)
    assert torch.allclose(s, torch.tensor([5.0, 5, 5, 5, 1, 1]), atol=1e-5)


def test_f64(iterations):
    matrix = torch.randn(N, N, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    check(matrix, 4, tolerance=1e-6)
    assert iterations == [1, 0]


def test_zero_matrix():
    _, s, vh = top_singular_triplets(torch.zeros(N, N), 4)
    assert not s.any()
    assert (vh @ vh.t() - torch.eye(4)).abs().max() < 1e-5


def test_small_or_nearly_whole_is_decomposed_whole(iterations):
    matrix = torch.randn(40, 30, generator=torch.Generator().manual_seed(0))
    u, s, vh = top_singular_triplets(matrix, 40)
    exact = torch.linalg.svd(matrix, full_matrices=False)
    assert torch.equal(u, exact.U)
    assert torch.equal(s, exact.S)
    assert torch.equal(vh, exact.Vh)
    check(torch.randn(N, N, generator=torch.Generator().manual_seed(0)), N // 5)
    assert iterations == [0, 0]


def test_values_that_are_not_finite_raise_as_torch_does():
    matrix = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    matrix[3, 4] = math.nan
    with pytest.raises(torch.linalg.LinAlgError):
        top_singular_triplets(matrix, 4)


def test_repeatable_and_off_the_global_generator():
    matrix = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    before = torch.get_rng_state()
    first = top_singular_triplets(matrix, 4)
    second = top_singular_triplets(matrix, 4)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_under_a_device_context():
    matrix = torch.randn(N, N, generator=torch.Generator().manual_seed(0))
    with torch.device("meta"):
        u, _, _ = top_singular_triplets(matrix, 4)
    assert u.device.type == "cpu"


@pytest.mark.parametrize("iterations", [0, 1, 5])
@pytest.mark.parametrize("shape", [(40, 30), (30, 40), (25, 25)])
def test_randomised_is_torch_s(shape, iterations):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    for view in (matrix, matrix.t().contiguous().t()):
        torch.manual_seed(1)
        u, s, vh = module.randomised_triplets(view, 6, iterations)
        state = torch.get_rng_state()
        torch.manual_seed(1)
        left, values, right = torch.svd_lowrank(view, 6, niter=iterations)
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(s, values, rtol=1e-4, atol=1e-5)
        signs = (u * left).sum(dim=0).sign()  # rounding may turn a pair of vectors round
        torch.testing.assert_close(u * signs, left, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(vh.t() * signs, right, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("factor", [1.0, 1e-12])
@pytest.mark.parametrize(("decades", "apart"), [(0.5, False), (4, True)])
def test_randomised_makes_far_apart_directions_orthonormal_after_each_product(monkeypatch, factor, decades, apart):
    """With WᵀW at once, f32 would lose the last of directions whose lengths are 1e4 apart."""
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(90, 90, generator=generator))[0] for _ in range(2))
    matrix = factor * ((left * torch.logspace(0, -decades, 90)) @ right).contiguous()
    calls = []
    both_sides = module._both_sides
    monkeypatch.setattr(module, "_both_sides", lambda *args: calls.append(args) or both_sides(*args))
    torch.manual_seed(1)
    u, s, vh = module.randomised_triplets(matrix, 60, 8)
    assert bool(calls) == apart
    torch.manual_seed(1)
    left, values, right = torch.svd_lowrank(matrix, 60, niter=8)
    torch.testing.assert_close(s, values, rtol=1e-4, atol=2e-6 * factor)
    torch.testing.assert_close((u * s) @ vh, (left * values) @ right.t(), rtol=0, atol=5e-6 * factor)


@pytest.mark.parametrize("iterations", [0, 2])
def test_randomised_with_a_rank_that_is_larger_than_the_matrix(iterations):
    matrix = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    u, s, vh = module.randomised_triplets(matrix, 7, iterations)
    assert s.shape == (5,)
    torch.testing.assert_close((u * s) @ vh, matrix, rtol=1e-4, atol=1e-5)
