"""Which cases to run: benchmarks by name or group, points by the values of their axes."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from pylora.bench.benchmark import Benchmark, Point, Value
from pylora.bench.discovery import GROUPS

DTYPES = {
    "f64": "float64",
    "f32": "float32",
    "fp32": "float32",
    "bf16": "bfloat16",
    "f16": "float16",
    "fp16": "float16",
}
DTYPE_NAMES = ("float32", "bfloat16", "float16", "float64")


class SelectionError(ValueError):
    """A choice that fits nothing; the message lists what there is."""


def choose_benchmarks(found: Mapping[str, Benchmark], names: Sequence[str]) -> list[Benchmark]:
    """Those named, by their own names or their groups', in the order asked for; all of them for no name."""
    chosen: list[Benchmark] = []
    for name in names or found:
        matching = [item for item in found.values() if name in (item.name, item.group)]
        if not matching:
            there = ", ".join(found)
            raise SelectionError(f"pylora bench: {name!r}: expected one of {there}, or a group: {', '.join(GROUPS)}")
        chosen += [item for item in matching if item not in chosen]
    return chosen


def choose_points(
    item: Benchmark,
    wanted: Mapping[str, Sequence[Value]],
    words: str = "",
    sweeps: bool = False,
    grid: bool = False,
) -> list[Point]:
    """The points of a benchmark to be measured.

    Args:
        wanted: axis to the values that may appear; an axis that the benchmark lacks matches nothing.
        words: each of them has to be in the point's label.
        sweeps: choose among the points of the plots as well as those of the table.
        grid: not choose but make the points: every combination of `wanted`, the other axes as in the table's points.
    """
    if not set(wanted) <= set(item.axes):
        return []
    if grid:
        points = _grid(item, wanted)
    else:
        points = [
            point for point in item.points(sweeps) if all(point[axis] in values for axis, values in wanted.items())
        ]
    return [point for point in points if all(word in item.label(point).split() for word in words.split())]


def _grid(item: Benchmark, wanted: Mapping[str, Sequence[Value]]) -> list[Point]:
    points: list[Point] = []
    for kind in item.points(sweeps=False):
        # Of the table's points only what the grid leaves open: directions, dropout. Shapes not asked for: the defaults.
        open_axes = {
            axis: value for axis, value in kind.items() if axis not in wanted and isinstance(value, (str, float))
        }
        for values in itertools.product(*wanted.values()):
            point = item.complete(open_axes | dict(zip(wanted, values, strict=True)))
            if point not in points:
                points.append(point)
    return points


def numbers(option: str, text: str) -> list[int]:
    """ "1,2,64" as integers.

    Raises:
        SelectionError: something else than positive integers.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdigit() and int(part) > 0 for part in parts):
        raise SelectionError(f"pylora bench: {option}: expected positive integers such as 1,64, got {text!r}")
    return [int(part) for part in parts]


def dtypes(text: str) -> list[str]:
    """ "bf16,float32" as torch's names.

    Raises:
        SelectionError: a name that is no floating-point dtype of the ops.
    """
    names = [DTYPES.get(part.strip(), part.strip()) for part in text.split(",")]
    if unknown := [name for name in names if name not in DTYPE_NAMES]:
        there = ", ".join((*DTYPE_NAMES, *DTYPES))
        raise SelectionError(f"pylora bench: --dtype: expected names among {there}, got {', '.join(unknown)}")
    return names
