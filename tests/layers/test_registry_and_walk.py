"""Which layer wraps which module, and the traversal that finds layers."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.layers import Linear, create_layer, find_factory, tuner_layers, walk


def create(target: nn.Module, **config) -> tuple[nn.Module, LoraConfig]:
    settings = LoraConfig(**config)
    return create_layer(target, "default", settings, r=2, lora_alpha=4, target_name="x"), settings


def test_linear() -> None:
    base = nn.Linear(3, 5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        layer, _ = create(base)
    assert type(layer) is Linear
    assert layer.base_layer is base
    assert layer.scaling == {"default": 2.0}


def test_linear_corrects_fan_in_fan_out() -> None:
    with pytest.warns(UserWarning, match="fan_in_fan_out is set to True but the target module is `torch.nn.Linear`"):
        layer, config = create(nn.Linear(3, 5), fan_in_fan_out=True)
    assert config.fan_in_fan_out is False
    assert layer.fan_in_fan_out is False


def test_conv1d_corrects_fan_in_fan_out() -> None:
    from transformers.pytorch_utils import Conv1D

    with pytest.warns(UserWarning, match="fan_in_fan_out is set to False but the target module is `Conv1D`"):
        layer, config = create(Conv1D(5, 3))
    assert config.fan_in_fan_out is True
    assert layer.fan_in_fan_out is True
    assert layer.is_target_conv_1d_layer is True
    assert (layer.in_features, layer.out_features) == (3, 5)


@pytest.mark.parametrize("target", [nn.ReLU(), nn.LayerNorm(3), nn.Sequential(nn.Linear(2, 2))])
def test_other_modules_are_refused(target) -> None:
    with pytest.raises(
        ValueError, match=r"is not supported\. Currently, only the following modules are supported: .*Lin"
    ):
        create(target)


def test_a_tuner_layer_is_judged_by_its_base() -> None:
    layer, _ = create(nn.Linear(3, 5))
    assert find_factory(layer) is find_factory(nn.Linear(1, 1))


def test_walk_visits_what_named_modules_does_but_for_adapters() -> None:
    model = nn.ModuleDict({"a": nn.Sequential(nn.Linear(3, 3), nn.ReLU()), "b": nn.Linear(3, 3)})
    model["again"] = model["b"]
    assert [(v.name, v.module) for v in walk(model)] == list(model.named_modules())
    layer, _ = create(model["b"])
    model["b"] = layer
    visits = list(walk(model))
    assert [v.name for v in visits] == ["", "a", "a.0", "a.1", "b", "b.base_layer"]
    assert all(v.parent is None or getattr(v.parent, v.child_name) is v.module for v in visits)
    assert [v.name for v in walk(model, enter_tuner_layers=False)] == ["", "a", "a.0", "a.1", "b", "again"]
    assert tuner_layers(model) == [layer]


def test_walk_does_not_grow_with_adapters() -> None:
    layer, config = create(nn.Linear(3, 3))
    before = len(list(walk(layer)))
    for i in range(20):
        layer.update_layer(f"a{i}", 2, lora_alpha=1, config=config)
    assert len(list(walk(layer))) == before
    assert sum(1 for _ in layer.modules()) > 60


def test_adapter_factors_are_ready_without_the_constructor() -> None:
    """The factors are made without `nn.Linear.__init__`; they must be whole modules all the same."""
    layer, _ = create(nn.Linear(3, 5), lora_bias=True)
    a, b = layer.lora_A["default"], layer.lora_B["default"]
    for made, like in ((a, nn.Linear(3, 2, bias=False)), (b, nn.Linear(2, 5))):
        assert vars(made).keys() == vars(like).keys()
        assert repr(made) == repr(like)
        assert made(torch.ones(1, made.in_features)).shape == (1, made.out_features)
