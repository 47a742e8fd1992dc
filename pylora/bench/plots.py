"""Plots of figures: ratios to the base along each sweep, and a roofline. matplotlib is imported here alone."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pylora.bench.benchmark import Benchmark, Sweep
from pylora.bench.machine import describe
from pylora.bench.records import Record, ratio
from pylora.bench.runner import Outcome
from pylora.bench.table import floor_ratio

# Okabe and Ito's palette, told apart with any colour vision; the markers differ as well.
STYLES = {"pylora": ("#0072B2", "o"), "peft": ("#D55E00", "s")}
NAMES = {"pylora": "pylora", "peft": "PEFT"}
GREY = "#666666"
PANELS_A_ROW = 3
CAPTION_LETTERS = 18  # an inch, at its size


def draw(outcomes: Sequence[Outcome], folder: Path) -> list[Path]:
    """Write `<benchmark>_<axis>.png` for each axis that a benchmark sweeps, and `<benchmark>_roofline.png` where it
    has a cost model. Sweeps of which fewer than two points were measured are left out.

    Args:
        outcomes: Of `run_benchmark` or `session.from_records`.
        folder: Made if missing.

    Returns:
        The files, each written whole or not at all.
    """
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for outcome in outcomes:
        item, records = outcome.benchmark, outcome.records
        for axis in dict.fromkeys(sweep.over for sweep in item.sweeps):
            panels = [(sweep, _along(item, sweep, records)) for sweep in item.sweeps if sweep.over == axis]
            panels = [(sweep, found) for sweep, found in panels if len(found) > 1]
            if panels:
                written.append(_save(_ratios(item, axis, panels), folder / f"{item.name}_{axis}.png"))
        costed = [record for record in records if "cost" in record and "base" in record["figures"]]
        if costed:
            written.append(_save(_roofline(item, costed), folder / f"{item.name}_roofline.png"))
    return written


def _along(item: Benchmark, sweep: Sweep, records: Sequence[Record]) -> list[Record]:
    """The records of a sweep's points, in its order."""
    points = [item.complete(point) for point in sweep.points()]
    by_point = {tuple(sorted(record["parameters"].items())): record for record in records}
    found = (by_point.get(tuple(sorted(point.items()))) for point in points)
    return [record for record in found if record is not None]


def _ratios(item: Benchmark, axis: str, panels: Sequence[tuple[Sweep, list[Record]]]) -> Any:
    from matplotlib import pyplot

    columns = min(PANELS_A_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure, grid = pyplot.subplots(rows, columns, figsize=(4.4 * columns, 3.4 * rows + 0.7), squeeze=False)
    for axes, (sweep, records) in zip(grid.flat, panels, strict=False):
        _ratio_panel(axes, item, axis, sweep, records)
    for axes in list(grid.flat)[len(panels) :]:
        axes.set_axis_off()
    _caption(figure, f"{item.name}: time relative to the bare layer, by {axis}", panels[0][1][0])
    return figure


def _ratio_panel(axes: Any, item: Benchmark, axis: str, sweep: Sweep, records: list[Record]) -> None:
    places = [record["parameters"][axis] for record in records]
    divisor = "base" if "base" in records[0]["figures"] else "peft"
    ends: list[tuple[float, str, str]] = []
    top = 1.05
    for name, (colour, marker) in STYLES.items():
        ratios = [ratio(record, name, divisor) for record in records]
        pairs = [(place, value) for place, value in zip(places, ratios, strict=True) if value is not None]
        if len(pairs) < 2 or name == divisor:
            continue
        axes.plot(*zip(*pairs, strict=True), color=colour, marker=marker, markersize=4, linewidth=1.6)
        ends.append((pairs[-1][1], NAMES[name], colour))
        top = max(top, *(value for _, value in pairs))
    floors = [floor for record in records if (floor := floor_ratio(record)) is not None]
    if len(floors) == len(records):
        axes.plot(places, floors, color=GREY, linestyle=":", linewidth=1.2)
        ends.append((floors[-1], "floor", GREY))
    axes.axhline(1.0, color=GREY, linewidth=1.0, linestyle="--")
    axes.set_xscale("log", base=2)
    axes.set_xticks(places, [str(place) for place in places], fontsize=8)
    axes.minorticks_off()
    axes.set_ylim(0, top * 1.1)
    axes.set_xlim(places[0] / 1.15, places[-1] * (places[-1] / places[0]) ** 0.22)
    for height, (text, colour) in _apart(ends, axes.get_ylim()[1] / 14):
        axes.annotate(text, (places[-1], height), (6, 0), textcoords="offset points", color=colour, va="center", size=8)
    axes.set_xlabel(f"{axis}{' (tokens)' if axis == 'rows' else ''}", fontsize=9)
    axes.set_ylabel(f"time / {'bare layer' if divisor == 'base' else 'PEFT'}", fontsize=9)
    axes.set_title(item.label(item.complete({**sweep.at, axis: places[0]}), leave_out=(axis,)), fontsize=9, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", alpha=0.25)


def _apart(ends: list[tuple[float, str, str]], gap: float) -> list[tuple[float, tuple[str, str]]]:
    """Heights for the labels at the lines' ends, at least `gap` from one another."""
    placed: list[tuple[float, tuple[str, str]]] = []
    for height, text, colour in sorted(ends):
        lowest = placed[-1][0] + gap if placed else height
        placed.append((max(height, lowest), (text, colour)))
    return placed


def _roofline(item: Benchmark, records: list[Record]) -> Any:
    import numpy
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7.2, 4.8))
    limits = records[0]["limits"]
    points = {name: [_point(record, name) for record in records] for name in ("base", "pylora")}
    reach = [x for pairs in points.values() for x, _ in pairs]
    intensity = numpy.geomspace(min(reach) / 1.6, max(reach) * 1.6, 200)
    for key, text, style in (("cache_gb_s", "L3", "-"), ("memory_gb_s", "memory", "--")):
        roof = numpy.minimum(intensity * limits[key], limits["gemm_gflop_s"])
        axes.plot(intensity, roof, color=GREY, linestyle=style, linewidth=1.2)
        axes.annotate(
            f"{text} {limits[key]:.0f} GB/s", (intensity[0], roof[0]), (2, 4), textcoords="offset points", size=8
        )
    axes.annotate(
        f"GEMM {limits['gemm_gflop_s']:.0f} GFLOP/s",
        (intensity[-1], limits["gemm_gflop_s"]),
        (-2, 5),
        textcoords="offset points",
        ha="right",
        size=8,
    )
    x, y = zip(*points["base"], strict=True)
    axes.scatter(x, y, s=30, facecolors="none", edgecolors=GREY, label="bare layer")
    colour, marker = STYLES["pylora"]
    x, y = zip(*points["pylora"], strict=True)
    axes.scatter(x, y, s=18, color=colour, marker=marker, label="pylora")
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("operations per byte of compulsory traffic", fontsize=9)
    axes.set_ylabel("GFLOP/s reached", fontsize=9)
    axes.legend(frameon=False, fontsize=8, loc="lower right", bbox_to_anchor=(1, 1), ncols=2)
    axes.spines[["top", "right"]].set_visible(False)
    _caption(figure, f"{item.name}: roofline of the measured cases", records[0])
    return figure


def _point(record: Record, name: str) -> tuple[float, float]:
    """Intensity and GFLOP/s of a provider."""
    cost = record["cost"][name]
    return cost["flops"] / cost["bytes"], cost["flops"] / record["figures"][name]["min"] / 1e6


def _caption(figure: Any, title: str, record: Record) -> None:
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    made_with = f"{describe(record)}, {record['time'][:10]}"
    lines = textwrap.fill(made_with, int(CAPTION_LETTERS * figure.get_figwidth()))
    figure.text(0.01, 0.005, lines, fontsize=6.5, color=GREY)
    figure.tight_layout(rect=(0, 0.03, 1, 0.99))


def _save(figure: Any, path: Path) -> Path:
    from matplotlib import pyplot

    unfinished = path.with_suffix(".part")
    figure.savefig(unfinished, dpi=130, format="png", facecolor="white")
    pyplot.close(figure)
    unfinished.replace(path)
    return path
