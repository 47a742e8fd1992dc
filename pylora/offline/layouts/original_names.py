"""Blocks by the names of Stability's and Black Forest Labs' own code, as kohya's scripts for SDXL and Flux write them.

    input_blocks_4_1_transformer_blocks_0_attn1_to_q     SDXL's UNet, of two layers a block
    double_blocks_0_img_attn_qkv                         Flux, where diffusers has three layers for one

Names are those of kohya's files without `lora_unet_`, underscores for dots; results are diffusers', with underscores.
https://github.com/huggingface/diffusers, scripts/convert_diffusers_to_original_sdxl.py, convert_flux_to_diffusers.py.
"""

from __future__ import annotations

import re
from typing import NamedTuple


class Share(NamedTuple):
    """A layer of diffusers' and which rows of the original's output are its own: parts `first` to `last` of `parts`."""

    name: str
    first: int = 0
    last: int = 1
    parts: int = 1


_BLOCK = re.compile(r"(input_blocks|output_blocks)_(\d+)_(\d+)(?:_(.+))?$|middle_block_([012])_(.+)$")
_LAYERS = 3  # a down block's: two of residuals and the downsampler; an up block has three of residuals
_RESIDUAL = {"in_layers_2": "conv1", "out_layers_3": "conv2", "emb_layers_1": "time_emb_proj"}
_RESIDUAL |= {"skip_connection": "conv_shortcut"}
_MIDDLE = ("resnets_0", "attentions_0", "resnets_1")
_OUTSIDE = {"input_blocks_0_0": "conv_in", "out_2": "conv_out"}
_OUTSIDE |= {"time_embed_0": "time_embedding_linear_1", "time_embed_2": "time_embedding_linear_2"}
_OUTSIDE |= {"label_emb_0_0": "add_embedding_linear_1", "label_emb_0_2": "add_embedding_linear_2"}

_FLUX = re.compile(r"(double|single)_blocks_(\d+)_(.+)$")
_DOUBLE = {
    "img_mod_lin": ["norm1_linear"],
    "txt_mod_lin": ["norm1_context_linear"],
    "img_attn_qkv": ["attn_to_q", "attn_to_k", "attn_to_v"],
    "txt_attn_qkv": ["attn_add_q_proj", "attn_add_k_proj", "attn_add_v_proj"],
    "img_attn_proj": ["attn_to_out_0"],
    "txt_attn_proj": ["attn_to_add_out"],
    "img_mlp_0": ["ff_net_0_proj"],
    "img_mlp_2": ["ff_net_2"],
    "txt_mlp_0": ["ff_context_net_0_proj"],
    "txt_mlp_2": ["ff_context_net_2"],
}
_SINGLE = {"modulation_lin": "norm_linear", "linear2": "proj_out"}


def unet_name(flat: str) -> str | None:
    """diffusers' name of a layer of SDXL's UNet; None for one that has other names, or diffusers' already."""
    if flat in _OUTSIDE:
        return _OUTSIDE[flat]
    if (match := _BLOCK.match(flat)) is None:
        return None
    side, number, inner, rest, middle, middle_rest = match.groups()
    if middle is not None:
        kind = _MIDDLE[int(middle)]
        return _inside(f"mid_block_{kind}", middle_rest)
    rest = rest or ""
    block, layer = divmod(int(number) - (side == "input_blocks"), _LAYERS)
    place = f"down_blocks_{block}" if side == "input_blocks" else f"up_blocks_{block}"
    if rest == "op":
        return f"{place}_downsamplers_0_conv"
    if rest == "conv":
        return f"{place}_upsamplers_0_conv"
    return _inside(f"{place}_{'attentions' if inner == '1' else 'resnets'}_{layer}", rest)


def _inside(place: str, rest: str) -> str | None:
    """The name in a residual layer or an attention; only the former's parts have other names."""
    if "_resnets_" not in place:
        return f"{place}_{rest}"
    return f"{place}_{_RESIDUAL[rest]}" if rest in _RESIDUAL else None


def flux_layers(flat: str) -> list[Share] | None:
    """diffusers' layers for one of Flux's; None where it is none of its blocks'."""
    if (match := _FLUX.match(flat)) is None:
        return None
    kind, number, rest = match.groups()
    if kind == "double":
        names = _DOUBLE.get(rest, [])
        place = f"transformer_blocks_{number}"
        return [Share(f"{place}_{name}", i, i + 1, len(names)) for i, name in enumerate(names)] or None
    place = f"single_transformer_blocks_{number}"
    if rest == "linear1":  # q, k and v of the model's width, and the MLP's inner layer, four times as wide
        shares = [Share(f"{place}_attn_to_{name}", i, i + 1, 7) for i, name in enumerate("qkv")]
        return [*shares, Share(f"{place}_proj_mlp", 3, 7, 7)]
    return [Share(f"{place}_{_SINGLE[rest]}")] if rest in _SINGLE else None
