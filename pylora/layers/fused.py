"""A dense layer's forward by ops, in Python, for torch.compile to trace.

Eager calls go to `pylora.ops.dense_forward` and `dense_mixed_forward`, which do the same in C++
(csrc/binding/dense_layer.cpp); the tests hold them to the functions here. Nothing is kept between calls, since `.to()`,
`load_state_dict`, an optimizer, a hook or FSDP may change modules and tensors at any time.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from pylora.layers.base_weight import conv1d_class
from pylora.layers.served import OP_DTYPES, are_plain, calls_are_observed, is_hooked
from pylora.ops import AdapterPools, BatchPlan, kernels_serve, lora_add, lora_linear, multi_lora_linear


class Operands(NamedTuple):
    """A forward's tensors and numbers; the adapters' in columns.

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
    names: list[str]
    a: list[torch.Tensor]
    b: list[torch.Tensor]
    scalings: list[float]
    dropout_ps: list[float]


def forward(layer: Any, x: torch.Tensor) -> torch.Tensor | None:
    """The forward in one op (and one more for each further adapter), or None where a module has to be called.

    Args:
        layer: A `pylora.layers.Linear`.
        x: [..., in_features].
    """
    if layer.merged_adapters or layer._disable_adapters:
        return None
    active = layer._active_adapter
    operands = read(layer, x, (active,) if type(active) is str else active)
    if operands is None:
        return None
    weight, bias, names, all_a, all_b, scalings, dropout_ps = operands
    a, b, scaling, p = all_a[0], all_b[0], scalings[0], dropout_ps[0]
    variants = layer.lora_variant
    if any(name in variants for name in names):
        # A variant's op has its place in the order of adapters only if there is no other.
        if len(names) > 1:
            return None
        return variants[names[0]].fused_forward(layer, names[0], x, weight, bias, a, b, scaling, p)
    result = lora_linear(x, weight, bias, a, b, scaling, p)
    for i in range(1, len(names)):
        result = lora_add(result, x, all_a[i], all_b[i], scalings[i], dropout_ps[i])
    return result


def mixed_forward(layer: Any, x: torch.Tensor, names: tuple[str, ...], plan: BatchPlan) -> torch.Tensor | None:
    """The forward of a batch whose rows have different adapters in one op, or None where a module has to be called.

    Args:
        layer: A `pylora.layers.Linear`.
        x: [rows, ..., in_features].
        names: Adapters of the layer without a variant; slot i of the plan is names[i].
        plan: The slots of the rows.
    """
    operands = read(layer, x, names)
    if operands is None:
        return None
    weight, bias, _, a, b, scalings, dropout_ps = operands
    pools = AdapterPools(a, b, scalings, dropout_ps if any(dropout_ps) else ())
    return multi_lora_linear(x, weight, bias, pools, plan)


def read(layer: Any, x: torch.Tensor, names: tuple[str, ...] | list[str]) -> Operands | None:
    """What the ops take for a forward on x, or None where the modules have to be called: hooked, replaced, subclassed
    or parametrised ones, other dtypes, other kinds of tensor, none of the adapters on this layer.

    Args:
        layer: A `pylora.layers.Linear`.
        x: The input.
        names: Adapters; those that the layer does not have are passed over.
    """
    modules = layer._modules
    base = modules["base_layer"]
    if calls_are_observed() or (type(base) is not nn.Linear and type(base) is not conv1d_class()) or is_hooked(base):
        return None
    weight: Any = base._parameters.get("weight")
    bias: Any = base._parameters.get("bias")
    if not are_plain(x, weight) or not (bias is None or are_plain(bias)) or not _fits(layer, x, weight):
        return None
    if bias is not None and bias.device != x.device:
        return None
    found, all_a, all_b, scalings, dropout_ps = [], [], [], [], []
    for name in names:
        if name not in modules["lora_A"]._modules:
            continue
        factors = _read_factors(layer, name, weight)
        p = _read_dropout(modules["lora_dropout"]._modules.get(name))
        if factors is None or p is None:
            return None
        a, b, scaling = factors
        found.append(name)
        all_a.append(a)
        all_b.append(b)
        scalings.append(scaling)
        dropout_ps.append(p)
    if not found:
        return None
    matrix = weight if type(base) is nn.Linear else weight.t()
    return Operands(matrix, bias, found, all_a, all_b, scalings, dropout_ps)


def _fits(layer: Any, x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the ops take x beside this weight. Inputs that do not fit go to the modules: torch's error is the one
    that callers know.
    """
    if (
        not kernels_serve(x.device)
        or weight.device != x.device
        or x.is_nested
        or x.shape[-1:] != (layer.in_features,)
        or weight.dtype not in OP_DTYPES
    ):
        return False
    if x.dtype is weight.dtype:
        return True
    # Autocast brings the two to one dtype, but leaves f64 alone.
    return torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)


def _read_factors(layer: Any, name: str, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float] | None:
    """A, B and the scaling as a number, beside this base weight."""
    factors: list[Any] = []
    for container in ("lora_A", "lora_B"):
        module = layer._modules[container]._modules.get(name)
        if type(module) is not nn.Linear or is_hooked(module) or module._parameters.get("bias") is not None:
            return None
        factors.append(module._parameters.get("weight"))
    a, b = factors
    if not are_plain(a, b) or a.dtype is not b.dtype:
        return None
    if a.device != weight.device or b.device != weight.device:
        return None
    if a.dtype is not weight.dtype and not (a.dtype is torch.float32 and layer.cast_input_dtype_enabled):
        return None
    scaling = layer.scaling[name]
    if type(scaling) is float or type(scaling) is int:
        return a, b, scaling
    if type(scaling) is not torch.Tensor or scaling.requires_grad or scaling.numel() != 1:
        return None
    # A number would have to be read, which breaks a graph.
    wide = torch.promote_types(b.dtype, torch.float32)
    return a.to(wide), b.to(wide) * scaling, 1.0


def _read_dropout(dropout: Any) -> float | None:
    """The probability in effect; None for a module that has to be called."""
    if type(dropout) not in (nn.Identity, nn.Dropout) or is_hooked(dropout):
        return None
    if type(dropout) is nn.Identity or not dropout.training:
        return 0.0
    return None if dropout.inplace or dropout.p >= 1.0 else dropout.p
