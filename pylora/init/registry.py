"""The initialisation schemes by name. A scheme is a function in a file of this package, under `register_init`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from pylora.init.base_update import BaseUpdate, apply_base_update
from pylora.init.left_out import are_draws_left_out


class MutableWeight(Protocol):
    """A base weight W of shape [out_features, in_features] that a scheme may read and replace."""

    def read(self) -> torch.Tensor:
        """W as a dense tensor, which is not written to."""
        ...

    def storage(self) -> torch.Tensor | None:
        """W where it is stored, to be changed in place; None if that cannot be."""
        ...

    def write(self, value: torch.Tensor) -> None:
        """Replace W."""
        ...


@dataclass(frozen=True)
class BaseAccess:
    """The way from a scheme to the base weight.

    Attributes:
        stored: The tensor that holds it in its module, in any layout; integers where it is quantised.
        open: Gives access to the weight, or raises where it cannot be read element by element.
    """

    stored: torch.Tensor
    open: Callable[[], MutableWeight]


@dataclass(frozen=True)
class Factors:
    """The tensors of one new adapter on one layer, with undefined content, and what a scheme may want to know.

    Attributes:
        a: [rank, in_features], for a convolution [rank, in_channels, kernel...], for an embedding [rank,
            num_embeddings].
        b: [out_features, rank], for a convolution [out_channels, rank, 1...], for an embedding [embedding_dim, rank].
        b_bias: [out_features] or None.
        embedding: The layer is an embedding, where `a` holds a column per token.
        scaling: The factor on B·A in the forward.
        base: The base weight as [out_features, in_features], with a convolution's kernel flattened into in_features
            and an embedding's table as [embedding_dim, num_embeddings]. None where the caller has none to give.
        config: The adapter's LoraConfig, for schemes with settings.
    """

    a: torch.Tensor
    b: torch.Tensor
    b_bias: torch.Tensor | None = None
    embedding: bool = False
    scaling: float = 1.0
    base: BaseAccess | None = None
    config: Any = None


# Fills A and B; returns what the base weight becomes, or None where it stays.
InitScheme = Callable[[Factors], BaseUpdate | None]


class _Entry(NamedTuple):
    scheme: InitScheme
    dense_only: bool
    changes_base: bool
    only_draws: bool = False


_SCHEMES: dict[bool | str, _Entry] = {}
# Schemes with a parameter in their name: prefix -> function from the whole name to the scheme.
_FAMILIES: dict[str, Callable[[str], InitScheme]] = {}
# Names that PEFT reads in any case; it takes the others literally.
_ANY_CASE = frozenset(("gaussian", "olora"))


def register_init(
    name: bool | str, *, dense_only: bool = False, changes_base: bool = False, only_draws: bool = False
) -> Callable[[InitScheme], InitScheme]:
    """Make the decorated function the scheme that `init_lora_weights=name` chooses.

    Args:
        name: The value, in lower case.
        dense_only: The scheme is for dense layers. An embedding then starts as with True, as in PEFT, and a
            convolution is refused.
        changes_base: The scheme returns a change of the base weight.
        only_draws: The scheme does nothing but draw numbers, so that it may be left out before a load.
    """

    def register(scheme: InitScheme) -> InitScheme:
        if name in _SCHEMES:
            raise ValueError(f"register_init: {name!r} is taken by {_SCHEMES[name].scheme.__name__}")
        _SCHEMES[name] = _Entry(scheme, dense_only, changes_base, only_draws)
        return scheme

    return register


def register_init_family(prefix: str) -> Callable[[Callable[[str], InitScheme]], Callable[[str], InitScheme]]:
    """Let the decorated function make the scheme of every other name that starts with `prefix`.

    These are schemes for dense layers that change the base weight.
    """

    def register(make: Callable[[str], InitScheme]) -> Callable[[str], InitScheme]:
        _FAMILIES[prefix] = make
        return make

    return register


def find_init(scheme: Any) -> InitScheme:
    """The function for a value of `init_lora_weights`. None and other empty values mean False.

    Call it before a model is changed, to be sure that the scheme exists.

    Raises:
        ValueError: there is no such scheme.
    """
    return _find(scheme).scheme


def only_draws(scheme: Any) -> bool:
    """Whether a value of `init_lora_weights` means random numbers alone, which `draws_left_out` leaves out."""
    return _find(scheme).only_draws


def is_left_out(scheme: Any) -> bool:
    """Whether a value of `init_lora_weights` draws numbers alone while `draws_left_out` is in force.

    Raises:
        ValueError: there is no such scheme.
    """
    return are_draws_left_out() and only_draws(scheme)


def changes_base_weight(scheme: Any) -> bool:
    """Whether the scheme takes something out of the base weight, so that it must not run twice for one adapter.

    Raises:
        ValueError: there is no such scheme.
    """
    return _find(scheme).changes_base


def _find(scheme: Any) -> _Entry:
    key = scheme if scheme else False
    if isinstance(key, str) and key.lower() in _ANY_CASE:
        key = key.lower()
    if isinstance(key, (bool, str)) and key in _SCHEMES:
        return _SCHEMES[key]
    if isinstance(key, str):
        for prefix, make in _FAMILIES.items():
            if key.startswith(prefix):
                return _Entry(make(key), dense_only=True, changes_base=True)
    raise _unknown(scheme)


def _unknown(scheme: Any) -> ValueError:
    known = ", ".join(repr(name) for name in _SCHEMES)
    return ValueError(f"Unknown initialization init_lora_weights={scheme!r}: expected one of {known}")


def init_adapter(
    scheme: Any,
    a: torch.Tensor,
    b: torch.Tensor,
    *,
    b_bias: torch.Tensor | None = None,
    embedding: bool = False,
    scaling: float = 1.0,
    base: BaseAccess | None = None,
    config: Any = None,
) -> None:
    """Fill a new adapter's factors in place, and change the base weight where the scheme does; see `Factors`.

    On the CPU in float32 this draws from torch's global generator what PEFT draws for the layer, in its order: the same
    seed gives the same A and B. (PEFT gives each factor its module's default start first and then the scheme's, so one
    draw for A and one for B are thrown away; on other devices, where PEFT's numbers come from the CPU anyway, they are
    not made.) Factors on the meta device stay as they are, for weights that are loaded afterwards; the base weight is
    changed all the same, because those weights belong to the changed one.

    Within `draws_left_out` the schemes that only draw numbers do nothing. Within `base_updates_at_end` the base weight
    is changed when that context ends.

    Args:
        scheme: The value of `init_lora_weights`.
        a: A, any floating dtype.
        b: B.
        b_bias: The bias of B (`lora_bias=True`).
        embedding: The layer is an embedding.
        scaling: The factor on B·A in the forward.
        base: The base weight, for the schemes that look at it.
        config: The adapter's LoraConfig.

    Raises:
        ValueError: there is no such scheme, or it cannot start these factors.
        TypeError: the base weight's dtype is none that the scheme can work with.
    """
    entry = _find(scheme)
    if entry.only_draws and are_draws_left_out():
        return
    if entry.dense_only and embedding:
        entry = _SCHEMES[True]
    elif entry.dense_only and a.dim() != 2:
        raise _unknown(scheme)
    if a.is_meta:
        if base is None or not entry.changes_base:
            return
        # An explicit device, since a device context may be what put the factors on meta.
        a, b = (torch.empty(each.shape, dtype=torch.float32, device="cpu") for each in (a, b))
    with torch.no_grad():
        update = entry.scheme(Factors(a, b, b_bias, embedding, scaling, base, config))
        if update is not None and base is not None:
            apply_base_update(base.stored, base.open, update)
