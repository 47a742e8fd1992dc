"""Tensors of a .safetensors file as views of its pages: nothing is read until it is copied from.

`safetensors` maps files too, and then takes 24 us for each tensor; this takes 2. That would be most of the time to
load an adapter of 224 small tensors.
"""

from __future__ import annotations

import mmap
import warnings
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from pylora.checkpoint.safetensors_header import MAX_BYTES, parse_header

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class MappedFileError(ValueError):
    """A file that cannot be mapped: broken, or with tensors of dtypes that torch's CPU operators lack."""


def map_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a file and lay its tensors over it.

    The tensors must not be written. The file may be deleted or replaced by another of its name meanwhile, but not
    shortened in place: the system ends a process that reads pages a file no longer has.

    Format: https://github.com/huggingface/safetensors#format

    Raises:
        MappedFileError: it is truncated, or not of this format, or a tensor is not of floating point numbers that
            torch's CPU operators have.
        OSError: it cannot be opened.
    """
    with open(path, "rb") as file:
        try:
            mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except ValueError as error:  # an empty file
            raise MappedFileError(f"broken weights: {error}") from None
    size = int.from_bytes(mapped[:8], "little")
    start = 8 + size
    if size > MAX_BYTES or start > len(mapped):
        raise MappedFileError(f"broken weights: a header of {size} bytes in a file of {len(mapped)}")
    places, data_size = _layout(mapped[8:start])
    if start + data_size != len(mapped):
        raise MappedFileError(f"broken weights: expected {start + data_size} bytes, got {len(mapped)}")
    views = {dtype: _over(mapped, start, dtype) for dtype in {place.dtype for place in places}}
    return {key: views[dtype].as_strided(shape, strides, first) for key, dtype, shape, strides, first in places}


class _Place(NamedTuple):
    """Where a tensor lies: `first` counts numbers of its dtype from the begin of the data."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    first: int


@lru_cache(maxsize=32)
def _layout(header: bytes) -> tuple[list[_Place], int]:
    """The tensors' places, checked, and the bytes of all data. Adapters of one kind have one header, read once."""
    try:
        entries, _ = parse_header(header)
    except ValueError as error:
        raise MappedFileError(f"broken weights: no header of a .safetensors file: {error}") from None
    places = [_place(key, *entry) for key, entry in entries.items()]
    size = 0
    for begin, end in sorted((begin, end) for *_, begin, end in entries.values()):
        if begin != size:
            raise MappedFileError(f"broken weights: expected data from byte {size} on, got it from byte {begin} on")
        size = end
    return places, size


def _over(mapped: mmap.mmap, start: int, dtype: torch.dtype) -> Tensor:
    """All data as numbers of one dtype, from which single tensors are cut by one call each."""
    count = (len(mapped) - start) // dtype.itemsize
    if not count:
        return torch.empty(0, dtype=dtype)
    if start % dtype.itemsize:  # the format allows it, torch's operators do not
        return torch.frombuffer(bytearray(mapped[start:]), dtype=dtype, count=count)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        return torch.frombuffer(mapped, dtype=dtype, offset=start, count=count)


def _place(key: str, dtype_name: str, shape: tuple[int, ...], begin: int, end: int) -> _Place:
    dtype = _DTYPES.get(dtype_name)
    if dtype is None:
        raise MappedFileError(f"{key}: expected one of the dtypes {', '.join(_DTYPES)}, got {dtype_name}")
    strides, count = [1] * len(shape), 1
    for place in range(len(shape) - 1, -1, -1):
        strides[place] = count
        count *= shape[place]
    if end - begin != count * dtype.itemsize:
        raise MappedFileError(f"broken weights: {key}: expected {count * dtype.itemsize} bytes, got {end - begin}")
    if begin % dtype.itemsize:
        raise MappedFileError(f"broken weights: {key}: data of {dtype_name} at byte {begin} of the data")
    return _Place(key, dtype, shape, tuple(strides), begin // dtype.itemsize)
