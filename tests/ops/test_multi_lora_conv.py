"""multi_lora_conv_ on the CPU, held against its definition in f64."""

import pytest
import torch

from pylora.ops import AdapterPools, BatchPlan, multi_lora_conv_
from pylora.ops.reference import multi_lora as reference
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROW_SLOTS = [2, -1, 0, 2, 1]
SCALINGS = [0.5, 2.0, 1.25]

# sizes of x behind the rows, output channels, kernel, stride, padding, dilation, groups
SLIDES = {
    "line": ((5, 300), 7, (3,), (1,), (1,), (1,), 1),
    "line, steps": ((4, 50), 9, (5,), (3,), (4,), (2,), 1),
    "line, no room to spare": ((3, 4), 5, (4,), (1,), (0,), (1,), 1),
    "plane": ((6, 13, 11), 8, (3, 3), (1, 1), (1, 1), (1, 1), 1),
    "plane, narrow": ((3, 40, 2), 5, (3, 3), (1, 1), (2, 1), (1, 1), 1),
    "plane, wide": ((2, 3, 1500), 3, (3, 3), (1, 1), (0, 1), (1, 2), 1),
    "patches": ((3, 24, 16), 20, (8, 8), (8, 8), (0, 0), (1, 1), 1),
    "a large kernel": ((2, 30, 25), 4, (17, 17), (1, 1), (8, 8), (1, 1), 1),
    "point": ((33, 9, 17), 14, (1, 1), (1, 1), (0, 0), (1, 1), 1),
    "point, steps": ((5, 9, 7), 4, (1, 1), (2, 2), (0, 1), (1, 1), 1),
    "groups": ((4, 12, 7), 12, (3, 2), (1, 1), (1, 1), (1, 1), 2),
    "volume": ((3, 5, 9, 8), 6, (3, 3, 3), (1, 1, 1), (1, 1, 1), (1, 1, 1), 1),
    "volume, steps": ((3, 5, 9, 8), 6, (2, 3, 3), (2, 1, 2), (0, 1, 1), (1, 2, 1), 1),
}


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def make(slide, ranks, dtype, factor_dtype=None, rows=5):
    """y, x, factors, gradient of y."""
    sizes, out, kernel, stride, padding, dilation, groups = SLIDES[slide]
    generator = torch.Generator().manual_seed(0)

    def normal(*size, to=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(to)

    ones = [1] * len(kernel)
    a = [normal(rank, sizes[0], *kernel, to=factor_dtype or dtype).requires_grad_() for rank in ranks]
    b = [normal(out, rank // groups, *ones, to=factor_dtype or dtype).requires_grad_() for rank in ranks]
    positions = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(sizes[1:], kernel, stride, padding, dilation, strict=True)
    ]
    y = normal(rows, out, *positions)
    return y.requires_grad_(), normal(rows, *sizes).requires_grad_(), a, b, normal(*y.shape)


def run(slide, base, x, a, b, slots=ROW_SLOTS):
    y = base.clone()
    plan = BatchPlan.from_slots(slots)
    multi_lora_conv_(y, x, AdapterPools(a, b, SCALINGS[: len(a)]), plan, *SLIDES[slide][3:])
    return y


def check(slide, ranks, dtype, factor_dtype=None):
    base, x, a, b, dy = make(slide, ranks, dtype, factor_dtype)
    leaves = [base, x, *a, *b]
    y = run(slide, base, x, a, b)
    grads = torch.autograd.grad(y, leaves, dy)
    results = []
    for absolute in (False, True):
        *wide, wide_dy = [t.detach().double().abs() if absolute else t.detach().double() for t in (*leaves, dy)]
        wide = [t.requires_grad_() for t in wide]
        y_ref = reference.multi_lora_conv(
            wide[0], wide[1], wide[2:5], wide[5:], SCALINGS, ROW_SLOTS, *SLIDES[slide][3:]
        )
        results.append((y_ref.detach(), torch.autograd.grad(y_ref, wide, wide_dy)))
    (y_ref, grads_ref), (y_size, grads_size) = results
    sums_in = torch.float64 if dtype == torch.float64 else torch.float32
    longest = max(a[0][0].numel(), dy[0].numel(), *ranks)
    assert_near(y.detach(), y_ref, longest, "y", y_size, roundings=3, sums_in=sums_in)
    for i, (leaf, grad, grad_ref, size) in enumerate(zip(leaves, grads, grads_ref, grads_size, strict=True)):
        assert grad.dtype == leaf.dtype
        assert_near(grad, grad_ref, longest, f"gradient {i}", size, sums_in=sums_in)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("slide", SLIDES)
def test_forward_and_backward(isa, slide, dtype):
    check(slide, [16, 2, 8], dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_factors_in_another_dtype(isa, dtype, factor_dtype):
    check("plane", [8, 1, 17], dtype, factor_dtype)


@pytest.mark.parametrize("slide", ["plane", "groups", "patches"])
def test_large_ranks(isa, slide):
    check(slide, [34, 600, 96], torch.float32)


def test_rows_without_an_adapter_keep_their_bits(isa):
    base, x, a, b, _ = make("plane", [16, 5, 8], torch.bfloat16)
    y = run("plane", base, x, a, b)
    for i, slot in enumerate(ROW_SLOTS):
        assert torch.equal(y[i], base[i]) == (slot < 0)


@pytest.mark.parametrize("slide", ["plane", "patches", "volume"])
def test_each_row_has_the_bits_of_its_adapter_alone(isa, slide):
    base, x, a, b, _ = make(slide, [16, 5, 8], torch.float32)
    y = run(slide, base, x, a, b)
    for i, slot in enumerate(ROW_SLOTS):
        assert torch.equal(y[i], run(slide, base[i : i + 1], x[i : i + 1], a, b, [slot])[0])


def test_threads_give_the_same_bits():
    base, x, a, b, _ = make("line", [16, 5, 8], torch.float32)
    before, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        try:
            results.append(run("line", base, x, a, b).detach())
        finally:
            torch.set_num_threads(before)
    assert torch.equal(*results)


def test_gradients_of_an_unused_adapter_are_zero():
    base, x, a, b, dy = make("plane", [4, 5, 2], torch.float32)
    y = run("plane", base, x, a, b, [0, 0, -1, 1, 1])
    *used, unused_a, unused_b = torch.autograd.grad(y, [a[0], b[0], a[2], b[2]], dy)
    assert all(bool(grad.any()) for grad in used)
    assert not unused_a.any()
    assert not unused_b.any()


def test_channels_last_inputs():
    base, x, a, b, _ = make("plane", [4, 5, 2], torch.float32)
    last = x.detach().contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    assert torch.equal(run("plane", base, last, a, b), run("plane", base, x, a, b))


def test_nothing_to_do():
    base, x, a, b, _ = make("plane", [2], torch.float32)
    assert torch.equal(run("plane", base, x, [], [], [-1] * 5), base)
    assert torch.equal(run("plane", base, x, a, b, [-1] * 5), base)
    assert run("plane", base[:0], x[:0], a, b, []).shape[0] == 0


GOOD = {
    "y": torch.zeros(4, 8, 9, 7),
    "x": torch.zeros(4, 6, 9, 7),
    "a": [torch.ones(2, 6, 3, 3), torch.ones(4, 6, 3, 3)],
    "b": [torch.ones(8, 2, 1, 1), torch.ones(8, 4, 1, 1)],
    "dropout": (),
    "slots": [0, 1, -1, 0],
    "slide": ((1, 1), (1, 1), (1, 1), 1),
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 1, 0]}, "y: expected 3 rows, as the plan has"),
        ({"slots": [0, 2, -1, 0]}, "slots: expected slots from -1 to 1, got 2"),
        ({"x": torch.zeros(4, 6, 9, 7).double()}, "x: expected the dtype of y"),
        ({"x": torch.zeros(4, 6)}, "x: expected 3 to 5 dimensions"),
        ({"x": torch.zeros(4, 5, 9, 7)}, "a: expected shape"),
        ({"x": torch.zeros(4, 6, 9, 8)}, "y: expected shape"),
        ({"y": torch.zeros(4, 8, 9, 6)}, "y: expected shape"),
        ({"y": torch.zeros(4, 7, 9, 7)}, "b: expected shape"),
        ({"y": torch.zeros(8, 4, 9, 7).transpose(0, 1)}, "y: expected a contiguous tensor"),
        ({"a": [torch.ones(2, 6, 3, 3), torch.ones(4, 6, 3, 2)]}, "a: expected shape"),
        ({"a": [torch.ones(2, 6, 3), torch.ones(4, 6, 3)]}, "a: expected shape"),
        ({"a": [torch.ones(2, 6, 30, 3), torch.ones(4, 6, 30, 3)]}, "a: expected a kernel that fits"),
        ({"b": [torch.ones(8, 2, 1, 1), torch.ones(8, 3, 1, 1)]}, "b: expected shape"),
        ({"b": [torch.ones(8, 2, 1, 1)]}, "b: expected as many as a, 2, got 1"),
        ({"slide": ((1,), (1, 1), (1, 1), 1)}, r"stride: expected 2 number\(s\) from 1 on"),
        ({"slide": ((0, 1), (1, 1), (1, 1), 1)}, r"stride: expected 2 number\(s\) from 1 on"),
        ({"slide": ((1, 1), (-1, 1), (1, 1), 1)}, r"padding: expected 2 number\(s\) from 0 on"),
        ({"slide": ((1, 1), (1, 1), (1, 0), 1)}, r"dilation: expected 2 number\(s\) from 1 on"),
        ({"slide": ((1, 1), (1, 1), (1, 1), 0)}, "groups: expected 1 or more"),
        ({"slide": ((1, 1), (1, 1), (1, 1), 4)}, "a: expected a rank that 4 groups divide"),
        ({"dropout": (0.0, 0.1)}, "pools: expected no dropout"),
    ],
)
def test_bad_input_touches_nothing(change, message):
    settings = GOOD | change
    y = settings["y"].clone(memory_format=torch.preserve_format)
    pools = AdapterPools(settings["a"], settings["b"], [1.0, 1.0], settings["dropout"])
    with pytest.raises((ValueError, TypeError), match=f"multi_lora_conv_: {message}"):
        multi_lora_conv_(y, settings["x"], pools, BatchPlan.from_slots(settings["slots"]), *settings["slide"])
    assert torch.equal(y, settings["y"])


def test_refuses_second_derivatives_and_leaves():
    base, x, a, b, _ = make("plane", [1, 1, 1], torch.float32)
    y = run("plane", base, x, a, b)
    with pytest.raises(NotImplementedError, match="multi_lora_conv_: no second derivative"):
        torch.autograd.grad(y.sum(), x, create_graph=True)
    plan = BatchPlan.from_slots(ROW_SLOTS)
    with pytest.raises(RuntimeError, match="y: expected a tensor that is no leaf"):
        multi_lora_conv_(base, x, AdapterPools(a, b, SCALINGS), plan, *SLIDES["plane"][3:])


def test_opcheck_and_compile():
    base, x, a, b, _ = make("plane", [2, 3, 1], torch.float32)
    base, x, a, b = base.detach(), x.detach(), [t.detach() for t in a], [t.detach() for t in b]
    plan = BatchPlan.from_slots(ROW_SLOTS)
    args = (base, x, a, b, SCALINGS, *plan, *SLIDES["plane"][3:])
    torch.library.opcheck(torch.ops.pylora.multi_lora_conv_, args, test_utils=("test_schema", "test_faketensor"))
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled("plane", base, x, a, b), run("plane", base, x, a, b))
