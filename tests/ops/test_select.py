"""keep_largest, held against torch.topk element for element."""

import math

import pytest
import torch

from pylora.ops import keep_largest
from pylora.ops.reference import select as reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def normal(*shape, dtype=torch.float32, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def check(x, count):
    before = x.clone()
    out = keep_largest(x, count)
    assert out.shape == x.shape
    assert out.dtype == x.dtype
    assert out.is_contiguous()
    assert torch.equal(torch.nan_to_num(x), torch.nan_to_num(before))
    torch.testing.assert_close(out, reference.keep_largest(x, count), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [1, 2, 3, 5, 64, 1001, 70_000])
def test_every_size_and_count(dtype, size):
    x = normal(size, dtype=dtype)
    for count in sorted({0, 1, size // 3, size // 2, size - 1, size}):
        check(x, count)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_magnitudes_far_apart_and_subnormal(dtype, scale):
    x = normal(4000).double() * torch.logspace(-12, 3, 4000, dtype=torch.float64) * scale
    x = x.to(dtype)
    check(x, 1700)


@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_magnitudes_are_chosen_as_topk_does(dtype):
    x = (normal(6000) * 3).round().to(dtype)
    for count in (1, 10, 2500, 5999):
        check(x, count)
        assert int((keep_largest(x, count) != 0).sum()) == min(count, int((x != 0).sum()))
    check(torch.ones(50, dtype=dtype), 20)
    check(torch.zeros(50, dtype=dtype), 20)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite(dtype):
    x = normal(300, dtype=dtype)
    x[[3, 50]] = math.inf
    x[7] = -math.inf
    for count in (2, 3, 100):
        check(x, count)
    x[[9, 11]] = math.nan
    for count in (1, 2, 4, 100):
        check(x, count)


def test_values_that_differ_in_the_last_bits():
    """The second histogram decides: magnitudes that share their first sixteen bits."""
    bits = torch.arange(1_000) + 0x3F800000
    x = bits.to(torch.int32).view(torch.float32)[torch.randperm(1000, generator=torch.Generator().manual_seed(0))]
    for count in (1, 400, 999):
        check(x, count)
    wide = (torch.arange(1000) + 0x3FF0000000000000).view(torch.float64)
    check(wide, 333)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_shapes(dtype):
    x = normal(40, 30, dtype=dtype)
    for view in (x.t(), x[::2, 3:], x.view(4, 10, 30).permute(2, 0, 1), x[0, 0]):
        check(view, view.numel() // 2)
    assert keep_largest(torch.empty(0, 3, dtype=dtype), 0).shape == (0, 3)


def test_any_number_of_threads():
    x = normal(300_000)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = keep_largest(x, 100_000)
        torch.set_num_threads(3)
        assert torch.equal(keep_largest(x, 100_000), one)
    finally:
        torch.set_num_threads(threads)


def test_errors():
    with pytest.raises(ValueError, match="keep_largest: count: expected 0 to the size of x, 5, got 6"):
        keep_largest(torch.ones(5), 6)
    with pytest.raises(ValueError, match="keep_largest: count: expected 0 to the size of x, 5, got -1"):
        keep_largest(torch.ones(5), -1)
    with pytest.raises(TypeError, match="keep_largest: x: expected float32, bfloat16, float16 or float64, got Int"):
        keep_largest(torch.ones(5, dtype=torch.int32), 2)


def test_opcheck():
    torch.library.opcheck(torch.ops.pylora.keep_largest.default, (normal(13, 7), 40))
    torch.library.opcheck(torch.ops.pylora.keep_largest.default, (normal(13, 7).t(), 0))


def test_compiled():
    compiled = torch.compile(lambda x: keep_largest(x * 2, 20), backend="aot_eager", fullgraph=True)
    x = normal(10, 9)
    assert torch.equal(compiled(x), keep_largest(x * 2, 20))


def test_of_other_devices():
    """What CUDA tensors go through, run here on the CPU."""
    x = normal(500)
    by_topk = torch.ops.pylora.keep_largest.default._op_dk(torch._C.DispatchKey.CompositeExplicitAutograd, x, 200)
    assert torch.equal(by_topk, keep_largest(x, 200))
