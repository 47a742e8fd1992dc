"""LoftQ: quantise the base weight, and let A and B repair what that lost. Li et al., https://arxiv.org/abs/2310.08659.

The base weight keeps its dtype and takes the values that its quantised form stands for, so quantising it afterwards
loses nothing more.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from pylora.init.base_update import BaseUpdate
from pylora.init.basic import skip_default_draws
from pylora.init.registry import Factors, register_init
from pylora.init.truncated_svd import top_singular_triplets
from pylora.init.weight_access import fill, read_base

_READABLE = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The quantiles of the normal distribution that NF4 stores: Dettmers et al., https://arxiv.org/abs/2305.14314.
_NF4 = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)
_NF4_BLOCK = 64


@register_init("loftq", changes_base=True)
def loftq(factors: Factors) -> BaseUpdate:
    """Alternate between quantising W - B·A·scaling and decomposing what is left, `loftq_iter` times.

    Raises:
        ValueError: `loftq_config` asks for other bits than 4 (NF4) or 8 (integers by row) or for no iteration, or the
            layer is a convolution in groups.
        TypeError: the base weight is not in floating point.
    """
    quantise, iterations = _settings(factors)
    rank = factors.a.shape[0]
    if factors.b.flatten(1).shape[1] != rank:
        raise ValueError("init_lora_weights='loftq' does not support convolutions with groups > 1.")
    weight = read_base(factors, _READABLE, "LoftQ: expected a base weight in floating point, which it quantises.")
    skip_default_draws(factors)

    def rounded(target: torch.Tensor) -> torch.Tensor:
        # An embedding's table is stored the other way round, and quantised as it is stored.
        return quantise(target.t()).t() if factors.embedding else quantise(target)

    a, b = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    for _ in range(iterations):
        a_before, b_before = a, b
        top = top_singular_triplets(weight - rounded(torch.addmm(weight, b, a, alpha=-1)), rank)
        root = top.s.sqrt()
        a, b = root[:, None] * top.vh, top.u * root
    # The paper's model has no scaling, the layer has.
    share = factors.scaling**-0.5
    fill(factors, a * share, b * share)
    return lambda now: rounded(torch.addmm(now.to(torch.float32), b_before, a_before, alpha=-1))


def _settings(factors: Factors) -> tuple[Callable[[torch.Tensor], torch.Tensor], int]:
    config = getattr(factors.config, "loftq_config", None) or {}
    bits, iterations = config.get("loftq_bits", 4), config.get("loftq_iter", 1)
    if bits not in _QUANTISERS:
        raise ValueError(f"loftq_config: loftq_bits: Only nf4 and int8 quantization is supported (4 or 8), got {bits}")
    if iterations <= 0:
        raise ValueError(f"loftq_config: loftq_iter: Number of iterations must be greater than 0, got {iterations}")
    return _QUANTISERS[bits], iterations


def _nf4(target: torch.Tensor) -> torch.Tensor:
    """`target` rounded to NF4 in blocks of 64 numbers in row-major order, each block scaled by its largest."""
    flat = target.reshape(-1)
    padding = -flat.numel() % _NF4_BLOCK
    blocks = torch.nn.functional.pad(flat, (0, padding)).view(-1, _NF4_BLOCK)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    levels = torch.tensor(_NF4, dtype=target.dtype, device=target.device)
    nearest = torch.bucketize(
        blocks / largest.clamp_min(torch.finfo(target.dtype).tiny), (levels[1:] + levels[:-1]) / 2
    )
    return (levels[nearest] * largest).view(-1)[: flat.numel()].view(target.shape)


def _int8(target: torch.Tensor) -> torch.Tensor:
    """`target` rounded to 8-bit integers, each row scaled by its largest number."""
    step = target.abs().amax(dim=1, keepdim=True) / 127
    return torch.round(target / step.clamp_min(torch.finfo(target.dtype).tiny)) * step


_QUANTISERS: dict[int, Callable[[torch.Tensor], torch.Tensor]] = {4: _nf4, 8: _int8}
