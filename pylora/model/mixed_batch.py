"""Batches whose rows belong to different adapters: hands `adapter_names` to every layer for the length of one call."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from pylora.layers import LoraLayer, walk
from pylora.layers.row_names import RowNames
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
    once = RowNames.of(adapter_names)
    repeated = RowNames(name for name in adapter_names for _ in range(beams)) if beams > 1 else once
    handles: list[RemovableHandle] = []
    try:
        for layer in _layers(model):
            names = once if layer in in_encoder else repeated
            hook = partial(_insert_adapter_names, adapter_names=names)
            handles.append(layer.register_forward_pre_hook(hook, with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def mixed_training(model: nn.Module, adapter_names: Sequence[str]) -> Iterator[None]:
    """Inside the context, forwards of the model train several adapters in one batch, each on its own rows.

    Every adapter gets the gradients that its rows alone would give it, with a loss that sums over rows. Dropout drops
    elements by a row's place in the batch. Which parameters train is not changed: make the adapters active first, with
    `model.base_model.set_adapter([...])`.

    Args:
        model: A PeftModel or LoraModel, in training or evaluation mode.
        adapter_names: An active adapter's name, or "__base__", for each row of the batches inside.

    Raises:
        ValueError: A name is on no layer, or not active. A layer raises it for a batch of another size, and where
            adapters are merged.

    With gradient checkpointing call `backward` inside the context too, since blocks are computed again then.

    Example:
        >>> model.base_model.set_adapter(["french", "german"])
        >>> with pylora.mixed_training(model, ["french", "german", "german"]):
        ...     losses = loss_of_each_row(model(**batch))
        >>> losses.sum().backward()
    """
    base_model: Any = model._modules.get("base_model", model)  # a PeftModel's tuner
    if not hasattr(base_model, "active_adapters") or "model" not in base_model._modules:
        raise TypeError(f"mixed_training: model: expected a PeftModel or LoraModel, got {type(model).__name__}")
    names = RowNames(adapter_names)
    _check_names(base_model.model, names)
    active = list(base_model.active_adapters)
    inactive = sorted(set(names) - set(active) - {"__base__"})
    if inactive:
        raise ValueError(
            f"mixed_training: adapter_names: expected active adapters ({', '.join(active)}), got "
            f"{', '.join(inactive)}; `model.base_model.set_adapter([...])` makes several active"
        )
    with adapter_names_passed(base_model.model, False, names):
        yield
