"""Dropout on its own, through its launcher, against its definition; element by element the bits of the CPU's."""

from __future__ import annotations

import pytest
import torch

import pylora.ops
from pylora.ops.reference.lora import lora_dropout
from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_emulated
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (3, 7), (5, 64), (2, 65), (37, 133), (9, 1000)]


def dropped(x: torch.Tensor, dropout_p: float, rng: torch.Tensor, schedule: Schedule, **settings: int) -> torch.Tensor:
    num_tokens, width = x.shape
    out = torch.full((num_tokens, width + 3), float("nan"), dtype=x.dtype)
    with emulated(schedule, **settings) as module:
        module.lora.dropout(
            num_tokens=num_tokens, width=width, dtype=x.dtype, dropout=(dropout_p, rng), x=x, out=out[:, :width]
        )
    assert out[:, width:].isnan().all()
    return out[:, :width]


def check(out: torch.Tensor, x: torch.Tensor, dropout_p: float, rng: torch.Tensor) -> None:
    expected = lora_dropout(x, dropout_p, rng)
    assert torch.equal(out == 0, expected == 0)
    assert_near(out, expected, 1, magnitude=expected.abs())
    assert torch.equal(out, pylora.ops.lora_dropout(x, dropout_p, rng))


@pytest.mark.parametrize("schedule", SCHEDULES, ids=Schedule.label)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dropout_p", [0.0, 0.1, 0.5, 1.0])
def test_grid(schedule: Schedule, dtype: torch.dtype, dropout_p: float) -> None:
    rng = torch.tensor([2**40 + 5, 2**33 + 9])
    for shape in SHAPES:
        x = torch.randn(shape).to(dtype)
        check(dropped(x, dropout_p, rng, schedule), x, dropout_p, rng)


def test_rows_of_a_larger_tensor() -> None:
    memory, rng = torch.randn(6, 200), torch.tensor([1, 2])
    x = memory[:, 11:111]
    check(dropped(x, 0.3, rng, SCHEDULES[0]), x, 0.3, rng)


def test_threads_take_one_item_after_another() -> None:
    """One multiprocessor has fewer threads than there are items."""
    x, rng = torch.randn(80, 1000), torch.tensor([5, 6])
    check(dropped(x, 0.3, rng, SCHEDULES[0], multiprocessors=1), x, 0.3, rng)


@pytest.mark.parametrize("shape", [(0, 5), (5, 0)])
def test_nothing_to_do(shape: tuple[int, int]) -> None:
    x = torch.empty(shape)
    with emulated() as module:
        module.lora.dropout(
            num_tokens=shape[0], width=shape[1], dtype=x.dtype, dropout=(0.5, torch.tensor([1, 2])), x=x, out=x.clone()
        )
        if is_emulated():
            assert module.take_launches() == []


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
def test_dropping_multiplies_by_zero(value: float) -> None:
    x, rng = torch.full((4, 64), value), torch.tensor([3, 4])
    out = dropped(x, 0.5, rng, SCHEDULES[0])
    kept = lora_dropout(torch.ones(4, 64), 0.5, rng) != 0
    assert out[~kept].isnan().all()
    assert torch.equal(out[kept].isinf(), x[kept].isinf())


@pytest.mark.emulator
def test_bytes_are_the_least() -> None:
    """x is read and out written once; each of the 32 warps reads seed and offset."""
    num_tokens, width = 16, 512
    x = torch.zeros(num_tokens * width + 8)[: num_tokens * width].reshape(num_tokens, width)
    with emulated() as module:
        module.lora.dropout(
            num_tokens=num_tokens,
            width=width,
            dtype=x.dtype,
            dropout=(0.5, torch.tensor([1, 2])),
            x=x,
            out=torch.empty_like(x),
        )
        (launch,) = module.take_launches()
    assert launch["store_bytes"] == x.numel() * 4
    assert launch["load_bytes"] == x.numel() * 4 + launch["blocks"] * launch["threads"] // 32 * 16
    assert launch["load_sectors"] <= x.numel() * 4 // 32 + 3
