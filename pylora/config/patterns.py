"""`rank_pattern` and `alpha_pattern`: values for single modules, looked up by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def matches_pattern(pattern: str, module_name: str) -> bool:
    """Whether the regular expression `pattern` matches the end of `module_name`, from a name part's beginning on.

    `q_proj` matches `layers.0.q_proj` and not `layers.0.eq_proj`. An anchored pattern (`^layers.0.q_proj`) matches the
    whole name only.
    """
    return re.match(rf"(.*\.)?({pattern})$", module_name) is not None


def get_pattern_key(pattern_keys: Iterable[str], key_to_match: str) -> str:
    """The first of `pattern_keys` that matches the module name `key_to_match`, or that name when none does."""
    for key in pattern_keys:
        if matches_pattern(key, key_to_match):
            return key
    return key_to_match


def pattern_value(pattern: Mapping[str, T] | None, module_name: str, default: T) -> T:
    """The value that `pattern` gives the module, or `default`.

    The first key that matches in the mapping's order wins. A key that is the module's name letter for letter counts
    too, also where it is no regular expression that would match it.
    """
    if not pattern:
        return default
    return pattern.get(get_pattern_key(pattern, module_name), default)
