"""`target_modules` that name experts as modules (transformers 4), on a model where they are parameters."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from pylora.checkpoint.fused_experts import FusedExperts, fused_experts
from pylora.targeting import maybe_include_all_linear_layers
from pylora.targeting.all_linear import asks_for_all_linear
from pylora.targeting.match import TargetMatcher


@contextmanager
def targets_of_fused_experts(config: Any, model: nn.Module) -> Iterator[None]:
    """Let the configuration target the parameters that its modules have become; take it back if the body fails.

    Gate and up projection are one parameter now, which gets twice the rank and, for the same scaling, alpha.

    Raises:
        ValueError: Only one of gate and up projection is a target.
    """
    before = dict(config.__dict__)
    try:
        experts = fused_experts(model)
        if experts is not None and config.target_modules:
            _convert(config, model, experts)
        yield
    except BaseException:
        config.__dict__.clear()
        config.__dict__.update(before)
        raise


def _convert(config: Any, model: nn.Module, experts: FusedExperts) -> None:
    targets = config.target_modules
    if isinstance(targets, str):
        targets = _names_matched(config, model, experts)
        if not targets:
            return  # for the usual message
    new_name = experts.parameter_of
    old = {target: target.rpartition(".")[2] for target in targets}
    converted = {leaf for leaf in old.values() if leaf in new_name}
    if not converted:
        return
    missing = {experts.gate, experts.up} - converted
    if len(missing) == 1:
        (present,) = {experts.gate, experts.up} & converted
        raise ValueError(
            f"target_modules: Cannot convert PEFT target(s) {present} without also targeting {missing.pop()} because "
            "they are fused into gate_up_proj."
        )
    if not missing:
        key = r".*\.gate_up_proj"
        # rsLoRA divides alpha by the root of the rank.
        times = 2**0.5 if config.use_rslora else 2
        config.rank_pattern = {**(config.rank_pattern or {}), key: 2 * config.r}
        config.alpha_pattern = {**(config.alpha_pattern or {}), key: times * config.lora_alpha}
    parameters = set(config.target_parameters or ()) | {new_name[leaf] for leaf in converted}
    config.target_parameters = sorted(parameters)
    config.target_modules = {target for target, leaf in old.items() if leaf not in converted}


def _names_matched(config: Any, model: nn.Module, experts: FusedExperts) -> set[str]:
    """Last parts of the names that a string of `target_modules` selects, with the experts as they were called."""
    if asks_for_all_linear(config.target_modules):
        linear = maybe_include_all_linear_layers(copy.copy(config), model).target_modules
        return {name.rpartition(".")[2] for name in linear} | set(experts.parameter_of)
    matcher = TargetMatcher(config)
    names = [name for name, _ in model.named_modules() if name] + [name for name, _ in model.named_parameters()]
    found = {name.rpartition(".")[2] for name in names if matcher(name)}
    for name in names:
        owner, _, leaf = name.rpartition(".")
        old = {before for before, now in experts.parameter_of.items() if now == leaf}
        found.update(before for before in old if matcher(f"{owner}.{before}") or matcher(_numbered(owner, before)))
    return found


def _numbered(owner: str, name: str) -> str:
    """The name that an expert's projection had: `...experts.0.w1`."""
    return f"{re.sub(r'experts$', 'experts.0', owner)}.{name}"
