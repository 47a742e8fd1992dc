"""decode, shrink and expand in one launch (csrc/cuda/decode.cu), emulated, held to bgmv's definition in f64."""

import itertools

import pytest
import torch

from pylora.ops.reference.sgmv import bgmv
from pylora.testing.cuda_segments import SegmentKernels, shifted
from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_emulated
from pylora.testing.pools import PoolInputs, pool_inputs
from pylora.testing.tolerances import assert_near

DTYPES = [torch.bfloat16, torch.float16]
WIDTHS = [1, 17, 64, 200, 1100]
POPULARITIES = ["one", "distinct", "uniform", "zipf", "skewed", "none"]
RANKS = [[8], [1, 3, 0, 16], [64, 5], [70, 16, 2], [200, 1], [512]]


def expected(inputs: PoolInputs, absolute: bool = False) -> torch.Tensor:
    tensors = (inputs.y, inputs.x, inputs.a_pool, inputs.b_pool)
    y, x, a, b = (t.abs() if absolute else t for t in tensors)
    return bgmv(y, x, a, b, inputs.ranks, inputs.scalings, inputs.token_slots)


def check(kernels: SegmentKernels, inputs: PoolInputs, offset: int = 0, out_first: bool = False) -> torch.Tensor:
    y = shifted(inputs.y, offset)
    b = inputs.b_pool.transpose(1, 2).contiguous().transpose(1, 2) if out_first else inputs.b_pool
    slots = {"ranks": inputs.ranks, "scalings": inputs.scalings}
    kernels.decode(y, shifted(inputs.x, offset), [inputs.a_pool], [b], inputs.token_slots, **slots)
    length = inputs.x.shape[1] + inputs.a_pool.shape[1]
    assert_near(y, expected(inputs), length, "y", expected(inputs, absolute=True))
    untouched = inputs.token_slots < 0
    assert torch.equal(y[untouched], inputs.y[untouched])
    return y


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid(kernels, dtype):
    """Every pair of widths; ranks, popularities and numbers of rows take turns, aligned and not, B in both layouts."""
    turns = zip(itertools.cycle(RANKS), itertools.cycle(POPULARITIES), itertools.cycle([1, 2, 3, 7, 12]), strict=False)
    for i, (in_features, out_features) in enumerate(itertools.product(WIDTHS, WIDTHS)):
        ranks, popularity, tokens = next(turns)
        inputs = pool_inputs(tokens, in_features, out_features, ranks, dtype, popularity=popularity, seed=i)
        check(kernels, inputs, offset=i % 3, out_first=i % 2 == 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_empty(kernels, dtype):
    for tokens, in_features, out_features in [(0, 8, 8), (3, 0, 8), (3, 8, 0)]:
        check(kernels, pool_inputs(tokens, in_features, out_features, [4, 2], dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 8, 19])
def test_one_slot(kernels, dtype, rows):
    """lora's decode: groups of eight rows; v is wanted."""
    inputs = pool_inputs(rows, 1040, 520, [24], dtype, popularity="one")
    y = inputs.y.clone()
    v = kernels.decode(y, inputs.x, [inputs.a_pool], [inputs.b_pool], None, scaling=float(inputs.scalings[0]))
    assert_near(y, expected(inputs), 1064, "y", expected(inputs, absolute=True))
    x, a = inputs.x.double(), inputs.a_pool[0].double()
    close = {"magnitude": x.abs() @ a.abs().T, "sums_in": torch.float32}
    assert_near(v[0], x @ a.T, 1040, "v", **close)


@pytest.mark.parametrize("dtype", DTYPES)
def test_slices(kernels, dtype):
    """q, k and v in one launch."""
    parts = [pool_inputs(5, 600, out, [16, 5, 0, 24], dtype, seed=out) for out in (200, 64, 72)]
    first = parts[0]
    y = torch.cat([part.y for part in parts], 1)
    slots = {"ranks": first.ranks, "scalings": first.scalings}
    pools = [[part.a_pool for part in parts], [part.b_pool for part in parts]]
    kernels.decode(y, first.x, *pools, first.token_slots, **slots)
    assert len(kernels.launches) == (1 if is_emulated() else 0)
    for part, columns in zip(parts, y.split([200, 64, 72], 1), strict=True):
        part.x, part.token_slots, part.scalings = first.x, first.token_slots, first.scalings
        assert_near(columns, expected(part), 640, "y", expected(part, absolute=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whoever_comes_first(dtype):
    """One resident block, which has to do all the work in turn, up to sixteen; threads in any order."""
    inputs = pool_inputs(6, 1500, 700, [16, 7, 64], dtype)
    results = []
    for order, resident in itertools.product([0, 1, 7, 8], [1, 3, 16]):
        with emulated(Schedule(order, resident)) as module:
            results.append(check(SegmentKernels(module), inputs))
    assert all(torch.equal(y, results[0]) for y in results)


@pytest.mark.emulator
def test_bytes_of_a_row(kernels):
    """One pass over A and B a row: 64 adapters with a row each move little more than their factors."""
    inputs = pool_inputs(64, 1024, 1024, [16] * 64, torch.bfloat16, popularity="distinct")
    check(kernels, inputs)
    launch = kernels.launches[-1]
    least = 2 * (3 * inputs.y.numel() + inputs.a_pool.numel() + inputs.b_pool.numel())
    assert 32 * (launch["load_sectors"] + launch["store_sectors"]) <= 1.25 * least
    assert launch["load_bytes"] + launch["store_bytes"] <= 2 * least


def test_other_dtypes_are_refused():
    with emulated(SCHEDULES[0]) as module:
        inputs = pool_inputs(2, 8, 8, [4], torch.float32, popularity="one")
        with pytest.raises(RuntimeError, match="decode: expected bf16 or f16"):
            SegmentKernels(module).decode(inputs.y, inputs.x, [inputs.a_pool], [inputs.b_pool], None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_blocks_take_one_piece_after_another(schedule, dtype, offset):
    """One multiprocessor: other rows and ranks follow in the same shared memory; aligned and not."""
    inputs = pool_inputs(20, 1032, 392, [70, 16, 5], dtype, popularity="uniform")
    with emulated(schedule, multiprocessors=1) as module:
        check(SegmentKernels(module), inputs, offset)
