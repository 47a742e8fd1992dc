"""What can go wrong with an adapter pool. Each error concerns the call that raised it alone; the pool goes on."""

from __future__ import annotations

from pylora.errors import PeftError


class PoolError(PeftError):
    """Base of the errors of `pylora.serving`."""


class UnknownAdapterError(PoolError, KeyError):
    """No adapter of that name has been registered, or it has been removed."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class NoFreeSlotError(PoolError, RuntimeError):
    """Every slot holds an adapter that is pinned or in use."""


class AdapterInUseError(PoolError, RuntimeError):
    """An adapter cannot be evicted: requests in flight use it, or it is pinned."""


class AdapterMismatchError(PoolError, ValueError):
    """An adapter that does not fit the pool: its names, shapes or ranks, or files that contradict one another."""


class AdapterFileError(PoolError, OSError):
    """An adapter's files are missing, broken, or no adapter's."""
