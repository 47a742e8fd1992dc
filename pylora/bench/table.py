"""The printed table: minima, ratios to the base, and how far the samples lay apart."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from pylora.bench.records import Record, ratio
from pylora.bench.runner import Outcome

NOISY = 1.25  # median over minimum: above this the machine did something else as well


def provider_names(records: Sequence[Record]) -> list[str]:
    """The providers of the records, "base" first and "peft" last."""
    names = {name for record in records for name in record["figures"]}
    return sorted(names, key=lambda name: ({"base": 0, "peft": 2}.get(name, 1), name))


def print_outcome(outcome: Outcome, console: Console) -> None:
    """A benchmark's table, or why it has none."""
    item = outcome.benchmark
    if outcome.failure:
        console.print(f"[red]{item.name}: no figures.[/red] {escape(outcome.failure)}")
        return
    if outcome.skipped:
        console.print(f"[yellow]{item.name}: skipped: {escape(outcome.skipped)}.[/yellow]")
        return
    base = f"; base: {item.base}" if item.base else ""
    console.print(f"\n[bold]{item.name}[/bold]  {escape(item.summary)} [dim]({escape(item.unit + base)})[/dim]")
    console.print(_table(outcome))
    if noisy := [record["case"] for record in outcome.records if _spread(record) > NOISY]:
        console.print(
            f"[yellow]{len(noisy)} of {len(outcome.records)} cases have a spread (median / minimum) above {NOISY}: "
            "something else was running.[/yellow]"
        )
    if above := [record["case"] for record in outcome.records if exceeds_limit(record)]:
        console.print(f"[yellow]{len(above)} of {len(outcome.records)} cases are above their limit.[/yellow]")


def _table(outcome: Outcome) -> Table:
    records = outcome.records
    names = provider_names(records)
    divisor = "base" if "base" in names else "peft"
    divided = [name for name in names if name != divisor and divisor in names]
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column("case", no_wrap=True)
    for name in names:
        table.add_column(name, justify="right")
    for name in divided:
        table.add_column(f"{name} / {divisor}", justify="right", style="bold" if name == "pylora" else None)
    floor = any("floor" in record for record in records)
    if floor:
        table.add_column("floor", justify="right")
    limited = any("limit" in record for record in records)
    if limited:
        table.add_column("limit", justify="right")
    table.add_column("spread", justify="right")
    for record in records:
        row = [record["case"]]
        row += [_number(record["figures"].get(name, {}).get("min")) for name in names]
        row += [_ratio(ratio(record, name, divisor)) for name in divided]
        if floor:
            row.append(_ratio(floor_ratio(record)))
        if limited:
            row.append(_ratio(record.get("limit")) + (" <" if exceeds_limit(record) else ""))
        table.add_row(*map(escape, row), _ratio(_spread(record) or None))
    return table


def floor_ratio(record: Record) -> float | None:
    """The least time that the machine's measured limits allow pylora's work, as a share of the base's time."""
    if "floor" not in record or "base" not in record["figures"]:
        return None
    return float(record["floor"]["pylora"] / record["figures"]["base"]["min"])


def exceeds_limit(record: Record) -> bool:
    """Whether pylora's time as a share of the base's is above what the benchmark wants it to be."""
    share = ratio(record, "pylora", "base")
    return "limit" in record and share is not None and share > record["limit"]


def _spread(record: Record) -> float:
    """Median over minimum, the largest of the providers; 0 where a figure is 0."""
    return max(
        (figure["median"] / figure["min"] for figure in record["figures"].values() if figure["min"]), default=0.0
    )


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 1000 else f"{value:.4g}" if value >= 1 else f"{value:.3f}"


def _ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
