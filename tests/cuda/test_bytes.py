"""Bytes that the kernels move, counted by the emulator, against the least possible of pylora/ops/cost/cuda.py."""

import pytest
import torch

from pylora.ops.cost import Cost, cuda
from pylora.testing.cuda_segments import SegmentKernels
from pylora.testing.emulator import SCHEDULES, emulated

DTYPE = torch.bfloat16

pytestmark = pytest.mark.emulator


@pytest.fixture
def kernels():
    with emulated(SCHEDULES[0], multiprocessors=108) as module:
        yield SegmentKernels(module)


def factors(rank: int, width: int, slots: int = 1) -> torch.Tensor:
    return torch.randn(slots, rank, width).to(DTYPE)


def hold(kernels: SegmentKernels, least: Cost, sectors: float, requested: float) -> None:
    """All launches so far, in distinct sectors of each and in bytes asked for."""
    moved = 32 * sum(launch["load_sectors"] + launch["store_sectors"] for launch in kernels.launches)
    asked = sum(launch["load_bytes"] + launch["store_bytes"] for launch in kernels.launches)
    assert least.bytes <= moved <= sectors * least.bytes, moved / least.bytes
    assert asked <= requested * least.bytes, asked / least.bytes


@pytest.mark.parametrize("rank", [8, 16, 64])
@pytest.mark.parametrize(("rows", "width"), [(1, 2048), (8, 2048), (1, 4096), (8, 4096)])
def test_decode(kernels, rank, rows, width):
    x, y = torch.randn(rows, width).to(DTYPE), torch.randn(rows, width).to(DTYPE)
    v = kernels.decode(y, x, [factors(rank, width)], [factors(rank, width)], None)
    least = cuda.decode([cuda.Segment(rows, rank)], width, width, "bfloat16") + Cost(0, v.nbytes)
    hold(kernels, least, 1.25, 2.0)


@pytest.mark.parametrize("rank", [8, 16])
def test_decode_of_many_adapters(kernels, rank):
    """32 slots with a row each."""
    x, y = torch.randn(32, 1024).to(DTYPE), torch.randn(32, 1024).to(DTYPE)
    pools = [factors(rank, 1024, 32)], [factors(rank, 1024, 32)]
    v = kernels.decode(y, x, *pools, torch.arange(32, dtype=torch.int32))
    least = cuda.decode([cuda.Segment(1, rank)] * 32, 1024, 1024, "bfloat16") + Cost(0, v.nbytes)
    hold(kernels, least, 1.25, 2.0)


@pytest.mark.parametrize("rank", [8, 16, 64])
def test_prefill(kernels, rank):
    rows, width = 512, 2048
    x, y = torch.randn(rows, width).to(DTYPE), torch.randn(rows, width).to(DTYPE)
    plan, segments = kernels.one_slot(rows), [cuda.Segment(rows, rank)]
    v = kernels.shrink(plan, x, [factors(rank, width)])
    kernels.expand(plan, y, v, [factors(rank, width)])
    least = cuda.shrink(segments, width, "bfloat16") + cuda.expand(segments, width, "bfloat16")
    hold(kernels, least, 1.5, 2.0)


def test_prefill_of_skewed_segments(kernels):
    """Mixed ranks: what a slot's pool has room for beyond its own rank is not read."""
    rows, ranks, width = [300, 100, 40, 8], [16, 64, 8, 32], 1024
    slots = torch.repeat_interleave(torch.arange(4, dtype=torch.int32), torch.tensor(rows))
    x, y = torch.randn(sum(rows), width).to(DTYPE), torch.randn(sum(rows), width).to(DTYPE)
    plan = kernels.plan(slots)
    of_slots = {"ranks": torch.tensor(ranks, dtype=torch.int32), "scalings": torch.ones(4)}
    v = kernels.shrink(plan, x, [factors(64, width, 4)], **of_slots)
    kernels.expand(plan, y, v, [factors(64, width, 4)], **of_slots)
    segments = [cuda.Segment(row, rank) for row, rank in zip(rows, ranks, strict=True)]
    least = cuda.shrink(segments, width, "bfloat16") + cuda.expand(segments, width, "bfloat16")
    hold(kernels, least, 1.5, 2.0)


@pytest.mark.parametrize(("rank", "requested"), [(8, 2.0), (16, 2.0), (64, 2.5)])
def test_backward(kernels, rank, requested):
    """At rank 64 the sums over rows ask L2 for g again at each 128 columns: 2.3 times the least instead of 2."""
    rows, width = 512, 2048
    x, dy, dx = (torch.randn(rows, width).to(DTYPE) for _ in range(3))
    plan = kernels.one_slot(rows)
    a, b, v = factors(rank, width), factors(rank, width), torch.randn(rows, rank)
    g = kernels.shrink(plan, dy, [b])
    kernels.expand(plan, dx, g, [a])
    kernels.outer(plan, g[0], x, 1, DTYPE)
    kernels.outer(plan, v, dy, 1, DTYPE, out_first=True)
    assert len(kernels.launches) == cuda.LAUNCHES["backward"]
    hold(kernels, cuda.backward([cuda.Segment(rows, rank)], width, width, "bfloat16"), 1.5, requested)
