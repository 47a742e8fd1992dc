"""Low-rank products of many adapters, the tokens of each adapter side by side: prefill, training.

Maths and numerics: csrc/cpu/segments.h. Definition: reference/sgmv.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pylora._native import C
from pylora.ops.pools import Pool, as_slices, expand_input, fake_v, is_out_first, shrink_result


def sgmv_(
    y: Tensor,
    x: Tensor,
    a_pool: Pool,
    b_pool: Pool,
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
    b_layout: str = "rank_out",
) -> None:
    """Add to each token's row of y the low-rank product of its slot.

    Semantics, for each token t of slot s >= 0; a token of slot -1 keeps its row's bits::

        v = x[t] @ a_pool[s, :ranks[s]].T
        y[t] += scalings[s] * v @ b_pool[s, :ranks[s]]

    Ranks beyond a slot's own are neither read nor computed with. Differentiable in y (through which the gradient
    passes), x and the pools, once. Saved for backward: x, v and the pools.

    Args:
        y: `[num_tokens, out_features]`, written; x's dtype, columns side by side in memory. Of a list of pools, the
            products' columns side by side.
        x: `[num_tokens, in_features]`, float32, bfloat16, float16 or float64.
        a_pool: `[num_slots, max_rank, in_features]`, any of these dtypes, not necessarily x's; or a list of such
            pools, for products that share an input (q, k and v; gate and up).
        b_pool: `[num_slots, max_rank, out_features]`, a_pool's dtype, or as many of them as a_pool; their
            out_features may differ.
        ranks: int32 `[num_slots]`, 0 to max_rank. 0: the slot adds nothing.
        scalings: float32 `[num_slots]`.
        segment_indptr: int32 `[num_segments + 1]`, where each segment starts; from 0 to num_tokens, may stay the same
            (an empty segment).
        segment_slots: int32 `[num_segments]`, -1 to num_slots - 1; a slot may have several segments.
        b_layout: "rank_out", or "out_rank" where b_pool is `[num_slots, out_features, max_rank]`.

    On CUDA ranks, scalings and segments may be on x's device: then nothing is read from it, so that a CUDA graph
    can hold the call, and a replay follows what is there by then. Their values are checked only with PYLORA_CHECK=1,
    which waits for the device; otherwise a token of a slot that does not exist is left alone. A graph keeps the values
    of those that are on the CPU.

    Numerics: sums are f32 (f64 for float64 x) whatever the pools' dtype; y is read, added to and rounded once (once for
    each 512 ranks). A row's bits depend on the row and its slot alone, not on the other rows or on the threads.

    Raises:
        ValueError: a shape, device, rank or slot does not fit; the message names the argument. y is then as it was.
        TypeError: a dtype does not fit.

    Source: Chen et al., "Punica: Multi-Tenant LoRA Serving" (2023), section 4.
    """
    args = (y, x, as_slices(a_pool), as_slices(b_pool), ranks, scalings, segment_indptr, segment_slots)
    out_first = is_out_first("sgmv_", b_layout)
    if torch.compiler.is_compiling():
        torch.ops.pylora.sgmv_(*args, out_first)
    else:
        C.sgmv_(*args, out_first)


def sgmv_shrink(x: Tensor, a_pool: Pool, ranks: Tensor, segment_indptr: Tensor, segment_slots: Tensor) -> Tensor:
    """The first half of `sgmv_`: v, without its derivatives.

    Args:
        x, a_pool, ranks, segment_indptr, segment_slots: as in `sgmv_`.

    Returns:
        v: `[num_tokens, max_rank]`, or `[len(a_pool), num_tokens, max_rank]` of a list; float32, or float64 as x. Zero
        beyond a slot's rank, and for tokens of slot -1.

    Raises: as `sgmv_`, and NotImplementedError where an argument requires a gradient.
    """
    args = (x, as_slices(a_pool), ranks, segment_indptr, segment_slots)
    v = torch.ops.pylora.sgmv_shrink(*args) if torch.compiler.is_compiling() else C.sgmv_shrink(*args)
    return shrink_result(v, a_pool)


def sgmv_expand_(
    y: Tensor,
    v: Tensor,
    b_pool: Pool,
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
    b_layout: str = "rank_out",
) -> None:
    """The second half of `sgmv_`: adds what v gives to y, without its derivatives.

    Args:
        y, b_pool, ranks, scalings, segment_indptr, segment_slots, b_layout: as in `sgmv_`.
        v: as `sgmv_shrink` returns it.

    Raises: as `sgmv_`, and NotImplementedError where an argument requires a gradient.
    """
    args = (y, expand_input(v, b_pool), as_slices(b_pool), ranks, scalings, segment_indptr, segment_slots)
    out_first = is_out_first("sgmv_expand_", b_layout)
    if torch.compiler.is_compiling():
        torch.ops.pylora.sgmv_expand_(*args, out_first)
    else:
        C.sgmv_expand_(*args, out_first)


# What tracing sees in place of the kernels.


@torch.library.register_fake("pylora::sgmv_")
def _fake_add(
    y: Tensor,
    x: Tensor,
    a_pool: list[Tensor],
    b_pool: list[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
    out_first: bool = False,
) -> None:
    return None


@torch.library.register_fake("pylora::sgmv_shrink")
def _fake_shrink(
    x: Tensor, a_pool: list[Tensor], ranks: Tensor, segment_indptr: Tensor, segment_slots: Tensor
) -> Tensor:
    return fake_v(x, a_pool)


@torch.library.register_fake("pylora::sgmv_expand_")
def _fake_expand(
    y: Tensor,
    v: Tensor,
    b_pool: list[Tensor],
    ranks: Tensor,
    scalings: Tensor,
    segment_indptr: Tensor,
    segment_slots: Tensor,
    out_first: bool = False,
) -> None:
    return None
