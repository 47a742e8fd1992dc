"""Seeded faults that a sanitizer finds, each in a process of its own (`make emulate-full`)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from pylora.testing.emulator import load

FOLDER = Path(__file__).parent
SOURCE = (FOLDER / "bugs.cu").read_text().splitlines()
KERNELS = ["stage", "warp_exchange", "shared", "fragments", "last_block", "barriers", "lanes", "bounds"]


def report_of(kernels: str, bug: int, order: int = 0) -> str:
    """What the process printed; empty if it ended well."""
    command = [sys.executable, str(FOLDER / "run_bug.py"), kernels, str(bug), str(order)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    return "" if done.returncode == 0 else done.stdout + done.stderr


def place(fault: str) -> str:
    (line,) = [number for number, text in enumerate(SOURCE, 1) if text.rstrip().endswith(f"// fault: {fault}")]
    return f"bugs.cu:{line}"


@pytest.mark.parametrize("order", [0, 1, 7])
def test_right_kernels_are_left_alone(order: int) -> None:
    assert report_of(",".join(KERNELS), 0, order) == ""


@pytest.mark.skipif(load().sanitizer != "address", reason="addresses are AddressSanitizer's")
@pytest.mark.parametrize(
    ("kernel", "bug", "fault"), [("bounds", 1, "store"), ("bounds", 2, "load"), ("shared", 2, "overrun")]
)
def test_address_sanitizer_names_the_line(kernel: str, bug: int, fault: str) -> None:
    report = report_of(kernel, bug)
    assert "heap-buffer-overflow" in report
    assert place(fault) in report


@pytest.mark.skipif(load().sanitizer != "thread", reason="races are ThreadSanitizer's")
@pytest.mark.parametrize("order", [0, 1])
@pytest.mark.parametrize(
    ("kernel", "bug"),
    [("stage", 3), ("stage", 4), ("warp_exchange", 1), ("last_block", 1), ("last_block", 2)],
)
def test_thread_sanitizer_finds_races_in_every_order(kernel: str, bug: int, order: int) -> None:
    """Of threads that no barrier, __syncwarp or release orders, whether or not the result shows it."""
    report = report_of(kernel, bug, order)
    assert "data race" in report or (kernel == "last_block" and "with no arrive() and acquire" in report)
