"""The CUDA kernels through their launchers: in the emulator under `make emulate`, on a GPU under `make test-cuda`."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from pylora.testing.cuda_segments import SegmentKernels
from pylora.testing.emulator import SCHEDULES, Schedule, emulated, is_emulated, is_wanted, unusable

if not is_wanted():
    collect_ignore_glob = ["*"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "emulator: counts launches, bytes or traps, which the emulator alone does")
    config.addinivalue_line("markers", "device: needs the GPU itself: graphs, streams")
    config.addinivalue_line("markers", "without_gpu: what a build for a GPU says where there is none")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What cannot run is skipped by name, nothing is left out in silence."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and (why := lacking(item)):
            item.add_marker(pytest.mark.skip(reason=why))


def lacking(item: pytest.Item) -> str:
    marks = {mark.name for mark in item.iter_markers()}
    if is_emulated():
        return "needs a build for a GPU" if marks & {"device", "without_gpu"} else ""
    if "without_gpu" in marks:
        return "" if unusable() else "there is a GPU"
    if unusable():
        return f"CUDA: {unusable()}"
    return "counts are the emulator's" if "emulator" in marks else ""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call() -> Generator[None, None, None]:
    """A launch with more threads than ThreadSanitizer has room for is skipped, visibly."""
    try:
        return (yield)
    except RuntimeError as error:
        if "under TSan: expected at most" in str(error):
            pytest.skip(str(error))
        raise


@pytest.fixture(params=SCHEDULES, ids=Schedule.label)
def schedule(request: pytest.FixtureRequest) -> Schedule:
    return request.param


@pytest.fixture
def kernels(schedule: Schedule) -> Iterator[SegmentKernels]:
    """The launchers of csrc/cuda/segments.h, in each order of threads that the device offers."""
    with emulated(schedule) as module:
        yield SegmentKernels(module)
