"""Merging and unmerging a model happens to all of its layers or to none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.layers import tuner_layers, undo
from pylora.layers.delta_layer import DeltaLayer


def make(dtype: torch.dtype = torch.bfloat16) -> Any:
    """Dense layers, a convolution and an embedding, with two plain adapters and one of DoRA."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 8), nn.Linear(8, 6, bias=False), nn.Conv1d(4, 5, 3)).to(dtype)
    names = ["0", "1", "2", "3"]
    config = pylora.LoraConfig(r=2, target_modules=names, init_lora_weights=False)
    model = pylora.get_peft_model(base, config, "first").base_model
    for name, settings in {"second": {}, "dora": {"use_dora": True, "target_modules": ["1", "2"]}}.items():
        own = {"r": 3, "target_modules": names, "init_lora_weights": False} | settings
        model.peft_config[name] = pylora.LoraConfig(**own)
        model.inject_adapter(model.model, name)
    return model


def state(model: Any) -> tuple[dict[str, torch.Tensor], list[list[str]]]:
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    return weights, [list(layer.merged_adapters) for layer in tuner_layers(model)]


def assert_same(found: Any, expected: Any) -> None:
    assert found[1] == expected[1]
    assert found[0].keys() == expected[0].keys()
    assert [key for key in found[0] if not torch.equal(found[0][key], expected[0][key])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("layer", range(4))
def test_weight_that_was_edited(dtype, layer):
    model = make(dtype)
    start = state(model)
    model.merge_adapter(["first"])
    model.merge_adapter(["second", "dora"])
    edited = tuner_layers(model)[layer].get_base_layer().weight
    value = edited.data.view(-1)[3].clone()
    edited.data.view(-1)[3] += 1
    merged = state(model)
    with pytest.raises(ValueError, match="changed after the merge"):
        model.unmerge_adapter()
    assert_same(state(model), merged)
    edited.data.view(-1)[3] = value
    model.unmerge_adapter()
    assert_same(state(model), start)


@pytest.mark.parametrize("successes", range(4))
def test_merge_that_runs_out_of_memory(monkeypatch, successes):
    model = make()
    start = state(model)
    model.merge_adapter(["first"])
    merged = state(model)
    real, calls = undo.merge_, []

    def merge_(*args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if len(calls) > successes:
            raise MemoryError("no room for the log")
        return real(*args, **kwargs)

    monkeypatch.setattr(undo, "merge_", merge_)
    with pytest.raises(MemoryError):
        model.merge_adapter(["second", "dora"])
    monkeypatch.undo()
    assert len(calls) == successes + 1
    assert_same(state(model), merged)
    model.unmerge_adapter()
    assert_same(state(model), start)


def test_unmerge_that_fails_half_way_can_be_tried_again(monkeypatch):
    model = make()
    start = state(model)
    model.merge_adapter(["first"])
    model.merge_adapter(["second", "dora"])
    merged = state(model)
    real, calls = DeltaLayer.unmerge, []

    def unmerge(self: Any) -> None:
        calls.append(self)
        if len(calls) == 3:
            raise KeyboardInterrupt
        real(self)

    monkeypatch.setattr(DeltaLayer, "unmerge", unmerge)
    with pytest.raises(KeyboardInterrupt):
        model.unmerge_adapter()
    monkeypatch.undo()
    assert_same(state(model), merged)
    model.unmerge_adapter()
    assert_same(state(model), start)


def test_attention_with_its_output_projection():
    torch.manual_seed(0)
    base = nn.Sequential(nn.MultiheadAttention(8, 2), nn.Linear(8, 8))
    config = pylora.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model = pylora.get_peft_model(base, config).base_model
    model.merge_adapter()
    weight = next(layer for layer in tuner_layers(model) if type(layer).__name__ == "MultiheadAttention")
    out_proj = weight._out_proj_layer().get_base_layer().weight
    out_proj.data[0, 0] += 1
    merged = state(model)
    with pytest.raises(ValueError, match="changed after the merge"):
        model.unmerge_adapter()
    assert_same(state(model), merged)


def test_trained_token_rows():
    torch.manual_seed(0)
    base = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 8))
    config = pylora.LoraConfig(
        r=2, target_modules=["1"], trainable_token_indices={"0": [2, 5]}, init_lora_weights=False
    )
    model = pylora.get_peft_model(base, config).base_model
    for name, parameter in model.named_parameters():
        if "trainable_tokens_delta" in name:
            parameter.data.normal_()
    model.merge_adapter()
    linear = model.model[1].get_base_layer().weight
    value = linear.data[0, 0].clone()
    linear.data[0, 0] += 1
    merged = state(model)
    with pytest.raises(ValueError, match="changed after the merge"):
        model.unmerge_adapter()
    assert_same(state(model), merged)
    linear.data[0, 0] = value
    model.unmerge_adapter()
    assert not any(state(model)[1])
