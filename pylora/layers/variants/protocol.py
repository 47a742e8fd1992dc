"""The protocol of LoRA variants: adapters that do something else on a layer than add scaling · B·A·x.

A variant is one file beside this one. It owns its parameters, which `init` puts into containers of the layer, and says
three things of an adapter: what the forward becomes (`forward`), which change of the base weight that is (`delta`), and
where it cannot be (`check`, `require_mergeable`). Layers ask the variant and know none by name; which variant a
configuration gets on which kind of layer is in `registry`.

The shape is that of PEFT 0.21's `LoraVariant` (tuners/lora/layer.py): one object for an adapter on a layer, in
`layer.lora_variant[adapter_name]`, whose methods take the layer.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch

from pylora.layers.merging import Delta, add_delta, take_out_delta, wide_copy


class LoraVariant:
    """One kind of variant. A subclass gives `init`, `forward` and, if it can be merged, `delta`."""

    forward_kwargs: ClassVar[tuple[str, ...]] = ()
    """Arguments of the model's forward, of `VARIANT_KWARG_KEYS`, that `forward` takes."""

    def supports_lora_conversion(self) -> bool:
        """Whether an adapter of this kind can be rewritten as a plain LoRA adapter."""
        return True

    @classmethod
    def check(cls, module: Any, r: int, config: Any) -> None:
        """Raise ValueError where the layer cannot have such an adapter. Nothing of the layer has been changed yet."""

    @classmethod
    def init(cls, module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Make the variant's own parameters. The layer has the factors by then, initialised, on their device."""
        raise NotImplementedError

    @classmethod
    def forward(
        cls, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """The layer's output with the adapter.

        Args:
            module: The layer.
            active_adapter: The adapter.
            x: The layer's input, not yet in the adapter's dtype.
            result: The output so far, base layer and earlier active adapters; it is not written.
            **kwargs: The forward's further arguments.

        Returns:
            The whole output, not what the adapter adds to it, in any floating dtype.
        """
        raise NotImplementedError

    @classmethod
    def fused_forward(
        cls,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout_p: float,
    ) -> torch.Tensor | None:
        """The whole output of a dense layer with this adapter alone by an op of the variant's own, if it has one.

        Args:
            module: The layer, whose modules are plain and unhooked.
            active_adapter: The adapter.
            x: [..., in_features], on the CPU, in the weight's dtype or one that autocast brings to it.
            weight: [out_features, in_features], any strides.
            bias: [out_features] or None.
            a: [rank, in_features].
            b: [out_features, rank], a's dtype.
            scaling: A number.
            dropout_p: 0 in evaluation.

        Returns:
            [..., out_features], or None: `forward` is called then.
        """
        return None

    @classmethod
    def require_mergeable(cls, module: Any, active_adapter: str, safe_merge: bool) -> None:
        """Raise where `delta` would, without the cost of computing it."""

    @classmethod
    def delta(cls, module: Any, active_adapter: str) -> Delta:
        """What merging the adapter does to the base weight, so that the base layer computes what `forward` does.

        The base weight may hold other adapters; what depends on the weight is computed of it without them
        (`module._unmerged()`), as in a forward.
        """
        raise NotImplementedError

    @classmethod
    def merge_safe(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """`orig_weight`, laid out as the base layer's, with the adapter merged, as a new tensor."""
        cls.require_mergeable(module, active_adapter, True)
        merged = orig_weight.detach().clone()
        _rewrite(module, merged, cls.delta(module, active_adapter), add_delta)
        return merged

    @classmethod
    def merge_unsafe(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> None:
        """Merge the adapter into `orig_weight`, laid out as the base layer's, in place."""
        cls.require_mergeable(module, active_adapter, False)
        _rewrite(module, orig_weight, cls.delta(module, active_adapter), add_delta)

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        """`orig_weight`, into which `module` merged the adapter last, without it, as a new tensor."""
        cls.require_mergeable(module, active_adapter, False)
        delta = next(each for each in module._merged_deltas() if each.adapter_name == active_adapter)
        unmerged = orig_weight.detach().clone()
        _rewrite(module, unmerged, delta, take_out_delta)
        return unmerged


@torch.no_grad()
def _rewrite(module: Any, tensor: torch.Tensor, delta: Delta, change: Any) -> None:
    """Put a delta into (or take it out of) a tensor that is laid out as the module's base weight."""
    matrix = module._base_weight().as_matrix(tensor.detach())
    total = wide_copy(matrix)
    change(total, delta)
    matrix.copy_(total)
