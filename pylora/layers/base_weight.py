"""The base weight as a protocol: what merging and delta computation need to know of a layer's frozen weight.

A quantised or sharded base gets another implementation of `BaseWeight`, never a LoRA layer of its own.
"""

from __future__ import annotations

import sys
from typing import Protocol

import torch
from torch import nn

from pylora.errors import UnsupportedFeatureError
from pylora.init import as_it_will_be


def conv1d_class() -> type[nn.Module] | None:
    """transformers' `Conv1D`, or None while transformers is not imported (then no module can be one)."""
    module = sys.modules.get("transformers.pytorch_utils")
    return getattr(module, "Conv1D", None)


def is_conv1d(module: nn.Module) -> bool:
    """Whether `module` is transformers' Conv1D: a dense layer that keeps its weight as [in_features, out_features]."""
    cls = conv1d_class()
    return cls is not None and isinstance(module, cls)


class BaseWeight(Protocol):
    """Read and replace access to a frozen weight W of shape [out_features, in_features]."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features)."""
        ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype W computes in."""
        ...

    def read(self) -> torch.Tensor:
        """W as a dense [out_features, in_features] tensor in `dtype`; it may alias the storage and is not written."""
        ...

    def storage(self) -> torch.Tensor | None:
        """W as [out_features, in_features] where it is stored, to be changed in place; None if that cannot be."""
        ...

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        """A view as [out_features, in_features] of a tensor that is laid out as the layer stores its weight."""
        ...

    def write(self, value: torch.Tensor) -> None:
        """Replace W by `value` ([out_features, in_features], any floating dtype), rounding once to `dtype`."""
        ...


class DenseBaseWeight:
    """A plain floating-point tensor, stored as [out, in], or as [in, out] when `transposed` (Conv1D).

    A stack of such matrices, [n, out, in] or [n, in, out], is seen as [n, out, in].

    Args:
        layer: The base layer.
        transposed: How it stores its weight.
        name: The layer's attribute that is the weight.

    Raises:
        UnsupportedFeatureError: The weight has no data (meta), or is quantised or sharded.
    """

    def __init__(self, layer: nn.Module, transposed: bool, name: str = "weight") -> None:
        self._tensor: torch.Tensor = getattr(layer, name)
        self._transposed = transposed
        problem = _not_dense(self._tensor)
        if problem:
            raise UnsupportedFeatureError(
                f"merge: base_layer.{name} of {type(layer).__name__}: expected a floating-point tensor, got {problem}"
            )

    @property
    def shape(self) -> tuple[int, int]:
        rows, columns = self._tensor.shape[-2:]
        return (columns, rows) if self._transposed else (rows, columns)

    @property
    def dtype(self) -> torch.dtype:
        return self._tensor.dtype

    def read(self) -> torch.Tensor:
        return as_it_will_be(self._tensor, self.as_matrix(self._tensor.detach()))

    def storage(self) -> torch.Tensor | None:
        # Detached, it still shares the version counter. Not while an initialisation is to change the weight later.
        stored = self.as_matrix(self._tensor.detach())
        in_place = stored.data_ptr() == self._tensor.data_ptr() and self.read().data_ptr() == stored.data_ptr()
        return stored if in_place else None

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.mT if self._transposed else tensor

    def write(self, value: torch.Tensor) -> None:
        # In place, so that a tied weight stays tied; through the tensor itself, so that its version counter moves.
        with torch.no_grad():
            self._tensor.copy_(value.mT if self._transposed else value)


class ConvBaseWeight(DenseBaseWeight):
    """A convolution's kernel, stored as [out_channels, in_channels, kernel...] and seen as [out_channels, the rest]."""

    @property
    def shape(self) -> tuple[int, int]:
        rows = self._tensor.shape[0]
        return rows, self._tensor.numel() // rows

    def as_matrix(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor.flatten(1)

    def write(self, value: torch.Tensor) -> None:
        super().write(value.view(self._tensor.shape))


def _not_dense(tensor: torch.Tensor) -> str:
    """What keeps `tensor` from being read and written element by element, "" if nothing does."""
    if tensor.is_meta:
        return "a meta tensor: bring an offloaded or empty model to a device first"
    if not tensor.is_floating_point():
        return f"{tensor.dtype}: a quantised weight cannot be merged into"
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__:
        return f"a {type(tensor).__name__}, which is quantised or sharded"
    return ""
