"""What every tuner layer does with its adapters: settings, activation, flags, scales, deletion."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.errors import UnsupportedFeatureError
from pylora.layers import BaseTunerLayer, Linear, LoraLayer


def trainable(layer: nn.Module) -> set[str]:
    return {name for name, param in layer.named_parameters() if param.requires_grad}


def factors(*names: str) -> set[str]:
    return {f"lora_{factor}.{name}.weight" for factor in "AB" for name in names}


def test_documented_state(make_layer) -> None:
    layer = make_layer(adapters=2, lora_dropout=0.25, use_rslora=True)
    assert isinstance(layer, LoraLayer)
    assert isinstance(layer, BaseTunerLayer)
    assert (layer.in_features, layer.out_features) == (24, 40)
    assert layer.r == {"default": 4, "a1": 5}
    assert layer.lora_alpha == {"default": 6, "a1": 5}
    assert layer.scaling == {"default": 6 / math.sqrt(4), "a1": 5 / math.sqrt(5)}
    assert layer.use_rslora == {"default": True, "a1": True}
    assert layer.use_dora == {"default": False, "a1": False}
    assert layer.lora_bias == {"default": False, "a1": False}
    assert layer.lora_A["a1"].weight.shape == (5, 24)
    assert layer.lora_B["a1"].weight.shape == (40, 5)
    assert layer.lora_B["a1"].bias is None
    assert isinstance(layer.lora_dropout["default"], nn.Dropout)
    assert layer.lora_dropout["default"].p == 0.25
    assert layer.fan_in_fan_out is False
    assert layer.is_target_conv_1d_layer is False
    assert layer.merged_adapters == []
    assert layer.merged is False
    assert layer.disable_adapters is False
    assert layer.cast_input_dtype_enabled is True
    assert layer.weight is layer.base_layer.weight
    assert layer.bias is layer.base_layer.bias
    assert layer.get_base_layer() is layer.base_layer
    assert layer._get_available_adapters() == {"default", "a1"}
    assert repr(layer).startswith("lora.Linear(")


def test_children_are_peft_s_in_its_order(make_layer) -> None:
    assert [name for name, _ in make_layer().named_children()] == [
        "base_layer",
        "lora_dropout",
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    ]


def test_no_dropout_is_an_identity(make_layer) -> None:
    assert isinstance(make_layer().lora_dropout["default"], nn.Identity)


def test_properties_are_read_only(make_layer) -> None:
    layer = make_layer()
    for name in ("active_adapter", "active_adapters", "disable_adapters", "merged"):
        with pytest.raises(AttributeError):
            setattr(layer, name, "x")


def test_new_adapters_start_inactive_and_frozen() -> None:
    layer = Linear(nn.Linear(4, 4).requires_grad_(False), "default", LoraConfig(), r=2)
    layer.update_layer("other", 3, lora_alpha=1, config=LoraConfig())
    assert layer.active_adapters == ["default"]
    assert trainable(layer) == factors("default")


def test_inference_mode_adapters_start_frozen() -> None:
    layer = Linear(nn.Linear(4, 4).requires_grad_(False), "default", LoraConfig(inference_mode=True), r=2)
    assert trainable(layer) == set()


def test_set_adapter(make_layer) -> None:
    layer = make_layer(adapters=3)
    layer.set_adapter("a1")
    assert layer.active_adapters == layer.active_adapter == ["a1"]
    assert trainable(layer) == factors("a1")
    layer.set_adapter(["a2", "default"], inference_mode=True)
    assert layer.active_adapters == ["a2", "default"]
    assert trainable(layer) == set()


def test_set_adapter_keeps_its_own_list(make_layer) -> None:
    layer, names = make_layer(adapters=2), ["default"]
    layer.set_adapter(names)
    names.append("a1")
    assert layer.active_adapters == ["default"]


def test_enable_adapters(make_layer) -> None:
    layer = make_layer(adapters=2)
    layer.set_adapter("a1")
    layer.enable_adapters(False)
    assert layer.disable_adapters
    assert trainable(layer) == set()
    layer.enable_adapters(True)
    assert not layer.disable_adapters
    assert trainable(layer) == factors("a1")


def test_set_requires_grad(make_layer) -> None:
    layer = make_layer(adapters=3)
    layer.set_adapter("default")
    layer.set_requires_grad(["a1", "a2", "ghost"])
    assert trainable(layer) == factors("default", "a1", "a2")
    layer.set_requires_grad("default", False)
    assert trainable(layer) == factors("a1", "a2")


def test_frozen_declarations_survive_activation(make_layer) -> None:
    layer = make_layer(adapters=2)
    layer.frozen_peft_weight_names = {"a1": ("lora_B",)}
    layer.set_adapter("a1")
    assert trainable(layer) == {"lora_A.a1.weight"}
    layer.set_requires_grad("a1")
    assert trainable(layer) == {"lora_A.a1.weight"}
    layer.set_adapter("default")
    layer.delete_adapter("a1")
    assert layer.frozen_peft_weight_names == {}


def test_scales(make_layer) -> None:
    layer = make_layer(adapters=2)
    layer.set_adapter("default")
    layer.set_scale("a1", 3.0)
    layer.set_scale("ghost", 3.0)
    layer.scale_layer(2.0)
    assert layer.scaling == {"default": 2.0 * 6 / 4, "a1": 3.0 * 5 / 5}
    layer.unscale_layer(4.0)
    assert layer.scaling["default"] == 0.5 * 6 / 4
    layer.unscale_layer()
    assert layer.scaling == {"default": 6 / 4, "a1": 3.0}


def test_reset_parameters(make_layer) -> None:
    layer = make_layer()
    before = layer.lora_A["default"].weight.clone()
    layer.reset_lora_parameters("default", False)
    assert torch.equal(layer.lora_A["default"].weight, before)
    layer.reset_lora_parameters("default", True)
    assert not torch.equal(layer.lora_A["default"].weight, before)
    assert not layer.lora_B["default"].weight.any()
    layer.reset_lora_parameters("ghost", True)
    with pytest.raises(ValueError, match="Unknown initialization"):
        layer.reset_lora_parameters("default", "nonsense")


class TestDeletion:
    def test_of_an_inactive_adapter(self, make_layer) -> None:
        layer = make_layer(adapters=3)
        layer.set_adapter(["default", "a2"])
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.delete_adapter("a1")
        assert layer.active_adapters == ["default", "a2"]
        assert layer._all_available_adapter_names() == ["a2", "default"]
        assert not any("a1" in name for name in layer.state_dict())

    def test_of_one_of_several_active_ones(self, make_layer) -> None:
        layer = make_layer(adapters=3)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            layer.delete_adapter("default")
        assert layer.active_adapters == ["a1", "a2"]

    def test_of_the_only_active_one(self, make_layer) -> None:
        layer = make_layer(adapters=3)
        layer.set_adapter("default")
        message = "Adapter default was active which is now deleted. Setting active adapter to a1."
        with pytest.warns(UserWarning, match=message):
            layer.delete_adapter("default")
        assert layer.active_adapters == ["a1"]
        assert trainable(layer) == factors("a1")

    def test_of_the_last_one(self, make_layer) -> None:
        layer = make_layer()
        layer.delete_adapter("default")
        assert layer.active_adapters == []
        x = torch.randn(2, 24)
        assert torch.equal(layer(x), layer.base_layer(x))

    def test_of_an_absent_one(self, make_layer) -> None:
        layer = make_layer()
        layer.delete_adapter("ghost")
        assert layer.active_adapters == ["default"]


class TestUpdate:
    @pytest.mark.parametrize("rank", [0, -1])
    def test_rank_must_be_positive(self, make_layer, rank) -> None:
        layer = make_layer()
        with pytest.raises(ValueError, match="`r` should be a positive integer value but the value passed is"):
            layer.update_layer("new", rank, lora_alpha=1, config=LoraConfig())
        assert layer._all_available_adapter_names() == ["default"]

    def test_unknown_initialisation(self, make_layer) -> None:
        layer = make_layer()
        with pytest.raises(ValueError, match="Unknown initialization"):
            layer.update_layer("new", 2, lora_alpha=1, config=LoraConfig(init_lora_weights="nonsense"))
        assert layer._all_available_adapter_names() == ["default"]

    def test_what_pylora_lacks_is_refused(self, make_layer) -> None:
        layer = make_layer()
        with pytest.raises(UnsupportedFeatureError, match="use_qalora"):
            layer.update_layer("new", 2, lora_alpha=1, config=LoraConfig(use_qalora=True))
        assert layer._all_available_adapter_names() == ["default"]

    def test_same_name_replaces(self, make_layer) -> None:
        layer = make_layer()
        layer.update_layer("default", 7, lora_alpha=7, config=LoraConfig())
        assert layer.lora_A["default"].weight.shape == (7, 24)
        assert layer.scaling == {"default": 1.0}
        assert trainable(layer) == factors("default")

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
    def test_adapters_take_the_base_dtype(self, dtype) -> None:
        layer = Linear(nn.Linear(4, 4, dtype=dtype), "default", LoraConfig(), r=2)
        assert layer.lora_A["default"].weight.dtype is dtype
        assert layer.lora_B["default"].weight.dtype is dtype

    def test_meta_context_makes_empty_adapters(self) -> None:
        base = nn.Linear(4, 4)
        with torch.device("meta"):
            layer = Linear(base, "default", LoraConfig(), r=2)
        assert layer.lora_A["default"].weight.is_meta
        assert not layer.base_layer.weight.is_meta


def test_nested_tuner_layers_reach_the_innermost_base(make_layer) -> None:
    outer = make_layer()
    inner = outer.base_layer
    outer.base_layer = Linear(inner, "default", LoraConfig(init_lora_weights=False), r=2)
    assert outer.get_base_layer() is inner
    assert outer.weight is inner.weight


def test_base_weight_accessors(make_layer) -> None:
    layer = make_layer()
    assert torch.equal(layer.get_base_weight(), layer.base_layer.weight)
    layer.set_base_weight(torch.zeros(40, 24))
    assert not layer.base_layer.weight.any()
