"""`pylora combine`: several adapters into one."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pylora.cli.failures import clear_failures
from pylora.cli.registry import command


class Kind(str, Enum):
    """How to combine, by the names that `add_weighted_adapter` has."""

    svd = "svd"
    cat = "cat"
    linear = "linear"
    ties = "ties"
    ties_svd = "ties_svd"
    dare_linear = "dare_linear"
    dare_linear_svd = "dare_linear_svd"
    dare_ties = "dare_ties"
    dare_ties_svd = "dare_ties_svd"
    magnitude_prune = "magnitude_prune"
    magnitude_prune_svd = "magnitude_prune_svd"


class Vote(str, Enum):
    """How TIES votes on signs."""

    total = "total"
    frequency = "frequency"


@command("combine")
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[=WEIGHT]...", help="Folders or hub ids, each with its weight; default 1."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="A new folder for the combined adapter.")],
    kind: Annotated[Kind, typer.Option(help="How to combine.")] = Kind.svd,
    rank: Annotated[
        int, typer.Option(min=0, help="Rank of the result, for the kinds that decompose; default: the largest.")
    ] = 0,
    density: Annotated[
        float | None, typer.Option(min=0, max=1, help="Share of numbers that the pruning kinds keep.")
    ] = None,
    vote: Annotated[Vote, typer.Option(help="How TIES votes on signs: by magnitude or by number.")] = Vote.total,
    seed: Annotated[int, typer.Option(help="For the kinds that prune at random (dare).")] = 0,
) -> None:
    """Combine adapters of one base model into one adapter.

    `cat` is exact and adds the ranks up; `svd` gives the best adapter of a rank; `linear` combines A with A, B with B,
    cheap and not the sum of the changes; the others prune first (magnitude_prune, dare) or vote on signs (ties), on the
    factors, or with `_svd` on the changes themselves.

    Examples:

    * `pylora combine ./math ./code --out both` the best adapter of their rank for the sum of both changes

    * `pylora combine ./math=0.7 ./code=0.3 --out both --kind cat`

    * `pylora combine ./a ./b ./c --out merged --kind ties_svd --density 0.3 --rank 32`

    * `pylora combine ./new ./old=-1 --out difference --kind cat`
    """
    with clear_failures("combine"):
        import torch
        from tqdm import tqdm

        from pylora.combine import Combination
        from pylora.offline.adapter import read_adapter
        from pylora.offline.combine import combine_adapters

        torch.manual_seed(seed)
        places, weights = zip(*map(_weighted, adapters), strict=True)
        sources = [read_adapter(place) for place in places]
        how = Combination(kind.value, rank, density=density, majority_sign_method=vote.value)
        total = len({name for source in sources for name in source.layers})
        with tqdm(total=total, desc="combine", unit="layer", delay=2, disable=not sys.stderr.isatty()) as bar:
            config = combine_adapters(sources, weights, how, out, bar.update)
        typer.echo(f"combined {len(sources)} adapters by {how.kind} into {out}: {total} layers, rank {config.r}")


def _weighted(argument: str) -> tuple[str, float]:
    """("./math", 0.7) of "./math=0.7"; a name without a number behind its last "=" is all name."""
    place, equals, number = argument.rpartition("=")
    try:
        return (place, float(number)) if equals and place else (argument, 1.0)
    except ValueError:
        return argument, 1.0
