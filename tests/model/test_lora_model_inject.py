"""Putting adapters in: what is refused leaves no trace, further adapters change nothing that was there."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.errors import NoMatchingPeftModuleError, UnsupportedFeatureError
from pylora.layers import Linear, LoraLayer
from pylora.model import inject
from pylora.model.base_tuner import BaseTuner
from pylora.model.lora_model import LoraModel


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lin0", "lin1"], "init_lora_weights": False, **settings})


def add(model: LoraModel, name: str, settings: LoraConfig, **options: Any) -> None:
    model.peft_config[name] = settings
    model.inject_adapter(model.model, name, **options)


class State:
    """Everything about a model that a failed call must leave alone."""

    def __init__(self, model: nn.Module, *configs: LoraConfig) -> None:
        self.model, self.configs = model, configs
        self.before = self.read()

    def read(self) -> dict[str, Any]:
        layers = [module for module in self.model.modules() if isinstance(module, LoraLayer)]
        return {
            "modules": [(name, id(module)) for name, module in self.model.named_modules()],
            "values": {name: value.clone() for name, value in self.model.state_dict().items()},
            "parameters": {name: id(param) for name, param in self.model.named_parameters()},
            "flags": {name: param.requires_grad for name, param in self.model.named_parameters()},
            "training": [module.training for module in self.model.modules()],
            "layers": [
                (copy.copy(x.scaling), copy.copy(x.r), x.active_adapters, list(x.merged_adapters)) for x in layers
            ],
            "configs": [copy.deepcopy(vars(each)) for each in self.configs],
        }

    def assert_unchanged(self) -> None:
        after = self.read()
        values, expected = after.pop("values"), self.before.pop("values")
        assert after == self.before
        assert all(torch.equal(value, values[name]) for name, value in expected.items())


REFUSALS = [
    ({"r": 0}, ValueError),
    ({"rank_pattern": {"lin1": 0}}, ValueError),  # fails on the second module
    ({"target_modules": ["lin0", "act"]}, ValueError),
    ({"target_modules": ["nope"]}, NoMatchingPeftModuleError),
    ({"target_modules": None}, ValueError),
    ({"init_lora_weights": "nonsense"}, ValueError),
    ({"use_qalora": True}, UnsupportedFeatureError),
    ({"bias": "some"}, NotImplementedError),
    ({"fan_in_fan_out": True, "rank_pattern": {"lin1": 0}}, ValueError),
    ({"modules_to_save": ["head", "default"]}, ValueError),  # fails after layers and a head are wrapped
]


@pytest.mark.parametrize(("settings", "error"), REFUSALS, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_refused_first_adapter_leaves_no_trace(make_mlp, settings, error) -> None:
    model, refused = make_mlp(), config(**settings)
    model.head.bias.requires_grad_(False)
    state = State(model, refused)
    with pytest.raises(error):
        LoraModel(model, refused, "default")
    state.assert_unchanged()
    assert not hasattr(model, "peft_config")


@pytest.mark.parametrize(("settings", "error"), REFUSALS, ids=lambda value: str(value))
@pytest.mark.filterwarnings("ignore:fan_in_fan_out")
def test_a_refused_further_adapter_leaves_no_trace(make_mlp, settings, error) -> None:
    first, refused = config(target_modules=["lin0"], modules_to_save=["head"]), config(**settings)
    model = LoraModel(make_mlp(), first, "default")
    model.model.lin1.weight.requires_grad_()
    state = State(model, first, refused)
    model.peft_config["new"] = refused
    if settings.get("modules_to_save"):
        refused.modules_to_save = ["head", "new"]
        state = State(model, first, refused)
    with pytest.raises(error):
        model.inject_adapter(model.model, "new")
    state.assert_unchanged()
    assert model.targeted_module_names == ["lin0"]
    assert model.active_adapter == ["default"]


@pytest.mark.parametrize("name", ["a.b", "", "keys"])
def test_an_impossible_name_leaves_no_trace(make_mlp, name) -> None:
    model, settings = make_mlp(), config()
    state = State(model, settings)
    with pytest.raises(KeyError):
        LoraModel(model, settings, name)
    state.assert_unchanged()


def test_any_failure_half_way_is_undone(make_mlp, monkeypatch) -> None:
    """Also one that nothing foresaw, while an adapter of the same name is being replaced."""
    first, second = config(), config(r=3)
    model = LoraModel(make_mlp(), first, "default")
    state = State(model, first, second)
    monkeypatch.setattr(inject, "unmerge_before_switch", lambda layer: 1 / 0)
    model.peft_config["default"] = second
    with pytest.raises(ZeroDivisionError):
        model.inject_adapter(model.model, "default")
    state.assert_unchanged()


def test_more_than_one_adapter_with_bias(make_mlp) -> None:
    model = LoraModel(make_mlp(), config(bias="all"), "default")
    state = State(model)
    model.peft_config["new"] = config(bias="lora_only")
    with pytest.raises(ValueError, match="LoraModel supports only 1 adapter with bias"):
        model.inject_adapter(model.model, "new")
    state.assert_unchanged()


def test_a_module_that_is_wrapped_twice(make_mlp) -> None:
    """A second tuner around the same model extends the layers of the first and says so."""
    inner = LoraModel(make_mlp(), config(), "default")
    with pytest.warns(UserWarning, match="Already found a `peft_config` attribute in the model"):
        outer = LoraModel(inner.model, config(r=2), "other")
    assert outer.model.lin0.r == {"default": 8, "other": 2}
    assert sorted(outer.peft_config) == ["default", "other"]
    refused = config(r=0)
    state = State(outer)
    with pytest.warns(UserWarning, match="Already found"), pytest.raises(ValueError, match="positive integer"):
        LoraModel(inner.model, refused, "third")
    state.assert_unchanged()
    assert sorted(outer.peft_config) == ["default", "other"]


def test_further_adapters_are_inactive_and_change_no_flag(make_mlp) -> None:
    model = LoraModel(make_mlp(), config(target_modules=["lin0"]), "default")
    model.set_requires_grad("default", False)
    model.model.head.weight.requires_grad_()
    flags = {name: param.requires_grad for name, param in model.named_parameters()}
    x = torch.randn(4, 10)
    before = model(x)
    add(model, "new", config(r=3, modules_to_save=["head"]))
    after = {name: param.requires_grad for name, param in model.named_parameters()}
    assert after["model.head.original_module.weight"] is True
    moved = {"model.lin1.base_layer.weight": "model.lin1.weight"}
    for name, flag in after.items():
        name = name.replace("head.original_module", "head")
        assert flag is flags.get(moved.get(name, name), False), name
    assert torch.equal(model(x), before)
    assert model.active_adapters == ["default"]
    assert [layer.active_adapters for layer in model.modules() if isinstance(layer, LoraLayer)] == [["default"]] * 2
    assert model.targeted_module_names == ["lin0", "lin1"]


def test_adding_to_a_merged_model_unmerges_it(make_mlp) -> None:
    model = LoraModel(make_mlp(), config(), "default")
    x = torch.randn(4, 10)
    before = model(x)
    model.merge_adapter()
    with pytest.warns(UserWarning, match="Adapter cannot be set when the model is merged. Unmerging the model first."):
        add(model, "new", config())
    assert not model.model.lin0.merged
    torch.testing.assert_close(model(x), before)


@pytest.mark.parametrize("bias", ["none", "all", "lora_only"])
def test_bias_settings(make_mlp, bias) -> None:
    model = LoraModel(make_mlp(), config(bias=bias), "default")
    trained = {name for name, param in model.named_parameters() if param.requires_grad and "lora" not in name}
    lora_only = {"model.lin0.base_layer.bias"}
    assert trained == {"none": set(), "lora_only": lora_only, "all": {*lora_only, "model.head.bias"}}[bias]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_adapter_dtype(make_mlp, dtype) -> None:
    model = LoraModel(make_mlp(dtype), config(), "default")
    weights = [param for name, param in model.named_parameters() if "lora_" in name]
    assert {param.dtype for param in weights} == {dtype}
    model._cast_adapter_dtype("default", autocast_adapter_dtype=False)
    model._cast_adapter_dtype("ghost")
    assert {param.dtype for name, param in model.named_parameters() if "lora_" in name} == {dtype}
    model._cast_adapter_dtype("default")
    cast = {name: param for name, param in model.named_parameters() if "lora_" in name}
    assert {param.dtype for param in cast.values()} == {torch.float64 if dtype is torch.float64 else torch.float32}
    assert all(param.requires_grad for param in cast.values())
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(cast.values(), weights, strict=True))


def test_low_cpu_mem_usage_makes_empty_adapters(make_mlp) -> None:
    torch.manual_seed(5)
    state = torch.get_rng_state()
    model = make_mlp()
    torch.set_rng_state(state)
    model = LoraModel(model, config(modules_to_save=["head"]), "default", low_cpu_mem_usage=True)
    assert torch.equal(torch.get_rng_state(), state)
    for name, param in model.named_parameters():
        assert param.is_meta is ("lora_" in name), name
    add(model, "new", config(), low_cpu_mem_usage=True)
    assert model.model.lin0.lora_A["new"].weight.is_meta


def test_state_dict_chooses_the_modules(make_mlp) -> None:
    keys = {"lin1.lora_A.weight": torch.empty(0), "lin1.lora_B.weight": torch.empty(0)}
    with pytest.warns(RuntimeWarning, match="inconsistency"):
        model = LoraModel(make_mlp(), config(), "default", state_dict=keys)
    assert model.targeted_module_names == ["lin1"]


def test_same_seed_gives_the_same_adapter(make_mlp) -> None:
    states = []
    for _ in range(2):
        model = make_mlp()
        torch.manual_seed(3)
        states.append(LoraModel(model, config(), "default").state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_tied_modules_are_wrapped_once(make_mlp) -> None:
    model = make_mlp()
    model.twin = model.lin1
    wrapped = LoraModel(model, config(target_modules=["lin1", "twin"]), "default")
    assert isinstance(wrapped.model.lin1, Linear)
    assert isinstance(wrapped.model.twin, nn.Linear)


def test_attributes_fall_through(make_mlp) -> None:
    model = LoraModel(make_mlp(), config(), "default")
    assert isinstance(model, BaseTuner)
    assert model.prefix == "lora_"
    assert model.lin0 is model.model.lin0
    assert model.get_model_config(model.model) == {"model_type": "custom"}
    assert model.model.peft_config is model.peft_config
    with pytest.raises(AttributeError, match="nonsense"):
        model.nonsense  # noqa: B018


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("merged", [False, True])
def test_copies(make_transformer, logits, copied, merged) -> None:
    settings = LoraConfig(target_modules="all-linear", init_lora_weights=False, modules_to_save=["lm_head"])
    model = LoraModel(make_transformer("llama"), settings, "default").eval()
    if merged:
        model.merge_adapter()
    twin = copied(model)
    assert torch.equal(logits(twin, "llama"), logits(model, "llama"))
    assert twin.active_adapters == ["default"]
    assert twin.peft_config is not model.peft_config
    if merged:
        twin.unmerge_adapter()
        model.unmerge_adapter()
        assert torch.equal(logits(twin, "llama"), logits(model, "llama"))


def test_get_model_config_reads_every_kind_of_config(make_transformer) -> None:
    import dataclasses

    @dataclasses.dataclass
    class Config:
        model_type: str = "mine"

    class Model(nn.Module):
        config: Any = None

    model = Model()
    model.config = Config()
    assert LoraModel.get_model_config(model) == {"model_type": "mine"}
    model.config = {"model_type": "other"}
    assert LoraModel.get_model_config(model) == {"model_type": "other"}
    assert LoraModel.get_model_config(make_transformer("llama"))["model_type"] == "llama"
