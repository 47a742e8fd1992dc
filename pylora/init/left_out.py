"""Leaving out the random draws of new factors that a load fills."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_left_out: ContextVar[bool] = ContextVar("pylora_init_left_out", default=False)


@contextmanager
def draws_left_out(leave_out: bool = True) -> Iterator[None]:
    """Within the context, schemes that do nothing but draw numbers leave the factors undefined.

    Whoever opens it fills them, and initialises those that it has no values for.

    Args:
        leave_out: False makes the draws again, within an outer context.
    """
    token = _left_out.set(leave_out)
    try:
        yield
    finally:
        _left_out.reset(token)


def are_draws_left_out() -> bool:
    """Whether `draws_left_out` is in force."""
    return _left_out.get()
