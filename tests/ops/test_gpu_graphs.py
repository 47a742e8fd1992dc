"""Ops over many adapters in CUDA graphs: the host waits for nothing, and a replay follows the plan on the device."""

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pylora.bench import gpu
from pylora.ops import AdapterPools, BatchPlan, bgmv_, multi_lora_linear, sgmv_
from pylora.ops.reference.multi_lora import multi_lora_linear as linear_definition
from pylora.ops.reference.sgmv import bgmv as bgmv_definition
from pylora.testing.pools import PoolInputs, pool_inputs
from pylora.testing.tolerances import assert_near

ROOT = Path(__file__).resolve().parents[2]
LACKING = gpu.unusable()
TOKENS, SLOTS = 24, 5

WAITS = re.compile(r"\.item[(<]|\.cpu\(|\.tolist|nonzero|Synchronize|cudaMemcpy|cudaMalloc|at::kCPU|cudaEvent")
"""What makes the host wait for the device, or cannot be captured."""
PATH = [
    "csrc/binding/pools_cuda.cpp",
    "csrc/multi_lora/cuda_backend.h",
    "csrc/lora/cuda_backend.h",
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc").glob("*/*.cu"))),
    *(str(path.relative_to(ROOT)) for path in sorted((ROOT / "csrc/cuda").glob("*.*h"))),
]
"""Every file between an op's checks and its kernels."""


@pytest.mark.parametrize("path", PATH)
def test_nothing_on_the_way_waits(path):
    found = [line for line in (ROOT / path).read_text().splitlines() if WAITS.search(line)]
    assert found == []


def captured(step) -> torch.cuda.CUDAGraph:
    """`step` in a graph, after a run on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def inputs_of(dtype: torch.dtype, seed: int) -> PoolInputs:
    return pool_inputs(TOKENS, 520, 264, [16, 3, 0, 8, 64], dtype, popularity="uniform", seed=seed)


def on_gpu(inputs: PoolInputs) -> PoolInputs:
    return PoolInputs(**{name: value.cuda() for name, value in vars(inputs).items()})


def check_pools(y: Tensor, inputs: PoolInputs) -> None:
    tensors = (inputs.y, inputs.x, inputs.a_pool, inputs.b_pool)
    more = (inputs.ranks, inputs.scalings, inputs.token_slots)
    size = bgmv_definition(*(t.abs() for t in tensors), *more)
    assert_near(y.cpu(), bgmv_definition(*tensors, *more), 600, "y", size, sums_in=torch.float32)


@pytest.mark.cuda
@pytest.mark.skipif(bool(LACKING), reason=LACKING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("op", ["bgmv", "sgmv"])
def test_pools_follow_what_is_on_the_device(dtype, op):
    """Ranks, scalings, slots and segments of a replay are those of its batch."""
    batches = [inputs_of(dtype, seed) for seed in range(3)]
    for batch in batches:
        batch.a_pool, batch.b_pool = batches[0].a_pool, batches[0].b_pool
        if op == "sgmv":
            batch.token_slots = batch.token_slots.sort().values
    held = on_gpu(batches[0])
    indptr = torch.zeros(SLOTS + 2, dtype=torch.int32, device="cuda")
    segments = torch.full((SLOTS + 1,), -1, dtype=torch.int32, device="cuda")
    y = held.y.clone()

    def step() -> None:
        y.copy_(held.y)
        common = (y, held.x, held.a_pool, held.b_pool, held.ranks, held.scalings)
        if op == "bgmv":
            bgmv_(*common, held.token_slots)
        else:
            sgmv_(*common, indptr, segments)

    graph = captured(step)
    for batch in batches:
        for name, value in vars(batch).items():
            getattr(held, name).copy_(value)
        plan = BatchPlan.from_slots(batch.token_slots)
        indptr.fill_(TOKENS)[: len(plan.segment_indptr)] = plan.segment_indptr.cuda()
        segments.fill_(-1)[: len(plan.segment_slots)] = plan.segment_slots.cuda()
        graph.replay()
        check_pools(y, batch)


@pytest.mark.cuda
@pytest.mark.skipif(bool(LACKING), reason=LACKING)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_follows_the_plan_on_the_device(dtype):
    a = [torch.randn(rank, 256, device="cuda", dtype=dtype) / 16 for rank in (16, 3, 8)]
    b = [torch.randn(128, len(factor), device="cuda", dtype=dtype) / 4 for factor in a]
    scalings, weight = [0.5, 2.0, 1.0], torch.randn(128, 256, device="cuda", dtype=dtype) / 16
    x = torch.randn(12, 256, device="cuda", dtype=dtype)
    slots = [torch.randint(0, 3, (12,)) for _ in range(3)]
    plan = BatchPlan(
        torch.arange(12, dtype=torch.int32, device="cuda"),
        torch.full((5,), 12, dtype=torch.int32, device="cuda"),
        torch.full((4,), -1, dtype=torch.int32, device="cuda"),
    )
    results = []

    def step() -> None:
        results.append(multi_lora_linear(x, weight, None, AdapterPools(a, b, scalings), plan))

    graph = captured(step)
    host = [[t.cpu() for t in each] for each in (a, b)]
    for row_slots in slots:
        made = BatchPlan.from_slots(row_slots)
        plan.order.copy_(made.order)
        plan.segment_indptr.fill_(12)[: len(made.segment_indptr)] = made.segment_indptr.cuda()
        plan.segment_slots.fill_(-1)[: len(made.segment_slots)] = made.segment_slots.cuda()
        graph.replay()
        parts = (x.cpu(), weight.cpu(), None, *host, scalings, row_slots.tolist())
        magnitude = [part.abs() if isinstance(part, Tensor) else part for part in parts[:3]]
        size = linear_definition(*magnitude, *([t.abs() for t in each] for each in host), scalings, row_slots.tolist())
        assert_near(results[-1].cpu(), linear_definition(*parts), 272, "y", size, sums_in=torch.float32)
