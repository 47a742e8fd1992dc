"""What the dense layer's forward keeps between calls is never stale: after each change it computes what a layer that
kept nothing computes.
"""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pylora.layers import Linear
from pylora.layers.fused import FusedModules


def set_adapter(layer: Linear) -> None:
    layer.set_adapter("a1")


def set_two_adapters(layer: Linear) -> None:
    layer.set_adapter(["a1", "default"])


def append_to_active(layer: Linear) -> None:
    layer._active_adapter.append("a1")


def disable(layer: Linear) -> None:
    layer.enable_adapters(False)


def merge(layer: Linear) -> None:
    layer.merge()


def merge_and_unmerge(layer: Linear) -> None:
    layer.merge()
    layer.unmerge()


def delete_active(layer: Linear) -> None:
    with pytest.warns(UserWarning, match="was active"):
        layer.delete_adapter("default")


def replace_adapter(layer: Linear) -> None:
    from pylora import LoraConfig

    layer.update_layer("default", 7, lora_alpha=14, config=LoraConfig(r=7, init_lora_weights=False))


def scale(layer: Linear) -> None:
    layer.set_scale("default", 3.0)


def scale_in_dict(layer: Linear) -> None:
    layer.scaling["default"] = 0.125


def scale_by_tensor(layer: Linear) -> None:
    layer.scaling["default"] = torch.tensor(0.75)


def edit_in_place(layer: Linear) -> None:
    with torch.no_grad():
        layer.lora_B["default"].weight.mul_(-2)
        layer.base_layer.weight.add_(0.5)


def edit_data(layer: Linear) -> None:
    layer.lora_A["default"].weight.data = torch.randn(4, 24)
    layer.base_layer.weight.data.mul_(0.5)


def load_state_dict(layer: Linear) -> None:
    layer.load_state_dict({name: torch.randn_like(value) for name, value in layer.state_dict().items()})


def load_assigning(layer: Linear) -> None:
    state = {name: torch.randn_like(value) for name, value in layer.state_dict().items()}
    layer.load_state_dict(state, assign=True)


def optimizer_step(layer: Linear) -> None:
    layer(torch.randn(3, 24)).square().sum().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()


def swap_parameters(layer: Linear) -> None:
    # What FSDP does around a forward: the parameter gives way to a plain tensor.
    for module in (layer.base_layer, layer.lora_A["default"]):
        whole = torch.randn_like(module.weight)
        del module._parameters["weight"]
        module.weight = nn.Parameter(whole)


def swap_for_attribute(layer: Linear) -> None:
    module = layer.lora_A["default"]
    weight = torch.randn_like(module.weight)
    del module._parameters["weight"]
    module.weight = weight  # a plain attribute, which only the module itself reads


def replace_base(layer: Linear) -> None:
    layer.base_layer = nn.Linear(24, 40)


def replace_a_module(layer: Linear) -> None:
    layer.lora_A["default"] = nn.Linear(24, 4, bias=False)


def replace_a_container(layer: Linear) -> None:
    layer.lora_A = nn.ModuleDict({"default": nn.Linear(24, 4, bias=False)})


def hook_a(layer: Linear) -> None:
    layer.lora_A["default"].register_forward_hook(lambda _module, _args, output: output * 2)


def hook_base(layer: Linear) -> None:
    layer.base_layer.register_forward_hook(lambda _module, _args, output: output + 1)


def override_forward(layer: Linear) -> None:
    module = layer.lora_B["default"]
    module.forward = lambda x: nn.functional.linear(x, -module.weight)  # type: ignore[method-assign]


def parametrise(layer: Linear) -> None:
    class Double(nn.Module):
        def forward(self, weight: torch.Tensor) -> torch.Tensor:
            return weight * 2

    nn.utils.parametrize.register_parametrization(layer.lora_A["default"], "weight", Double())
    nn.utils.parametrize.register_parametrization(layer.base_layer, "weight", Double())


def add_bias_to_b(layer: Linear) -> None:
    layer.lora_B["default"].bias = nn.Parameter(torch.randn(40))


def change_bias(layer: Linear) -> None:
    layer.base_layer.bias = nn.Parameter(torch.randn(40))


def replace_dropout(layer: Linear) -> None:
    layer.lora_dropout["default"] = nn.ReLU()


CHANGES = [
    set_adapter,
    set_two_adapters,
    append_to_active,
    disable,
    merge,
    merge_and_unmerge,
    delete_active,
    replace_adapter,
    scale,
    scale_in_dict,
    scale_by_tensor,
    edit_in_place,
    edit_data,
    load_state_dict,
    load_assigning,
    optimizer_step,
    swap_parameters,
    swap_for_attribute,
    replace_base,
    replace_a_module,
    replace_a_container,
    hook_a,
    hook_base,
    override_forward,
    parametrise,
    add_bias_to_b,
    change_bias,
    replace_dropout,
]


def by_modules(layer: Linear, x: torch.Tensor) -> torch.Tensor:
    """The forward with nothing kept and nothing fused: every module called."""
    base: Any = layer.base_layer
    result = base(x)
    if layer.disable_adapters or layer.merged:
        return result
    for name in layer.active_adapters:
        if name in layer.lora_A:
            hidden = layer.lora_A[name](layer.lora_dropout[name](x))
            result = result + layer.lora_B[name](hidden) * layer.scaling[name]
    return result


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_forward(make_layer, change: Callable[[Linear], None]) -> None:
    layer = make_layer(adapters=2)
    layer.set_adapter("default")
    x = torch.randn(3, 24)
    before = layer(x)
    assert isinstance(layer._fused_modules, FusedModules)
    change(layer)
    after = layer(x)
    torch.testing.assert_close(after, by_modules(layer, x), rtol=1e-4, atol=1e-4)
    if change is not merge_and_unmerge and change is not merge:
        assert not torch.allclose(after, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_a_change_of_dtype_is_seen_by_the_next_forward(make_layer, dtype: torch.dtype) -> None:
    layer = make_layer()
    x = torch.randn(3, 24)
    layer(x)
    layer.to(dtype)
    y = layer(x.to(dtype))
    assert y.dtype is dtype
    expected = by_modules(layer.double(), x.to(dtype).double())
    torch.testing.assert_close(y.double(), expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))


def test_functional_call_is_seen(make_layer) -> None:
    layer = make_layer()
    x = torch.randn(3, 24)
    before = layer(x)
    other = {name: torch.randn_like(param) for name, param in layer.named_parameters()}
    inside = torch.func.functional_call(layer, other, (x,))
    twin = copy.deepcopy(layer)
    twin.load_state_dict(other)
    torch.testing.assert_close(inside, twin(x))
    assert torch.equal(layer(x), before)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_keep_nothing(make_layer, copied: Callable[[Linear], Linear]) -> None:
    layer = make_layer()
    layer(torch.randn(3, 24))
    assert copied(layer)._fused_modules is None


def test_a_layer_is_freed_with_its_last_reference(make_layer) -> None:
    layer = make_layer()
    layer(torch.randn(3, 24))
    gone = weakref.ref(layer)
    gc.disable()
    try:
        del layer
        assert gone() is None
    finally:
        gc.enable()


def test_unchanged_layers_are_not_walked_again(make_layer, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = make_layer(adapters=2)
    x = torch.randn(3, 24)
    layer(x)
    monkeypatch.setattr(FusedModules, "of", lambda *_: pytest.fail("walked again"))
    with torch.no_grad():
        layer.lora_A["default"].weight.add_(1)
    layer(x)
    layer.eval()(x)
