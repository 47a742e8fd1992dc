"""What the emulated instructions compute: shuffles, votes, atomics, barriers by name, conversions, indices."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

ALL = 0xFFFFFFFF


def in_mask(mask: int) -> list[int]:
    return [lane for lane in range(32) if mask >> lane & 1]


@pytest.mark.parametrize("width", [32, 16, 4])
@pytest.mark.parametrize("operand", [0, 1, 3, 17])
@pytest.mark.parametrize("mask", [ALL, 0xFFFF, 0xF0F0F0F0])
def test_collectives_follow_the_isa(emu: ModuleType, mask: int, operand: int, width: int) -> None:
    """shfl.sync's pseudo-code in the PTX ISA; a lane outside the mask has no defined value to give."""
    out = torch.full((6, 32), -1, dtype=torch.int32)
    emu.collectives(mask=mask, operand=operand, width=width, out=out)
    for lane in in_mask(mask):
        first = lane // width * width
        sources = [
            first + (lane + operand) % width,
            lane - operand if lane - operand >= first else lane,
            lane + operand if lane + operand < first + width else lane,
            lane ^ operand if lane ^ operand < first + width else lane,
        ]
        for kind, source in enumerate(sources):
            if mask >> source & 1:
                assert out[kind, lane] == 100 + source, (kind, lane)
        votes = sum(1 << other for other in in_mask(mask) if other % 3 == 0)
        assert out[4, lane].item() & ALL == votes
        assert out[5, lane] == (1 if mask >> 5 & 1 else 2)
    for lane in set(range(32)) - set(in_mask(mask)):
        assert (out[:, lane] == -1).all()


def test_atomics_lose_no_update(emu: ModuleType) -> None:
    blocks, threads = 3, 48
    n = blocks * threads
    f32, i32, cas = torch.zeros(1), torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    pairs = {dtype: torch.zeros(2, dtype=dtype) for dtype in (torch.bfloat16, torch.float16)}
    emu.atomics(
        blocks=blocks,
        threads=threads,
        f32=f32,
        i32=i32,
        pairs_bf16=pairs[torch.bfloat16],
        pairs_f16=pairs[torch.float16],
        cas=cas,
    )
    assert f32.item() == 0.5 * n * (n - 1) / 2
    assert i32.item() == n * (n - 1) // 2
    assert cas.item() == n
    assert pairs[torch.float16].tolist() == [n, 2 * n]
    assert pairs[torch.bfloat16].tolist() == [n, 2 * n]


def test_threads_and_blocks_are_numbered_x_first(emu: ModuleType) -> None:
    out = torch.full((24 * 30,), -1, dtype=torch.int32)
    emu.index(out=out)
    assert torch.equal(out, torch.arange(24 * 30, dtype=torch.int32))


def test_named_barriers_pass_a_slot_back_and_forth(emu: ModuleType) -> None:
    x, y = torch.randn(8, 32), torch.full((8, 32), float("nan"))
    emu.pipe(x=x, y=y)
    assert torch.equal(y, x.flip(1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_conversions_are_those_of_torch(emu: ModuleType, dtype: torch.dtype) -> None:
    finite = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype).float()
    edges = torch.tensor(
        [65504.0, 65519.996, 65520.0, 65536.0, 2.0**-14, 2.0**-24, 2.0**-25, 1e-30, float("inf"), -0.0]
    )
    near = finite[finite.isfinite()] * (1 + torch.rand(int(finite.isfinite().sum())) * 2.0**-8)
    x = torch.cat([finite, near, edges, -edges, torch.randn(1000), torch.tensor([float("nan")])])
    narrowed, widened = torch.empty_like(x, dtype=dtype), torch.empty_like(x)
    paired = torch.full_like(x, float("nan"))
    emu.convert(count=x.numel(), dtype=dtype, x=x, narrowed=narrowed, widened=widened, paired=paired)
    expected = x.to(dtype)
    numbers = ~x.isnan()
    assert torch.equal(narrowed.view(torch.int16)[numbers], expected.view(torch.int16)[numbers])
    assert torch.equal(widened[numbers], expected.float()[numbers])
    assert narrowed[~numbers].isnan().all()
    assert widened[~numbers].isnan().all()
    assert (paired[expected.isfinite()] == 0).all()
