"""A configuration against a whole model: which modules get an adapter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from pylora.config.patterns import matches_pattern
from pylora.errors import NoMatchingPeftModuleError
from pylora.targeting.all_linear import asks_for_all_linear, linear_module_names
from pylora.targeting.defaults import (
    DUMMY_TARGET_MODULES,
    MAMBA_INCOMPATIBLE_MODULES,
    MAMBA_MODEL_TYPES,
    MIN_TARGET_MODULES_FOR_OPTIMIZATION,
    TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING,
)
from pylora.targeting.explain import explain_no_match
from pylora.targeting.match import Match, TargetMatcher
from pylora.targeting.model_info import config_value, is_tuner_layer
from pylora.targeting.parameters import ParameterTarget, resolve_parameters
from pylora.targeting.suffixes import find_minimal_target_modules
from pylora.targeting.tied import warn_about_tied_targets

NamedModules = Sequence[tuple[str, nn.Module]]


@dataclass(frozen=True)
class ResolvedTargets:
    """The modules that a configuration selects.

    Attributes:
        modules: Name to module, in the order of `model.named_modules()`. A module that already has adapters is the
            tuner layer itself, to be extended.
        target_modules: What the configuration's `target_modules` becomes and what is saved: the architecture's default
            for None, the linear layers' names for "all-linear", the shortest equivalent for a long list.
        parameters: What `target_parameters` selects, in the order in which wrappers nest.
    """

    modules: dict[str, nn.Module]
    target_modules: set[str] | list[str] | str | None
    parameters: list[ParameterTarget] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """The modules' names in order."""
        return list(self.modules)


def resolve_targets(
    model: nn.Module,
    config: Any,
    *,
    is_tuner_layer: Callable[[nn.Module], bool] = is_tuner_layer,
    state_dict_keys: Iterable[str] | None = None,
) -> ResolvedTargets:
    """Find the modules of `model` that `config` (a LoraConfig) selects.

    Neither the model nor the configuration is changed: the caller stores the result's `target_modules` in the
    configuration once the adapter is in place. The model is walked once. Names are relative to `model`, which must be
    the base model (what a LoraModel keeps as `.model`), with or without adapters in it. What lies inside a layer that
    already has adapters (`base_layer`, `lora_A`, ...) is never selected; such a layer counts by its own name.

    Args:
        model: The base model.
        config: The configuration.
        is_tuner_layer: Tells a module that already has adapters. By default: it holds a `base_layer` and its class has
            `adapter_layer_names`.
        state_dict_keys: Keys of an adapter's weights, as saved and without a prefix. When given, the modules they
            belong to are selected, whatever the configuration says; a difference is warned about.

    Raises:
        ValueError: `target_modules` is None and the architecture has no default; an architecture that bypasses an
            adapter at this place (Mamba's `out_proj` and `conv1d`); a target parameter that cannot be wrapped; or
            `target_parameters` beside `state_dict_keys`.
        NoMatchingPeftModuleError: nothing is selected. The message says why and names similar modules.

    Warns:
        UserWarning: `exclude_modules` excludes nothing; or one side of a tied weight is selected.
        RuntimeWarning: a key of `rank_pattern` or `alpha_pattern` matches nothing selected; one of `target_modules` and
            `target_parameters` selects nothing; or `state_dict_keys` and the configuration select differently.
    """
    if config.target_parameters and state_dict_keys is not None:
        raise ValueError(
            "Trying to inject a PEFT adapter from a state_dict but the PEFT config uses `target_parameters`. This is "
            "not supported: the keys do not name the parameters. Please inject the adapter without the state_dict."
        )
    warn_about_tied_targets(model, config)
    target_modules = _requested_targets(model, config)
    if target_modules == DUMMY_TARGET_MODULES:
        return ResolvedTargets({}, target_modules)

    visible = _outside_tuner_layers(model, is_tuner_layer)
    if asks_for_all_linear(target_modules):
        target_modules = linear_module_names(model, config.task_type, visible, is_tuner_layer)
    if isinstance(target_modules, (list, set)):
        target_modules = _shortened(target_modules, [name for name, _ in visible])
    matcher = TargetMatcher(config, target_modules)
    verdicts = {name: matcher(name) for name, _ in visible if name}
    selected = [name for name, verdict in verdicts.items() if verdict]
    if state_dict_keys is not None:
        in_state_dict = _modules_of(state_dict_keys)
        from_state_dict = [name for name in verdicts if name.removeprefix("_orig_mod.") in in_state_dict]
        _warn_about_difference(selected, from_state_dict)
        selected = from_state_dict

    parameters = []
    if config.target_parameters:
        parameters = resolve_parameters(model, config.target_parameters, selected, is_tuner_layer)
    if not selected and not parameters:
        raise NoMatchingPeftModuleError(_empty_result_message(config, target_modules, matcher, verdicts))
    _refuse_mamba_internals(model, selected)
    adapted = [*selected, *(target.key for target in parameters)]
    _warn_about_unused_settings(config, verdicts, adapted, state_dict_keys is not None)
    _warn_about_unmatched_targets(config, target_modules, selected, parameters)
    by_name = dict(visible)
    return ResolvedTargets({name: by_name[name] for name in selected}, target_modules, parameters)


def inspect_matched_modules(tuner: Any, adapter_name: str = "default") -> dict[str, list[str]]:
    """A LoraModel's module names under an adapter's rules: `{"matched": [...], "unmatched": [...]}`."""
    matcher = TargetMatcher(tuner.peft_config[adapter_name])
    result: dict[str, list[str]] = {"matched": [], "unmatched": []}
    for name, _ in tuner.model.named_modules():
        result["matched" if matcher(name) else "unmatched"].append(name)
    return result


def maybe_include_all_linear_layers(peft_config: Any, model: nn.Module) -> Any:
    """Replace "all-linear" in `peft_config.target_modules` by the names of the model's linear layers; return it."""
    if asks_for_all_linear(getattr(peft_config, "target_modules", None)):
        visible = _outside_tuner_layers(model, is_tuner_layer)
        peft_config.target_modules = linear_module_names(model, peft_config.task_type, visible)
    return peft_config


def _requested_targets(model: nn.Module, config: Any) -> Any:
    if config.target_modules is not None:
        return config.target_modules
    default = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(config_value(model, "model_type"))
    if default is None and not config.target_parameters:
        raise ValueError(
            # Without the blank, as PEFT writes it: tests match on the phrase.
            "Please specify `target_modules` or `target_parameters`in `peft_config`: there is no default for the "
            f"model type {config_value(model, 'model_type')!r}"
        )
    return set(default) if isinstance(default, list) else default


def _outside_tuner_layers(model: nn.Module, is_tuner_layer: Callable[[nn.Module], bool]) -> NamedModules:
    """The modules that are not inside a tuner layer, as `named_modules()` gives them: the first name of each counts.

    The inside of a tuner layer is not entered, so that the cost does not grow with the number of adapters.
    """
    outside: list[tuple[str, nn.Module]] = []
    seen: set[nn.Module] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if module in seen:
            continue
        seen.add(module)
        outside.append((name, module))
        if name and is_tuner_layer(module):  # of a model that is a layer itself, the inside is all there is
            continue
        prefix = f"{name}." if name else ""
        stack.extend((prefix + key, child) for key, child in reversed(module._modules.items()) if child is not None)
    return outside


def _shortened(target_modules: list[str] | set[str], all_names: list[str]) -> list[str] | set[str]:
    if len(target_modules) < MIN_TARGET_MODULES_FOR_OPTIMIZATION:
        return target_modules
    endings = tuple(f".{name}" for name in target_modules)
    others = [name for name in all_names if name not in target_modules and not name.endswith(endings)]
    shorter = find_minimal_target_modules(target_modules, others)
    return shorter if len(shorter) < len(target_modules) else target_modules


def _modules_of(state_dict_keys: Iterable[str]) -> set[str]:
    """Names of the modules whose adapter weights have these keys, without the prefix that torch.compile adds."""
    return {key.rsplit(".lora_", 1)[0].removeprefix("_orig_mod.") for key in state_dict_keys}


def _empty_result_message(config: Any, target_modules: Any, matcher: TargetMatcher, verdicts: dict[str, Match]) -> str:
    excluded = [name for name, verdict in verdicts.items() if verdict is Match.EXCLUDED]
    if excluded and len(excluded) == len(verdicts):
        return (
            "All modules were excluded. This is likely unintended. Check your `target_modules`, `exclude_modules` and "
            "`modules_to_save` configuration."
        )
    if verdicts and not excluded and not target_modules:
        return (
            "No `target_modules` passed but also no `target_parameters` found. Please check the values for these "
            "arguments."
        )
    if excluded or not verdicts:
        message = (
            "No modules were targeted for adaptation. This might be caused by a combination of mismatched target "
            "modules and excluded modules. Please check your `target_modules` and `exclude_modules` configuration. "
            "You may also have only targeted modules that are marked to be saved (`modules_to_save`)."
        )
    else:
        message = (
            f"Target modules {target_modules} not found in the base model. "
            "Please check the target modules and try again."
        )
    if config.layers_to_transform is not None:
        message += f" Note: You specified 'layers_to_transform': {config.layers_to_transform}."
    if config.layers_pattern is not None:
        message += f" You also specified 'layers_pattern': {config.layers_pattern}."
    return message + explain_no_match(target_modules, matcher, list(verdicts), excluded)


def _refuse_mamba_internals(model: nn.Module, selected: list[str]) -> None:
    model_type = config_value(model, "model_type")
    if model_type not in MAMBA_MODEL_TYPES:
        return
    refused = sorted({name.rpartition(".")[2] for name in selected} & MAMBA_INCOMPATIBLE_MODULES)
    if refused:
        raise ValueError(
            f"target_modules: Module '{refused[0]}' is incompatible with Mamba-based models "
            f"(model_type='{model_type}'): their kernels read the weight and bypass an adapter. "
            f"Incompatible modules: {MAMBA_INCOMPATIBLE_MODULES}."
        )


def _warn_about_difference(from_config: list[str], from_state_dict: list[str]) -> None:
    only_config = sorted(set(from_config) - set(from_state_dict))
    only_state_dict = sorted(set(from_state_dict) - set(from_config))
    if not (only_config or only_state_dict):
        return
    message = (
        "While injecting the PEFT adapters, an inconsistency was discovered between the PEFT config and the provided "
        "state_dict. This is not necessarily an issue and can be ignored if this was the intent."
    )
    if only_config:
        message += f" The PEFT config contained these additional target modules: {only_config}."
    if only_state_dict:
        message += f" The state_dict contained these additional target modules: {only_state_dict}."
    warnings.warn(f"{message} The state_dict decides.", RuntimeWarning, stacklevel=3)


def _warn_about_unused_settings(
    config: Any, verdicts: dict[str, Match], selected: list[str], by_state_dict: bool
) -> None:
    excluded = not by_state_dict and Match.EXCLUDED in verdicts.values()
    if config.exclude_modules and not excluded:
        warnings.warn(
            f"You have passed exclude_modules={config.exclude_modules} but no modules were excluded. "
            "Please check that exclude_modules was set correctly.",
            stacklevel=3,
        )
    for setting in ("rank_pattern", "alpha_pattern"):
        keys = getattr(config, setting) or ()
        unused = sorted(key for key in keys if not any(matches_pattern(key, name) for name in selected))
        if unused:
            warnings.warn(
                f"The following {setting} keys did not match any targeted module and were ignored: {unused}.",
                RuntimeWarning,
                stacklevel=3,
            )


def _warn_about_unmatched_targets(
    config: Any, target_modules: Any, selected: list[str], parameters: list[ParameterTarget]
) -> None:
    if config.exclude_modules:
        return
    if target_modules and not selected:
        warnings.warn(
            f"target_modules={target_modules} were set but no module was matched.", RuntimeWarning, stacklevel=3
        )
    elif config.target_parameters and not parameters:
        warnings.warn(
            f"target_parameters={config.target_parameters} were set but no parameter was matched.",
            RuntimeWarning,
            stacklevel=3,
        )
