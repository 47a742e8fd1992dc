"""The class that vLLM makes instead of its own for CPUs. Imported by vLLM alone, by name."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.lora.punica_wrapper.punica_base import PunicaWrapperBase

from pylora.integrations.vllm.products import LoraProducts


class PyloraPunicaWrapper(LoraProducts, PunicaWrapperBase):
    """vLLM's bookkeeping with pylora's products."""

    def __init__(
        self, max_num_batched_tokens: int, max_batches: int, device: torch.device | str, **kwargs: Any
    ) -> None:
        PunicaWrapperBase.__init__(self, max_num_batched_tokens, max_batches, device)
        LoraProducts.__init__(self, max_num_batched_tokens)

    def update_metadata(
        self, mapping: Any, lora_index_to_id: list[int | None], max_loras: int, vocab_size: int, **kwargs: Any
    ) -> None:
        """Take a new batch's slots, for all layers until the next batch."""
        super().update_metadata(mapping, lora_index_to_id, max_loras, vocab_size, **kwargs)
        self.tokens.set(self.token_lora_indices)
        self.outputs.set(self.sampler_indices)

    def apply_lora_full_linear(
        self, y: Tensor, x: Tensor, weight_stacked: Tensor, bias_stacked: Tensor, module_enabled: Tensor
    ) -> None:
        """Set y to x Wᵀ + bias where a token's adapter has a whole layer of its own."""
        product = self.full_linear(x, weight_stacked)
        y.copy_(self._select_full_linear_output(y, product, bias_stacked, module_enabled))
