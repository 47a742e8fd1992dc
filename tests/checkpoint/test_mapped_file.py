"""Mapped .safetensors files: the same tensors as safetensors reads, and a clear error for anything else."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pylora.checkpoint.load import load_peft_weights, view_peft_weights
from pylora.checkpoint.mapped_file import MappedFileError, map_safetensors


def raw(path: Path, header: Any, data: bytes = b"", size: int | None = None) -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text) if size is None else size) + text + data)
    return path


def entry(dtype: Any, shape: Any, *offsets: Any) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": list(offsets)}


def test_same_tensors_as_safetensors(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    tensors = {
        "f32": torch.randn(3, 5),
        "bf16": torch.randn(7, 2, dtype=torch.bfloat16),
        "f16": torch.randn(2, 3, 4, dtype=torch.float16),
        "f64": torch.randn(1, dtype=torch.float64),
        "empty": torch.empty(0, 4),
        "scalar": torch.tensor(2.5),
    }
    save_file(tensors, path, {"format": "pt"})
    mapped = map_safetensors(path)
    path.unlink()  # the pages stay as long as a tensor lies over them
    assert mapped.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert mapped[name].dtype == tensor.dtype
        assert mapped[name].shape == tensor.shape
        assert torch.equal(mapped[name], tensor)


def test_a_header_that_leaves_the_data_unaligned(tmp_path: Path) -> None:
    data = torch.arange(4.0)
    path = raw(tmp_path / "t", json.dumps({"x": entry("F32", [4], 0, 16)}).encode() + b" ", data.numpy().tobytes())
    assert (8 + len(path.read_bytes()[8:-16])) % 4
    assert torch.equal(map_safetensors(path)["x"], data)
    assert torch.equal(load_file(path)["x"], data)


def test_no_tensors(tmp_path: Path) -> None:
    assert map_safetensors(raw(tmp_path / "t", {})) == {}


@pytest.mark.parametrize(
    ("header", "data", "size", "message"),
    [
        (b"", b"", 1 << 40, "a header of 1099511627776 bytes in a file of 8"),
        (b"{", b"", None, "no header"),
        (b"[]", b"", None, "no header"),
        (b"[" * 100_000, b"", None, "no header"),
        (b"\xff\xfe", b"", None, "no header"),
        ({"x": 3}, b"", None, "no header"),
        ({"x": {"dtype": "F32"}}, b"", None, "no header"),
        ({"x": entry("F32", [1.5], 0, 4)}, b"1234", None, "expected a size from 0 on, got 1.5"),
        ({"x": entry("F32", [-1], 0, 4)}, b"1234", None, "expected a size from 0 on, got -1"),
        ({"x": entry("F32", [True], 0, 4)}, b"1234", None, "expected a size from 0 on, got True"),
        ({"x": entry("F32", [1], 0)}, b"1234", None, "no header"),
        ({"x": entry("F32", [1], 0, 4)}, b"123", None, r"expected \d+ bytes, got \d+"),
        ({"x": entry("F32", [1], 0, 4)}, b"12345", None, r"expected \d+ bytes, got \d+"),
        ({"x": entry("F32", [2], 0, 4)}, b"1234", None, "x: expected 8 bytes, got 4"),
        ({"x": entry("F32", [1], 4, 0), "y": entry("F32", [1], 0, 4)}, b"1234", None, "x: expected 4 bytes, got -4"),
        ({"x": entry("F16", [1], 0, 2), "y": entry("F32", [1], 2, 6)}, b"123456", None, "data of F32 at byte 2"),
        ({"x": entry("I64", [1], 0, 8)}, b"12345678", None, "expected one of the dtypes F64, F32, F16, BF16, got I64"),
        ({"x": entry([], [1], 0, 4)}, b"1234", None, "no header"),
        ({"x": entry("F32", [1], 4, 8)}, b"12345678", None, "data from byte 0 on, got it from byte 4"),
        ({"x": entry("F32", [2], 0, 8), "y": entry("F32", [1], 4, 8)}, b"12345678", None, "data from byte 8 on"),
    ],
)
def test_broken_files(tmp_path: Path, header: Any, data: bytes, size: int | None, message: str) -> None:
    with pytest.raises(MappedFileError, match=message):
        map_safetensors(raw(tmp_path / "t", header, data, size))


@pytest.mark.parametrize("content", [b"", b"1234567"])
def test_files_shorter_than_a_header(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "t"
    path.write_bytes(content)
    with pytest.raises(MappedFileError, match="broken weights"):
        map_safetensors(path)


def test_loading_into_a_model_maps_what_can_be_mapped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Views for a load that copies; safetensors for other dtypes, for broken files and for tensors that are kept."""
    path = tmp_path / "adapter_model.safetensors"
    save_file({"x": torch.arange(3.0)}, path)
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.load_file", lambda *args, **kwargs: pytest.fail("read by safetensors"))
        assert torch.equal(view_peft_weights(tmp_path)["x"], torch.arange(3.0))
    kept = load_peft_weights(tmp_path)["x"]
    kept.add_(1)  # its own memory
    assert torch.equal(load_file(path)["x"], torch.arange(3.0))
    save_file({"x": torch.arange(3)}, path)
    assert torch.equal(view_peft_weights(tmp_path)["x"], torch.arange(3))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(SafetensorError):
        view_peft_weights(tmp_path)
