"""shrink and expand over segments (csrc/cuda/segments.h), emulated, held to sgmv's definition in f64."""

import itertools

import pytest
import torch

from pylora.ops.reference.lora import lora_dropout
from pylora.ops.reference.sgmv import bgmv
from pylora.testing.cuda_segments import SegmentKernels, shifted
from pylora.testing.emulator import SCHEDULES, emulated, is_emulated
from pylora.testing.lora import RNG
from pylora.testing.pools import PoolInputs, pool_inputs
from pylora.testing.tolerances import assert_near

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.float32, torch.bfloat16),
]
"""dtypes of the activations and of the pools."""
TENSOR_PAIRS = [PAIRS[1], PAIRS[2]]
WIDTHS = [1, 17, 64, 200, 520]
POPULARITIES = ["one", "distinct", "uniform", "zipf", "skewed", "none"]
RANKS = [[8], [1, 3, 0, 16], [64, 5], [70, 16, 2], [200, 1], [512]]


def sums_in(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def expected(inputs: PoolInputs, absolute: bool = False) -> torch.Tensor:
    tensors = (inputs.y, inputs.x, inputs.a_pool, inputs.b_pool)
    y, x, a, b = (t.abs() if absolute else t for t in tensors)
    return bgmv(y, x, a, b, inputs.ranks, inputs.scalings, inputs.token_slots)


def expected_v(inputs: PoolInputs, absolute: bool = False) -> torch.Tensor:
    """v in f64, zeros beyond ranks."""
    x, pool = inputs.x.double(), inputs.a_pool.double()
    if absolute:
        x, pool = x.abs(), pool.abs()
    v = torch.zeros(len(x), pool.shape[1], dtype=torch.float64)
    for row, slot in enumerate(inputs.token_slots.tolist()):
        if slot >= 0:
            rank = int(inputs.ranks[slot])
            v[row, :rank] = pool[slot, :rank] @ x[row]
    return v


def check(kernels: SegmentKernels, inputs: PoolInputs, offset: int = 0, out_first: bool = False) -> None:
    plan = kernels.plan(inputs.token_slots)
    slots = {"ranks": inputs.ranks, "scalings": inputs.scalings}
    v = kernels.shrink(plan, shifted(inputs.x, offset), [inputs.a_pool], **slots)
    length = inputs.x.shape[1] + inputs.a_pool.shape[1]
    rank_of = torch.where(inputs.token_slots >= 0, inputs.ranks[inputs.token_slots.clamp(min=0).long()], 0)
    written = torch.arange(v.shape[2])[None] < rank_of[:, None]
    assert torch.equal(~v[0].isnan(), written)
    close = {"magnitude": expected_v(inputs, absolute=True), "sums_in": sums_in(inputs.x.dtype)}
    assert_near(v[0].nan_to_num(), expected_v(inputs), length, "v", **close)
    b = inputs.b_pool.transpose(1, 2).contiguous().transpose(1, 2) if out_first else inputs.b_pool
    y = shifted(inputs.y, offset)
    kernels.expand(plan, y, v, [b], **slots)
    assert_near(y, expected(inputs), length, "y", expected(inputs, absolute=True), sums_in=sums_in(y.dtype))
    untouched = rank_of == 0
    assert torch.equal(y[untouched], inputs.y[untouched])


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
def test_grid(kernels, dtype, pool_dtype):
    """Every pair of widths; ranks, popularities and numbers of rows take turns, aligned and not, B in both layouts."""
    turns = zip(
        itertools.cycle(RANKS), itertools.cycle(POPULARITIES), itertools.cycle([1, 2, 63, 64, 65, 130, 7]), strict=False
    )
    for i, (in_features, out_features) in enumerate(itertools.product(WIDTHS, WIDTHS)):
        ranks, popularity, tokens = next(turns)
        inputs = pool_inputs(tokens, in_features, out_features, ranks, dtype, pool_dtype, popularity, seed=i)
        check(kernels, inputs, offset=i % 3, out_first=i % 2 == 1)


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
def test_empty(kernels, dtype, pool_dtype):
    for tokens, in_features, out_features in [(0, 8, 8), (3, 0, 8), (3, 8, 0)]:
        check(kernels, pool_inputs(tokens, in_features, out_features, [4, 2], dtype, pool_dtype))


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
def test_rows_of_others_do_not_reach_a_row(kernels, dtype, pool_dtype):
    """Not even as zero times NaN, where an item has no whole sixteen rows, in either alignment."""
    for width in (136, 75):
        inputs = pool_inputs(39, width, width, [9, 3], dtype, pool_dtype, popularity="distinct")
        inputs.token_slots[[0, 38]] = -1
        inputs.x[[0, 38]] = torch.nan
        plan = kernels.plan(inputs.token_slots)
        slots = {"ranks": inputs.ranks, "scalings": inputs.scalings}
        v = kernels.shrink(plan, inputs.x, [inputs.a_pool], **slots)
        y = inputs.y.clone()
        kernels.expand(plan, y, v, [inputs.b_pool], **slots)
        assert torch.equal(y[[0, 38]], inputs.y[[0, 38]])
        assert bool(y.isfinite().all())


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
def test_slices(kernels, dtype, pool_dtype):
    """q, k and v in one launch each: one read of x, results side by side."""
    parts = [pool_inputs(37, 136, out, [16, 5, 0, 24], dtype, pool_dtype, seed=out) for out in (200, 64, 72)]
    first = parts[0]
    y = torch.cat([part.y for part in parts], 1)
    plan = kernels.plan(first.token_slots)
    slots = {"ranks": first.ranks, "scalings": first.scalings}
    v = kernels.shrink(plan, first.x, [part.a_pool for part in parts], **slots)
    kernels.expand(plan, y, v, [part.b_pool for part in parts], **slots)
    for part, columns in zip(parts, y.split([200, 64, 72], 1), strict=True):
        part.x, part.token_slots, part.scalings = first.x, first.token_slots, first.scalings
        assert_near(columns, expected(part), 160, "y", expected(part, absolute=True), sums_in=sums_in(dtype))


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
@pytest.mark.parametrize("dropout_p", [0.3, 1.0])
def test_dropout(kernels, dtype, pool_dtype, dropout_p):
    """On x in shrink, and on what expand adds: both from the CPU's counters."""
    inputs = pool_inputs(70, 150, 200, [19], dtype, pool_dtype, popularity="one")
    rows = kernels.one_slot(70)
    factors = [inputs.a_pool]
    v = kernels.shrink(rows, inputs.x, factors, dropout=(dropout_p, RNG), scaled=True, scaling=0.5)[0]
    dropped, a = lora_dropout(inputs.x, dropout_p, RNG), inputs.a_pool[0].double()
    close = {"magnitude": 0.5 * dropped.abs() @ a.abs().T, "sums_in": sums_in(dtype)}
    assert_near(v, 0.5 * dropped @ a.T, 150, "v", **close)
    y = inputs.y.clone()
    kernels.expand(rows, y, v[None], [inputs.b_pool], dropout=(dropout_p, RNG), scaling=2.0)
    b = inputs.b_pool[0].double()
    size = inputs.y.double().abs() + lora_dropout(2.0 * v.double().abs() @ b.abs(), dropout_p, RNG)
    added = lora_dropout(2.0 * v.double() @ b, dropout_p, RNG)
    assert_near(y, inputs.y.double() + added, 19, "y", size, sums_in=sums_in(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dropped_infinity_is_a_nan(kernels, dtype):
    """As in torch, where dropping multiplies by 0."""
    inputs = pool_inputs(3, 64, 8, [4], dtype, popularity="one")
    inputs.x[1] = torch.inf
    v = kernels.shrink(kernels.one_slot(3), inputs.x, [inputs.a_pool.abs()], dropout=(0.5, RNG))[0]
    assert bool(v[1].isnan().all())
    assert bool(v[[0, 2]].isfinite().all())


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
def test_same_bits_whoever_comes_last(dtype, pool_dtype):
    """With the width split over blocks, in any order of threads and blocks; and close to the unsplit sums."""
    inputs = pool_inputs(40, 1500, 24, [16, 7], dtype, pool_dtype)
    results = []
    for schedule in [*SCHEDULES, SCHEDULES[0]._replace(resident_blocks=16)]:
        with emulated(schedule) as module:
            kernels = SegmentKernels(module)
            v = kernels.shrink(kernels.plan(inputs.token_slots), inputs.x, [inputs.a_pool], 3, ranks=inputs.ranks)
            if is_emulated():
                assert kernels.launches[-1]["blocks"] >= 3
            results.append(v)
    assert all(torch.equal(v.nan_to_num(), results[0].nan_to_num()) for v in results)
    close = {"magnitude": expected_v(inputs, absolute=True), "sums_in": sums_in(dtype)}
    assert_near(results[0][0].nan_to_num(), expected_v(inputs), 1500, "v", **close)


def test_transposed_factor_in_shrink(kernels):
    """g = dY B with B [out, rank], as backward takes it: ranks side by side in memory, aligned and not."""
    for dtype, rank, rows in itertools.product(
        [torch.bfloat16, torch.float16, torch.float32], [8, 20, 64, 100], [5, 70]
    ):
        inputs = pool_inputs(rows, 200, 8, [rank], dtype, popularity="one")
        factor = inputs.a_pool.transpose(1, 2).contiguous().transpose(1, 2)
        v = kernels.shrink(kernels.one_slot(rows), inputs.x, [factor])
        close = {"magnitude": expected_v(inputs, absolute=True), "sums_in": sums_in(dtype)}
        assert_near(v[0], expected_v(inputs), 200, f"v, {dtype}, rank {rank}", **close)


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_tensor_core_work_is_the_least(kernels, dtype):
    """16-row tiles, 16-rank steps and whole columns: nothing else, whatever rank the pool has room for."""
    ranks, rows = [200, 8, 16, 1], [64, 5, 33, 16]
    inputs = pool_inputs(sum(rows), 256, 512, ranks, dtype)
    inputs.token_slots = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(rows))
    slots = {"ranks": inputs.ranks, "scalings": inputs.scalings}
    plan = kernels.plan(inputs.token_slots)
    v = kernels.shrink(plan, inputs.x, [inputs.a_pool], num_splits=1, **slots)
    tiles = sum(-(-row // 16) * -(-rank // 16) for row, rank in zip(rows, ranks, strict=True))
    assert kernels.launches[-1]["mma"] == tiles * 2 * (256 // 16)
    kernels.expand(plan, inputs.y.clone(), v, [inputs.b_pool], **slots)
    parts = 2 if dtype == torch.bfloat16 else 3  # of v, and f16's factor has two halves
    assert kernels.launches[-1]["mma"] == tiles * (512 // 8) * parts


@pytest.mark.emulator
def test_rows_without_adapter_cost_nothing(kernels):
    inputs = pool_inputs(200, 64, 64, [8], torch.bfloat16, popularity="none")
    plan = kernels.plan(inputs.token_slots)
    assert plan.fields["num_items"].item() == 0
    slots = {"ranks": inputs.ranks, "scalings": inputs.scalings}
    v = kernels.shrink(plan, inputs.x, [inputs.a_pool], **slots)
    kernels.expand(plan, inputs.y, v, [inputs.b_pool], **slots)
    assert all(launch["mma"] == 0 and launch["store_bytes"] == 0 for launch in kernels.launches[-2:])


def test_skewed_plan(kernels):
    """Items have at most 64 rows, none crosses a segment, and each row is in one."""
    slots = torch.tensor([3] * 300 + [-1] * 5 + [0] + [2] * 64 + [1] * 65, dtype=torch.int32)
    plan = kernels.plan(slots)
    items = plan.fields["items"][: plan.fields["num_items"]].tolist()
    assert [item[1] for item in items] == [1, 64, 1, 64, 64, 64, 64, 64, 44]
    sorted_slots = slots[plan.fields["order"].long()]
    rows = [(first + i, slot) for first, count, slot, _ in items for i in range(count)]
    assert [(row, int(sorted_slots[row])) for row, _ in rows] == rows
    assert len(rows) == int((slots >= 0).sum())
    assert len(items) <= plan.max_items


def test_many_segments(kernels):
    """More than the plan's block has threads."""
    slots = torch.arange(700, dtype=torch.int32) % 650
    plan = kernels.plan(slots)
    assert plan.fields["num_items"].item() == 650
    items = plan.fields["items"][:650]
    assert torch.equal(items[:, 2], torch.arange(650, dtype=torch.int32))
    assert items[:, 1].tolist() == [2] * 50 + [1] * 600


@pytest.mark.parametrize(("dtype", "pool_dtype"), PAIRS)
@pytest.mark.parametrize("offset", [0, 1])
def test_blocks_take_one_piece_after_another(schedule, dtype, pool_dtype, offset):
    """One multiprocessor: other rows, ranks and columns follow in the same shared memory; aligned and not."""
    inputs = pool_inputs(150, 72, 300, [70, 16, 5], dtype, pool_dtype, popularity="uniform")
    with emulated(schedule, multiprocessors=1) as module:
        check(SegmentKernels(module), inputs, offset)


@pytest.mark.emulator
@pytest.mark.parametrize(("rank", "groups"), [(8, 1), (16, 1), (40, 3)])
def test_copies_are_the_least(kernels, rank, groups):
    """Of 64 columns in eights: 64 rows of x, and of the factor its ranks in sixteens, whichever way it lies."""
    inputs = pool_inputs(64, 256, 8, [rank], torch.bfloat16, popularity="one")
    across = inputs.a_pool.transpose(1, 2).contiguous().transpose(1, 2)
    for factor in (inputs.a_pool, across):
        kernels.shrink(kernels.one_slot(64), inputs.x, [factor], num_splits=1)
        assert kernels.launches[-1]["cp_async"] == 256 // 64 * (64 * 8 + groups * 16 * 8)
