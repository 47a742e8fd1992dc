"""PEFT's dense layers computed by pylora's ops: forward and backward, dropout, DoRA, mixed batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.compiler import is_dynamo_compiling

from pylora.integrations.patch_peft.dora import PeftDora
from pylora.integrations.patch_peft.replacements import Replacements
from pylora.layers import fused
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.linear import Linear
from pylora.layers.row_names import RowNames
from pylora.ops import dense_forward

# What pylora's methods ask of a dense layer, and PEFT's has not; the rest has the same names.
_BORROWED = ("_fused_mixed_batch", "_adapter_output")


def _no_op(*args: Any) -> None:
    """`fused_forward` of the variants that have no op: PEFT computes them."""


def patch_forward(changes: Replacements, layer: Any, variants: Any) -> None:
    """Put pylora's forward in.

    Args:
        changes: Records what is replaced.
        layer: peft.tuners.lora.layer.
        variants: peft.tuners.lora.variants.
    """
    for name in _BORROWED:
        changes.add(layer.Linear, name, getattr(Linear, name))
    changes.add(layer.LoraVariant, "fused_forward", staticmethod(_no_op))
    changes.wrap(variants.DoraLinearVariant, "fused_forward", lambda _: staticmethod(PeftDora.fused_forward))
    changes.wrap(layer.Linear, "forward", lambda original: _forward(original, layer.Linear))
    changes.wrap(layer.Linear, "_mixed_batch_forward", lambda original: _mixed_batch_forward(original, layer.Linear))


def _forward(original: Callable[..., torch.Tensor], linear: Any) -> Callable[..., torch.Tensor]:
    def forward(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and not kwargs and type(self) is linear:
            result = fused.forward(self, x) if is_dynamo_compiling() else dense_forward(self, x)
            if result is not None:
                return result
        return original(self, x, *args, **kwargs)

    return forward


def _mixed_batch_forward(original: Callable[..., torch.Tensor], linear: Any) -> Callable[..., torch.Tensor]:
    def mixed_batch_forward(
        self: Any, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        if type(self) is not linear or not self.lora_variant.keys().isdisjoint(adapter_names):
            return original(self, x, *args, adapter_names=adapter_names, **kwargs)
        names = RowNames.of(adapter_names)
        return DeltaLayer._mixed_batch_forward(self, x, *args, adapter_names=names, **kwargs)

    return mixed_batch_forward
