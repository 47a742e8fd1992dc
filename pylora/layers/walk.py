"""One traversal of a model that does not enter adapters, so that its cost does not grow with their number."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeGuard

from torch import nn

from pylora.layers.tuner_layer import BaseTunerLayer


class Visit(NamedTuple):
    """A module, its qualified name, and where it hangs: `parent._modules[child_name]`. The root has no parent."""

    name: str
    module: nn.Module
    parent: nn.Module | None
    child_name: str


def is_tuner_layer(module: nn.Module) -> TypeGuard[BaseTunerLayer]:
    """`isinstance(module, BaseTunerLayer)`, which for an abstract class takes as long as the rest of a visit."""
    return BaseTunerLayer in type(module).__mro__


def walk(root: nn.Module, enter_tuner_layers: bool = True) -> Iterator[Visit]:
    """Visit every module once, in the order of `named_modules()`, except for what adapters consist of.

    Args:
        root: The module to start from; its name is "".
        enter_tuner_layers: Whether to go on to a tuner layer's `base_layer`; its other children are never visited.
            False also keeps out of wrappers that stand for a module as a whole (`modules_to_save`).
    """
    seen: set[nn.Module] = set()
    stack = [Visit("", root, None, "")]
    while stack:
        visit = stack.pop()
        module = visit.module
        if module in seen:
            continue
        seen.add(module)
        yield visit
        children = module._modules
        if is_tuner_layer(module):
            items = [("base_layer", children.get("base_layer"))] if enter_tuner_layers else []
        elif not enter_tuner_layers and hasattr(type(module), "adapter_layer_names"):
            items = []
        else:
            items = list(children.items())
        prefix = visit.name + "." if visit.name else ""
        for child_name, child in reversed(items):
            if child is not None:
                # Visit(...) of these, in half the time.
                stack.append(tuple.__new__(Visit, (prefix + child_name, child, module, child_name)))


def tuner_layers(root: nn.Module) -> list[BaseTunerLayer]:
    """Every tuner layer of the model, outer before inner."""
    return [visit.module for visit in walk(root) if is_tuner_layer(visit.module)]
