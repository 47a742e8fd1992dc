"""`pylora inspect`: what an adapter is, and what it does to each layer."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pylora.cli.failures import clear_failures
from pylora.cli.registry import command

if TYPE_CHECKING:
    from pylora.offline.inspect import LayerFacts


@command("inspect")
def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="The adapter: a folder, or a hub id.")],
    base: Annotated[
        str, typer.Option(metavar="BASE", help="The base model's folder or hub id, for norms beside the base's.")
    ] = "",
    layers: Annotated[bool, typer.Option("--layers", help="A row for every layer, not one for each kind.")] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Draw norms and singular values to a PNG (needs matplotlib).")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as one JSON object.")] = False,
) -> None:
    """Show an adapter's ranks, targets, sizes, norms and singular values.

    ‖ΔW‖ is the Frobenius norm of what the adapter adds to a weight, scaling · B·A; the effective rank says how many
    directions of it carry that: near the rank when all do, far below it when a smaller rank would do.

    Examples:

    * `pylora inspect ./my-adapter`

    * `pylora inspect ./my-adapter --layers --base ./llama` for each layer's change relative to its weight

    * `pylora inspect ./my-adapter --plot adapter.png`

    * `pylora inspect ./my-adapter --json | jq .layers[0]`
    """
    with clear_failures("inspect"):
        from tqdm import tqdm

        from pylora.offline.adapter import read_adapter
        from pylora.offline.base import BaseCheckpoint
        from pylora.offline.errors import OfflineError
        from pylora.offline.inspect import draw, inspect_adapter

        if plot is not None and importlib.util.find_spec("matplotlib") is None:
            raise OfflineError("--plot: expected matplotlib to be installed; pip install matplotlib")
        weights = read_adapter(adapter)
        with tqdm(
            total=len(weights.layers), desc="inspect", unit="layer", delay=2, disable=not sys.stderr.isatty()
        ) as bar:
            if base:
                with BaseCheckpoint(base) as files:
                    facts = inspect_adapter(weights, files, bar.update)
            else:
                facts = inspect_adapter(weights, None, bar.update)
        if as_json:
            typer.echo(json.dumps(_summary(weights) | {"layers": [dataclasses.asdict(each) for each in facts]}))
        else:
            _print(_summary(weights), facts, layers)
        if plot is not None:
            draw(facts, f"{adapter}: {len(facts)} layers", plot)
            typer.echo(f"drawn: {plot}", err=as_json)


def _summary(adapter: Any) -> dict[str, Any]:
    config = adapter.config
    tensors = [t for layer in adapter.layers.values() for t in (layer.a, layer.b)]
    return {
        "adapter": adapter.place,
        "base model": config.base_model_name_or_path,
        "task": config.task_type,
        "rank": config.r,
        "alpha": config.lora_alpha,
        "kind": ", ".join(name for name in ("use_dora", "use_rslora", "lora_bias") if getattr(config, name)) or "plain",
        "parameters": adapter.parameters(),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        "whole tensors": sorted(adapter.others),
    }


def _print(summary: dict[str, Any], facts: list[LayerFacts], each_layer: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    if not console.is_terminal:
        console.width = 140  # a file has no width, and 80 columns would cut every name
    for name, value in summary.items():
        if value not in (None, []):
            text = ", ".join(value) if isinstance(value, list) else f"{value:,}" if name == "parameters" else str(value)
            console.print(f"[bold]{name:<14}[/bold]", end="")
            console.print(text, markup=False)
    if not facts:
        return
    with_base = any(layer.relative is not None for layer in facts)
    table = Table(box=None, header_style="bold", padding=(0, 2, 0, 0))
    table.add_column("layer" if each_layer else "layers", overflow="fold")
    for title in ("shape", "rank", "scaling", "‖ΔW‖", *(("‖ΔW‖/‖W‖",) if with_base else ()), "σ₁", "effective rank"):
        table.add_column(title, justify="right")
    if each_layer:
        rows = [(layer.name, [layer]) for layer in facts]
    else:
        groups: dict[tuple[Any, ...], list[LayerFacts]] = {}
        for layer in facts:
            groups.setdefault((layer.name.rpartition(".")[2], layer.shape, layer.rank, layer.scaling), []).append(layer)
        rows = [(f"{len(members)} x {key[0]}", members) for key, members in groups.items()]
    for name, members in rows:
        first = members[0]
        cells = [f"{first.shape[0]} x {first.shape[1]}", str(first.rank), f"{first.scaling:.3g}"]
        cells.append(_mean([layer.delta_norm for layer in members]))
        if with_base:
            cells.append(_mean([layer.relative for layer in members if layer.relative is not None]))
        cells.append(_mean([layer.singular_values[0] for layer in members if layer.singular_values]))
        cells.append(_mean([layer.effective_rank for layer in members]))
        table.add_row(name, *cells)
    console.print()
    console.print(table)
    if not each_layer and len(rows) < len(facts):
        console.print("\nMeans over the layers of a row; --layers shows each.")


def _mean(values: list[float]) -> str:
    return f"{sum(values) / len(values):.3g}" if values else ""
