"""Files read at once: what safetensors reads, as ordinary tensors, and a clear error for anything else."""

from __future__ import annotations

import copy
import io
import json
import os
import struct
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pylora.checkpoint import safetensors_file
from pylora.checkpoint.read import load_peft_weights
from pylora.checkpoint.safetensors_file import SafetensorsReading
from pylora.checkpoint.safetensors_header import BrokenFileError, read_at


def raw(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def numbers(count: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.arange(count).mul(7).remainder(2 if dtype == torch.bool else 100).to(dtype)


def read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    reading = SafetensorsReading(path)
    reading.wait()
    return reading.tensors


def assert_same(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype
        assert got[name].shape == tensor.shape
        assert got[name].untyped_storage().tolist() == tensor.untyped_storage().tolist()  # NaN and all


@pytest.mark.parametrize("dtype", safetensors_file._DTYPES.values(), ids=str)
def test_same_tensors_as_safetensors(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {
        "one": numbers(1, dtype),
        "matrix": numbers(15, dtype).view(3, 5),
        "cube": numbers(24, dtype).view(2, 3, 4),
        "empty": torch.empty(0, 4, dtype=dtype),
        "other": torch.randn(7, 2, dtype=torch.bfloat16),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, path, {"format": "pt"})
    got = read_safetensors(path)
    path.unlink()
    assert_same(got, tensors)


def test_every_dtype_that_safetensors_reads() -> None:
    assert safetensors.torch._TYPES.items() <= safetensors_file._DTYPES.items()


def test_each_tensor_is_an_ordinary_one(tmp_path: Path) -> None:
    """A storage of its own, aligned, writable: what a model's parameters need to be."""
    path = tmp_path / "t.safetensors"
    stored = {"a": torch.randn(5, 3), "b": torch.randn(7), "c": torch.randn(2, 2)}
    save_file(stored, path)
    got = read_safetensors(path)
    for name, tensor in got.items():
        assert tensor.data_ptr() % 64 == 0
        assert tensor.untyped_storage().nbytes() == stored[name].nbytes
        assert tensor.is_contiguous()
        assert tensor.is_leaf
    buffer = io.BytesIO()
    torch.save(got["a"], buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer), stored["a"])
    assert torch.equal(copy.deepcopy(got)["b"], stored["b"])
    got["b"].zero_()
    got["c"].share_memory_().add_(1)
    parameter = torch.nn.Parameter(got["a"])
    parameter.square().sum().backward()
    torch.optim.SGD([parameter], lr=0.5).step()
    assert torch.equal(parameter, torch.zeros(5, 3))
    assert torch.equal(got["c"], stored["c"] + 1)
    assert_same(load_file(path), stored)


def test_a_default_device_does_not_matter(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    save_file({"x": torch.arange(3.0), "empty": torch.empty(0)}, path)
    with torch.device("meta"):
        got = read_safetensors(path)
    assert_same(got, {"x": torch.arange(3.0), "empty": torch.empty(0)})


def test_data_that_is_not_aligned_in_the_file(tmp_path: Path) -> None:
    data = torch.arange(4.0)
    header = {"a": entry("U8", [1], 0, 1), "x": entry("F32", [4], 1, 17)}
    path = raw(tmp_path / "t", header, b"\7" + data.numpy().tobytes())
    assert_same(read_safetensors(path), {"a": torch.tensor([7], dtype=torch.uint8), "x": data})


def test_no_tensors(tmp_path: Path) -> None:
    assert read_safetensors(raw(tmp_path / "t", {})) == {}


def test_more_tensors_than_one_read_takes(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {f"t{i}": torch.randn(3) for i in range(1500)}
    save_file(tensors, path)
    assert_same(read_safetensors(path), tensors)


@pytest.mark.parametrize("most", [1, 5, 64])
def test_reads_that_give_less_than_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, most: int) -> None:
    content = bytes(range(200))
    (tmp_path / "f").write_bytes(content)
    read = os.preadv

    def reluctant(file: int, buffers: Any, place: int) -> int:
        part = bytearray(most)
        count = left = read(file, [part], place)
        for buffer in buffers:
            buffer[: min(left, len(buffer))] = part[count - left : count - left + min(left, len(buffer))]
            left -= min(left, len(buffer))
        return count - left

    monkeypatch.setattr(os, "preadv", reluctant)
    got = bytearray(150)
    view = memoryview(got)
    with open(tmp_path / "f", "rb") as file:
        read_at(file.fileno(), 20, [view[:7], view[7:7], view[7:90], view[90:]])
        assert got == content[20:170]
        with pytest.raises(BrokenFileError, match="became shorter"):
            read_at(file.fileno(), 100, [view])


@pytest.mark.parametrize(
    ("header", "data", "size", "message"),
    [
        (b"", b"", 1 << 40, "got 8 bytes without its header"),
        (b"{", b"", None, "broken header"),
        (b"[]", b"", None, "broken header"),
        (b"[" * 100_000, b"", None, "broken header"),
        (b"\xff\xfe", b"", None, "broken header"),
        ({"x": 3}, b"", None, "broken header"),
        ({"x": {"dtype": "F32"}}, b"", None, "broken header"),
        ({"x": entry("F32", [1.5], 0, 4)}, b"1234", None, "expected a size from 0 on, got 1.5"),
        ({"x": entry("F32", [-1], 0, 4)}, b"1234", None, "expected a size from 0 on, got -1"),
        ({"x": entry("F32", [True], 0, 4)}, b"1234", None, "expected a size from 0 on, got True"),
        ({"x": entry("F32", [1], 0)}, b"1234", None, "broken header"),
        ({"x": entry("F32", [1], 0, 4)}, b"123", None, r"expected \d+ bytes, got \d+"),
        ({"x": entry("F32", [1], 0, 4)}, b"12345", None, r"expected \d+ bytes, got \d+"),
        ({"x": entry("F32", [2], 0, 4)}, b"1234", None, "expected 8 bytes of F32, got 4"),
        ({"x": entry("F32", [1], 4, 0), "y": entry("F32", [1], 0, 4)}, b"1234", None, "4 bytes of F32, got -4"),
        ({"x": entry("F4", [2], 0, 1)}, b"1", None, "x: expected one of the dtypes F64, .* got F4"),
        ({"x": entry("F32", [1 << 62, 1 << 62], 0, 4)}, b"1234", None, "bytes of F32, got 4"),
        ({"x": entry([], [1], 0, 4)}, b"1234", None, "broken header"),
        ({"x": entry("F32", [1], 4, 8)}, b"12345678", None, "data at byte 0, got 4"),
        ({"x": entry("F32", [2], 0, 8), "y": entry("F32", [1], 4, 8)}, b"12345678", None, "data at byte 8, got 4"),
    ],
)
def test_broken_files(tmp_path: Path, header: Any, data: bytes, size: int | None, message: str) -> None:
    path = raw(tmp_path / "adapter_model.safetensors", header, data, size)
    with pytest.raises(BrokenFileError, match=message):
        read_safetensors(path)
    with pytest.raises(SafetensorError, match=message):
        load_peft_weights(tmp_path)


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_shorter_than_a_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(BrokenFileError, match="without its header"):
        read_safetensors(path)


def test_a_thread_reads_a_large_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names and shapes are known before the data is there; the wait is for the data."""
    path = tmp_path / "t.safetensors"
    tensors = {"large": torch.randn(1 << 18), "small": torch.randn(3)}
    save_file(tensors, path)
    may_read = threading.Event()
    readers = []
    read = os.preadv

    def held_up(*args: Any) -> int:
        readers.append(threading.current_thread())
        assert may_read.wait(60)
        return read(*args)

    monkeypatch.setattr(os, "preadv", held_up)
    reading = SafetensorsReading(path)
    assert {name: tensor.shape for name, tensor in reading.tensors.items()} == {"large": (1 << 18,), "small": (3,)}
    may_read.set()
    reading.wait()
    assert_same(reading.tensors, tensors)
    assert readers
    assert threading.current_thread() not in readers
    reading.wait()


@pytest.mark.parametrize("count", [40_000, 1 << 19])
def test_a_file_that_is_truncated_while_it_is_read(
    tmp_path: Path, truncating: Callable[[Path, int], None], count: int
) -> None:
    path = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.randn(count)}, path)
    truncating(path, 8192)
    with pytest.raises(SafetensorError, match=r"adapter_model.*the file became shorter while it was read"):
        load_peft_weights(tmp_path)
