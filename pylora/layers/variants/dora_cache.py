"""Keeping DoRA's row norms between forwards: the switch, and when a kept norm is still right."""

from __future__ import annotations

from types import TracebackType
from typing import Any, NamedTuple

import torch


class _Switch:
    enabled: bool = False


def caching_enabled() -> bool:
    """Whether DoRA layers in evaluation mode keep their norms."""
    return _Switch.enabled


class DoraCaching:
    """Lets DoRA layers keep their weight norms between forwards in evaluation mode, for one number per output feature.

    A kept norm is computed again when the base weight, a factor or the scaling has changed since. Writes that torch
    does not count are not noticed: those through `.data` (`weight.data.add_(...)`) and through numpy or a raw pointer;
    a layer forgets its norm in a forward with caching off, and when it is put into training mode.

    Args:
        enabled: What the context switches caching to.

    Example:
        >>> with DoraCaching():
        ...     output = model(inputs)
        >>> DoraCaching()(enabled=True)  # from here on
    """

    def __init__(self, enabled: bool = True) -> None:
        self.enabled = enabled
        self.prev_value: bool | None = None

    def __enter__(self) -> None:
        self.prev_value = _Switch.enabled
        _Switch.enabled = self.enabled

    def __exit__(
        self, exc_type: type[BaseException] | None, exc: BaseException | None, traceback: TracebackType | None
    ) -> None:
        _Switch.enabled = bool(self.prev_value)
        self.prev_value = None

    def __call__(self, enabled: bool = True) -> None:
        """Switch caching on or off from here on."""
        _Switch.enabled = enabled


class _Seen(NamedTuple):
    """A tensor as it was. The alias keeps its memory from being given to another tensor, and shares its version."""

    alias: torch.Tensor
    version: int

    def is_now(self, tensor: torch.Tensor) -> bool:
        alias = self.alias
        return (
            tensor.data_ptr() == alias.data_ptr()
            and tensor._version == self.version
            and tensor.dtype is alias.dtype
            and tensor.shape == alias.shape
            and tensor.stride() == alias.stride()
        )


class KeptNorm(NamedTuple):
    """A norm, and what it was computed from."""

    norm: torch.Tensor
    sources: tuple[_Seen, ...]
    scaling: Any

    @classmethod
    def of(cls, norm: torch.Tensor, sources: tuple[torch.Tensor, ...], scaling: Any) -> KeptNorm | None:
        """None where torch does not count the writes to a source, or the scaling is a tensor."""
        if isinstance(scaling, torch.Tensor) or any(tensor.is_inference() or tensor.is_meta for tensor in sources):
            return None
        return cls(norm, tuple(_Seen(tensor.detach(), tensor._version) for tensor in sources), scaling)

    def is_valid(self, sources: tuple[torch.Tensor, ...], scaling: Any) -> bool:
        """Whether these are still what the norm was computed from."""
        return (
            not isinstance(scaling, torch.Tensor)
            and scaling == self.scaling
            and not any(tensor.is_inference() for tensor in sources)
            and all(seen.is_now(tensor) for seen, tensor in zip(self.sources, sources, strict=True))
        )
