"""Long lists of module names cut down to the few endings that select the same modules."""

from __future__ import annotations

from collections.abc import Iterable


def find_minimal_target_modules(target_modules: Iterable[str], other_module_names: Iterable[str]) -> set[str]:
    """Name endings that select all of `target_modules` and none of `other_module_names`.

    `{"layers.0.q_proj", ..., "layers.31.q_proj"}` beside other names that do not end so becomes `{"q_proj"}`. The
    result is the one PEFT finds: names are taken in the order of their endings, and each that no chosen ending covers
    yet adds its shortest ending that no other module has. It is written into the adapter's configuration file.

    Raises:
        ValueError: `target_modules` is empty, a string, or contains an empty name, or the two overlap.
    """
    if isinstance(target_modules, str) or not target_modules:
        raise ValueError(f"target_modules should be a list or set of strings, got {target_modules!r}.")
    targets, others = set(target_modules), set(other_module_names)
    if "" in targets:
        raise ValueError("target_modules should not contain an empty string.")
    if not targets.isdisjoint(others):
        raise ValueError(
            f"target_modules and other_module_names contain common elements: {sorted(targets & others)[:3]}"
        )

    taken = {ending for name in others for ending in _endings(name)}
    chosen: set[str] = set()
    for endings in sorted(_endings(name) for name in targets):
        if chosen.isdisjoint(endings):
            free = next((ending for ending in endings if ending not in taken), None)
            if free is not None:
                chosen.add(free)
    return chosen or targets


def _endings(name: str) -> list[str]:
    """The ways to end a name at its parts, shortest first: `a.b.c` gives `c`, `b.c`, `a.b.c`."""
    endings = []
    dot = len(name)
    while (dot := name.rfind(".", 0, dot)) >= 0:
        endings.append(name[dot + 1 :])
    return [*endings, name]
