"""The dense layer's forward: what runs in the op, what goes through the modules, and that both compute the same."""

from __future__ import annotations

import contextlib
import copy
import pickle
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from pylora.layers import Linear

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


class _Noting(TorchDispatchMode):
    """Notes pylora's forward ops below autograd, where each has `_forward` behind its name if a graph is recorded."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        starts_adapters = func.__name__.startswith("uniform_")
        if func.namespace == "pylora" and "backward" not in func.__name__ and not starts_adapters:
            self.calls.append(func.__name__.split(".")[0].removesuffix("_forward"))
        return func(*args, **(kwargs or {}))


@pytest.fixture
def op_calls() -> Iterator[list[str]]:
    """The ops that the forward ran, in order."""
    with _Noting() as noting:
        yield noting.calls


def conv1d() -> nn.Module:
    from transformers.pytorch_utils import Conv1D

    module = Conv1D(40, 24)
    nn.init.normal_(module.bias)
    return module


def assert_close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    torch.testing.assert_close(
        actual.double(), expected, rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * expected.abs().max().item()
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("adapters", [1, 3])
@pytest.mark.parametrize("adapter_dtype", [torch.float32, None])
def test_plain_layer_runs_in_the_op(make_layer, reference, op_calls, dtype, adapters, adapter_dtype) -> None:
    adapter_dtype = dtype if dtype is torch.float64 else adapter_dtype
    layer = make_layer(adapters=adapters, dtype=dtype, adapter_dtype=adapter_dtype)
    x = torch.randn(2, 5, 24, dtype=dtype)
    y = layer(x)
    assert y.dtype is dtype
    assert y.shape == (2, 5, 40)
    assert op_calls == ["lora_linear"] + ["lora_add"] * (adapters - 1)
    assert_close(y, reference(layer, x), dtype)


@pytest.mark.parametrize("shape", [(24,), (0, 24), (1, 1, 24), (2, 3, 4, 24)])
def test_any_leading_dimensions(make_layer, reference, op_calls, shape) -> None:
    layer = make_layer(bias=False)
    x = torch.randn(shape)
    assert_close(layer(x), reference(layer, x), torch.float32) if x.numel() else layer(x)
    assert layer(x).shape == (*shape[:-1], 40)
    assert set(op_calls) == {"lora_linear"}


def test_conv1d_passes_its_transposed_weight(make_layer, reference, op_calls) -> None:
    layer = make_layer(conv1d())
    x = torch.randn(3, 5, 24)
    y = layer(x)
    assert op_calls == ["lora_linear"]
    assert_close(y, reference(layer, x), torch.float32)


def test_gradients_reach_input_and_adapter_only(make_layer) -> None:
    layer = make_layer()
    expected = copy.deepcopy(layer)
    expected.base_layer.register_forward_hook(lambda *_: None)  # sends the copy through the modules
    x = torch.randn(7, 24)
    grads = []
    for each in (layer, expected):
        leaf = x.clone().requires_grad_()
        each(leaf).square().sum().backward()
        grads.append([leaf.grad, each.lora_A["default"].weight.grad, each.lora_B["default"].weight.grad])
        assert each.base_layer.weight.grad is None
    for actual, wanted in zip(*grads, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_trained_base_bias_gets_its_gradient(make_layer, op_calls) -> None:
    layer = make_layer()
    layer.base_layer.bias.requires_grad_()
    layer(torch.randn(7, 24)).sum().backward()
    assert op_calls
    torch.testing.assert_close(layer.base_layer.bias.grad, torch.full((40,), 7.0))


def _hook_base(layer: Linear) -> Callable[[], int]:
    seen: list[int] = []
    layer.base_layer.register_forward_hook(lambda *_: seen.append(1))
    return lambda: len(seen)


def _hook_a(layer: Linear) -> Callable[[], int]:
    seen: list[int] = []
    layer.lora_A["default"].register_forward_pre_hook(lambda *_: seen.append(1))
    return lambda: len(seen)


def _hook_dropout(layer: Linear) -> Callable[[], int]:
    seen: list[int] = []
    layer.lora_dropout["default"].register_forward_hook(lambda *_: seen.append(1))
    return lambda: len(seen)


def _override_base_forward(layer: Linear) -> Callable[[], int]:
    seen: list[int] = []
    original = layer.base_layer.forward

    def forward(x: torch.Tensor) -> torch.Tensor:
        seen.append(1)
        return original(x)

    layer.base_layer.forward = forward
    return lambda: len(seen)


def _replace_b(layer: Linear) -> Callable[[], int]:
    seen: list[int] = []

    class Mine(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            seen.append(1)
            return super().forward(x)

    mine = Mine(4, 40, bias=False)
    mine.weight = layer.lora_B["default"].weight
    layer.lora_B["default"] = mine
    return lambda: len(seen)


@pytest.mark.parametrize("change", [_hook_base, _hook_a, _hook_dropout, _override_base_forward, _replace_b])
def test_hooked_and_replaced_modules_are_called(make_layer, reference, op_calls, change) -> None:
    layer = make_layer()
    x = torch.randn(3, 24)
    layer(x)
    assert op_calls == ["lora_linear"]
    count = change(layer)
    assert_close(layer(x), reference(layer, x), torch.float32)
    assert count() == 1
    assert op_calls == ["lora_linear"]


def test_global_hooks_fire(make_layer, op_calls) -> None:
    layer, seen = make_layer(), []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: seen.append(module))
    try:
        layer(torch.randn(3, 24))
    finally:
        handle.remove()
    assert layer.base_layer in seen
    assert layer.lora_A["default"] in seen
    assert op_calls == []


def test_torch_func_and_forward_mode_see_through_the_layer(make_layer) -> None:
    layer = make_layer()
    module_path = copy.deepcopy(layer)
    module_path.base_layer.register_forward_hook(lambda *_: None)
    x, tangent = torch.randn(3, 24), torch.randn(3, 24)
    grads = [torch.func.grad(lambda inputs, run=run: run(inputs).square().sum())(x) for run in (layer, module_path)]
    torch.testing.assert_close(*grads)
    tangents = [torch.func.jvp(run, (x,), (tangent,))[1] for run in (layer, module_path)]
    torch.testing.assert_close(*tangents)
    torch.testing.assert_close(torch.func.vmap(layer)(x), layer(x))
    with torch.autograd.forward_ad.dual_level():
        dual = layer(torch.autograd.forward_ad.make_dual(x, tangent))
        torch.testing.assert_close(torch.autograd.forward_ad.unpack_dual(dual).tangent, tangents[1])


def test_subclassed_base_is_called(make_layer, reference, op_calls) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    layer = make_layer(Doubling(24, 40, bias=False))
    x = torch.randn(3, 24)
    expected = reference(layer, x) + x.double() @ layer.base_layer.weight.double().t()
    assert_close(layer(x), expected, torch.float32)
    assert op_calls == []


def test_replaced_dropout_is_called(make_layer, reference, op_calls) -> None:
    layer = make_layer()
    layer.lora_dropout["default"] = nn.ReLU()
    x = torch.randn(3, 24)
    base = nn.functional.linear(x, layer.base_layer.weight, layer.base_layer.bias)
    expected = reference(layer, x.relu()) - layer.base_layer(x.relu()).double() + base.double()
    assert_close(layer(x), expected, torch.float32)
    assert op_calls == []


def test_edits_are_seen_by_the_next_forward(make_layer, reference) -> None:
    layer = make_layer()
    x = torch.randn(3, 24)
    layer(x)
    layer.lora_B["default"].weight.data.mul_(3)
    assert_close(layer(x), reference(layer, x), torch.float32)
    layer.lora_A["default"].weight = nn.Parameter(torch.randn(4, 24))
    assert_close(layer(x), reference(layer, x), torch.float32)
    layer.scaling["default"] = 0.25
    assert_close(layer(x), reference(layer, x), torch.float32)
    layer.double()
    assert_close(layer(x.double()), reference(layer, x), torch.float64)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))])
def test_copies_compute_the_same_and_are_independent(make_layer, copied) -> None:
    layer = make_layer(adapters=2)
    x = torch.randn(3, 24)
    before = layer(x)
    twin = copied(layer)
    assert torch.equal(twin(x), before)
    twin.lora_B["default"].weight.data.zero_()
    twin.scaling["a1"] = 0.0
    assert torch.equal(layer(x), before)
    assert torch.allclose(twin(x), twin.base_layer(x))


def test_lora_bias_is_added(make_layer, reference, op_calls) -> None:
    layer = make_layer(lora_bias=True)
    nn.init.normal_(layer.lora_B["default"].bias)
    x = torch.randn(3, 24)
    assert_close(layer(x), reference(layer, x), torch.float32)
    assert op_calls == []


def test_inactive_and_unknown_adapters_do_nothing(make_layer, reference) -> None:
    layer = make_layer(adapters=2)
    x = torch.randn(3, 24)
    layer.set_adapter("a1")
    assert_close(layer(x), reference(layer, x, ["a1"]), torch.float32)
    layer.set_adapter(["ghost"])
    assert torch.equal(layer(x), layer.base_layer(x))
    layer.set_adapter([])
    assert torch.equal(layer(x), layer.base_layer(x))


def test_disabled_layer_is_the_base_and_unmerges(make_layer) -> None:
    layer = make_layer()
    x = torch.randn(3, 24)
    base = layer.base_layer(x)
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base)
    assert not layer.merged
    layer.enable_adapters(True)
    assert not torch.allclose(layer(x), base)


def test_dropout_acts_in_training_only(make_layer, reference) -> None:
    layer = make_layer(lora_dropout=0.5)
    x = torch.randn(64, 24)
    assert_close(layer(x), reference(layer, x), torch.float32)
    layer.train()
    torch.manual_seed(3)
    first, second = layer(x), layer(x)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(layer(x), first)
    # The mean over many draws is the undropped output.
    mean = torch.stack([layer(x) for _ in range(800)]).mean(0).double()
    assert (mean - reference(layer, x)).abs().mean() < 0.05 * reference(layer, x).abs().mean()


def test_dropout_of_everything_leaves_the_base(make_layer) -> None:
    layer = make_layer(lora_dropout=0.5).train()
    layer.lora_dropout["default"].p = 1.0
    x = torch.randn(3, 24)
    assert torch.equal(layer(x), layer.base_layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_returns_its_dtype(make_layer, reference, op_calls, dtype) -> None:
    layer = make_layer(adapters=2)
    x = torch.randn(3, 24)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert op_calls
    assert y.dtype is dtype
    assert_close(y, reference(layer, x), dtype)


def test_arguments_reach_the_base_layer(make_layer) -> None:
    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor, factor: float = 1.0, *, shift: float = 0.0) -> torch.Tensor:
            return super().forward(x) * factor + shift

    layer = make_layer(Scaled(24, 40))
    layer.set_adapter([])
    x = torch.randn(3, 24)
    assert torch.equal(layer(x, 2.0, shift=1.0), layer.base_layer(x, 2.0, shift=1.0))
    assert torch.equal(layer(x, alora_offsets=None), layer.base_layer(x))


def test_misfits_raise_what_torch_raises(make_layer) -> None:
    layer = make_layer()
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        layer(torch.randn(3, 25))
    with pytest.raises(RuntimeError, match="dtype"):
        layer(torch.randn(3, 24, dtype=torch.bfloat16))


def test_input_casting_can_be_switched_off(make_layer) -> None:
    layer = make_layer(dtype=torch.bfloat16)
    x = torch.randn(3, 24, dtype=torch.bfloat16)
    assert layer(x).dtype is torch.bfloat16
    layer.cast_input_dtype_enabled = False
    with pytest.raises(RuntimeError, match="dtype"):
        layer(x)


@pytest.mark.parametrize("adapters", [1, 2])
def test_compiles_without_a_graph_break(make_layer, adapters) -> None:
    layer = make_layer(adapters=adapters)
    x = torch.randn(3, 24)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(compiled(torch.randn(5, 24)).shape, torch.Size([5, 40]))


def test_gradient_checkpointing_replays_dropout(make_layer) -> None:
    from torch.utils.checkpoint import checkpoint

    layer = make_layer(lora_dropout=0.5).train()
    grads = []
    for run in (layer, lambda leaf: checkpoint(layer, leaf, use_reentrant=False)):
        leaf = torch.ones(5, 24, requires_grad=True)
        torch.manual_seed(11)
        run(leaf).sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


@contextlib.contextmanager
def no_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


class TestMixedBatch:
    def test_each_row_gets_its_adapter(self, make_layer, reference) -> None:
        layer = make_layer(adapters=3)
        names = ["a1", "__base__", "default", "a2", "a1", "elsewhere"]
        x = torch.randn(6, 5, 24)
        y = layer(x, adapter_names=names)
        for row, name in enumerate(names):
            known = [name] if name in layer.lora_A else []
            assert_close(y[row], reference(layer, x[row], known), torch.float32)

    def test_narrow_base_keeps_its_dtype(self, make_layer, reference) -> None:
        layer = make_layer(adapters=2, dtype=torch.bfloat16)
        x = torch.randn(2, 24, dtype=torch.bfloat16)
        y = layer(x, adapter_names=["default", "a1"])
        assert y.dtype is torch.bfloat16
        assert_close(y[:1], reference(layer, x[:1], ["default"]), torch.bfloat16)

    def test_names_must_match_the_batch(self, make_layer) -> None:
        with pytest.raises(ValueError, match="Length of `adapter_names` should be the same as the number of inputs"):
            make_layer()(torch.randn(3, 24), adapter_names=["default"])

    def test_merged_layer_refuses(self, make_layer) -> None:
        layer = make_layer()
        layer.merge()
        with pytest.raises(ValueError, match="please call `unmerge_adapter` first"):
            layer(torch.randn(1, 24), adapter_names=["default"])

    def test_disabled_layer_ignores_the_names(self, make_layer) -> None:
        layer = make_layer()
        layer.enable_adapters(False)
        x = torch.randn(1, 24)
        with no_warnings():
            assert torch.equal(layer(x, adapter_names=["default"]), layer.base_layer(x))
