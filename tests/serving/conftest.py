"""A tiny Llama, and adapters for it on disk."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


def tiny_llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=1,
        bos_token_id=2,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture
def llama() -> Any:
    """A Llama of 30 tokens and width 16, the same weights each time."""
    return tiny_llama()


@pytest.fixture
def make_adapter(tmp_path: Path) -> Callable[..., Path]:
    """Writes an adapter, trained away from zero, for the tiny Llama: `make_adapter(name, seed=0, **config)`."""
    from pylora import LoraConfig, get_peft_model

    def make(name: str, seed: int = 0, **config: Any) -> Path:
        config = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], **config}
        model = get_peft_model(tiny_llama(), LoraConfig(**config))
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        model.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.fixture
def fresh_llama() -> Callable[[], Any]:
    """Builds that Llama, for tests that need one more."""
    return tiny_llama
