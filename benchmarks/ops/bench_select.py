"""Keeping the largest magnitudes, beside torch.topk and a scatter of what it finds."""

from __future__ import annotations

import torch

from pylora.bench import Point, Sweep, Work, benchmark, inference
from pylora.ops import keep_largest as op
from pylora.ops.reference import select as reference

SIZES = (2**12, 2**14, 2**16, 2**18, 2**20, 2**22)
DENSITIES = (0.01, 0.1, 0.5, 0.9)
TABLE: list[Point] = [{}, {"dtype": "bfloat16"}, {"dtype": "float16"}, {"dtype": "float64"}, {"density": 0.05}]


@benchmark(base="torch.topk and a scatter", table=TABLE, sweeps=[Sweep("size", SIZES), Sweep("density", DENSITIES)])
def keep_largest(size: int = 2**20, density: float = 0.5, dtype: str = "float32") -> Work:
    """keep_largest of normal numbers, as TIES prunes a weight's change."""
    x = torch.randn(size, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))
    count = int(size * density)

    def check() -> None:
        assert torch.equal(op(x, count), reference.keep_largest(x, count)), "other numbers are kept than topk finds"

    return Work(
        {
            "base": inference(lambda: reference.keep_largest(x, count)),
            "pylora": inference(lambda: op(x, count)),
        },
        check,
    )
