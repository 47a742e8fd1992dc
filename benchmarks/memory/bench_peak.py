"""What a training step adds to the resident memory of its process, as the system counts it."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from pylora.bench import Sweep, Work, benchmark, libraries

RANK = 16


def stack(library: Any, width: int, layers: int, dropout: float) -> nn.Module:
    """Dense layers one behind another, each adapted by `library`; bare where that is None."""
    torch.manual_seed(0)
    base = nn.Sequential(*(nn.Linear(width, width, bias=False) for _ in range(layers))).requires_grad_(False)
    if library is None:
        return base
    names = [str(i) for i in range(layers)]
    config = library.LoraConfig(r=RANK, target_modules=names, lora_dropout=dropout, init_lora_weights=False)
    return library.get_peft_model(base, config).train()


def step(model: nn.Module, rows: int, width: int) -> float:
    """One forward and backward; the loss."""
    x = torch.randn(rows, width, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = model(x).square().mean()
    loss.backward()
    return loss.item()


def resident(field: str) -> float:
    """VmRSS, or its peak VmHWM, of this process in 10^6 bytes (proc(5))."""
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition(f"{field}:")[2].split()[0]) * 1024 / 1e6


def grown_megabytes(provider: str, rows: int, width: int, layers: int, dropout: float) -> float:
    """10^6 bytes by which the step raises the peak of a process that has made one on a single row before."""
    arguments = json.dumps([provider, rows, width, layers, dropout])
    done = subprocess.run([sys.executable, __file__, arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"peak_memory: {provider}: the process failed:\n{done.stderr}")
    return float(done.stdout)


@benchmark(
    base="the bare layers",
    unit="MB",
    table=({"dropout": 0.0}, {"dropout": 0.1}),
    sweeps=[Sweep("rows", (256, 1024, 2048), {"dropout": 0.1})],
)
def peak_memory(rows: int = 1024, width: int = 1024, layers: int = 16, dropout: float = 0.1) -> Work:
    """What a training step of 16 layers adds to the peak memory of its process (f32, rank 16)."""
    names = ["base", *libraries()]

    def check() -> None:
        losses = [
            step(stack(library, width, 2, 0.0), 8, width) for library in libraries().values()
        ]  # without dropout, whose masks differ
        for loss in losses:
            assert abs(loss - losses[0]) <= 1e-4 * abs(losses[0]), losses

    providers: dict[str, Callable[..., object]] = {
        name: (lambda name=name: grown_megabytes(name, rows, width, layers, dropout)) for name in names
    }
    return Work(providers, check, inner=1)


def main() -> None:
    provider, rows, width, layers, dropout = json.loads(sys.argv[1])
    torch.set_num_threads(1)
    model = stack(None if provider == "base" else importlib.import_module(provider), width, layers, dropout)
    step(model, 1, width)

    Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak so far is forgotten
    before = resident("VmRSS")
    step(model, rows, width)
    print(resident("VmHWM") - before)


if __name__ == "__main__":
    main()
