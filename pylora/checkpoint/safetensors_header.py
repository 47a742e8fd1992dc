"""The header of a .safetensors file, for readers that take the data themselves.

Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
from typing import Any, NamedTuple

MAX_BYTES = 100_000_000
"""The format's own limit on a header."""


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


def parse_header(text: bytes) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors in the order of the header, and its own strings. Sizes and places are not held to one another.

    Raises:
        ValueError: it is no header; the message says what was found instead.
    """
    try:
        content = json.loads(text)
        metadata = content.pop("__metadata__", {})
        return {name: _entry(value) for name, value in content.items()}, metadata
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ValueError(repr(error)) from None


def _entry(value: Any) -> Entry:
    dtype, shape, (begin, end) = value["dtype"], tuple(value["shape"]), value["data_offsets"]
    for number in (*shape, begin, end):
        if type(number) is not int or number < 0:
            raise ValueError(f"expected a size from 0 on, got {number!r}")
    if type(dtype) is not str:
        raise TypeError(f"expected the name of a dtype, got {dtype!r}")
    return Entry(dtype, shape, begin, end)
