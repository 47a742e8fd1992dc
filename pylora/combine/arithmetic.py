"""Sums of task tensors: plain, with small numbers left out, with random numbers left out, with signs voted on.

Names, defaults and results are PEFT's (`peft/utils/merge_utils.py`).
Sources: task arithmetic, https://arxiv.org/abs/2212.04089; TIES, https://arxiv.org/abs/2306.01708; DARE,
https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch

SignMethod = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weights` with trailing dimensions of size 1, so that it broadcasts against the stacked `task_tensors`."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the int(density · size) numbers of the largest magnitude; of equal ones at the border the first."""
    count = int(density * tensor.numel())
    if count == 0:
        return torch.zeros_like(tensor)
    magnitudes = tensor.abs()
    threshold = _largest(magnitudes, count)
    kept = magnitudes > threshold
    missing = count - int(kept.sum())
    border = (magnitudes == threshold).reshape(-1).nonzero().squeeze(1)[:missing]
    # reshape may copy, a flat view of a contiguous mask does not
    kept = kept.contiguous()
    kept.view(-1)[border] = True
    return torch.where(kept, tensor, 0)


def _largest(magnitudes: torch.Tensor, count: int) -> torch.Tensor:
    """The number that exactly `count` are at least as large as (or more, where it repeats): selected, not sorted."""
    flat = magnitudes.detach().reshape(-1)
    place = flat.numel() - count
    if flat.device.type != "cpu":
        return torch.kthvalue(flat, place + 1).values
    import numpy as np

    # Widening is exact and keeps the order; numpy has no bf16.
    wide = flat if flat.dtype == torch.float64 else flat.to(torch.float32)
    return torch.tensor(np.partition(wide.numpy(), place)[place], dtype=magnitudes.dtype)


def random_pruning(tensor: torch.Tensor, density: float, rescale: bool) -> torch.Tensor:
    """Keep each number with probability `density`; `rescale` divides what is kept by it, which keeps expectations.

    Draws from torch's global generator, as many numbers and in the order that PEFT does.
    """
    kept = tensor * torch.bernoulli(torch.full_like(tensor, density))
    return kept / density if rescale else kept


def prune(
    tensor: torch.Tensor, density: float, method: Literal["magnitude", "random"], rescale: bool = False
) -> torch.Tensor:
    """`tensor` with a share of `density` of its numbers, and zeros.

    Args:
        tensor: Any shape.
        density: 0 to 1; with 1 or more nothing is pruned, with a warning.
        method: "magnitude" keeps the largest, "random" any.
        rescale: With "random", divide by `density`.

    Raises:
        ValueError: `density` is negative, or `method` is unknown.
    """
    if density >= 1:
        warnings.warn(
            f"The density {density} is greater than or equal to 1, no pruning will be performed.", stacklevel=2
        )
        return tensor
    if density < 0:
        raise ValueError(f"Density should be >= 0, got {density}")
    if method == "magnitude":
        return magnitude_based_pruning(tensor, density)
    if method == "random":
        return random_pruning(tensor, density, rescale=rescale)
    raise ValueError(f"Unknown method {method}: expected 'magnitude' or 'random'")


def calculate_majority_sign_mask(tensor: torch.Tensor, method: SignMethod = "total") -> torch.Tensor:
    """Where numbers have the sign that most of their place have; zero votes count as positive.

    Args:
        tensor: [tasks, ...].
        method: "total" votes with magnitudes, "frequency" by number.

    Returns:
        Booleans of the same shape.

    Raises:
        RuntimeError: `method` is unknown.
    """
    sign = tensor.sign()
    if method == "total":
        vote = tensor.sum(dim=0)
    elif method == "frequency":
        vote = sign.sum(dim=0)
    else:
        raise RuntimeError(f'Unimplemented mask method "{method}": expected "total" or "frequency"')
    return sign == torch.where(vote >= 0, 1, -1)


def disjoint_merge(task_tensors: torch.Tensor, majority_sign_mask: torch.Tensor) -> torch.Tensor:
    """The mean of what the mask leaves of each place, 0 where it leaves nothing. [tasks, ...] -> [...]."""
    total = (task_tensors * majority_sign_mask).sum(dim=0)
    return total / torch.clamp(majority_sign_mask.sum(dim=0), min=1.0)


def task_arithmetic(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    """Σ weights[i] · task_tensors[i]; tensors of one shape, weights [tasks]."""
    return _weighted(task_tensors, weights).sum(dim=0)


def magnitude_prune(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """Σ weights[i] · (the largest numbers of task_tensors[i], a share of `density`)."""
    return _weighted([prune(each, density, method="magnitude") for each in task_tensors], weights).sum(dim=0)


def ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """TIES: prune by magnitude, vote on the sign of each place, average the weighted numbers that have it."""
    return _elect([prune(each, density, method="magnitude") for each in task_tensors], weights, majority_sign_method)


def dare_linear(task_tensors: list[torch.Tensor], weights: torch.Tensor, density: float) -> torch.Tensor:
    """DARE: Σ weights[i] · (random numbers of task_tensors[i], a share of `density`, divided by it)."""
    pruned = [prune(each, density, method="random", rescale=True) for each in task_tensors]
    return _weighted(pruned, weights).sum(dim=0)


def dare_ties(
    task_tensors: list[torch.Tensor],
    weights: torch.Tensor,
    density: float,
    majority_sign_method: SignMethod = "total",
) -> torch.Tensor:
    """DARE's pruning followed by TIES' vote and average."""
    pruned = [prune(each, density, method="random", rescale=True) for each in task_tensors]
    return _elect(pruned, weights, majority_sign_method)


def _weighted(task_tensors: list[torch.Tensor], weights: torch.Tensor) -> torch.Tensor:
    stacked = torch.stack(task_tensors, dim=0)
    return stacked * reshape_weight_task_tensors(stacked, weights)


def _elect(task_tensors: list[torch.Tensor], weights: torch.Tensor, method: SignMethod) -> torch.Tensor:
    stacked = torch.stack(task_tensors, dim=0)
    mask = calculate_majority_sign_mask(stacked, method=method)
    return disjoint_merge(stacked * reshape_weight_task_tensors(stacked, weights), mask)
