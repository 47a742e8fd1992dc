"""Layer classes that a configuration brings along, and modules that are linear layers by inheritance."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from pylora import LoraConfig, PeftModel, get_peft_model
from pylora.layers import Linear, LoraLayer, find_factory


class Dense(nn.Module):
    """Computes what nn.Linear does and is none."""

    def __init__(self) -> None:
        super().__init__()
        self.in_features, self.out_features = 10, 20
        self.weight = nn.Parameter(torch.randn(20, 10))

    def forward(self, x):
        return F.linear(x, self.weight)


class MyLora(Linear):
    pass


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(10, 10)
        self.mine = Dense()

    def forward(self, x):
        return self.mine(self.lin(x).relu())


def make_config(classes=None, **kwargs) -> LoraConfig:
    config = LoraConfig(**{"target_modules": ["lin", "mine"], "init_lora_weights": False, **kwargs})
    config._register_custom_module({Dense: MyLora} if classes is None else classes)
    return config


def test_a_registered_class_wraps_its_kind_of_module() -> None:
    with pytest.warns(UserWarning, match=r"Unsupported layer type '.*Dense'>' encountered, proceed at your own risk"):
        model = get_peft_model(Model(), make_config())
    assert type(model.base_model.model.mine) is MyLora
    assert type(model.base_model.model.lin) is Linear
    x = torch.randn(3, 10)
    wanted = model(x)
    wanted.sum().backward()
    assert model.base_model.model.mine.lora_A["default"].weight.grad.any()
    torch.testing.assert_close(model.merge_and_unload()(x), wanted)


def test_without_it_the_module_is_not_supported() -> None:
    model = Model()
    message = (
        r"Target module Dense\(\) is not supported\. Currently, only the following modules are supported: .*Linear"
    )
    with pytest.raises(ValueError, match=message):
        get_peft_model(model, LoraConfig(target_modules=["lin", "mine"]))
    assert type(model.lin) is nn.Linear


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_a_registered_class_comes_before_pylora_s() -> None:
    model = get_peft_model(Model(), make_config({nn.Linear: MyLora}, target_modules=["lin"]))
    assert type(model.base_model.model.lin) is MyLora


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_second_adapter_needs_no_registration() -> None:
    model = get_peft_model(Model(), make_config())
    model.add_adapter("other", LoraConfig(target_modules=["lin", "mine"]))
    assert set(model.base_model.model.mine.lora_A) == {"default", "other"}


@pytest.mark.filterwarnings("ignore:Unsupported layer type")
def test_save_and_load(tmp_path) -> None:
    base = Model()
    state = {key: value.clone() for key, value in base.state_dict().items()}
    model = get_peft_model(base, make_config())
    x = torch.randn(3, 10)
    wanted = model(x)
    model.save_pretrained(tmp_path)
    config = LoraConfig.from_pretrained(tmp_path)
    config._register_custom_module({Dense: MyLora})
    fresh = Model()
    fresh.load_state_dict(state)
    torch.testing.assert_close(PeftModel.from_pretrained(fresh, tmp_path, config=config)(x), wanted)


def test_a_layer_of_one_s_own_without_widths() -> None:
    class LstmLora(nn.Module, LoraLayer):
        def __init__(self, base_layer, adapter_name, **kwargs) -> None:
            super().__init__()
            LoraLayer.__init__(self, base_layer, **kwargs)
            self._active_adapter = adapter_name

    with pytest.warns(UserWarning, match="Unsupported layer type"):
        model = get_peft_model(
            nn.ModuleDict({"lstm": nn.LSTM(10, 20)}), make_config({nn.LSTM: LstmLora}, target_modules=["lstm"])
        )
    layer = model.base_model.model["lstm"]
    assert isinstance(layer, LstmLora)
    assert isinstance(layer.base_layer, nn.LSTM)
    assert layer.in_features is None


def test_subclasses_of_linear_are_linear_layers() -> None:
    assert find_factory(nn.MultiheadAttention(4, 2).out_proj) is find_factory(nn.Linear(2, 2))
