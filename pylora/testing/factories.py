"""Random inputs of the ops."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class LoraInputs:
    """Arguments of `lora_linear` and a gradient of its result; magnitudes keep every product near 1."""

    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    b: Tensor
    dy: Tensor
    scaling: float

    def leaves(self) -> list[Tensor]:
        """x, weight, bias (if any), a, b."""
        return [t for t in (self.x, self.weight, self.bias, self.a, self.b) if t is not None]

    def requires_grad_(self) -> "LoraInputs":
        for leaf in self.leaves():
            leaf.requires_grad_(True)
        return self


def lora_inputs(
    num_tokens: int,
    in_features: int,
    out_features: int,
    rank: int,
    dtype: torch.dtype = torch.float32,
    factor_dtype: torch.dtype | None = None,
    bias: bool = True,
    seed: int = 0,
) -> LoraInputs:
    """Normal entries scaled so that base and delta have comparable size; factors in `factor_dtype` (default: dtype)."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float, to: torch.dtype) -> Tensor:
        return (torch.randn(*shape, generator=generator, dtype=torch.float64) * scale).to(to)

    factor_dtype = factor_dtype or dtype
    width_scale = max(in_features, 1) ** -0.5
    return LoraInputs(
        x=normal(num_tokens, in_features, scale=1.0, to=dtype),
        weight=normal(out_features, in_features, scale=width_scale, to=dtype),
        bias=normal(out_features, scale=1.0, to=dtype) if bias else None,
        a=normal(rank, in_features, scale=width_scale, to=factor_dtype),
        b=normal(out_features, rank, scale=rank**-0.5, to=factor_dtype),
        dy=normal(num_tokens, out_features, scale=1.0, to=dtype),
        scaling=0.75,
    )
