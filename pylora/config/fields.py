"""Dataclass fields that carry their own explanation, and sub-configurations that arrive as plain dicts."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")


def option(
    default: Any = dataclasses.MISSING,
    *,
    help: str,
    factory: Callable[[], Any] | None = None,
    init: bool = True,
    **metadata: Any,
) -> Any:
    """A dataclass field with its explanation in `metadata["help"]`, where `transformers.HfArgumentParser` reads it."""
    metadata = {"help": help, **metadata}
    if factory is not None:
        return dataclasses.field(default_factory=factory, init=init, metadata=metadata)
    return dataclasses.field(default=default, init=init, metadata=metadata)


def as_sub_config(value: Any, config_cls: type[T]) -> T | None:
    """Return `value` as an instance of the dataclass `config_cls`, or None.

    A configuration file holds its sub-configurations as dicts. Fields that the class fills in itself (`init=False`) are
    written to the file and left out here; keys that the class does not have at all are dropped with a warning.

    Raises:
        TypeError: `value` is neither None, nor a dict, nor a `config_cls`.
    """
    if value is None or isinstance(value, config_cls):
        return value
    name = config_cls.__name__
    if not isinstance(value, dict):
        raise TypeError(f"`{name}` must be a `{name}`, a dict, or None, got {type(value).__name__}.")
    fields = dataclasses.fields(config_cls)  # type: ignore[arg-type]
    unknown = set(value) - {f.name for f in fields}
    if unknown:
        warnings.warn(unexpected_keys_message(unknown, name), stacklevel=2)
    accepted = {f.name for f in fields if f.init}
    return config_cls(**{key: item for key, item in value.items() if key in accepted})


def unexpected_keys_message(keys: set[str], class_name: str) -> str:
    """The warning for keys of a configuration file that this version does not know."""
    return (
        f"Unexpected keyword arguments {sorted(keys)} for class {class_name}, these are ignored. "
        "The file was probably written by a newer version of PEFT or pylora; what those keys ask for will not happen."
    )
