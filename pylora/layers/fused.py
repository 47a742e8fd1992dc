"""What a dense layer's forward needs for the op, found by one walk over its modules and kept until one of them changes.

The walk costs 7 us, a twelfth of a decode step's product at width 1024; checking that it would find the same takes 0.9.
Only modules are kept. Tensors, scaling and dropout are read at every call (2 us), since `.to()`, `load_state_dict`, an
optimizer or FSDP may exchange or rewrite them at any time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from pylora.layers.base_weight import conv1d_class

# Dtypes the ops compute in; a base weight of another one (quantised) goes through its module.
_OP_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)
_CONTAINERS = ("lora_A", "lora_B", "lora_dropout")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class Operands(NamedTuple):
    """A forward's tensors; the adapters' in columns, which costs a third of one object an adapter.

    Attributes:
        weight: [out_features, in_features], any strides.
        bias: [out_features] or None.
        names: The adapters, at least one.
        a: Their A, [rank, in_features].
        b: Their B, [out_features, rank], each of its A's dtype.
        scalings: Numbers.
        dropout_ps: 0 in evaluation.
    """

    weight: torch.Tensor
    bias: torch.Tensor | None
    names: tuple[str, ...]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scalings: list[float]
    dropout_ps: list[float]


def calls_are_observed() -> bool:
    """Whether torch has to see the single calls: global module hooks, and the transforms that the ops have no rule for
    (torch.func's, forward-mode differentiation).
    """
    return (
        torch_module._has_any_global_hook()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


class FusedModules:
    """The modules of a layer's base and active adapters, none of them hooked or replaced.

    Holds no reference to the layer, which would make a cycle of it. Copies and pickles of a layer go without.
    """

    __slots__ = (
        "_active",
        "_base",
        "_base_params",
        "_containers",
        "_dicts",
        "_hooks",
        "_modules",
        "_names",
        "_sources",
        "_transposed",
    )

    def __init__(self, layer: Any, base: nn.Module, names: Sequence[str], active: str | Sequence[str]) -> None:
        self._active = active if type(active) is str else list(active)
        self._base = base
        self._base_params = base._parameters
        self._transposed = type(base) is not nn.Linear
        self._names = tuple(names)
        modules = layer._modules
        self._containers = tuple(modules[name]._modules for name in _CONTAINERS)
        self._modules = tuple((name, *(each[name] for each in self._containers)) for name in names)
        self._sources = tuple(
            (name, a._parameters, b._parameters, None if type(dropout) is nn.Identity else dropout)
            for name, a, b, dropout in self._modules
        )
        watched = [base, *(module for _, *found in self._modules for module in found)]
        self._dicts = tuple(module.__dict__ for module in watched)
        self._hooks = tuple(module.__dict__[name] for module in watched for name in _HOOKS)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    @classmethod
    def of(cls, layer: Any, names: Sequence[str] | None = None) -> FusedModules | None:
        """Those of the layer as it is now, or None where one has to be called, or no adapter is active.

        Args:
            layer: A dense layer.
            names: Adapters that are asked for in place of the active ones.
        """
        modules = layer._modules
        base = modules["base_layer"]
        if (type(base) is not nn.Linear and type(base) is not conv1d_class()) or _is_hooked(base):
            return None
        active = layer._active_adapter if names is None else names
        here = modules["lora_A"]._modules
        found = [name for name in ((active,) if type(active) is str else active) if name in here]
        if not found or not all(_is_plain(modules, name) for name in found):
            return None
        return cls(layer, base, found, active)

    def holds(self, layer: Any, names: Sequence[str] | None = None) -> bool:
        """Whether `of(layer, names)` would find the same."""
        modules = layer._modules
        a_modules, b_modules, dropouts = self._containers
        if (
            (layer._active_adapter if names is None else list(names)) != self._active
            or modules["base_layer"] is not self._base
            or modules["lora_A"]._modules is not a_modules
            or modules["lora_B"]._modules is not b_modules
            or modules["lora_dropout"]._modules is not dropouts
            or any(self._hooks)
        ):
            return False
        for name, a, b, dropout in self._modules:
            if a_modules.get(name) is not a or b_modules.get(name) is not b or dropouts.get(name) is not dropout:
                return False
        for attributes in self._dicts:  # noqa: SIM110 (a generator costs as much again)
            if "forward" in attributes:
                return False
        return True

    def read(self, layer: Any, x: torch.Tensor) -> Operands | None:
        """The tensors of a forward on x, or None where the modules have to be called: other dtypes, other kinds of
        tensor, a parametrised or biased factor. An x of the wrong width is not noticed here.
        """
        weight: Any = self._base_params.get("weight")
        if type(weight) not in _PLAIN_TENSORS or type(x) not in _PLAIN_TENSORS or not x.is_cpu or x.is_nested:
            return None
        dtype = weight.dtype
        if dtype not in _OP_DTYPES or (x.dtype is not dtype and not _autocast_matches(x.dtype, dtype)):
            return None
        casts, table = layer.cast_input_dtype_enabled, layer.scaling
        all_a, all_b, scalings, dropout_ps = [], [], [], []
        for name, a_params, b_params, dropout in self._sources:
            a: Any = a_params.get("weight")
            b: Any = b_params.get("weight")
            if type(a) not in _PLAIN_TENSORS or type(b) not in _PLAIN_TENSORS:
                return None
            if a_params.get("bias") is not None or b_params.get("bias") is not None:
                return None
            factor_dtype = a.dtype
            if factor_dtype is not b.dtype:
                return None
            if factor_dtype is not dtype and (factor_dtype is not torch.float32 or not casts):
                return None
            scaling = table[name]
            if type(scaling) is not float and type(scaling) is not int:
                if type(scaling) is not torch.Tensor or scaling.requires_grad:
                    return None
                a, b, scaling = _take_in(scaling, a, b)
            p = 0.0
            if dropout is not None and dropout.training:
                p = dropout.p
                if dropout.inplace or p >= 1.0:
                    return None
            all_a.append(a)
            all_b.append(b)
            scalings.append(scaling)
            dropout_ps.append(p)
        base = weight.t() if self._transposed else weight
        return Operands(base, self._base_params.get("bias"), self._names, all_a, all_b, scalings, dropout_ps)


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward (hooks, or a forward set on the instance)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _is_plain(modules: dict[str, Any], name: str) -> bool:
    """Whether none of the adapter's modules is replaced or hooked."""
    a, b, dropout = (modules[container]._modules[name] for container in _CONTAINERS)
    if type(a) is not nn.Linear or type(b) is not nn.Linear or type(dropout) not in (nn.Identity, nn.Dropout):
        return False
    return not (_is_hooked(a) or _is_hooked(b) or _is_hooked(dropout))


def _take_in(scaling: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and a number for a scaling that is a tensor: its value, or 1 with B scaled where reading it would break a
    compiled graph or wait for a device.
    """
    if scaling.is_cpu and not torch.compiler.is_compiling():
        return a, b, scaling.item()
    wide = torch.promote_types(b.dtype, torch.float32)
    return a.to(wide), b.to(wide) * scaling, 1.0


def _autocast_matches(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether autocast brings the two to one dtype; it leaves f64 alone."""
    return torch.is_autocast_enabled("cpu") and torch.float64 not in (x_dtype, weight_dtype)
