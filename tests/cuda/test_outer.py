"""outer, the sums over a slot's rows (csrc/cuda/outer.cu), emulated, held to f64."""

import itertools

import pytest
import torch

from pylora.ops.reference.lora import lora_dropout
from pylora.testing.cuda_segments import SegmentKernels, accumulator, shifted
from pylora.testing.emulator import SCHEDULES, emulated
from pylora.testing.lora import DTYPES, RNG
from pylora.testing.pools import pool_inputs
from pylora.testing.tolerances import assert_near

WIDTHS = [1, 17, 64, 136, 200]
RANKS = [[8], [1, 3, 0, 16], [64, 5], [70, 16, 2]]


def inputs_of(num_rows: int, width: int, ranks: list[int], dtype: torch.dtype, popularity: str, seed: int = 0):
    """x, g (NaN where a row has no such rank), ranks, scalings, row_slots."""
    inputs = pool_inputs(num_rows, width, 1, ranks, dtype, popularity=popularity, seed=seed)
    g = torch.randn(num_rows, max(ranks), dtype=accumulator(dtype))
    for row, slot in enumerate(inputs.token_slots.tolist()):
        g[row, (int(inputs.ranks[slot]) if slot >= 0 else 0) :] = torch.nan
    return inputs.x, g, inputs.ranks, inputs.scalings, inputs.token_slots


def check_sums(out, g, x, ranks, row_slots, factors=None) -> None:
    """x: f64, after dropout."""
    for slot, rank in enumerate(ranks.tolist()):
        mine = row_slots == slot
        factor = 1.0 if factors is None else float(factors[slot])
        gs, xs = g[mine, :rank].double() * factor, x[mine].double()
        sums_in = torch.float64 if g.dtype == torch.float64 else torch.float32
        # A g in two bf16 is good to 2^-17 of its terms: half a unit in the last place of a 16-bit result, 128 of f32.
        extra = 0 if g.dtype == torch.float64 else 2**14
        assert_near(out[slot, :rank], gs.T @ xs, len(gs) + extra, "d", gs.abs().T @ xs.abs(), sums_in=sums_in)
        assert bool(out[slot, rank:].isnan().all())


@pytest.mark.parametrize("dtype", DTYPES)
def test_grid(kernels, dtype):
    """Widths, ranks, popularities, numbers of rows and splits take turns; both layouts of the result."""
    popularities = itertools.cycle(["one", "uniform", "zipf", "skewed", "none", "distinct"])
    rows_of, splits = itertools.cycle([1, 2, 65, 64, 200, 7]), itertools.cycle([0, 1, 3])
    for i, (width, ranks) in enumerate(itertools.product(WIDTHS, RANKS)):
        x, g, slot_ranks, scalings, row_slots = inputs_of(
            next(rows_of), width, ranks, dtype, next(popularities), seed=i
        )
        plan = kernels.plan(row_slots)
        out = kernels.outer(
            plan,
            g,
            shifted(x, i % 3),
            len(ranks),
            accumulator(dtype),
            num_splits=next(splits),
            out_first=i % 2 == 1,
            scaled=i % 2 == 0,
            ranks=slot_ranks,
            scalings=scalings,
        )
        check_sums(out, g, x, slot_ranks, row_slots, scalings if i % 2 == 0 else None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_rows(kernels, dtype):
    """Every slot is written, with zeros."""
    x, g = torch.empty(0, 20, dtype=dtype), torch.empty(0, 6, dtype=accumulator(dtype))
    out = kernels.outer(kernels.one_slot(0), g, x, 1, dtype)
    assert torch.equal(out, torch.zeros(1, 6, 20, dtype=dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_others_do_not_reach_a_sum(kernels, dtype):
    """Not even as zero times NaN, where an item has no whole sixteen rows."""
    x, g, ranks, scalings, row_slots = inputs_of(39, 136, [9, 3], dtype, "distinct")
    row_slots[[0, 38]] = -1
    x[[0, 38]] = torch.nan
    plan = kernels.plan(row_slots)
    out = kernels.outer(plan, g, x, 2, accumulator(dtype), ranks=ranks, scalings=scalings)
    check_sums(out, g, x, ranks, row_slots)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_splits", [1, 2])
def test_dropout(kernels, dtype, num_splits):
    x, g, ranks, _, row_slots = inputs_of(150, 200, [19], dtype, "one")
    out = kernels.outer(kernels.one_slot(150), g, x, 1, accumulator(dtype), num_splits, dropout=(0.3, RNG))
    check_sums(out, g, lora_dropout(x, 0.3, RNG), ranks, row_slots)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_once_to_the_parameter(kernels, dtype):
    x, g, *_ = inputs_of(100, 40, [8], dtype, "one")
    rows = kernels.one_slot(100)
    sums = kernels.outer(rows, g, x, 1, accumulator(dtype))
    assert torch.equal(kernels.outer(rows, g, x, 1, dtype), sums.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_whoever_comes_last(dtype):
    x, g, ranks, scalings, row_slots = inputs_of(400, 136, [16, 7], dtype, "uniform")
    results = []
    for schedule in [*SCHEDULES, SCHEDULES[0]._replace(resident_blocks=16)]:
        with emulated(schedule) as module:
            kernels = SegmentKernels(module)
            plan = kernels.plan(row_slots)
            out = kernels.outer(plan, g, x, 2, torch.float32, 3, ranks=ranks, scalings=scalings)
            results.append(out.nan_to_num())
    assert all(torch.equal(out, results[0]) for out in results)


@pytest.mark.emulator
def test_tensor_core_work_is_the_least(kernels):
    """Ranks and rows in sixteens, columns in tiles of 128; g has two parts."""
    x, g, *_ = inputs_of(130, 256, [24], torch.bfloat16, "one")
    kernels.outer(kernels.one_slot(130), g, x, 1, torch.float32, 1)
    assert kernels.launches[-1]["mma"] == 9 * 2 * (256 // 8) * 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0, 1])
def test_blocks_take_one_piece_after_another(schedule, dtype, offset):
    """One multiprocessor: other ranks, columns and splits follow in the same shared memory; aligned and not."""
    x, g, ranks, scalings, row_slots = inputs_of(300, 264, [70, 16, 5], dtype, "uniform")
    with emulated(schedule, multiprocessors=1) as module:
        kernels = SegmentKernels(module)
        plan = kernels.plan(row_slots)
        for splits in (1, 2):
            slots = {"ranks": ranks, "scalings": scalings}
            out = kernels.outer(plan, g, shifted(x, offset), 3, accumulator(dtype), num_splits=splits, **slots)
            check_sums(out, g, x, ranks, row_slots)
