"""Puts the registered subcommands together into one typer application."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Annotated

import typer

from pylora._version import __version__
from pylora.cli import commands
from pylora.cli.registry import COMMANDS


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"pylora {__version__}")
        raise typer.Exit


def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """pylora: LoRA fine-tuning and serving for PyTorch.

    Something does not work after installing? Start with `pylora doctor`.
    """


def build_app() -> typer.Typer:
    """Import every module of `pylora.cli.commands` and return the application with what they registered."""
    for module in pkgutil.iter_modules(commands.__path__):
        importlib.import_module(f"{commands.__name__}.{module.name}")
    app = typer.Typer(
        no_args_is_help=True, rich_markup_mode="markdown", context_settings={"help_option_names": ["-h", "--help"]}
    )
    app.callback()(_root)
    for name, function in sorted(COMMANDS.items()):
        app.command(name)(function)
    return app
