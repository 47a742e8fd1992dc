"""When a scheme's change of the base weight happens: at once, or together with all others after the last check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch

# The new base weight from the old one, both [out_features, in_features].
BaseUpdate = Callable[[torch.Tensor], torch.Tensor]


@dataclass
class _Postponed:
    """Changes to make later: in order, and by the identity of the stored weight."""

    changes: list[Callable[[], None]] = field(default_factory=list)
    updates: dict[int, list[BaseUpdate]] = field(default_factory=dict)


_POSTPONED: ContextVar[_Postponed | None] = ContextVar("pylora_postponed_base_updates", default=None)


@contextmanager
def base_updates_at_end() -> Iterator[None]:
    """Postpone changes of base weights to the end of the context; an exception in it drops them all.

    What has to be kept for a postponed change is A and B, not a copy of the weight. Contexts nest: the outermost one
    makes the changes.
    """
    if _POSTPONED.get() is not None:
        yield
        return
    postponed = _Postponed()
    token = _POSTPONED.set(postponed)
    try:
        yield
    finally:
        _POSTPONED.reset(token)
    for change in postponed.changes:
        change()


def at_end(change: Callable[[], None]) -> None:
    """Make a change of a base weight, now or at the end of the context."""
    postponed = _POSTPONED.get()
    if postponed is None:
        change()
    else:
        postponed.changes.append(change)


def apply_base_update(stored: torch.Tensor, open_weight: Callable[[], Any], update: BaseUpdate) -> None:
    """Replace the weight W that `open_weight` gives access to by `update(W)`, now or at the end of the context.

    Args:
        stored: The tensor that holds W in the module.
        open_weight: Gives an object with `read` and `write`.
        update: The change.
    """
    weight = open_weight()

    def change() -> None:
        with torch.no_grad():
            weight.write(update(weight.read()))

    postponed = _POSTPONED.get()
    if postponed is None:
        change()
        return
    postponed.changes.append(change)
    postponed.updates.setdefault(id(stored), []).append(update)


def as_it_will_be(stored: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`weight`, read from `stored`, with the changes that are postponed: what DoRA's norms and further schemes see."""
    postponed = _POSTPONED.get()
    if postponed is not None:
        for update in postponed.updates.get(id(stored), ()):
            weight = update(weight).to(weight.dtype)
    return weight


def without_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> BaseUpdate:
    """The update to W - scaling · b·a, computed in f32."""

    def update(weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight.to(torch.float32), b, a, alpha=-scaling)

    return update
