"""Making one adapter out of several: arithmetic on tensors, and the same on low-rank factors."""

from pylora.combine.arithmetic import dare_linear, dare_ties, magnitude_prune, task_arithmetic, ties
from pylora.combine.configs import check_combination, combined_config, combined_rank
from pylora.combine.factors import (
    COMBINATIONS,
    EQUAL_RANK_KINDS,
    SVD_KINDS,
    Combination,
    Term,
    combine_terms,
    triplets_of_product,
)

__all__ = [
    "COMBINATIONS",
    "EQUAL_RANK_KINDS",
    "SVD_KINDS",
    "Combination",
    "Term",
    "check_combination",
    "combine_terms",
    "combined_config",
    "combined_rank",
    "dare_linear",
    "dare_ties",
    "magnitude_prune",
    "task_arithmetic",
    "ties",
    "triplets_of_product",
]
