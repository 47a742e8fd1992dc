"""`pylora extract`: the best adapter for the difference of two models."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import pylora
from pylora.offline.adapter import read_adapter
from tests.offline.conftest import fill, llama

X = torch.arange(24).view(2, 12)


@pytest.fixture
def pair(tmp_path):
    """Folders "base" and "tuned"; what was tuned is a rank 3 change of q_proj, o_proj and down_proj."""
    torch.manual_seed(1)
    model = llama().eval()
    model.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    config = pylora.LoraConfig(r=3, lora_alpha=6, target_modules=["q_proj", "o_proj", "down_proj"])
    tuned = pylora.get_peft_model(model, config)
    fill(tuned)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    return merged


def test_a_change_of_low_rank_is_found_whole(pair, cli, tmp_path):
    result = cli("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "--rank", 3)
    assert result.exit_code == 0, result.output
    assert "100.0 %" in result.output
    base = llama().eval()
    base.load_state_dict({k: t for p in (tmp_path / "base").glob("*.safetensors") for k, t in load_file(p).items()})
    before = base(X).logits
    adapted = pylora.PeftModel.from_pretrained(base, tmp_path / "out")
    expected = pair(X).logits
    assert (before - expected).abs().max() > 0.01
    torch.testing.assert_close(adapted(X).logits, expected, rtol=1e-4, atol=1e-4)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM"
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == {"q_proj", "o_proj", "down_proj"}


def test_best_approximation(pair, cli, tmp_path):
    assert cli("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "--rank", 2).exit_code == 0
    found = read_adapter(tmp_path / "out")
    base = {k: t for p in (tmp_path / "base").glob("*.safetensors") for k, t in load_file(p).items()}
    for name, layer in found.layers.items():
        delta = (pair.get_submodule(name).weight - base[f"{name}.weight"]).double()
        least = torch.linalg.svdvals(delta)[2:].norm()
        torch.testing.assert_close(
            (delta - layer.scaling * (layer.b @ layer.a).double()).norm(), least, rtol=1e-3, atol=1e-6
        )


def test_energy_gives_each_layer_its_rank(pair, cli, tmp_path):
    args = (tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "--rank", 8, "--energy", 0.9)
    assert cli("extract", *args).exit_code == 0
    found = read_adapter(tmp_path / "out")
    base = {k: t for p in (tmp_path / "base").glob("*.safetensors") for k, t in load_file(p).items()}
    for name, layer in found.layers.items():
        energy = torch.linalg.svdvals((pair.get_submodule(name).weight - base[f"{name}.weight"]).double()).square()
        shares = energy.cumsum(0) / energy.sum()
        assert layer.rank == int((shares < 0.9).sum()) + 1
        assert layer.scaling == 1
    assert {layer.rank for layer in found.layers.values()} <= {1, 2, 3}


def test_targets_and_whole(pair, cli, tmp_path):
    model = pair
    model.model.norm.weight.data += 0.5
    model.save_pretrained(tmp_path / "tuned")
    args = (tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "--rank", 3, "--targets", "q_proj|o_proj")
    result = cli("extract", *args)
    assert result.exit_code == 0, result.output
    assert "3 other tensors changed" in result.output  # down_proj of both layers, and the norm
    assert {n.rpartition(".")[2] for n in read_adapter(tmp_path / "out").layers} == {"q_proj", "o_proj"}
    args = (tmp_path / "tuned", tmp_path / "base", tmp_path / "all", "--rank", 3, "--whole")
    result = cli("extract", *args)
    assert result.exit_code == 0, result.output
    base = llama().eval()
    base.load_state_dict({k: t for p in (tmp_path / "base").glob("*.safetensors") for k, t in load_file(p).items()})
    adapted = pylora.PeftModel.from_pretrained(base, tmp_path / "all")
    torch.testing.assert_close(adapted(X).logits, model(X).logits, rtol=1e-4, atol=1e-4)


def test_conv1d(cli, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    settings = {"n_embd": 24, "n_layer": 2, "n_head": 2, "vocab_size": 40, "n_positions": 16}
    model = GPT2LMHeadModel(GPT2Config(**settings, bos_token_id=0, eos_token_id=0)).eval()
    model.save_pretrained(tmp_path / "base")
    before = model(X % 16).logits
    tuned = pylora.get_peft_model(model, pylora.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))
    fill(tuned)
    merged = tuned.merge_and_unload()
    merged.save_pretrained(tmp_path / "tuned")
    result = cli("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "--rank", 2)
    assert result.exit_code == 0, result.output
    base = GPT2LMHeadModel.from_pretrained(tmp_path / "base").eval()
    adapted = pylora.PeftModel.from_pretrained(base, tmp_path / "out")
    assert (merged(X % 16).logits - before).abs().max() > 0.01
    torch.testing.assert_close(adapted(X % 16).logits, merged(X % 16).logits, rtol=1e-4, atol=1e-4)


def test_refused(pair, cli, tmp_path):
    llama(hidden_size=48).save_pretrained(tmp_path / "other")
    for tuned, told in (("other", "shape"), ("base", "differ"), ("nothing", "folder")):
        result = cli("extract", tmp_path / tuned, tmp_path / "base", tmp_path / "out")
        assert result.exit_code == 2
        assert told in result.output
        assert not (tmp_path / "out").exists()
    result = cli("extract", tmp_path / "tuned", tmp_path / "base", tmp_path / "out", "--targets", "(")
    assert result.exit_code == 2
    assert "--targets" in result.output
