"""bidiagonalise_, gram_product and ritz_residuals, held against their definitions in f64."""

import itertools
import math

import pytest
import torch

from pylora.ops import bidiagonalise_, gram_product, ritz_residuals
from pylora.ops.reference import lanczos as reference
from pylora.testing.isa import built_isas, cpu_isa, supported_isas

EPS = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


class Run:
    """The arguments of one iteration."""

    def __init__(self, matrix, steps, locked=None, seed=0):
        rows = 0 if locked is None else locked.shape[0]
        self.matrix, self.locked, self.seed = matrix, rows, seed
        self.basis = torch.full((rows + steps + 1, matrix.shape[1]), math.nan, dtype=matrix.dtype)
        if locked is not None:
            self.basis[:rows] = locked
        self.left = torch.full((matrix.shape[0],), math.nan, dtype=matrix.dtype)
        self.diagonal = torch.full((steps,), math.nan, dtype=torch.float64)
        self.above = torch.full((steps,), math.nan, dtype=torch.float64)

    def args(self, begin, end):
        state = (self.basis, self.left, self.diagonal, self.above)
        return (self.matrix, *state, self.locked, begin, end, self.seed)

    def extend(self, *bounds):
        for begin, end in itertools.pairwise(bounds):
            bidiagonalise_(*self.args(begin, end))
        return self

    def v(self):
        return self.basis[self.locked : self.locked + len(self.diagonal)]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def orthogonal(rows, columns, seed):
    return torch.linalg.qr(normal(rows, columns, dtype=torch.float64, seed=seed))[0]


def check_relations(run):
    """V is orthonormal, and VᵀWᵀWV is BᵀB: what a bidiagonalisation is, restarts or not."""
    eps = 64 * EPS[run.matrix.dtype]
    v, w = run.basis[:-1].double(), run.matrix.double()
    assert (v @ v.T - torch.eye(len(v), dtype=torch.float64)).abs().max() < eps * math.sqrt(len(v))
    core = reference.bidiagonal(run.diagonal, run.above)
    products = w @ run.v().double().T
    size = max(float(run.diagonal.max()) ** 2, 1e-300)
    assert (products.T @ products - core.T @ core).abs().max() < 4 * eps * math.sqrt(max(w.shape)) * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(30, 30), (200, 37), (37, 200), (1000, 37), (67, 1), (1, 67), (515, 130)])
def test_is_a_bidiagonalisation(isa, dtype, shape):
    steps = min(12, *shape)
    check_relations(Run(normal(*shape, dtype=dtype), steps).extend(0, steps))


def test_follows_the_definition(isa):
    matrix = normal(90, 70, dtype=torch.float64)
    run = Run(matrix, 20).extend(0, 20)
    v, diagonal, above = reference.bidiagonalise(matrix, run.basis[0], 20)
    torch.testing.assert_close(run.v(), v, rtol=0, atol=1e-9)
    torch.testing.assert_close(run.diagonal, diagonal, rtol=1e-10, atol=0)
    torch.testing.assert_close(run.above, above, rtol=1e-10, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_calls_continue_where_the_last_one_stopped(isa, dtype):
    matrix = normal(80, 60, dtype=dtype)
    whole, parts = Run(matrix, 16).extend(0, 16), Run(matrix, 16).extend(0, 1, 7, 7, 16)
    assert torch.equal(whole.basis, parts.basis)
    assert torch.equal(whole.diagonal, parts.diagonal)
    assert torch.equal(whole.above, parts.above)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("rank", [0, 1, 5])
def test_goes_on_where_an_invariant_space_is_spanned(isa, dtype, rank):
    matrix = normal(50, rank, dtype=dtype) @ normal(rank, 40, dtype=dtype, seed=1)
    run = Run(matrix, 12).extend(0, 12)
    check_relations(run)
    assert bool((run.above == 0).any())


def test_equal_singular_values(isa):
    check_relations(Run(torch.eye(50), 10).extend(0, 10))


def test_stays_orthogonal_to_locked_vectors(isa):
    matrix = (orthogonal(80, 60, 1) * torch.logspace(1, -1, 60, dtype=torch.float64)) @ orthogonal(60, 60, 2).T
    _, s, vh = torch.linalg.svd(matrix)
    run = Run(matrix, 30, locked=vh[:5].contiguous()).extend(0, 30)
    check_relations(run)
    values, _ = ritz_residuals(run.diagonal, run.above, 1)
    assert float(values[0]) == pytest.approx(float(s[5]), rel=1e-3)


def test_rows_with_a_stride(isa):
    wide = normal(50, 90)
    view = wide[:, 7:67]
    assert torch.equal(Run(view, 8).extend(0, 8).basis, Run(view.contiguous(), 8).extend(0, 8).basis)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_any_number_of_threads(isa, dtype):
    matrix = normal(700, 600, dtype=dtype)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = Run(matrix, 60).extend(0, 60)
        torch.set_num_threads(3)
        three = Run(matrix, 60).extend(0, 60)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one.basis, three.basis)
    assert torch.equal(one.above, three.above)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 1e30])
def test_values_that_are_not_finite_end_the_iteration(isa, bad):
    matrix = normal(50, 40)
    matrix[3, 4] = bad
    run = Run(matrix, 8).extend(0, 8)
    assert run.diagonal.isnan().all()
    assert run.above.isnan().all()


def test_seeds_and_the_global_generator():
    matrix = normal(50, 40)
    before = torch.get_rng_state()
    first, again, other = (Run(matrix, 8, seed=seed).extend(0, 8) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(first.basis, again.basis)
    assert not torch.equal(first.basis, other.basis)


GRAM_SHAPES = [(30, 30, 16), (200, 37, 5), (37, 200, 33), (1003, 37, 17), (67, 1, 1), (1, 67, 8), (515, 130, 64)]
EMPTY_GRAMS = [(0, 7, 3), (7, 0, 3), (7, 5, 0)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("rows", "columns", "width"), GRAM_SHAPES + EMPTY_GRAMS)
def test_gram_product(isa, dtype, rows, columns, width):
    wide = normal(rows, columns + 9, dtype=dtype)
    matrix, x = wide[:, 2 : columns + 2], normal(columns, width, dtype=dtype, seed=1)
    found = gram_product(matrix, x)
    assert found.shape == (columns, width)
    assert found.dtype == dtype
    sizes = reference.gram_product(matrix.abs(), x.abs())  # of the terms that are summed
    error = (found.double() - reference.gram_product(matrix, x)).abs()
    assert bool((error <= 2 * math.sqrt(rows + columns + 1) * EPS[dtype] * sizes).all())
    assert torch.equal(gram_product(matrix.contiguous(), x.t().contiguous().t()), found)


def test_gram_product_has_the_same_bits_for_any_number_of_threads(isa):
    matrix, x = normal(900, 300), normal(300, 20, seed=1)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = gram_product(matrix, x)
        torch.set_num_threads(3)
        three = gram_product(matrix, x)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(one, three)


def test_gram_product_errors():
    zeros = torch.zeros
    for matrix, x, error, message in [
        (zeros(9), zeros(9, 2), ValueError, "matrix: expected shape"),
        (zeros(9, 7).bfloat16(), zeros(7, 2), TypeError, "matrix: expected float32 or float64, got BFloat16"),
        (zeros(7, 9).t(), zeros(7, 2), ValueError, "matrix: expected a column stride of 1"),
        (zeros(9, 7), zeros(7, 2).double(), TypeError, "x: expected the dtype of matrix, Float, got Double"),
        (zeros(9, 7), zeros(9, 2), ValueError, "x: expected shape .7, .* got .9, 2."),
    ]:
        with pytest.raises(error, match=f"gram_product: {message}"):
            gram_product(matrix, x)


@pytest.mark.parametrize("steps", [1, 2, 3, 17, 90])
def test_ritz_residuals(steps):
    diagonal, above = normal(steps, dtype=torch.float64).abs(), normal(steps, dtype=torch.float64, seed=1).abs()
    if steps > 10:
        above[4] = 0  # a restart
    rank = min(steps, 12)
    values, residuals = ritz_residuals(diagonal, above, rank)
    expected_values, expected_residuals = reference.ritz_residuals(diagonal, above, rank)
    torch.testing.assert_close(values, expected_values, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(residuals, expected_residuals, rtol=1e-6, atol=1e-9)


def test_ritz_residuals_of_nothing_zeros_and_nan():
    empty = torch.empty(0, dtype=torch.float64)
    assert [len(t) for t in ritz_residuals(empty, empty, 0)] == [0, 0]
    zeros = torch.zeros(4, dtype=torch.float64)
    assert not any(t.any() for t in ritz_residuals(zeros, zeros, 3))
    bad = zeros.clone()
    bad[2] = math.nan
    assert all(t.isnan().all() for t in ritz_residuals(bad, zeros, 3))


def test_residuals_are_those_of_the_matrix():
    matrix = normal(90, 70, dtype=torch.float64)
    run = Run(matrix, 25).extend(0, 25)
    values, residuals = ritz_residuals(run.diagonal, run.above, 4)
    _, s, vh = torch.linalg.svd(reference.bidiagonal(run.diagonal, run.above))
    right = vh[:4] @ run.v()
    u = (matrix @ right.T) / s[:4]
    torch.testing.assert_close((matrix.T @ u - right.T * s[:4]).norm(dim=0), residuals, rtol=1e-6, atol=1e-10)
    torch.testing.assert_close(values, s[:4])


def test_errors():
    run = Run(normal(9, 7), 4)

    def call(**changes):
        names = ("matrix", "basis", "left", "diagonal", "above", "locked", "begin", "end", "seed")
        bidiagonalise_(**(dict(zip(names, run.args(0, 4), strict=True)) | changes))

    wide = torch.zeros
    for changes, error, message in [
        ({"matrix": wide(9)}, ValueError, "matrix: expected shape"),
        ({"matrix": wide(9, 7, dtype=torch.bfloat16)}, TypeError, "matrix: expected float32 or float64, got BFloat16"),
        ({"matrix": wide(7, 9).t()}, ValueError, "matrix: expected a column stride of 1"),
        ({"basis": wide(4, 7)}, ValueError, "basis: expected more than locked . end rows, 4, got shape .4, 7."),
        ({"basis": wide(5, 7).double()}, TypeError, "basis: expected the dtype of matrix, Float, got Double"),
        ({"basis": wide(7, 5).t()}, ValueError, "basis: expected a contiguous tensor"),
        ({"left": wide(7)}, ValueError, "left: expected shape .9. .* got .7."),
        ({"diagonal": wide(4)}, TypeError, "diagonal: expected float64, got Float"),
        ({"above": wide(3).double()}, ValueError, "above: expected at least `end` elements, 4, got 3"),
        ({"locked": -1}, ValueError, "locked: expected 0 or more, got -1"),
        ({"begin": 5}, ValueError, "begin: expected 0 <= begin <= end, got 5 and 4"),
    ]:
        with pytest.raises(error, match=f"bidiagonalise_: {message}"):
            call(**changes)
    assert run.basis.isnan().all()  # nothing was written
    with pytest.raises(ValueError, match="ritz_residuals: rank: expected 0 to 4, the steps, got 5"):
        ritz_residuals(run.diagonal, run.above, 5)
    with pytest.raises(ValueError, match="ritz_residuals: above: expected shape"):
        ritz_residuals(run.diagonal, run.above[:3], 1)


def test_opcheck():
    run = Run(normal(20, 15), 6)
    torch.library.opcheck(torch.ops.pylora.bidiagonalise_.default, run.args(0, 6))
    run.extend(0, 6)
    torch.library.opcheck(torch.ops.pylora.ritz_residuals.default, (run.diagonal, run.above, 3))
    torch.library.opcheck(torch.ops.pylora.gram_product.default, (run.matrix, normal(15, 3)))


def test_gram_product_of_other_devices():
    matrix, x = normal(50, 40, dtype=torch.float64), normal(40, 3, dtype=torch.float64, seed=1)
    op = torch.ops.pylora.gram_product.default
    aten = op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, matrix, x)
    torch.testing.assert_close(aten, gram_product(matrix, x))


@pytest.mark.parametrize("rank", [2, 40])
def test_of_other_devices(rank):
    """What CUDA tensors go through, run here on the CPU."""
    matrix = normal(50, rank, dtype=torch.float64) @ normal(rank, 40, dtype=torch.float64, seed=1)
    ours, aten = Run(matrix, 10).extend(0, 10), Run(matrix, 10)
    op = torch.ops.pylora.bidiagonalise_.default
    for bounds in ((0, 4), (4, 10)):
        op._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, *aten.args(*bounds))
    check_relations(aten)
    steps = min(rank, 10)
    torch.testing.assert_close(aten.diagonal[:steps], ours.diagonal[:steps], rtol=1e-9, atol=1e-9)
