"""loralib (https://github.com/microsoft/LoRA): `lora.lora_state_dict`, parameters named by the module they sit in.

    transformer.h.0.attn.q_proj.lora_A    [rank, in]
    transformer.h.0.attn.q_proj.lora_B    [out, rank]

The file does not say alpha, and whether a factor is an embedding's only its name tells.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pylora.offline.errors import OfflineError
from pylora.offline.layouts.layout import Components, Hints, Layout, Source, layer_from, only_layers, pairs

if TYPE_CHECKING:
    from torch import Tensor

_FACTOR = re.compile(r"(?P<name>.+)\.lora_(?P<part>[AB])$")
_EMBEDDINGS = re.compile(r"(?:^|[._])(?:embed\w*|wte|wpe|embeddings?)$|embed_tokens$|_embeddings?$")


def _matches(keys: list[str]) -> bool:
    return any(map(_FACTOR.match, keys)) and all(_FACTOR.match(key) or key.endswith(".bias") for key in keys)


def _read(source: Source, hints: Hints) -> Components:
    if hints.alpha is None:
        raise OfflineError(f"{source.place}: a loralib file does not say alpha: expected --alpha, as in training")
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in source.tensors.items():
        match = _FACTOR.match(key)
        if match is None:
            raise OfflineError(f"{source.place}: {key}: expected lora_A and lora_B only: biases cannot be carried over")
        found.setdefault(match["name"], {})[match["part"].lower()] = tensor
    layers = {}
    for name, parts in pairs(source.place, found, "lora_A", "lora_B").items():
        if parts["a"].dim() != 2 or parts["b"].dim() != 2:
            raise OfflineError(
                f"{source.place}: {name}: expected matrices: loralib's merged layers have no counterpart"
            )
        layer = layer_from(source.place, name, parts["a"], parts["b"], hints.alpha)
        if _EMBEDDINGS.search(name):
            layer.kind = "embedding"
        layers[name] = layer
    return {"": layers}


def _write(components: Components, hints: Hints) -> tuple[dict[str, Tensor], dict[str, str], str]:
    tensors = {}
    for name, layer in only_layers(components, "loralib").items():
        if layer.kind == "conv" or layer.magnitude is not None or layer.bias is not None:
            raise OfflineError(f"--to loralib: {name}: expected plain LoRA on a dense layer or an embedding")
        tensors[f"{name}.lora_A"] = layer.a
        tensors[f"{name}.lora_B"] = layer.b * layer.scaling
    return tensors, {}, "build the model with lora_alpha = r: the scaling is in lora_B"


LAYOUT = Layout("loralib", "loralib's lora_state_dict", _matches, _read, _write)
