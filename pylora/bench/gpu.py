"""Timing on a GPU: by CUDA events, with L2 as the last call left it or emptied before each.

Written without a GPU at hand and not yet run on one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch

from pylora._native import C
from pylora.bench.timing import Figure, no_collector

HOLD_CYCLES = 2_000_000  # about 1 ms at 2 GHz: longer than the host needs to queue what is measured
COLD_FACTOR = 2  # times L2's size that is written to empty it
WARM_UPS = 3  # Triton compiles and tunes in the first, allocators fill


def unusable() -> str:
    """Why nothing can be measured on a GPU here, or ""."""
    if not C.build_info()["cuda_archs"]:
        return "pylora was built without CUDA kernels (PYLORA_CUDA=1 builds them)"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a build for the CPU"
    return "" if torch.cuda.is_available() else "there is no GPU, or no driver for it"


def time_by_events(
    providers: Mapping[str, Callable[..., object]], repeat: int, cold: bool, clock: Any = None
) -> dict[str, Figure]:
    """Milliseconds that the GPU takes for a call of each provider; providers take turns.

    The stream is held up while the host queues the call between two events, so that the time is the GPU's and the gaps
    between a call's kernels are those of a busy stream.

    Args:
        cold: empty L2 before each call, by writing twice its size.
        clock: for tests: what gives events, `hold` and the stream's end; torch.cuda by default.
    """
    device = clock or TorchCuda()
    samples: dict[str, list[float]] = {name: [] for name in providers}
    with no_collector():
        for call in providers.values():
            for _ in range(WARM_UPS):
                call()
        for _ in range(repeat):
            for name, call in providers.items():
                device.hold()
                if cold:
                    device.empty_l2()
                start, end = device.event(), device.event()
                start.record()
                call()
                end.record()
                device.synchronize()
                samples[name].append(start.elapsed_time(end))
    return {name: Figure.of(values) for name, values in samples.items()}


class TorchCuda:
    """What `time_by_events` needs of the current device."""

    def __init__(self) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._eviction = torch.empty(COLD_FACTOR * l2, dtype=torch.uint8, device="cuda")
        self.hold = partial(torch.cuda._sleep, HOLD_CYCLES)
        self.synchronize = torch.cuda.synchronize
        self.event = partial(torch.cuda.Event, enable_timing=True)

    def empty_l2(self) -> None:
        self._eviction.zero_()
