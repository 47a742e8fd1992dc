"""Seeded faults: each is found by the tool that should find it, and the report says where it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

from pylora.testing.emulator import SCHEDULES, Schedule, emulated

SOURCE = Path(__file__).with_name("bugs.cu").read_text().splitlines()


def place(fault: str) -> str:
    """bugs.cu:<line> of the line that is marked with the fault's name."""
    (line,) = [number for number, text in enumerate(SOURCE, 1) if text.rstrip().endswith(f"// fault: {fault}")]
    return f"bugs.cu:{line}"


def run_stage(emu: ModuleType, bug: int) -> bool:
    x, y = torch.randn(4, 64), torch.full((4, 64), float("nan"))
    emu.stage(bug=bug, x=x, y=y)
    return torch.equal(y, x.flip(1))


def run_warp_exchange(emu: ModuleType, bug: int) -> bool:
    x, y = torch.randn(64), torch.full((64,), float("nan"))
    emu.warp_exchange(bug=bug, x=x, y=y)
    return torch.equal(y, x.reshape(32, 2).flip(1).reshape(-1))


def run_shared(emu: ModuleType, bug: int, offset: int = 0) -> bool:
    x, y = torch.randn(64), torch.full((64,), float("nan"))
    emu.shared(bug=bug, offset=offset, x=x, y=y)
    return torch.equal(y, x.flip(0))


def run_fragments(emu: ModuleType, bug: int) -> bool:
    x = torch.randint(-8, 9, (16, 16)).float()
    y = torch.full((16, 8), float("nan"))
    emu.fragments(bug=bug, x=x, y=y)
    return torch.equal(y, (x @ x.T)[:, :8])


def run_last_block(emu: ModuleType, bug: int, blocks: int = 6) -> bool:
    x = torch.randint(-8, 9, (64,)).float()
    y = torch.full((blocks + 1, 64), float("nan"))
    emu.last_block(bug=bug, blocks=blocks, x=x, y=y, counter=torch.zeros(1, dtype=torch.int32))
    return torch.equal(y[blocks], x * (blocks * (blocks + 1) // 2))


def run_barriers(emu: ModuleType, bug: int) -> bool:
    emu.barriers(bug=bug)
    return True


def run_lanes(emu: ModuleType, bug: int) -> bool:
    y = torch.full((32,), float("nan"))
    emu.lanes(bug=bug, y=y)
    return torch.equal(y, (torch.arange(32) ^ 1).float())


def run_bounds(emu: ModuleType, bug: int, offset: int = 0) -> bool:
    x, y = torch.randn(64), torch.full((64,), float("nan"))
    emu.bounds(bug=bug, offset=offset, x=x, y=y)
    return torch.equal(y, x)


RUNS = {
    "stage": run_stage,
    "warp_exchange": run_warp_exchange,
    "shared": run_shared,
    "fragments": run_fragments,
    "last_block": run_last_block,
    "barriers": run_barriers,
    "lanes": run_lanes,
    "bounds": run_bounds,
}


@pytest.mark.parametrize("kernel", RUNS)
def test_right_kernels_run_in_every_order(emu: ModuleType, kernel: str) -> None:
    assert RUNS[kernel](emu, 0)


def noticed_by_values(run: Callable[[ModuleType, int], bool], bug: int) -> list[bool]:
    """For each schedule, whether the result is wrong."""
    noticed = []
    for schedule in SCHEDULES:
        with emulated(schedule) as module:
            noticed.append(not run(module.emu_tests, bug))
    return noticed


@pytest.mark.parametrize(
    ("kernel", "bug", "what"),
    [
        ("stage", 2, "a wait that leaves a group too many"),
        ("stage", 3, "no barrier after a copy"),
        ("stage", 4, "no barrier before the next copy"),
        ("warp_exchange", 1, "no __syncwarp"),
        ("shared", 1, "shared memory that nobody wrote"),
        ("fragments", 1, "a's registers in the wrong order"),
        ("fragments", 2, "b transposed"),
        ("fragments", 3, "d's rows exchanged"),
    ],
)
def test_results_are_wrong_in_some_order(kernel: str, bug: int, what: str) -> None:
    assert any(noticed_by_values(RUNS[kernel], bug)), what


def trap_of(run: Callable[..., bool], bug: int, schedule: Schedule = SCHEDULES[0], **arguments: int) -> str:
    with emulated(schedule) as module:
        with pytest.raises(RuntimeError) as error:
            run(module.emu_tests, bug, **arguments)
        (launch,) = module.take_launches()
        assert launch["error"] == str(error.value)
    return str(error.value)


def test_a_trap_names_kernel_block_thread_file_and_line() -> None:
    report = trap_of(run_bounds, 1, offset=3)
    assert report == (
        "pylora::emu_tests::{anonymous}::bounds_kernel: block (0,0,0) thread (61,0,0) at "
        f"tests/emu/{place('store')}: store: 4 bytes outside every argument, "
        "0 bytes after the end of one of 256 bytes"
    )


@pytest.mark.parametrize(
    ("kernel", "bug", "faults", "what"),
    [
        ("barriers", 1, ["one half", "other half"], "while other threads wait in the one at line"),
        ("barriers", 2, ["others gone"], "threads 32-63 have exited"),
        ("barriers", 3, ["too few", "others gone"], "wait in barrier_sync"),
        ("lanes", 1, ["absent lanes"], "threads 0-15 wait in a shuffle"),
        ("lanes", 2, ["not in mask"], "is not in its own mask 0000ffff"),
        ("lanes", 3, ["overlap"], "shuffle"),
        ("bounds", 3, ["misaligned"], "expected a multiple of 16"),
        ("bounds", 4, ["constant"], "an argument that is only read"),
        ("bounds", 5, [], "invalid address"),
        ("last_block", 2, ["coherent load"], "with no arrive() and acquire between"),
        ("last_block", 3, ["own load"], "expected load_coherent"),
        ("last_block", 4, ["read-only load"], "a read-only load of what block"),
        ("last_block", 5, ["coherent load"], "with no arrive() and acquire between"),
        ("last_block", 6, ["livelock"], "livelock"),
        ("stage", 1, [], "exited with 4 cp.async copies that it never waited for"),
    ],
)
def test_traps(schedule: Schedule, kernel: str, bug: int, faults: list[str], what: str) -> None:
    report = trap_of(RUNS[kernel], bug, schedule)
    assert what in report
    for fault in faults:
        name, line = place(fault).split(":")
        assert f"{name}:{line}" in report or f"line {line}" in report, report


def test_addresses_outside_the_arguments_trap(schedule: Schedule) -> None:
    for bug, fault in [(1, "store"), (2, "load")]:
        report = trap_of(run_bounds, bug, schedule, offset=3)
        assert place(fault) in report
        assert f"{fault}: 4 bytes outside every argument" in report


@pytest.mark.parametrize("offset", [0, 63, 4095])
def test_shared_memory_ends_where_it_ends(schedule: Schedule, offset: int) -> None:
    """At a page that faults; these 256 bytes do."""
    assert f"shared memory: byte {256 + offset} of 256 touched" in trap_of(run_shared, 2, schedule, offset=offset)


def test_writes_between_the_end_and_the_page_are_noticed(schedule: Schedule) -> None:
    """252 bytes leave four that do not fault: a block's memory starts at a multiple of 128."""
    assert "wrote past the 252 bytes of shared memory" in trap_of(run_shared, 3, schedule)


def test_arriving_before_the_block_has_written_shows_in_some_schedule() -> None:
    """Blocks give way at every release, so that another may find the count complete and the data not there."""
    noticed = []
    for schedule in (*SCHEDULES, Schedule(3, 6), Schedule(0, 1)):
        with emulated(schedule) as module:
            try:
                noticed.append(not run_last_block(module.emu_tests, 1))
            except RuntimeError as error:
                noticed.append("with no arrive() and acquire between" in str(error))
    assert any(noticed)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"max_shared_bytes": 255}, "shared memory: expected at most 255 bytes, got 512")],
)
def test_launches_that_the_device_refuses(settings: dict[str, int], what: str) -> None:
    with emulated(**settings) as module, pytest.raises(RuntimeError, match=what):
        run_stage(module.emu_tests, 0)


def test_a_trap_leaves_the_device_usable() -> None:
    trap_of(run_barriers, 1)
    with emulated() as module:
        assert run_stage(module.emu_tests, 0)


def test_unknown_fields_are_refused() -> None:
    with emulated() as module, pytest.raises(TypeError, match="no such field: bugs"):
        module.emu_tests.stage(bugs=1)
