"""bgmv_ and sgmv_ on the CPU, held against their definitions in f64."""

import itertools

import pytest
import torch

from pylora.ops import bgmv_, bgmv_expand_, bgmv_shrink, sgmv_, sgmv_expand_, sgmv_shrink
from pylora.ops.reference import bgmv as reference
from pylora.ops.reference.sgmv import sgmv as sgmv_reference
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.pools import PoolInputs, pool_inputs
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = [1, 3, 8, 16, 64, 200]
WIDTHS = [0, 1, 17, 64, 1000]
POPULARITIES = ["one", "distinct", "uniform", "zipf", "skewed", "none"]
OPS = ["bgmv", "sgmv"]


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def rows_of(op: str, inputs: PoolInputs) -> tuple[torch.Tensor, ...]:
    return inputs.sorted_segments() if op == "sgmv" else (inputs.token_slots,)


def add_(op: str, y, inputs: PoolInputs, *pools: torch.Tensor, **kwargs) -> None:
    function = sgmv_ if op == "sgmv" else bgmv_
    a, b = pools or (inputs.a_pool, inputs.b_pool)
    function(y, inputs.x, a, b, inputs.ranks, inputs.scalings, *rows_of(op, inputs), **kwargs)


def run(op: str, inputs: PoolInputs):
    leaves = [t.requires_grad_() for t in (inputs.y, inputs.x, inputs.a_pool, inputs.b_pool)]
    y = inputs.y.clone()
    add_(op, y, inputs)
    return y.detach(), torch.autograd.grad(y, leaves, inputs.dy)


def expected(inputs: PoolInputs, absolute: bool = False):
    wide = [t.detach().double() for t in (inputs.y, inputs.x, inputs.a_pool, inputs.b_pool, inputs.dy)]
    *leaves, dy = [t.abs() if absolute else t for t in wide]
    leaves = [t.requires_grad_() for t in leaves]
    y = reference.bgmv(*leaves, inputs.ranks, inputs.scalings, inputs.token_slots)
    grads = torch.autograd.grad(y, leaves, dy, allow_unused=True)
    return y.detach(), [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads, strict=True)]


def check(op: str, inputs: PoolInputs) -> None:
    before = inputs.y.clone()
    y, grads = run(op, inputs)
    y_ref, grads_ref = expected(inputs)
    y_size, grads_size = expected(inputs, absolute=True)
    longest = max(*inputs.x.shape, *inputs.y.shape, inputs.a_pool.shape[1])
    sums_in = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    assert_near(y, y_ref, longest, "y", y_size, sums_in=sums_in)
    untouched = inputs.token_slots < 0
    assert torch.equal(y[untouched], before[untouched])
    for name, grad, grad_ref, size in zip(("y", "x", "a_pool", "b_pool"), grads, grads_ref, grads_size, strict=True):
        assert_near(grad, grad_ref, longest, name, size, sums_in=sums_in)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward_and_backward(isa, op, dtype):
    """Every pair of widths; popularities, numbers of tokens and of slots take turns. Ranks are mixed in every call."""
    popularity, tokens = itertools.cycle(POPULARITIES), itertools.cycle([0, 1, 2, 3, 7, 29, 50])
    for in_features, out_features in itertools.product(WIDTHS, WIDTHS):
        for _ in range(2):
            check(op, pool_inputs(next(tokens), in_features, out_features, RANKS, dtype, popularity=next(popularity)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pool_dtype", DTYPES)
def test_pools_in_another_dtype(isa, op, dtype, pool_dtype):
    check(op, pool_inputs(33, 129, 70, [12, 1, 8], dtype, pool_dtype))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_large_ranks_and_many_tokens(isa, op, dtype):
    check(op, pool_inputs(9, 70, 65, [512, 0, 5], dtype))
    check(op, pool_inputs(150, 600, 530, [33, 4], dtype, popularity="skewed"))


def test_rank_beyond_512(isa):
    check("bgmv", pool_inputs(5, 40, 50, [700, 3]))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_layouts_of_b(isa, op, dtype):
    inputs = pool_inputs(21, 64, 45, [16, 3, 9], dtype)
    y, other = inputs.y.clone(), inputs.y.clone()
    add_(op, y, inputs)
    add_(op, other, inputs, inputs.a_pool, inputs.b_pool.transpose(1, 2).contiguous(), b_layout="out_rank")
    assert torch.equal(y, other)
    b = inputs.b_pool.transpose(1, 2).contiguous().requires_grad_()
    y = inputs.y.clone()
    add_(op, y, inputs, inputs.a_pool, b, b_layout="out_rank")
    (grad,) = torch.autograd.grad(y, b, inputs.dy)
    _, grads = run(op, inputs)
    assert torch.equal(grad, grads[3].transpose(1, 2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [1, 2, 3, 9, 16])
def test_a_tokens_bits_are_the_same_alone_and_beside_others(isa, dtype, rank):
    """One with a segment to itself has kernels of its own. 1100 columns of x are over a block, so are 2100 of y."""
    pool_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    for width, out_features in ((8, 45), (1100, 16), (21, 2100)):
        inputs = pool_inputs(7, width, out_features, [rank], dtype, pool_dtype)
        slots = torch.zeros(7, dtype=torch.int32)
        pools = (inputs.a_pool, inputs.b_pool, inputs.ranks, inputs.scalings)
        together, alone = inputs.y.clone(), inputs.y.clone()
        bgmv_(together, inputs.x, *pools, slots)
        for t in range(7):
            bgmv_(alone[t : t + 1], inputs.x[t : t + 1], *pools, slots[:1])
        assert torch.equal(together, alone)


@pytest.mark.parametrize("op", OPS)
def test_slices_share_an_input(isa, op):
    """q, k and v in one call have the bits of three calls."""
    inputs = [pool_inputs(17, 64, out_features, [8, 2], seed=1) for out_features in (48, 16, 33)]
    for each in inputs[1:]:
        each.x, each.token_slots, each.scalings = inputs[0].x, inputs[0].token_slots, inputs[0].scalings
    y = torch.cat([each.y for each in inputs], 1)
    a, b = [each.a_pool.requires_grad_() for each in inputs], [each.b_pool.requires_grad_() for each in inputs]
    x = inputs[0].x.requires_grad_()
    add_(op, y, inputs[0], a, b)
    dy = torch.randn_like(y)
    grads = torch.autograd.grad(y, [x, *a, *b], dy)
    separate, separate_grads, column = [], [], 0
    for each, ai, bi in zip(inputs, a, b, strict=True):
        yi = each.y.clone()
        add_(op, yi, each, ai, bi)
        width = yi.shape[1]
        separate.append(yi)
        separate_grads.append(torch.autograd.grad(yi, [x, ai, bi], dy[:, column : column + width]))
        column += width
    assert torch.equal(y, torch.cat(separate, 1))
    torch.testing.assert_close(grads[0], sum(g[0] for g in separate_grads))
    assert all(torch.equal(g, h[1]) for g, h in zip(grads[1:4], separate_grads, strict=True))
    assert all(torch.equal(g, h[2]) for g, h in zip(grads[4:], separate_grads, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_halves_make_the_whole(isa, dtype):
    inputs = pool_inputs(19, 77, 33, [6, 1, 20], dtype)
    a, b, ranks, scalings = inputs.a_pool, inputs.b_pool, inputs.ranks, inputs.scalings
    whole = inputs.y.clone()
    add_("bgmv", whole, inputs)
    v = bgmv_shrink(inputs.x, a, ranks, inputs.token_slots)
    for token, slot in enumerate(inputs.token_slots.tolist()):
        assert bool((v[token, (ranks[slot] if slot >= 0 else 0) :] == 0).all())
    halves = inputs.y.clone()
    bgmv_expand_(halves, v, b, ranks, scalings, inputs.token_slots)
    assert torch.equal(halves, whole)
    segments = inputs.sorted_segments()
    assert torch.equal(sgmv_shrink(inputs.x, a, ranks, *segments), v)
    halves = inputs.y.clone()
    sgmv_expand_(halves, v, b, ranks, scalings, *segments)
    assert torch.equal(halves, whole)


def test_segments_of_one_slot_apart(isa):
    """A slot may have several segments, and segments may be empty."""
    inputs = pool_inputs(12, 30, 20, [4, 2])
    indptr = torch.tensor([0, 3, 3, 5, 9, 12], dtype=torch.int32)
    slots = torch.tensor([1, 0, -1, 1, 0], dtype=torch.int32)
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.a_pool, inputs.b_pool)]
    y = inputs.y.clone()
    sgmv_(y, *leaves, inputs.ranks, inputs.scalings, indptr, slots)
    grads = torch.autograd.grad(y, leaves, inputs.dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y_ref = sgmv_reference(inputs.y, *wide, inputs.ranks, inputs.scalings, indptr, slots)
    assert_near(y, y_ref.detach(), 30)
    for grad, grad_ref in zip(grads, torch.autograd.grad(y_ref, wide, inputs.dy.double()), strict=True):
        assert_near(grad, grad_ref, 30)


def test_a_row_has_the_same_bits_in_any_batch(isa):
    inputs = pool_inputs(40, 300, 130, [16, 5, 8])
    y = inputs.y.clone()
    add_("bgmv", y, inputs)
    for row in (0, 7, 39):
        alone = inputs.y[row : row + 1].clone()
        slots = inputs.token_slots[row : row + 1].clone()
        bgmv_(alone, inputs.x[row : row + 1], inputs.a_pool, inputs.b_pool, inputs.ranks, inputs.scalings, slots)
        assert torch.equal(alone[0], y[row])


@pytest.mark.parametrize("op", OPS)
def test_same_bits_for_any_thread_count(op):
    inputs = pool_inputs(300, 520, 390, [16, 64, 3], popularity="zipf")
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(run(op, inputs))
    finally:
        torch.set_num_threads(before)
    for y, grads in results[1:]:
        assert torch.equal(y, results[0][0])
        assert all(torch.equal(g.nan_to_num(), h.nan_to_num()) for g, h in zip(grads, results[0][1], strict=True))


def test_strided_input_and_output(isa):
    inputs = pool_inputs(15, 40, 36, [4, 7])
    y = inputs.y.clone()
    add_("bgmv", y, inputs)
    wide = torch.zeros(15, 100)
    wide[:, 30:66] = inputs.y
    x = inputs.x
    for strided in (x.t().contiguous().t(), torch.cat([x, x], 1)[:, 40:]):
        inputs.x = strided
        target = wide.clone()
        add_("bgmv", target[:, 30:66], inputs)
        assert torch.equal(target[:, 30:66], y)
        assert not torch.cat([target[:, :30], target[:, 66:]], 1).any()


def test_writing_counts_as_a_change():
    inputs = pool_inputs(4, 8, 8, [2])
    version = inputs.y._version
    add_("bgmv", inputs.y, inputs)
    assert inputs.y._version > version
    with torch.inference_mode():
        add_("bgmv", inputs.y.clone(), inputs)


def test_refuses_second_derivatives_and_leaves():
    inputs = pool_inputs(4, 8, 8, [2])
    inputs.x.requires_grad_()
    y = inputs.y.clone()
    add_("bgmv", y, inputs)
    with pytest.raises(NotImplementedError, match="bgmv_: no second derivative"):
        torch.autograd.grad(y.sum(), inputs.x, create_graph=True)
    with pytest.raises(NotImplementedError, match="bgmv_shrink: no derivative"):
        bgmv_shrink(inputs.x, inputs.a_pool, inputs.ranks, inputs.token_slots)
    b, v = inputs.b_pool.requires_grad_(), torch.zeros(4, 2)
    with pytest.raises(NotImplementedError, match="sgmv_expand_: no derivative"):
        sgmv_expand_(inputs.y, v, b, inputs.ranks, inputs.scalings, *inputs.sorted_segments())
    with pytest.raises(RuntimeError, match="y: expected a tensor that is no leaf"):
        add_("bgmv", inputs.y.requires_grad_(), inputs)


def int32(*values: int) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int32)


BAD = {
    "x: expected shape": {"x": torch.zeros(3)},
    "x: expected shape.*got .4, 9": {"x": torch.zeros(4, 9)},
    "y: expected shape.*4, 8": {"y": torch.zeros(4, 9)},
    "y: expected shape": {"y": torch.zeros(5, 8)},
    "y: expected the dtype of x": {"y": torch.zeros(4, 8, dtype=torch.bfloat16)},
    "x: expected float32, bfloat16": {"x": torch.zeros(4, 8, dtype=torch.int64)},
    "y: expected a column stride of 1": {"y": torch.zeros(8, 4).t()},
    "a_pool: expected shape": {"a_pool": torch.zeros(3, 2, 8)},
    "b_pool: expected shape": {"b_pool": torch.zeros(2, 3, 8)},
    "b_pool: expected the dtype of": {"b_pool": torch.zeros(2, 2, 8, dtype=torch.float16)},
    "ranks: expected int32": {"ranks": torch.tensor([1, 2])},
    "ranks: expected 0 to 2, got 3": {"ranks": int32(1, 3)},
    "ranks: expected 0 to 2, got -1": {"ranks": int32(-1, 2)},
    "scalings: expected float32": {"scalings": torch.ones(2, dtype=torch.float64)},
    "scalings: expected shape": {"scalings": torch.ones(3)},
    "token_slots: expected slots from -1 to 1, got 2 at 3": {"token_slots": int32(0, 1, -1, 2)},
    "token_slots: expected slots from -1 to 1, got -2": {"token_slots": int32(0, 1, -2, 1)},
    "token_slots: expected shape": {"token_slots": int32(0, 1)},
    "token_slots: expected int32": {"token_slots": torch.zeros(4, dtype=torch.int64)},
    "expected as many pools": {"b_pool": [torch.zeros(2, 2, 4), torch.zeros(2, 2, 4)]},
    "expected at least one pool": {"a_pool": [], "b_pool": []},
    "b_layout: expected 'rank_out' or 'out_rank'": {"b_layout": "whatever"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_input_is_refused_before_anything_is_touched(message):
    inputs = pool_inputs(4, 8, 8, [2, 1])
    names = ("y", "x", "a_pool", "b_pool", "ranks", "scalings", "token_slots")
    arguments = {name: getattr(inputs, name) for name in names} | BAD[message]
    before = arguments["y"].clone()
    with pytest.raises((ValueError, TypeError), match=f"bgmv_: .*{message}|bgmv_: {message}"):
        bgmv_(**arguments)
    assert torch.equal(arguments["y"], before)


@pytest.mark.parametrize(
    ("indptr", "slots", "message"),
    [
        (int32(0, 4), int32(0, 1), "segment_indptr: expected shape"),
        (int32(1, 4), int32(0), "segment_indptr: expected offsets from 0 to the 4 rows, got 1 to 4"),
        (int32(0, 3), int32(0), "segment_indptr: expected offsets from 0 to the 4 rows, got 0 to 3"),
        (int32(0, 3, 2, 4), int32(0, 1, 0), "segment_indptr: expected offsets that do not fall, got 3 before 2"),
        (int32(0, 4), int32(2), "segment_slots: expected slots from -1 to 1, got 2"),
        (torch.tensor([0, 4]), int32(0), "segment_indptr: expected int32"),
    ],
)
def test_bad_segments(indptr, slots, message):
    inputs = pool_inputs(4, 8, 8, [2, 1])
    before = inputs.y.clone()
    with pytest.raises((ValueError, TypeError), match=f"sgmv_: {message}"):
        sgmv_(inputs.y, inputs.x, inputs.a_pool, inputs.b_pool, inputs.ranks, inputs.scalings, indptr, slots)
    assert torch.equal(inputs.y, before)


def test_overlap_of_input_and_output_is_refused():
    inputs = pool_inputs(4, 8, 8, [2])
    inputs.x = inputs.y
    with pytest.raises(RuntimeError, match=r"same memory|single memory location"):
        add_("bgmv", inputs.y, inputs)


def test_opcheck():
    inputs = pool_inputs(6, 20, 12, [3, 5])
    a, b, ranks, scalings = [inputs.a_pool.nan_to_num()], [inputs.b_pool.nan_to_num()], inputs.ranks, inputs.scalings
    bgmv_args = (inputs.token_slots,)
    sgmv_args = inputs.sorted_segments()
    v = torch.zeros(1, 6, 5)
    for name, rows in (("bgmv", bgmv_args), ("sgmv", sgmv_args)):
        ops = torch.ops.pylora
        torch.library.opcheck(getattr(ops, f"{name}_"), (inputs.y, inputs.x, a, b, ranks, scalings, *rows))
        torch.library.opcheck(getattr(ops, f"{name}_shrink"), (inputs.x, a, ranks, *rows))
        torch.library.opcheck(getattr(ops, f"{name}_expand_"), (inputs.y, v, b, ranks, scalings, *rows))


def test_compiled_code_gives_the_same():
    """With and without gradients (torch.compile leaves the call with them to eager mode)."""
    inputs = pool_inputs(6, 20, 12, [3, 5])
    args = ([inputs.a_pool], [inputs.b_pool], inputs.ranks, inputs.scalings, inputs.token_slots)

    def add(x):
        y = inputs.y * 1
        torch.ops.pylora.bgmv_(y, x, *args)
        return y

    compiled = torch.compile(add, backend="aot_eager")
    assert torch.equal(compiled(inputs.x), add(inputs.x))
    x = inputs.x.clone().requires_grad_()
    y, y_eager = compiled(x), add(x)
    assert torch.equal(y, y_eager)
    assert torch.equal(torch.autograd.grad(y, x, inputs.dy)[0], torch.autograd.grad(y_eager, x, inputs.dy)[0])
