"""One module name against a configuration: is it a target?"""

from __future__ import annotations

import enum
import re
from collections.abc import Iterable
from typing import Any


class Match(enum.Enum):
    """What a configuration says about a module name. Only TARGET is true."""

    TARGET = "target"
    EXCLUDED = "excluded"
    NONE = "none"

    def __bool__(self) -> bool:
        return self is Match.TARGET


class TargetMatcher:
    """A configuration's targeting rules, prepared once and asked for many names.

    Rules, the first that applies decides:

    1. `exclude_modules` matches: EXCLUDED. A list matches names that are in it or end with an entry after a dot, a
       string is a regular expression for the whole name.
    2. The name is, or lies inside, a module of `modules_to_save`: EXCLUDED.
    3. `target_modules` is a string: TARGET when it matches the whole name as a regular expression.
    4. The name is in `target_modules`: TARGET, whatever its layer.
    5. The name ends with an entry of `target_modules` after a dot: TARGET when its layer passes, see below.

    `layers_to_transform`, a number or a non-empty list, filters by layer. A name's layer is the number after the first
    occurrence of one of `layers_pattern` as a name part (tried in order); without `layers_pattern` it is the first
    number that has two name parts or more before it. A name without a layer does not pass.
    """

    def __init__(self, config: Any, target_modules: Any = None) -> None:
        """Prepare the rules of `config`, with `target_modules` in the place of its own when given."""
        self._exclude = _name_rule(config.exclude_modules) if getattr(config, "exclude_modules", None) else None
        self._saved = [
            re.compile(rf"(^|.*\.){name}($|\..*)") for name in getattr(config, "modules_to_save", None) or ()
        ]
        self._target = _name_rule(config.target_modules if target_modules is None else target_modules)
        self._layers = _wanted_layers(getattr(config, "layers_to_transform", None))
        self._layer_patterns = _layer_patterns(getattr(config, "layers_pattern", None))

    def __call__(self, name: str) -> Match:
        if self._exclude is not None and (self._exclude.whole(name) or self._exclude.ending(name)):
            return Match.EXCLUDED
        if any(pattern.match(name) for pattern in self._saved):
            return Match.EXCLUDED
        if self._target.whole(name):
            return Match.TARGET
        if self._target.ending(name) and (self._layers is None or self._layer_of(name) in self._layers):
            return Match.TARGET
        return Match.NONE

    def matches_but_for_layer(self, name: str) -> bool:
        """Whether only `layers_to_transform` keeps the name from being a target."""
        return self(name) is Match.NONE and self._target.ending(name)

    def is_named_as_target(self, name: str) -> bool:
        """Whether `target_modules` alone matches the name, before exclusions and layers are looked at."""
        return self._target.whole(name) or self._target.ending(name)

    def _layer_of(self, name: str) -> int | None:
        for pattern in self._layer_patterns:
            match = pattern.match(name)
            if match is not None:
                return int(match["idx"])
        return None


def check_target_module_exists(config: Any, key: str) -> Match:
    """What `config` says about the module name `key`; true exactly for a target. For many names use TargetMatcher."""
    return TargetMatcher(config)(key)


class _Pattern:
    """A regular expression for whole names."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def whole(self, name: str) -> bool:
        return self._pattern.fullmatch(name) is not None

    def ending(self, name: str) -> bool:
        return False


class _Names:
    """A set of names, or of what comes after some dot of a name."""

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        # How many dots, from the right, an ending can begin after.
        self._depth = 1 + max((name.count(".") for name in self._names), default=-1)

    def whole(self, name: str) -> bool:
        return name in self._names

    def ending(self, name: str) -> bool:
        dot = len(name)
        for _ in range(self._depth):
            dot = name.rfind(".", 0, dot)
            if dot < 0:
                return False
            if name[dot + 1 :] in self._names:
                return True
        return False


def _name_rule(value: str | Iterable[str] | None) -> _Pattern | _Names:
    return _Pattern(value) if isinstance(value, str) else _Names(value or ())


def _wanted_layers(value: Any) -> frozenset[int] | None:
    """The layer numbers to keep, or None when the layer does not matter."""
    if value is None or value == []:
        return None
    return frozenset([value] if isinstance(value, int) else value)


def _layer_patterns(value: str | list[str] | None) -> list[re.Pattern[str]]:
    # Lazy prefixes: the first number counts, which is the layer; later ones count experts and the like.
    if not value:
        return [re.compile(r".*?\.[^.]*\.(?P<idx>\d+)\.")]
    names = [value] if isinstance(value, str) else value
    return [re.compile(rf"(?:^|.*?\.){name}\.(?P<idx>\d+)\.") for name in names]
