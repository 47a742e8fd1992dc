"""multi_lora's CUDA launchers for embeddings (csrc/multi_lora/lookup.cuh), emulated, held to the definition in f64."""

import itertools

import pytest
import torch
from torch import Tensor

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


def run(device, y: Tensor, dy: Tensor, tokens: Tensor, slots: Tensor, a, b, scalings):
    """y, and the gradients of a, then of b. tokens: [rows, length]."""
    plan = BatchPlan.from_slots(slots)
    fields = {
        "num_tokens": tokens.numel(),
        "in_features": COLUMNS,
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
    }
    num_bytes = device.multi_lora.embedding_workspace_bytes(**fields)
    y, da, db = y.clone(), [torch.zeros_like(t) for t in a], [torch.full_like(t, torch.nan) for t in b]
    more = {"columns": tokens, "frozen_column": PADDING}
    device.multi_lora.embedding_forward(**fields, **more, y=y, workspace=planes(num_bytes))
    device.multi_lora.embedding_backward(**fields, **more, dy=dy, da=da, db=db, workspace=planes(num_bytes))
    return y, [*da, *db]


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
