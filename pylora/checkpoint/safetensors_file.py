"""All tensors of a .safetensors file at once, each with a storage of its own, in one block of memory.

`safetensors` cuts all tensors from one mapped storage and takes 24 us for each. These take 2 us and are ordinary ones,
which a model can keep: nothing is copied a second time.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pylora import _memory
from pylora.checkpoint.safetensors_header import BrokenFileError, Entry, read_at, read_header

_ALIGNMENT = 64  # of a tensor, as torch's allocator has it
_WORTH_A_THREAD = 1 << 20  # bytes, which take some 10 times as long to read as a thread to start
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class _Piece(NamedTuple):
    """A tensor's place in the block."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    length: int


class ReadingMemory:
    """Memory that one file after another is read into, for who copies the tensors elsewhere and drops them.

    The system clears what it gives: that takes longer than reading a file that it has in its cache.
    """

    def __init__(self) -> None:
        self._memory: mmap.mmap | None = None

    def take(self, size: int) -> mmap.mmap:
        """At least `size` bytes, which the tensors of the file before may lie in."""
        if self._memory is None or len(self._memory) < size:
            self._memory = _memory.anonymous(size, large_pages=True)
        return self._memory


class SafetensorsReading:
    """A file that is being read, by a thread of its own if it is large: the caller can prepare what takes the tensors.

    Args:
        path: The file. Its header is read and checked at once.
        memory: Where to, if not to memory of its own: the tensors then last until the next file is read into it.

    Attributes:
        tensors: The tensors by name, undefined until `wait` returns. They may be written, kept, pickled and passed on
            one by one. Their memory goes back to the system when the last of them is gone. Only `resize_` cannot make
            them larger.

    Raises:
        BrokenFileError: it is truncated or not of this format, or a tensor has a dtype that torch lacks.
        OSError: it cannot be read.
    """

    def __init__(self, path: Path, memory: ReadingMemory | None = None) -> None:
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        with ExitStack() as to_close:
            file = to_close.enter_context(open(path, "rb", buffering=0))
            header, start = read_header(file.fileno())
            pieces, size = _pieces(header.entries)
            block = _Block(_memory.anonymous(size) if memory is None else memory.take(size))
            self.tensors = {key: block.tensor(piece) for key, piece in zip(header.entries, pieces, strict=True)}
            buffers = [block.view[piece.begin : piece.begin + piece.length] for piece in pieces]
            read = partial(self._read, to_close.pop_all(), file.fileno(), start, buffers)
        if size < _WORTH_A_THREAD:
            read()
        else:
            self._thread = threading.Thread(target=read, name="pylora-read")
            self._thread.start()

    def _read(self, to_close: ExitStack, file: int, start: int, buffers: list[memoryview]) -> None:
        try:
            with to_close:
                read_at(file, start, buffers)
        except BaseException as failure:
            self._failure = failure

    def wait(self) -> None:
        """Return when the tensors have their values.

        Raises:
            BrokenFileError: the file became shorter while it was read.
            OSError: it cannot be read.
        """
        if self._thread is not None:
            self._thread.join()
        if self._failure is not None:
            raise self._failure


def _pieces(entries: Mapping[str, Entry]) -> tuple[list[_Piece], int]:
    """Where the tensors go, and the bytes of them all."""
    pieces, place = [], 0
    for key, entry in entries.items():
        dtype = _DTYPES.get(entry.dtype)
        if dtype is None:
            raise BrokenFileError(f"{key}: expected one of the dtypes {', '.join(_DTYPES)}, got {entry.dtype}")
        length = entry.end - entry.begin
        pieces.append(_Piece(dtype, entry.shape, place, length))
        place += -(-length // _ALIGNMENT) * _ALIGNMENT
    return pieces, place


class _Block:
    """Memory of the process, given back when no tensor lies in it any more."""

    def __init__(self, memory: mmap.mmap) -> None:
        self._memory = memory
        self.view = memoryview(memory)

    def tensor(self, piece: _Piece) -> Tensor:
        """A tensor over these bytes, with a storage that ends where it ends."""
        dtype, shape, begin, length = piece
        if not length:
            return torch.empty(shape, dtype=dtype, device="cpu")
        count = length // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)
