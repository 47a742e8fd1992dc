"""Attributes of classes replaced, and put back as the very objects that they were."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

_ABSENT = object()


class Replacements:
    """What was changed on classes, in order, and what was there before."""

    def __init__(self) -> None:
        self._before: list[tuple[type, str, Any]] = []

    def __bool__(self) -> bool:
        return bool(self._before)

    def add(self, cls: type, name: str, value: Any) -> None:
        """Give the class an attribute that it does not have.

        Raises:
            AttributeError: It has one.
        """
        if hasattr(cls, name):
            raise AttributeError(f"{cls.__module__}.{cls.__qualname__}.{name}: expected none, got one")
        self._set(cls, name, value)

    def wrap(self, cls: type, name: str, make: Callable[[Any], Any]) -> None:
        """Replace a method, the class's own or inherited, by what `make` makes of it.

        Raises:
            AttributeError: There is no such method.
        """
        self._set(cls, name, make(getattr(cls, name)))

    def _set(self, cls: type, name: str, value: Any) -> None:
        self._before.append((cls, name, cls.__dict__.get(name, _ABSENT)))
        setattr(cls, name, value)

    def undo(self) -> None:
        """Put everything back, the last change first."""
        while self._before:
            cls, name, before = self._before.pop()
            if before is _ABSENT:
                delattr(cls, name)
            else:
                setattr(cls, name, before)
