"""kohya-ss' scripts (https://github.com/kohya-ss/sd-scripts): names with every dot made an underscore.

    lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight    [rank, in, ...]
    lora_unet_down_blocks_0_attentions_0_proj_in.lora_up.weight      [out, rank, ...]
    lora_unet_down_blocks_0_attentions_0_proj_in.alpha               scalar
    lora_unet_down_blocks_0_attentions_0_proj_in.dora_scale          [out, 1, ...], of DoRA

SDXL's and Flux's blocks have their original code's names (`original_names.py`). Those are read; diffusers' names are
written, as kohya's scripts do for SD 1.5. Which underscores were dots the base's own names say; without a base, a list
of diffusers' and CLIP's compound words.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

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
from pylora.offline.layouts.original_names import Share, flux_layers, unet_name

if TYPE_CHECKING:
    from torch import Tensor

_PREFIXES = {
    "lora_unet": "unet",
    "lora_te": "text_encoder",
    "lora_te1": "text_encoder",
    "lora_te2": "text_encoder_2",
    "lora_te3": "text_encoder_3",
    "lora_transformer": "transformer",
}
_PARTS = {"lora_down.weight": "a", "lora_up.weight": "b", "alpha": "alpha", "dora_scale": "magnitude"}
_COMPOUND = frozenset(
    (
        "down_blocks", "up_blocks", "mid_block", "transformer_blocks", "single_transformer_blocks", "to_q", "to_k",
        "to_v", "to_out", "proj_in", "proj_out", "conv_in", "conv_out", "conv_shortcut", "time_emb_proj",
        "time_embedding", "add_embedding", "linear_1", "linear_2", "text_model", "self_attn", "q_proj", "k_proj",
        "v_proj", "out_proj", "add_k_proj", "add_q_proj", "add_v_proj", "to_add_out", "ff_context", "proj_mlp",
        "time_text_embed", "timestep_embedder", "text_embedder", "guidance_embedder", "context_embedder", "x_embedder",
        "token_embedding", "position_embedding", "text_projection", "norm_out", "norm1_context",
    )
)  # fmt: skip
_SIMPLE = frozenset(
    (
        "attentions", "resnets", "downsamplers", "upsamplers", "attn", "attn1", "attn2", "ff", "net", "proj", "conv",
        "conv1", "conv2", "norm", "norm1", "norm2", "linear", "encoder", "layers", "mlp", "fc1", "fc2", "embeddings",
    )
)  # fmt: skip
_FLUX_COMPONENT = "transformer"


def _split(key: str) -> tuple[str, str, str] | None:
    """(component's prefix, flattened name, part), None for a name of another layout."""
    stem, _, part = key.partition(".")
    prefix = max((each for each in _PREFIXES if stem.startswith(f"{each}_")), key=len, default=None)
    return (prefix, stem[len(prefix) + 1 :], part) if prefix is not None and part in _PARTS else None


def _matches(keys: list[str]) -> bool:
    return bool(keys) and sum(_split(key) is not None for key in keys) * 2 > len(keys)


def _read(source: Source, hints: Hints) -> Components:
    found: dict[tuple[str, str], dict[str, Tensor]] = {}
    for key, tensor in source.tensors.items():
        split = _split(key)
        if split is None:
            raise OfflineError(f"{source.place}: {key}: expected lora_down, lora_up, alpha or dora_scale of a layer")
        prefix, flat, part = split
        found.setdefault((_PREFIXES[prefix], flat), {})[_PARTS[part]] = tensor
    stems = {f"{component} {flat}": parts for (component, flat), parts in found.items()}
    pairs(source.place, stems, "lora_down", "lora_up")
    components: Components = {}
    for (component, flat), parts in found.items():
        alpha = float(parts["alpha"]) if "alpha" in parts else None
        for target, share in _targets(component, flat):
            name = _with_dots(source.place, share.name, target, hints)
            up, magnitude = (_rows(source.place, flat, parts.get(part), share) for part in ("b", "magnitude"))
            assert up is not None
            layer = layer_from(source.place, name, parts["a"], up, alpha, magnitude)
            components.setdefault(target, {})[name] = layer
    return components


def _targets(component: str, flat: str) -> list[tuple[str, Share]]:
    """diffusers' layers for one of the file, each with its component; most have diffusers' names already."""
    if component != "unet":
        return [(component, Share(flat))]
    if (shares := flux_layers(flat)) is not None:
        return [(_FLUX_COMPONENT, share) for share in shares]
    return [(component, Share(unet_name(flat) or flat))]


def _rows(place: str, flat: str, tensor: Tensor | None, share: Share) -> Tensor | None:
    """The rows of a layer's output that are another's; None of None.

    Raises:
        OfflineError: their number cannot be divided so.
    """
    if tensor is None or share.parts == 1:
        return tensor
    size, left = divmod(tensor.shape[0], share.parts)
    if left:
        raise OfflineError(f"{place}: {flat}: expected a multiple of {share.parts} rows, got {tensor.shape[0]}")
    return tensor[share.first * size : share.last * size]


def _with_dots(place: str, flat: str, component: str, hints: Hints) -> str:
    base = hints.bases.get(component) or hints.bases.get("")
    if base is not None:
        names = {key.removesuffix(".weight").replace(".", "_"): key.removesuffix(".weight") for key in base}
        if flat not in names:
            raise OfflineError(f"{place}: {flat}: {base.folder} has no such layer")
        return names[flat]
    words, parts = flat.split("_"), []
    while words:
        for length in range(min(4, len(words)), 0, -1):
            word = "_".join(words[:length])
            if word in _COMPOUND or (length == 1 and (word in _SIMPLE or word.isdecimal())):
                break
        else:
            raise OfflineError(f"{place}: {flat}: which underscores are dots? Expected --base, the model it is for")
        parts.append(word)
        del words[:length]
    return ".".join(parts)


def _write(components: Components, hints: Hints) -> tuple[dict[str, Tensor], dict[str, str], str]:
    import torch

    components = named_components(components, hints, "kohya")
    prefixes = {component: prefix for prefix, component in reversed(_PREFIXES.items())}
    if "text_encoder_2" in components:
        prefixes["text_encoder"] = "lora_te1"
    tensors: dict[str, Tensor] = {}
    for component, layers in components.items():
        if component not in prefixes:
            raise OfflineError(f"--to kohya: expected a component of {', '.join(prefixes)}, got {component!r}")
        for name, layer in layers.items():
            require_pipeline_layer(layer, name, "kohya")
            stem = f"{prefixes[component]}_{name.replace('.', '_')}"
            tensors[f"{stem}.lora_down.weight"], tensors[f"{stem}.lora_up.weight"] = layer.a, layer.b
            tensors[f"{stem}.alpha"] = torch.tensor(layer.scaling * layer.rank, dtype=layer.a.dtype)
            if layer.magnitude is not None:
                tensors[f"{stem}.dora_scale"] = layer.magnitude.reshape(-1, *(1,) * (layer.a.dim() - 1))
    return tensors, {"ss_network_module": "networks.lora"}, ""


LAYOUT = Layout("kohya", "kohya-ss' scripts and the tools that read their files", _matches, _read, _write)
