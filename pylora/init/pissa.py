"""PiSSA: A and B take the base weight's first singular directions, and the base keeps the rest.

Meng et al., https://arxiv.org/abs/2404.02948.
"""

from __future__ import annotations

import torch

from pylora.init.base_update import BaseUpdate, WithoutProduct
from pylora.init.basic import skip_default_draws
from pylora.init.registry import Factors, InitScheme, register_init, register_init_family
from pylora.init.truncated_svd import SingularTriplets, randomised_triplets, top_singular_triplets
from pylora.init.weight_access import fill, read_base

_READABLE = (torch.float32, torch.float16, torch.bfloat16)
_NITER = "pissa_niter_"


@register_init("pissa", dense_only=True, changes_base=True)
def pissa(factors: Factors) -> BaseUpdate:
    """Exact first singular triplets: B·A·scaling = U·S·Vh, both factors with sqrt(S / scaling).

    Raises:
        TypeError: the base weight is neither f32, f16 nor bf16.
    """
    weight = _readable_weight(factors)
    skip_default_draws(factors)
    return _split(factors, top_singular_triplets(weight, factors.a.shape[0]))


@register_init_family("pissa")
def pissa_niter(name: str) -> InitScheme:
    """ "pissa_niter_N": N subspace iterations of a randomised SVD, which draws from the global generator what PEFT
    draws. Approximate: after 16 iterations on a flat spectrum it is off by a third; "pissa" is exact and seldom slower.

    Raises:
        ValueError: the name has another form.
    """
    digits = name.removeprefix(_NITER)
    if not name.startswith(_NITER) or not digits.isdecimal():
        raise ValueError(
            f"init_lora_weights should be 'pissa' or 'pissa_niter_[number of iters]', got {name!r} instead."
        )

    def scheme(factors: Factors) -> BaseUpdate:
        weight = _readable_weight(factors)
        skip_default_draws(factors)
        return _split(factors, randomised_triplets(weight, factors.a.shape[0], int(digits)))

    return scheme


def _readable_weight(factors: Factors) -> torch.Tensor:
    return read_base(
        factors,
        _READABLE,
        "Please initialize PiSSA under float32, float16, or bfloat16: quantise the residual weight afterwards.",
    )


def _split(factors: Factors, top: SingularTriplets) -> BaseUpdate:
    root = torch.sqrt(top.s / factors.scaling)
    a, b = root[:, None] * top.vh, top.u * root
    fill(factors, a, b)
    return WithoutProduct(a, b, factors.scaling)
