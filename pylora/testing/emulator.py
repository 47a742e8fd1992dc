"""The emulated CUDA device of csrc/emu, for tests: where its module is and how its runs are varied."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

ENVIRONMENT = "PYLORA_EMULATED"
"""Names the build folder that holds the module `_emulated`."""


class Schedule(NamedTuple):
    """In which order threads get their turns, and how many blocks interleave."""

    order: int  # 0 forward, 1 reverse, from 2 on the seed of a random order
    resident_blocks: int


SCHEDULES = (Schedule(0, 4), Schedule(1, 1), Schedule(7, 3))


def is_wanted() -> bool:
    """Whether this run of the tests has an emulator to use (`make emulate`)."""
    return ENVIRONMENT in os.environ


@cache
def load() -> ModuleType:
    """The module `_emulated`: `configure`, `take_launches` and a submodule of launchers for each op.

    Raises:
        ImportError: it has not been built, or PYLORA_EMULATED does not say where.
    """
    folder = os.environ.get(ENVIRONMENT)
    if folder is None:
        raise ImportError(f"{ENVIRONMENT}: expected the build folder of the emulator; run `make emulate`")
    sys.path.insert(0, str(Path(folder).resolve()))
    try:
        return import_module("_emulated")
    finally:
        del sys.path[0]


@contextmanager
def emulated(schedule: Schedule = SCHEDULES[0], **settings: Any) -> Iterator[ModuleType]:
    """The module, set up for the schedule and with no records of launches; with its defaults again afterwards.

    Args:
        settings: more arguments of `configure`: multiprocessors, max_shared_bytes, check_regions.
    """
    module = load()
    module.configure(**schedule._asdict(), **settings)
    module.take_launches()
    try:
        yield module
    finally:
        module.configure()
