"""`layer_replication`: a deeper model out of a model's own layers, which share their weights and not their adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pylora.model.trainable import has_tuner_layers

_MAP = "_layer_replication"


def replicate_layers(model: nn.Module, layer_map: Sequence[Sequence[int]]) -> Callable[[], None]:
    """Replace the model's layers by the ranges of them that `layer_map` lists.

    [[0, 4], [2, 5]] makes layers 0, 1, 2, 3, 2, 3, 4 out of five. Each is a module of its own with the parameters of
    the layer it stands for. Models like Llama (`layers`), Bert (`encoder.layer`) and Falcon (`h`) have layers that can
    be found. If this was done with the same ranges before, nothing is done.

    Args:
        model: The base model; it is changed in place, `config.num_hidden_layers` included.
        layer_map: (first, one past the last) of each range.

    Returns:
        A function that puts the old layers back.

    Raises:
        ValueError: The layers cannot be found, or the model has adapters or other ranges already.
        IndexError: A range goes beyond the layers. The model is then as it was.
    """
    core, owner, name, layers = _find_layers(model)
    ranges = [(int(start), int(end)) for start, end in layer_map]
    done = getattr(layers, _MAP, None)
    if done == ranges:
        return lambda: None
    if done is not None or has_tuner_layers(model):
        raise ValueError(
            f"layer_replication: expected a model without adapters, or the ranges of its other adapters ({done}), got "
            f"{ranges}"
        )
    bad = [each for each in ranges if not 0 <= each[0] <= each[1] <= len(layers)]
    if bad:
        raise IndexError(f"layer_replication: expected ranges within 0 and {len(layers)}, got {bad}")

    copies = nn.ModuleList()
    for start, end in ranges:
        for layer in layers[start:end]:
            copies.append(_copy_sharing_weights(layer, index=len(copies)))
    setattr(copies, _MAP, ranges)
    config: Any = getattr(core, "config", None)
    count = getattr(config, "num_hidden_layers", None)
    setattr(owner, name, copies)
    if count is not None:
        config.num_hidden_layers = len(copies)

    def revert() -> None:
        setattr(owner, name, layers)
        if count is not None:
            config.num_hidden_layers = count

    return revert


def _find_layers(model: Any) -> tuple[nn.Module, nn.Module, str, nn.ModuleList]:
    """The innermost model, the module in it that holds the list of layers, the list's name there, and the list."""
    while hasattr(model, "model"):
        model = model.model
    model = getattr(model, "bert", model)
    places: Any = ((model, "layers"), (getattr(model, "encoder", None), "layer"), (model, "h"))
    for owner, name in places:
        layers = getattr(owner, name, None)
        if layers is not None:
            if not isinstance(layers, nn.ModuleList):
                break
            return model, owner, name, layers
    raise ValueError(
        "layer_replication: Could not locate the layers attribute in the model. Expected Llama, Bert or Falcon "
        "compatible architectures."
    )


def _copy_sharing_weights(layer: nn.Module, index: int) -> nn.Module:
    """A copy of `layer` with its parameters, and buffers of its own, that knows itself as number `index`."""
    duplicate = copy.deepcopy(layer, memo={id(param): param for param in layer.parameters()})
    for module in duplicate.modules():
        if hasattr(module, "layer_idx"):  # transformers finds a layer's part of the KV cache by it
            module.layer_idx = index  # type: ignore[assignment]
    return duplicate
