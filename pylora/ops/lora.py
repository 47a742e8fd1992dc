"""One adapter's low-rank product, fused with the base product (`lora_linear`) or added to one (`lora_add`).

Maths, numerics and dropout's counters: csrc/lora/README.md and lora.h. Definition: reference/lora.py.
"""

import torch
from torch import Tensor

from pylora._native import C


def draw_rng(device: torch.device | str) -> Tensor:
    """A fresh state for dropout, int64 [2] {seed, offset}, drawn from torch's generator of `device`.

    `torch.manual_seed` repeats it, and gradient checkpointing, which restores the generator, replays it.
    """
    return torch.randint(-(2**63), 2**63 - 1, (2,), dtype=torch.int64, device=device)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """A linear layer with one adapter.

    Semantics::

        v = drop(x) @ a.T
        y = x @ weight.T + bias + scaling * v @ b.T

    drop() zeroes each element with probability `dropout_p` (rounded to a multiple of 2**-16) and scales the others so
    that the mean stays; its mask is regenerated in the backward from `rng`, never stored. Differentiable in x, weight,
    bias, a and b, twice as well; the gradients of weight and bias are computed only if they require one. Saved for
    backward: x, v and `rng`. Forward-mode differentiation and torch.func's gradients raise RuntimeError.

    Args:
        x: `[..., in_features]`, float32, bfloat16, float16 or float64, any strides.
        weight: `[out_features, in_features]`, x's dtype, any strides (weights stored `[in, out]` come
            as a transposed view).
        bias: `[out_features]`, x's dtype, or None.
        a: `[rank, in_features]`, rank at least 1; float32, bfloat16, float16 or float64, not necessarily x's dtype.
        b: `[out_features, rank]`, a's dtype.
        scaling: factor of the low-rank product.
        dropout_p: probability in [0, 1]. Dropout is applied whenever it is not 0: in evaluation pass 0.
        rng: int64 `[2]` on x's device, as from `draw_rng`; drawn here if None.

    Returns:
        y: `[..., out_features]`, x's dtype, contiguous.

    Numerics: the low-rank sums are f32 (f64 for float64 x) whatever the storage types. Where pylora's own product
    serves (csrc/cpu/gemm.h: 16-bit types, and float32 with few rows), base, low-rank part and bias are one f32 sum,
    rounded once; elsewhere torch's base product is rounded to x's dtype, then y once more with the low-rank part added.
    Where the product is pylora's a row of y has the same bits for any number of threads and whatever other rows are
    beside it, except that up to three rows take another path than more; torch's products, which also make the gradients
    of float32 and float64, promise neither.

    Raises:
        ValueError: a shape, device or probability does not fit; the message names the argument and both values.
        TypeError: a dtype does not fit.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (2021), equation 3.
    """
    if dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.lora_linear(x, weight, bias, a, b, scaling, dropout_p, rng)
    return C.lora_linear(x, weight, bias, a, b, scaling, dropout_p, rng)


def lora_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout_p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    """A low-rank product added to a base product made elsewhere: a further adapter, or a base that is no dense matrix.

    Semantics::

        v = drop(x) @ a.T
        y = base + scaling * v @ b.T

    Args:
        base: `[..., out_features]`, x's dtype; read, not written.
        x, a, b, scaling, dropout_p, rng: as in `lora_linear`.

    Returns:
        y: `[..., out_features]`, x's dtype, contiguous; rounded once from the f32 sum.

    Raises: as `lora_linear`.
    """
    if dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.lora_add(base, x, a, b, scaling, dropout_p, rng)
    return C.lora_add(base, x, a, b, scaling, dropout_p, rng)


def lora_dropout(x: Tensor, dropout_p: float, rng: Tensor | None = None) -> Tensor:
    """drop(x) on its own, the same elements that `lora_linear` drops for the same `rng`.

    Args:
        x: `[..., width]`, float32, bfloat16, float16 or float64. Rows are counted over all leading dimensions.
        dropout_p: probability in [0, 1], rounded to a multiple of 2**-16.
        rng: int64 `[2]` on x's device; drawn here if None and dropout_p > 0.

    Returns:
        x's shape and dtype, contiguous.
    """
    if dropout_p > 0.0 and rng is None:
        rng = draw_rng(x.device)
    if torch.compiler.is_compiling():
        return torch.ops.pylora.lora_dropout(x, dropout_p, rng)
    return C.lora_dropout(x, dropout_p, rng)


# What tracing sees in place of the kernels: shapes and dtypes alone.


def _check_devices(op: str, x: Tensor, **others: Tensor | None) -> None:
    # A meta tensor beside a real one brings the call here instead of to the kernels' checks.
    for name, tensor in others.items():
        if tensor is not None and tensor.device != x.device:
            raise ValueError(f"{op}: {name}: expected the device of x, {x.device}, got {tensor.device}")


def _rows(x: Tensor) -> int:
    rows = 1
    for size in x.shape[:-1]:
        rows = rows * size
    return rows


def _new_v(x: Tensor, a: Tensor) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return x.new_empty((_rows(x), a.shape[0]), dtype=dtype)


def _if_needed(needed: bool, like: Tensor) -> Tensor:
    return like.new_empty(like.shape if needed else (0,))


@torch.library.register_fake("pylora::lora_linear")
def _fake_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    _check_devices("lora_linear", x, weight=weight, bias=bias, a=a, b=b, rng=rng)
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


@torch.library.register_fake("pylora::lora_linear_forward")
def _fake_linear_forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check_devices("lora_linear", x, weight=weight, bias=bias, a=a, b=b, rng=rng)
    return x.new_empty((*x.shape[:-1], weight.shape[0])), _new_v(x, a)


@torch.library.register_fake("pylora::lora_linear_backward")
def _fake_linear_backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor | None,
    a: Tensor,
    b: Tensor,
    v: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    need_x, need_weight, need_bias, need_a, need_b = needs
    return (
        dy.new_empty((*dy.shape[:-1], a.shape[1]) if need_x else (0,)),
        dy.new_empty((b.shape[0], a.shape[1]) if need_weight else (0,)),
        dy.new_empty((b.shape[0],) if need_bias else (0,)),
        _if_needed(need_a, a),
        _if_needed(need_b, b),
    )


@torch.library.register_fake("pylora::lora_add")
def _fake_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout_p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    _check_devices("lora_add", x, base=base, a=a, b=b, rng=rng)
    return base.new_empty(base.shape)


@torch.library.register_fake("pylora::lora_add_forward")
def _fake_add_forward(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout_p: float = 0.0, rng: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    _check_devices("lora_add", x, base=base, a=a, b=b, rng=rng)
    return base.new_empty(base.shape), _new_v(x, a)


@torch.library.register_fake("pylora::lora_add_backward")
def _fake_add_backward(
    dy: Tensor,
    x: Tensor | None,
    a: Tensor,
    b: Tensor,
    v: Tensor | None,
    scaling: float,
    dropout_p: float,
    rng: Tensor | None,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    dx = dy.new_empty((*dy.shape[:-1], a.shape[1]) if needs[0] else (0,))
    return dx, _if_needed(needs[1], a), _if_needed(needs[2], b)


@torch.library.register_fake("pylora::lora_dropout")
def _fake_dropout(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    return x.new_empty(x.shape)
