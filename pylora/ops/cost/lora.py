"""What `lora_linear` cannot do without. Shapes as there; rank 0 is the bare linear layer."""

from __future__ import annotations

from pylora.ops.cost import BYTES, Cost


def forward(
    rows: int, in_features: int, out_features: int, rank: int, dtype: str = "float32", factor_dtype: str = "float32"
) -> Cost:
    """y = x Wᵀ + scaling (x Aᵀ) Bᵀ without a bias: reads x, W, A and B, writes y."""
    dense = rows * in_features * out_features
    low_rank = rows * rank * (in_features + out_features)
    elements = rows * in_features + in_features * out_features + rows * out_features
    factors = rank * (in_features + out_features)
    return Cost(2 * (dense + low_rank), BYTES[dtype] * elements + BYTES[factor_dtype] * factors)


def backward(
    rows: int, in_features: int, out_features: int, rank: int, dtype: str = "float32", factor_dtype: str = "float32"
) -> Cost:
    """The gradients of x, A and B, W being frozen; x, dy, W, A, B and v = x Aᵀ (f32) are read.

    dX = dY W + G A with G = scaling dY B, and dA = Gᵀ x, dB = scaling dYᵀ v: four low-rank products beside one dense.
    """
    dense = rows * in_features * out_features
    low_rank = 2 * rows * rank * (in_features + out_features)
    # The bare layer needs no x for the gradient of x.
    elements = rows * (in_features + out_features) + in_features * out_features + (rows * in_features if rank else 0)
    factors = 2 * rank * (in_features + out_features)  # A and B read, their gradients written
    return Cost(2 * (dense + low_rank), BYTES[dtype] * elements + BYTES[factor_dtype] * factors + 4 * rows * rank)


def train(
    rows: int, in_features: int, out_features: int, rank: int, dtype: str = "float32", factor_dtype: str = "float32"
) -> Cost:
    """Forward and backward; v, which the forward leaves for the backward, is written once more than it counts there."""
    shape = (rows, in_features, out_features, rank, dtype, factor_dtype)
    return forward(*shape) + backward(*shape) + Cost(0, 4 * rows * rank)
