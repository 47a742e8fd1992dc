"""Running a piece of code with each CPU instruction set of the build."""

from collections.abc import Iterator
from contextlib import contextmanager

from pylora._native import C


def built_isas() -> list[str]:
    """The instruction sets compiled in, e.g. `["scalar", "avx2", "avx512"]`."""
    return C.build_info()["isas_built"].split(",")


def supported_isas() -> list[str]:
    """Those of them that this CPU runs."""
    supported = set(C.cpu_isas_supported())
    return [isa for isa in built_isas() if isa in supported]


@contextmanager
def cpu_isa(name: str) -> Iterator[None]:
    """CPU kernels use the named set inside the block. For the whole process: not to be used beside other threads.

    Raises:
        ValueError, NotImplementedError: the set is unknown or not built, or this CPU lacks it.
    """
    before = C.cpu_isa()
    C.set_cpu_isa(name)
    try:
        yield
    finally:
        C.set_cpu_isa(before)
