"""Uniform random numbers as torch draws them."""

import torch
from torch import Tensor


def uniform_(out: Tensor, bound: float, skip: int = 0) -> None:
    """Numbers in [-bound, bound) from the default generator, behind `skip` ones that nobody sees."""
    torch.empty(skip, dtype=torch.float32, device="cpu").uniform_()
    out.uniform_(-bound, bound)
