"""Batches whose rows use different adapters: a layer with `adapter_names`, and training several adapters at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pylora.bench import Sweep, Work, benchmark, inference, libraries
from pylora.layers.row_names import RowNames
from pylora.ops import AdapterPools, multi_lora_linear
from pylora.ops.reference import multi_lora as reference
from pylora.testing.tolerances import assert_near

ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
RANKS = (1, 8, 16, 64, 256)
MIXED_RANKS = (4, 8, 16, 64)


def ranks_of(adapters: int, rank: int) -> list[int]:
    """The same rank for all; 0: ranks that take turns."""
    return [rank or MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(adapters)]


def wrapped(lib: Any, module: nn.Module, ranks: list[int]) -> Any:
    """A layer of that library with one adapter for each rank, called "a0", "a1", ..."""
    torch.manual_seed(0)
    model = nn.Sequential(module.requires_grad_(False))
    configs = [lib.LoraConfig(r=r, lora_alpha=2 * r, target_modules=["0"], init_lora_weights=False) for r in ranks]
    peft_model = lib.get_peft_model(model, configs[0], "a0")
    for i, config in enumerate(configs[1:], 1):
        peft_model.add_adapter(f"a{i}", config)
    return peft_model.eval().base_model.model[0]


def expected(layer: Any, x: torch.Tensor, names: list[str]) -> torch.Tensor:
    used = list(dict.fromkeys(names))
    factors = [(layer.lora_A[n].weight, layer.lora_B[n].weight, layer.scaling[n]) for n in used]
    a, b, scalings = zip(*factors, strict=True)
    return reference.multi_lora_linear(
        x, layer.base_layer.weight, None, a, b, scalings, [used.index(name) for name in names]
    )


@benchmark(
    base="torch's bare linear layer",
    table=[
        {"adapters": 32},
        {"adapters": 8},
        {"adapters": 16, "rank": 0},
        {"adapters": 32, "dtype": "bfloat16"},
        {"adapters": 8, "rows": 8, "tokens": 64, "width": 1024},
    ],
    sweeps=[Sweep("adapters", ADAPTERS, {"rows": 64}), Sweep("rank", RANKS, {"adapters": 16})],
)
def multi_lora(
    adapters: int = 32, rows: int = 32, tokens: int = 1, width: int = 1024, rank: int = 16, dtype: str = "float32"
) -> Work:
    """A dense layer called with adapter_names, rows dealt to the adapters in turn."""
    x = torch.randn(rows, tokens, width, dtype=getattr(torch, dtype))
    names = [f"a{i % adapters}" for i in range(rows)]
    module = nn.Linear(width, width, bias=False, dtype=x.dtype)
    layers = {name: wrapped(lib, module, ranks_of(adapters, rank)) for name, lib in libraries().items()}
    weight = layers["pylora"].base_layer.weight
    providers: dict[str, Callable[[], Any]] = {"base": inference(lambda: nn.functional.linear(x, weight))}
    for name, layer in layers.items():
        providers[name] = inference(lambda layer=layer: layer(x, adapter_names=names))

    def check() -> None:
        for name, layer in layers.items():
            y = providers[name]().detach()
            assert_near(y, expected(layer, x, names).detach(), width, name, roundings=8 if name == "peft" else 3)

    return Work(providers, check)


def other_layer(module: nn.Module, x: torch.Tensor, adapters: int, rank: int) -> Work:
    """A layer called with adapter_names, rows dealt to the adapters in turn, beside the bare one."""
    names = [f"a{i % adapters}" for i in range(len(x))]
    layers = {name: wrapped(lib, module, [rank] * adapters) for name, lib in libraries().items()}
    providers: dict[str, Callable[[], Any]] = {"base": inference(lambda: module(x))}
    for name, layer in layers.items():
        providers[name] = inference(lambda layer=layer: layer(x, adapter_names=names))

    def check() -> None:
        for name, layer in layers.items():
            y = providers[name]()
            for row, adapter in enumerate(names):
                layer.set_adapter(adapter)
                with torch.no_grad():
                    torch.testing.assert_close(y[row], layer(x[row : row + 1])[0], rtol=1e-4, atol=1e-3, msg=name)

    return Work(providers, check)


@benchmark(
    base="torch's bare embedding",
    table=[{}, {"tokens": 1}],
    sweeps=[Sweep("adapters", (1, 2, 4, 8)), Sweep("rank", RANKS)],
)
def multi_lora_embedding(
    adapters: int = 8, rows: int = 8, tokens: int = 128, width: int = 2048, rank: int = 16, vocabulary: int = 32000
) -> Work:
    """An embedding called with adapter_names."""
    return other_layer(nn.Embedding(vocabulary, width), torch.randint(vocabulary, (rows, tokens)), adapters, rank)


@benchmark(
    base="torch's bare convolution",
    table=[
        {},
        {"channels": 64, "size": 56},
        {"channels": 320, "size": 32},
        {"kernel": 1},
        {"channels": 3, "out": 768, "kernel": 16, "stride": 16, "size": 224},
    ],
    sweeps=[Sweep("adapters", (1, 2, 4, 8)), Sweep("rank", RANKS)],
)
def multi_lora_conv(
    adapters: int = 8,
    rows: int = 8,
    channels: int = 256,
    out: int = 0,
    kernel: int = 3,
    stride: int = 1,
    size: int = 14,
    rank: int = 16,
) -> Work:
    """A convolution in two dimensions called with adapter_names; out 0: as many channels as in."""
    padding = kernel // 2 if stride == 1 else 0
    module = nn.Conv2d(channels, out or channels, kernel, stride, padding)
    return other_layer(module, torch.randn(rows, channels, size, size), adapters, rank)


@benchmark(base="one adapter of rank 16 trained on the same tokens", table=[{}, {"adapters": 4}])
def mixed_training(adapters: int = 16, rows: int = 16, tokens: int = 32, width: int = 1024) -> Work:
    """Forward and backward of a dense layer, ranks mixed, each row with its own adapter."""
    weight = torch.randn(width, width)
    x = torch.randn(rows, tokens, width, requires_grad=True)
    dy = torch.randn(rows, tokens, width)
    names = RowNames(f"a{i % adapters}" for i in range(rows))

    def factors(ranks: list[int]) -> AdapterPools:
        a = [torch.randn(r, width, requires_grad=True) for r in ranks]
        b = [torch.randn(width, r, requires_grad=True) for r in ranks]
        return AdapterPools(a, b, [1.0] * len(ranks))

    one, many = factors([16]), factors(ranks_of(adapters, 0))
    served = tuple(dict.fromkeys(names))
    plan_of_one = RowNames(["a0"] * rows).plan(("a0",))

    def step(pools: AdapterPools, plan: Any) -> None:
        multi_lora_linear(x, weight, None, pools, plan).backward(dy)

    def check() -> None:
        slots = [served.index(name) for name in names]
        y = multi_lora_linear(x, weight, None, many, names.plan(served)).detach()
        y_ref = reference.multi_lora_linear(x, weight, None, many.a, many.b, many.scalings, slots).detach()
        assert_near(y, y_ref, width)

    return Work({"base": lambda: step(one, plan_of_one), "pylora": lambda: step(many, names.plan(served))}, check)
