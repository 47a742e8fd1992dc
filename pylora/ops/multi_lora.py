"""Layers for a batch whose rows use different adapters: a dense one, fused with the base product, an
embedding and a convolution.

Maths and numerics: csrc/cpu/segments.h, csrc/multi_lora/README.md. Definition: reference/multi_lora.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from pylora._native import C
from pylora.ops.lora import draw_rng
from pylora.ops.plan import BatchPlan


class AdapterPools(NamedTuple):
    """The adapters of one layer, by slot: references to their factors, not copies, so that no change is missed.

    Attributes:
        a: Of each slot, `[rank, in_features]`. Ranks and dtypes may differ between slots.
        b: Of each slot, `[out_features, rank]`, the dtype of its a.
        scalings: A number for each slot.
        dropout_p: Probability of dropping an element of a slot's input, for each slot; empty for none.
    """

    a: Sequence[Tensor]
    b: Sequence[Tensor]
    scalings: Sequence[float]
    dropout_p: Sequence[float] = ()

    @staticmethod
    def stacked(a_pool: Tensor, b_pool: Tensor, ranks: Sequence[int], scalings: Sequence[float]) -> AdapterPools:
        """Pools in the layout of `sgmv_` ([num_slots, max_rank, in], [num_slots, max_rank, out]) as views."""
        a = [pool[:rank] for pool, rank in zip(a_pool, ranks, strict=True)]
        b = [pool[:rank].t() for pool, rank in zip(b_pool, ranks, strict=True)]
        return AdapterPools(a, b, scalings)


def multi_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, pools: AdapterPools, plan: BatchPlan, rng: Tensor | None = None
) -> Tensor:
    """A linear layer for a batch of rows with different adapters.

    Semantics, for row i of slot s (of slot -1: the base product alone)::

        v = drop_s(x[i]) @ pools.a[s].T
        y[i] = x[i] @ weight.T + bias + pools.scalings[s] * v @ pools.b[s].T

    Differentiable in x, weight, bias and the factors, once. The gradient of an adapter that no row uses is zero. Saved
    for backward: x, v and `rng`. Dropout as in `lora_linear`: an element's bits depend on its row in x, its column and
    `rng` alone.

    Args:
        x: `[num_rows, ..., in_features]`, float32, bfloat16, float16 or float64: rows are tokens, or sequences of any
            length.
        weight: `[out_features, in_features]`, x's dtype, any strides.
        bias: `[out_features]`, x's dtype, or None.
        pools: The adapters, by slot.
        plan: The slots of the rows, shared by all layers of a batch. On x's CUDA device (`BatchPlan.to`) it is not
            checked but with PYLORA_CHECK=1, and a CUDA graph that holds the call follows it.
        rng: int64 `[2]`, as from `draw_rng`; drawn here if None and a probability is not 0.

    Returns:
        y: `[num_rows, ..., out_features]`, x's dtype, contiguous.

    Numerics: as `lora_linear`; the low-rank part of a row has the same bits whatever rows are beside it.

    Raises:
        ValueError: a shape, slot or number of rows does not fit; the message names the argument.
        TypeError: a dtype does not fit.
    """
    dropout_p = pools.dropout_p
    if rng is None and any(dropout_p):
        rng = draw_rng(x.device)
    call = torch.ops.pylora.multi_lora_linear if torch.compiler.is_compiling() else C.multi_lora_linear
    return call(x, weight, bias, pools.a, pools.b, pools.scalings, dropout_p, rng, *plan)


def multi_lora_embedding_(
    y: Tensor, tokens: Tensor, pools: AdapterPools, plan: BatchPlan, padding_idx: int | None = None
) -> None:
    """Add each row's adapter to an embedding's output.

    Semantics, for row i of slot s (a row of slot -1 keeps its bits)::

        y[i] += pools.scalings[s] * pools.a[s][:, tokens[i]].T @ pools.b[s].T

    Differentiable in y and the factors, once, in eager calls. The gradient of an adapter that no row uses is zero.
    Saved for backward: tokens and the factors.

    Args:
        y: `[num_rows, ..., embedding_dim]`, contiguous, float32, bfloat16, float16 or float64: what the embedding
            returned; no leaf that requires grad.
        tokens: `[num_rows, ...]`, int64 or int32: what it was called with.
        pools: The adapters, by slot; a is `[rank, num_embeddings]`, b `[embedding_dim, rank]`. Without dropout.
        plan: The slots of the rows, shared by all layers of a batch.
        padding_idx: A token that gives a no gradient.

    Numerics: sums over the rank are f32 (f64 for float64); y is rounded once. What is added to a row has the same bits
    whatever rows are beside it.

    Raises:
        ValueError: a shape, slot or number of rows does not fit; the message names the argument. y is as it was.
        TypeError: a dtype does not fit.
        IndexError: a token is not in the adapters' tables.
    """
    _refuse_dropout("multi_lora_embedding_", pools)
    args = (y, tokens, pools.a, pools.b, pools.scalings, *plan, -1 if padding_idx is None else padding_idx)
    if torch.compiler.is_compiling():
        torch.ops.pylora.multi_lora_embedding_(*args)
    else:
        C.multi_lora_embedding_(*args)


def multi_lora_conv_(
    y: Tensor,
    x: Tensor,
    pools: AdapterPools,
    plan: BatchPlan,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> None:
    """Add each row's adapter to a convolution's output, of one, two or three spatial dimensions.

    Semantics, for row i of slot s (a row of slot -1 keeps its bits)::

        v = conv(x[i], pools.a[s], stride, padding, dilation)
        y[i] += pools.scalings[s] * conv(v, pools.b[s], groups=groups)

    Differentiable in y, x and the factors, once, in eager calls. The gradient of an adapter that no row uses is zero.
    Saved for backward: x and the factors.

    Args:
        y: `[num_rows, out_channels, *positions]`, contiguous, float32, bfloat16, float16 or float64: what the
            convolution returned; no leaf that requires grad.
        x: `[num_rows, in_channels, *sizes]`, y's dtype.
        pools: The adapters, by slot; a is `[rank, in_channels, *kernel]`, b `[out_channels, rank / groups, 1, ...]`.
            Without dropout.
        plan: The slots of the rows, shared by all layers of a batch.
        stride, padding, dilation: How a slides; a number for each spatial dimension. Zeros pad both sides.
        groups: Of b.

    Numerics: csrc/cpu/segments_conv.h. Sums are f32 (f64 for float64); y is rounded once. What is added to a row has
    the same bits whatever rows are beside it.

    Raises:
        ValueError: a shape, slot or number of rows does not fit; the message names the argument. y is as it was.
        TypeError: a dtype does not fit.
    """
    _refuse_dropout("multi_lora_conv_", pools)
    call = torch.ops.pylora.multi_lora_conv_ if torch.compiler.is_compiling() else C.multi_lora_conv_
    call(y, x, pools.a, pools.b, pools.scalings, *plan, stride, padding, dilation, groups)


def _refuse_dropout(op: str, pools: AdapterPools) -> None:
    if any(pools.dropout_p):
        raise ValueError(f"{op}: pools: expected no dropout, got probabilities {list(pools.dropout_p)}")


# What tracing sees in place of the kernels.


@torch.library.register_fake("pylora::multi_lora_linear")
def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    dropout: list[float],
    rng: Tensor | None,
    order: Tensor,
    indptr: Tensor,
    slots: Tensor,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pylora::multi_lora_linear_forward")
def _fake_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    dropout: list[float],
    rng: Tensor | None,
    order: Tensor,
    indptr: Tensor,
    slots: Tensor,
) -> tuple[Tensor, Tensor]:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    v = x.new_empty((rows, max((each.shape[0] for each in a), default=0)), dtype=dtype)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), v


@torch.library.register_fake("pylora::multi_lora_linear_backward")
def _fake_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    v: Tensor,
    a: list[Tensor],
    b: list[Tensor],
    scalings: list[float],
    dropout: list[float],
    rng: Tensor | None,
    order: Tensor,
    indptr: Tensor,
    slots: Tensor,
    need_x: bool,
    need_factors: bool,
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    dx = dy.new_empty(x.shape if need_x else (0,))
    if not need_factors:
        return dx, [], []
    return dx, _like(a), _like(b)


@torch.library.register_fake("pylora::multi_lora_embedding_")
@torch.library.register_fake("pylora::multi_lora_conv_")
def _fake_in_place(y: Tensor, *arguments: object) -> None:
    return None


@torch.library.register_fake("pylora::multi_lora_embedding_backward")
def _fake_embedding_backward(
    dy: Tensor, tokens: Tensor, a: list[Tensor], b: list[Tensor], *arguments: object
) -> tuple[list[Tensor], list[Tensor]]:
    return _like(a), _like(b)


@torch.library.register_fake("pylora::multi_lora_conv_backward")
def _fake_conv_backward(
    dy: Tensor, x: Tensor, a: list[Tensor], b: list[Tensor], *arguments: object
) -> tuple[Tensor, list[Tensor], list[Tensor]]:
    need_x = arguments[-1]
    return x.new_empty(x.shape if need_x else (0,)), _like(a), _like(b)


def _like(factors: list[Tensor]) -> list[Tensor]:
    return [each.new_empty(each.shape) for each in factors]
