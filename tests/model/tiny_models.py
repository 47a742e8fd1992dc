"""Tiny models with tied weights and transformer layers, for the tests of this folder."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, ClassVar

import torch
from torch import nn


def llama(tied: bool = False, layers: int = 2) -> Any:
    """A Llama of transformers: 30 tokens, width 16."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=2,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


class _Stack(nn.Module):
    def __init__(self, shared: nn.Embedding) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(*shared.weight.shape)
        self.embed_tokens.weight = shared.weight
        self.linear = nn.Linear(8, 8)


class _Core(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Embedding(12, 8)
        self.encoder = _Stack(self.shared)
        self.decoder = _Stack(self.shared)


class EncoderDecoder(nn.Module):
    """One weight in four modules: shared, the two embed_tokens, and lm_head, which has a bias."""

    _tied_weights_keys: ClassVar[dict[str, str]] = {
        "model.encoder.embed_tokens.weight": "model.shared.weight",
        "model.decoder.embed_tokens.weight": "model.shared.weight",
        "lm_head.weight": "model.shared.weight",
    }

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.model = _Core()
        self.lm_head = nn.Linear(8, 12)
        self.lm_head.weight = self.model.shared.weight
        self.config = SimpleNamespace(tie_word_embeddings=True, to_dict=lambda: {"tie_word_embeddings": True})

    def get_input_embeddings(self) -> nn.Module:
        return self.model.shared

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def prepare_inputs_for_generation(self) -> None:
        return None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        model = self.model
        hidden = model.encoder.linear(model.encoder.embed_tokens(x)) + model.decoder.linear(
            model.decoder.embed_tokens(x)
        )
        return self.lm_head(torch.tanh(hidden))
