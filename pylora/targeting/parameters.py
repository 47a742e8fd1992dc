"""`target_parameters`: which parameters of a model get an adapter of their own."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any, NamedTuple

from torch import nn


class ParameterTarget(NamedTuple):
    """A parameter: the name of its module, as if nothing in the model were wrapped, and its name there."""

    module_name: str
    parameter_name: str

    @property
    def key(self) -> str:
        """The full name, which `rank_pattern` and `alpha_pattern` match."""
        return f"{self.module_name}.{self.parameter_name}"


def resolve_parameters(
    model: nn.Module,
    target_parameters: Iterable[str],
    targeted_modules: Collection[str],
    is_tuner_layer: Callable[[nn.Module], bool],
) -> list[ParameterTarget]:
    """The parameters whose full name is one of `target_parameters` or ends with a dot and one of them.

    In the order of the model's modules and of the parameters in each; this order is that of nested wrappers and so
    part of the checkpoint format.

    Args:
        model: The base model, with or without adapters in it.
        target_parameters: Names or ends of names.
        targeted_modules: Names of the modules that get an adapter by `target_modules` at the same time.
        is_tuner_layer: Tells a module that wraps another one for adapters.

    Raises:
        ValueError: a parameter belongs to the model itself, or to a layer that has adapters as a module.
    """
    names = set(target_parameters)
    endings = tuple(f".{name}" for name in names)
    found = []
    for module_name, module, is_adapted in _unwrapped_modules(model, is_tuner_layer):
        for parameter_name in _parameter_names(module):
            target = ParameterTarget(module_name, parameter_name)
            if target.key not in names and not target.key.endswith(endings):
                continue
            if not module_name:
                raise ValueError(
                    "Targeting an nn.Parameter on the top-level module is not supported "
                    f"(parameter '{parameter_name}'): there is no place to put a wrapper in."
                )
            if is_adapted or module_name in targeted_modules:
                raise ValueError(
                    f"Trying to wrap an `nn.Parameter` of layer '{module_name}' of type {type(module).__name__}, "
                    "which is not a valid target. Make sure that this layer is not also targeted with "
                    "`target_modules`: for some models that happens by default, `target_modules=[]` prevents it."
                )
            found.append(target)
    return found


def _parameter_names(module: nn.Module) -> list[str]:
    names = [name for name, param in module._parameters.items() if param is not None]
    return names + list(getattr(module, "parametrizations", ()))


def _unwrapped_modules(
    root: nn.Module, is_tuner_layer: Callable[[nn.Module], bool]
) -> Iterator[tuple[str, nn.Module, bool]]:
    """Every module once, with its name as if no tuner layer were there, and whether one adapts it as a module."""
    seen: set[int] = set()
    stack = [("", root)]
    while stack:
        name, module = stack.pop()
        if id(module) in seen:
            continue
        seen.add(id(module))
        inner: Any = module
        is_adapted = False
        while is_tuner_layer(inner):
            is_adapted = is_adapted or not hasattr(inner, "parameter_name")
            inner = inner.base_layer
        yield name, inner, is_adapted
        prefix = f"{name}." if name else ""
        children = [(prefix + key, child) for key, child in inner._modules.items() if key != "parametrizations"]
        stack.extend((key, child) for key, child in reversed(children) if child is not None)
