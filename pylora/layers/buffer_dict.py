"""Buffers by name, as `nn.ParameterDict` holds parameters: they move with their module and are not saved."""

from __future__ import annotations

from collections.abc import ItemsView, Iterable, Iterator, KeysView, Mapping, ValuesView
from typing import Any

import torch
from torch import nn


class BufferDict(nn.Module):
    """A dictionary of tensors that are buffers of the module.

    Args:
        buffers: First content.
        persistent: Whether the tensors are in the state dict.
    """

    def __init__(self, buffers: Mapping[str, torch.Tensor] | None = None, persistent: bool = False) -> None:
        super().__init__()
        self.persistent = persistent
        self.update(buffers or {})

    def __getitem__(self, key: str) -> torch.Tensor:
        return self._buffers[key]  # type: ignore[return-value]

    def __setitem__(self, key: str, buffer: torch.Tensor) -> None:
        self.register_buffer(key, buffer, persistent=self.persistent)

    def __delitem__(self, key: str) -> None:
        del self._buffers[key]

    def __len__(self) -> int:
        return len(self._buffers)

    def __iter__(self) -> Iterator[str]:
        return iter(self._buffers)

    def __contains__(self, key: Any) -> bool:
        return key in self._buffers

    def keys(self) -> KeysView[str]:
        """The names."""
        return self._buffers.keys()

    def values(self) -> ValuesView[Any]:
        """The tensors."""
        return self._buffers.values()

    def items(self) -> ItemsView[str, Any]:
        """Names and tensors."""
        return self._buffers.items()

    def pop(self, key: str) -> torch.Tensor:
        """Remove one and return it."""
        buffer = self[key]
        del self[key]
        return buffer

    def clear(self) -> None:
        """Remove all."""
        self._buffers.clear()

    def update(self, buffers: Mapping[str, torch.Tensor] | Iterable[tuple[str, torch.Tensor]]) -> None:
        """Add or replace several, from a dictionary of any kind or from pairs."""
        for key, buffer in dict(buffers).items():
            self[key] = buffer
