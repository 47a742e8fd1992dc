"""DoRA's CUDA kernels (csrc/dora/norms.cu, scale.cu), emulated, held to the op's definition in f64."""

import itertools

import pytest
import torch
from torch import Tensor

from pylora.ops.cost import cuda as cost
from pylora.ops.reference.dora import dora_row_norms
from pylora.testing.cuda_segments import accumulator, planes, shifted
from pylora.testing.emulator import SCHEDULES, emulated, is_emulated
from pylora.testing.lora import DTYPES
from pylora.testing.tolerances import assert_near

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float32, torch.bfloat16),
]
"""dtypes of the weight and of the factors."""
NORM_ERROR = 1e-6
"""Relative: elements in f32, their squares in f32 over at most 128 columns."""


@pytest.fixture
def device(schedule):
    with emulated(schedule) as module:
        yield module


def workspace(num_bytes: int, num_counter_bytes: int) -> Tensor:
    """NaN but for the counters."""
    memory = planes(num_bytes)
    memory[:num_counter_bytes] = 0
    return memory


def norms(device, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    shape = {
        "out_features": weight.shape[0],
        "in_features": weight.shape[1],
        "rank": len(a),
        "dtype": weight.dtype,
        "factor_dtype": a.dtype,
    }
    memory = workspace(device.dora.norms_workspace_bytes(**shape), device.dora.norms_counter_bytes(**shape))
    result = torch.full((len(weight),), torch.nan, dtype=torch.float64)
    device.dora.norms(**shape, scaling=scaling, weight=weight, a=a, b=b, norms=result, workspace=memory)
    assert not memory[: device.dora.norms_counter_bytes(**shape)].any()
    return result


def check_norms(device, weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> None:
    result, expected = norms(device, weight, a, b, scaling), dora_row_norms(weight, a, b, scaling)
    error = 1e-13 if weight.dtype == torch.float64 else NORM_ERROR
    assert bool(((result - expected).abs() <= error * expected).all())


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_norms(device, dtype, factor_dtype):
    """Sizes, ranks and alignments take turns; columns of B and rows of W that lie apart."""
    sizes = [(1, 1), (65, 17), (64, 128), (130, 136), (70, 1100), (3, 512)]
    for i, ((out, width), rank) in enumerate(zip(sizes, itertools.cycle([1, 8, 16, 70, 64]), strict=False)):
        weight = torch.randn(out, width).to(dtype)
        a, b = torch.randn(rank, width).to(factor_dtype), torch.randn(out, rank).to(factor_dtype)
        check_norms(device, weight, a, b, 0.5)
        check_norms(device, shifted(weight, i % 3), shifted(a, i % 3), b.T.contiguous().T, -2.0)
    check_norms(device, weight.T.contiguous().T, a, b, 1.0)


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
@pytest.mark.parametrize("rank", [8, 70])
def test_blocks_take_one_piece_after_another(schedule, dtype, factor_dtype, rank):
    """One multiprocessor: other rows and parts of the width follow in the same shared memory."""
    weight, a = torch.randn(400, 1040).to(dtype), torch.randn(rank, 1040).to(factor_dtype)
    with emulated(schedule, multiprocessors=1) as device:
        check_norms(device, weight, a, torch.randn(400, rank).to(factor_dtype), 0.5)


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_norms_of_nothing(device, dtype, factor_dtype):
    for out, width in [(0, 8), (5, 0)]:
        a, b = torch.randn(3, width).to(factor_dtype), torch.randn(out, 3).to(factor_dtype)
        check_norms(device, torch.randn(out, width).to(dtype), a, b, 1.0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_the_product_cancels(device, dtype):
    """Only what rounding left of them, to the precision of f64; and rows whose squares f32 cannot hold."""
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(8, 256, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(70, 8, generator=generator, dtype=torch.float64).to(dtype)
    weight = (b.double() @ a.double() * 2.0).to(dtype)
    weight[::3] = torch.randn(24, 256, generator=generator, dtype=torch.float64).to(dtype)
    if dtype != torch.float16:
        weight[6] = 1e30
    result, expected = norms(device, weight, a, b, -2.0), dora_row_norms(weight, a, b, -2.0)
    assert bool(expected.isfinite().all())
    assert bool(((result - expected).abs() <= NORM_ERROR * expected + 1e-13 * weight.double().norm(dim=1)).all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whoever_comes_last(dtype):
    """The width is split over blocks."""
    weight, a, b = (torch.randn(*shape).to(dtype) for shape in [(90, 2100), (16, 2100), (90, 16)])
    results = []
    for schedule in [*SCHEDULES, SCHEDULES[0]._replace(resident_blocks=16)]:
        with emulated(schedule) as module:
            results.append(norms(module, weight, a, b, 0.5))
            if is_emulated():
                assert module.take_launches()[-1]["blocks"] > 2
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
def test_squares(device, dtype):
    for out, width in [(1, 1), (9, 700), (0, 4), (3, 0)]:
        weight = torch.randn(out, width).to(dtype)
        for given in (weight, weight.T.contiguous().T):
            squares = torch.full((out,), torch.nan, dtype=torch.float64)
            fields = {"out_features": out, "in_features": width, "dtype": dtype}
            device.dora.squares(**fields, weight=given, squares=squares)
            assert torch.allclose(squares, weight.double().square().sum(1), rtol=1e-6)


def factors(norms: Tensor, magnitude: Tensor) -> Tensor:
    rounded = norms.to(magnitude.dtype).double()
    return magnitude.double() / torch.where(rounded == 0, 1.0, rounded)


@pytest.mark.parametrize("magnitude_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale(device, dtype, magnitude_dtype):
    """With and without rest and bias, in place and not; the factor of a zero norm is the magnitude."""
    sums_in = accumulator(dtype)
    for i, (tokens, out) in enumerate([(1, 1), (70, 130), (3, 1100), (0, 8), (129, 24)]):
        z, rest = shifted(torch.randn(tokens, out).to(dtype), i % 2), torch.randn(tokens, out).to(dtype)
        bias, magnitude = torch.randn(out).to(dtype), torch.rand(out).to(magnitude_dtype)
        norms = torch.rand(out, dtype=torch.float64) + 0.5
        norms[0] = 0
        expected = factors(norms, magnitude) * z.double()
        size = expected.abs() + rest.double().abs() + bias.double().abs()
        common = {"num_tokens": tokens, "out_features": out, "dtype": dtype, "magnitude_dtype": magnitude_dtype}
        common |= {"magnitude": magnitude, "norms": norms}
        y = torch.full((tokens, out), torch.nan, dtype=dtype)
        device.dora.scale(**common, z=z, rest=rest, bias=bias, y=y)
        assert_near(y, expected + rest.double() + bias.double(), 3, "y", size, sums_in=sums_in)
        device.dora.scale(**common, z=z, y=z)
        assert_near(z, expected, 3, "z", size, sums_in=sums_in)


@pytest.mark.parametrize("magnitude_dtype", DTYPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_backward(device, dtype, magnitude_dtype):
    sums_in = accumulator(dtype)
    for i, (tokens, out) in enumerate([(1, 1), (70, 130), (200, 1100), (0, 8), (129, 24)]):
        dy, z = shifted(torch.randn(tokens, out).to(dtype), i % 2), torch.randn(tokens, out).to(dtype)
        magnitude, norms = torch.rand(out).to(magnitude_dtype), torch.rand(out, dtype=torch.float64) + 0.5
        common = {"num_tokens": tokens, "out_features": out, "dtype": dtype, "magnitude_dtype": magnitude_dtype}
        counters = device.dora.scale_counter_bytes(**common)
        memory = workspace(device.dora.scale_workspace_bytes(**common), counters)
        dz, dmagnitude = torch.full((tokens, out), torch.nan, dtype=dtype), torch.full((out,), torch.nan, dtype=sums_in)
        tensors = {"magnitude": magnitude, "norms": norms, "dy": dy, "z": z, "workspace": memory}
        device.dora.scale_backward(**common, **tensors, dz=dz, dmagnitude=dmagnitude)
        assert not memory[:counters].any()
        expected = factors(norms, magnitude) * dy.double()
        assert_near(dz, expected, 3, "dz", expected.abs(), sums_in=sums_in)
        divisor = norms.to(magnitude_dtype).double()
        sizes = (dy.double() * z.double()).abs().sum(0) / divisor
        assert_near(dmagnitude, (dy.double() * z.double()).sum(0) / divisor, tokens + 2, "dmagnitude", sizes)


@pytest.mark.emulator
def test_bytes_of_scale():
    tokens, out = 200, 2048
    z, dy = torch.randn(tokens, out).bfloat16(), torch.randn(tokens, out).bfloat16()
    magnitude, norms = torch.rand(out).bfloat16(), torch.rand(out, dtype=torch.float64) + 0.5
    common = {"num_tokens": tokens, "out_features": out, "dtype": z.dtype, "magnitude_dtype": magnitude.dtype}
    common |= {"magnitude": magnitude, "norms": norms}
    with emulated(SCHEDULES[0], multiprocessors=108) as device:
        device.dora.scale(**common, z=z, y=torch.empty_like(z))
        memory = workspace(device.dora.scale_workspace_bytes(**common), device.dora.scale_counter_bytes(**common))
        gradients = {"dz": torch.empty_like(z), "dmagnitude": torch.empty(out)}
        device.dora.scale_backward(**common, dy=dy, z=z, workspace=memory, **gradients)
        launches = device.take_launches()
    shape = (tokens, out, "bfloat16")
    for launch, cost_of in zip(launches, [cost.dora_scale, cost.dora_scale_backward], strict=True):
        least = cost_of(*shape).bytes
        assert least <= 32 * (launch["load_sectors"] + launch["store_sectors"]) <= 1.25 * least
        assert launch["load_bytes"] + launch["store_bytes"] <= 2 * least


@pytest.mark.emulator
@pytest.mark.parametrize("rank", [8, 16, 64])
def test_bytes_of_norms(rank):
    """W passes once; A is asked for again for each 64 rows, which an L2 cache holds."""
    weight, a, b = (torch.randn(*shape).bfloat16() for shape in [(1024, 2048), (rank, 2048), (1024, rank)])
    with emulated(SCHEDULES[0], multiprocessors=108) as device:
        norms(device, weight, a, b, 0.5)
        (launch,) = device.take_launches()
    least = cost.dora_norms(1024, 2048, rank, "bfloat16").bytes
    assert least <= 32 * (launch["load_sectors"] + launch["store_sectors"]) <= 1.25 * least
    assert launch["load_bytes"] + launch["store_bytes"] <= 2 * least
    assert launch["mma"] == (1024 // 16) * (2048 // 8) * -(-rank // 16)
