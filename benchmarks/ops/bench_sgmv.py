"""sgmv_, the tokens of each adapter side by side, beside one adapter for all tokens and a loop over the segments."""

from __future__ import annotations

import torch

from pylora.bench import Point, Sweep, Work, benchmark, inference
from pylora.ops import sgmv_
from pylora.ops.cost import Cost
from pylora.ops.cost import pools as cost_model
from pylora.ops.reference.sgmv import sgmv as reference
from pylora.testing.pools import pool_inputs
from pylora.testing.tolerances import assert_near

SEGMENTS = (1, 2, 4, 8, 16, 32, 64)
RANKS = (1, 8, 16, 64, 256)
MIXED_RANKS = (4, 8, 16, 64)

TABLE: list[Point] = [{}, {"dtype": "bfloat16"}, {"skew": 1}, {"rank": 0}, {"layout": "out_rank"}]
SWEEPS = [Sweep("segments", SEGMENTS), Sweep("rank", RANKS)]


def ranks_of(segments: int, rank: int) -> list[int]:
    """The same rank for all; 0: ranks that take turns."""
    return [rank or MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(segments)]


def lengths_of(tokens: int, segments: int, skew: int) -> list[int]:
    """Tokens of each segment: as even as can be, or with `skew` one each and the rest in the last."""
    if skew:
        return [1] * (segments - 1) + [tokens - segments + 1]
    return [tokens * (i + 1) // segments - tokens * i // segments for i in range(segments)]


def cost(tokens: int, segments: int, rank: int, width: int, dtype: str, skew: int, layout: str) -> dict[str, Cost]:
    ranks = ranks_of(segments, rank)
    return {
        "base": cost_model.add([tokens], [max(ranks)], width, width, dtype, dtype),
        "pylora": cost_model.add(lengths_of(tokens, segments, skew), ranks, width, width, dtype, dtype),
    }


@benchmark(base="one adapter for all tokens: torch's mm and addmm_", table=TABLE, sweeps=SWEEPS, cost=cost)
def sgmv(
    tokens: int = 512,
    segments: int = 8,
    rank: int = 16,
    width: int = 1024,
    dtype: str = "float32",
    skew: int = 0,
    layout: str = "rank_out",
) -> Work:
    """Low-rank products of a prefill, added to y; each segment has an adapter of its own."""
    inputs = pool_inputs(tokens, width, width, ranks_of(segments, rank), getattr(torch, dtype))
    x, a_pool, b_pool, ranks, scalings = inputs.x, inputs.a_pool, inputs.b_pool, inputs.ranks, inputs.scalings
    lengths = lengths_of(tokens, segments, skew)
    indptr = torch.tensor([0, *lengths]).cumsum(0).int()
    slots = torch.arange(segments, dtype=torch.int32)
    b = b_pool.transpose(1, 2).contiguous() if layout == "out_rank" else b_pool
    y = inputs.y.clone()
    one_a, one_b = a_pool[ranks.argmax()].t(), b_pool[ranks.argmax()]
    parts = list(zip(y.split(lengths), x.split(lengths), ranks.tolist(), scalings.tolist(), strict=True))

    def in_a_loop() -> None:
        for slot, (y_rows, x_rows, r, scaling) in enumerate(parts):
            y_rows.addmm_(x_rows @ a_pool[slot, :r].t(), b_pool[slot, :r], alpha=scaling)

    def check() -> None:
        got = inputs.y.clone()
        sgmv_(got, x, a_pool, b, ranks, scalings, indptr, slots, layout)
        size = reference(inputs.y.abs(), x.abs(), a_pool.abs(), b_pool.abs(), ranks, scalings, indptr, slots)
        y_ref = reference(inputs.y, x, a_pool, b_pool, ranks, scalings, indptr, slots)
        assert_near(got, y_ref, width, "y", size, roundings=2)

    return Work(
        {
            "base": inference(lambda: y.addmm_(x @ one_a, one_b)),
            "loop": inference(in_a_loop),
            "pylora": inference(lambda: sgmv_(y, x, a_pool, b, ranks, scalings, indptr, slots, layout)),
        },
        check,
    )
