"""Runs a benchmark: each case is checked, then measured; one wrong case and the benchmark gives no figure."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from pylora.bench.benchmark import Benchmark, Point, Work
from pylora.bench.machine import Limits
from pylora.bench.timing import Figure, measure_in_turns, time_in_turns

SCHEMA = 2  # of a record; 1 had one minimum a provider under "ms" and no parameters


@dataclass
class Outcome:
    """What became of a benchmark: records, or the reason why there are none. skipped: what this machine lacks."""

    benchmark: Benchmark
    records: list[dict[str, Any]] = field(default_factory=list)
    failure: str = ""
    skipped: str = ""


def run_benchmark(
    item: Benchmark,
    points: Sequence[Point],
    repeat: int,
    facts: dict[str, Any],
    limits: Limits | None,
    providers: Sequence[str] = (),
    progress: Callable[[str], None] = lambda label: None,
) -> Outcome:
    """Measure the points. Never raises for a case that is wrong or fails: the outcome says which and why.

    Args:
        facts: from `machine.facts`, put into every record.
        limits: from `machine.probe`; None where nothing is to be said about floors.
        providers: measure these only; "base" always. None: all.
        progress: told each case's label before it starts.
    """
    if item.needs is not None and (lacking := item.needs()):
        return Outcome(item, skipped=lacking)
    outcome = Outcome(item)
    for point in points:
        label = item.label(point)
        progress(label)
        torch.manual_seed(0)
        try:
            work = item.build(**point)
            work.check()
            outcome.records.append(_measure(item, point, work, repeat, providers) | _common(item, point, facts, limits))
        except AssertionError as error:
            return Outcome(item, failure=f"{label}: wrong result: {error}")
        except Exception as error:  # a case that cannot run says so, and the other benchmarks go on
            return Outcome(item, failure=f"{label}: {type(error).__name__}: {error}")
    return outcome


def _measure(item: Benchmark, point: Point, work: Work, repeat: int, chosen: Sequence[str]) -> dict[str, Any]:
    calls = {name: call for name, call in work.providers.items() if not chosen or name in chosen or name == "base"}
    figures: dict[str, Figure]
    if work.timer is not None:
        figures, inner = work.timer(calls, repeat), 1
    elif item.unit == "ms":
        figures, inner = time_in_turns(calls, repeat, work.inner, work.before)
    else:
        figures, inner = measure_in_turns(calls, repeat, work.before), 1
    return {"figures": {name: figure.as_dict() for name, figure in figures.items()}, "inner": inner, "repeat": repeat}


def _common(item: Benchmark, point: Point, facts: dict[str, Any], limits: Limits | None) -> dict[str, Any]:
    record: dict[str, Any] = {
        "schema": SCHEMA,
        "benchmark": item.name,
        "group": item.group,
        "case": item.label(point),
        "parameters": point,
        "unit": item.unit,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }
    if item.cost is not None and limits is not None:
        costs = item.cost(**point)
        record["cost"] = {name: {"flops": cost.flops, "bytes": cost.bytes} for name, cost in costs.items()}
        record["floor"] = {name: limits.milliseconds(cost) for name, cost in costs.items()}
        record["limits"] = limits.as_dict()
    if item.limit is not None:
        record["limit"] = item.limit(**point)
    return record | facts
