"""`pylora convert`: LoRA files of other programs to PEFT's layout and back."""

from __future__ import annotations

from contextlib import ExitStack
from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from pylora.cli.failures import clear_failures
from pylora.cli.registry import command


class Name(str, Enum):
    """The layouts there are."""

    peft = "peft"
    loralib = "loralib"
    kohya = "kohya"
    diffusers = "diffusers"
    torchtune = "torchtune"


@command("convert")
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A file, or an adapter's folder in PEFT's layout.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder for peft, a new file for the others.")],
    to: Annotated[Name, typer.Option(help="The layout to write.")] = Name.peft,
    from_: Annotated[
        Name | None,
        typer.Option("--from", help="The layout of SOURCE; default: found by its names.", show_default=False),
    ] = None,
    base: Annotated[
        str,
        typer.Option(
            metavar="BASE", help="The base model's folder or hub id: its names (kohya), its heads (torchtune)."
        ),
    ] = "",
    alpha: Annotated[
        float | None, typer.Option(help="LoRA's alpha, where the file does not say it (loralib, torchtune).")
    ] = None,
    component: Annotated[
        str, typer.Option(metavar="NAME", help="unet, transformer, text_encoder: what an adapter of one model is for.")
    ] = "",
) -> None:
    """Convert a LoRA between PEFT's layout and those of loralib, kohya-ss, diffusers and torchtune.

    Numbers are carried over as they are; ranks and scalings that differ by layer become patterns. A pipeline's adapters
    (kohya, diffusers) become a folder with one adapter for each component.

    Examples:

    * `pylora convert style.safetensors ./style` kohya's or diffusers' file to PEFT's layout

    * `pylora convert ./style style.safetensors --to kohya`

    * `pylora convert ./adapter unet.safetensors --to diffusers --component unet`

    * `pylora convert adapter_0.pt ./adapter --base ./llama --alpha 16` of torchtune

    * `pylora convert lora.pt ./adapter --alpha 32` of loralib
    """
    with clear_failures("convert"), ExitStack() as stack:
        from pylora.offline.base import BaseCheckpoint
        from pylora.offline.convert import convert as run
        from pylora.offline.layouts import Hints

        bases = {}
        if base:
            parts = [
                path for path in sorted(Path(base).glob("*/config.json")) if any(path.parent.glob("*.safetensors"))
            ]
            for name, place in {path.parent.name: str(path.parent) for path in parts}.items() or {"": base}.items():
                bases[name] = stack.enter_context(BaseCheckpoint(place))
        done = run(source, out, to.value, None if from_ is None else from_.value, Hints(alpha, component, bases))
    layers = ", ".join(f"{count} layers{f' of {name}' if name else ''}" for name, count in done.layers.items())
    typer.echo(f"converted {layers} from {done.from_} to {to.value}: {out}")
    if done.note:
        typer.echo(f"note: {done.note}")
