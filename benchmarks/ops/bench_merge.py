"""Merging and unmerging an adapter, beside two rank-wide products added to an f32 weight, and beside PEFT's layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pylora.bench import Point, Sweep, Work, benchmark, inference, libraries
from pylora.ops import merge_, unmerge_
from pylora.ops.cost import Cost
from pylora.ops.cost import merge as cost_model
from pylora.ops.reference import merge as reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.tolerances import assert_near

SHARES = (0.005, 0.02, 0.1, 1.0)
RANKS = (1, 8, 16, 64, 256)
BF16: Point = {"dtype": "bfloat16"}

TABLE: list[Point] = [{}, BF16, {"dtype": "float16"}, BF16 | {"share": 1.0}, {"width": 1536, "rank": 24}]
SWEEPS = [Sweep("share", SHARES), Sweep("share", SHARES, BF16), Sweep("rank", RANKS, BF16)]


def cost(width: int, rank: int, dtype: str, share: float) -> dict[str, Cost]:
    there, base = (cost_model.merge(width, width, rank, each) for each in (dtype, "float32"))
    return {"base": base + base, "pylora": there + there}


@benchmark(base="torch's addmm_ on an f32 weight, there and back", table=TABLE, sweeps=SWEEPS, cost=cost)
def merge(width: int = 2048, rank: int = 16, dtype: str = "float32", share: float = 0.02) -> Work:
    """merge_ with its undo log and unmerge_, one adapter whose delta has `share` of the weight's rms."""
    inputs = lora_inputs(1, width, width, rank, getattr(torch, dtype), torch.float32, bias=False)
    inputs.b *= share * inputs.weight.float().std() / (inputs.scaling * (inputs.b @ inputs.a).std())
    w, a, b, scaling = inputs.weight, inputs.a, inputs.b, inputs.scaling
    wide = w.float()

    def base() -> None:
        wide.addmm_(b, a, alpha=scaling)
        wide.addmm_(b, a, alpha=-scaling)

    def cycle() -> None:
        unmerge_(w, [a], [b], [scaling], log=merge_(w, [a], [b], [scaling]))

    providers: dict[str, Callable[[], Any]] = {"base": inference(base), "pylora": inference(cycle)}
    if (layer := peft_layer(inputs)) is not None:

        def peft_cycle() -> None:
            layer.merge()
            layer.unmerge()

        providers["peft"] = inference(peft_cycle)

    def check() -> None:
        before = w.clone()
        log = merge_(w, [a], [b], [scaling])
        size: Tensor = reference.merge(before.abs(), [a.abs()], [b.abs()], [scaling])
        assert_near(w, reference.merge(before, [a], [b], [scaling]), rank, "w", size, roundings=1)
        unmerge_(w, [a], [b], [scaling], log=log)
        assert torch.equal(w, before), "unmerging changed the weight"

    return Work(providers, check)


def peft_layer(inputs: LoraInputs) -> Any:
    """PEFT's layer around a copy of the weight, which its rounding wears down; None without peft."""
    peft = libraries().get("peft")
    if peft is None:
        return None
    rank, (out_features, in_features) = inputs.a.shape[0], inputs.weight.shape
    base = nn.Linear(in_features, out_features, bias=False, dtype=inputs.weight.dtype)
    base.weight = nn.Parameter(inputs.weight.clone(), requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank * inputs.scaling, target_modules=["0"])
    layer = peft.get_peft_model(nn.Sequential(base), config).base_model.model[0]
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(inputs.a)
        layer.lora_B["default"].weight.copy_(inputs.b)
    return layer
