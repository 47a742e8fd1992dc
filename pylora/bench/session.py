"""One call of `pylora bench` without its printing: options to a plan, a plan to outcomes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm

from pylora.bench import machine, records
from pylora.bench.benchmark import Benchmark, Point, Value
from pylora.bench.discovery import discover
from pylora.bench.runner import Outcome, run_benchmark
from pylora.bench.selection import SelectionError, choose_benchmarks, choose_points, dtypes, numbers

Plan = list[tuple[Benchmark, list[Point]]]


@dataclass(frozen=True)
class Choice:
    """Which cases: the options of the command line that choose, as they were written."""

    names: Sequence[str] = ()
    axes: dict[str, tuple[str, str]] = field(default_factory=dict)  # axis: (option, "1,2,64")
    dtype: str = ""
    words: str = ""
    sweeps: bool = False
    grid: bool = False
    files: Sequence[Path] = ()


def make_plan(choice: Choice) -> Plan:
    """The benchmarks and their points.

    Raises:
        SelectionError: an option has no meaning, or nothing fits all of them.
        FileNotFoundError, ValueError: from `discover`.
    """
    wanted: dict[str, Sequence[Value]] = {
        axis: numbers(option, text) for axis, (option, text) in choice.axes.items() if text
    }
    if choice.dtype:
        wanted["dtype"] = dtypes(choice.dtype)
    if choice.grid and not wanted:
        raise SelectionError("pylora bench: --grid: expected shapes beside it, as --rows 1,33 --widths 896, got none")
    chosen = choose_benchmarks(discover(choice.files), choice.names)
    pairs = [(item, choose_points(item, wanted, choice.words, choice.sweeps, choice.grid)) for item in chosen]
    plan = [(item, points) for item, points in pairs if points]
    if not plan:
        raise SelectionError(
            "pylora bench: no case fits all of these options. `pylora bench --sweeps --list` shows what there is, "
            "and --grid measures any shape."
        )
    return plan


def run_plan(plan: Plan, threads: int, repeat: int, providers: Sequence[str] = ()) -> list[Outcome]:
    """Measure all of it with `threads` threads; the limits of the machine are probed anew before each benchmark."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    facts = machine.facts()
    outcomes = []
    try:
        with tqdm(total=sum(len(points) for _, points in plan), leave=False, disable=None) as bar:
            for item, points in plan:

                def show(label: str, name: str = item.name) -> None:
                    bar.set_description(f"{name} {label}")
                    bar.update()

                limits = machine.probe() if item.cost is not None else None
                outcomes.append(run_benchmark(item, points, repeat, facts, limits, providers, show))
    finally:
        torch.set_num_threads(before)
    return outcomes


def from_records(files: Sequence[Path], plan: Plan) -> list[Outcome]:
    """Outcomes made of recorded figures: those of the plan's benchmarks.

    Raises:
        ValueError: a file holds something else than records, or none of these benchmarks.
        OSError: a file cannot be read.
    """
    found = records.read(files)
    pairs = [(item, [record for record in found if record["benchmark"] == item.name]) for item, _ in plan]
    outcomes = [Outcome(item, mine) for item, mine in pairs if mine]
    if not outcomes:
        names = ", ".join(item.name for item, _ in plan)
        raise ValueError(f"pylora bench: --from: expected records of {names} in {', '.join(map(str, files))}, got none")
    return outcomes
