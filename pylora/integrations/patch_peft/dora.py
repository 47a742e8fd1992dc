"""pylora's DoRA over PEFT's layers and magnitudes, which have pylora's names but other methods."""

from __future__ import annotations

from typing import Any

import torch

from pylora.integrations.patch_peft.replacements import Replacements
from pylora.layers.merging import Delta
from pylora.layers.variants.dora import DoraLinearLayer, DoraLinearVariant
from pylora.layers.variants.dora_cache import writes_and_trust
from pylora.ops import KeptNorms, register_dora


class _KeptNorms(KeptNorms):
    """Those of PEFT's magnitudes. Copies and pickles go without, to be read where there is no pylora."""

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class PeftDora(DoraLinearVariant):
    """DoRA on PEFT's dense layers; `patch_dora` sets `layer_cls` to PEFT's class."""

    @staticmethod
    def _row_factor(magnitudes: Any, norm: torch.Tensor) -> torch.Tensor:
        return DoraLinearLayer.forward(magnitudes, norm)


def _kept_norms(magnitudes: Any) -> KeptNorms:
    own = magnitudes.__dict__  # where `register_dora` and `pylora.invalidate` look
    kept = own.get("_kept_norms")
    if kept is None:
        kept = own["_kept_norms"] = _KeptNorms()
    return kept


def patch_dora(changes: Replacements, dora: Any, variants: Any) -> None:
    """Let pylora compute what PEFT's DoRA on dense layers does.

    Args:
        changes: Records what is replaced.
        dora: peft.tuners.lora.dora.
        variants: peft.tuners.lora.variants.
    """
    changes.wrap(PeftDora, "layer_cls", lambda _: dora.DoraLinearLayer)
    changes.add(dora.DoraLinearLayer, "_kept_norms", property(_kept_norms))
    register_dora(variants.DoraLinearVariant, dora.DoraLinearLayer, writes_and_trust)
    for name in ("require_mergeable", "delta"):
        changes.add(variants.DoraLinearVariant, name, staticmethod(getattr(PeftDora, name)))


def leave_norms(layer: Any, deltas: list[Delta]) -> None:
    """Keep the norms that DoRA's deltas were made with where PEFT's own `unmerge` looks for them.

    It is asked after `unpatch_peft`, and after merges that pylora and PEFT have made in turns.
    """
    for delta in deltas:
        if delta.row_scale is not None:
            magnitude = layer.lora_magnitude_vector[delta.adapter_name].weight.detach()
            factor = delta.row_scale.factor
            norm = torch.where(factor == 0, 1, magnitude / factor)
            layer._cache_store(f"{delta.adapter_name}-weight_norm", norm.to(magnitude.dtype))


def take_norms(layer: Any, deltas: list[Delta]) -> None:
    """Take what `leave_norms` left away."""
    for delta in deltas:
        layer._caches.pop(f"{delta.adapter_name}-weight_norm", None)
