"""The registry of subcommands: one module in `pylora.cli.commands` each.

A module there decorates its function with `@command("name")`. Its signature is the command's interface, read by typer;
its docstring is the help text. It imports what it works with inside the function, so that `pylora --help` stays quick.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

Function = TypeVar("Function", bound=Callable[..., Any])

COMMANDS: dict[str, Callable[..., Any]] = {}


def command(name: str) -> Callable[[Function], Function]:
    """Register the decorated function as the subcommand `name`.

    Raises:
        ValueError: The name is taken.
    """

    def register(function: Function) -> Function:
        if name in COMMANDS:
            raise ValueError(f"command: name: expected a new one, got {name!r}, which {COMMANDS[name].__module__} has")
        COMMANDS[name] = function
        return function

    return register
