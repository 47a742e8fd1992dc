"""The op lora beside torch's bare linear layer and beside PEFT's layer: forward, and forward with backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylora.bench import Point, Sweep, Work, benchmark, inference, libraries
from pylora.ops import lora_linear
from pylora.ops.cost import Cost
from pylora.ops.cost import lora as cost_model
from pylora.ops.reference import lora as reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.tolerances import assert_near

ROWS = (1, 2, 7, 33, 64, 128, 200, 512)
RANKS = (1, 8, 16, 24, 64, 256)
WIDTHS = (896, 1024, 1536, 2048, 4864)
BF16_1024: Point = {"dtype": "bfloat16", "width": 1024}
TRAIN: Point = {"direction": "train"}

TABLE: list[Point] = [
    {"rows": 1, "width": 1024},
    {"rows": 128},
    {"rows": 512},
    {"rows": 1, "dtype": "bfloat16"},
    {"rows": 64} | BF16_1024,
    {"rows": 64, "dtype": "float16", "width": 1024},
    {"rows": 512} | TRAIN,
    {"rows": 512, "dropout": 0.1} | TRAIN,
    {"rows": 32} | TRAIN | BF16_1024,
    {"rows": 64, "rank": 24, "width": 896, "out": 4864},
]
# torch's 16-bit products take seconds at large shapes on CPUs without such instructions: their sweeps are smaller.
SWEEPS = [
    Sweep("rows", ROWS),
    Sweep("rows", ROWS, BF16_1024),
    Sweep("rows", ROWS, BF16_1024 | {"dtype": "float16"}),
    Sweep("rows", ROWS, TRAIN),
    Sweep("rows", ROWS, TRAIN | {"dropout": 0.1}),
    Sweep("rows", ROWS[:5], TRAIN | BF16_1024),
    Sweep("rank", RANKS, {"rows": 1, "width": 1024}),
    Sweep("rank", RANKS),
    Sweep("rank", RANKS, {"rows": 64} | BF16_1024),
    Sweep("rank", RANKS, {"rows": 200} | TRAIN),
    Sweep("width", WIDTHS, {"rows": 1}),
    Sweep("width", WIDTHS, {"rows": 33}),
    Sweep("width", WIDTHS, {"rows": 1, "dtype": "bfloat16"}),
]


def cost(direction: str, rows: int, width: int, out: int, rank: int, dtype: str, dropout: float) -> dict[str, Cost]:
    model = cost_model.train if direction == "train" else cost_model.forward
    return {name: model(rows, width, out or width, r, dtype) for name, r in (("base", 0), ("pylora", rank))}


@benchmark(base="torch's functional.linear on the frozen weight", table=TABLE, sweeps=SWEEPS, cost=cost)
def lora(
    direction: str = "forward",
    rows: int = 128,
    width: int = 2048,
    out: int = 0,
    rank: int = 16,
    dtype: str = "float32",
    dropout: float = 0.0,
) -> Work:
    """lora_linear, one adapter of f32 factors (PEFT's default) fused with the base product."""
    inputs = lora_inputs(rows, width, out or width, rank, getattr(torch, dtype), torch.float32, bias=False)
    return (train if direction == "train" else forward)(inputs, dropout)


# Shapes that no heuristic was fitted to.
OTHER_ROWS = (1, 2, 7, 33, 64, 200)
OTHER_RANKS = (1, 8, 24, 64, 256)
OTHER_LAYERS = ((896, 896), (1536, 1536), (4864, 4864), (896, 4864), (4864, 896))
# Where torch's 16-bit products do not take seconds.
FEW_ROWS = OTHER_ROWS[:4]


def other_shapes() -> list[Sweep]:
    f32 = [
        Sweep("rows", OTHER_ROWS, {"direction": direction, "width": width, "out": out, "rank": rank})
        for direction in ("forward", "train")
        for width, out in OTHER_LAYERS
        for rank in OTHER_RANKS
    ]
    bf16 = [Sweep(sweep.over, FEW_ROWS, {**sweep.at, "dtype": "bfloat16"}) for sweep in f32 if sweep.at["width"] == 896]
    return f32 + bf16


def shape_limit(direction: str, width: int, out: int, rank: int, **other: Any) -> float:
    """1.1 times the least share of the bare layer's work: a forward has the low-rank product once, a training step
    three times beside two dense products.
    """
    products = 1.5 if direction == "train" else 1.0
    return 1.1 * (1 + products * rank * (width + out) / (width * out))


@benchmark(
    base="torch's functional.linear on the frozen weight",
    table=[
        {"direction": direction, "rows": rows, "width": width, "out": out}
        for direction in ("forward", "train")
        for width, out in OTHER_LAYERS
        for rows in (1, 33)
    ],
    sweeps=other_shapes(),
    cost=lambda **point: cost(**point, dropout=0.0),
    limit=shape_limit,
)
def lora_shapes(
    direction: str = "forward", rows: int = 1, width: int = 896, out: int = 896, rank: int = 24, dtype: str = "float32"
) -> Work:
    """lora_linear at shapes of other models, against what the extra work may cost; 16-bit types beside pylora's f32."""
    build = train if direction == "train" else forward

    def work_of(dtype: torch.dtype) -> Work:
        return build(lora_inputs(rows, width, out, rank, dtype, torch.float32, bias=False), 0.0, peft=False)

    work = work_of(getattr(torch, dtype))
    if dtype != "float32":
        work.providers["f32"] = work_of(torch.float32).providers["pylora"]
    return work


def forward(inputs: LoraInputs, dropout: float, peft: bool = True) -> Work:
    x, weight, a, b, scaling = inputs.x, inputs.weight, inputs.a, inputs.b, inputs.scaling
    providers: dict[str, Callable[[], Any]] = {
        "base": inference(lambda: functional.linear(x, weight)),
        "pylora": inference(lambda: lora_linear(x, weight, None, a, b, scaling, dropout)),
    }
    if peft and (layer := peft_layer(inputs, dropout)) is not None:
        providers["peft"] = inference(lambda: layer(x))

    def check() -> None:
        rng = torch.tensor([1, 2])
        expected = reference.lora_linear(x, weight, None, a, b, scaling, dropout, rng)
        assert_near(lora_linear(x, weight, None, a, b, scaling, dropout, rng), expected, x.shape[1], "y")
        if "peft" in providers and not dropout:  # the same work, or the comparison would mean nothing
            assert_near(providers["peft"](), expected, x.shape[1], "PEFT's y", roundings=8)

    return Work(providers, check)


def train(inputs: LoraInputs, dropout: float, peft: bool = True) -> Work:
    x, a, b = (t.requires_grad_() for t in (inputs.x, inputs.a, inputs.b))
    weight, dy, scaling = inputs.weight, inputs.dy, inputs.scaling

    def step(call: Callable[[], Tensor]) -> Callable[[], None]:
        return lambda: torch.autograd.backward(call(), dy)

    providers = {
        "base": step(lambda: functional.linear(x, weight)),
        "pylora": step(lambda: lora_linear(x, weight, None, a, b, scaling, dropout)),
    }
    if peft and (layer := peft_layer(inputs, dropout)) is not None:
        providers["peft"] = step(lambda: layer(x))

    def check() -> None:
        rng = torch.tensor([1, 2])
        y = lora_linear(x, weight, None, a, b, scaling, dropout, rng)
        wide = [t.detach().double().requires_grad_() for t in (x, a, b)]
        expected = reference.lora_linear(wide[0], weight, None, wide[1], wide[2], scaling, dropout, rng)
        grads = torch.autograd.grad(y, [x, a, b], dy)
        expected_grads = torch.autograd.grad(expected, wide, dy.double())
        for name, grad, expected_grad in zip(("dx", "da", "db"), grads, expected_grads, strict=True):
            assert_near(grad, expected_grad, max(*x.shape, dy.shape[1]), name)

    return Work(providers, check)


def peft_layer(inputs: LoraInputs, dropout: float) -> nn.Module | None:
    """PEFT's layer around the same tensors, or None without peft."""
    peft = libraries().get("peft")
    if peft is None:
        return None
    rank, (out_features, in_features) = inputs.a.shape[0], inputs.weight.shape
    base = nn.Linear(in_features, out_features, bias=False, dtype=inputs.weight.dtype)
    base.weight = nn.Parameter(inputs.weight.detach(), requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank * inputs.scaling, lora_dropout=dropout, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.a)
        layer.lora_B["default"].weight.copy_(inputs.b)
    return layer.train(dropout > 0)
