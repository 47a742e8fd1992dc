"""Reading and writing .safetensors files tensor by tensor.

The `safetensors` library maps a whole file when it reads and takes a whole dictionary when it writes; a checkpoint
of which one tensor changes need not pass through memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.checkpoint.safetensors_header import MAX_BYTES, Entry, parse_header
from pylora.offline.errors import OfflineError

if TYPE_CHECKING:
    import torch

_CHUNK = 4 << 20
_BITS = {"F4": 4, "F6_E2M3": 6, "F6_E3M2": 6}
_BITS |= dict.fromkeys(("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8)
_BITS |= dict.fromkeys(("I16", "U16", "F16", "BF16"), 16)
_BITS |= dict.fromkeys(("I32", "U32", "F32"), 32) | dict.fromkeys(("I64", "U64", "F64", "C64"), 64)
_FLOATS = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}

Progress = Callable[[int], Any]
"""Called with a number of bytes that have been written."""


def torch_dtype(name: str) -> torch.dtype | None:
    """The torch dtype that the format calls `name`; None unless it is F64, F32, F16 or BF16."""
    import torch

    return getattr(torch, _FLOATS[name]) if name in _FLOATS else None


def dtype_name(dtype: torch.dtype) -> str:
    """How the format calls float64, float32, float16 or bfloat16."""
    return {f"torch.{long}": short for short, long in _FLOATS.items()}[str(dtype)]


class TensorFile:
    """A .safetensors file, opened; its header is read and checked, its tensors are not read until asked for.

    Attributes:
        path: The file.
        entries: Its tensors by name, in the order of their data.
        metadata: The header's own strings.

    Raises:
        OfflineError: it cannot be opened, is truncated or not of this format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self._file = open(path, "rb", buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise OfflineError(f"{path}: cannot be read: {error.strerror}") from None
        try:
            self._start, self.entries, self.metadata = self._header()
        except BaseException:
            self._file.close()
            raise

    def _header(self) -> tuple[int, dict[str, Entry], dict[str, str]]:
        size = os.fstat(self._file.fileno()).st_size
        length = int.from_bytes(self._file.read(8), "little")
        if size < 8 or length > min(MAX_BYTES, size - 8):
            raise OfflineError(f"{self.path}: expected a .safetensors file, got {size} bytes without its header")
        try:
            entries, metadata = parse_header(self._file.read(length))
            for entry in entries.values():
                _check_size(entry)
        except ValueError as error:
            raise OfflineError(f"{self.path}: expected a .safetensors file, got a broken header: {error}") from None
        entries = dict(sorted(entries.items(), key=lambda item: item[1].begin))
        place = 0
        for name, entry in entries.items():
            if entry.begin != place:
                raise OfflineError(f"{self.path}: {name}: expected its data at byte {place}, got {entry.begin}")
            place = entry.end
        if 8 + length + place != size:
            raise OfflineError(f"{self.path}: expected {8 + length + place} bytes, got {size}: is it truncated?")
        return 8 + length, entries, metadata

    def read(self, name: str) -> torch.Tensor:
        """A tensor of floating point numbers, in memory of its own.

        Raises:
            OfflineError: its dtype is another, or the file became shorter.
            KeyError: no tensor of that name.
        """
        import torch

        entry = self.entries[name]
        dtype = torch_dtype(entry.dtype)
        if dtype is None:
            raise OfflineError(f"{self.path}: {name}: expected F64, F32, F16 or BF16, got {entry.dtype}")
        tensor = torch.empty(entry.shape, dtype=dtype)
        if tensor.numel():
            self._read_into(name, entry.begin, tensor.view(-1).view(torch.uint8).numpy().data)
        return tensor

    def chunks(self, name: str) -> Iterator[bytes]:
        """A tensor's bytes, 4 MiB at a time."""
        entry = self.entries[name]
        for begin in range(entry.begin, entry.end, _CHUNK):
            buffer = bytearray(min(_CHUNK, entry.end - begin))
            self._read_into(name, begin, memoryview(buffer))
            yield bytes(buffer)

    def _read_into(self, name: str, begin: int, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            count = os.preadv(self._file.fileno(), [buffer[done : done + _CHUNK]], self._start + begin + done)
            if count == 0:
                raise OfflineError(f"{self.path}: {name}: the file became shorter while it was read")
            done += count

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def _check_size(entry: Entry) -> None:
    expected = math.prod(entry.shape) * _BITS.get(entry.dtype, 0)
    if entry.dtype in _BITS and (entry.end - entry.begin) * 8 != expected:
        raise ValueError(f"expected {expected // 8} bytes of {entry.dtype}, got {entry.end - entry.begin}")


class TensorFileWriter:
    """Writes a .safetensors file from the first tensor to the last.

    Args:
        path: The file; a temporary name, if nobody is to see half of it.
        tensors: dtype name, shape and bytes of every tensor, in the order in which they will be written.
        metadata: The header's own strings.
        progress: Told of what is written.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[str, tuple[int, ...], int]],
        metadata: Mapping[str, str],
        progress: Progress | None = None,
    ) -> None:
        header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
        place = 0
        for name, (dtype, shape, size) in tensors.items():
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [place, place + size]}
            place += size
        encoded = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        encoded += b" " * (-len(encoded) % 8)
        self._waiting = {name: size for name, (_, _, size) in tensors.items()}
        self._progress = progress or (lambda count: None)
        self._file = open(path, "xb", buffering=0)  # noqa: SIM115 (closed by `close`)
        self._put(len(encoded).to_bytes(8, "little") + encoded)

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write the next tensor, which is `name`."""
        import torch

        numbers = tensor.detach().contiguous().view(-1)
        self.write_chunks(name, [numbers.view(torch.uint8).numpy().data] if len(numbers) else [])

    def write_chunks(self, name: str, chunks: Any) -> None:
        """Write the next tensor, which is `name`, from pieces of its bytes."""
        expected = next(iter(self._waiting), None)
        if name != expected:
            raise ValueError(f"write: name: expected the next tensor, {expected!r}, got {name!r}")
        left = self._waiting.pop(name)
        for chunk in chunks:
            left -= len(chunk)
            for begin in range(0, len(chunk), _CHUNK):
                self._progress(self._put(chunk[begin : begin + _CHUNK]))
        if left:
            raise ValueError(f"write: {name}: {left} bytes are missing")

    def _put(self, data: Any) -> int:
        view = memoryview(data)
        done = 0
        while done < len(view):
            done += self._file.write(view[done:]) or 0
        return done

    def finish(self) -> None:
        """Check that every tensor has been written, and force the file to disk."""
        if self._waiting:
            raise ValueError(f"finish: {len(self._waiting)} tensors were not written")
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFileWriter:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()
