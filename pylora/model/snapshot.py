"""What adding an adapter changes on a model, noted beforehand, so that a failure can be taken back."""

from __future__ import annotations

from typing import Any

from torch import nn

from pylora.layers.walk import walk


class ModelSnapshot:
    """Which module hangs where, and the flags on modules and parameters; tensors are not copied.

    Adapters that a layer already has are not recorded, so the cost does not grow with their number. An adapter added to
    such a layer is to be deleted from it before `restore`.
    """

    def __init__(self, model: nn.Module) -> None:
        self._root = model
        self._root_attributes = dict(model.__dict__)
        self._modules: list[tuple[nn.Module, dict[str, nn.Module | None], bool, set[int]]] = []
        self._parameters: list[tuple[nn.Parameter, bool]] = []
        for visit in walk(model):
            module = visit.module
            self._modules.append(
                (module, dict(module._modules), module.training, set(module._forward_hooks)),
            )
            self._parameters += [(p, p.requires_grad) for p in module._parameters.values() if p is not None]

    def restore(self) -> None:
        """Puts modules, forward hooks, `training` and `requires_grad` back, and the model's own attributes."""
        for module, children, training, hooks in self._modules:
            module._modules.clear()
            module._modules.update(children)
            module.training = training
            for added in set(module._forward_hooks) - hooks:
                _remove_hook(module, added)
        for parameter, requires_grad in self._parameters:
            parameter.requires_grad_(requires_grad)
        for name in set(self._root.__dict__) - set(self._root_attributes):
            del self._root.__dict__[name]


def _remove_hook(module: nn.Module, hook_id: int) -> None:
    tables: list[dict[int, Any]] = [
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
    for table in tables:
        table.pop(hook_id, None)
