"""The merge ops as their definitions (csrc/merge/merge.h), in f64."""

from collections.abc import Sequence

from torch import Tensor


def merge(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None] | None = None,
) -> Tensor:
    """(w + scaling * b a) * row_scale for one adapter after another, f64."""
    total = w.double()
    for i, scaling in enumerate(scalings):
        total = total + scaling * (b[i].double() @ a[i].double())
        scale = row_scales[i] if row_scales else None
        if scale is not None:
            total = total * scale.double().unsqueeze(-1)
    return total
