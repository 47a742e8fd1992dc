"""bgmv_, a slot for each token, beside one adapter for all tokens and a loop over the slots, both in torch."""

from __future__ import annotations

import torch

from pylora.bench import Point, Sweep, Work, benchmark, inference
from pylora.ops import bgmv_
from pylora.ops.cost import Cost
from pylora.ops.cost import pools as cost_model
from pylora.ops.reference.sgmv import bgmv as reference
from pylora.testing.pools import pool_inputs, token_slots
from pylora.testing.tolerances import assert_near

ADAPTERS = (1, 2, 4, 8, 16, 32, 64)
RANKS = (1, 8, 16, 64, 256)
MIXED_RANKS = (4, 8, 16, 64)

TABLE: list[Point] = [
    {},
    {"dtype": "bfloat16"},
    {"popularity": "zipf"},
    {"popularity": "one"},
    {"rank": 0, "adapters": 16},
    {"layout": "out_rank"},
    {"tokens": 1, "adapters": 1},
]
SWEEPS = [Sweep("adapters", ADAPTERS, {"tokens": 64}), Sweep("rank", RANKS)]


def ranks_of(adapters: int, rank: int) -> list[int]:
    """The same rank for all; 0: ranks that take turns."""
    return [rank or MIXED_RANKS[i % len(MIXED_RANKS)] for i in range(adapters)]


def cost(
    tokens: int, adapters: int, rank: int, width: int, dtype: str, popularity: str, layout: str
) -> dict[str, Cost]:
    ranks = ranks_of(adapters, rank)
    slots = token_slots(popularity, tokens, adapters).tolist()
    used = [slots.count(slot) for slot in range(adapters)]
    return {
        "base": cost_model.add([tokens], [max(ranks)], width, width, dtype, dtype),
        "pylora": cost_model.add(used, ranks, width, width, dtype, dtype),
    }


@benchmark(base="one adapter for all tokens: torch's mm and addmm_", table=TABLE, sweeps=SWEEPS, cost=cost)
def bgmv(
    tokens: int = 32,
    adapters: int = 32,
    rank: int = 16,
    width: int = 1024,
    dtype: str = "float32",
    popularity: str = "distinct",
    layout: str = "rank_out",
) -> Work:
    """Low-rank products of a decoding step, added to y."""
    inputs = pool_inputs(tokens, width, width, ranks_of(adapters, rank), getattr(torch, dtype), popularity=popularity)
    x, a_pool, b_pool = inputs.x, inputs.a_pool, inputs.b_pool
    ranks, scalings, slots = inputs.ranks, inputs.scalings, inputs.token_slots
    b = b_pool.transpose(1, 2).contiguous() if layout == "out_rank" else b_pool
    y = inputs.y.clone()
    one_a, one_b = a_pool[ranks.argmax()].t(), b_pool[ranks.argmax()]
    scaling = scalings.tolist()
    rows = {slot: (slots == slot).nonzero().flatten() for slot in sorted(set(slots.tolist()) - {-1})}

    def in_a_loop() -> None:
        for slot, own in rows.items():
            r = int(ranks[slot])
            y.index_add_(0, own, x[own] @ a_pool[slot, :r].t() @ b_pool[slot, :r], alpha=scaling[slot])

    def check() -> None:
        got = inputs.y.clone()
        bgmv_(got, x, a_pool, b, ranks, scalings, slots, layout)
        size = reference(inputs.y.abs(), x.abs(), a_pool.abs(), b_pool.abs(), ranks, scalings, slots)
        assert_near(got, reference(inputs.y, x, a_pool, b_pool, ranks, scalings, slots), width, "y", size, roundings=2)

    return Work(
        {
            "base": inference(lambda: y.addmm_(x @ one_a, one_b)),
            "loop": inference(in_a_loop),
            "pylora": inference(lambda: bgmv_(y, x, a_pool, b, ranks, scalings, slots, layout)),
        },
        check,
    )
