"""Variants of LoRA: the protocol, which configuration gets which, and the variants themselves, one file each."""

from pylora.layers.variants.alora import ALoraLinearVariant, calculate_alora_offsets
from pylora.layers.variants.dora import (
    DoraConv1dLayer,
    DoraConv1dVariant,
    DoraConv2dLayer,
    DoraConv2dVariant,
    DoraConv3dLayer,
    DoraConv3dVariant,
    DoraEmbeddingLayer,
    DoraEmbeddingVariant,
    DoraLinearLayer,
    DoraLinearVariant,
)
from pylora.layers.variants.dora_cache import DoraCaching
from pylora.layers.variants.protocol import LoraVariant
from pylora.layers.variants.registry import register_variant, resolve_variant, variants_of

__all__ = [
    "ALoraLinearVariant",
    "DoraCaching",
    "DoraConv1dLayer",
    "DoraConv1dVariant",
    "DoraConv2dLayer",
    "DoraConv2dVariant",
    "DoraConv3dLayer",
    "DoraConv3dVariant",
    "DoraEmbeddingLayer",
    "DoraEmbeddingVariant",
    "DoraLinearLayer",
    "DoraLinearVariant",
    "LoraVariant",
    "calculate_alora_offsets",
    "register_variant",
    "resolve_variant",
    "variants_of",
]
