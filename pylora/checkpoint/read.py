"""Reads an adapter's weights file."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pylora.checkpoint.files import StrPath, find_weights
from pylora.checkpoint.keys import rename_keys

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from pylora.checkpoint.safetensors_file import ReadingMemory


def load_peft_weights(
    model_id: StrPath,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    **hf_hub_download_kwargs: Any,
) -> dict[str, Tensor]:
    """Reads the weights file of an adapter.

    Args:
        model_id: local folder, or repository id on the hub.
        device: where the tensors are to be; the CPU by default, from where they are copied to each layer's device.
        key_mapping: regular expressions to rename keys by, see `pylora.checkpoint.keys.rename_keys`.
        hf_hub_download_kwargs: `subfolder`, and what `huggingface_hub.hf_hub_download` takes.

    Returns:
        checkpoint keys and tensors, as stored.

    Raises:
        ValueError: no weights file there, or one that holds something else than tensors.
        safetensors.SafetensorError: a truncated or corrupt .safetensors file.
        pickle.UnpicklingError: a .bin file that is corrupt or holds anything but tensors (it is never unpickled
            beyond those: `weights_only=True`). Truncated ones raise RuntimeError or EOFError.
    """
    weights = start_loading(model_id, device, key_mapping, **hf_hub_download_kwargs)
    weights.wait()
    return weights.tensors


class ArrivingWeights(NamedTuple):
    """Checkpoint keys and tensors, whose values are undefined until `wait` has been called.

    `wait` raises what `load_peft_weights` does.
    """

    tensors: dict[str, Tensor]
    wait: Callable[[], None]


def start_loading(
    model_id: StrPath,
    device: str | torch.device | None = None,
    key_mapping: Mapping[str, str] | None = None,
    memory: ReadingMemory | None = None,
    **hf_hub_download_kwargs: Any,
) -> ArrivingWeights:
    """`load_peft_weights`, which returns when it knows the tensors' names and shapes: their data may still be read.

    Args:
        memory: where a .safetensors file is read to. Its tensors last until the next one is.
    """
    path = find_weights(model_id, **hf_hub_download_kwargs)
    to = "cpu" if device is None else device
    weights = _read_safetensors(path, to, memory) if path.suffix == ".safetensors" else _read_pickle(path, to)
    return weights._replace(tensors=rename_keys(weights.tensors, key_mapping))


def _read_safetensors(path: Path, device: str | torch.device, memory: ReadingMemory | None) -> ArrivingWeights:
    from pylora.checkpoint.safetensors_file import SafetensorsReading

    with _broken_as_safetensors_says(path):
        reading = SafetensorsReading(path, memory)

    def wait() -> None:
        with _broken_as_safetensors_says(path):
            reading.wait()

    if str(device) == "cpu":
        return ArrivingWeights(reading.tensors, wait)
    wait()
    return ArrivingWeights({key: tensor.to(device) for key, tensor in reading.tensors.items()}, _no_wait)


@contextmanager
def _broken_as_safetensors_says(path: Path) -> Iterator[None]:
    from pylora.checkpoint.safetensors_header import BrokenFileError

    try:
        yield
    except BrokenFileError as error:
        from safetensors import SafetensorError

        raise SafetensorError(f"{os.fspath(path)!r}: {error}") from None


def _no_wait() -> None:
    """For tensors that are there."""


def _read_pickle(path: Path, device: str | torch.device) -> ArrivingWeights:
    import torch

    tensors = torch.load(path, map_location=torch.device(device), weights_only=True)
    if not isinstance(tensors, dict) or not all(
        isinstance(key, str) and isinstance(value, torch.Tensor) for key, value in tensors.items()
    ):
        raise ValueError(f"{os.fspath(path)!r}: expected a dictionary of tensors by name, got {type(tensors).__name__}")
    return ArrivingWeights(tensors, _no_wait)
