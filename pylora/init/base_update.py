"""When a scheme's change of the base weight happens: at once, or together with all others after the last check."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

# The new base weight from the old one, both [out_features, in_features].
BaseUpdate = Callable[[torch.Tensor], torch.Tensor]

_PENDING: ContextVar[list[Callable[[], None]] | None] = ContextVar("pylora_pending_base_updates", default=None)


@contextmanager
def base_updates_at_end() -> Iterator[None]:
    """Postpone changes of base weights to the end of the context; an exception in it drops them all.

    What has to be kept for a postponed change is A and B, not a copy of the weight. Contexts nest: the outermost one
    makes the changes.
    """
    if _PENDING.get() is not None:
        yield
        return
    pending: list[Callable[[], None]] = []
    token = _PENDING.set(pending)
    try:
        yield
    finally:
        _PENDING.reset(token)
    for change in pending:
        change()


def apply_base_update(open_weight: Callable[[], Any], update: BaseUpdate) -> None:
    """Replace the weight W that `open_weight` gives access to by `update(W)`, now or at the end of the context."""
    weight = open_weight()

    def change() -> None:
        with torch.no_grad():
            weight.write(update(weight.read()))

    pending = _PENDING.get()
    if pending is None:
        change()
    else:
        pending.append(change)


def without_product(a: torch.Tensor, b: torch.Tensor, scaling: float) -> BaseUpdate:
    """The update to W - scaling · b·a, computed in f32."""

    def update(weight: torch.Tensor) -> torch.Tensor:
        return torch.addmm(weight.to(torch.float32), b, a, alpha=-scaling)

    return update
