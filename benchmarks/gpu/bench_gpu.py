"""The ops on a GPU, beside torch, PEFT and, where it is installed, vLLM's Triton kernels; skipped without a GPU."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from pylora.bench import Point, Sweep, Work, benchmark, gpu, inference, libraries
from pylora.ops import bgmv_, lora_linear, sgmv_
from pylora.ops.reference import lora as lora_reference
from pylora.ops.reference.sgmv import bgmv as bgmv_reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.pools import PoolInputs, pool_inputs
from pylora.testing.tolerances import assert_near

DEVICE = "cuda"  # "cpu" in the tests of this file
ROWS = (1, 8, 64, 512, 4096)
RANKS = (8, 16, 64, 256)
LORA: list[Point] = [{"rows": rows, "l2": l2} for rows in ROWS for l2 in ("cold", "warm")]
TRAIN: Point = {"direction": "train", "rows": 4096}
DECODE: list[Point] = [
    {"adapters": adapters, "popularity": popularity, "l2": "cold"}
    for adapters in (8, 64)
    for popularity in ("one", "zipf", "distinct")
]
PREFILL: Point = {"tokens": 4096, "l2": "cold"}


def on_gpu(inputs: Any) -> Any:
    for name, value in vars(inputs).items():
        if isinstance(value, Tensor):
            setattr(inputs, name, value.to(DEVICE))
    return inputs


def timed(l2: str) -> Callable[..., Any]:
    return lambda providers, repeat: gpu.time_by_events(providers, repeat, cold=l2 == "cold")


@benchmark(
    base="torch's functional.linear on the frozen weight",
    table=[*LORA, TRAIN, TRAIN | {"dropout": 0.1}],
    sweeps=[Sweep("rank", RANKS, {"rows": rows}) for rows in (1, 512)],
    needs=gpu.unusable,
)
def gpu_lora(
    direction: str = "forward",
    rows: int = 512,
    width: int = 4096,
    rank: int = 16,
    dtype: str = "bfloat16",
    dropout: float = 0.0,
    l2: str = "warm",
) -> Work:
    """lora_linear on a GPU: one adapter, factors of x's dtype."""
    inputs = on_gpu(lora_inputs(rows, width, width, rank, getattr(torch, dtype), bias=False))
    x, weight, a, b, scaling = inputs.x, inputs.weight, inputs.a, inputs.b, inputs.scaling
    calls: dict[str, Callable[[], Tensor]] = {
        "base": lambda: functional.linear(x, weight),
        "pylora": lambda: lora_linear(x, weight, None, a, b, scaling, dropout),
        "torch": lambda: (
            functional.linear(x, weight) + scaling * functional.dropout(x, dropout, dropout > 0) @ a.t() @ b.t()
        ),
    }
    if (layer := peft_layer(inputs, dropout)) is not None:
        calls["peft"] = lambda: layer(x)

    def check() -> None:
        rng = torch.tensor([1, 2], device=DEVICE)
        expected = lora_reference.lora_linear(x, weight, None, a, b, scaling, dropout, rng)
        assert_near(lora_linear(x, weight, None, a, b, scaling, dropout, rng), expected, width, "y", roundings=2)

    if direction == "forward":
        return Work({name: inference(call) for name, call in calls.items()}, check, timer=timed(l2))
    for leaf in (x, a, b):
        leaf.requires_grad_()
    return Work({name: step(call, inputs.dy) for name, call in calls.items()}, check, timer=timed(l2))


def step(call: Callable[[], Tensor], dy: Tensor) -> Callable[[], None]:
    return lambda: torch.autograd.backward(call(), dy)


def peft_layer(inputs: LoraInputs, dropout: float) -> nn.Module | None:
    """PEFT's layer around the same weight, its factors of the same dtype; None without peft."""
    peft = libraries().get("peft")
    if peft is None:
        return None
    rank, (out_features, in_features) = inputs.a.shape[0], inputs.weight.shape
    base = nn.Linear(in_features, out_features, bias=False, device="meta")
    base.weight = nn.Parameter(inputs.weight.detach(), requires_grad=False)
    config = peft.LoraConfig(r=rank, lora_alpha=rank * inputs.scaling, lora_dropout=dropout, target_modules=["0"])
    model = peft.get_peft_model(nn.Sequential(base), config, autocast_adapter_dtype=False)
    return model.base_model.model[0].to(inputs.a.dtype).train(dropout > 0)


@benchmark(
    base="one adapter for all tokens: torch's mm and addmm_",
    table=[*DECODE, PREFILL, PREFILL | {"popularity": "zipf"}],
    sweeps=[Sweep("adapters", (1, 2, 4, 8, 16, 32, 64)), Sweep("rank", RANKS)],
    needs=gpu.unusable,
)
def gpu_pools(
    tokens: int = 64,
    adapters: int = 64,
    rank: int = 16,
    width: int = 4096,
    dtype: str = "bfloat16",
    popularity: str = "distinct",
    l2: str = "cold",
) -> Work:
    """Low-rank products of many adapters: bgmv_ to 64 tokens, sgmv_ beyond, beside vLLM's shrink and expand."""
    inputs = pool_inputs(tokens, width, width, [rank] * adapters, getattr(torch, dtype), popularity=popularity)
    slots = inputs.token_slots.sort().values if tokens > 64 else inputs.token_slots
    inputs.token_slots = slots
    indptr, segments = inputs.sorted_segments()
    host = (inputs.ranks, inputs.scalings)
    on_gpu(inputs)
    x, y, a_pool, b_pool = inputs.x, inputs.y.clone(), inputs.a_pool, inputs.b_pool
    plan = (indptr, segments) if tokens > 64 else (slots,)
    op = sgmv_ if tokens > 64 else bgmv_
    calls: dict[str, Callable[[], object]] = {
        "base": lambda: y.addmm_(x @ a_pool[0].t(), b_pool[0]),
        "pylora": lambda: op(y, x, a_pool, b_pool, *host, *plan),
    }
    if DEVICE == "cuda" and importlib.util.find_spec("vllm") is not None:
        calls["vllm"] = vllm_call(inputs, y)

    def check() -> None:
        pools = (a_pool, b_pool, inputs.ranks, inputs.scalings, inputs.token_slots)
        size = bgmv_reference(inputs.y.abs(), x.abs(), a_pool.abs(), b_pool.abs(), *pools[2:])
        got = inputs.y.clone()
        op(got, x, a_pool, b_pool, *host, *plan)
        assert_near(got, bgmv_reference(inputs.y, x, *pools), width, "y", size, roundings=2)

    return Work({name: inference(call) for name, call in calls.items()}, check, timer=timed(l2))


def vllm_call(inputs: PoolInputs, y: Tensor) -> Callable[[], None]:
    """vLLM's two launches on the same pools, its metadata made beforehand; scaling 1 for all, which it has no other."""
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    tokens, (slots, rank, _) = len(inputs.x), inputs.a_pool.shape
    meta = LoRAKernelMeta.make(slots, tokens, DEVICE)
    meta.prepare_tensors(inputs.token_slots)
    arguments = meta.meta_args(tokens, False)
    a, b = [inputs.a_pool], [inputs.b_pool.transpose(1, 2).contiguous()]
    v = torch.empty(1, tokens, rank, dtype=torch.float32, device=DEVICE)

    def call() -> None:
        v.zero_()
        lora_shrink(inputs.x, a, v, *arguments, 1.0)
        lora_expand(v, b, y, *arguments, offset_start=0, add_inputs=True)

    return call
