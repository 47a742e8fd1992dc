"""diffusers: a pipeline's adapters in one file, names that begin with the component.

    unet.down_blocks.0.attentions.0.proj_in.lora_A.weight           [rank, in, ...]
    unet.down_blocks.0.attentions.0.proj_in.lora_B.weight           [out, rank, ...]
    unet.down_blocks.0.attentions.0.proj_in.lora_magnitude_vector   of DoRA

Ranks and alphas are in the header's `lora_adapter_metadata`; older files call the factors `lora.down` and `lora.up`, or
keep them in attention processors, and scale by 1. https://github.com/huggingface/diffusers, loaders/lora_base.py.
"""

from __future__ import annotations

import json
import re
from typing import TYPE_CHECKING, Any

from pylora.config import pattern_value, scaling_for
from pylora.offline.errors import OfflineError
from pylora.offline.layouts.layout import (
    Components,
    Hints,
    Layout,
    Source,
    layer_from,
    named_components,
    pairs,
    require_pipeline_layer,
)

if TYPE_CHECKING:
    from torch import Tensor

_COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "prior")
_METADATA = "lora_adapter_metadata"
_PART = re.compile(
    r"(?P<name>.+?)(?:\.lora_(?P<ab>[AB])\.weight|\.lora\.(?P<updown>up|down)\.weight|(?P<magnitude>\.lora_magnitude_vector"
    r"(?:\.weight)?)|\.(?P<alpha>alpha))$"
)
_PROCESSOR = re.compile(r"(?P<stem>.+)\.processor\.(?P<part>to_\w+?)_lora\.(?P<updown>up|down)\.weight$")


def _component(key: str) -> str | None:
    first = key.partition(".")[0]
    return first if first in _COMPONENTS else None


def _matches(keys: list[str]) -> bool:
    return bool(keys) and all(_component(key) and (_PART.match(key) or _PROCESSOR.match(key)) for key in keys)


def _place(key: str, place: str) -> tuple[str, str]:
    """(name of the layer, part) of a name without its component."""
    if (match := _PROCESSOR.match(key)) is not None:
        part = f"{match['part']}.0" if match["part"] == "to_out" else match["part"]
        return f"{match['stem']}.{part}", "b" if match["updown"] == "up" else "a"
    if (match := _PART.match(key)) is None:
        raise OfflineError(f"{place}: {key}: expected factors of LoRA layers")
    if match["ab"]:
        return match["name"], match["ab"].lower()
    if match["updown"]:
        return match["name"], "b" if match["updown"] == "up" else "a"
    return match["name"], "alpha" if match["alpha"] else "magnitude"


def _read(source: Source, hints: Hints) -> Components:
    settings = _settings(source)
    found: dict[str, dict[str, dict[str, Tensor]]] = {}
    for key, tensor in source.tensors.items():
        component = _component(key)
        if component is None:
            raise OfflineError(f"{source.place}: {key}: expected a name that begins with {', '.join(_COMPONENTS)}")
        name, part = _place(key.removeprefix(f"{component}."), source.place)
        found.setdefault(component, {}).setdefault(name, {})[part] = tensor
    components: Components = {}
    for component, layers in found.items():
        own = {k.removeprefix(f"{component}."): v for k, v in settings.items() if k.startswith(f"{component}.")}
        components[component] = {}
        for name, parts in pairs(source.place, layers, "lora_A", "lora_B").items():
            alpha = _alpha(name, parts, own)
            layer = layer_from(source.place, name, parts["a"], parts["b"], alpha, parts.get("magnitude"))
            components[component][name] = layer
    return components


def _settings(source: Source) -> dict[str, Any]:
    try:
        settings = json.loads(source.metadata.get(_METADATA, "{}"))
    except ValueError as error:
        raise OfflineError(f"{source.place}: {_METADATA}: expected JSON: {error}") from None
    if not isinstance(settings, dict):
        raise OfflineError(f"{source.place}: {_METADATA}: expected an object, got {type(settings).__name__}")
    return settings


def _alpha(name: str, parts: dict[str, Tensor], own: dict[str, Any]) -> float | None:
    """alpha, such that alpha / rank is the layer's scaling."""
    if "alpha" in parts:
        return float(parts["alpha"])
    if "lora_alpha" not in own:
        return None
    rank = parts["a"].shape[0]
    alpha = pattern_value(own.get("alpha_pattern") or {}, name, own["lora_alpha"])
    return scaling_for(rank, alpha, bool(own.get("use_rslora"))) * rank


def _write(components: Components, hints: Hints) -> tuple[dict[str, Tensor], dict[str, str], str]:
    from pylora.offline.layouts.peft import config_for

    tensors: dict[str, Tensor] = {}
    settings: dict[str, Any] = {}
    for component, layers in named_components(components, hints, "diffusers").items():
        if component not in _COMPONENTS:
            raise OfflineError(f"--to diffusers: expected a component of {', '.join(_COMPONENTS)}, got {component!r}")
        for name, layer in layers.items():
            require_pipeline_layer(layer, name, "diffusers")
            stem = f"{component}.{name}"
            tensors[f"{stem}.lora_A.weight"], tensors[f"{stem}.lora_B.weight"] = layer.a, layer.b
            if layer.magnitude is not None:
                tensors[f"{stem}.lora_magnitude_vector"] = layer.magnitude
        config = config_for(layers).to_dict()
        fields = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_dora", "use_rslora", "target_modules")
        for each in fields:
            value = config[each]
            settings[f"{component}.{each}"] = sorted(value) if isinstance(value, set) else value
    return tensors, {"format": "pt", _METADATA: json.dumps(settings, indent=2, sort_keys=True)}, ""


LAYOUT = Layout("diffusers", "diffusers' pytorch_lora_weights.safetensors", _matches, _read, _write)
