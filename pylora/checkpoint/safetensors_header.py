"""The header of a .safetensors file, and reads that a shrinking file cannot turn into a signal.

`safetensors` maps files, and the system ends a process that looks at pages which a file has lost since. What is read
here is copied by the system: a file that became shorter is an error like any other.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

_MAX_BYTES = 100_000_000  # the format's own limit on a header
_MOST_BUFFERS = 1024  # Linux's limit for one preadv
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)


class BrokenFileError(ValueError):
    """A file that is truncated or not of the format."""


class Entry(NamedTuple):
    """One tensor of a file.

    Attributes:
        dtype: As the format calls it.
        shape: Its sizes.
        begin, end: Its bytes within the data.
    """

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


class Header(NamedTuple):
    """What a file says of itself. It may be shared: it is not to be changed.

    Attributes:
        entries: The tensors by name, in the order of their data, which has no gaps.
        metadata: The header's own strings.
        data_size: Bytes of all data.
    """

    entries: dict[str, Entry]
    metadata: dict[str, str]
    data_size: int


def read_header(file: int) -> tuple[Header, int]:
    """Read and check the header of an open file.

    Args:
        file: Its descriptor.

    Returns:
        the header, and the byte of the file at which the data begins.

    Raises:
        BrokenFileError: the file is truncated, too long, or not of this format.
    """
    size = os.fstat(file).st_size
    length = int.from_bytes(os.pread(file, 8, 0), "little")
    if size < 8 or length > min(_MAX_BYTES, size - 8):
        raise BrokenFileError(f"expected a .safetensors file, got {size} bytes without its header")
    header = _parse(os.pread(file, length, 8))
    start = 8 + length
    if start + header.data_size != size:
        raise BrokenFileError(f"expected {start + header.data_size} bytes, got {size}: is it truncated?")
    return header, start


def read_at(file: int, place: int, buffers: Sequence[memoryview]) -> None:
    """Fill buffers with the bytes of an open file from `place` on.

    Raises:
        BrokenFileError: the file ends before. The buffers are undefined then.
    """
    waiting = [buffer for buffer in buffers if len(buffer)]
    while waiting:
        count = os.preadv(file, waiting[:_MOST_BUFFERS], place)
        if count == 0:
            raise BrokenFileError("the file became shorter while it was read")
        place += count
        full = 0
        while full < len(waiting) and count >= len(waiting[full]):
            count -= len(waiting[full])
            full += 1
        del waiting[:full]
        if count:
            waiting[0] = waiting[0][count:]


@lru_cache(maxsize=32)
def _parse(text: bytes) -> Header:
    """Adapters of one kind have one header, which is looked at once."""
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        entries = {name: _entry(value) for name, value in content.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise BrokenFileError(f"expected a .safetensors file, got a broken header: {error!r}") from None
    entries = dict(sorted(entries.items(), key=lambda item: item[1][2:]))
    place = 0
    for name, entry in entries.items():
        if entry.begin != place:
            raise BrokenFileError(f"{name}: expected its data at byte {place}, got {entry.begin}")
        place = entry.end
    return Header(entries, metadata, place)


def _entry(value: Any) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"expected a size from 0 on, got {number!r}")
    if type(dtype) is not str:
        raise TypeError(f"expected the name of a dtype, got {dtype!r}")
    expected = math.prod(shape) * _BITS.get(dtype, 0)
    if end < begin or (dtype in _BITS and (end - begin) * 8 != expected):
        raise ValueError(f"expected {expected // 8} bytes of {dtype}, got {end - begin}")
    return Entry(dtype, shape, begin, end)
