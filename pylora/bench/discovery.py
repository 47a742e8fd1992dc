"""Where the cases are: in a checkout's `benchmarks/`, in a wheel's copy of it, or in any file that is named."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterable
from pathlib import Path

from pylora.bench.benchmark import Benchmark, with_group

PACKAGED = Path(__file__).parent / "cases"
CHECKOUT = Path(__file__).parents[2] / "benchmarks"
GROUPS = ("ops", "model", "memory", "serving", "gpu")


def cases_folder() -> Path:
    """The folder with the groups' folders. setup.py copies the checkout's into a wheel."""
    return PACKAGED if PACKAGED.is_dir() else CHECKOUT


def results_folder() -> Path:
    """Where figures are recorded: in a checkout beside the cases, otherwise in the current folder."""
    return Path("bench-results") if PACKAGED.is_dir() else CHECKOUT / "results"


def discover(extra: Iterable[Path] = ()) -> dict[str, Benchmark]:
    """All benchmarks by name, group by group, and those of the `extra` files.

    Raises:
        FileNotFoundError: a file is missing, or this installation has no cases.
        ValueError: two files use one name, or an extra file defines no benchmark.
    """
    folder = cases_folder()
    files = [path for group in GROUPS for path in sorted((folder / group).glob("bench_*.py"))]
    if not files:
        raise FileNotFoundError(f"pylora bench: cases: expected files {folder}/ops/bench_*.py, got none")
    found: dict[str, Benchmark] = {}
    for path in [*files, *extra]:
        loaded = load(path)
        if not loaded and path not in files:
            raise ValueError(f"pylora bench: --file: expected a function under @benchmark in {path}, got none")
        for item in loaded:
            if item.name in found:
                raise ValueError(f"pylora bench: {path}: expected a new name, got {item.name!r}, which is taken")
            found[item.name] = item
    return found


def load(path: Path) -> list[Benchmark]:
    """The benchmarks of one file, which is imported under a name of its own; the group is its folder's name."""
    if not path.is_file():
        raise FileNotFoundError(f"pylora bench: --file: expected a file of cases, got {path}")
    group = path.resolve().parent.name
    name = f"pylora_bench_{group}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError(f"pylora bench: --file: expected a Python file, got {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses and pickling look their module up
    spec.loader.exec_module(module)
    return [with_group(value, group) for value in vars(module).values() if isinstance(value, Benchmark)]
