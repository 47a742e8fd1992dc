"""The schemes that look at nothing but the shapes: True, False and "gaussian"."""

from __future__ import annotations

import math

import torch
from torch import nn

from pylora.init.registry import Factors, register_init
from pylora.ops import uniform_

# torch's start of a linear layer: kaiming_uniform_ with a slope of sqrt(5).
_SLOPE = math.sqrt(5)
_GAIN = math.sqrt(2.0 / (1 + _SLOPE**2))
_PLAIN = (torch.Tensor, nn.Parameter)


@register_init(True, only_draws=True)
def kaiming(factors: Factors) -> None:
    """A as torch starts a linear layer (uniform in ±1/sqrt(fan_in)), B zero; an embedding's A zero, B standard normal.

    As Microsoft's loralib does (`loralib/layers.py`): the adapter changes nothing before it is trained.
    """
    if factors.embedding:
        skip_default_draws(factors)
        factors.a.zero_()
        factors.b.normal_()
    else:
        kaiming_uniform_(factors.a, skip=default_draws(factors))
        factors.b.zero_()
    _zero_bias(factors)


@register_init("gaussian", only_draws=True)
def gaussian(factors: Factors) -> None:
    """A normal with deviation 1/rank, B zero. For an embedding the same as True."""
    if factors.embedding:
        kaiming(factors)
        return
    skip_default_draws(factors)
    factors.a.normal_(std=1 / factors.a.shape[0])
    factors.b.zero_()
    _zero_bias(factors)


@register_init(False)
def random(factors: Factors) -> None:
    """A and B both random, as torch starts linear layers (an embedding's factors: standard normal).

    The adapter changes the output at once: for tests and for looking at its effect.
    """
    if factors.embedding:
        factors.a.normal_()
        factors.b.normal_()
        return
    kaiming_uniform_(factors.a)
    kaiming_uniform_(factors.b)
    if factors.b_bias is not None:
        bound = 1 / math.sqrt(factors.b.shape[1])
        factors.b_bias.uniform_(-bound, bound)


def kaiming_uniform_(tensor: torch.Tensor, skip: int = 0) -> None:
    """`nn.init.kaiming_uniform_(tensor, a=sqrt(5))`, which draws the same numbers one by one, behind `skip` others.

    Args:
        tensor: [out, in] or a convolution's kernel [out, in, kernel...].
        skip: Numbers to pass over before, of the CPU's generator.
    """
    plain = type(tensor) in _PLAIN and tensor.device.type == "cpu" and tensor.numel()
    if not plain:  # sharded, on another device, or nothing to draw
        uniform_(torch.empty(0, dtype=torch.float32, device="cpu"), 1.0, skip)
        nn.init.kaiming_uniform_(tensor, a=_SLOPE)
        return
    fan_in = tensor.numel() // tensor.shape[0]
    uniform_(tensor, math.sqrt(3.0) * (_GAIN / math.sqrt(fan_in)), skip)


def default_draws(factors: Factors) -> int:
    """How many f32 numbers `random` draws for these factors, an embedding's apart: PEFT's get them before the scheme's.

    None on other devices, where PEFT's numbers would still come from the CPU.
    """
    if factors.a.device.type != "cpu":
        return 0
    tensors = [tensor for tensor in (factors.a, factors.b, factors.b_bias) if tensor is not None]
    # One step of the generator a number, two for one of 64 bits.
    return sum(tensor.numel() for tensor in tensors) * (2 if factors.a.dtype == torch.float64 else 1)


def skip_default_draws(factors: Factors) -> None:
    """Advance the generator by the draws that `random` makes, in the order in which it makes them."""
    if factors.embedding and factors.a.device.type == "cpu":
        factors.a.normal_()
        factors.b.normal_()
        return
    uniform_(torch.empty(0, dtype=torch.float32, device="cpu"), 1.0, default_draws(factors))


def _zero_bias(factors: Factors) -> None:
    if factors.b_bias is not None:
        factors.b_bias.zero_()
