"""Reading and writing .safetensors files by the tensor: as the library does it, and broken files."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import load_file, save_file

from pylora.offline.errors import OfflineError
from pylora.offline.tensor_files import TensorFile, TensorFileWriter

TENSORS = {
    "b": torch.randn(3, 5),
    "a": torch.randn(4).to(torch.bfloat16),
    "empty": torch.zeros(0, 3),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "ints": torch.arange(7),
    "flags": torch.tensor([True, False, True]),
    "é": torch.randn(2, 2).half(),
}


def test_reads_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "f.safetensors", metadata={"format": "pt"})
    with TensorFile(tmp_path / "f.safetensors") as file:
        assert file.entries.keys() == TENSORS.keys()
        assert file.metadata == {"format": "pt"}
        for key, tensor in TENSORS.items():
            assert file.entries[key].shape == tuple(tensor.shape)
            if tensor.is_floating_point():
                assert torch.equal(file.read(key), tensor)
            else:
                with pytest.raises(OfflineError, match=f"{key}: expected F64, F32, F16 or BF16"):
                    file.read(key)


def test_the_library_reads_what_is_written(tmp_path):
    save_file(TENSORS, tmp_path / "f.safetensors", metadata={"note": "x"})
    told = []
    with TensorFile(tmp_path / "f.safetensors") as file:
        layout = {key: (e.dtype, e.shape, e.end - e.begin) for key, e in file.entries.items()}
        with TensorFileWriter(tmp_path / "g.safetensors", layout, file.metadata, told.append) as writer:
            for key in layout:
                if TENSORS[key].is_floating_point():
                    writer.write(key, TENSORS[key])
                else:
                    writer.write_chunks(key, file.chunks(key))
            writer.finish()
    found = load_file(tmp_path / "g.safetensors")
    assert all(torch.equal(found[key], TENSORS[key]) and found[key].dtype == TENSORS[key].dtype for key in TENSORS)
    assert sum(told) == sum(t.nbytes for t in TENSORS.values())


def test_writer_keeps_to_its_plan(tmp_path):
    layout = {"a": ("F32", (2,), 8), "b": ("F32", (1,), 4)}
    with TensorFileWriter(tmp_path / "f", layout, {}) as writer:
        with pytest.raises(ValueError, match="expected the next tensor, 'a', got 'b'"):
            writer.write("b", torch.zeros(1))
        with pytest.raises(ValueError, match="4 bytes are missing"):
            writer.write("a", torch.zeros(1))
        with pytest.raises(ValueError, match="1 tensors were not written"):
            writer.finish()
    with pytest.raises(FileExistsError):
        TensorFileWriter(tmp_path / "f", layout, {})


def header(content: object, data: bytes = b"") -> bytes:
    text = content if isinstance(content, bytes) else json.dumps(content).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "0 bytes without its header"),
        (b"\xff" * 8, "without its header"),
        (header(b"{"), "broken header"),
        (header([1]), "broken header"),
        (header({"a": {"dtype": "F32", "shape": [2]}}), "broken header"),
        (
            header({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}, b"1234"),
            "expected 8 bytes of F32, got 4",
        ),
        (header({"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}, b"1234"), "got -1"),
        (
            header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}}, b"12345678"),
            "expected its data at byte 0",
        ),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"123"), "is it truncated"),
        (header({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}, b"12345"), "is it truncated"),
    ],
)
def test_broken_files(tmp_path, content, told):
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(OfflineError, match=told):
        TensorFile(tmp_path / "f")


def test_file_that_becomes_shorter(tmp_path):
    save_file({"a": torch.randn(4000)}, tmp_path / "f.safetensors")
    with TensorFile(tmp_path / "f.safetensors") as file:
        os.truncate(tmp_path / "f.safetensors", 9000)
        with pytest.raises(OfflineError, match="became shorter"):
            file.read("a")
