"""Unmerging gives the base weight back bit for bit, on every kind of layer and whatever happens in between."""

from __future__ import annotations

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import pylora
from pylora import LoraConfig, get_peft_model, merge_log_bytes
from pylora.errors import PeftWarning
from pylora.testing.isa import cpu_isa, supported_isas

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WORDS = {2: torch.int16, 4: torch.int32}


class Experts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 24, 40))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bi,eoi->bo", x, self.weight)


class Everything(nn.Module):
    """One module of each kind that adapters go into; Conv1D has a test of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 40)
        self.linear = nn.Linear(40, 70)
        self.conv = nn.Conv2d(8, 12, 3)
        self.attention = nn.MultiheadAttention(40, 4)
        self.experts = Experts()


def everything(dtype: torch.dtype, **settings) -> nn.Module:
    torch.manual_seed(0)
    model = Everything().to(dtype)
    with torch.no_grad():
        for param in model.parameters():
            flat = param.view(-1)
            for i, value in enumerate((-0.0, float("nan"), float("inf"), -float("inf"), 0.0)):
                flat[(7 * i + 3) % len(flat)] = value
    config = LoraConfig(
        r=4,
        target_modules=["embed", "linear", "conv", "attention"],
        target_parameters=["experts.weight"],
        init_lora_weights=False,
        **settings,
    )
    return get_peft_model(model, config)


def base_bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {
        name: value.detach().contiguous().view(WORDS[value.element_size()]).clone()
        for name, value in model.named_parameters()
        if "lora_" not in name
    }


def assert_bits(model: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = base_bits(model)
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value, after[name]), name


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("adapters", [1, 3])
def test_every_kind_of_layer(dtype, adapters) -> None:
    model = everything(dtype)
    names = ["default", *(f"a{i}" for i in range(1, adapters))]
    for name in names[1:]:
        model.add_adapter(name, LoraConfig(**{**model.peft_config["default"].to_dict(), "r": 3}))
    before = base_bits(model)
    for _ in range(5):
        model.merge_adapter(names)
        after = base_bits(model)
        changed = [name for name in before if "bias" not in name and not torch.equal(before[name], after[name])]
        assert len(changed) == 6, changed
        assert merge_log_bytes(model) > 0
        model.unmerge_adapter()
        assert_bits(model, before)
        assert merge_log_bytes(model) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_conv1d(make_layer, dtype) -> None:
    from transformers.pytorch_utils import Conv1D

    layer = make_layer(Conv1D(40, 24).to(dtype), adapters=2)
    before = base_bits(layer)
    layer.merge()
    assert merge_log_bytes(layer) > 0
    layer.unmerge()
    assert_bits(layer, before)


def test_adapters_merged_one_after_another(make_layer) -> None:
    layer = make_layer(adapters=3, dtype=torch.bfloat16)
    before = base_bits(layer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in ("a1", "default", "a2"):
            layer.merge(adapter_names=[name])
    layer.unmerge()
    assert_bits(layer, before)


@pytest.mark.parametrize("dtype", DTYPES)
def test_training_while_merged(make_layer, dtype) -> None:
    layer = make_layer(adapters=2, dtype=dtype)
    before = base_bits(layer)
    layer.merge()
    with torch.no_grad():
        for name in layer.active_adapters:
            layer.lora_A[name].weight.mul_(-3.0)
            layer.lora_B[name].weight.add_(1.0)
            layer.scaling[name] = 17.0
    layer.unmerge()
    assert_bits(layer, before)


def test_the_bias_comes_back_too_and_keeps_what_it_learned(make_layer) -> None:
    layer = make_layer(lora_bias=True, dtype=torch.bfloat16)
    nn.init.normal_(layer.lora_B["default"].bias)
    before = base_bits(layer)
    layer.merge()
    layer.unmerge()
    assert_bits(layer, before)
    bias = layer.base_layer.bias.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.base_layer.bias += 8.0
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.bias, bias + 8.0, rtol=0, atol=0.1)


@pytest.mark.parametrize("make_copy", ["deepcopy", "pickle"])
def test_copies_of_a_merged_model(make_copy) -> None:
    model = everything(torch.bfloat16)
    before = base_bits(model)
    model.merge_adapter()
    if make_copy == "deepcopy":
        other = copy.deepcopy(model)
    else:
        buffer = io.BytesIO()
        torch.save(model, buffer)
        buffer.seek(0)
        other = torch.load(buffer, weights_only=False)
    model.unmerge_adapter()
    assert_bits(model, before)
    assert merge_log_bytes(other) > 0
    other.unmerge_adapter()
    assert_bits(other, before)


def test_unmerging_under_another_instruction_set(make_layer) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    before = base_bits(layer)
    for there in supported_isas():
        for back in supported_isas():
            with cpu_isa(there):
                layer.merge()
            with cpu_isa(back):
                layer.unmerge()
            assert_bits(layer, before)


def test_a_changed_dtype_drops_the_log(make_layer) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    before = layer.base_layer.weight.float()
    layer.merge()
    layer.float()
    with pytest.warns(PeftWarning, match=r"The base weight is torch.float32 and was torch.bfloat16 when"):
        layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("through_data", [False, True])
def test_an_edit_is_noticed(make_layer, through_data) -> None:
    layer = make_layer(lora_bias=True)
    layer.merge()
    weight = layer.base_layer.weight
    kept = weight[3, 5].item()
    with torch.no_grad():
        (weight.data if through_data else weight)[3, 5] += 1.0
    edited = base_bits(layer)
    with pytest.raises(ValueError, match=r"unmerge: base weight: expected the values that the merge left"):
        layer.unmerge()
    assert layer.merged
    assert_bits(layer, edited)
    with torch.no_grad():
        weight[3, 5] = kept
    layer.unmerge()
    assert not layer.merged


def test_dropping_the_log_subtracts(make_layer) -> None:
    layer = make_layer()
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    with torch.no_grad():
        layer.base_layer.weight += 1.0
    layer.drop_merge_log()
    assert merge_log_bytes(layer) == 0
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before + 1.0, rtol=1e-5, atol=1e-5)


def test_a_weight_without_data_is_refused_and_the_log_stays(make_layer) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    before = base_bits(layer)
    layer.merge()
    merged = layer.base_layer.weight.detach().clone()
    layer.base_layer.to("meta")
    with pytest.raises(pylora.errors.UnsupportedFeatureError, match="meta tensor"):
        layer.unmerge()
    assert layer.merged
    layer.base_layer.to_empty(device="cpu")
    with torch.no_grad():
        layer.base_layer.weight.copy_(merged)
        layer.base_layer.bias.copy_(before["base_layer.bias"].view(torch.bfloat16))
    layer.unmerge()
    assert_bits(layer, before)


def test_weights_shared_by_layers_with_adapters_of_their_own() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(30, 16)
            self.head = nn.Linear(16, 30, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embed(ids))

    config = LoraConfig(r=2, target_modules=["embed", "head"], init_lora_weights=False)
    model = get_peft_model(Tied().bfloat16(), config)
    before = base_bits(model)
    for _ in range(3):
        model.merge_adapter()
        model.unmerge_adapter()
        assert_bits(model, before)


def test_dora_comes_back_bit_for_bit(make_layer) -> None:
    """Rows with magnitude 0 too, which cannot be divided back."""
    layer = make_layer(adapters=1, dtype=torch.bfloat16, use_dora=True)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight[5] = 0.0
    before = base_bits(layer.base_layer)
    for _ in range(3):
        layer.merge()
        assert bool((layer.base_layer.weight[5] == 0).all())
        layer.unmerge()
        assert_bits(layer.base_layer, before)


def test_merge_and_unload_keeps_no_log(monkeypatch) -> None:
    from pylora.layers import undo

    model = everything(torch.bfloat16)
    merged = copy.deepcopy(model)
    merged.merge_adapter()
    logs = []
    original = undo.merge_
    monkeypatch.setattr(undo, "merge_", lambda *args, log: logs.append(log) or original(*args, log=log))
    unloaded = model.merge_and_unload()
    assert logs == [False] * 6
    for name in ("embed", "linear"):
        kept = merged.get_submodule(f"base_model.model.{name}").get_base_layer().weight
        assert torch.equal(unloaded.get_parameter(f"{name}.weight").view(torch.int16), kept.view(torch.int16))


def test_layouts_without_a_kernel_are_subtracted(make_layer) -> None:
    layer = make_layer()
    layer.base_layer.weight = nn.Parameter(torch.randn(80, 48)[::2, ::2])
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert merge_log_bytes(layer) == 0
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_logs_size(make_layer, dtype) -> None:
    """At a delta of 2 % of the weight at most 3 % of its bytes; nothing of it is saved."""
    layer = make_layer(nn.Linear(512, 512).to(dtype))
    weight, delta = layer.base_layer.weight, layer.get_delta_weight("default")
    with torch.no_grad():
        layer.lora_B["default"].weight *= 0.02 * weight.float().std() / delta.float().std()
    keys = set(layer.state_dict())
    layer.merge()
    assert 0 < merge_log_bytes(layer) <= 0.03 * weight.numel() * weight.element_size()
    assert set(layer.state_dict()) == keys
