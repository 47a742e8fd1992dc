"""PEFT's own layout, written as folders: the one that the others are turned into and come from."""

from __future__ import annotations

from collections import Counter
from typing import Any

from pylora.config import LoraConfig
from pylora.offline.layouts.layout import Layers


def config_for(layers: Layers, **settings: Any) -> Any:
    """A LoraConfig that gives each layer its rank and scaling: the usual ones, and patterns for the others.

    Args:
        layers: At least one, all with DoRA or none.
        **settings: Other fields.
    """
    ranks = Counter(layer.rank for layer in layers.values())
    rank = ranks.most_common(1)[0][0]
    alphas = Counter(layer.scaling * layer.rank for layer in layers.values())
    alpha = alphas.most_common(1)[0][0]
    targets: Any = set(layers)  # as a loaded configuration has them
    return LoraConfig(
        r=rank,
        lora_alpha=_plain(alpha),
        rank_pattern={name: layer.rank for name, layer in layers.items() if layer.rank != rank},
        alpha_pattern={
            name: _plain(layer.scaling * layer.rank)
            for name, layer in layers.items()
            if layer.scaling * layer.rank != alpha
        },
        target_modules=targets,
        use_dora=any(layer.magnitude is not None for layer in layers.values()),
        lora_bias=any(layer.bias is not None for layer in layers.values()),
        inference_mode=True,
        **settings,
    )


def _plain(number: float) -> Any:
    """8 of 8.0; a fraction as it is, which the field takes though it is declared an int."""
    return int(number) if number == int(number) else number
