"""Merging into the base weight: values, rounding, warnings, and that a failed merge changes nothing."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pylora.errors import UnsupportedFeatureError
from pylora.layers import check_adapters_to_merge


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    return Conv1D(40, 24)


def snapshot(layer: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_unchanged(layer: nn.Module, before: dict[str, torch.Tensor]) -> None:
    after = layer.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(value.view(torch.uint8), after[name].view(torch.uint8)), name


@pytest.mark.parametrize("base", [None, conv1d], ids=["linear", "conv1d"])
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("safe_merge", [False, True])
def test_merged_layer_computes_what_the_unmerged_does(make_layer, base, adapters, safe_merge) -> None:
    layer = make_layer(base and base(), adapters=adapters)
    x = torch.randn(5, 24)
    expected, before = layer(x), layer.base_layer.weight.clone()
    storage = layer.base_layer.weight.data_ptr()
    layer.merge(safe_merge=safe_merge)
    assert layer.merged
    assert layer.merged_adapters == layer.active_adapters
    assert layer.base_layer.weight.data_ptr() == storage
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    layer.unmerge()
    assert not layer.merged
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cycles_do_not_drift(make_layer, dtype) -> None:
    """PEFT's error grows with every cycle; here the second and all later cycles give the bits of the first."""
    layer = make_layer(adapters=1, dtype=dtype)
    layer.lora_B["default"].weight.data.mul_(0.3)
    before = layer.base_layer.weight.double()
    delta = layer.get_delta_weight("default").double()
    after = []
    for _ in range(100):
        layer.merge()
        layer.unmerge()
        after.append(layer.base_layer.weight.clone())
    assert all(torch.equal(after[0], weight) for weight in after[1:])
    # One rounding each way, each at most half a step of the merged or the plain weight.
    step = torch.finfo(dtype).eps * torch.maximum(before.abs(), (before + delta).abs())
    assert bool(((after[0].double() - before).abs() <= step).all())


def test_factors_that_change_while_merged_do_not_stay_in_the_base_weight(make_layer) -> None:
    """As when a checkpoint is loaded into a merged adapter."""
    layer = make_layer(adapters=2)
    before = layer.base_layer.weight.clone()
    layer.merge()
    with torch.no_grad():
        for name in layer.active_adapters:
            layer.lora_A[name].weight.mul_(-3.0)
            layer.lora_B[name].weight.add_(1.0)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("safe_merge", [False, True])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_narrow_weights_are_rounded_once(make_layer, dtype, safe_merge, adapter_dtype) -> None:
    layer = make_layer(adapters=3, dtype=dtype, adapter_dtype=adapter_dtype)
    expected = layer.base_layer.weight.double()
    for name in layer.active_adapters:
        a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
        expected = expected + layer.scaling[name] * b @ a
    layer.merge(safe_merge=safe_merge)
    # At most the f32 sum's own error away from the exact sum before the one rounding.
    half_step = torch.finfo(dtype).eps / 2 * expected.abs()
    assert bool(((layer.base_layer.weight.double() - expected).abs() <= half_step * 1.001 + 1e-6).all())


def test_merging_by_name_and_one_after_another(make_layer) -> None:
    layer = make_layer(adapters=3)
    layer.merge(adapter_names=["a1"])
    assert layer.merged_adapters == ["a1"]
    with pytest.warns(UserWarning, match="Already following adapters were merged a1. You are now additionally merging"):
        layer.merge(adapter_names=["a1", "a2"])
    assert layer.merged_adapters == ["a1", "a2"]
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        layer.merge(adapter_names=["a2"])
    layer.unmerge()
    with pytest.warns(UserWarning, match="Already unmerged. Nothing to do"):
        layer.unmerge()


def test_unknown_names_are_skipped(make_layer) -> None:
    layer = make_layer()
    before = snapshot(layer)
    layer.merge(adapter_names=["ghost"])
    assert not layer.merged
    assert_unchanged(layer, before)


def test_names_must_be_a_list(make_layer) -> None:
    layer = make_layer()
    with pytest.raises(TypeError, match="adapter_names should be a list of strings, got 'default'"):
        layer.merge(adapter_names="default")
    with pytest.raises(TypeError):
        check_adapters_to_merge(layer, "default")


def test_lora_bias_goes_into_the_base_bias(make_layer) -> None:
    layer = make_layer(lora_bias=True)
    nn.init.normal_(layer.lora_B["default"].bias)
    x, before = torch.randn(5, 24), layer.base_layer.bias.clone()
    expected = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)
    assert not torch.equal(layer.base_layer.bias, before)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.bias, before)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_lora_bias_needs_a_base_bias(make_layer, safe_merge) -> None:
    with pytest.warns(UserWarning, match="has no bias. This means that merging LoRA weights won't be possible"):
        layer = make_layer(bias=False, lora_bias=True)
    before = snapshot(layer)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        layer.merge(safe_merge=safe_merge)
    assert not layer.merged
    assert_unchanged(layer, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_safe_merge_refuses_before_it_writes(make_layer, value, dtype) -> None:
    layer = make_layer(adapters=3, dtype=dtype)
    layer.lora_B["a2"].weight.data[1, 2] = value
    before = snapshot(layer)
    with pytest.raises(ValueError, match=r"NaNs detected in the merged weights\. The adapter a2 seems to be broken"):
        layer.merge(safe_merge=True)
    assert layer.merged_adapters == []
    assert_unchanged(layer, before)


def test_safe_merge_checks_the_bias_too(make_layer) -> None:
    layer = make_layer(lora_bias=True)
    layer.lora_B["default"].bias.data[3] = float("inf")
    before = snapshot(layer)
    with pytest.raises(ValueError, match="The adapter default seems to be broken"):
        layer.merge(safe_merge=True)
    assert_unchanged(layer, before)


def test_safe_merge_sees_overflow_of_the_storage_type(make_layer) -> None:
    layer = make_layer(dtype=torch.float16)
    layer.lora_B["default"].weight.data.fill_(1e6)
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)


def test_check_merge_changes_nothing(make_layer) -> None:
    layer = make_layer(adapters=2)
    before = snapshot(layer)
    layer.check_merge(safe_merge=True)
    layer.lora_B["a1"].weight.data[0, 0] = float("nan")
    layer.check_merge(safe_merge=True, adapter_names=["default"])
    layer.check_merge(safe_merge=False)
    with pytest.raises(ValueError, match="a1"):
        layer.check_merge(safe_merge=True)
    layer.lora_B["a1"].weight.data.copy_(before["lora_B.a1.weight"])
    assert_unchanged(layer, before)


def test_a_tied_weight_stays_tied(make_layer) -> None:
    layer = make_layer()
    other = nn.Linear(24, 40, bias=False)
    other.weight = layer.base_layer.weight
    for safe_merge in (False, True):
        layer.merge(safe_merge=safe_merge)
        assert other.weight.data_ptr() == layer.base_layer.weight.data_ptr()
        assert torch.equal(other.weight, layer.base_layer.weight)
        layer.unmerge()


def test_a_write_moves_the_version_counter(make_layer) -> None:
    layer = make_layer()
    version = layer.base_layer.weight._version
    layer.merge()
    assert layer.base_layer.weight._version > version


def test_weights_without_data_are_refused(make_layer) -> None:
    layer = make_layer()
    layer.base_layer.to("meta")
    with pytest.raises(UnsupportedFeatureError, match="meta tensor"):
        layer.merge()
    assert not layer.merged


def test_quantised_weights_are_refused(make_layer) -> None:
    layer = make_layer()
    layer.base_layer.weight = nn.Parameter(torch.ones(40, 24, dtype=torch.int8), requires_grad=False)
    with pytest.raises(UnsupportedFeatureError, match="int8"):
        layer.merge()
    assert not layer.merged
    assert bool((layer.base_layer.weight == 1).all())


@pytest.mark.parametrize("base", [None, conv1d], ids=["linear", "conv1d"])
def test_delta_weight(make_layer, base) -> None:
    layer = make_layer(base and base())
    delta = layer.get_delta_weight("default")
    assert delta.shape == layer.base_layer.weight.shape
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    expected = layer.scaling["default"] * b @ a
    torch.testing.assert_close(delta, expected.t() if base else expected)
    with pytest.raises(KeyError):
        layer.get_delta_weight("ghost")


def test_delta_weight_has_the_factors_dtype(make_layer) -> None:
    layer = make_layer(dtype=torch.bfloat16, adapter_dtype=torch.bfloat16)
    delta = layer.get_delta_weight("default")
    assert delta.dtype is torch.bfloat16
    exact = layer.scaling["default"] * layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    assert bool(((delta.double() - exact).abs() <= exact.abs() * 2**-8 + 1e-6).all())
