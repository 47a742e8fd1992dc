"""The layouts there are besides PEFT's; an addition is a module and an entry."""

from __future__ import annotations

from pylora.offline.errors import OfflineError
from pylora.offline.layouts import diffusers, kohya, loralib, torchtune
from pylora.offline.layouts.layout import Layout, Source

LAYOUTS: dict[str, Layout] = {
    layout.name: layout for layout in (kohya.LAYOUT, diffusers.LAYOUT, torchtune.LAYOUT, loralib.LAYOUT)
}


def find_layout(source: Source) -> Layout:
    """The layout that a file's names are of.

    Raises:
        OfflineError: none.
    """
    keys = list(source.tensors)
    for layout in LAYOUTS.values():
        if layout.matches(keys):
            return layout
    sample = f", such as {keys[0]!r}" if keys else ""
    raise OfflineError(f"{source.place}: expected the names of {', '.join(LAYOUTS)} or PEFT, got others{sample}")
