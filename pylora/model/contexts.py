"""Context managers that change how a model's adapters compute, and change it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pylora.layers import LoraLayer, tuner_layers


@contextmanager
def rescale_adapter_scale(model: nn.Module, multiplier: float) -> Iterator[None]:
    """Within the context, every adapter's scaling is multiplied by `multiplier`; afterwards it is what it was.

    A multiplier between 0 and 1 interpolates between the base model and the adapted one (https://arxiv.org/abs/
    2109.01903), which may help on data unlike the training data.

    Args:
        model: A model with LoRA layers, a `PeftModel` or not.
        multiplier: The factor.

    Raises:
        TypeError: `multiplier` is not a number.
        ValueError: The model has no LoRA layers.
    """
    if not isinstance(multiplier, (float, int)):
        raise TypeError(f"Argument multiplier should be of type float, got {type(multiplier)}")
    layers: list[Any] = [layer for layer in tuner_layers(model) if isinstance(layer, LoraLayer)]
    if not layers:
        raise ValueError("scaling is only supported for models with `LoraLayer`s")
    before = [layer.scaling for layer in layers]
    try:
        for layer in layers:
            layer.scaling = {name: value * multiplier for name, value in layer.scaling.items()}
        yield
    finally:
        for layer, scaling in zip(layers, before, strict=True):
            layer.scaling = scaling


@contextmanager
def disable_input_dtype_casting(model: nn.Module, active: bool = True) -> Iterator[None]:
    """Within the context, layers do not cast their input to the adapter's dtype.

    For models whose hooks see to the dtypes themselves, such as diffusers' layerwise casting.

    Args:
        model: A model with adapters.
        active: False: do nothing.
    """
    layers: list[Any] = list(tuner_layers(model)) if active else []
    before = [layer.cast_input_dtype_enabled for layer in layers]
    try:
        for layer in layers:
            layer.cast_input_dtype_enabled = False
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.cast_input_dtype_enabled = enabled
