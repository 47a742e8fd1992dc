"""The first singular triplets of a weight by Lanczos bidiagonalisation, beside LAPACK's whole decomposition, and the
product with WᵀW of a subspace iteration, beside the two products that it takes."""

from __future__ import annotations

import torch

from pylora.bench import Point, Sweep, Work, benchmark, inference
from pylora.init.truncated_svd import top_singular_triplets
from pylora.ops import gram_product as op
from pylora.ops.cost import BYTES, Cost
from pylora.ops.reference import lanczos as reference
from pylora.testing.tolerances import assert_near

WIDTHS = (512, 768, 1024)
RANKS = (1, 8, 16, 32)


def weight(width: int, dtype: str = "float32") -> torch.Tensor:
    """Normal numbers: the flat spectrum that an iteration finds hardest."""
    return torch.randn(width, width, generator=torch.Generator().manual_seed(0)).to(getattr(torch, dtype))


@benchmark(base="torch.linalg.svd", table=[{}, {"rank": 8}], sweeps=[Sweep("width", WIDTHS), Sweep("rank", RANKS)])
def singular_triplets(width: int = 1024, rank: int = 16) -> Work:
    """The first `rank` triplets of a square f32 weight of normal numbers, as "pissa" takes them."""
    w = weight(width)

    def check() -> None:
        found = top_singular_triplets(w, rank)
        expected = torch.linalg.svdvals(w.double())[:rank]
        scale = expected[0]
        assert (found.s - expected).abs().max() <= 1e-5 * scale, "other singular values than LAPACK's in f64"
        residual = (w.double() @ found.vh.double().t() - found.u.double() * found.s.double()).norm(dim=0)
        assert residual.max() <= 2e-5 * scale, "no singular vectors"

    return Work(
        {
            "base": inference(lambda: torch.linalg.svd(w, full_matrices=False)),
            "pylora": inference(lambda: top_singular_triplets(w, rank)),
        },
        check,
        inner=1,
    )


def gram_cost(width: int, columns: int, dtype: str) -> dict[str, Cost]:
    """Both products; the weight has to be read once."""
    flops, elements = 4 * width * width * columns, width * width + 2 * width * columns
    return dict.fromkeys(("base", "pylora"), Cost(flops, BYTES[dtype] * elements))


F64: Point = {"dtype": "float64"}


@benchmark(
    base="torch's two products",
    table=[{}, F64, {"width": 2048}],
    sweeps=[Sweep("columns", (1, 8, 16, 32)), Sweep("width", (512, 1024, 2048))],
    cost=gram_cost,
)
def gram_product(width: int = 1024, columns: int = 16, dtype: str = "float32") -> Work:
    """Wᵀ(W X) for X [width, columns]: an iteration of "pissa_niter_N"."""
    w = weight(width, dtype)
    x = torch.randn(width, columns, generator=torch.Generator().manual_seed(1)).to(w.dtype)

    def check() -> None:
        size = reference.gram_product(w.abs(), x.abs())
        assert_near(op(w, x), reference.gram_product(w, x), 2 * width, "product", size)

    return Work({"base": inference(lambda: w.t() @ (w @ x)), "pylora": inference(lambda: op(w, x))}, check)
