"""Sums of task tensors: plain, with small numbers left out, with random numbers left out, with signs voted on.

Names, defaults and results are PEFT's (`peft/utils/merge_utils.py`).
Sources: task arithmetic, https://arxiv.org/abs/2212.04089; TIES, https://arxiv.org/abs/2306.01708; DARE,
https://arxiv.org/abs/2311.03099.
"""

from __future__ import annotations

import warnings
from typing import Literal

import torch

from pylora.ops import keep_largest

# Places that TIES votes on together.
_VOTE_RUN = 1 << 16

SignMethod = Literal["total", "frequency"]


def reshape_weight_task_tensors(task_tensors: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """`weights` with trailing dimensions of size 1, so that it broadcasts against the stacked `task_tensors`."""
    return weights.view(weights.shape + (1,) * (task_tensors.dim() - weights.dim()))


def magnitude_based_pruning(tensor: torch.Tensor, density: float) -> torch.Tensor:
    """Keep the int(density · size) numbers of the largest magnitude; of equal ones those that topk keeps."""
    return keep_largest(tensor, int(density * tensor.numel()))


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
    out = torch.empty_like(stacked[0])
    # In runs whose intermediate results stay in cache: each place is voted on for itself.
    for begin in range(0, max(out.numel(), 1), _VOTE_RUN):
        run = stacked.flatten(1)[:, begin : begin + _VOTE_RUN]
        mask = calculate_majority_sign_mask(run, method=method)
        merged = disjoint_merge(run * reshape_weight_task_tensors(run, weights), mask)
        out.view(-1)[begin : begin + _VOTE_RUN] = merged
    return out
