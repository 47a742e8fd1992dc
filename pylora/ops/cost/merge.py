"""What `merge_` cannot do without. Shapes as there; the undo log, whose size depends on the values, is left out."""

from __future__ import annotations

from pylora.ops.cost import BYTES, Cost


def merge(
    in_features: int, out_features: int, rank: int, dtype: str = "float32", factor_dtype: str = "float32"
) -> Cost:
    """W += scaling B A: reads W, A and B, writes W. Unmerging costs the same."""
    elements = in_features * out_features
    factors = rank * (in_features + out_features)
    return Cost(2 * rank * elements, 2 * BYTES[dtype] * elements + BYTES[factor_dtype] * factors)
