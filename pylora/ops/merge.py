"""Adapters merged into a base weight in place, and out of it again bit for bit.

Maths, numerics and the log's format: csrc/merge/README.md and merge.h. Definition: reference/merge.py.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora._native import C


def _plain(w: Tensor, *factors: Sequence[Tensor]) -> tuple[Tensor, list[list[Tensor]]]:
    # Merging is not differentiated. A detached tensor shares the version counter.
    return w.detach(), [[each.detach() for each in group] for group in factors]


def _scales(row_scales: Sequence[Tensor | None] | None) -> list[Tensor | None]:
    return [] if row_scales is None else [None if scale is None else scale.detach() for scale in row_scales]


def merge_(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None] | None = None,
    log: bool = True,
) -> Tensor:
    """Add adapters to a weight, in place.

    Semantics, for one adapter after another, rounded once at the end::

        w = (w + scaling * b @ a) * row_scale[:, None]

    Args:
        w: `[out_features, in_features]`, or a stack `[n, out_features, in_features]`, on the CPU or a GPU; float32,
            bfloat16, float16 or float64; a stride of 1 in one of the last two dimensions (a weight stored `[in, out]`
            comes as a transposed view). Written.
        a: for each adapter `[rank, in_features]` (`[n, rank, in_features]`), rank at least 1; float32, bfloat16,
            float16 or float64, not necessarily w's dtype, any strides.
        b: for each adapter `[out_features, rank]` (`[n, out_features, rank]`), the dtype of its a.
        scalings: a number for each adapter.
        row_scales: for each adapter `[out_features]` or None; None for no scales at all.
        log: whether to make the undo log.

    Returns:
        The undo log for `unmerge_`, uint8, on w's device; empty without `log`.

    Numerics: the sums are f32 (f64 for float64 w) in a fixed order, so that the bits do not depend on threads; sets of
    instructions with fused multiply-adds agree with one another in every bit, and with a GPU for float32 and float64.
    Of 16-bit w on a GPU, bits are those of its architecture's tensor cores.

    Raises:
        ValueError: a shape, device or stride does not fit; the message names the argument and both values.
        TypeError: a dtype does not fit.
        RuntimeError: memory ran out. w is as it was in all cases.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), section 4.1; row scales: Liu et al.,
    "DoRA" (2024), equation 5.
    """
    w, (a, b) = _plain(w, a, b)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.merge_(w, a, b, list(scalings), _scales(row_scales), log)
    return C.merge_(w, a, b, scalings, _scales(row_scales), log)


def unmerge_(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None] | None = None,
    log: Tensor | None = None,
) -> None:
    """Take adapters out of a weight that `merge_` put in, in place.

    Args:
        w, a, b, scalings, row_scales: as in the `merge_` that is undone, with the same values.
        log: what it returned, on the device that w was on: w gets the bits it had before, whatever they were, also with
            another instruction set or number of threads. None: by subtraction, rounded once, so that bits may differ.

    Raises:
        ValueError: as `merge_`; the log is not that of such a weight; or w has not the values that the merge left (each
            4,096 of them have a checksum in the log).
        TypeError: a dtype does not fit.
        NotImplementedError: the log was made with fused multiply-adds, and this machine has none (or the other way); on
            a GPU, and w is on the CPU (or the other way); or by tensor cores of another architecture. w is as it was
            in all cases.
    """
    w, (a, b) = _plain(w, a, b)
    if torch.compiler.is_compiling():
        torch.ops.pylora.unmerge_(w, a, b, list(scalings), _scales(row_scales), log)
        return
    C.unmerge_(w, a, b, scalings, _scales(row_scales), log)


def swap_(
    w: Tensor,
    old_a: Sequence[Tensor],
    old_b: Sequence[Tensor],
    old_scalings: Sequence[float],
    old_row_scales: Sequence[Tensor | None] | None,
    old_log: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None] | None = None,
    log: bool = True,
) -> Tensor:
    """`unmerge_` of the old adapters and `merge_` of others, in one pass over w and with the same bits.

    Args:
        w: as in `merge_`.
        old_a, old_b, old_scalings, old_row_scales, old_log: as in `unmerge_`.
        a, b, scalings, row_scales, log: as in `merge_`.

    Returns, Raises: as the two.
    """
    w, (old_a, old_b, a, b) = _plain(w, old_a, old_b, a, b)
    old_scales, scales = _scales(old_row_scales), _scales(row_scales)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.swap_(
            w, old_a, old_b, list(old_scalings), old_scales, old_log, a, b, list(scalings), scales, log
        )
    return C.swap_(w, old_a, old_b, old_scalings, old_scales, old_log, a, b, scalings, scales, log)


def merge_is_finite(
    w: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_scales: Sequence[Tensor | None] | None = None,
) -> bool:
    """Whether `merge_` with these arguments would write finite values only. Writes nothing.

    Args, Raises: as `merge_`.
    """
    w, (a, b) = _plain(w, a, b)
    return C.merge_is_finite(w, a, b, scalings, _scales(row_scales))


def _new_log(w: Tensor) -> Tensor:
    # How long the log is depends on the values.
    size = torch.library.get_ctx().new_dynamic_size()
    return w.new_empty((size,), dtype=torch.uint8)


@torch.library.register_fake("pylora::merge_")
def _fake_merge(
    w: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    row_scales: list[Tensor | None],
    log: bool = True,
) -> Tensor:
    return _new_log(w) if log else w.new_empty((0,), dtype=torch.uint8)


@torch.library.register_fake("pylora::unmerge_")
def _fake_unmerge(
    w: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    row_scales: list[Tensor | None],
    log: Tensor | None,
) -> None:
    return None


@torch.library.register_fake("pylora::swap_")
def _fake_swap(
    w: Tensor,
    old_a: list[Tensor],
    old_b: list[Tensor],
    old_scalings: list[float],
    old_row_scales: list[Tensor | None],
    old_log: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    row_scales: list[Tensor | None],
    log: bool = True,
) -> Tensor:
    return _new_log(w) if log else w.new_empty((0,), dtype=torch.uint8)
