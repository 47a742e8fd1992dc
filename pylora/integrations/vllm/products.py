"""What vLLM asks of LoRA on the CPU, on pylora's ops. Shapes and names of arguments are vLLM's (punica_base.py)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pylora.integrations.vllm.layer_slots import LayerSlots
from pylora.integrations.vllm.token_slots import TokenSlots
from pylora.ops import bgmv_, bgmv_expand_, bgmv_shrink


class LoraProducts:
    """The products of a batch's tokens with their adapters; tokens without one keep their rows' bits.

    A stands for `[num_slots, 1, max_rank, in_features]` and B for `[num_slots, 1, out_features, max_rank]`, one a
    slice (q, k and v are three); y and x may have further dimensions before the last.

    Args:
        num_tokens: the most tokens of a batch.

    Attributes:
        tokens: the slot of each token of the batch.
        outputs: the slot of each token whose output is wanted.
    """

    def __init__(self, num_tokens: int) -> None:
        self.tokens = TokenSlots(num_tokens)
        self.outputs = TokenSlots(num_tokens)
        self._layers: dict[int, LayerSlots] = {}

    def add_lora_linear(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        scale: float,
        output_slices: Sequence[int],
        *,
        buffer: Any = None,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add scale * x Aᵀ Bᵀ to y, whose columns are the slices' side by side.

        Args:
            buffer: not used; there is one in the kernels.
            add_inputs: False sets the rows of tokens that have an adapter instead.
        """
        self._add(self.tokens, y, x, lora_a_stacked, lora_b_stacked, scale, add_inputs)

    def add_lora_logits(
        self,
        y: Tensor,
        x: Tensor,
        lora_a_stacked: Tensor,
        lora_b_stacked: Tensor,
        scale: float,
        *,
        buffer: Any = None,
        **kwargs: Any,
    ) -> None:
        """The same for the tokens whose output is wanted. y may be padded, or narrower than B's padding."""
        self._add(self.outputs, y, x, (lora_a_stacked,), (lora_b_stacked,), scale, True)

    def _add(
        self,
        tokens: TokenSlots,
        y: Tensor,
        x: Tensor,
        a_stacked: Sequence[Tensor],
        b_stacked: Sequence[Tensor],
        scale: float,
        add_inputs: bool,
    ) -> None:
        if tokens.is_idle:
            return
        layer = self._layer(a_stacked, b_stacked)
        y, x = _rows(y), _rows(x)
        slots = tokens.first(x.shape[0])
        b_pool = layer.b_pool
        if y.shape[1] != layer.out_features:
            if y.shape[1] < layer.out_features:
                b_pool = [b_pool[0][:, : y.shape[1]]]
            y = y[:, : layer.out_features]
        if not add_inputs:
            y.masked_fill_((slots >= 0)[:, None], 0)
        if x.dtype != y.dtype:
            x = x.to(y.dtype)
        bgmv_(y, x, layer.a_pool, b_pool, layer.ranks(tokens.used), layer.scalings(scale), slots, "out_rank")

    def add_shrink(
        self, y: Tensor | Sequence[Tensor], x: Tensor, lora_a_stacked: Sequence[Tensor], scale: float, **kwargs: Any
    ) -> None:
        """Set y[slice] to scale * x Aᵀ; zeros for tokens without an adapter.

        Args:
            y: `[num_slices, num_tokens, max_rank]` or as many tensors, float32. Written.
        """
        if self.tokens.is_idle:
            return
        layer, x = self._layer(lora_a_stacked, ()), _rows(x)
        v = bgmv_shrink(x, layer.a_pool, layer.ranks(self.tokens.used), self.tokens.first(x.shape[0]))
        if scale != 1:
            v.mul_(scale)
        for each, product in zip(y, v, strict=True):
            each[:, : product.shape[1]] = product

    def add_expand(
        self,
        y: Tensor,
        x: Tensor | Sequence[Tensor],
        lora_b_stacked: Sequence[Tensor],
        output_slices: Sequence[int],
        offset_start: int = 0,
        add_inputs: bool = True,
        **kwargs: Any,
    ) -> None:
        """Add x[slice] Bᵀ to y, whose columns from `offset_start` on are the slices' side by side.

        Args:
            x: as `add_shrink` leaves its y.
            add_inputs: False sets the rows of tokens that have an adapter instead.
        """
        y = _rows(y)[:, offset_start : offset_start + sum(output_slices)]
        self._expand(y, x if isinstance(x, Tensor) else torch.stack(tuple(x)), lora_b_stacked, add_inputs)

    def add_lora_embedding(
        self, y: Tensor, x: Tensor, lora_b_stacked: Tensor, add_inputs: bool = True, **kwargs: Any
    ) -> None:
        """Add x Bᵀ to y, where x `[num_tokens, max_rank]` is what the tokens' rows of A are."""
        self._expand(_rows(y), _rows(x)[None], (lora_b_stacked,), add_inputs)

    def _expand(self, y: Tensor, v: Tensor, b_stacked: Sequence[Tensor], add_inputs: bool) -> None:
        if self.tokens.is_idle:
            return
        slots = self.tokens.first(y.shape[0])
        if not add_inputs:
            y.masked_fill_((slots >= 0)[:, None], 0)
        v = v.to(torch.float64 if y.dtype == torch.float64 else torch.float32)
        layer = self._layer((), b_stacked)
        bgmv_expand_(y, v, layer.b_pool, layer.ranks(self.tokens.used), layer.scalings(1.0), slots, "out_rank")

    def full_linear(self, x: Tensor, weight_stacked: Tensor) -> Tensor:
        """x Wᵀ for the tokens whose output is wanted, W `[num_slots, 1, out_features, in_features]` of their slots.

        Returns:
            `[num_tokens, out_features]`, float32 (float64 as x); zeros without an adapter.
        """
        x = _rows(x)
        layer = self._layer((weight_stacked,), ())
        return bgmv_shrink(x, layer.a_pool[0], layer.full_ranks, self.outputs.first(x.shape[0]))

    def _layer(self, a_stacked: Sequence[Tensor], b_stacked: Sequence[Tensor]) -> LayerSlots:
        """What is kept of a layer. vLLM makes its tensors once and writes adapters into them."""
        if torch.compiler.is_compiling():
            return LayerSlots(a_stacked, b_stacked)
        key = id((a_stacked or b_stacked)[0])
        layer = self._layers.get(key)
        if layer is None or not layer.is_of(a_stacked, b_stacked):
            layer = self._layers[key] = LayerSlots(a_stacked, b_stacked)
        return layer


def _rows(t: Tensor) -> Tensor:
    return t if t.dim() == 2 else t.view(-1, t.shape[-1])
