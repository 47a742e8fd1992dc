"""torch's uniform random numbers on the CPU. Method: csrc/uniform/README.md. Definition: reference/uniform.py."""

import torch
from torch import Tensor

from pylora._native import C


def uniform_(out: Tensor, bound: float, skip: int = 0) -> None:
    """Fill `out` as `out.uniform_(-bound, bound)` does, from torch's default generator, after passing over numbers.

    Bit for bit what torch draws: a seed gives the same numbers, and the generator is left where torch leaves it. Not
    differentiable.

    Args:
        out: Any shape; float32, bfloat16, float16 or float64. Written. Contiguous float32 on the CPU is filled by a
            kernel, anything else by torch, from the generator of its device.
        bound: From 0 on; 2 * bound has to be an f32 number.
        skip: How many numbers to pass over before, as `torch.empty(skip).uniform_()` on the CPU would.

    Raises:
        ValueError: `bound` or `skip` is not in its range.
        TypeError: `out` is not in floating point.
    """
    out = out.detach()
    if torch.compiler.is_compiling():
        torch.ops.pylora.uniform_(out, bound, skip)
    else:
        C.uniform_(out, bound, skip)


@torch.library.register_fake("pylora::uniform_")
def _fake_uniform(out: Tensor, bound: float, skip: int = 0) -> None:
    return None
