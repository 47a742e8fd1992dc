"""The initialisation schemes by name. A scheme is a function in a file of this package, under `register_init`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Factors:
    """The tensors of one new adapter on one layer, with undefined content.

    Attributes:
        a: [rank, in_features], for a convolution [rank, in_channels, kernel...], for an embedding [rank,
        num_embeddings]. b: [out_features, rank], for a convolution [out_channels, rank, 1...], for an embedding
        [embedding_dim, rank]. b_bias: [out_features] or None.
        embedding: The layer is an embedding, where `a` holds a column per token.
    """

    a: torch.Tensor
    b: torch.Tensor
    b_bias: torch.Tensor | None = None
    embedding: bool = False


InitScheme = Callable[[Factors], None]

_SCHEMES: dict[bool | str, InitScheme] = {}


def register_init(name: bool | str) -> Callable[[InitScheme], InitScheme]:
    """Make the decorated function the scheme that `init_lora_weights=name` chooses. Names are in lower case."""

    def register(scheme: InitScheme) -> InitScheme:
        if name in _SCHEMES:
            raise ValueError(f"register_init: {name!r} is taken by {_SCHEMES[name].__name__}")
        _SCHEMES[name] = scheme
        return scheme

    return register


def find_init(scheme: Any) -> InitScheme:
    """The function for a value of `init_lora_weights`. None and other empty values mean False; case does not matter.

    Call it before a model is changed, to be sure that the scheme exists.

    Raises:
        ValueError: there is no such scheme.
    """
    key = scheme.lower() if isinstance(scheme, str) else scheme
    if not key:
        key = False
    if isinstance(key, (bool, str)) and key in _SCHEMES:
        return _SCHEMES[key]
    known = ", ".join(repr(name) for name in _SCHEMES)
    raise ValueError(f"Unknown initialization init_lora_weights={scheme!r}: expected one of {known}")


def init_adapter(
    scheme: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    b_bias: torch.Tensor | None = None,
    embedding: bool = False,
) -> None:
    """Fill a new adapter's factors in place; see `Factors` for the shapes.

    On the CPU in float32 this draws from torch's global generator what PEFT draws for the layer, in its order: the same
    seed gives the same A and B. (PEFT gives each factor its module's default start first and then the scheme's, so one
    draw for A and one for B are thrown away; on other devices, where PEFT's numbers come from the CPU anyway, they are
    not made.) Tensors on the meta device stay as they are.

    Args:
        scheme: The value of `init_lora_weights`.
        a: A, any floating dtype.
        b: B.
        b_bias: The bias of B (`lora_bias=True`).
        embedding: The layer is an embedding.

    Raises:
        ValueError: there is no such scheme.
    """
    fill = find_init(scheme)
    if a.is_meta:
        return
    with torch.no_grad():
        fill(Factors(a, b, b_bias, embedding))
