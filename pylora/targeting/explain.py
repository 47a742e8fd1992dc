"""Why nothing was selected: what came close."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from pylora.targeting.match import TargetMatcher

_SHOWN = 3


def explain_no_match(target_modules: Any, matcher: TargetMatcher, names: list[str], excluded: list[str]) -> str:
    """Sentences to append to an error, each with a leading space; empty when there is nothing to say.

    Args:
        target_modules: What was looked for.
        matcher: The rules that selected nothing.
        names: All module names that were looked at.
        excluded: Those that `exclude_modules` or `modules_to_save` ruled out.
    """
    if not names:
        return " The model holds no modules, and it cannot be replaced itself: put it into an nn.Sequential."
    in_other_layers = [name for name in names if matcher.matches_but_for_layer(name)]
    if in_other_layers:
        return f" Only the layer rules it out for: {_some(in_other_layers)}."
    if isinstance(target_modules, str):
        return _explain_pattern(target_modules, names)
    ruled_out = [name for name in excluded if matcher.is_named_as_target(name)]
    if ruled_out:
        return f" Excluded although they are targets: {_some(ruled_out)}."
    return _explain_names(target_modules or (), names)


def _explain_pattern(pattern: str, names: list[str]) -> str:
    partly = [name for name in names if re.search(pattern, name)]
    if not partly:
        return ""
    return (
        " A string has to match the whole name as a regular expression; this one matches a part of "
        f"{_some(partly)}. To match the end of a name, pass a list: [{pattern!r}]."
    )


def _explain_names(wanted: Iterable[str], names: list[str]) -> str:
    # Shallow names first, so that one example stands for all layers.
    by_last_part = {name.rpartition(".")[2]: name for name in reversed(names)}
    similar: dict[str, str] = {}
    for name in sorted(wanted):
        for close in difflib.get_close_matches(name.rpartition(".")[2], by_last_part, n=_SHOWN):
            similar[close] = by_last_part[close]
    return f" Similar names in the model: {_some(similar.values())}." if similar else ""


def _some(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(repr(name) for name in names[:_SHOWN])
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
