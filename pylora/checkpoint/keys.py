"""Names only: how a parameter of a wrapped model is called in a checkpoint. No tensor and no module is touched here.

A checkpoint does not know what the adapter was called in memory, so that it can be loaded under another name:

    in the model      base_model.model.encoder.q.lora_A.default.weight
    in the checkpoint base_model.model.encoder.q.lora_A.weight

The format is PEFT's (`peft/utils/save_and_load.py`), which other trainers and servers read too.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from typing import TypeVar

MODEL_PREFIX = "base_model.model."
"""Leads every checkpoint key: the path from a `PeftModel` to the base model inside it."""

LORA_PREFIX = "lora_"
"""Starts the name of every attribute in which a layer keeps LoRA parameters."""

_MAGNITUDE = ".lora_magnitude_vector"
_FORBIDDEN_IN_NAMES = {sep for sep in ("/", "\\", os.sep, os.altsep, "\0", ".") if sep}

V = TypeVar("V")


class AdapterNameError(ValueError, KeyError):
    """An adapter name that cannot name a submodule, or that would leave the folder its files belong in.

    PEFT lets torch refuse some of these names with a KeyError, so both types are caught.
    """

    __str__ = Exception.__str__  # KeyError would show the message in quotes


def checked_adapter_name(name: str) -> str:
    """Returns `name` if it can name both a submodule and a folder.

    Raises:
        AdapterNameError: empty, or has a dot, a path separator or a NUL character.
        TypeError: not a string.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter_name: expected a str, got {type(name).__name__}")
    found = sorted(char for char in _FORBIDDEN_IN_NAMES if char in name)
    if not name or found:
        why = f"it contains {found}" if name else "it is empty"
        raise AdapterNameError(
            f"adapter_name: expected a plain name (it becomes a submodule and a folder), got {name!r}: {why}"
        )
    return name


def to_checkpoint_key(model_key: str, adapter_name: str) -> str:
    """The checkpoint's name for `model_key`: without the adapter name, which stands last or second to last in it.

    DoRA's magnitude is a module in memory and a bare tensor in the file, as it was in PEFT's first DoRA release.
    """
    ending = f".{adapter_name}"
    if model_key.endswith(ending):
        return model_key.removesuffix(ending)
    owner, dot, leaf = model_key.rpartition(".")
    if owner.endswith(ending):
        owner = owner.removesuffix(ending)
        if owner.endswith(_MAGNITUDE) and leaf == "weight":
            return owner
    return f"{owner}{dot}{leaf}"


def is_under(key: str, roots: Collection[str]) -> bool:
    """Whether `key` is one of `roots` or lies below one; costs the depth of the key, not the number of roots."""
    while key:
        if key in roots:
            return True
        key = key.rpartition(".")[0]
    return False


def select_under(tensors: Mapping[str, V], roots: Collection[str]) -> dict[str, V]:
    """The entries whose keys are one of `roots` or lie below one, in their order."""
    return {key: tensor for key, tensor in tensors.items() if is_under(key, roots)}


def rename_keys(tensors: Mapping[str, V], key_mapping: Mapping[str, str] | None) -> dict[str, V]:
    """Applies the first matching regular expression of `key_mapping` to each key, behind the `base_model.` prefix.

    This is how adapters of an architecture that transformers has since rearranged are loaded: the mapping is the
    model class's `_checkpoint_conversion_mapping`.

    Raises:
        ValueError: a key has no `base_model.` prefix, so it is not a PEFT checkpoint's.
    """
    if not key_mapping:
        return dict(tensors)
    renamed = {}
    for key, tensor in tensors.items():
        prefix = next((p for p in (MODEL_PREFIX, "base_model.") if key.startswith(p)), None)
        if prefix is None:
            raise ValueError(f"key_mapping: expected checkpoint keys that start with {MODEL_PREFIX!r}, got {key!r}")
        name = key.removeprefix(prefix)
        for pattern, replacement in key_mapping.items():
            name, count = re.subn(pattern, replacement, name)
            if count:
                break
        renamed[prefix + name] = tensor
    return renamed
