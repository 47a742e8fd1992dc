"""The emulator's own tests run where it was built: under `make emulate`."""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

import pytest

from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_emulated, load

if not is_emulated():
    collect_ignore_glob = ["*"]
else:
    # What a trap is, a sanitizer has its own words for; test_sanitizers.py is about them.
    collect_ignore = ["test_bugs.py" if load().sanitizer else "test_sanitizers.py"]


@pytest.fixture(params=SCHEDULES, ids=Schedule.label)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


@pytest.fixture
def emu(schedule: Schedule) -> Iterator[ModuleType]:
    """The kernels of this folder, in each order of threads."""
    with emulated(schedule) as module:
        yield module.emu_tests
