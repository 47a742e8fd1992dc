"""What the CUDA kernels over segments cannot do without, and the time that a GPU's public figures allow for it.

Explained in README.md beside this file. Nothing here was measured: a kernel may come near a floor or not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pylora.ops.cost import BYTES, Cost
from pylora.ops.cost.merge import merge as cost_of_merge


@dataclass(frozen=True)
class Gpu:
    """Peaks from a data sheet: bytes a second, dense operations a second by 16-bit tensor cores and by f32 FMA."""

    bandwidth: float
    tensor: float
    fma: float


GPUS = {
    "A100": Gpu(2.039e12, 312e12, 19.5e12),  # NVIDIA A100 data sheet, SXM 80 GB
    "H100": Gpu(3.35e12, 989.4e12, 66.9e12),  # NVIDIA H100 data sheet, SXM, without sparsity
    "L40S": Gpu(0.864e12, 362.05e12, 91.6e12),  # NVIDIA L40S data sheet, without sparsity
}


@dataclass(frozen=True)
class Segment:
    """Rows that share a slot, and the slot's rank."""

    rows: int
    rank: int


def _rows(segments: Sequence[Segment]) -> int:
    return sum(s.rows for s in segments if s.rank)


def _v_elements(segments: Sequence[Segment]) -> int:
    return sum(s.rows * s.rank for s in segments)


def _factor_elements(segments: Sequence[Segment], width: int) -> int:
    """Every segment is another slot's."""
    return sum(s.rank * width for s in segments if s.rows)


def shrink(segments: Sequence[Segment], width: int, dtype: str, factor_dtype: str | None = None) -> Cost:
    """v = x fᵀ: reads x and the factors, writes v in f32."""
    size = BYTES[dtype]
    factors = BYTES[factor_dtype or dtype] * _factor_elements(segments, width)
    v = _v_elements(segments)
    return Cost(2 * v * width, size * _rows(segments) * width + factors + max(size, 4) * v)


def expand(segments: Sequence[Segment], width: int, dtype: str, factor_dtype: str | None = None) -> Cost:
    """y += scaling v f: reads v and the factors, reads and writes y."""
    size = BYTES[dtype]
    factors = BYTES[factor_dtype or dtype] * _factor_elements(segments, width)
    v = _v_elements(segments)
    return Cost(2 * v * width, 2 * size * _rows(segments) * width + factors + max(size, 4) * v)


def decode(segments: Sequence[Segment], in_features: int, out_features: int, dtype: str) -> Cost:
    """Both in one launch: v stays on the chip."""
    size, v = BYTES[dtype], _v_elements(segments)
    rows = _rows(segments) * (in_features + 2 * out_features)
    factors = _factor_elements(segments, in_features + out_features)
    return Cost(2 * v * (in_features + out_features), size * (rows + factors))


def backward(
    segments: Sequence[Segment], in_features: int, out_features: int, dtype: str, factor_dtype: str | None = None
) -> Cost:
    """dX += G A, dA, dB: dY, x, v and the factors read once, dX read and written, dA and dB written once."""
    size, factor_size, v = BYTES[dtype], BYTES[factor_dtype or dtype], _v_elements(segments)
    rows = _rows(segments) * (out_features + 3 * in_features)
    factors = 2 * _factor_elements(segments, in_features + out_features)
    return Cost(4 * v * (in_features + out_features), size * rows + factor_size * factors + max(size, 4) * v)


def dora_norms(out_features: int, in_features: int, rank: int, dtype: str, factor_dtype: str | None = None) -> Cost:
    """Norms of the rows of W + scaling B A: W and the factors read once, a norm in f64 written for each row."""
    factors = BYTES[factor_dtype or dtype] * rank * (in_features + out_features)
    elements = out_features * in_features
    return Cost(2 * elements * (rank + 2), BYTES[dtype] * elements + factors + 8 * out_features)


def dora_scale(tokens: int, out_features: int, dtype: str) -> Cost:
    """y = factor z: reads z, norms and magnitude, writes y."""
    elements = tokens * out_features
    return Cost(elements, 2 * BYTES[dtype] * elements + (8 + BYTES[dtype]) * out_features)


def dora_scale_backward(tokens: int, out_features: int, dtype: str) -> Cost:
    """dz = factor dy, dmagnitude = sum of dy z / norm: reads dy, z, norms and magnitude, writes both."""
    elements = tokens * out_features
    return Cost(3 * elements, 3 * BYTES[dtype] * elements + (8 + BYTES[dtype] + 4) * out_features)


def embedding(segments: Sequence[Segment], out_features: int, dtype: str, factor_dtype: str | None = None) -> Cost:
    """y += scaling A[:, token]ᵀ B: a column of A for each row, then as `expand`."""
    looked_up = BYTES[factor_dtype or dtype] * _v_elements(segments) + 8 * _rows(segments)
    return expand(segments, out_features, dtype, factor_dtype) + Cost(0, looked_up)


def merge(
    out_features: int,
    in_features: int,
    rank: int,
    dtype: str,
    factor_dtype: str | None = None,
    payload_bytes: int = 0,
) -> Cost:
    """W += scaling B A, or back: W and the factors as on the CPU, the log's payloads and a header for each tile."""
    without = cost_of_merge(in_features, out_features, rank, dtype, factor_dtype or dtype)
    tiles = -(-out_features // 32) * -(-in_features // 128)
    return without + Cost(0, payload_bytes + 16 * tiles if payload_bytes else 0)


LAUNCHES = {
    "shrink": 1,
    "expand": 1,
    "decode": 1,
    "backward": 4,
    "dora_norms": 1,
    "dora_scale": 1,
    "dora_scale_backward": 1,
    "merge": 2,
    "unmerge": 3,
}
"""Kernels that each of them is made of: backward has shrink for G, expand for dX, and one sum each for dA and dB; merge
packs the factors first, unmerge also has one that leaves at once unless W was changed."""


def floor_seconds(cost: Cost, gpu: Gpu, dtype: str) -> float:
    """What memory and arithmetic take at their peaks, whichever is longer; a launch has a time of its own on top."""
    peak = gpu.tensor if BYTES[dtype] == 2 else gpu.fma
    return max(cost.bytes / gpu.bandwidth, cost.flops / peak)
