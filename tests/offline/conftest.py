"""A base model, an adapter and the merge of both, as files, for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from typer.testing import CliRunner

import pylora
from pylora.cli.app import build_app


class Made(NamedTuple):
    """Folders of a base and of an adapter, and the state of the merged model."""

    base: Path
    adapter: Path
    merged: dict[str, torch.Tensor]


def llama(**settings: Any) -> Any:
    """A Llama of two layers, width 32, with untied output weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 61, "hidden_size": 32, "intermediate_size": 56, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": False, "pad_token_id": 0}
    return LlamaForCausalLM(LlamaConfig(**sizes | settings))


def fill(model: Any) -> None:
    """Give every adapter numbers that change something."""
    for name, parameter in model.named_parameters():
        if "magnitude" in name:
            parameter.data.mul_(1.1)
        elif "lora_" in name:
            parameter.data.normal_(0, 0.1)


@pytest.fixture
def make(tmp_path: Path) -> Callable[..., Made]:
    """Write a model and an adapter of the configuration for it; `dtype` is the model's."""

    def files(model: Any, config: Any, dtype: torch.dtype = torch.float32, shard: str = "20KB") -> Made:
        model = model.to(dtype)
        model.save_pretrained(tmp_path / "base", max_shard_size=shard)
        tuned = pylora.get_peft_model(model, config)
        fill(tuned)
        tuned.save_pretrained(tmp_path / "adapter")
        merged = tuned.merge_and_unload().state_dict()
        return Made(tmp_path / "base", tmp_path / "adapter", merged)

    return files


@pytest.fixture
def cli() -> Callable[..., Any]:
    """Run `pylora` with these arguments; the result has `exit_code` and `output`."""

    def run(*arguments: object) -> Any:
        result = CliRunner().invoke(build_app(), [str(each) for each in arguments])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return result

    return run
