"""Finds adapter parameters by the shape of the modules that hold them, not by their names or classes.

A base model may have a module called `lora_A`, and an adapter may be called like a module, so names alone mislead.
Classes are not asked for either: the same walk then serves pylora's layers, PEFT's and anyone's with that layout.
"""

from __future__ import annotations

import functools
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor, nn

# Children in which FSDP1's and activation checkpointing's wrappers keep the module: no part of state dict keys.
_TRANSPARENT = frozenset(("_fsdp_wrapped_module", "_checkpoint_wrapped_module"))
# Children of a site that are the base model's.
_OF_THE_BASE = ("base_layer", "original_module")


@dataclass(frozen=True)
class Site:
    """A module that holds adapter parameters.

    Attributes:
        name: path from the model to it, as in the model's state dict.
        module: the module.
        is_auxiliary: True for a wrapper that trains and saves a whole module or some of its rows (`modules_to_save`,
            trainable tokens), False for a layer that adds an adapter to a `base_layer`.
    """

    name: str
    module: nn.Module
    is_auxiliary: bool


def adapter_sites(model: nn.Module) -> Iterator[Site]:
    """Every site of `model` once, in module order.

    The modules that hold the adapters themselves are not entered, so the walk costs the same however many there are.
    """
    seen: set[int] = set()
    stack: list[tuple[str, nn.Module]] = [("", model)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        children: Iterable[tuple[str, nn.Module | None]] = module._modules.items()
        if is_auxiliary(module):
            yield Site(state_dict_name(name), module, is_auxiliary=True)
            continue
        if is_adapter_layer(module):
            yield Site(state_dict_name(name), module, is_auxiliary=False)
            children = [("base_layer", module._modules["base_layer"])]
        stack.extend((join(name, part), child) for part, child in reversed(list(children)) if child is not None)


def state_dict_name(name: str) -> str:
    """A module's path as state dict keys have it: without wrappers that leave no trace there."""
    if "_wrapped_module" not in name:
        return name
    return ".".join(part for part in name.split(".") if part not in _TRANSPARENT)


def _wrapped(module: nn.Module | None) -> nn.Module | None:
    """What a wrapper without a trace in state dict keys holds; any other module itself."""
    while module is not None and not _TRANSPARENT.isdisjoint(module._modules):
        module = module._modules[next(filter(_TRANSPARENT.__contains__, module._modules))]
    return module


def join(*parts: str) -> str:
    """Joins path components, leaving out empty ones."""
    return ".".join(filter(None, parts))


def adapter_roots(site: Site, adapter_name: str) -> dict[str, Any]:
    """Paths under which `site` keeps the parameters of one adapter, and the module or tensor at each of them.

    Containers with an entry per adapter (`lora_A.default`) give that entry; anything else on the layer beside
    `base_layer` is common to all adapters and belongs to each.
    """
    roots = {}
    for attribute, child in _own_attributes(site.module):
        if _is_keyed_by_adapter(child):
            if adapter_name in child:
                roots[join(site.name, attribute, adapter_name)] = child[adapter_name]
        else:
            roots[join(site.name, attribute)] = child
    return roots


def adapter_prefixes(model: nn.Module, adapter_name: str | None = None) -> set[str]:
    """Beginnings of the state dict keys that belong to adapter layers, for code that filters state dicts by itself.

    Args:
        model: the model.
        adapter_name: the adapter; None for whole containers, with every adapter in them.

    What is trained as a whole (`modules_to_save`, token rows) is not among them.
    """
    layers = [site for site in adapter_sites(model) if not site.is_auxiliary]
    if adapter_name is None:
        return {join(site.name, attribute) for site in layers for attribute, _ in _own_attributes(site.module)}
    return {root for site in layers for root in adapter_roots(site, adapter_name)}


def container_paths(site: Site) -> set[str]:
    """Paths of what `site` has an entry in for each adapter."""
    return {path for path, _ in _containers(site.name, site.module)}


def is_of_another(key: str, containers: Collection[str], adapter_name: str) -> bool:
    """Whether a state dict key is that of another adapter's entry in one of the containers."""
    end = len(key)
    while (dot := key.rfind(".", 0, end)) >= 0:
        if key[:dot] in containers:
            return key[dot + 1 :].partition(".")[0] != adapter_name
        end = dot
    return False


def state_without_other_adapters(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
    """`model.state_dict()` without most of what is other adapters', which is not looked at.

    A module with hooks on its state dict, or a `state_dict` of its own, gives all that is in it.
    """
    from torch import nn

    state: dict[str, Any] = {}
    _add_state(model, "", adapter_name, state, (nn.ModuleDict, nn.ParameterDict))
    return state


def _add_state(
    module: nn.Module, prefix: str, adapter_name: str, state: dict[str, Any], containers: tuple[type[nn.Module], ...]
) -> None:
    if not _saves_plainly(module):
        state.update(module.state_dict(prefix=prefix))
        return
    module._save_to_state_dict(state, prefix, keep_vars=False)
    holds_adapters = is_auxiliary(module) or is_adapter_layer(module)
    for name, child in module._modules.items():
        if child is None:
            continue
        inside = f"{prefix}{name}."
        is_keyed = holds_adapters and type(child) in containers and name not in _OF_THE_BASE
        if not (is_keyed and _saves_plainly(child)):
            _add_state(child, inside, adapter_name, state, containers)
            continue
        entry, tensor = child._modules.get(adapter_name), child._parameters.get(adapter_name)
        if entry is not None:
            _add_state(entry, f"{inside}{adapter_name}.", adapter_name, state, containers)
        if tensor is not None:
            state[inside + adapter_name] = tensor.detach()


def _containers(name: str, module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What is keyed by adapter on a module, or on an adapter layer in it (a wrapper of token rows has one)."""
    for attribute, child in _own_attributes(module):
        path = join(name, attribute)
        if _is_keyed_by_adapter(child):
            yield path, child
        elif is_adapter_layer(child):
            yield from _containers(path, child)


def is_auxiliary(module: nn.Module) -> bool:
    """Whether it is a wrapper that trains and saves its `original_module`, or rows of it, beside the adapters."""
    return "original_module" in module._modules and hasattr(type(module), "adapter_state_dict_load_map")


def is_adapter_layer(module: Any) -> bool:
    """Whether it adds adapters to a `base_layer`."""
    return "base_layer" in getattr(module, "_modules", ()) and hasattr(type(module), "adapter_layer_names")


def _own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    yield from (
        (name, child)
        for group in (module._modules, module._parameters, module._buffers)
        for name, child in group.items()
        if child is not None and name not in _OF_THE_BASE
    )


def _is_keyed_by_adapter(child: Any) -> bool:
    cls: Any = type(child)
    return _is_container(cls)


@functools.cache
def _is_container(cls: Any) -> bool:
    """ModuleDict, ParameterDict and PEFT's BufferDict: classes with `keys` and membership."""
    return hasattr(cls, "keys") and hasattr(cls, "__contains__") and hasattr(cls, "update")


def tensor_paths(root: str, held: Any) -> list[str]:
    """State dict keys of what lies at `root`: one for a tensor, several or none for a module."""
    if has_only_parameters(held):
        return [join(root, key) for key, tensor in held._parameters.items() if tensor is not None]
    return [join(root, key) for key in held.state_dict()] if hasattr(held, "state_dict") else [root]


def has_only_parameters(held: Any) -> bool:
    """Whether it is a linear layer whose state dict is what its own parameters are."""
    from torch import nn

    return type(held) is nn.Linear and not (held._modules or held._buffers or _changes_state_dict(held))


def _saves_plainly(module: nn.Module) -> bool:
    """Whether `module.state_dict()` is what its `_save_to_state_dict` and its children give."""
    from torch import nn

    return type(module).state_dict is nn.Module.state_dict and not _changes_state_dict(module)


def _changes_state_dict(module: nn.Module) -> bool:
    """Whether hooks take part in `module.state_dict()`."""
    return bool(module._state_dict_hooks or module._state_dict_pre_hooks or "state_dict" in module.__dict__)


class Place(NamedTuple):
    """Where a model keeps a tensor: the module that holds it, its name there, and the tensor that is there now."""

    owner: nn.Module
    leaf: str
    held: Tensor


def place_of(model: nn.Module, key: str) -> Place | None:
    """The place of the state dict entry `key`, None if the model saves no such tensor."""
    *path, leaf = key.split(".")
    module = _wrapped(model)
    for part in path:
        module = _wrapped(module._modules.get(part)) if module is not None else None
    if module is None:
        return None
    held: Tensor | None = module._parameters.get(leaf)
    if held is None and leaf not in module._non_persistent_buffers_set:
        held = module._buffers.get(leaf)
    return None if held is None else Place(module, leaf, held)
