"""A base model's folder as tensors by name: one .safetensors file, or shards with an index."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pylora.checkpoint.safetensors_header import Entry
from pylora.offline.errors import OfflineError
from pylora.offline.folders import local_folder
from pylora.offline.tensor_files import TensorFile

_STEMS = ("model", "diffusion_pytorch_model")
_INDEX = ".safetensors.index.json"
_WEIGHTS = frozenset((".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx"))
_FILES = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py")


class BaseCheckpoint:
    """A model's files, opened.

    Attributes:
        folder: Where they are.
        files: The .safetensors files by name.
        config: Of `config.json`; empty where there is none.

    Args:
        place: A folder, or a hub id.
        what: How messages call it.

    Raises:
        OfflineError: there are no .safetensors files, or they are broken, or do not fit their index.
    """

    def __init__(self, place: str, what: str = "a base model") -> None:
        self.folder = local_folder(place, what, _FILES)
        self.index_name, names = self._weight_files()
        self.files = {name: TensorFile(self.folder / name) for name in names}
        self._file_of = {key: file for file in self.files.values() for key in file.entries}
        if sum(len(file.entries) for file in self.files.values()) != len(self._file_of):
            raise OfflineError(f"{self.folder}: expected every tensor in one file, got some in two")
        self.config = self._read_json("config.json") if (self.folder / "config.json").is_file() else {}

    def _weight_files(self) -> tuple[str | None, list[str]]:
        for stem in _STEMS:
            if (self.folder / f"{stem}{_INDEX}").is_file():
                places = self._read_json(f"{stem}{_INDEX}").get("weight_map")
                if not isinstance(places, dict) or not all(isinstance(name, str) for name in places.values()):
                    raise OfflineError(f"{self.folder / (stem + _INDEX)}: expected a weight_map of names of files")
                names = sorted(set(places.values()))
                if strange := [name for name in names if Path(name).name != name]:
                    raise OfflineError(f"{self.folder}: expected shards in the folder itself, got {strange[0]!r}")
                return f"{stem}{_INDEX}", names
            if (self.folder / f"{stem}.safetensors").is_file():
                return None, [f"{stem}.safetensors"]
        others = sorted(path.name for path in self.folder.iterdir() if path.suffix in _WEIGHTS)
        found = f"only {', '.join(others[:3])}" if others else "no weights"
        raise OfflineError(f"{self.folder}: expected model.safetensors, or shards with their index, found {found}")

    def _read_json(self, name: str) -> dict[str, Any]:
        try:
            content = json.loads((self.folder / name).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise OfflineError(f"{self.folder / name}: cannot be read: {error}") from None
        if not isinstance(content, dict):
            raise OfflineError(f"{self.folder / name}: expected a JSON object, got {type(content).__name__}")
        return content

    def __contains__(self, key: object) -> bool:
        return key in self._file_of

    def __iter__(self) -> Iterator[str]:
        """The names of all tensors, file by file."""
        return iter(self._file_of)

    def entry(self, key: str) -> Entry:
        """A tensor's dtype and shape."""
        return self._file_of[key].entries[key]

    def file_of(self, key: str) -> TensorFile:
        """The file that a tensor is in."""
        return self._file_of[key]

    def read(self, key: str) -> Any:
        """A tensor, in memory of its own."""
        return self._file_of[key].read(key)

    def other_files(self) -> list[Path]:
        """What belongs to the model besides weights: configuration, tokenizer; relative to the folder."""
        found = []
        for path in sorted(self.folder.rglob("*")):
            name = path.relative_to(self.folder)
            hidden = any(part.startswith(".") for part in name.parts)
            if path.is_file() and not hidden and path.suffix not in _WEIGHTS and not name.name.endswith(".index.json"):
                found.append(name)
        return found

    def close(self) -> None:
        for file in self.files.values():
            file.close()

    def __enter__(self) -> BaseCheckpoint:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def match_names(names: list[str], base: BaseCheckpoint) -> dict[str, str]:
    """The base tensor of each layer or tensor of an adapter.

    A checkpoint may leave out the model's own prefix ("wte.weight" of "transformer.wte") or have another one: where no
    name is there as it is, the one change of prefix is made that finds the most.

    Args:
        names: Names of tensors, as the model has them.
        base: The checkpoint.

    Returns:
        names to keys of `base`; names that are not there are left out.
    """
    best = {name: name for name in names if name in base}
    if best:
        return best
    for old, new in sorted(_prefixes(names, list(base))):
        found = {name: new + name.removeprefix(old) for name in names if name.startswith(old)}
        found = {name: key for name, key in found.items() if key in base}
        if len(found) > len(best):
            best = found
    return best


def _prefixes(names: list[str], keys: list[str]) -> set[tuple[str, str]]:
    """(what to take off, what to put on) that turns one of the names into a key with the same last parts."""
    ends: dict[str, list[str]] = {}
    for key in keys:
        ends.setdefault(".".join(key.split(".")[-2:]), []).append(key)
    pairs = set()
    for name in names[:1]:
        for key in ends.get(".".join(name.split(".")[-2:]), []):
            a, b = name.split("."), key.split(".")
            while a and b and a[-1] == b[-1]:
                a.pop()
                b.pop()
            pairs.add((_joined(a), _joined(b)))
    return pairs


def _joined(parts: list[str]) -> str:
    return ".".join([*parts, ""]) if parts else ""
