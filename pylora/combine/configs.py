"""The configuration of a combined adapter, and what can be wrong with a wish for one; no tensor is touched."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import reduce
from operator import or_
from typing import Any

from pylora.combine.factors import COMBINATIONS, EQUAL_RANK_KINDS, SVD_KINDS, Combination

_PRUNING = ("ties", "dare", "magnitude_prune")


def check_combination(how: Combination) -> None:
    """Check the options of a kind; `how.rank` is not looked at.

    Raises:
        ValueError: an unknown kind, or a negative density.
        TypeError: a kind that prunes, without a density.
        RuntimeError: an unknown way to vote on signs.
    """
    if how.kind not in COMBINATIONS:
        raise ValueError(f"Invalid combination_type: {how.kind}, expected one of {', '.join(sorted(COMBINATIONS))}")
    if how.kind.startswith(_PRUNING):
        if how.density is None:
            raise TypeError(f"density: expected a number from 0 to 1 for combination_type={how.kind!r}, got None")
        if how.density < 0:
            raise ValueError(f"Density should be >= 0, got {how.density}")
    if "ties" in how.kind and how.majority_sign_method not in ("total", "frequency"):
        raise RuntimeError(
            f'Unimplemented mask method "{how.majority_sign_method}": majority_sign_method is "total" or "frequency"'
        )


def combined_rank(configs: Sequence[Any], how: Combination) -> int:
    """The rank of the new adapter; `how.rank` is the one wished for, 0 for none.

    Raises:
        ValueError: a kind that needs equal ranks, and they differ.
    """
    ranks = [_largest_rank(config) for config in configs]
    if how.kind in EQUAL_RANK_KINDS and len(set(ranks)) != 1:
        raise ValueError(
            f"All adapters must have the same r value when using combination_type {how.kind!r}, got {ranks}: use "
            "'svd' or 'cat'."
        )
    if how.kind == "cat":
        return sum(ranks)
    return (how.rank if how.kind in SVD_KINDS else 0) or max(ranks)


def _largest_rank(config: Any) -> int:
    return max(config.r, *config.rank_pattern.values()) if config.rank_pattern else config.r


def combined_config(configs: Sequence[Any], rank: int) -> Any:
    """The first adapter's configuration for the combined targets, with scaling 1 everywhere.

    Raises:
        ValueError: some target modules by a pattern and some by a list.
        TypeError: target modules of another type.
    """
    targets = [config.target_modules for config in configs]
    types = {type(each) for each in targets}
    if len(types) > 1:
        raise ValueError(
            "all adapter configs should follow the same target modules type. Combining adapters with `target_modules` "
            "type being a mix of list/set and string is not supported."
        )
    combined: Any
    if types == {str}:
        combined = "|".join(f"({each})" for each in targets)
    elif types == {set}:
        combined = reduce(or_, targets)
    else:
        raise TypeError(f"Invalid type {types.pop()} found in target_modules")
    config = dataclasses.replace(
        configs[0],
        r=rank,
        lora_alpha=rank,
        use_rslora=False,
        target_modules=combined,
        alpha_pattern={},
        rank_pattern={},
        lora_bias=any(config.lora_bias for config in configs),
    )
    config._custom_modules = configs[0]._custom_modules
    return config
