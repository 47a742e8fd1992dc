"""Runs kernels of bugs.cu with one of their faults, for test_sanitizers.py: run_bug.py kernel,kernel bug order."""

from __future__ import annotations

import sys

import torch

from pylora.testing.emulator import Schedule, emulated


def main(kernel: str, bug: int, order: int) -> None:
    shapes = {"stage": ((4, 64), (4, 64)), "fragments": ((16, 16), (16, 8)), "last_block": ((64,), (7, 64))}
    x_shape, y_shape = shapes.get(kernel, ((64,), (64,)))
    x, y = torch.randn(x_shape), torch.zeros(y_shape)
    counter = torch.zeros(1, dtype=torch.int32)
    with emulated(Schedule(order, 4), check_regions=False) as module:
        run = getattr(module.emu_tests, kernel)
        run(bug=bug, offset=1, blocks=6, x=x, y=y, counter=counter)


if __name__ == "__main__":
    for name in sys.argv[1].split(","):
        main(name, int(sys.argv[2]), int(sys.argv[3]))
