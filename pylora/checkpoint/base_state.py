"""The base model's own tensors in and out of an adapted model, under the names they had before it was adapted."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pylora.checkpoint.load import size_mismatch
from pylora.checkpoint.structure import is_adapter_layer, is_auxiliary, join, place_of, state_dict_name

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.nn.modules.module import _IncompatibleKeys


def get_base_model_state_dict(model: Any) -> dict[str, Tensor]:
    """The state dict that the base model inside a `PeftModel` would have without adapters. Tensors are not copied.

    Args:
        model: a `PeftModel`. What is merged into its weights stays in them.
    """
    base = model.get_base_model()
    tensors = base.state_dict()
    return {name: tensors[key] for name, key in _base_keys(base) if key in tensors}


def set_base_model_state_dict(model: Any, state_dict: Mapping[str, Tensor], strict: bool = True) -> _IncompatibleKeys:
    """Copies the base model's tensors into a `PeftModel`, as `load_state_dict` would have before it was adapted.

    Args:
        model: a `PeftModel`.
        state_dict: tensors under the base model's own names.
        strict: all names must be there, and no others.

    Returns:
        named tuple of `missing_keys` and `unexpected_keys`.

    Raises:
        RuntimeError: `strict` and names are missing or unexpected, or a tensor of another shape than the model's.
            Nothing has been copied then.
    """
    from torch.nn.modules.module import _IncompatibleKeys

    base = model.get_base_model()
    known = {name: key for name, key in _base_keys(base) if place_of(base, key) is not None}
    missing = [name for name in known if name not in state_dict]
    unexpected = [name for name in state_dict if name not in known]
    problems = []
    if strict and missing:
        problems.append(f"Missing key(s) in state_dict: {missing}")
    if strict and unexpected:
        problems.append(f"Unexpected key(s) in state_dict: {unexpected}")
    chosen = {known[name]: tensor for name, tensor in state_dict.items() if name in known}
    for key, tensor in chosen.items():
        place = place_of(base, key)
        if place is not None and place.held.shape != tensor.shape:
            problems.append(size_mismatch(key, tensor.shape, place.held.shape))
    if problems:
        raise RuntimeError("Error(s) in loading state_dict:\n\t" + "\n\t".join(problems))
    base.load_state_dict(chosen, strict=False)
    return _IncompatibleKeys(missing, unexpected)


def _base_keys(module: nn.Module, name: str = "", key: str = "") -> Iterator[tuple[str, str]]:
    """(name before adapting, state dict key now) of each tensor of the base model, tied ones under each name."""
    if is_auxiliary(module):
        # A wrapper of token rows keeps the original in the adapter layer that it consists of.
        for part, child in module._modules.items():
            if child is not None and (part == "original_module" or is_adapter_layer(child)):
                yield from _base_keys(child, name, join(key, part))
    elif is_adapter_layer(module):
        yield from _base_keys(module.base_layer, name, join(key, "base_layer"))  # type: ignore[arg-type]
    else:
        for own in (*module._parameters, *module._buffers):
            yield join(name, own), join(key, own)
        for part, child in module._modules.items():
            if child is not None:
                yield from _base_keys(child, join(name, state_dict_name(part)), join(key, state_dict_name(part)))
