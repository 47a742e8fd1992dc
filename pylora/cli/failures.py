"""How a command ends when what it was given cannot be used."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer


@contextmanager
def clear_failures(command: str) -> Iterator[None]:
    """Turn mistakes in the input, a full disk and an interrupt into one line and an exit status.

    The status is 2 for an input or a disk, 130 for an interrupt (128 + SIGINT, as shells have it).
    """
    from pylora.errors import UnsupportedFeatureError
    from pylora.offline.errors import OfflineError

    try:
        yield
    except BrokenPipeError:  # `pylora inspect ... | head`
        raise typer.Exit(0) from None
    except (OfflineError, UnsupportedFeatureError, OSError) as error:
        typer.echo(f"pylora {command}: {_message(error)}", err=True)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        typer.echo(f"pylora {command}: interrupted; nothing was left behind", err=True)
        raise typer.Exit(130) from None


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        place = f": {error.filename}" if error.filename else ""
        return f"{error.strerror}{place}"
    return str(error)
