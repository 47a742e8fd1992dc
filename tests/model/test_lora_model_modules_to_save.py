"""ModulesToSaveWrapper: a trained copy for each adapter."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.layers import Linear
from pylora.model.lora_model import LoraModel
from pylora.model.modules_to_save import ModulesToSaveWrapper, set_trainable


@pytest.fixture
def wrapper() -> ModulesToSaveWrapper:
    """Around a Linear(4, 2), adapters "one" (active, copy times 2) and "two" (copy times 3)."""
    module = ModulesToSaveWrapper(nn.Linear(4, 2), "one")
    module.set_adapter("one")
    module.update("two")
    for name, factor in (("one", 2.0), ("two", 3.0)):
        for param in module.modules_to_save[name].parameters():
            param.data.mul_(factor)
    return module


def trainable(module: nn.Module) -> set[str]:
    return {name for name, param in module.named_parameters() if param.requires_grad}


def test_layout(wrapper) -> None:
    assert list(wrapper.state_dict()) == [
        "original_module.weight",
        "original_module.bias",
        "modules_to_save.one.weight",
        "modules_to_save.one.bias",
        "modules_to_save.two.weight",
        "modules_to_save.two.bias",
    ]
    assert trainable(wrapper) == {"modules_to_save.one.weight", "modules_to_save.one.bias"}
    assert wrapper.active_adapter == "one"
    assert wrapper.active_adapters == ["one"]
    assert wrapper._get_available_adapters() == {"one", "two"}


def test_forward_uses_the_active_copy(wrapper) -> None:
    x = torch.randn(3, 4)
    original = wrapper.original_module(x)
    torch.testing.assert_close(wrapper(x), 2 * original)
    wrapper.set_adapter("two")
    torch.testing.assert_close(wrapper(x), 3 * original)
    wrapper.enable_adapters(False)
    assert torch.equal(wrapper(x), original)
    assert trainable(wrapper) == set()
    wrapper.enable_adapters(True)
    assert trainable(wrapper) == {"modules_to_save.two.weight", "modules_to_save.two.bias"}
    wrapper.set_adapter([])
    assert torch.equal(wrapper(x), original)
    assert trainable(wrapper) == set()


def test_attributes_come_from_what_is_used(wrapper) -> None:
    assert wrapper.weight is wrapper.modules_to_save["one"].weight
    wrapper.set_adapter("two")
    assert wrapper.weight is wrapper.modules_to_save["two"].weight
    wrapper.enable_adapters(False)
    assert wrapper.weight is wrapper.original_module.weight
    assert wrapper.in_features == 4
    with pytest.raises(AttributeError, match="nonsense"):
        wrapper.nonsense  # noqa: B018


def test_activation_rules(wrapper) -> None:
    with pytest.raises(ValueError, match="Attempted to set multiple"):
        wrapper.set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="Adapter ghost not found"):
        wrapper.set_adapter("ghost")
    assert wrapper.active_adapter == "one"
    assert trainable(wrapper) == {"modules_to_save.one.weight", "modules_to_save.one.bias"}
    wrapper.set_adapter("two", inference_mode=True)
    assert trainable(wrapper) == set()
    assert wrapper.check_set_adapter("anything") == "anything"
    assert wrapper.check_set_adapter(["ghost", "two"]) == "two"
    assert wrapper.check_set_adapter(["ghost"]) is None
    with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
        wrapper.check_set_adapter(["one", "two"])
    with pytest.raises(ValueError, match="Please specify at least one adapter to set"):
        wrapper.check_set_adapter([])


def test_deletion(wrapper) -> None:
    wrapper.delete_adapter("ghost", ["one"])
    with pytest.raises(ValueError, match="Attempted to set multiple"):
        wrapper.delete_adapter("one", ["two", "one"])
    wrapper.delete_adapter("one", ["two"])
    assert wrapper.active_adapters == ["two"]
    assert trainable(wrapper) == {"modules_to_save.two.weight", "modules_to_save.two.bias"}
    wrapper.delete_adapter("two", None)
    assert wrapper.active_adapters == []
    x = torch.randn(3, 4)
    assert torch.equal(wrapper(x), wrapper.original_module(x))


def test_deletion_for_an_adapter_without_a_copy(wrapper) -> None:
    wrapper.delete_adapter("one", ["elsewhere"])
    assert wrapper.active_adapters == []


def test_state_dict_names(wrapper) -> None:
    state = wrapper.state_dict()
    saved = wrapper.adapter_state_dict("two", state)
    assert list(saved) == ["weight", "bias"]
    assert saved["weight"] is state["modules_to_save.two.weight"]
    assert wrapper.adapter_state_dict_load_map("two") == {
        "weight": "modules_to_save.two.weight",
        "bias": "modules_to_save.two.bias",
    }
    assert wrapper.adapter_state_dict("ghost", state) == {}
    assert wrapper.adapter_state_dict_load_map("ghost") == {}


def test_set_requires_grad(wrapper) -> None:
    wrapper.set_requires_grad(["two"], True)
    wrapper.set_requires_grad("one", False)
    assert trainable(wrapper) == {"modules_to_save.two.weight", "modules_to_save.two.bias"}


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_copies(wrapper, copied) -> None:
    x = torch.randn(3, 4)
    twin = copied(wrapper)
    assert torch.equal(twin(x), wrapper(x))
    twin.set_adapter("two")
    assert wrapper.active_adapter == "one"


def test_mixed_batches(wrapper) -> None:
    x = torch.randn(4, 4)
    original = wrapper.original_module(x)
    y = wrapper(x, adapter_names=["two", "__base__", "one", "two"])
    torch.testing.assert_close(y, original * torch.tensor([3.0, 1.0, 2.0, 3.0])[:, None])
    with pytest.raises(ValueError, match="Length of `adapter_names` should be the same"):
        wrapper(x, adapter_names=["one"])
    norm = ModulesToSaveWrapper(nn.LayerNorm(4), "one")
    with pytest.raises(TypeError, match="Mixed batching is only supported for the following modules: Linear"):
        norm(x, adapter_names=["one"] * 4)


@pytest.mark.parametrize("module", [nn.ModuleDict(), nn.ModuleList(), nn.ParameterDict(), nn.ParameterList()])
def test_containers_are_refused(module) -> None:
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        ModulesToSaveWrapper(module, "one")


def test_tuner_layers_are_refused() -> None:
    layer = Linear(nn.Linear(2, 2), "default", LoraConfig(), r=2)
    with pytest.raises(TypeError, match="modules_to_save cannot be applied to modules of type"):
        ModulesToSaveWrapper(layer, "one")


def test_tied_copies_share_the_weight() -> None:
    source = nn.Embedding(7, 4)
    module = ModulesToSaveWrapper(nn.Linear(4, 7, bias=False), "one", tied_module=source)
    assert module.modules_to_save["one"].weight is source.weight
    assert module.modules_to_save["one"](torch.ones(1, 4)).shape == (1, 7)


class TestInModels:
    def wrap(self, model: nn.Module, **settings: Any) -> LoraModel:
        return LoraModel(model, LoraConfig(target_modules=["lin0"], modules_to_save=["head"], **settings), "default")

    def test_training_changes_the_copy_only(self, make_mlp) -> None:
        model = self.wrap(make_mlp())
        before = {name: value.clone() for name, value in model.state_dict().items()}
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        model(torch.randn(4, 10)).sum().backward()
        optimizer.step()
        changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
        copies = {"model.head.modules_to_save.default.weight", "model.head.modules_to_save.default.bias"}
        assert changed == {*copies, "model.lin0.lora_B.default.weight"}

    def test_names_match_by_ending(self, make_mlp) -> None:
        model = make_mlp()
        new = set_trainable(model, "default", ["in1", "ead"], inference_mode=False)
        assert [type(module) for module in (model.lin1, model.head)] == [ModulesToSaveWrapper] * 2
        assert new == [model.lin1, model.head]
        assert trainable(model.head) == {"modules_to_save.default.weight", "modules_to_save.default.bias"}

    def test_nothing_found(self, make_mlp) -> None:
        model = make_mlp()
        assert set_trainable(model, "default", ["nope"], inference_mode=False) == []
        assert set_trainable(model, "default", None, inference_mode=False) == []
        with pytest.raises(ValueError, match=r"Target modules \{'nope'\} not found in the base model"):
            set_trainable(model, "default", ["nope"], inference_mode=False, strict_module_check=True)

    def test_the_same_adapter_twice_keeps_its_copy(self, make_mlp) -> None:
        model = self.wrap(make_mlp())
        trained = model.model.head.modules_to_save["default"]
        assert set_trainable(model.model, "default", ["head"], inference_mode=False) == []
        assert model.model.head.modules_to_save["default"] is trained
        assert list(model.model.head.modules_to_save) == ["default"]

    def test_activating_several_copies_is_refused_before_anything_changes(self, make_mlp) -> None:
        model = self.wrap(make_mlp())
        model.peft_config["other"] = LoraConfig(target_modules=["lin0"], modules_to_save=["head"])
        model.inject_adapter(model.model, "other")
        before = trainable(model)
        with pytest.raises(ValueError, match="Only one adapter can be set at a time"):
            model.set_adapter(["default", "other"])
        assert trainable(model) == before
        assert model.active_adapters == ["default"]
        assert model.model.lin0.active_adapters == ["default"]

    def test_an_adapter_without_a_copy_uses_the_original(self, make_mlp) -> None:
        model = self.wrap(make_mlp())
        model.peft_config["plain"] = LoraConfig(target_modules=["lin0"])
        model.inject_adapter(model.model, "plain")
        nn.init.zeros_(model.model.head.modules_to_save["default"].weight)
        x = torch.randn(2, 10)
        model.set_adapter("plain")
        assert model(x).std() > 0
        model.set_adapter(["plain", "default"])
        torch.testing.assert_close(model(x), model.model.head.bias.expand(2, 3))

    def test_inference_mode_keeps_the_copy_frozen(self, make_mlp) -> None:
        assert trainable(self.wrap(make_mlp(), inference_mode=True)) == set()
