"""What a layout is: tensors under a program's names, to adapters by component and layer, and back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from pylora.offline.adapter import LayerWeights
from pylora.offline.base import BaseCheckpoint
from pylora.offline.errors import OfflineError

if TYPE_CHECKING:
    from torch import Tensor

Layers = dict[str, LayerWeights]
Components = dict[str, Layers]
"""Adapters by the part of a pipeline they are for ("unet", "text_encoder"); "" where there is one model."""


@dataclass(frozen=True)
class Source:
    """A file's content.

    Attributes:
        place: Where it came from, for messages.
        tensors: By the names in the file.
        metadata: Strings of a .safetensors header.
    """

    place: str
    tensors: dict[str, Tensor]
    metadata: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Hints:
    """What files leave out and a person can tell.

    Attributes:
        alpha: LoRA's alpha, for layouts that do not store it.
        component: The part of a pipeline that an adapter of one model is for.
        bases: The base model's files, by component; "" for a model that is none.
    """

    alpha: float | None = None
    component: str = ""
    bases: dict[str, BaseCheckpoint] = field(default_factory=dict)


@dataclass(frozen=True)
class Layout:
    """One layout.

    Attributes:
        name: As `--to` and `--from` take it.
        summary: What writes it.
        matches: Whether the names of a file's tensors are of this layout.
        read: To adapters.
        write: To tensors, header strings, and a note for the person about what the file cannot say ("" for none).
    """

    name: str
    summary: str
    matches: Callable[[list[str]], bool]
    read: Callable[[Source, Hints], Components]
    write: Callable[[Components, Hints], tuple[dict[str, Tensor], dict[str, str], str]]


def layer_from(
    place: str, name: str, down: Tensor, up: Tensor, alpha: float | None, magnitude: Tensor | None = None
) -> LayerWeights:
    """A layer of factors and alpha; without an alpha the scaling is 1.

    Raises:
        OfflineError: the factors do not fit one another.
    """
    if down.dim() not in (2, 3, 4, 5) or up.dim() != down.dim() or down.shape[0] != up.shape[1]:
        raise OfflineError(
            f"{place}: {name}: expected factors [rank, in, ...] and [out, rank, ...], got {tuple(down.shape)} and "
            f"{tuple(up.shape)}"
        )
    if magnitude is not None and magnitude.numel() != up.shape[0]:
        raise OfflineError(f"{place}: {name}: expected {up.shape[0]} magnitudes, got shape {tuple(magnitude.shape)}")
    rank = down.shape[0]
    alpha = float(rank) if alpha is None else alpha
    if magnitude is not None:
        magnitude = magnitude.reshape(-1) if down.dim() == 2 else magnitude.reshape(1, -1, *(1,) * (down.dim() - 2))
    return LayerWeights("linear" if down.dim() == 2 else "conv", down, up, alpha, alpha / rank, magnitude)


def pairs(place: str, found: dict[str, dict[str, Tensor]], first: str, second: str) -> dict[str, dict[str, Tensor]]:
    """`found` where every layer has both factors.

    Raises:
        OfflineError: one is missing, or there are none.
    """
    if not found:
        raise OfflineError(f"{place}: expected pairs of {first} and {second}, found none")
    for name, parts in found.items():
        if missing := [part for part in ("a", "b") if part not in parts]:
            raise OfflineError(f"{place}: {name}: expected {first} and {second}, found no {missing[0].upper()}")
    return found


def only_layers(components: Components, layout: str) -> Layers:
    """The layers of the only component.

    Raises:
        OfflineError: there are several.
    """
    if len(components) != 1:
        raise OfflineError(f"--to {layout}: expected an adapter of one model, got {', '.join(components)}")
    return next(iter(components.values()))


def named_components(components: Components, hints: Hints, layout: str) -> Components:
    """`components` with the name that a pipeline needs for an adapter of one model.

    Raises:
        OfflineError: it was not told.
    """
    if "" not in components:
        return components
    if not hints.component:
        raise OfflineError(f"--to {layout}: expected --component (unet, transformer, text_encoder): what is it for?")
    return {hints.component: components[""]}


def require_pipeline_layer(layer: LayerWeights, name: str, layout: str) -> None:
    """Check that a pipeline's layout has a place for the layer.

    Raises:
        OfflineError: it is an embedding, or has a bias.
    """
    if layer.kind == "embedding" or layer.bias is not None:
        raise OfflineError(f"--to {layout}: {name}: expected dense layers and convolutions without lora_bias")
