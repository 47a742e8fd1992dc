"""The dora ops beside torch's bare linear layer and beside PEFT's layer: norms alone, norms kept, and training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylora.bench import Point, Sweep, Work, benchmark, inference, libraries
from pylora.ops import dora_linear, dora_linear_norms, dora_row_norms, dora_row_squares
from pylora.ops.reference import dora as reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.tolerances import assert_near

ROWS = (1, 2, 7, 33, 64, 128, 200, 512)
RANKS = (1, 8, 16, 24, 64, 256)
TRAIN: Point = {"direction": "train"}
NORMS: Point = {"direction": "norms", "rows": 0}

TABLE: list[Point] = [
    {"rows": 1, "width": 1024},
    {"rows": 128},
    {"rows": 1, "dtype": "bfloat16"},
    {"rows": 64} | TRAIN,
    {"rows": 512} | TRAIN,
    {"rows": 32, "dtype": "bfloat16", "width": 1024} | TRAIN,
    NORMS,
    NORMS | {"dtype": "bfloat16"},
]
SWEEPS = [
    Sweep("rows", ROWS),
    Sweep("rows", ROWS, TRAIN),
    Sweep("rank", RANKS, {"rows": 64} | TRAIN),
    Sweep("rank", RANKS, NORMS),
]


@benchmark(base="torch's functional.linear on the frozen weight; of norms, A W^T", table=TABLE, sweeps=SWEEPS)
def dora(
    direction: str = "forward", rows: int = 128, width: int = 2048, rank: int = 16, dtype: str = "float32"
) -> Work:
    """DoRA with f32 factors: forward with kept norms, training and norms with norms that have to be computed."""
    inputs = lora_inputs(rows, width, width, rank, getattr(torch, dtype), torch.float32, bias=False)
    if direction == "norms":
        return norms(inputs)
    generator = torch.Generator().manual_seed(1)
    return (train if direction == "train" else forward)(inputs, 0.5 + torch.rand(width, generator=generator))


def norms(inputs: LoraInputs) -> Work:
    weight, a, b, scaling = inputs.weight, inputs.a, inputs.b, inputs.scaling
    narrow_a = a.to(weight.dtype)
    providers: dict[str, Callable[[], Any]] = {
        "base": lambda: narrow_a @ weight.t(),
        "pylora": lambda: dora_row_norms(weight, a, b, scaling),
    }

    def check() -> None:
        exact = reference.dora_row_norms(weight, a, b, scaling)
        torch.testing.assert_close(dora_row_norms(weight, a, b, scaling), exact, rtol=2e-6, atol=0)

    return Work(providers, check)


def forward(inputs: LoraInputs, magnitude: Tensor) -> Work:
    x, weight, a, b, scaling = inputs.x, inputs.weight, inputs.a, inputs.b, inputs.scaling
    kept = dora_row_norms(weight, a, b, scaling)
    providers: dict[str, Callable[[], Any]] = {
        "base": inference(lambda: functional.linear(x, weight)),
        "pylora": inference(lambda: dora_linear(x, weight, None, a, b, magnitude, kept, scaling)),
    }
    if (layer := peft_layer(inputs, magnitude)) is not None:
        providers["peft"] = inference(lambda: layer.eval()(x))

    def check() -> None:
        exact = reference.dora_row_norms(weight, a, b, scaling)
        expected = reference.dora_linear(x, weight, None, a, b, magnitude, exact, scaling)
        assert_near(providers["pylora"](), expected, x.shape[1], "y", roundings=4)
        if "peft" in providers:
            assert_near(providers["peft"](), expected, x.shape[1], "PEFT's y", roundings=12)

    return Work(providers, check)


def train(inputs: LoraInputs, magnitude: Tensor) -> Work:
    leaves = [t.requires_grad_() for t in (inputs.x, inputs.a, inputs.b, magnitude)]
    (x, a, b, _), weight, dy, scaling = leaves, inputs.weight, inputs.dy, inputs.scaling
    squares = dora_row_squares(weight)

    def op() -> Tensor:
        return dora_linear_norms(x, weight, None, a, b, magnitude, squares, scaling)[0]

    def step(call: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(call(), dy)

    providers = {"base": step(lambda: functional.linear(x, weight)), "pylora": step(op)}
    if (layer := peft_layer(inputs, magnitude)) is not None:
        providers["peft"] = step(lambda: layer(x))

    def check() -> None:
        wide = [t.detach().double().requires_grad_() for t in leaves]
        exact = reference.dora_row_norms(weight, wide[1].detach(), wide[2].detach(), scaling)
        expected = reference.dora_linear(wide[0], weight, None, *wide[1:], exact, scaling)
        grads = torch.autograd.grad(op(), leaves, dy)
        expected_grads = torch.autograd.grad(expected, wide, dy.double())
        for name, grad, expected_grad in zip(("dx", "da", "db", "dm"), grads, expected_grads, strict=True):
            assert_near(grad.to(x.dtype), expected_grad, max(x.shape), name, roundings=8)

    return Work(providers, check)


def peft_layer(inputs: LoraInputs, magnitude: Tensor) -> nn.Module | None:
    """PEFT's layer around the same tensors, or None without peft."""
    peft = libraries().get("peft")
    if peft is None:
        return None
    rank, (out_features, in_features) = inputs.a.shape[0], inputs.weight.shape
    base = nn.Linear(in_features, out_features, bias=False, dtype=inputs.weight.dtype)
    base.weight = nn.Parameter(inputs.weight.detach(), requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank * inputs.scaling, use_dora=True, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.a)
        layer.lora_B["default"].weight.copy_(inputs.b)
        layer.lora_magnitude_vector["default"].weight.copy_(magnitude)
    return layer.train()
