"""Bytes, sectors and operations that a launch is said to have moved and made."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import pytest
import torch

from pylora.testing.emulator import load


def aligned(num_bytes: int) -> torch.Tensor:
    """Zeros at a multiple of 32 bytes, as the device's allocator gives."""
    memory = torch.zeros(num_bytes + 32, dtype=torch.uint8)
    start = -memory.data_ptr() % 32
    return memory[start : start + num_bytes]


def record(**arguments: Any) -> dict[str, Any]:
    x, y = aligned(4096), aligned(4096)
    load().emu_tests.count(x=x, y=y, **arguments)
    (launch,) = load().take_launches()
    return launch


@pytest.mark.usefixtures("emu")
@pytest.mark.parametrize(
    ("width", "stride", "sectors"),
    [
        (16, 16, 16),  # 512 bytes in a row
        (16, 32, 32),  # half of each sector
        (16, 64, 32),
        (4, 4, 4),
        (4, 8, 8),
        (4, 32, 32),
        (2, 2, 2),
        (2, 6, 6),  # 188 bytes
    ],
)
def test_bytes_and_distinct_sectors(width: int, stride: int, sectors: int) -> None:
    launch = record(bytes=width, stride=stride)
    assert launch["load_bytes"] == launch["store_bytes"] == 32 * width
    assert launch["load_sectors"] == launch["store_sectors"] == sectors


@pytest.mark.usefixtures("emu")
def test_uniform_loads_count_once_a_warp() -> None:
    base = record(bytes=4, stride=4)
    launch = record(bytes=4, stride=4, uniform_loads=24)
    assert launch["load_bytes"] - base["load_bytes"] == 24 * 4
    assert launch["load_sectors"] == base["load_sectors"]  # the same 96 bytes of x


@pytest.mark.usefixtures("emu")
def test_copies_count_the_bytes_they_read() -> None:
    base = record(bytes=4, stride=4)
    launch = record(bytes=4, stride=4, copied_bytes=8)
    assert launch["cp_async"] == 32
    assert launch["load_bytes"] - base["load_bytes"] == 32 * 8
    assert launch["load_sectors"] == 16


def test_operations_are_counted(emu: ModuleType) -> None:
    words = torch.zeros(32, 4, dtype=torch.int32)
    emu.mma(kind=0, a=words, b=torch.zeros(32, 2, dtype=torch.int32), d=torch.zeros(32, 4))
    emu.ldmatrix(count=4, rows=torch.zeros(32, 8, dtype=torch.int16), registers=words)
    emu.pipe(x=torch.zeros(8, 32), y=torch.zeros(8, 32))
    counter = torch.zeros(1, dtype=torch.int32)
    emu.last_block(blocks=5, x=torch.zeros(64), y=torch.zeros(6, 64), counter=counter)
    mma, ldmatrix, pipe, last_block = load().take_launches()
    assert (mma["mma"], mma["ldmatrix"], mma["threads"], mma["blocks"]) == (1, 0, 32, 1)
    assert (ldmatrix["ldmatrix"], ldmatrix["shared_bytes"]) == (1, 512)
    assert pipe["barriers"] == 32 * (8 + 7) * 2
    assert (last_block["atomics"], last_block["barriers"]) == (5, 5 * 64 * 2)
    assert "mma_kernel<" in mma["kernel"]
    assert mma["error"] == ""
