"""A parameter with low-rank updates that are added where it is used, not to it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_map


class Parts(NamedTuple):
    """The matrices W + lhs · rhs, or a stack of them.

    Attributes:
        weight: W, [..., rows, columns].
        lhs: [..., rows, rank].
        rhs: [..., rank, columns].
    """

    weight: torch.Tensor
    lhs: torch.Tensor
    rhs: torch.Tensor

    def dense(self) -> torch.Tensor:
        """The sum, in one operation where torch has it."""
        # Autocast would change the dtype.
        with torch.autocast(self.weight.device.type, enabled=False):
            if self.weight.dim() == 2:
                return torch.addmm(self.weight, self.lhs, self.rhs)
            if self.weight.dim() == 3:
                return torch.baddbmm(self.weight, self.lhs, self.rhs)
            return self.weight + self.lhs @ self.rhs

    def transposed(self) -> Parts:
        """The same matrices transposed."""
        return Parts(self.weight.mT, self.rhs.mT, self.lhs.mT)


class LazyWeight(torch.Tensor):
    """The tensor W + lhs · rhs, of which nothing of W's size is made as long as it is only indexed and multiplied.

    Experts are used in three ways: matrix by matrix (`F.linear(x, w[expert])`), gathered (`torch.bmm(x, w[ids])`), and
    all at once (`torch.bmm(x, w)`, `F.grouped_mm(x, w, offs)`). In each the update is two narrow products beside the
    wide one. Anything else is done with the dense sum, which is made once.

    The object has autograd history like any tensor, and no storage: code that does not go through torch's Python
    functions (an `autograd.Function`, a custom operator) computes from the dense sum and sends back a dense gradient.
    """

    _parts: Parts
    _dense: torch.Tensor | None

    @staticmethod
    def make(parts: Parts) -> torch.Tensor:
        """The lazy tensor of these parts, whose shapes and dtypes fit."""
        lazy: Any = _Join.apply(*parts)
        lazy._parts, lazy._dense = parts, None
        return lazy

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        rule = _RULES.get(func)
        # Keywords are rare (`out=`), except where the rule names its.
        if rule is not None and (not kwargs or (func in _KEYWORDS and kwargs.keys() <= _KEYWORDS[func])):
            result = rule(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func in _QUESTIONS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        args, kwargs = tree_map(as_dense, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        args, kwargs = tree_map(_values, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight({tuple(self.shape)}, dtype={self.dtype}, rank={self._parts.lhs.shape[-1]})"


class _Join(torch.autograd.Function):
    """(W, lhs, rhs) -> a `LazyWeight` without its attributes: the way of a dense gradient to the parts."""

    @staticmethod
    def forward(ctx: Any, weight: torch.Tensor, lhs: torch.Tensor, rhs: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(lhs, rhs)
        lazy: Any = torch.Tensor._make_wrapper_subclass(
            LazyWeight,
            weight.shape,
            strides=weight.stride(),
            dtype=weight.dtype,
            device=weight.device,
            layout=weight.layout,
        )
        lazy._parts, lazy._dense = Parts(weight.detach(), lhs.detach(), rhs.detach()), None
        return lazy

    @staticmethod
    def backward(ctx: Any, grad: torch.Tensor) -> Any:
        lhs, rhs = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        return grad if wanted[0] else None, grad @ rhs.mT if wanted[1] else None, lhs.mT @ grad if wanted[2] else None


def as_dense(value: Any) -> Any:
    """A lazy tensor as the sum, with autograd history; anything else as it is."""
    if not isinstance(value, LazyWeight):
        return value
    dense = value._dense
    if dense is None or (torch.is_grad_enabled() and not dense.requires_grad):
        dense = value._dense = value._parts.dense()
    return dense


def _values(value: Any) -> Any:
    if not isinstance(value, LazyWeight):
        return value
    with torch.no_grad():
        return value._parts.dense()


def _linear(x: Any, weight: Any, bias: Any = None) -> Any:
    if not isinstance(weight, LazyWeight) or isinstance(x, LazyWeight) or weight.dim() != 2:
        return NotImplemented
    w, lhs, rhs = weight._parts
    return F.linear(x, w, bias) + F.linear(F.linear(x, rhs), lhs)


def _product(multiply: Callable[..., Any]) -> Callable[..., Any]:
    """`multiply` of a plain and a lazy matrix or stack, in either order."""

    def rule(left: Any, right: Any) -> Any:
        if isinstance(left, LazyWeight) == isinstance(right, LazyWeight):
            return NotImplemented
        if isinstance(right, LazyWeight):
            w, lhs, rhs = right._parts
            return multiply(left, w) + multiply(multiply(left, lhs), rhs)
        w, lhs, rhs = left._parts
        if right.dim() < 2:
            return multiply(w, right) + multiply(lhs, multiply(rhs, right.unsqueeze(-1))).squeeze(-1)
        return multiply(w, right) + multiply(lhs, multiply(rhs, right))

    return rule


def _reflected(multiply: Callable[..., Any]) -> Callable[..., Any]:
    rule = _product(multiply)
    return lambda right, left: rule(left, right)


def _grouped(multiply: Callable[..., Any]) -> Callable[..., Any]:
    def rule(x: Any, weight: Any, *, offs: Any = None) -> Any:
        if isinstance(x, LazyWeight) or offs is None:
            return NotImplemented
        w, lhs, rhs = weight._parts
        # The kernels want rows of 16 bytes.
        missing = -lhs.shape[-1] % (16 // lhs.element_size())
        lhs, rhs = F.pad(lhs, (0, missing)), F.pad(rhs, (0, 0, 0, missing))
        return multiply(x, w, offs=offs) + multiply(multiply(x, lhs, offs=offs), rhs, offs=offs)

    return rule


def _getitem(weight: Any, index: Any) -> Any:
    """One matrix of a stack, or those that a vector of numbers or a slice selects."""
    if weight.dim() != 3 or not isinstance(index, (int, slice, torch.Tensor)) or isinstance(index, bool):
        return NotImplemented
    if isinstance(index, torch.Tensor) and (index.dim() > 1 or index.dtype not in (torch.int64, torch.int32)):
        return NotImplemented
    return LazyWeight.make(Parts(*(part[index] for part in weight._parts)))


def _transpose(weight: Any, dim0: int, dim1: int) -> Any:
    if {dim0 % weight.dim(), dim1 % weight.dim()} != {weight.dim() - 2, weight.dim() - 1}:
        return NotImplemented
    return LazyWeight.make(weight._parts.transposed())


def _matrix_transpose(weight: Any) -> Any:
    return LazyWeight.make(weight._parts.transposed()) if weight.dim() == 2 else NotImplemented


_GROUPED = [f for f in (getattr(F, "grouped_mm", None), getattr(torch, "_grouped_mm", None)) if f is not None]

_RULES: dict[Any, Callable[..., Any]] = {
    F.linear: _linear,
    torch.matmul: _product(torch.matmul),
    torch.Tensor.matmul: _product(torch.matmul),
    torch.Tensor.__matmul__: _product(torch.matmul),
    torch.Tensor.__rmatmul__: _reflected(torch.matmul),
    torch.mm: _product(torch.mm),
    torch.bmm: _product(torch.bmm),
    torch.Tensor.bmm: _product(torch.bmm),
    torch.Tensor.__getitem__: _getitem,
    torch.transpose: _transpose,
    torch.Tensor.transpose: _transpose,
    torch.Tensor.t: _matrix_transpose,
    torch.t: _matrix_transpose,
    torch.Tensor.T.__get__: _matrix_transpose,  # type: ignore[attr-defined]
    torch.Tensor.mT.__get__: lambda weight: LazyWeight.make(weight._parts.transposed()),  # type: ignore[attr-defined]
    **{f: _grouped(f) for f in _GROUPED},
}

_KEYWORDS: dict[Any, set[str]] = {F.linear: {"weight", "bias"}, **{f: {"offs"} for f in _GROUPED}}

# What is answered without W's numbers.
_QUESTIONS = frozenset(
    (
        torch.Tensor.dim,
        torch.Tensor.size,
        torch.Tensor.stride,
        torch.Tensor.numel,
        torch.Tensor.element_size,
        torch.Tensor.get_device,
        torch.Tensor.is_floating_point,
        torch.Tensor.is_contiguous,
        torch.Tensor.__len__,
        torch.is_floating_point,
        *(
            getattr(torch.Tensor, name).__get__
            for name in (
                "shape",
                "dtype",
                "device",
                "layout",
                "ndim",
                "itemsize",
                "nbytes",
                "requires_grad",
                "is_leaf",
                "grad_fn",
                "grad",
                "is_cpu",
                "is_cuda",
                "is_meta",
                "is_nested",
                "is_sparse",
                "is_quantized",
            )
        ),
    )
)
