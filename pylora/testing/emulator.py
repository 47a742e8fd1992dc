"""The device that tests run CUDA launchers on, without torch: the emulated one of csrc/emu, or a GPU.

Both are Python modules with a submodule of launchers for each op (csrc/emu/driver): `_emulated` (`make emulate`) and
`_on_device` (`make test-cuda`). The same tests run on either; what only the emulator can do, it is asked for by name.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

MODULES = {"PYLORA_EMULATED": "_emulated", "PYLORA_ON_DEVICE": "_on_device"}
"""Environment variables that name a build folder, and the module in it."""


class Schedule(NamedTuple):
    """In which order threads get their turns, and how many blocks interleave. A GPU has an order of its own."""

    order: int  # 0 forward, 1 reverse, from 2 on the seed of a random order
    resident_blocks: int

    def label(self) -> str:
        if not is_emulated():
            return "device"
        return {0: "forward", 1: "reverse"}.get(self.order, "random")


def is_wanted() -> bool:
    """Whether this run of the tests has a device."""
    return any(variable in os.environ for variable in MODULES)


def is_emulated() -> bool:
    """Whether it is the emulator: then launches are counted, and their order, limits and traps can be asked for."""
    return "PYLORA_EMULATED" in os.environ


SCHEDULES = (Schedule(0, 4), Schedule(1, 1), Schedule(7, 3)) if is_emulated() else (Schedule(0, 4),)


@cache
def load() -> ModuleType:
    """The module.

    Raises:
        ImportError: it has not been built, or no environment variable says where.
    """
    for variable, name in MODULES.items():
        folder = os.environ.get(variable)
        if folder is not None:
            sys.path.insert(0, str(Path(folder).resolve()))
            try:
                return import_module(name)
            finally:
                del sys.path[0]
    raise ImportError(f"{' or '.join(MODULES)}: expected a build folder; run `make emulate` or `make test-cuda`")


def unusable() -> str:
    """Why nothing can be launched: no GPU, no driver. "" where all is well, and for the emulator."""
    return "" if is_emulated() else load().unusable()


@contextmanager
def emulated(schedule: Schedule = SCHEDULES[0], **settings: Any) -> Iterator[ModuleType]:
    """The module; the emulator set up for the schedule, without records of launches, and with its defaults afterwards.

    Args:
        settings: more arguments of the emulator's `configure`: multiprocessors, max_shared_bytes, check_regions.
    """
    module = load()
    if not is_emulated():
        yield module
        return
    module.configure(**schedule._asdict(), **settings)
    module.take_launches()
    try:
        yield module
    finally:
        module.configure()
