"""A layer on a GPU uses the ops where the build has code for that GPU. On machines without one, what can be seen of it
through fake tensors; the GPU's own tests skip.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from pylora import LoraConfig, merge_log_bytes
from pylora._native import C
from pylora.layers import Linear, fused, undo
from pylora.layers.merging import Delta
from pylora.layers.row_names import RowNames
from pylora.ops import dense_forward, dense_mixed_forward, devices, kernels_serve

on_gpu = pytest.mark.skipif(
    not (torch.cuda.is_available() and C.has_code_for_gpu(0)), reason="no GPU that this build has kernels for"
)


@pytest.mark.parametrize("served", [True, False])
def test_a_gpu_is_served_where_there_is_code_for_it(make_layer, monkeypatch, served: bool) -> None:
    asked: list[int] = []
    monkeypatch.setattr(devices, "_has_code_for_gpu", lambda index: bool(asked.append(index)) or served)
    layer = make_layer()
    with FakeTensorMode():
        x, weight = torch.empty(3, 24, device="cuda:1"), torch.empty(40, 24, device="cuda:1")
        assert fused._fits(layer, x, weight) is served
        assert fused._fits(layer, x, torch.empty(40, 24, device="cuda:0")) is False
        half = x.to(torch.bfloat16)
        assert fused._fits(layer, half, weight) is False
        for autocast in ("cuda", "cpu"):
            monkeypatch.setattr(torch, "is_autocast_enabled", lambda device_type, on=autocast: device_type == on)
            assert fused._fits(layer, half, weight) is (served and autocast == "cuda")
    assert set(asked) == {1}


@pytest.mark.parametrize("served", [True, False])
def test_the_merge_op_serves_a_gpu_where_there_is_code_for_it(monkeypatch, served: bool) -> None:
    monkeypatch.setattr(devices, "_has_code_for_gpu", lambda index: served)
    monkeypatch.setattr(undo, "are_plain", lambda *tensors: True)  # fake tensors stand for those of a GPU
    with FakeTensorMode():
        on_gpu, elsewhere = torch.empty(4, 3, device="cuda:1"), torch.empty(4, 3, device="cuda:0")
        a, b = torch.empty(2, 3, device="cuda:1"), torch.empty(4, 2, device="cuda:1")
        delta = Delta("default", a, b, scaling=1.0)
        assert undo._is_plain(on_gpu) is served
        assert undo._is_plain(torch.empty(4, 3))
        assert not undo._is_plain(torch.empty(4, 3, dtype=torch.int8, device="cuda:1"))
        assert (undo._kernel_args([delta], on_gpu.device) is not None) is served
        assert undo._kernel_args([delta], elsewhere.device) is None


def test_other_devices_are_not_served() -> None:
    assert kernels_serve(torch.device("cpu"))
    assert not kernels_serve(torch.device("meta"))
    assert not kernels_serve(torch.device("xpu", 0))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there_is_not_served() -> None:
    assert not C.has_code_for_gpu(0)
    assert not C.has_code_for_gpu(100)


def test_the_compiler_takes_the_answer_for_a_constant() -> None:
    def call(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if kernels_serve(torch.device("cuda", 0)) else x - 1

    compiled = torch.compile(call, backend="eager", fullgraph=True)
    x = torch.zeros(2)
    torch.testing.assert_close(compiled(x), call(x))


def gradients(layer: Linear, x: torch.Tensor, call: Callable[[torch.Tensor], torch.Tensor]) -> list[torch.Tensor]:
    leaf = x.clone().requires_grad_(True)
    for factors in (layer.lora_A, layer.lora_B):
        factors.requires_grad_(True).zero_grad()
    y = call(leaf)
    y.float().square().sum().backward()
    factors = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [tensor.detach().double().cpu() for tensor in (y, leaf.grad, *(factor.grad for factor in factors))]


def assert_close(got: list[torch.Tensor], expected: list[torch.Tensor], dtype: torch.dtype) -> None:
    bound = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 6e-3, torch.float64: 1e-9}[dtype]
    for each, want in zip(got, expected, strict=True):
        assert (each - want).abs().max() <= bound * want.abs().max()


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("use_dora", [False, True], ids=["plain", "dora"])
@pytest.mark.parametrize("rows", [1, 5, 130])
def test_a_layer_computes_on_a_gpu_what_it_computes_on_the_cpu(make_layer, dtype, use_dora: bool, rows: int) -> None:
    layer = make_layer(use_dora=use_dora)
    x = torch.randn(rows, 24)
    on_cpu = gradients(layer.double(), x.double(), layer)
    layer.to(device="cuda", dtype=dtype)
    x = x.to(device="cuda", dtype=dtype)
    assert dense_forward(layer, x) is not None
    assert_close(gradients(layer, x, layer), on_cpu, dtype)


@on_gpu
def test_a_mixed_batch_on_a_gpu(make_layer) -> None:
    layer = make_layer(adapters=3).cuda()
    x = torch.randn(7, 24, device="cuda")
    names = ["default", "a2", "__base__", "a1", "a1", "default", "a2"]
    expected = torch.cat([layer(x[i : i + 1], adapter_names=[name]) for i, name in enumerate(names)])
    torch.testing.assert_close(layer(x, adapter_names=names), expected, rtol=1e-4, atol=1e-4)
    plan = RowNames(names).plan(("a1",), x.device)
    assert plan.order.is_cuda
    assert dense_mixed_forward(layer, x, ("a1",), *plan) is not None


def test_the_plan_of_a_batch_is_kept_by_device() -> None:
    names = RowNames(["b", "a", "b"])
    on_cpu, elsewhere = names.plan(("a", "b")), names.plan(("a", "b"), torch.device("meta"))
    assert names.plan(("a", "b")) is on_cpu
    assert names.plan(("a", "b"), torch.device("meta")) is elsewhere
    assert [t.device.type for t in (*on_cpu, *elsewhere)] == ["cpu"] * 3 + ["meta"] * 3


@on_gpu
def test_a_layer_is_captured_into_a_graph(make_layer) -> None:
    layer = make_layer(lora_dropout=0.0).cuda()
    x = torch.randn(4, 24, device="cuda")
    with torch.no_grad():
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            layer(x)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = layer(x)
        x.copy_(torch.randn_like(x))
        graph.replay()
        torch.testing.assert_close(y, layer(x))


@on_gpu
def test_autocast_on_a_gpu(make_layer) -> None:
    layer = make_layer().cuda()
    x = torch.randn(9, 24, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = layer(x)
    assert y.dtype is torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=3e-2, atol=3e-2)


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_layer_on_a_gpu_unmerges_bit_for_bit(make_layer, dtype) -> None:
    """Also after the weight has moved: the log stays where it was made."""
    layer = make_layer(adapters=2, dtype=dtype).cuda()
    before = layer.base_layer.weight.detach().clone()
    layer.merge()
    assert merge_log_bytes(layer) > 0
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before)
    layer.merge()
    layer.cpu()
    layer.unmerge()
    assert torch.equal(layer.base_layer.weight, before.cpu())


@on_gpu
def test_configurations_of_the_public_api_run_on_a_gpu() -> None:
    import pylora

    model = pylora.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(24, 40), torch.nn.ReLU(), torch.nn.Linear(40, 8)).cuda(),
        LoraConfig(target_modules=["0", "2"], init_lora_weights=False),
    )
    x = torch.randn(5, 24, device="cuda")
    before = model(x)
    model.merge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), before, rtol=1e-4, atol=1e-4)
