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
        open_weight: Gives a `MutableWeight`.
        update: The change.
    """
    weight = open_weight()

    def change() -> None:
        with torch.no_grad():
            there = weight.storage()
            if isinstance(update, WithoutProduct) and there is not None and there.dtype == torch.float32:
                update.subtract_from_(there)
            else:
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


@dataclass(frozen=True)
class WithoutProduct:
    """The update to W - scaling · b·a, computed in f32.

    Attributes:
        a: [rank, in_features], f32.
        b: [out_features, rank], f32.
        scaling: The factor.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float

    def __call__(self, weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight.to(torch.float32), self.b, self.a, alpha=-self.scaling)

    def subtract_from_(self, weight: torch.Tensor) -> None:
        """The same in place, for an f32 weight: without another tensor of its size."""
        weight.addmm_(self.b, self.a, alpha=-self.scaling)
