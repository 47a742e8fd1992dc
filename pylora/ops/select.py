"""Selection by magnitude: what pruning keeps. Contract: csrc/select/select.h. Definition: reference/select.py."""

import torch
from torch import Tensor

from pylora._native import C


def keep_largest(x: Tensor, count: int) -> Tensor:
    """`x` with its `count` numbers of largest magnitude, and zeros.

    Selected by a histogram of the bits instead of sorted. The numbers are those whose indices `torch.topk(x.abs())`
    gives, also among equal magnitudes: where its choice there shows in the result, `torch.topk` itself is called. Not
    differentiable.

    Args:
        x: Any shape and strides, float32, bfloat16, float16 or float64; less than 2**32 numbers on the CPU.
        count: 0 to x.numel().

    Returns:
        x's shape and dtype, contiguous. NaN counts as larger than infinity.

    Raises:
        ValueError: `count` is not in its range.
        TypeError: `x` is not in floating point.
    """
    x = x.detach()
    if torch.compiler.is_compiling():
        return torch.ops.pylora.keep_largest(x, count)
    return C.keep_largest(x, count)


@torch.library.register_fake("pylora::keep_largest")
def _fake_keep_largest(x: Tensor, count: int) -> Tensor:
    return x.new_empty(x.shape)
