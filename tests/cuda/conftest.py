"""The CUDA kernels in the emulator: these tests run where it was built, under `make emulate`."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from pylora.testing.cuda_segments import SegmentKernels
from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_wanted

if not is_wanted():
    collect_ignore_glob = ["*"]


@pytest.fixture(params=SCHEDULES, ids=["forward", "reverse", "random"])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


@pytest.fixture
def kernels(schedule: Schedule) -> Iterator[SegmentKernels]:
    """The launchers of csrc/cuda/segments.h, in each order of threads."""
    with emulated(schedule) as module:
        yield SegmentKernels(module)
