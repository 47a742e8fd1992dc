"""`pylora bench`: what the kernels, whole models and their memory cost on this machine, beside PEFT and torch."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from pylora.cli.registry import command

if TYPE_CHECKING:
    from rich.console import Console

    from pylora.bench.runner import Outcome
    from pylora.bench.session import Plan


@command("bench")
def bench(
    ops: Annotated[
        list[str] | None,
        typer.Argument(metavar="[OPS]...", help="Benchmarks, or the groups ops, model, memory, serving, gpu."),
    ] = None,
    listing: Annotated[bool, typer.Option("--list", help="List the cases, measure nothing.")] = False,
    rows: Annotated[str, typer.Option(metavar="N,...", help="Only cases of these numbers of rows (tokens).")] = "",
    ranks: Annotated[str, typer.Option(metavar="N,...", help="Only cases of these ranks.")] = "",
    widths: Annotated[str, typer.Option(metavar="N,...", help="Only cases of these widths.")] = "",
    adapters: Annotated[str, typer.Option(metavar="N,...", help="Only cases of these numbers of adapters.")] = "",
    dtype: Annotated[str, typer.Option(metavar="NAME,...", help="Only cases of these: f32, bf16, f16, f64.")] = "",
    words: Annotated[
        str, typer.Option("--only", "-k", metavar="WORDS", help='Only cases with all of these words: "train 512".')
    ] = "",
    grid: Annotated[bool, typer.Option("--grid", help="Measure all combinations of the shapes given.")] = False,
    sweeps: Annotated[bool, typer.Option("--sweeps", help="The cases of the plots too; implied by --plot.")] = False,
    threads: Annotated[int, typer.Option(min=1, help="Threads of torch and of the kernels.")] = 1,
    repeat: Annotated[int, typer.Option(min=1, help="Turns of each provider; the minimum counts.")] = 9,
    providers: Annotated[str, typer.Option(metavar="NAME,...", help="Only these beside base: pylora, peft.")] = "",
    record: Annotated[bool, typer.Option("--record", help="Append the figures to the results.")] = False,
    results: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="For --record; default: the checkout's benchmarks/results, or bench-results."),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="DIR", help="Write plots as PNGs (needs matplotlib).")] = None,
    from_: Annotated[
        list[Path] | None, typer.Option("--from", metavar="FILE", help="Show recorded figures, measure nothing.")
    ] = None,
    file: Annotated[
        list[Path] | None, typer.Option("--file", metavar="FILE", help="A file with cases of yours.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a case, no tables.")] = False,
) -> None:
    """Measure pylora beside the bare torch layer and beside PEFT.

    Providers take turns in one process, and the minimum of their samples counts. Every case is checked against its
    definition first; an op that is wrong gets no figure. Ratios are to `base`, the same work without an adapter.

    The exit status is 0 when all went well, 1 when an op is wrong or a case failed, 2 for a choice that fits nothing.

    Examples:

    * `pylora bench lora` measures the op of one adapter

    * `pylora bench --list` shows what there is, `pylora bench ops --sweeps --list` the cases of the plots as well

    * `pylora bench lora --grid --rows 1,33 --widths 896 --ranks 8 --dtype bf16` measures shapes of your own

    * `pylora bench lora -k train --threads 2 --json > train.jsonl` keeps the figures of training

    * `pylora bench ops --record --plot plots` draws ratios against rows, rank and adapters, and a roofline

    * `pylora bench --from benchmarks/results/lora.jsonl --plot plots` draws recorded figures again

    * `pylora bench my_op --file bench_my_op.py` measures an op of yours
    """
    from rich.console import Console

    from pylora.bench import records, session
    from pylora.bench.discovery import results_folder

    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        _fail("pylora bench: --plot: expected matplotlib to be installed; pip install matplotlib")
    console = Console(highlight=False, stderr=as_json)
    if not console.is_terminal:
        console.width = 140  # a file has no width, and 80 columns would break every label
    axes = {"rows": ("--rows", rows), "rank": ("--ranks", ranks), "width": ("--widths", widths)}
    axes["adapters"] = ("--adapters", adapters)
    choice = session.Choice(ops or (), axes, dtype, words, sweeps or plot is not None or bool(from_), grid, file or ())
    try:
        plan = session.make_plan(choice)
        outcomes = session.from_records(from_, plan) if from_ else []
    except (ValueError, OSError) as error:
        _fail(str(error))
    if listing:
        _list(plan, console)
        return
    if not from_:
        _say_what_disturbs(console, threads)
        outcomes = session.run_plan(plan, threads, repeat, [name for name in providers.split(",") if name])
    _show(outcomes, console, as_json)
    if record and not from_:
        for path in records.append(
            [each for outcome in outcomes for each in outcome.records], results or results_folder()
        ):
            console.print(f"recorded in {path}")
    if plot is not None:
        from pylora.bench.plots import draw

        for path in draw(outcomes, plot):
            console.print(f"drawn: {path}")
    raise typer.Exit(1 if any(outcome.failure for outcome in outcomes) else 0)


def _fail(message: str) -> NoReturn:
    typer.echo(message, err=True)
    raise typer.Exit(2)


def _say_what_disturbs(console: Console, threads: int) -> None:
    from pylora.bench.providers import has_peft

    if not has_peft():
        console.print("[yellow]peft is not installed: its column is left out (pip install peft).[/yellow]")
    load = os.getloadavg()[0]
    if load + threads > len(os.sched_getaffinity(0)) + 0.5:
        console.print(f"[yellow]Other processes are busy here (load {load:.1f}): figures will be noisy.[/yellow]")


def _list(plan: Plan, console: Console) -> None:
    from rich.markup import escape

    for item, points in plan:
        axes = ", ".join(f"{name} ({value})" for name, value in item.axes.items())
        console.print(f"[bold]{item.name}[/bold] [dim]{item.group}[/dim]  {escape(item.summary)}")
        if axes:
            console.print(f"  [dim]axes and defaults: {escape(axes)}[/dim]", soft_wrap=True)
        for point in points:
            console.print(f"  {escape(item.label(point))}")


def _show(outcomes: list[Outcome], console: Console, as_json: bool) -> None:
    from pylora.bench import machine, records, table

    found = [record for outcome in outcomes for record in outcome.records]
    if found:
        console.print(machine.describe(found[-1]), soft_wrap=True)
    for outcome in outcomes:
        if as_json and not outcome.failure and not outcome.skipped:
            for record in outcome.records:
                typer.echo(records.line(record))
        else:
            table.print_outcome(outcome, console)
