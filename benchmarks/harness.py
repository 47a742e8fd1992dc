"""Timing beside a floor: callables take turns, so that a machine whose speed drifts favours none; minima are kept."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from pylora._native import C

RESULTS = Path(__file__).parent / "results"


@dataclass
class Case:
    """What one row of a table measures: `providers` maps "base" (the floor) and others to a call of the same work."""

    name: str
    providers: dict[str, Callable[[], object]]
    check: Callable[[], None]
    inner: int = 1
    milliseconds: dict[str, float] = field(default_factory=dict)

    def run(self, repeat: int) -> None:
        """Checks the results first: a wrong kernel gets an AssertionError and no figure."""
        self.check()
        best = dict.fromkeys(self.providers, float("inf"))
        for turn in range(repeat + 1):
            for name, call in self.providers.items():
                start = time.perf_counter()
                for _ in range(self.inner):
                    call()
                elapsed = (time.perf_counter() - start) / self.inner * 1e3
                if turn > 0:  # the first turn warms up
                    best[name] = min(best[name], elapsed)
        self.milliseconds = best


def machine() -> dict[str, object]:
    """What a figure has to be read with."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False).stdout
    return {
        "cpu": cpu,
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": C.cpu_isa(),
        "commit": commit.strip(),
        "versions": {name: _version(name) for name in ("pylora", "torch", "peft")},
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "absent"


def run(title: str, cases: list[Case], repeat: int, record: bool) -> None:
    """Measures the cases and prints a table of ratios to the base; with `record`, appends to results/<title>.jsonl."""
    facts = machine()
    for case in tqdm(cases, desc=title, leave=False):
        case.run(repeat)
    others = [name for name in cases[0].providers if name != "base"]
    table = Table(
        title=f"{title}: ratio to base, {facts['cpu']}, {facts['threads']} thread(s), {facts['isa']}",
        title_justify="left",
    )
    for column in ("case", "base ms", *(f"{name} ms" for name in others), *(f"{name} / base" for name in others)):
        table.add_column(column, justify="left" if column == "case" else "right")
    for case in cases:
        ms = case.milliseconds
        times = [f"{ms[name]:.3f}" for name in ("base", *others)]
        table.add_row(case.name, *times, *(f"{ms[name] / ms['base']:.2f}" for name in others))
    Console().print(table)
    if record:
        RESULTS.mkdir(exist_ok=True)
        with (RESULTS / f"{title}.jsonl").open("a") as file:
            for case in cases:
                file.write(json.dumps({"case": case.name, "ms": case.milliseconds} | facts, sort_keys=True) + "\n")
