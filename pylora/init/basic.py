"""The schemes that look at nothing but the shapes: True, False and "gaussian"."""

from __future__ import annotations

import math

import torch
from torch import nn

from pylora.init.registry import Factors, register_init


@register_init(True, only_draws=True)
def kaiming(factors: Factors) -> None:
    """A as torch starts a linear layer (uniform in ±1/sqrt(fan_in)), B zero; an embedding's A zero, B standard normal.

    As Microsoft's loralib does (`loralib/layers.py`): the adapter changes nothing before it is trained.
    """
    skip_default_draws(factors)
    if factors.embedding:
        factors.a.zero_()
        factors.b.normal_()
    else:
        nn.init.kaiming_uniform_(factors.a, a=math.sqrt(5))
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
    nn.init.kaiming_uniform_(factors.a, a=math.sqrt(5))
    nn.init.kaiming_uniform_(factors.b, a=math.sqrt(5))
    if factors.b_bias is not None:
        bound = 1 / math.sqrt(factors.b.shape[1])
        factors.b_bias.uniform_(-bound, bound)


def skip_default_draws(factors: Factors) -> None:
    """Advance the generator by the draws that `random` makes: PEFT's factors get them before the scheme's."""
    if factors.a.device.type != "cpu":
        return
    tensors = [tensor for tensor in (factors.a, factors.b, factors.b_bias) if tensor is not None]
    if factors.embedding:
        for tensor in tensors:
            tensor.normal_()
        return
    # One step a number, whatever the range: two of them make one integer, in half the time of two numbers.
    steps = sum(tensor.numel() for tensor in tensors)
    scratch = torch.empty(min(steps // 2, 4096), dtype=torch.int64, device="cpu")
    for first in range(0, steps // 2, 4096):
        scratch[: steps // 2 - first].random_()
    if steps % 2:
        torch.empty(1, device="cpu").uniform_()


def _zero_bias(factors: Factors) -> None:
    if factors.b_bias is not None:
        factors.b_bias.zero_()
