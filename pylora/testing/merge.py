"""Weights and adapters for tests of merging, and what their results are held to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.ops.reference import merge as reference
from pylora.testing.tolerances import assert_near

WORDS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(w: Tensor) -> Tensor:
    """Elements as integers; a view where w is contiguous."""
    return w.contiguous().view(WORDS[w.element_size()])


def changed_bits(w: Tensor, before: Tensor) -> int:
    """Elements that differ in any bit."""
    return int((bits(w) != bits(before)).sum())


def copy(w: Tensor) -> Tensor:
    """A copy with w's strides."""
    return w.clone(memory_format=torch.preserve_format)


def weight(
    out: int,
    inp: int,
    dtype: torch.dtype,
    stack: Sequence[int] = (),
    transposed: bool = False,
    special: bool = True,
    seed: int = 0,
) -> Tensor:
    """Normal values and, with `special`, zeros of either sign, NaNs of several kinds, infinities, the extremes."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(*stack, out, inp, generator=generator, dtype=torch.float64).to(dtype)
    if special:
        flat, limits = w.view(-1), torch.finfo(dtype)
        values = [-0.0, 0.0, float("nan"), -float("nan"), float("inf"), -float("inf"), limits.max, limits.min]
        values += [limits.tiny, -limits.tiny, limits.tiny * limits.eps]
        for i, value in enumerate(values[: flat.numel()]):
            flat[i * max(flat.numel() // len(values), 1) % flat.numel()] = value
        bits(w).view(-1)[-1] ^= 1
    return w.mT.contiguous().mT if transposed else w


def adapter(
    out: int,
    inp: int,
    rank: int,
    share: float = 0.02,
    dtype: torch.dtype = torch.float32,
    stack: Sequence[int] = (),
    seed: int = 1,
) -> tuple[Tensor, Tensor]:
    """Factors whose product has about `share` of a normal weight's size; a row of the product is zero."""
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(*stack, rank, inp, generator=generator, dtype=torch.float64)
    b = torch.randn(*stack, out, rank, generator=generator, dtype=torch.float64) * share / rank**0.5
    b[..., out // 2, :] = 0
    return a.to(dtype), b.to(dtype)


def check_values(
    w: Tensor,
    before: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None] | None = None,
    factor_error: float = 0.0,
) -> None:
    """Fails unless w is what the definition makes of `before`, where that is finite and no overflow is near.

    Args:
        factor_error: by how much of the magnitudes that a delta sums the kernel's own delta may be wrong.
    """
    finite = before.isfinite()
    magnitudes = [x.abs() for x in a], [x.abs() for x in b], [abs(s) for s in scalings]
    scales = row_scales and [s if s is None else s.abs() for s in row_scales]
    size = reference.merge(before.abs(), *magnitudes, scales)
    fits = finite & (size < 0.9 * torch.finfo(w.dtype).max)
    expected = reference.merge(before, a, b, scalings, row_scales)
    if factor_error:
        delta = reference.merge(torch.zeros_like(before, dtype=torch.float64), *magnitudes, scales)
        allowed = factor_error * delta[fits]
        actual = w[fits].double()
        nearest = torch.clamp(expected[fits], actual - allowed, actual + allowed)
    else:
        nearest = expected[fits]
    rank = sum(x.shape[-2] for x in a)
    assert_near(w[fits], nearest, rank, "w", size[fits], roundings=1)
