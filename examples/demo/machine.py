"""What the machine offers: how many threads to use, and how much memory this process has used."""

from __future__ import annotations

import math
import os
import resource
import sys
from pathlib import Path

_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")


def default_threads() -> int:
    """What ``OMP_NUM_THREADS`` says, else one thread for each CPU that this process may use."""
    asked = os.environ.get("OMP_NUM_THREADS", "")
    return int(asked) if asked.isdecimal() and int(asked) > 0 else usable_cpus()


def usable_cpus(cgroup_quota: Path = _CGROUP_QUOTA) -> int:
    """CPUs that this process may use: its affinity mask, further limited by a container's CPU quota (cgroup v2).

    A thread more than this does not merely fail to help: OpenMP threads wait for one another at the end of every
    matrix product, so one that is not scheduled holds up all the others.
    """
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup_quota.read_text().split()
        return min(affinity, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup v2 here, or "max": no quota
        return affinity


def peak_memory_gib() -> float:
    """Largest resident set of this process so far, in GiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    return peak * bytes_per_unit / 2**30
