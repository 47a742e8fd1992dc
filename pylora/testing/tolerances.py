"""How far a result may lie from its f64 reference, by dtype and by the length of the sums behind it."""

import math

import torch
from torch import Tensor

UNIT_ROUNDOFF = {
    torch.float64: 2.0**-53,
    torch.float32: 2.0**-24,
    torch.bfloat16: 2.0**-8,
    torch.float16: 2.0**-11,
}


def tolerance(dtype: torch.dtype, length: int, roundings: int = 2, sums_in: torch.dtype | None = None) -> float:
    """Allowed error as a share of the result's magnitude.

    Args:
        dtype: storage type of the result.
        length: terms of the longest sum. Random signs let its error grow as the square root; 4 is the margin.
        roundings: how often a result is rounded to its storage type (a base product, then the sum with the delta).
        sums_in: type the sums are taken in; by default f64 for float64 and f32 for all others.
    """
    accumulator = UNIT_ROUNDOFF[sums_in or (torch.float64 if dtype == torch.float64 else torch.float32)]
    return roundings * UNIT_ROUNDOFF[dtype] + 4.0 * math.sqrt(max(length, 1)) * accumulator


def assert_near(
    actual: Tensor,
    expected: Tensor,
    length: int,
    what: str = "result",
    magnitude: Tensor | None = None,
    roundings: int = 2,
    sums_in: torch.dtype | None = None,
) -> None:
    """Fails unless every element of `actual` is within `tolerance` of the f64 tensor `expected`.

    Args:
        magnitude: per element, the sum of the magnitudes of its terms (the reference on absolute values), which is what
            a rounding error is relative to where terms cancel; by default the largest magnitude of `expected`.
    """
    assert actual.shape == expected.shape, f"{what}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    if actual.numel() == 0:
        return
    assert bool(torch.isfinite(actual).all()), f"{what}: not finite"
    scale = expected.abs().max() if magnitude is None else magnitude
    smallest = torch.finfo(actual.dtype).smallest_normal * torch.finfo(actual.dtype).eps
    limit = tolerance(actual.dtype, length, roundings, sums_in) * scale + roundings * smallest
    excess = (actual.double() - expected).abs() / limit
    worst = int(excess.argmax())
    assert excess.flatten()[worst] <= 1.0, (
        f"{what}: element {worst}: {actual.flatten()[worst].item():.9g}, expected "
        f"{expected.flatten()[worst].item():.9g}, {excess.flatten()[worst].item():.3g} x the allowed error"
    )
