"""Starting A behind the numbers that PEFT throws away, beside torch's draws one by one."""

from __future__ import annotations

import torch

from pylora.bench import Point, Sweep, Work, benchmark, inference
from pylora.ops import uniform_
from pylora.ops.reference import uniform as reference

RANKS = (1, 8, 16, 64, 256)
TABLE: list[Point] = [{}, {"width": 512}, {"width": 4096}, {"rank": 64}]


@benchmark(base="torch's uniform_", table=TABLE, sweeps=[Sweep("rank", RANKS)])
def uniform(width: int = 2048, rank: int = 16) -> Work:
    """uniform_ for A [rank, width], behind the draws of a linear layer's A and B."""
    bound, skip = width**-0.5, 2 * rank * width
    a, expected = torch.empty(rank, width), torch.empty(rank, width)
    providers = {
        "base": inference(lambda: reference.uniform_(expected, bound, skip)),
        "pylora": inference(lambda: uniform_(a, bound, skip)),
    }

    def check() -> None:
        state = torch.get_rng_state()
        uniform_(a, bound, skip)
        after = torch.get_rng_state()
        torch.set_rng_state(state)
        reference.uniform_(expected, bound, skip)
        assert torch.equal(a, expected), "other numbers than torch's"
        assert torch.equal(after, torch.get_rng_state()), "the generator is elsewhere"

    return Work(providers, check)
