"""Targeting: from a configuration and a model to the modules that get an adapter."""

from pylora.targeting.defaults import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from pylora.targeting.match import Match, TargetMatcher, check_target_module_exists
from pylora.targeting.model_info import is_tuner_layer
from pylora.targeting.resolve import (
    ResolvedTargets,
    inspect_matched_modules,
    maybe_include_all_linear_layers,
    resolve_targets,
)
from pylora.targeting.suffixes import find_minimal_target_modules

__all__ = [
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING",
    "Match",
    "ResolvedTargets",
    "TargetMatcher",
    "check_target_module_exists",
    "find_minimal_target_modules",
    "inspect_matched_modules",
    "is_tuner_layer",
    "maybe_include_all_linear_layers",
    "resolve_targets",
]
