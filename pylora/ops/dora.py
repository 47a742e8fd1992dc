"""DoRA: the norms of the rows of W + scaling * B A, and a linear layer with a factor magnitude / norm on each output.

Maths, numerics and what is kept: csrc/dora/README.md, dora.h and kept_norms.h. Definition: reference/dora.py.
"""

import torch
from torch import Tensor

from pylora._native import C
from pylora.ops.lora import draw_rng

KeptNorms = C.KeptNorms


def dora_row_squares(weight: Tensor) -> Tensor:
    """The sum of the squares of each row: what of the norms stays while the adapter trains.

    Args:
        weight: `[out, in]`, float32, bfloat16, float16 or float64, any strides.

    Returns:
        `[out]`, float64. No gradient flows through it.

    Raises:
        ValueError, TypeError: as `dora_row_norms`.
    """
    if torch.compiler.is_compiling():
        return torch.ops.pylora.dora_row_squares(weight)
    return C.dora_row_squares(weight)


def dora_row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The Euclidean norm of each row of weight + scaling * b @ a, without a matrix of that size.

    Args:
        weight: `[out, in]`, float32, bfloat16, float16 or float64, any strides.
        a: `[rank, in]`, rank at least 1, any of these dtypes, any strides.
        b: `[out, rank]`, a's dtype.
        scaling: factor of the product.

    Returns:
        `[out]`, float64. No gradient flows through it, as in the paper (section 4.3).

    Numerics: elements in f32 (f64 for a float64 weight), squares summed in f64; a relative error of a few 1e-7. Rows of
    which the product leaves less than a thousandth of |weight|^2 are computed in f64.

    Raises:
        ValueError: a shape or device does not fit; the message names the argument and both values.
        TypeError: a dtype does not fit.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024).
    """
    if torch.compiler.is_compiling():
        return torch.ops.pylora.dora_row_norms(weight, a, b, scaling)
    return C.dora_row_norms(weight, a, b, scaling)


def dora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """A linear layer with one DoRA adapter.

    Semantics::

        factor = magnitude / norms
        y = factor * (drop(x) @ weight.T + scaling * drop(x) @ a.T @ b.T) + (x - drop(x)) @ weight.T + bias

    drop() is that of `lora_linear`; without dropout the third term is absent. The norm is rounded to magnitude's dtype,
    and a norm of 0 counts as 1. Differentiable in x, weight, bias, a, b and magnitude, twice as well, the norms being
    constants. Saved for backward: x, `[num_tokens, rank + out]` numbers, the norms and `rng`. Forward-mode
    differentiation raises NotImplementedError.

    Args:
        x: `[..., in]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[out, in]`, x's dtype, any strides.
        bias: `[out]`, x's dtype, or None.
        a: `[rank, in]`, any of these dtypes, not necessarily x's.
        b: `[out, rank]`, a's dtype.
        magnitude: `[out]`, any of these dtypes.
        norms: `[out]`, float64, as from `dora_row_norms`.
        scaling: factor of the low-rank product.
        dropout_p: probability in [0, 1]; in evaluation pass 0.
        rng: int64 `[2]` on x's device, as from `draw_rng`; drawn here if None.

    Returns:
        y: `[..., out]`, x's dtype, contiguous.

    Numerics: as `lora_linear`, and one more rounding of each of the products to x's dtype before the factor.

    Raises:
        ValueError: a shape, device or probability does not fit; the message names the argument and both values.
        TypeError: a dtype does not fit.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (2024); dropout as in PEFT 0.21.
    """
    if dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.dora_linear(x, weight, bias, a, b, magnitude, norms, scaling, dropout_p, rng)
    return C.dora_linear(x, weight, bias, a, b, magnitude, norms, scaling, dropout_p, rng)


def dora_linear_norms(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    squares: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`dora_linear` with the norms computed on the way: with A as further tokens of the base product, W is read once.

    Args:
        x, weight, bias, a, b, magnitude, scaling, dropout_p, rng: as in `dora_linear`.
        squares: `[out]`, float64, as from `dora_row_squares`; computed if needed and None.

    Returns:
        y as of `dora_linear`, and the norms, `[out]`, float64, without a gradient. They agree with those of
        `dora_row_norms` to a few 1e-7 (1e-5 where the product cancels most of a row), not bit for bit.

    Raises: as `dora_linear`.
    """
    if dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.dora_linear_norms(x, weight, bias, a, b, magnitude, squares, scaling, dropout_p, rng)
    return C.dora_linear_norms(x, weight, bias, a, b, magnitude, squares, scaling, dropout_p, rng)


# What tracing sees in place of the kernels: shapes and dtypes alone.


def _check_devices(op: str, like_name: str, like: Tensor, **others: Tensor | None) -> None:
    # A meta tensor beside a real one brings the call here instead of to the kernels' checks.
    for name, tensor in others.items():
        if tensor is not None and tensor.device != like.device:
            raise ValueError(f"{op}: {name}: expected the device of {like_name}, {like.device}, got {tensor.device}")


def _per_row(weight: Tensor) -> Tensor:
    return weight.new_empty((weight.shape[0],), dtype=torch.float64)


def _accumulator(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


@torch.library.register_fake("pylora::dora_row_squares")
def _fake_row_squares(weight: Tensor) -> Tensor:
    return _per_row(weight)


@torch.library.register_fake("pylora::dora_row_norms")
def _fake_row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    _check_devices("dora_row_norms", "weight", weight, a=a, b=b)
    return _per_row(weight)


@torch.library.register_fake("pylora::dora_linear")
def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    others = {"weight": weight, "bias": bias, "a": a, "b": b, "magnitude": magnitude, "norms": norms, "rng": rng}
    _check_devices("dora_linear", "x", x, **others)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pylora::dora_linear_norms")
def _fake_linear_norms(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    squares: Tensor | None,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    others = {"weight": weight, "bias": bias, "a": a, "b": b, "magnitude": magnitude, "squares": squares, "rng": rng}
    _check_devices("dora_linear_norms", "x", x, **others)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _per_row(weight)


@torch.library.register_fake("pylora::dora_linear_forward")
def _fake_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor | None,
    squares: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, out_features = _rows(x), weight.shape[0]
    return (
        x.new_empty((*x.shape[:-1], out_features)),
        x.new_empty((rows, out_features)),
        x.new_empty((rows, a.shape[0]), dtype=_accumulator(x)),
        _per_row(weight) if norms is None else norms.new_empty((0,)),
    )


@torch.library.register_fake("pylora::dora_linear_backward")
def _fake_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    magnitude: Tensor,
    norms: Tensor,
    z: Tensor | None,
    v: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, ...]:
    need_x, need_weight, need_bias, need_a, need_b, need_magnitude = needs
    return (
        dy.new_empty((*dy.shape[:-1], a.shape[1]) if need_x else (0,)),
        dy.new_empty((b.shape[0], a.shape[1]) if need_weight else (0,)),
        dy.new_empty((b.shape[0],) if need_bias else (0,)),
        a.new_empty(a.shape if need_a else (0,)),
        b.new_empty(b.shape if need_b else (0,)),
        magnitude.new_empty(magnitude.shape if need_magnitude else (0,)),
    )
