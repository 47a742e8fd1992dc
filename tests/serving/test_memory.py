"""Memory for stacks and for files, with large pages and on systems without."""

import mmap

import pytest
import torch

from pylora import _memory
from pylora.serving.memory import reserve


@pytest.fixture(params=["large pages", "the system refuses", "Python does not know"])
def system(request, monkeypatch):
    if request.param == "the system refuses":
        monkeypatch.setattr(mmap, "MADV_HUGEPAGE", 9999)
        with pytest.raises(OSError, match="Invalid argument"):
            mmap.mmap(-1, 1).madvise(9999)
    if request.param == "Python does not know":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE")


@pytest.mark.parametrize("size", [0, 1, 5 << 20])
def test_anonymous(system, size):
    memory = _memory.anonymous(size, large_pages=True)
    assert len(memory) == max(size, 1)
    assert memory[:] == bytes(len(memory))
    memory[:] = b"\1" * len(memory)


@pytest.mark.parametrize("shape", [(0, 3), (3, 5), (3, 1 << 20)])
def test_reserve(system, shape):
    tensor = reserve(shape, torch.float32)
    assert tensor.shape == shape
    assert tensor.dtype == torch.float32
    assert not tensor.any()
    tensor.fill_(1)
    if tensor.nbytes >= 2 << 20:
        assert tensor.data_ptr() % (2 << 20) == 0
