"""What holds for every test: no network, one thread, the same random numbers, and fresh memory that is not zero."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; tests of threading raise it themselves
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

from pylora import _native
from pylora.errors import PyloraBuildError


def pytest_report_header() -> str:
    try:
        module = _native.load()
        info = module.build_info()
        return (
            f"pylora: {module.cpu_isa()} in use, built {info['isas_built']}, CPU has "
            f"{','.join(module.cpu_isas_supported())}, CUDA {info['cuda_archs'] or 'not built'}, "
            f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)"
        )
    except (PyloraBuildError, RuntimeError, ValueError) as error:
        return str(error)


@pytest.fixture(autouse=True)
def reproducible() -> Iterator[None]:
    """Seed every generator, and let nothing a test sets in torch reach the next one.

    Deterministic mode fills what torch.empty returns with NaN, in C++ as well, so that a kernel that reads memory
    before writing it, or leaves some of its output unwritten, is found.
    """
    random.seed(0)
    torch.manual_seed(0)
    threads, dtype = torch.get_num_threads(), torch.get_default_dtype()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)
    torch.set_num_threads(threads)
    torch.set_default_dtype(dtype)
    torch.set_grad_enabled(True)


@pytest.fixture
def generator() -> torch.Generator:
    """A generator of the test's own, seeded."""
    return torch.Generator().manual_seed(0)


@pytest.fixture
def truncating(monkeypatch: pytest.MonkeyPatch) -> Callable[[Path, int], None]:
    """`truncating(path, size)`: the file shrinks to `size` bytes once its header has been read."""
    read = os.preadv

    def arrange(path: Path, size: int) -> None:
        def shrinking(*args: Any) -> int:
            if path.stat().st_size > size:
                os.truncate(path, size)
            return read(*args)

        monkeypatch.setattr(os, "preadv", shrinking)

    return arrange
