"""What a figure has to be read with: facts about the machine, and the limits it is measured to have."""

from __future__ import annotations

import functools
import importlib.metadata
import os
import platform
import subprocess
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from pylora._native import C
from pylora.ops.cost import Cost

CACHE_BYTES = 8 * 2**20  # read out of the last-level cache: beyond a core's own, within a server's share of L3
MEMORY_BYTES = 256 * 2**20  # read out of main memory: beyond every cache
GEMM_SIZES = ((1024, 1024), (2048, 1024))


@dataclass(frozen=True)
class Limits:
    """Measured rates of this machine with the threads in use.

    Attributes:
        gemm_gflop_s: f32 product of two square matrices, 10⁹ operations a second.
        cache_gb_s: read rate over 8 MiB, 10⁹ bytes a second.
        memory_gb_s: read rate over 256 MiB.
    """

    gemm_gflop_s: float
    cache_gb_s: float
    memory_gb_s: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)

    def read_gb_s(self, nbytes: int) -> float:
        """The rate for work that touches `nbytes` again and again, as a benchmark does: the cache's while they fit."""
        return self.cache_gb_s if nbytes <= _last_level_cache() else self.memory_gb_s

    def milliseconds(self, cost: Cost) -> float:
        """No call of this cost can take less on this machine (f32 arithmetic)."""
        return max(cost.flops / self.gemm_gflop_s, cost.bytes / self.read_gb_s(cost.bytes)) / 1e6


def facts() -> dict[str, Any]:
    """CPU, instruction set, threads, commit, versions."""
    commit, dirty = _commit()
    return {
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "isa": C.cpu_isa(),
        "commit": commit,
        "uncommitted_changes": dirty,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "load": round(os.getloadavg()[0], 2),
        "versions": {"python": platform.python_version()}
        | {name: _version(name) for name in ("pylora", "torch", "peft")},
    }


def describe(facts: dict[str, Any]) -> str:
    """One line: what a table or a plot was made with."""
    versions = facts["versions"]
    peft = f", PEFT {versions['peft']}" if versions["peft"] else ""
    gpu = f"{facts['gpu']}, " if facts.get("gpu") else ""
    return (
        f"{gpu}{facts['cpu']}, {facts['isa']}, {facts['threads']} thread{'s' * (facts['threads'] != 1)}, "
        f"torch {versions['torch']}{peft}, pylora {versions['pylora']} {facts['commit']}".rstrip()
    )


def probe(repeat: int = 7) -> Limits:
    """Measure the limits, in about a second a thread: the best of several runs counts."""
    return Limits(_gemm_gflop_s(repeat), _read_gb_s(CACHE_BYTES, repeat * 10), _read_gb_s(MEMORY_BYTES, repeat))


def _gemm_gflop_s(repeat: int) -> float:
    best = 0.0
    for size, inner in GEMM_SIZES:
        left, right, out = (torch.randn(size, inner), torch.randn(inner, size), torch.empty(size, size))
        seconds = _best_seconds(functools.partial(torch.mm, left, right, out=out), repeat)
        best = max(best, 2 * size * size * inner / seconds / 1e9)
    return best


def _read_gb_s(nbytes: int, repeat: int) -> float:
    """Reads a matrix once a call: as a matrix-vector product and as a sum, of which one suits the machine better."""
    columns = 2048
    matrix, vector = torch.ones(nbytes // 4 // columns, columns), torch.ones(columns)
    out = torch.empty(matrix.shape[0])
    calls: tuple[Callable[[], object], ...] = (lambda: torch.mv(matrix, vector, out=out), lambda: torch.sum(matrix))
    return nbytes / min(_best_seconds(call, repeat) for call in calls) / 1e9


def _best_seconds(call: Callable[[], object], repeat: int) -> float:
    best = float("inf")
    with torch.inference_mode():
        for _ in range(repeat + 1):
            start = time.perf_counter()
            call()
            best = min(best, time.perf_counter() - start)
    return best


def _last_level_cache() -> int:
    """Bytes of the largest cache of CPU 0; 32 MiB where it is not told."""
    sizes = []
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = path.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20}[text[-1]])
    return max(sizes, default=32 * 2**20)


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    return next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())


def _commit() -> tuple[str, bool]:
    """The commit of the checkout that pylora is imported from and whether it was edited since; "" in a wheel."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(Path(__file__).parents[2]), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        if "site-packages" in Path(__file__).parts:
            return "", False
        return git("rev-parse", "--short", "HEAD"), bool(git("status", "--porcelain", "--", "pylora", "csrc"))
    except (OSError, subprocess.CalledProcessError):
        return "", False


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
