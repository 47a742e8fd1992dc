"""torchtune: its own module names, and for Llama's q and k rows in the order of Meta's rotary embedding.

    layers.0.attn.q_proj.lora_a.weight    [rank, in]
    layers.0.attn.q_proj.lora_b.weight    [out, rank]
    layers.0.attn.q_proj.magnitude        [out], of DoRA

Meta's checkpoints turn neighbouring numbers of a head together, transformers turns number i and i + head_dim / 2, so
the rows of a head are stored even ones first there. https://github.com/pytorch/torchtune, models/convert_weights.py.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from pylora.offline.base import BaseCheckpoint
from pylora.offline.errors import OfflineError
from pylora.offline.layouts.layout import Components, Hints, Layout, Source, layer_from, only_layers, pairs

if TYPE_CHECKING:
    from torch import Tensor

_PART = re.compile(r"(?P<name>.+)\.(?:lora_(?P<factor>[ab])\.weight|(?P<magnitude>magnitude))$")
_PARTS = {"attn.q_proj": "self_attn.q_proj", "attn.k_proj": "self_attn.k_proj", "attn.v_proj": "self_attn.v_proj"}
_PARTS |= {"attn.output_proj": "self_attn.o_proj", "mlp.w1": "mlp.gate_proj", "mlp.w2": "mlp.down_proj"}
_PARTS |= {"mlp.w3": "mlp.up_proj"}
_BACK = {theirs: ours for ours, theirs in _PARTS.items()}
# Whether rows of q and k are in Meta's order, by the base's model_type. Others are not known.
_META_ORDER = {"llama": True, "mistral": True, "qwen2": False, "qwen3": False}


def _matches(keys: list[str]) -> bool:
    return bool(keys) and all(map(_PART.match, keys))


def _read(source: Source, hints: Hints) -> Components:
    if hints.alpha is None:
        raise OfflineError(f"{source.place}: a torchtune file does not say alpha: expected --alpha, as in the recipe")
    base = _base(source.place, hints)
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in source.tensors.items():
        match = _PART.match(key)
        if match is None:
            raise OfflineError(f"{source.place}: {key}: expected lora_a, lora_b and magnitude only")
        found.setdefault(_to_transformers(source.place, match["name"]), {})[match["factor"] or "m"] = tensor
    layers = {}
    for name, parts in pairs(source.place, found, "lora_a", "lora_b").items():
        b, magnitude = (_reordered(parts.get(part), name, base, to_meta=False) for part in ("b", "m"))
        assert b is not None
        layers[name] = layer_from(source.place, name, parts["a"], b, hints.alpha, magnitude)
    return {"": layers}


def _write(components: Components, hints: Hints) -> tuple[dict[str, Tensor], dict[str, str], str]:
    layers = only_layers(components, "torchtune")
    base = _base("--to torchtune", hints)
    settings = {(layer.rank, layer.scaling) for layer in layers.values()}
    if len(settings) != 1:
        raise OfflineError(f"--to torchtune: expected one rank and one scaling for all layers, got {len(settings)}")
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.kind != "linear" or layer.bias is not None:
            raise OfflineError(f"--to torchtune: {name}: expected dense layers without lora_bias")
        theirs = _to_torchtune(name)
        b, magnitude = (_reordered(t, name, base, to_meta=True) for t in (layer.b, layer.magnitude))
        assert b is not None
        tensors[f"{theirs}.lora_a.weight"], tensors[f"{theirs}.lora_b.weight"] = layer.a, b
        if magnitude is not None:
            tensors[f"{theirs}.magnitude"] = magnitude
    rank, scaling = settings.pop()
    return tensors, {}, f"set lora_rank: {rank} and lora_alpha: {scaling * rank:g} in the recipe"


def _base(place: str, hints: Hints) -> BaseCheckpoint:
    base = hints.bases.get("")
    if base is None:
        raise OfflineError(f"{place}: expected --base: the order of torchtune's rows depends on the model's heads")
    if base.config.get("model_type") not in _META_ORDER:
        known = ", ".join(_META_ORDER)
        raise OfflineError(f"{base.folder}: expected a model_type of {known}, got {base.config.get('model_type')!r}")
    return base


def _to_transformers(place: str, name: str) -> str:
    if name == "output":
        return "lm_head"
    layer, number, part = [*name.split(".", 2), "", ""][:3]
    if layer != "layers" or not number.isdecimal() or part not in _PARTS:
        raise OfflineError(f"{place}: {name}: expected a layer of torchtune's TransformerDecoder")
    return f"model.layers.{number}.{_PARTS[part]}"


def _to_torchtune(name: str) -> str:
    if name == "lm_head":
        return "output"
    match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)", name)
    if match is None or match[2] not in _BACK:
        raise OfflineError(f"--to torchtune: {name}: torchtune's TransformerDecoder has no such layer")
    return f"layers.{match[1]}.{_BACK[match[2]]}"


def _reordered(tensor: Tensor | None, name: str, base: BaseCheckpoint, to_meta: bool) -> Tensor | None:
    """Rows of q and k in the other order; None of None."""
    config, which = base.config, name.rpartition(".")[2]
    if tensor is None or which not in ("q_proj", "k_proj") or not _META_ORDER[config["model_type"]]:
        return tensor
    query_heads = config["num_attention_heads"]
    heads = query_heads if which == "q_proj" else config.get("num_key_value_heads") or query_heads
    size = config.get("head_dim") or config["hidden_size"] // query_heads
    if tensor.shape[0] != heads * size:
        raise OfflineError(f"{name}: expected {heads} heads of {size} rows as in {base.folder}, got {tensor.shape[0]}")
    split = (2, size // 2) if to_meta else (size // 2, 2)
    return tensor.reshape(heads, *split, -1).transpose(1, 2).reshape(tensor.shape)


LAYOUT = Layout("torchtune", "torchtune's adapter_N.pt", _matches, _read, _write)
