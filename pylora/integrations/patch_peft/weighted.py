"""The arithmetic of PEFT's `add_weighted_adapter` done on factors; checks and injection stay PEFT's."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from pylora.combine import Combination, Term, combine_terms
from pylora.integrations.patch_peft.replacements import Replacements


def patch_weighted(changes: Replacements, model: Any) -> None:
    """Put pylora's arithmetic in.

    Args:
        changes: Records what is replaced.
        model: peft.tuners.lora.model.
    """
    changes.wrap(model.LoraModel, "_svd_generalized_task_arithmetic_weighted_adapter", _on_deltas)
    changes.wrap(model.LoraModel, "_generalized_task_arithmetic_weighted_adapter", _on_factors)


def _terms(adapters: Sequence[str], weights: Sequence[float], target: Any) -> list[Term]:
    """The layer's adapters that take part; none where the arithmetic is left to PEFT: in groups, or where it fails."""
    terms = []
    for name, weight in zip(adapters, weights, strict=False):
        if name in target.lora_A:
            module_a, module_b = target.lora_A[name], target.lora_B[name]
            a, b, transposed = module_a.weight, module_b.weight, getattr(target, "fan_in_fan_out", False)
            if getattr(module_b, "groups", 1) > 1:
                return []
        elif name in target.lora_embedding_A:
            a, b, transposed = target.lora_embedding_A[name], target.lora_embedding_B[name], True
        else:
            continue
        terms.append(Term(a.detach(), b.detach(), float(target.scaling[name]), float(weight), 1, transposed))
    return terms


def _on_deltas(original: Callable[..., Any]) -> Callable[..., Any]:
    def combine(
        self: Any,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        new_rank: int,
        target: Any,
        target_lora_A: torch.Tensor,
        target_lora_B: torch.Tensor,
        density: float | None,
        majority_sign_method: Any,
        clamp: float | None = None,
        full_matrices: bool = True,
        driver: str | None = None,
    ) -> Any:
        terms = _terms(adapters, weights, target)
        rank = len(target_lora_A)
        if not terms or driver is not None:
            options: dict[str, Any] = {"clamp": clamp, "full_matrices": full_matrices, "driver": driver}
            factors = (target_lora_A, target_lora_B, density, majority_sign_method)
            return original(self, combination_type, adapters, weights, new_rank, target, *factors, **options)
        return combine_terms(terms, Combination(combination_type, rank, clamp, None, density, majority_sign_method))

    return combine


def _on_factors(original: Callable[..., Any]) -> Callable[..., Any]:
    def combine(
        self: Any,
        combination_type: str,
        adapters: list[str],
        weights: list[float],
        target: Any,
        density: float | None,
        majority_sign_method: Any,
    ) -> Any:
        terms = _terms(adapters, weights, target)
        if len({(term.a.shape, term.b.shape) for term in terms}) != 1:
            return original(self, combination_type, adapters, weights, target, density, majority_sign_method)
        how = Combination(combination_type, len(terms[0].a), None, None, density, majority_sign_method)
        return list(combine_terms(terms, how))

    return combine
