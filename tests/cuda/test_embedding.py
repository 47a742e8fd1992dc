"""multi_lora's CUDA launchers for embeddings (csrc/multi_lora/lookup.cuh), emulated, held to the definition in f64."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from pylora.ops.cost import cuda as cost
from pylora.ops.plan import BatchPlan
from pylora.ops.reference.multi_lora import multi_lora_embedding
from pylora.testing.cuda_segments import accumulator, planes
from pylora.testing.emulator import SCHEDULES, emulated
from pylora.testing.pools import token_slots
from pylora.testing.tolerances import assert_near

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
]
"""dtypes of y and of the adapters."""
COLUMNS, PADDING = 13, 5
PART_TERMS = 2**14
"""v, g and factors in two bf16 are good to 2^-17 of their terms, 128 units of f32: as long a sum's error as this."""


@pytest.fixture
def device(schedule):
    with emulated(schedule) as module:
        yield module


def adapters(ranks: list[int], width: int, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor]]:
    return [torch.randn(r, COLUMNS).to(dtype) for r in ranks], [torch.randn(width, r).to(dtype) for r in ranks]


def fields_of(y: Tensor, tokens: Tensor, slots: Tensor, a, b, scalings) -> dict[str, Any]:
    """tokens: [rows, length]."""
    plan = BatchPlan.from_slots(slots)
    return {
        "num_tokens": tokens.numel(),
        "in_features": a[0].shape[1],
        "out_features": y.shape[1],
        "v_stride": max(len(factor) for factor in a),
        "dtype": y.dtype,
        "a": a,
        "b": b,
        "scalings": scalings,
        "num_segments": len(plan.segment_slots),
        "tokens_per_row": tokens.shape[1],
        "order": plan.order,
        "indptr": plan.segment_indptr,
        "plan_slots": plan.segment_slots,
        "on_device": True,
        "columns": tokens,
        "frozen_column": PADDING,
    }


def workspace_for(device, fields: dict[str, Any]) -> Tensor:
    of_tokens = ("columns", "frozen_column")
    shape = {name: value for name, value in fields.items() if name not in of_tokens}
    return planes(device.multi_lora.embedding_workspace_bytes(**shape))


def forward(device, y: Tensor, tokens: Tensor, slots: Tensor, a, b, scalings) -> Tensor:
    fields, y = fields_of(y, tokens, slots, a, b, scalings), y.clone()
    device.multi_lora.embedding_forward(**fields, y=y, workspace=workspace_for(device, fields))
    return y


def run(device, y: Tensor, dy: Tensor, tokens: Tensor, slots: Tensor, a, b, scalings):
    """y, and the gradients of a, then of b."""
    fields = fields_of(y, tokens, slots, a, b, scalings)
    da, db = [torch.zeros_like(t) for t in a], [torch.full_like(t, torch.nan) for t in b]
    memory = workspace_for(device, fields)
    device.multi_lora.embedding_backward(**fields, dy=dy, da=da, db=db, workspace=memory)
    return forward(device, y, tokens, slots, a, b, scalings), [*da, *db]


def definition(y: Tensor, dy: Tensor, tokens: Tensor, slots: Tensor, a, b, scalings, absolute: bool = False):
    wide = [t.double().abs() if absolute else t.double() for t in (y, dy, *a, *b)]
    y, dy, *factors = [wide[0], wide[1], *(t.requires_grad_() for t in wide[2:])]
    shape = (*tokens.shape, y.shape[1])
    of_a, of_b = factors[: len(a)], factors[len(a) :]
    result = multi_lora_embedding(y.view(shape), tokens, of_a, of_b, scalings, slots.tolist(), PADDING).view(y.shape)
    if not result.requires_grad:
        return result, [torch.zeros_like(t) for t in factors]
    grads = torch.autograd.grad(result, factors, dy, allow_unused=True, materialize_grads=True)
    return result.detach(), list(grads)


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_grid(device, dtype, factor_dtype):
    """Widths, ranks, popularities, rows and lengths take turns; tokens that come again, and the frozen one."""
    popularities = itertools.cycle(["uniform", "one", "zipf", "none", "distinct"])
    for i, (ranks, width, (rows, length)) in enumerate(
        zip(
            [[8], [3, 1], [16, 40], [70, 5, 2], [8, 8]],
            [64, 17, 1, 136, 8],
            [(5, 30), (70, 1), (2, 9), (9, 20), (0, 4)],
            strict=True,
        )
    ):
        a, b = adapters(ranks, width, factor_dtype)
        tokens = torch.randint(0, COLUMNS, (rows, length))
        y, dy = torch.randn(rows * length, width).to(dtype), torch.randn(rows * length, width).to(dtype)
        slots, scalings = (
            token_slots(next(popularities), rows, len(ranks), seed=i),
            [0.5 + s for s in range(len(ranks))],
        )
        given = (y, dy, tokens, slots, a, b, scalings)
        result, grads = run(device, *given)
        wanted, wanted_grads = definition(*given)
        size, sizes = definition(*given, absolute=True)
        terms = max(rows * length, width, *ranks) + (PART_TERMS if dtype.itemsize == 2 else 0)
        sums_in = accumulator(dtype)
        assert_near(result, wanted, terms, "y", size, sums_in=sums_in)
        assert torch.equal(result[slots.repeat_interleave(length) < 0], y[slots.repeat_interleave(length) < 0])
        for grad, expected, magnitude in zip(grads, wanted_grads, sizes, strict=True):
            assert_near(grad, expected, terms, "gradient of a factor", magnitude, sums_in=sums_in)
        for grad in grads[: len(a)]:
            assert not grad[:, PADDING].any()


def test_tokens_that_an_adapter_does_not_have(device):
    """Beyond A's columns on either side nothing is read or added, and no gradient arises."""
    a, b = adapters([5], 24, torch.float32)
    tokens = torch.tensor([[0, COLUMNS, -1, COLUMNS - 1, 2**40]])
    y, dy = torch.randn(5, 24), torch.randn(5, 24)
    result, (da, _) = run(device, y, dy, tokens, torch.zeros(1, dtype=torch.int32), a, b, [1.0])
    has = torch.tensor([True, False, False, True, False])
    assert torch.equal(result[~has], y[~has])
    assert_near(result[has], y[has].double() + a[0].T[tokens[0, has]].double() @ b[0].T.double(), 6, "y")
    assert_near(da[:, [0, COLUMNS - 1]], (dy[has].double() @ b[0].double()).T, 24, "da")
    assert not da[:, 1:-1].any()


@pytest.mark.emulator
@pytest.mark.parametrize(("rank", "requested"), [(8, 2.0), (16, 2.0), (64, 2.1)])
def test_bytes(rank, requested):
    """A is kept [rank, vocabulary]: an element of a column has a sector of its own, little beside y. At rank 64 the
    expansion asks L2 for v at each 128 columns and for B at each 64 rows."""
    rows, length, width = 4, 64, 2048
    a, b = torch.randn(rank, 4000).bfloat16(), torch.randn(width, rank).bfloat16()
    y, tokens = torch.randn(rows * length, width).bfloat16(), torch.randperm(4000)[: rows * length].view(rows, length)
    with emulated(SCHEDULES[0], multiprocessors=108) as device:
        forward(device, y, tokens, torch.zeros(rows, dtype=torch.int32), [a], [b], [0.5])
        launches = device.take_launches()
    least = cost.embedding([cost.Segment(rows * length, rank)], width, "bfloat16").bytes
    moved = 32 * sum(launch["load_sectors"] + launch["store_sectors"] for launch in launches)
    assert least <= moved <= 1.5 * least, moved / least
    asked = sum(launch["load_bytes"] + launch["store_bytes"] for launch in launches)
    assert asked <= requested * least, asked / least


def test_same_bits_in_any_order():
    a, b = adapters([16, 7], 64, torch.bfloat16)
    tokens, slots = torch.randint(0, COLUMNS, (9, 20)), token_slots("uniform", 9, 2)
    y, dy = torch.randn(180, 64).bfloat16(), torch.randn(180, 64).bfloat16()
    results = []
    for schedule in [*SCHEDULES, SCHEDULES[0]._replace(resident_blocks=16)]:
        with emulated(schedule) as module:
            y_now, grads = run(module, y, dy, tokens, slots, a, b, [0.5, 2.0])
            results.append([y_now, *grads])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))
