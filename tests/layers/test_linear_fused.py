"""The dense layer's forward reads its modules anew in C++: after each change it computes what the modules themselves
compute, and leaves to them what an op cannot serve, as the same in Python (`layers/fused.py`) does.
"""

from __future__ import annotations

import copy
import gc
import pickle
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from pylora import LoraConfig
from pylora.layers import Linear, fused
from pylora.layers.row_names import RowNames
from pylora.ops import dense_forward, dense_mixed_forward, register_dora


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


def assert_same_as_traced(layer: Linear, x: torch.Tensor) -> None:
    """C++ and Python agree on whether an op serves, and on its result."""
    native, traced = dense_forward(layer, x), fused.forward(layer, x)
    assert (native is None) is (traced is None)
    if native is not None:
        torch.testing.assert_close(native, traced, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen_by_the_next_forward(make_layer, change: Callable[[Linear], None]) -> None:
    layer = make_layer(adapters=2)
    layer.set_adapter("default")
    x = torch.randn(3, 24)
    assert dense_forward(layer, x) is not None
    before = layer(x)
    change(layer)
    after = layer(x)
    torch.testing.assert_close(after, by_modules(layer, x), rtol=1e-4, atol=1e-4)
    assert_same_as_traced(layer, x)
    if change is not merge_and_unmerge and change is not merge:
        assert not torch.allclose(after, before)


def hook_b(layer: Linear) -> None:
    layer.lora_B["default"].register_full_backward_hook(lambda *_: None)


def pre_hook_b(layer: Linear) -> None:
    layer.lora_B["default"].register_full_backward_pre_hook(lambda *_: None)


def pre_hook_base(layer: Linear) -> None:
    layer.base_layer.register_forward_pre_hook(lambda *_: None)


def hook_dropout(layer: Linear) -> None:
    layer.lora_dropout["default"].register_forward_hook(lambda *_: None)


def scale_by_numpy(layer: Linear) -> None:
    layer.scaling["default"] = np.float64(0.5)


def scale_by_parameter(layer: Linear) -> None:
    layer.scaling["default"] = nn.Parameter(torch.tensor(0.5))


def scale_by_vector(layer: Linear) -> None:
    layer.scaling["default"] = torch.ones(40)


def scale_by_trained(layer: Linear) -> None:
    layer.scaling["default"] = torch.tensor(0.5, requires_grad=True)


def subclass_base(layer: Linear) -> None:
    class Own(nn.Linear):
        pass

    layer.base_layer = Own(24, 40)


def subclass_a(layer: Linear) -> None:
    class Own(nn.Linear):
        pass

    layer.lora_A["default"] = Own(24, 4, bias=False)


def subclass_weight(layer: Linear) -> None:
    class Own(nn.Parameter):
        pass

    layer.base_layer.weight = Own(torch.randn(40, 24))


def subclass_bias(layer: Linear) -> None:
    class Own(nn.Parameter):
        pass

    layer.base_layer.bias = Own(torch.randn(40))


def no_adapter(layer: Linear) -> None:
    layer.set_adapter([])


def odd_dtypes(layer: Linear) -> None:
    layer.lora_B["default"].to(torch.float64)


def no_cast(layer: Linear) -> None:
    layer.base_layer.to(torch.bfloat16)
    layer.cast_input_dtype_enabled = False


def drop_everything(layer: Linear) -> None:
    layer.lora_dropout["default"] = nn.Dropout(1.0)


def drop_in_place(layer: Linear) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.5, inplace=True)


BY_MODULES = [
    disable,
    merge,
    hook_a,
    hook_b,
    pre_hook_b,
    hook_base,
    pre_hook_base,
    hook_dropout,
    override_forward,
    parametrise,
    swap_for_attribute,
    add_bias_to_b,
    replace_dropout,
    scale_by_numpy,
    scale_by_parameter,
    scale_by_vector,
    scale_by_trained,
    subclass_base,
    subclass_a,
    subclass_weight,
    subclass_bias,
    no_adapter,
    odd_dtypes,
    no_cast,
    drop_everything,
    drop_in_place,
]


@pytest.mark.parametrize("change", BY_MODULES)
def test_what_an_op_cannot_serve_is_left_to_the_modules(make_layer, change: Callable[[Linear], None]) -> None:
    layer = make_layer().train()
    change(layer)
    x = torch.randn(3, 24, dtype=layer.base_layer.weight.dtype)
    assert dense_forward(layer, x) is None
    assert fused.forward(layer, x) is None


class Own(torch.Tensor):
    pass


@pytest.mark.parametrize(
    "x",
    [
        torch.randn(3, 23),
        torch.randn(()),
        torch.randn(3, 24, dtype=torch.float64),
        torch.randint(0, 9, (3, 24)),
        torch.randn(3, 24, device="meta"),
        torch.randn(3, 24).as_subclass(Own),
        torch.nested.nested_tensor([torch.randn(3, 24), torch.randn(2, 24)]),
    ],
    ids=["width", "no dimension", "dtype", "integers", "device", "subclass", "nested"],
)
def test_inputs_that_do_not_fit_are_left_to_the_modules(make_layer, x: torch.Tensor) -> None:
    layer = make_layer()
    assert dense_forward(layer, x) is None
    assert fused.forward(layer, x) is None


def base_elsewhere(layer: Linear) -> None:
    layer.base_layer.to("meta")


def bias_elsewhere(layer: Linear) -> None:
    layer.base_layer.bias = nn.Parameter(torch.empty(40, device="meta"))


def a_elsewhere(layer: Linear) -> None:
    layer.lora_A.to("meta")


def b_elsewhere(layer: Linear) -> None:
    layer.lora_B.to("meta")


@pytest.mark.parametrize("change", [base_elsewhere, bias_elsewhere, a_elsewhere, b_elsewhere])
def test_tensors_of_several_devices_are_left_to_the_modules(make_layer, change: Callable[[Linear], None]) -> None:
    layer = make_layer()
    change(layer)
    x = torch.randn(3, 24)
    assert dense_forward(layer, x) is None
    assert fused.forward(layer, x) is None


@contextmanager
def global_hook() -> Iterator[None]:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def forward_mode() -> Iterator[None]:
    with torch.autograd.forward_ad.dual_level():
        yield


@pytest.mark.parametrize("watcher", [global_hook, forward_mode])
def test_calls_that_are_watched_are_left_to_the_modules(make_layer, watcher: Callable[[], Any]) -> None:
    layer, x = make_layer(), torch.randn(3, 24)
    with watcher():
        assert dense_forward(layer, x) is None
        assert fused.forward(layer, x) is None
    assert dense_forward(layer, x) is not None


def test_transforms_are_left_to_the_modules(make_layer) -> None:
    layer, results = make_layer(), []

    def call(x: torch.Tensor) -> torch.Tensor:
        results.extend((dense_forward(layer, x), fused.forward(layer, x)))
        return layer(x)

    x = torch.randn(5, 3, 24)
    torch.testing.assert_close(torch.vmap(call)(x), layer(x))
    assert results == [None, None]


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_autocast_decides_on_dtypes(make_layer, dtype: torch.dtype, x_dtype: torch.dtype) -> None:
    layer, x = make_layer(dtype=dtype), torch.randn(3, 24, dtype=x_dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_as_traced(layer, x)
    assert_same_as_traced(layer, x)


@pytest.mark.parametrize("adapters", [1, 3])
def test_dropout_draws_as_the_ops_do(make_layer, adapters: int) -> None:
    layer, x = make_layer(adapters=adapters, lora_dropout=0.3).train(), torch.randn(3, 24)
    torch.manual_seed(5)
    native = dense_forward(layer, x)
    torch.manual_seed(5)
    assert torch.equal(native, fused.forward(layer, x))


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_a_mixed_batch_is_read_in_the_same_way(make_layer, dropout: float) -> None:
    layer = make_layer(adapters=3, lora_dropout=dropout).train()
    x, served = torch.randn(4, 2, 24), ("a1", "default")
    plan = RowNames(["a1", "__base__", "default", "a1"]).plan(served)
    torch.manual_seed(5)
    native = dense_mixed_forward(layer, x, served, *plan)
    torch.manual_seed(5)
    assert torch.equal(native, fused.mixed_forward(layer, x, served, plan))
    hook_a(layer)
    assert dense_mixed_forward(layer, x, served, *plan) is None
    assert fused.mixed_forward(layer, x, served, plan) is None


def test_arguments_that_are_no_layer() -> None:
    x = torch.randn(3, 24)
    for other in (object(), None, 3, nn.Linear(24, 40), nn.Module()):
        assert dense_forward(other, x) is None
    assert dense_forward(nn.Linear(24, 40), None) is None
    with pytest.raises(TypeError, match="dense_forward: expected 2 arguments, got 1"):
        dense_forward(x)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="dense_mixed_forward: expected 6 arguments, got 2"):
        dense_mixed_forward(x, x)  # type: ignore[call-arg]


def test_a_mixed_batch_of_an_adapter_that_is_not_here(make_layer) -> None:
    layer, names = make_layer(), ("default", "other")
    with pytest.raises(ValueError, match="dense_mixed_forward: names: expected adapters of this layer"):
        dense_mixed_forward(layer, torch.randn(2, 24), names, *RowNames(names).plan(names))


@pytest.mark.parametrize("change", [None, scale_by_tensor, hook_a, replace_dropout, set_two_adapters])
def test_no_reference_is_lost_or_left(make_layer, change: Callable[[Linear], None] | None) -> None:
    layer, x = make_layer(adapters=2), torch.randn(3, 24)
    layer.set_adapter("default")
    if change is not None:
        change(layer)
    a = layer.lora_A["default"]
    objects = [layer, x, a, a.weight, a._parameters, a._forward_hooks, layer.base_layer, layer._modules, layer.scaling]
    objects += [None, "default", layer.lora_A, layer.lora_dropout["default"], layer.base_layer.weight]
    before = [sys.getrefcount(each) for each in objects]
    for _ in range(100):
        dense_forward(layer, x)
    # None's count is shared with everything else that runs.
    assert all(abs(sys.getrefcount(each) - count) < 50 for each, count in zip(objects, before, strict=True))


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
def test_copies_compute_from_their_own_tensors(make_layer, copied: Callable[[Linear], Linear]) -> None:
    layer, x = make_layer(), torch.randn(3, 24)
    before = layer(x)
    twin = copied(layer)
    edit_in_place(twin)
    assert torch.equal(layer(x), before)
    torch.testing.assert_close(twin(x), by_modules(twin, x), rtol=1e-4, atol=1e-4)


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


def test_dora_comes_back_to_python_only_for_norms_that_are_not_kept(make_layer, monkeypatch) -> None:
    layer, x, entered = make_layer(use_dora=True), torch.randn(3, 24), []
    variant: Any = type(layer.lora_variant["default"])
    own = variant.fused_forward

    def noting(cls: Any, *args: Any) -> torch.Tensor | None:
        entered.append(own(*args))
        return entered[-1]

    monkeypatch.setattr(variant, "fused_forward", classmethod(noting))
    before = layer(x)
    assert len(entered) == 1
    torch.testing.assert_close(layer(x), before)
    assert len(entered) == 1

    with torch.no_grad():
        layer.lora_A["default"].weight.mul_(3)
    changed = layer(x)
    assert len(entered) == 2
    torch.testing.assert_close(layer(x), changed)
    assert len(entered) == 2
    assert not torch.allclose(changed, before)

    layer.lora_magnitude_vector["default"].weight.data = torch.zeros(40)  # no norm depends on it
    torch.testing.assert_close(layer(x), layer.base_layer.bias.expand(3, 40))
    assert len(entered) == 2

    layer.lora_magnitude_vector["default"].register_forward_hook(lambda *_: None)
    layer(x)
    assert len(entered) == 3
    assert entered[2] is None


def test_register_dora_refuses_what_is_no_class() -> None:
    with pytest.raises(TypeError, match="register_dora: expected two classes and a function"):
        register_dora(Linear, 3, len)  # type: ignore[arg-type]
