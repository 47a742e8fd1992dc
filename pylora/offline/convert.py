"""LoRA files from one program's layout into another's."""

from __future__ import annotations

import io
import os
from pathlib import Path
from typing import NamedTuple

from pylora.config.base import CONFIG_NAME
from pylora.config.files import replacing
from pylora.errors import UnsupportedFeatureError
from pylora.offline.adapter import read_adapter, write_adapter
from pylora.offline.errors import OfflineError
from pylora.offline.folders import check_output, disk_failures, new_folder, new_parents
from pylora.offline.layouts import LAYOUTS, Components, Hints, Source, find_layout
from pylora.offline.layouts.peft import config_for

PEFT = "peft"


class Converted(NamedTuple):
    """What was done.

    Attributes:
        from_: The layout of the source.
        layers: How many layers, by component.
        note: What the written file cannot say; "" for nothing.
    """

    from_: str
    layers: dict[str, int]
    note: str


def convert(source: Path, out: Path, to: str, from_: str | None, hints: Hints) -> Converted:
    """Rewrite an adapter in another layout.

    Args:
        source: A file, or a PEFT folder (of one adapter, or with a folder of one for each component).
        out: A new folder for PEFT's layout, else a new file: .safetensors, or .pt or .bin for a pickle.
        to: A layout's name, or "peft".
        from_: Likewise; None finds it out.
        hints: What the files do not say.

    Raises:
        OfflineError: a file cannot be read, is of another layout, or has what the target cannot hold.
        UnsupportedFeatureError: a PEFT adapter of a mechanism that has no place in a file of another layout.
        OSError: `out` cannot be written.
    """
    name, components = _read(source, from_, hints)
    if to == PEFT:
        note = _write_folders(components, out, hints)
    else:
        note = _write_file(components, out, to, hints)
    return Converted(name, {component: len(layers) for component, layers in components.items()}, note)


def _read(path: Path, from_: str | None, hints: Hints) -> tuple[str, Components]:
    if path.is_dir():
        if from_ not in (None, PEFT):
            raise OfflineError(f"{path}: expected a file for --from {from_}, got a folder")
        return PEFT, _read_folders(path)
    content = read_file(path)
    layout = find_layout(content) if from_ is None else LAYOUTS.get(from_)
    if layout is None:
        raise OfflineError(f"{path}: expected a folder for --from {PEFT}, got a file")
    return layout.name, layout.read(content, hints)


def read_file(path: Path) -> Source:
    """The tensors of a .safetensors file, or of a pickle that holds nothing but tensors.

    Raises:
        OfflineError: it cannot be read.
    """
    from pickle import UnpicklingError

    import torch
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise OfflineError(f"{path}: expected a file or a folder, found nothing")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                return Source(str(path), {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {})  # noqa: SIM118
        content = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, SafetensorError, UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[:1]
        raise OfflineError(f"{path}: cannot be read: {''.join(first)}") from None
    if not isinstance(content, dict) or not all(isinstance(value, torch.Tensor) for value in content.values()):
        raise OfflineError(f"{path}: expected a dictionary of tensors, got {type(content).__name__}")
    return Source(str(path), content)


def _read_folders(path: Path) -> Components:
    if (path / CONFIG_NAME).is_file():
        folders = {"": path}
    else:
        folders = {each.name: each for each in sorted(path.iterdir()) if (each / CONFIG_NAME).is_file()}
    if not folders:
        raise OfflineError(f"{path}: expected {CONFIG_NAME} in it or in its folders, found none")
    components: Components = {}
    for name, folder in folders.items():
        adapter = read_adapter(folder)
        if adapter.others:
            raise UnsupportedFeatureError(
                f"{folder}: {next(iter(adapter.others))}: whole tensors have no place elsewhere"
            )
        components[name] = adapter.layers
    return components


def _write_folders(components: Components, out: Path, hints: Hints) -> str:
    check_output(out)
    with new_folder(out) as staging:
        for component, layers in components.items():
            base = hints.bases.get(component)
            config = config_for(layers, base_model_name_or_path=None if base is None else str(base.folder))
            write_adapter(staging / component if len(components) > 1 else staging, config, layers, {})
    return ""


def _write_file(components: Components, out: Path, to: str, hints: Hints) -> str:
    import torch
    from safetensors.torch import save_file

    if out.exists():
        raise OfflineError(f"{out}: expected the name of a new file, got one that exists")
    if out.suffix not in (".safetensors", ".pt", ".pth", ".bin"):
        raise OfflineError(f"{out}: expected a name that ends in .safetensors, .pt or .bin for --to {to}")
    tensors, metadata, note = LAYOUTS[to].write(components, hints)
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with new_parents(out), replacing(os.fspath(out)) as temporary, disk_failures():
        if out.suffix == ".safetensors":
            save_file(tensors, temporary, metadata=metadata or {"format": "pt"})
        else:
            pickled = io.BytesIO()  # by its own writing torch makes a RuntimeError of a full disk
            torch.save(tensors, pickled)
            Path(temporary).write_bytes(pickled.getbuffer())
    return note
