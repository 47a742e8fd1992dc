"""Tiny models with adapters: the same base and adapter weights in pylora and in the installed PEFT."""

import warnings

import pytest
import torch
from torch import nn

LLAMA = {
    "vocab_size": 48,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "attention_bias": True,
    "tie_word_embeddings": False,
}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    """Any look-up on the hub is an error: these tests use local folders only."""
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError(f"asked the hub: {args} {kwargs}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "file_exists", refuse)


class Mlp(nn.Module):
    """Two linear layers with biases, a norm between them and a head."""

    def __init__(self):
        super().__init__()
        self.lin0 = nn.Linear(10, 12)
        self.norm = nn.LayerNorm(12)
        self.lin1 = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.lin1(self.norm(torch.relu(self.lin0(x))))))


@pytest.fixture
def mlp():
    """A function that makes the same `Mlp` each time."""

    def make():
        torch.manual_seed(0)
        return Mlp()

    return make


@pytest.fixture
def llama():
    """A function that makes the same two-layer Llama each time."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def make(**overrides):
        torch.manual_seed(0)
        return LlamaForCausalLM(LlamaConfig(**{**LLAMA, **overrides})).eval()

    return make


@pytest.fixture
def wrap():
    """wrap(library, base, adapter_name=..., **LoraConfig fields): random, non-zero adapters."""

    def make(library, base, adapter_name="default", seed=1, **fields):
        config = library.LoraConfig(**{"init_lora_weights": False, "r": 4, **fields})
        torch.manual_seed(seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return library.get_peft_model(base, config, adapter_name=adapter_name)

    return make
