"""`pylora doctor`: is this installation sound, and if it is not, what mends it."""

from __future__ import annotations

import dataclasses
import json
from typing import TYPE_CHECKING, Annotated

import typer

from pylora.cli.registry import command

if TYPE_CHECKING:
    from collections.abc import Iterator

    from rich.console import Console

    from pylora.cli.diagnosis import Diagnosis


@command("doctor")
def doctor(
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
) -> None:
    """Check this installation and say how to mend what is wrong.

    Shows the versions, the instruction set in use, the CUDA architectures built, the torch that pylora was built for
    and the one found, and the packages it works with. The exit status is 0 when all is well, 1 when something is wrong.

    Examples:

    * `pylora doctor`

    * `pylora doctor --json > doctor.json` to attach to a report

    * `PYLORA_CPU_ISA=scalar pylora doctor` to see what a cap on the instruction set does
    """
    from pylora.cli.diagnosis import diagnose

    diagnosis = diagnose()
    if as_json:
        typer.echo(json.dumps(dataclasses.asdict(diagnosis), indent=2))
    else:
        from rich.console import Console

        _print(diagnosis, Console(highlight=False, soft_wrap=True))
    raise typer.Exit(1 if diagnosis.problems else 0)


def _print(diagnosis: Diagnosis, console: Console) -> None:
    from rich.markup import escape

    for name, value in _rows(diagnosis):
        console.print(f"[bold]{name:<18}[/bold]{escape(value)}")
    for note in diagnosis.notes:
        console.print(f"\n[yellow]note:[/yellow] {escape(note)}")
    for problem in diagnosis.problems:
        console.print(f"\n[red]problem:[/red] {escape(problem)}")
    if not diagnosis.problems:
        console.print("\n[green]All is well.[/green]")


def _rows(diagnosis: Diagnosis) -> Iterator[tuple[str, str]]:
    pylora, extension, cpu, torch = diagnosis.pylora, diagnosis.extension, diagnosis.cpu, diagnosis.torch
    yield "pylora", f"{pylora['version']} in {pylora['location']}, Python {pylora['python']}"
    if "version" in extension:
        yield "native extension", f"{extension['version']}, compiled by {extension['compiler']}"
        yield "torch", f"{torch['version']} found, built for {extension['torch']}"
        yield (
            "CPU kernels",
            f"{cpu['in_use'] or 'none'} in use; built {_list(extension['isas_built'])}; "
            + (f"this CPU supports {_list(cpu['supported'])}"),
        )
        yield "CUDA kernels", f"built for {_list([f'sm_{arch}' for arch in extension['cuda_archs']])}"
    else:
        yield "native extension", "not usable"
        yield "torch", str(torch["version"] or "not found")
    yield "GPU", _list([f"{gpu['name']} (sm_{gpu['arch']})" for gpu in diagnosis.gpus], nothing="none visible")
    if torch["version"]:
        yield "torch's CUDA", torch["cuda"] or "none (a CPU build)"
    for name, version in diagnosis.packages.items():
        if name != "torch":
            yield name, version or "not installed"


def _list(items: list[str], nothing: str = "none") -> str:
    return ", ".join(items) or nothing
