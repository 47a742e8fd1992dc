"""KappaTune: targets chosen by the condition numbers of their weights (https://github.com/oswaldoludwig/kappaTune).

A weight with a small condition number has the most evenly spread singular values: training it disturbs least of what
the model has learnt, so such weights are the targets.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

# Names under which transformers models keep the weights of all experts in one 3-D parameter.
_EXPERT_SUFFIXES = (".gate_up_proj", ".down_proj", ".gate_proj", ".up_proj")


class KappaTuneSelector:
    """Ranks the linear layers and the stacked expert weights of a model by condition number, smallest first.

    The condition numbers are computed once, when first asked for. That takes the singular values of every weight:
    minutes on a large model.

    Args:
        model: the model.
        max_dim_size_to_analyze: weights with a longer dimension are left out.
        moe_param_suffixes: endings of the names of 3-D parameters [experts, rows, columns] to rank; by default those of
            transformers. A stack counts with the mean over its experts.
        show_progress: whether to show a progress bar.

    Layers whose weight is not kept as numbers in a matrix (quantised ones) are left out.
    """

    def __init__(
        self,
        model: nn.Module,
        max_dim_size_to_analyze: int = 16384,
        moe_param_suffixes: tuple[str, ...] | None = None,
        show_progress: bool = True,
    ) -> None:
        self.model = model
        self.max_dim_size_to_analyze = max_dim_size_to_analyze
        self.moe_param_suffixes = tuple(moe_param_suffixes or _EXPERT_SUFFIXES)
        self.show_progress = show_progress
        self._module_kappas: dict[str, float] | None = None
        self._parameter_kappas: dict[str, float] | None = None

    def get_best_targets(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of linear layers, best first, for `target_modules`.

        Args:
            top_p: the best fraction, at least one layer.
            num_modules: the best so many; goes before `top_p`.
            threshold: those with a condition number up to this; counts if neither of the others is given.
        """
        if self._module_kappas is None:
            weights = [(name, m.weight) for name, m in self.model.named_modules() if isinstance(m, nn.Linear)]
            self._module_kappas = self._kappas(weights, "linear layers")
        return _best(self._module_kappas, top_p, num_modules, threshold)

    def get_best_target_parameters(
        self, top_p: float | None = None, num_modules: int | None = None, threshold: float | None = None
    ) -> list[str]:
        """Names of stacked expert weights, best first, for `target_parameters`. Arguments as `get_best_targets`."""
        if self._parameter_kappas is None:
            stacks = [
                (name, param)
                for name, param in self.model.named_parameters()
                if name.endswith(self.moe_param_suffixes) and param.ndim == 3
            ]
            self._parameter_kappas = self._kappas(stacks, "experts")
        return _best(self._parameter_kappas, top_p, num_modules, threshold)

    def _kappas(self, weights: Sequence[tuple[str, torch.Tensor]], unit: str) -> dict[str, float]:
        fitting = [
            (name, weight)
            for name, weight in weights
            if weight.is_floating_point()
            and weight.ndim >= 2
            and max(weight.shape[-2:]) <= self.max_dim_size_to_analyze
            and not weight.is_meta
        ]
        return {name: _condition_number(weight.detach()) for name, weight in self._watched(fitting, unit)}

    def _watched(self, weights: Sequence[tuple[str, torch.Tensor]], unit: str) -> Iterable[Any]:
        if not self.show_progress:
            return weights
        from tqdm.auto import tqdm

        bar: Iterable[Any] = tqdm(weights, desc=f"Condition numbers of {unit}", unit="weight")
        return bar


def find_kappa_target_modules(
    model: nn.Module,
    top_p: float = 0.2,
    max_dim_size_to_analyze: int = 16384,
    moe_param_suffixes: tuple[str, ...] | None = None,
    show_progress: bool = True,
) -> dict[str, list[str] | None]:
    """Targets by KappaTune in one call: `LoraConfig(**find_kappa_target_modules(model))`.

    Args:
        model: the base model.
        top_p: the fraction of layers and of expert weights to take.
        max_dim_size_to_analyze, moe_param_suffixes, show_progress: as for `KappaTuneSelector`.

    Returns:
        `target_modules`, a list of names, and `target_parameters`, a list or None where the model has none.
    """
    selector = KappaTuneSelector(model, max_dim_size_to_analyze, moe_param_suffixes, show_progress)
    return {
        "target_modules": selector.get_best_targets(top_p=top_p),
        "target_parameters": selector.get_best_target_parameters(top_p=top_p) or None,
    }


def _condition_number(weight: torch.Tensor) -> float:
    """Largest by smallest singular value, of a matrix or as the mean over a stack of them, one at a time in f32."""
    matrices = weight if weight.ndim == 3 else weight[None]
    kappas = []
    for matrix in matrices:
        values = torch.linalg.svdvals(matrix.float())
        kappas.append((values[0] / (values[-1] + 1e-8)).item())
    return sum(kappas) / len(kappas)


def _best(kappas: dict[str, float], top_p: float | None, num_modules: int | None, threshold: float | None) -> list[str]:
    names = sorted(kappas, key=kappas.__getitem__)
    if not names:
        return []
    if num_modules is not None:
        return names[:num_modules]
    if top_p is not None:
        return names[: max(1, int(len(names) * top_p))]
    if threshold is not None:
        return [name for name in names if kappas[name] <= threshold]
    return names
