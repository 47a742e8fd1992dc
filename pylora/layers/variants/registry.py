"""Which variant an adapter's configuration asks for, and whether a kind of layer has it.

A variant is asked for by a field of the configuration whose metadata says `is_lora_variant`, or by a value of
`init_lora_weights` that the field's metadata lists in `lora_variants`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from pylora.layers.variants.protocol import LoraVariant

Variants = Mapping[tuple[str, ...], "type[LoraVariant] | None"]
V = TypeVar("V", bound=type[LoraVariant])

# Kind of layer -> {names of the flags that are set, sorted: variant}. No flag is plain LoRA, which every kind has.
_BY_KIND: dict[str, dict[tuple[str, ...], type[LoraVariant] | None]] = {}


def register_variant(flag: str, *layer_kinds: str) -> Callable[[V], V]:
    """Class decorator: adapters whose configuration sets `flag` get this variant on these kinds of layer.

    Args:
        flag: The configuration's field, or the value of `init_lora_weights`.
        *layer_kinds: The layers' `variant_kind`.
    """

    def register(cls: V) -> V:
        for kind in layer_kinds:
            _BY_KIND.setdefault(kind, {(): None})[(flag,)] = cls
        return cls

    return register


def variants_of(layer_kind: str) -> Variants:
    """The variants that a kind of layer has, by the flags that ask for them."""
    return _BY_KIND.get(layer_kind, {(): None})


def requested_flags(config: Any) -> dict[str, bool]:
    """Every flag that can ask for a variant, and whether the configuration sets it."""
    flags = {}
    config_class: Any = type(config)
    for field_name, values, is_flag in _fields_that_ask(config_class):
        value = getattr(config, field_name)
        for name in values:
            flags[name] = value == name
        if is_flag:
            flags[field_name] = bool(value)
    return flags


@functools.cache
def _fields_that_ask(config_class: Any) -> list[tuple[str, tuple[str, ...], bool]]:
    """(field, its values that ask for a variant, whether it does when it is set) of a dataclass; asked a layer."""
    fields = [
        (field.name, tuple(field.metadata.get("lora_variants", ())), bool(field.metadata.get("is_lora_variant")))
        for field in dataclasses.fields(config_class)
    ]
    return [field for field in fields if field[1] or field[2]]


def resolve_variant(variants: Variants, config: Any) -> LoraVariant | None:
    """The variant that `config` asks for, None for plain LoRA.

    Args:
        variants: What the layer has.
        config: The adapter's configuration, a dataclass.

    Raises:
        ValueError: It asks for several variants, or for one that the layer does not have; or `variants` has unsorted
            keys or keys that no configuration can ask for.
    """
    flags = requested_flags(config)
    _check_keys(tuple(variants), tuple(flags), type(config).__name__)
    requested = tuple(sorted(name for name, is_set in flags.items() if is_set))
    if requested not in variants:
        supported = sorted(key for key in variants if key)
        raise ValueError(
            f"Invalid or unsupported variant combination: {requested}; this layer has plain LoRA or one of {supported}"
        )
    variant = variants[requested]
    return None if variant is None else variant()


@functools.cache
def _check_keys(keys: tuple[tuple[str, ...], ...], flags: tuple[str, ...], config_name: str) -> None:
    """Raise ValueError when a table of variants has keys that no configuration can ask for; asked a layer."""
    unsorted_keys = [key for key in keys if list(key) != sorted(key)]
    if unsorted_keys:
        raise ValueError(f"Keys in lora_variants must be sorted tuples, got {unsorted_keys}")
    unknown = sorted({name for key in keys for name in key}.difference(flags))
    if unknown:
        raise ValueError(
            f"variant(s) {unknown} found in lora_variants, but no field of {config_name} is marked "
            "'is_lora_variant' and no value of its init_lora_weights listed for them"
        )
