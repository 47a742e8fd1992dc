"""Reading and writing .safetensors files tensor by tensor.

The `safetensors` library maps a whole file when it reads and takes a whole dictionary when it writes; a checkpoint
of which one tensor changes need not pass through memory. Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.checkpoint.safetensors_header import BrokenFileError, read_at, read_header
from pylora.offline.errors import OfflineError

if TYPE_CHECKING:
    import torch

_CHUNK = 4 << 20
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
            header, self._start = read_header(self._file.fileno())
        except (BrokenFileError, OSError) as error:
            self._file.close()
            raise OfflineError(f"{self.path}: {error}") from None
        self.entries, self.metadata = dict(header.entries), dict(header.metadata)

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
        try:
            read_at(self._file.fileno(), self._start + begin, [buffer])
        except BrokenFileError as error:
            raise OfflineError(f"{self.path}: {name}: {error}") from None

    def close(self) -> None:
        self._file.close()

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


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
