"""Writes an adapter's files: weights and configuration, for PEFT's readers and pylora's alike."""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pylora.checkpoint.files import SAFETENSORS_WEIGHTS_NAME, WEIGHTS_NAME, StrPath, staged_files

if TYPE_CHECKING:
    from torch import Tensor


def write_weights(tensors: Mapping[str, Tensor], folder: StrPath, safe_serialization: bool = True) -> None:
    """Writes `adapter_model.safetensors` (with format=pt in its header), or `adapter_model.bin`, into `folder`.

    The tensors are stored whole and each on its own: shared ones twice, views without the rest of their storage.
    An older file is replaced when the new one is complete.
    """
    with staged_files() as stage:
        stage_weights(tensors, stage.folder(Path(folder)), safe_serialization)


def stage_weights(tensors: Mapping[str, Tensor], folder: Path, safe_serialization: bool) -> None:
    """As `write_weights`, into a folder that nobody reads yet."""
    ready = _compact(tensors)
    if safe_serialization:
        from safetensors.torch import save_file

        save_file(ready, folder / SAFETENSORS_WEIGHTS_NAME, metadata={"format": "pt"})
    else:
        import torch

        torch.save(ready, folder / WEIGHTS_NAME)


def warn_if_shadowed(folder: StrPath, safe_serialization: bool) -> None:
    """A .bin beside an older .safetensors would never be read: loaders, PEFT's too, take the latter first."""
    older = Path(folder, SAFETENSORS_WEIGHTS_NAME)
    if not safe_serialization and older.exists():
        warnings.warn(
            f"{os.fspath(older)!r} is from an earlier save and is read before {WEIGHTS_NAME}: "
            "remove it, or save with safe_serialization=True",
            stacklevel=2,
        )


def _compact(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous tensors that fill their storage and share it with no other."""
    ready: dict[str, Tensor] = {}
    taken: set[tuple[str, int]] = set()
    for key, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage()
        identity = (str(tensor.device), storage.data_ptr())
        whole = tensor.is_contiguous() and storage.nbytes() == tensor.nbytes
        if tensor.device.type != "meta" and (identity in taken or not whole):
            import torch

            tensor = tensor.clone(memory_format=torch.contiguous_format)
        taken.add(identity)
        ready[key] = tensor
    return ready
