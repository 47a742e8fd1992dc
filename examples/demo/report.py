"""What the reader sees: progress bars, the loss curve, the closing table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

# Sixteen steps of one row each are enough for the trend to show through the differences between rows.
_SMOOTHING_STEPS = 16


def progress_bar(console: Console, unit: str) -> Progress:
    """A bar with a count and the time left; use it as a context manager and add one task."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=console,
    )


def smoothed(values: Sequence[float], width: int = _SMOOTHING_STEPS) -> list[float]:
    """Mean of each value and up to ``width`` - 1 values before it."""
    return [sum(values[max(0, end - width) : end]) / min(width, end) for end in range(1, len(values) + 1)]


def plot_losses(path: Path, losses: Sequence[float], held_out: tuple[float, float], title: str) -> None:
    """Save the training loss of each step, and the held-out loss before and after, as a PNG.

    Args:
        path: the file to write.
        losses: nats per token of each step.
        held_out: nats per token before the first step and after the last one.
        title: what was trained.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    steps = range(1, len(losses) + 1)
    axes.plot(steps, losses, color="tab:blue", alpha=0.3, linewidth=1, label="training, each step")
    axes.plot(steps, smoothed(losses), color="tab:blue", linewidth=2, label=f"mean of {_SMOOTHING_STEPS} steps")
    axes.plot((0, len(losses)), held_out, "o", color="tab:orange", markersize=8, label="held-out text")
    for step, loss, place in zip((0, len(losses)), held_out, ("left", "right"), strict=True):
        label = f"{loss:.2f}, perplexity {math.exp(loss):.1f}"
        backing = {"facecolor": "white", "edgecolor": "none", "alpha": 0.8, "pad": 1}
        axes.annotate(
            label, (step, loss), (0, 10), textcoords="offset points", ha=place, color="tab:orange", bbox=backing
        )
    axes.set(title=title, xlabel="optimiser step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def show_samples(console: Console, prompt: str, without: str, with_adapter: str) -> None:
    """Print one prompt with its two continuations."""
    for title, text in (("without the adapter", without), ("with the adapter", with_adapter)):
        body = Text.assemble((prompt, "dim"), (text, "bold"))
        console.print(Panel(body, title=title, title_align="left", border_style="blue"), soft_wrap=False)


def show_table(console: Console, title: str, rows: Sequence[tuple[str, str]]) -> None:
    """Print names and values as a table."""
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column(style="cyan")
    table.add_column(justify="right")
    for name, value in rows:
        table.add_row(name, value)
    console.print(table)
