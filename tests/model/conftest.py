"""Tiny random models for the tests of models with adapters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn


class Mlp(nn.Module):
    """lin0 (10 -> 20, bias), lin1 (20 -> 20, no bias), head (20 -> 3, bias)."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.lin0 = nn.Linear(10, 20, dtype=dtype)
        self.act = nn.ReLU()
        self.lin1 = nn.Linear(20, 20, bias=False, dtype=dtype)
        self.head = nn.Linear(20, 3, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.act(self.lin1(self.act(self.lin0(x)))))


@pytest.fixture
def make_mlp() -> Callable[..., Mlp]:
    """Builds an `Mlp`, the same weights each time, in evaluation mode."""

    def make(dtype: torch.dtype = torch.float32) -> Mlp:
        torch.manual_seed(0)
        return Mlp(dtype).eval()

    return make


def _tiny(kind: str) -> Any:
    import transformers as tr

    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        return tr.LlamaForCausalLM(tr.LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=60))
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32}
        return tr.GPT2LMHeadModel(tr.GPT2Config(**sizes, vocab_size=60, bos_token_id=1, eos_token_id=2))
    if kind == "t5":
        sizes = {"d_model": 32, "d_ff": 48, "d_kv": 8, "num_layers": 2, "num_heads": 4}
        return tr.T5ForConditionalGeneration(tr.T5Config(**sizes, vocab_size=60, decoder_start_token_id=0))
    if kind == "falcon":
        sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
        return tr.FalconForCausalLM(tr.FalconConfig(**sizes, vocab_size=60, bos_token_id=1, eos_token_id=2))
    raise ValueError(kind)


@pytest.fixture
def make_transformer() -> Callable[[str], Any]:
    """Builds a tiny "llama", "gpt2", "t5" or "falcon", the same weights each time, in evaluation mode."""

    def make(kind: str) -> Any:
        torch.manual_seed(0)
        return _tiny(kind).eval()

    return make


@pytest.fixture
def logits() -> Callable[[nn.Module, str], torch.Tensor]:
    """Runs a model of `make_transformer`, or an `Mlp` ("mlp"), on a fixed input."""

    def run(model: Any, kind: str) -> torch.Tensor:
        if kind == "mlp":
            inputs = torch.randn(5, 10, generator=torch.Generator().manual_seed(1))
            return model(inputs.to(next(model.parameters()).dtype))
        ids = torch.arange(14).view(2, 7)
        extra = {"decoder_input_ids": ids} if kind == "t5" else {}
        return model(input_ids=ids, **extra).logits

    return run
