"""The emulator's own tests run where it was built: under `make emulate`."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_wanted

if not is_wanted():
    collect_ignore_glob = ["*"]


@pytest.fixture(params=SCHEDULES, ids=["forward", "reverse", "random"])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


@pytest.fixture
def emu(schedule: Schedule) -> Iterator[ModuleType]:
    """The kernels of this folder, in each order of threads."""
    with emulated(schedule) as module:
        yield module.emu_tests
