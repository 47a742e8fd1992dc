"""Which slot each token of a batch uses: taken from vLLM once a batch, used by all layers."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenSlots:
    """The slots of the tokens, always in the same memory, so that a compiled graph sees each batch's.

    Args:
        capacity: the most tokens of a batch.

    Attributes:
        slots: int32 `[capacity]`; -1 for no adapter, and beyond the batch's tokens.
        used: the slots that the batch uses, rising.
    """

    def __init__(self, capacity: int) -> None:
        self.slots = torch.full((capacity,), -1, dtype=torch.int32)
        self.used: tuple[int, ...] = ()
        self._count = 0
        self._first: Tensor | None = None

    def set(self, slots: Tensor) -> None:
        """Take the slots of a new batch.

        Args:
            slots: integers `[num_tokens]`, -1 for no adapter.
        """
        count = slots.shape[0]
        self.slots[:count] = slots
        self.slots[count : self._count] = -1
        self._count = count
        self._first = None
        self.used = tuple(slot for slot in torch.unique(slots).tolist() if slot >= 0)

    @property
    def is_idle(self) -> bool:
        """Whether no token has an adapter. A compiled graph serves every batch, so that it is never idle."""
        return not self.used and not torch.compiler.is_compiling()

    def first(self, num_tokens: int) -> Tensor:
        """The slots of the first tokens, int32 `[num_tokens]`. What an engine adds to pad a batch has no adapter."""
        if torch.compiler.is_compiling():
            return self.slots[:num_tokens]
        if self._first is None or self._first.shape[0] != num_tokens:
            self._first = self.slots[:num_tokens]
        return self._first
