"""What a case file is written with: a benchmark is a function from a point of its axes to the work to be measured."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from pylora.bench.timing import Figure
from pylora.ops.cost import Cost

Value = str | int | float
Point = dict[str, Value]
"""Where a case lies: a value for each argument of the benchmark's function."""


@dataclass
class Work:
    """One case, ready to be measured.

    Attributes:
        providers: name to a call of the same work. "base" is what the others are divided by: usually torch's bare
            layer. Where the benchmark's unit is not milliseconds, the figure is what the call returns.
        check: raises AssertionError unless the results are right. It is called first, on the tensors that are timed.
        before: called outside the clock before each call, with the provider's name; the provider gets its result as
            argument. For work that uses up its input, such as wrapping a model. A sample is one call then.
        inner: calls a sample; by default as many as take a millisecond.
        timer: measures the providers, `repeat` samples each, where the host's clock does not serve (a GPU).
    """

    providers: dict[str, Callable[..., object]]
    check: Callable[[], None]
    before: Callable[[str], object] | None = None
    inner: int | None = None
    timer: Callable[[Mapping[str, Callable[..., object]], int], dict[str, Figure]] | None = None


@dataclass(frozen=True)
class Sweep:
    """Points along one axis, the others fixed: a line of a plot.

    Attributes:
        over: the axis.
        values: its values.
        at: values of other axes; those not named have their defaults.
    """

    over: str
    values: Sequence[Value]
    at: Mapping[str, Value] = field(default_factory=dict)

    def points(self) -> Iterator[Point]:
        for value in self.values:
            yield {**self.at, self.over: value}


@dataclass(frozen=True)
class Benchmark:
    """A function of `@benchmark` with what was said about it there."""

    name: str
    summary: str
    build: Callable[..., Work]
    base: str
    table: Sequence[Point]
    sweeps: Sequence[Sweep]
    cost: Callable[..., dict[str, Cost]] | None
    unit: str
    group: str = ""
    needs: Callable[[], str] | None = None
    limit: Callable[..., float] | None = None

    def __post_init__(self) -> None:
        for point in (*self.table, *(point for sweep in self.sweeps for point in sweep.points())):
            self.complete(point)

    @property
    def axes(self) -> Point:
        """Names and default values of the axes, in the order of the function's arguments."""
        return {name: argument.default for name, argument in inspect.signature(self.build).parameters.items()}

    def complete(self, point: Mapping[str, Value]) -> Point:
        """The point with defaults where it says nothing.

        Raises:
            ValueError: it names an axis that there is not.
        """
        if unknown := sorted(set(point) - set(self.axes)):
            raise ValueError(
                f"benchmark: {self.name}: expected axes among {', '.join(self.axes)}, got {', '.join(unknown)}"
            )
        return self.axes | dict(point)

    def points(self, sweeps: bool) -> list[Point]:
        """The points of the table, with `sweeps` those of the sweeps as well, each once."""
        points = [self.complete(point) for point in self.table]
        if sweeps:
            points += [self.complete(point) for sweep in self.sweeps for point in sweep.points()]
        return [point for index, point in enumerate(points) if point not in points[:index]]

    def label(self, point: Mapping[str, Value], leave_out: Sequence[str] = ()) -> str:
        """The point in words: "forward float32 128 x 2048 rank 64"; a number at its default is not mentioned.

        Rows and width always are, except those in `leave_out`.
        """
        words = []
        for name, value in point.items():
            if name in leave_out:
                continue
            if name == "rows" and "width" in point and "width" not in leave_out:
                words.append(f"{value} x {point['width']}")
            elif name == "width" and "rows" in point and "rows" not in leave_out:
                continue
            elif isinstance(value, str):
                words.append(value)
            elif name in ("rows", "width") or value != self.axes[name]:
                words.append(f"{name.replace('_', ' ')} {value}")
        return " ".join(words) or self.name


def benchmark(
    *,
    base: str,
    name: str | None = None,
    table: Sequence[Point] = ({},),
    sweeps: Sequence[Sweep] = (),
    cost: Callable[..., dict[str, Cost]] | None = None,
    unit: str = "ms",
    needs: Callable[[], str] | None = None,
    limit: Callable[..., float] | None = None,
) -> Callable[[Callable[..., Work]], Benchmark]:
    """Make a benchmark of a function whose arguments are its axes, each with a default.

    Args:
        base: what the provider "base" is, in a few words; "" if there is none, and then "peft" is divided by.
        name: what `pylora bench NAME` calls it; the function's own name by default.
        table: the points of the printed table.
        sweeps: the points that plots need beyond those.
        cost: the least work at a point: providers' names ("base", "pylora") to a `Cost`. Called with the axes.
        unit: "ms" for times; otherwise what the providers return, e.g. "MB".
        needs: says why the benchmark cannot run on this machine, or "". It is then skipped, with the reason printed.
        limit: the ratio of pylora to the base that a point is meant to stay below. Called with the axes.

    Raises:
        TypeError: an argument of the function has no default.
        ValueError: a point names an axis that there is not.
    """

    def decorate(build: Callable[..., Work]) -> Benchmark:
        title = name or build.__name__
        for axis, argument in inspect.signature(build).parameters.items():
            if argument.default is inspect.Parameter.empty:
                raise TypeError(f"benchmark: {title}: expected a default for each argument, got none for {axis}")
        summary = (inspect.getdoc(build) or "").split("\n\n")[0].replace("\n", " ")
        return Benchmark(title, summary, build, base, tuple(table), tuple(sweeps), cost, unit, needs=needs, limit=limit)

    return decorate


def with_group(found: Benchmark, group: str) -> Benchmark:
    return replace(found, group=group)
