"""The command line as a whole: help, version, and how subcommands join."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from pylora._version import __version__
from pylora.cli import registry
from pylora.cli.app import build_app


def run(*arguments: str):
    return CliRunner().invoke(build_app(), list(arguments))


def test_version():
    result = run("--version")
    assert (result.exit_code, result.output.strip()) == (0, f"pylora {__version__}")


@pytest.mark.parametrize("flag", ["-h", "--help"])
def test_help_lists_the_commands(flag):
    result = run(flag)
    assert result.exit_code == 0
    for name in registry.COMMANDS:
        assert name in result.output


def test_each_command_has_help_with_an_example():
    build_app()
    assert "doctor" in registry.COMMANDS
    for name in registry.COMMANDS:
        result = run(name, "--help")
        assert result.exit_code == 0
        assert f"pylora {name}" in result.output.split("Usage", 1)[1].split("\n", 1)[1]


def test_unknown_command_and_option():
    assert run("no-such-command").exit_code == 2
    assert run("doctor", "--no-such-option").exit_code == 2


def test_a_name_is_registered_once(monkeypatch):
    monkeypatch.setattr(registry, "COMMANDS", {})
    registry.command("twice")(run)
    with pytest.raises(ValueError, match="'twice'"):
        registry.command("twice")(run)
