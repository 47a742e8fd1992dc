"""`pylora extract`: the difference of two models as an adapter."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pylora.cli.failures import clear_failures
from pylora.cli.registry import command

if TYPE_CHECKING:
    from pylora.offline.extract import Report


@command("extract")
def extract(
    tuned: Annotated[str, typer.Argument(metavar="TUNED", help="The fine-tuned model: a folder, or a hub id.")],
    base: Annotated[str, typer.Argument(metavar="BASE", help="What it was tuned from: a folder, or a hub id.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for the adapter.")],
    rank: Annotated[int, typer.Option(min=1, help="The largest rank.")] = 16,
    energy: Annotated[
        float,
        typer.Option(min=0, max=1, help="Give each layer the smallest rank that has this share of its change."),
    ] = 1.0,
    targets: Annotated[
        str, typer.Option(metavar="REGEX", help="Only layers whose names this matches; default: all dense layers.")
    ] = "",
    whole: Annotated[
        bool, typer.Option("--whole", help="Keep other changed modules (norms, embeddings) whole in the adapter.")
    ] = False,
) -> None:
    """Extract a LoRA adapter from a fine-tuned model and its base.

    For each dense layer the first singular directions of the difference, which is the best approximation of that rank.
    The table says what share of each kind's change (of its squared norm) the adapter has, and what else changed.

    Examples:

    * `pylora extract ./tuned ./llama ./adapter --rank 32`

    * `pylora extract ./tuned ./llama ./adapter --rank 64 --energy 0.9` smaller ranks where they are enough

    * `pylora extract ./tuned ./llama ./adapter --targets "q_proj|v_proj"`
    """
    with clear_failures("extract"):
        import torch
        from tqdm import tqdm

        from pylora.offline.base import BaseCheckpoint
        from pylora.offline.errors import OfflineError
        from pylora.offline.extract import Wish, extract_adapter

        torch.set_grad_enabled(False)
        try:
            pattern = re.compile(targets)
        except re.error as error:
            raise OfflineError(f"--targets: {targets!r}: {error}") from None
        with BaseCheckpoint(tuned, "a fine-tuned model") as after, BaseCheckpoint(base) as before:
            wish = Wish(rank, energy, whole, lambda name: pattern.search(name) is not None)
            total = sum(1 for _ in before)
            with tqdm(total=total, desc="extract", unit="tensor", delay=2, disable=not sys.stderr.isatty()) as bar:
                report = extract_adapter(after, before, out, wish, bar.update)
        _print(report, out)


def _print(report: Report, out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    groups: dict[str, list] = {}
    for layer in report.layers:
        groups.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    for title in ("layers", "rank", "change of the weight", "captured", "least"):
        table.add_column(title, justify="left" if title == "layers" else "right")
    for name, layers in groups.items():
        ranks = sorted({layer.rank for layer in layers})
        captured = [layer.captured for layer in layers]
        table.add_row(
            f"{len(layers)} x {name}",
            str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}",
            f"{100 * sum(layer.size for layer in layers) / len(layers):.2g} %",
            f"{100 * sum(captured) / len(captured):.1f} %",
            f"{100 * min(captured):.1f} %",
        )
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    left = {key: size for key, size in report.left.items() if key not in report.kept}
    if left:
        largest = max(left, key=lambda key: left[key])
        console.print(
            f"\n{len(left)} other tensors changed and are left out, most of all {largest} "
            f"({100 * left[largest]:.2g} %); --whole keeps them",
            markup=False,
        )
    console.print(f"\nadapter of {len(report.layers)} layers in {out}", markup=False)
