"""Batches whose rows belong to different adapters: hands `adapter_names` to every layer for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from pylora.layers import LoraLayer, walk
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper


def _insert_adapter_names(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], adapter_names: list[str]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "adapter_names": adapter_names}


def _layers(model: nn.Module) -> list[nn.Module]:
    return [v.module for v in walk(model) if isinstance(v.module, (LoraLayer, AuxiliaryTrainingWrapper))]


def _encoder(model: Any) -> nn.Module | None:
    """The encoder of an encoder-decoder model; transformers returns the model itself for one without."""
    get_encoder = getattr(model, "get_encoder", None)
    encoder = get_encoder() if callable(get_encoder) else None
    return None if encoder is model else encoder


def _check_names(model: nn.Module, adapter_names: list[str]) -> None:
    known: set[str] = set()
    for layer in _layers(model):
        if isinstance(layer, LoraLayer):
            known.update(layer.lora_A.keys(), layer.lora_embedding_A.keys())
    unknown = sorted(set(adapter_names) - known - {"__base__"})
    if unknown:
        raise ValueError(f"Trying to infer with non-existing adapter(s): {', '.join(unknown)}")


@contextmanager
def adapter_names_passed(
    model: nn.Module, training: bool, adapter_names: list[str] | None, num_beams: Any = None
) -> Iterator[None]:
    """Inside the context every LoRA layer and `modules_to_save` wrapper gets `adapter_names` with its input.

    Args:
        model: The base model, adapters in place.
        training: Whether the model is in training mode.
        adapter_names: One name, or "__base__", for each row of the batch. None: the context does nothing.
        num_beams: With beam search, each row stands num_beams times in the batch, except in an encoder.

    Raises:
        ValueError: The model is training, or a name is on no layer.
        TypeError: Beam search, and the names are no list or tuple.
    """
    if adapter_names is None:
        yield
        return
    if training:
        raise ValueError("Cannot pass `adapter_names` when the model is in training mode.")
    _check_names(model, adapter_names)
    beams = num_beams if isinstance(num_beams, int) and num_beams > 1 else 1
    if beams > 1 and not isinstance(adapter_names, (list, tuple)):
        raise TypeError(f"Got adapter names of type {type(adapter_names)}, expected a list of str.")
    encoder = _encoder(model) if beams > 1 else None
    in_encoder = set(_layers(encoder)) if encoder is not None else set()
    repeated = [name for name in adapter_names for _ in range(beams)]
    handles: list[RemovableHandle] = []
    try:
        for layer in _layers(model):
            names = adapter_names if layer in in_encoder else repeated
            hook = partial(_insert_adapter_names, adapter_names=names)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()
