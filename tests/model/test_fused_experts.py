"""Adapters and configurations of transformers 4 on models whose experts are stacked by now, beside PEFT."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import pylora
from pylora import LoraConfig, PeftModel, get_peft_model
from pylora.checkpoint.fused_experts import FusedExperts, fuse_expert_tensors, fused_experts

EXPERTS, HIDDEN, INNER, RANK = 4, 16, 24, 2
SIZES = {
    "vocab_size": 20,
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}


def make(kind: str) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

    torch.manual_seed(0)
    if kind == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=EXPERTS)).eval()
    sizes = {**SIZES, "num_experts": EXPERTS, "num_experts_per_tok": 2, "moe_intermediate_size": INNER}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**sizes)).eval()


NAMES = {
    "mixtral": ("block_sparse_moe", "w1", "w3", "w2"),
    "qwen3_moe": ("mlp", "gate_proj", "up_proj", "down_proj"),
}


def old_adapter(kind: str, path: Path, **config) -> dict[str, torch.Tensor]:
    """An adapter as transformers 4 and PEFT saved it, on every expert and on q_proj."""
    block, *projections = NAMES[kind]
    tensors = {}
    for layer in range(2):
        prefix = f"base_model.model.model.layers.{layer}"
        places = [f"{prefix}.{block}.experts.{e}.{name}" for e in range(EXPERTS) for name in projections]
        for place in [*places, f"{prefix}.self_attn.q_proj"]:
            down = place.endswith(projections[2])
            rows, columns = (HIDDEN, INNER) if down else (INNER, HIDDEN)
            if "q_proj" in place:
                rows, columns = HIDDEN, HIDDEN
            tensors[f"{place}.lora_A.weight"] = torch.randn(RANK, columns)
            tensors[f"{place}.lora_B.weight"] = torch.randn(rows, RANK)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    LoraConfig(r=RANK, lora_alpha=6, target_modules=["q_proj", *projections], **config).save_pretrained(path)
    return tensors


def with_deltas(kind: str, tensors: dict[str, torch.Tensor], scaling: float) -> nn.Module:
    """The base model with the old adapter in its weights."""
    block, gate, up, down = NAMES[kind]
    model = make(kind)
    for i, layer in enumerate(model.model.layers):
        prefix = f"base_model.model.model.layers.{i}"

        def delta(name: str, prefix: str = prefix) -> torch.Tensor:
            a, b = (tensors[f"{prefix}.{name}.lora_{factor}.weight"] for factor in "AB")
            return scaling * b @ a

        with torch.no_grad():
            layer.self_attn.q_proj.weight += delta("self_attn.q_proj")
            for e in range(EXPERTS):
                expert = f"{block}.experts.{e}"
                layer.mlp.experts.gate_up_proj[e] += torch.cat([delta(f"{expert}.{name}") for name in (gate, up)])
                layer.mlp.experts.down_proj[e] += delta(f"{expert}.{down}")
    return model


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("kind", NAMES)
def test_old_adapter(kind, use_rslora, tmp_path) -> None:
    tensors = old_adapter(kind, tmp_path / "old", use_rslora=use_rslora)
    model = PeftModel.from_pretrained(make(kind), tmp_path / "old")
    ids = torch.arange(12).view(2, 6)
    wanted = with_deltas(kind, tensors, 6 / RANK**0.5 if use_rslora else 3.0)(input_ids=ids).logits
    torch.testing.assert_close(model(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
    if not use_rslora:  # PEFT doubles alpha here too, and so changes the scaling
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs = peft.PeftModel.from_pretrained(make(kind), tmp_path / "old")
        torch.testing.assert_close(theirs(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)
        state, their_state = pylora.get_peft_model_state_dict(model), peft.get_peft_model_state_dict(theirs)
        assert list(state) == list(their_state)
        assert all(torch.equal(value, their_state[key]) for key, value in state.items())
    model.save_pretrained(tmp_path / "new")
    again = PeftModel.from_pretrained(make(kind), tmp_path / "new")
    torch.testing.assert_close(again(input_ids=ids).logits, wanted, rtol=1e-3, atol=1e-3)


TARGETS = [
    ["q_proj", "w1", "w2", "w3", "gate"],
    ["w1", "w3"],
    ["w2"],
    "all-linear",
    r".*\.(q_proj|w1|w3)",
    ["q_proj"],
]


@pytest.mark.parametrize("targets", TARGETS, ids=str)
def test_configuration_beside_peft(targets) -> None:
    results = []
    for package in (peft, pylora):
        model = package.get_peft_model(make("mixtral"), package.LoraConfig(r=RANK, target_modules=targets))
        config = model.peft_config["default"]
        results.append(
            (
                set(config.target_modules),
                set(config.target_parameters or ()),
                config.rank_pattern,
                config.alpha_pattern,
                {key: value.shape for key, value in package.get_peft_model_state_dict(model).items()},
            )
        )
    assert results[0] == results[1]


def test_half_of_a_fused_projection_is_refused() -> None:
    model = make("mixtral")
    config = LoraConfig(target_modules=["w1", "q_proj"])
    before = copy.deepcopy(config)
    modules = list(model.named_modules())
    with pytest.raises(ValueError, match=r"Cannot convert PEFT target\(s\) w1 without also targeting w3 because"):
        get_peft_model(model, config)
    assert config == before
    assert list(model.named_modules()) == modules


def test_a_failure_later_on_takes_the_conversion_back() -> None:
    config = LoraConfig(target_modules=["w1", "w2", "w3"], lora_dropout=0.1)
    before = copy.deepcopy(config)
    with pytest.raises(ValueError, match="lora_dropout"):
        get_peft_model(make("mixtral"), config)
    assert config == before


def test_other_models_are_none_of_them() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    assert fused_experts(nn.Linear(2, 2)) is None
    assert fused_experts(LlamaForCausalLM(LlamaConfig(**SIZES))) is None
    assert fused_experts(make("qwen3_moe")) == FusedExperts("gate_proj", "up_proj", "down_proj")


def test_an_expert_that_is_missing() -> None:
    tensors = {f"x.experts.{e}.w2.lora_{f}.weight": torch.ones(2, 2) for e in (0, 2) for f in "AB"}
    with pytest.raises(ValueError, match=r"x\.experts: expected w2\.lora_A of every expert, got those of \[0, 2\]"):
        fuse_expert_tensors(FusedExperts("w1", "w3", "w2"), tensors)
