"""Random inputs of the ops over many adapters."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class PoolInputs:
    """Arguments of `bgmv_` in pylora's own layout, and a gradient of y; ranks beyond a slot's own hold NaN."""

    y: Tensor
    x: Tensor
    a_pool: Tensor
    b_pool: Tensor
    ranks: Tensor
    scalings: Tensor
    token_slots: Tensor
    dy: Tensor

    def sorted_segments(self) -> tuple[Tensor, Tensor]:
        """segment_indptr and segment_slots of the runs of equal slots, an empty segment in front."""
        slots = self.token_slots.tolist()
        starts = [i for i in range(len(slots)) if i == 0 or slots[i] != slots[i - 1]]
        indptr = [0, 0, *starts[1:], len(slots)] if slots else [0, 0]
        runs = [0, *(slots[i] for i in starts)] if slots else [0]
        return torch.tensor(indptr, dtype=torch.int32), torch.tensor(runs, dtype=torch.int32)


def token_slots(popularity: str, num_tokens: int, num_slots: int, seed: int = 0) -> Tensor:
    """Slots of tokens: "one", "distinct", "uniform" (-1 among them), "zipf", "skewed" (one but for a few), "none"."""
    generator = torch.Generator().manual_seed(seed)
    if popularity == "one":
        slots = torch.zeros(num_tokens)
    elif popularity == "none":
        slots = torch.full((num_tokens,), -1)
    elif popularity == "distinct":
        slots = torch.arange(num_tokens) % num_slots
    elif popularity == "uniform":
        slots = torch.randint(-1, num_slots, (num_tokens,), generator=generator)
    elif popularity == "zipf":
        weights = 1.0 / torch.arange(1, num_slots + 1)
        slots = weights.multinomial(max(num_tokens, 1), replacement=True, generator=generator)[:num_tokens]
    else:
        slots = torch.where(torch.rand(num_tokens, generator=generator) < 0.9, 0, num_slots - 1)
    return slots.to(torch.int32)


def pool_inputs(
    num_tokens: int,
    in_features: int,
    out_features: int,
    ranks: list[int],
    dtype: torch.dtype = torch.float32,
    pool_dtype: torch.dtype | None = None,
    popularity: str = "uniform",
    seed: int = 0,
) -> PoolInputs:
    """Normal entries scaled so that y and what is added to it have comparable size."""
    generator = torch.Generator().manual_seed(seed)
    pool_dtype = pool_dtype or dtype
    max_rank = max(ranks)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    a_pool = normal(len(ranks), max_rank, in_features, scale=max(in_features, 1) ** -0.5)
    b_pool = normal(len(ranks), max_rank, out_features, scale=max_rank**-0.5)
    for slot, rank in enumerate(ranks):
        a_pool[slot, rank:] = torch.nan
        b_pool[slot, rank:] = torch.nan
    return PoolInputs(
        y=normal(num_tokens, out_features).to(dtype),
        x=normal(num_tokens, in_features).to(dtype),
        a_pool=a_pool.to(pool_dtype),
        b_pool=b_pool.to(pool_dtype),
        ranks=torch.tensor(ranks, dtype=torch.int32),
        scalings=torch.rand(len(ranks), generator=generator) + 0.5,
        token_slots=token_slots(popularity, num_tokens, len(ranks), seed),
        dy=normal(num_tokens, out_features).to(dtype),
    )
