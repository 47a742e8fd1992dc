"""multi_lora_linear and BatchPlan on the CPU, held against their definitions in f64."""

import pytest
import torch

from pylora.ops import AdapterPools, BatchPlan, lora_linear, multi_lora_linear
from pylora.ops.reference import multi_lora as reference
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RNG = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])
ROW_SLOTS = [2, -1, 0, 2, 1, 0, -1]


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def make(shape, out_features, ranks, dtype, factor_dtype=None, seed=0):
    """x, weight, bias, factors, gradient of y."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0, to=dtype):
        return (torch.randn(*size, generator=generator, dtype=torch.float64) * scale).to(to).requires_grad_()

    width = shape[-1]
    factor_dtype = factor_dtype or dtype
    a = [normal(rank, width, scale=width**-0.5, to=factor_dtype) for rank in ranks]
    b = [normal(out_features, rank, scale=rank**-0.5, to=factor_dtype) for rank in ranks]
    weight, bias = normal(out_features, width, scale=width**-0.5), normal(out_features)
    return normal(*shape), weight, bias, a, b, normal(*shape[:-1], out_features).detach()


def check(shape, out_features, ranks, dtype, factor_dtype=None, dropout_p=()):
    x, weight, bias, a, b, dy = make(shape, out_features, ranks, dtype, factor_dtype)
    scalings = [0.5, 2.0, 1.25]
    y = multi_lora_linear(
        x, weight, bias, AdapterPools(a, b, scalings, dropout_p), BatchPlan.from_slots(ROW_SLOTS), RNG
    )
    leaves = [x, weight, bias, *a, *b]
    grads = torch.autograd.grad(y, leaves, dy)
    results = []
    for absolute in (False, True):
        wide = [t.detach().double() for t in (*leaves, dy)]
        *wide, wide_dy = [t.abs() if absolute else t for t in wide]
        wide = [t.requires_grad_() for t in wide]
        wx, ww, wb, *factors = wide
        y_ref = reference.multi_lora_linear(ww.new_tensor(0) + wx, ww, wb, factors[:3], factors[3:], scalings,
                                            ROW_SLOTS, dropout_p, RNG)  # fmt: skip
        results.append((y_ref.detach(), torch.autograd.grad(y_ref, wide, wide_dy)))
    (y_ref, grads_ref), (y_size, grads_size) = results
    sums_in = torch.float64 if dtype == torch.float64 else torch.float32
    longest = max(*shape, out_features, *ranks)
    assert_near(y, y_ref, longest, "y", y_size, roundings=3, sums_in=sums_in)
    for i, (leaf, grad, grad_ref, size) in enumerate(zip(leaves, grads, grads_ref, grads_size, strict=True)):
        assert grad.dtype == leaf.dtype
        assert_near(grad, grad_ref, longest, f"gradient {i}", size, sums_in=sums_in)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [(), (0.0, 0.5, 0.1)])
def test_forward_and_backward(isa, dtype, dropout_p):
    check((7, 33), 70, [16, 3, 8], dtype, dropout_p=dropout_p)
    check((7, 5, 130), 33, [1, 64, 9], dtype, dropout_p=dropout_p)
    check((7, 2, 2, 40), 64, [4, 4, 4], dtype, dropout_p=dropout_p)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_factors_in_another_dtype(isa, dtype, factor_dtype):
    check((7, 3, 65), 48, [8, 2, 17], dtype, factor_dtype)


def test_adapters_of_different_dtypes():
    x, weight, bias, a, b, _ = make((7, 20), 10, [2, 3, 4], torch.bfloat16)
    a[1], b[1] = a[1].float(), b[1].float()
    y = multi_lora_linear(x, weight, bias, AdapterPools(a, b, [1.0, 1.0, 1.0]), BatchPlan.from_slots(ROW_SLOTS))
    y_ref = reference.multi_lora_linear(x, weight, bias, a, b, [1.0, 1.0, 1.0], ROW_SLOTS)
    assert_near(y.detach(), y_ref.detach(), 20, roundings=3)


def test_each_row_has_the_bits_of_its_adapter_alone(isa):
    """Of the low-rank part: the weight is zero."""
    x, _, _, a, b, _ = make((7, 6, 300), 130, [16, 5, 8], torch.float32)
    weight, pools = torch.zeros(130, 300), AdapterPools(a, b, [0.3, 2.1, 3.7])
    y = multi_lora_linear(x, weight, None, pools, BatchPlan.from_slots(ROW_SLOTS))
    for i, slot in enumerate(ROW_SLOTS):
        alone = multi_lora_linear(x[i : i + 1], weight, None, pools, BatchPlan.from_slots([slot]))
        assert torch.equal(y[i], alone[0])
        assert bool(y[i].any()) == (slot >= 0)


def test_gradients_of_an_adapter_are_those_of_its_own_rows(isa):
    x, weight, _, a, b, dy = make((7, 4, 96), 64, [16, 3, 8], torch.float32)
    y = multi_lora_linear(x, weight, None, AdapterPools(a, b, [1.0] * 3), BatchPlan.from_slots(ROW_SLOTS))
    grads = torch.autograd.grad(y, [*a, *b], dy)
    for slot in range(3):
        rows = [i for i, each in enumerate(ROW_SLOTS) if each == slot]
        alone = lora_linear(x[rows], weight, None, a[slot], b[slot], 1.0)
        for grad, own in zip(
            (grads[slot], grads[3 + slot]), torch.autograd.grad(alone, (a[slot], b[slot]), dy[rows]), strict=True
        ):
            torch.testing.assert_close(grad, own, rtol=1e-4, atol=1e-5)


def test_dropout_counts_rows_of_x():
    """A row drops the same elements whatever adapters its neighbours use."""
    x, weight, _, a, b, _ = make((4, 3, 64), 32, [4, 4], torch.float32)
    pools = AdapterPools(a, b, [1.0, 1.0], (0.5, 0.5))
    first = multi_lora_linear(x, weight, None, pools, BatchPlan.from_slots([0, 1, 0, 1]), RNG)
    second = multi_lora_linear(x, weight, None, pools, BatchPlan.from_slots([1, 1, 0, -1]), RNG)
    assert torch.equal(first[1:3], second[1:3])
    assert not torch.equal(first[0], second[0])


def test_dropout_is_seeded_by_torch():
    x, weight, _, a, b, _ = make((4, 64), 32, [4], torch.float32)
    pools, plan = AdapterPools(a, b, [1.0], [0.5]), BatchPlan.from_slots([0, 0, -1, 0])
    runs = []
    for seed in (1, 2, 1):
        torch.manual_seed(seed)
        runs.append(multi_lora_linear(x, weight, None, pools, plan))
    assert torch.equal(runs[0], runs[2])
    assert not torch.equal(runs[0], runs[1])


def test_stacked_pools_are_views():
    a_pool, b_pool = torch.randn(2, 8, 16), torch.randn(2, 8, 12)
    pools = AdapterPools.stacked(a_pool, b_pool, [3, 8], [1.0, 2.0])
    assert (pools.a[0].data_ptr(), pools.b[1].data_ptr()) == (a_pool.data_ptr(), b_pool[1].data_ptr())
    assert (pools.a[0].shape, pools.b[1].shape) == ((3, 16), (12, 8))
    x, weight = torch.randn(3, 16), torch.randn(12, 16)
    y = multi_lora_linear(x, weight, None, pools, BatchPlan.from_slots([1, -1, 0]))
    assert_near(y, reference.multi_lora_linear(x, weight, None, pools.a, pools.b, [1.0, 2.0], [1, -1, 0]), 16)


def test_no_adapter_and_no_rows():
    x, weight, bias, _, _, _ = make((3, 5), 4, [1], torch.float32)
    y = multi_lora_linear(x, weight, bias, AdapterPools([], [], []), BatchPlan.from_slots([-1, -1, -1]))
    assert_near(y.detach(), reference.multi_lora_linear(x, weight, bias, [], [], [], [-1] * 3).detach(), 5)
    empty = multi_lora_linear(x[:0], weight, bias, AdapterPools([], [], []), BatchPlan.from_slots([]))
    assert empty.shape == (0, 4)


def test_autocast():
    x, weight, bias, a, b, _ = make((7, 3, 64), 32, [4, 2, 3], torch.float32)
    plan = BatchPlan.from_slots(ROW_SLOTS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = multi_lora_linear(x, weight, bias, AdapterPools(a, b, [1.0] * 3), plan)
    assert y.dtype == torch.bfloat16
    y_ref = reference.multi_lora_linear(x, weight, bias, a, b, [1.0] * 3, ROW_SLOTS)
    torch.testing.assert_close(y.double(), y_ref, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 20)}, "x: expected 7 rows, as the plan has"),
        ({"x": torch.zeros(7, 21)}, "weight: expected shape"),
        ({"weight": torch.zeros(10, 20, dtype=torch.float64)}, "weight: expected the dtype of x"),
        ({"bias": torch.zeros(11)}, "bias: expected shape"),
        ({"a": [torch.zeros(2, 20), torch.zeros(3, 19)]}, "a: expected shape"),
        ({"b": [torch.zeros(10, 2), torch.zeros(10, 4)]}, "b: expected shape"),
        ({"b": [torch.zeros(10, 2)]}, "b: expected as many as a, 2, got 1"),
        ({"scalings": [1.0]}, "b: expected as many as a, 2, got 2 and 1 scalings"),
        ({"dropout": [0.5]}, "dropout: expected none or 2, got 1"),
        ({"dropout": [0.5, 1.5]}, "dropout_p: expected a probability"),
        ({"slots": [0, 2, 1, 0, 0, 0, 0]}, "slots: expected slots from -1 to 1, got 2"),
    ],
)
def test_bad_input(change, message):
    settings = {
        "x": torch.zeros(7, 20),
        "weight": torch.zeros(10, 20),
        "bias": torch.zeros(10),
        "a": [torch.zeros(2, 20), torch.zeros(3, 20)],
        "b": [torch.zeros(10, 2), torch.zeros(10, 3)],
        "scalings": [1.0, 1.0],
        "dropout": [],
        "slots": [0, 1, 1, 0, 0, 0, 0],
    } | change
    pools = AdapterPools(settings["a"], settings["b"], settings["scalings"], settings["dropout"])
    plan = BatchPlan.from_slots(settings["slots"])
    with pytest.raises((ValueError, TypeError), match=f"multi_lora_linear: {message}"):
        multi_lora_linear(settings["x"], settings["weight"], settings["bias"], pools, plan, RNG)


def test_bad_plan():
    x, weight, bias, a, b, _ = make((3, 5), 4, [1, 1], torch.float32)
    broken = BatchPlan.from_slots([0, 1, 0])._replace(order=torch.zeros(3, dtype=torch.int32))
    with pytest.raises(ValueError, match="order: expected each row from 0 to 2 once, got 0 at 1"):
        multi_lora_linear(x, weight, bias, AdapterPools(a, b, [1.0, 1.0]), broken)


def test_refuses_second_derivatives():
    x, weight, _, a, b, _ = make((7, 5), 4, [1, 1, 1], torch.float32)
    y = multi_lora_linear(x, weight, None, AdapterPools(a, b, [1.0] * 3), BatchPlan.from_slots(ROW_SLOTS))
    with pytest.raises(NotImplementedError, match="multi_lora_linear: no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


def test_plan():
    plan = BatchPlan.from_slots(torch.tensor([3, -1, 0, 3, 0]))
    assert plan.order.tolist() == [1, 2, 4, 0, 3]
    assert plan.segment_indptr.tolist() == [0, 1, 3, 5]
    assert plan.segment_slots.tolist() == [-1, 0, 3]
    assert plan.num_rows == 5
    assert all(t.dtype == torch.int32 for t in plan)
    assert BatchPlan.from_slots([]).segment_indptr.tolist() == [0]
    with pytest.raises(ValueError, match="expected slots from -1 on, got -2"):
        BatchPlan.from_slots([0, -2])
    with pytest.raises(ValueError, match="expected one dimension"):
        BatchPlan.from_slots(torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(TypeError, match="expected integers"):
        BatchPlan.from_slots(torch.zeros(2))


def test_opcheck():
    x, weight, bias, a, b, _ = make((7, 3, 12), 10, [2, 3, 1], torch.float32)
    plan = BatchPlan.from_slots(ROW_SLOTS)
    torch.library.opcheck(torch.ops.pylora.multi_lora_linear, (x, weight, bias, a, b, [1.0, 0.5, 2.0], [], None, *plan))
