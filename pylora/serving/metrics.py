"""What a pool counts, and how it is shown to Prometheus."""

from __future__ import annotations

from dataclasses import dataclass, field

BUCKETS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.5, 2.0)
"""Upper bounds in seconds of the load times' histogram: a small adapter in the page cache up to a large one on disk."""


@dataclass
class LoadTimes:
    """A histogram of load times in seconds."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BUCKETS) + 1))
    total: float = 0.0
    longest: float = 0.0

    def add(self, seconds: float) -> None:
        """Count one load."""
        self.counts[next((i for i, bound in enumerate(BUCKETS) if seconds <= bound), len(BUCKETS))] += 1
        self.total += seconds
        self.longest = max(self.longest, seconds)

    @property
    def count(self) -> int:
        """How many loads."""
        return sum(self.counts)

    def copy(self) -> LoadTimes:
        """One that later loads leave alone."""
        return LoadTimes(list(self.counts), self.total, self.longest)


@dataclass
class PoolStats:
    """State and counts of a pool at one moment.

    Attributes:
        hits: adapters asked for that were in a slot.
        misses: those that were not.
        evictions: adapters that left their slot for another or were evicted by hand.
        failed_loads: loads that raised.
        num_slots: slots of the pool.
        resident: adapters in slots.
        in_use: slots that requests hold.
        pinned: pinned adapters.
        registered: adapters that have a file.
        resident_bytes: bytes of the factors of the adapters in slots, at their own ranks.
        capacity_bytes: bytes of all stacks.
        load_times: of the loads that succeeded, file to slot.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0
    failed_loads: int = 0
    num_slots: int = 0
    resident: int = 0
    in_use: int = 0
    pinned: int = 0
    registered: int = 0
    resident_bytes: int = 0
    capacity_bytes: int = 0
    load_times: LoadTimes = field(default_factory=LoadTimes)

    def prometheus(self) -> str:
        """The numbers in Prometheus' text format, version 0.0.4, each name behind `pylora_pool_`."""
        lines: list[str] = []
        for name, kind, value, text in (
            ("hits_total", "counter", self.hits, "Adapters asked for that were in a slot."),
            ("misses_total", "counter", self.misses, "Adapters asked for that were not in a slot."),
            ("evictions_total", "counter", self.evictions, "Adapters that left their slot."),
            ("failed_loads_total", "counter", self.failed_loads, "Loads that failed."),
            ("slots", "gauge", self.num_slots, "Slots of the pool."),
            ("resident_adapters", "gauge", self.resident, "Adapters in slots."),
            ("slots_in_use", "gauge", self.in_use, "Slots that requests in flight hold."),
            ("pinned_adapters", "gauge", self.pinned, "Pinned adapters."),
            ("registered_adapters", "gauge", self.registered, "Adapters that have a file."),
            ("resident_bytes", "gauge", self.resident_bytes, "Bytes of the adapters in slots."),
            ("capacity_bytes", "gauge", self.capacity_bytes, "Bytes of all stacks."),
        ):
            lines += [f"# HELP pylora_pool_{name} {text}", f"# TYPE pylora_pool_{name} {kind}"]
            lines.append(f"pylora_pool_{name} {value}")
        name = "pylora_pool_load_seconds"
        lines += [f"# HELP {name} Time to bring an adapter from its file into a slot.", f"# TYPE {name} histogram"]
        below = 0
        for bound, count in zip((*BUCKETS, "+Inf"), self.load_times.counts, strict=True):
            below += count
            lines.append(f'{name}_bucket{{le="{bound}"}} {below}')
        lines += [f"{name}_sum {self.load_times.total:.9g}", f"{name}_count {below}"]
        return "\n".join(lines) + "\n"
