"""The benchmark harness behind `pylora bench`; the cases are in `benchmarks/`, or in `cases/` here in a wheel.

A case file calls only what this module exports. How to read and how to write benchmarks: docs/benchmarks.md.
"""

from pylora.bench.benchmark import Benchmark, Point, Sweep, Work, benchmark
from pylora.bench.providers import inference, libraries

__all__ = ["Benchmark", "Point", "Sweep", "Work", "benchmark", "inference", "libraries"]
