"""The CUDA kernels in the emulator: these tests run where it was built, under `make emulate`."""

from __future__ import annotations

from collections.abc import Generator, Iterator

import pytest

from pylora.testing.cuda_segments import SegmentKernels
from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_wanted

if not is_wanted():
    collect_ignore_glob = ["*"]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """A launch with more threads than ThreadSanitizer has room for is skipped, visibly."""
    try:
        return (yield)
    except RuntimeError as error:
        if "under TSan: expected at most" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=SCHEDULES, ids=["forward", "reverse", "random"])
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


@pytest.fixture
def kernels(schedule: Schedule) -> Iterator[SegmentKernels]:
    """The launchers of csrc/cuda/segments.h, in each order of threads."""
    with emulated(schedule) as module:
        yield SegmentKernels(module)
