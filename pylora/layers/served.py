"""Whether ops may stand in for modules: nothing that torch or a user attached to them may be passed over."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

# Dtypes the ops compute in; a base weight of another one (quantised) goes through its module.
OP_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


def calls_are_observed() -> bool:
    """Whether torch has to see the single calls: global module hooks, and the transforms that the ops have no rule for
    (torch.func's, forward-mode differentiation).
    """
    return bool(
        torch_module._has_any_global_hook()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward (hooks, or a forward set on the instance)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def are_plain(*tensors: Any) -> bool:
    """Whether these are tensors, or parameters, and no subclass of them."""
    return all(type(tensor) in PLAIN_TENSORS for tensor in tensors)


def are_factors(a: Any, b: Any, scaling: Any) -> bool:
    """Whether an op that adds to a layer's output takes an adapter's A, B and scaling."""
    return (
        are_plain(a, b)
        and a.is_cpu
        and b.is_cpu
        and a.dtype is b.dtype
        and a.dtype in OP_DTYPES
        and not (isinstance(scaling, torch.Tensor) and (scaling.requires_grad or torch.compiler.is_compiling()))
    )


def adds_in_place() -> bool:
    """Whether an op may add to a layer's output: nothing observes the calls, and no graph with gradients is traced."""
    return not calls_are_observed() and not (torch.compiler.is_compiling() and torch.is_grad_enabled())
