"""The small random Llama of benchmarks and examples: 7 linear modules a layer, as its large relatives have."""

from __future__ import annotations

from typing import Any

import torch

VOCABULARY = 4000


def tiny_llama(layers: int = 16, width: int = 512) -> Any:
    """A LlamaForCausalLM with random weights from a fixed seed, in evaluation mode.

    Args:
        layers: Decoder layers.
        width: The hidden size, a multiple of 64; the feed-forward width is 2.7 times that.
    """
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=width,
        intermediate_size=int(width * 2.6875),
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        vocab_size=VOCABULARY,
    )
    return LlamaForCausalLM(config).eval()
