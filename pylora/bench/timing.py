"""Timing by turns: a machine whose speed drifts then favours none, and the least disturbed sample of each counts."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass

SHORTEST_SAMPLE = 1e-3  # seconds: 10,000 ticks of the clock's 100 ns
LONGEST_SAMPLE = 0.2  # seconds of the slowest provider, which has to keep up the same number of calls


@dataclass(frozen=True)
class Figure:
    """What a provider's samples came to, in the benchmark's unit."""

    min: float
    median: float

    @classmethod
    def of(cls, samples: list[float]) -> Figure:
        return cls(min(samples), statistics.median(samples))

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


@contextmanager
def no_collector() -> Iterator[None]:
    """Keep Python's cyclic collector from running inside a sample."""
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def time_in_turns(
    providers: Mapping[str, Callable[..., object]],
    repeat: int,
    inner: int | None = None,
    before: Callable[[str], object] | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[dict[str, Figure], int]:
    """Milliseconds a call of each provider, and how many calls made a sample.

    The providers take turns in their order, `repeat` times after two turns that warm up, the second of which tells how
    many calls a sample needs. All take the same number, so that each minimum is over means of equally many.
    """

    def sample(name: str, calls: int) -> float:
        if before is not None:
            state = before(name)
            start = clock()
            providers[name](state)
            return clock() - start
        start = clock()
        for _ in range(calls):
            providers[name]()
        return (clock() - start) / calls

    samples: dict[str, list[float]] = {name: [] for name in providers}
    with no_collector():
        for _ in range(2):
            warm = [sample(name, 1) for name in providers]
        calls = 1 if before is not None else inner or _calls(min(warm), max(warm))
        for _ in range(repeat):
            for name in providers:
                samples[name].append(sample(name, calls) * 1e3)
    return {name: Figure.of(values) for name, values in samples.items()}, calls


def _calls(fastest: float, slowest: float) -> int:
    wanted = math.ceil(SHORTEST_SAMPLE / max(fastest, 1e-7))
    return max(1, min(wanted, int(LONGEST_SAMPLE / max(slowest, 1e-7))))


def measure_in_turns(
    providers: Mapping[str, Callable[..., object]], repeat: int, before: Callable[[str], object] | None = None
) -> dict[str, Figure]:
    """What the providers return, for benchmarks of something other than time."""
    samples: dict[str, list[float]] = {name: [] for name in providers}
    for _ in range(repeat):
        for name, call in providers.items():
            value = call(before(name)) if before is not None else call()
            samples[name].append(float(value))  # type: ignore[arg-type]
    return {name: Figure.of(values) for name, values in samples.items()}
