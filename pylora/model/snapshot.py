"""What adding an adapter changes on a model, noted beforehand, so that a failure can be taken back."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

from torch import nn

from pylora.layers import BaseTunerLayer, walk
from pylora.layers.walk import is_tuner_layer
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper
from pylora.model.inject import adapter_restorer

_STATE = ("training", "_active_adapter", "_disable_adapters")
_NO_HOOKS: frozenset[int] = frozenset()


class ModelSnapshot:
    """Which module hangs where, and the flags on modules and parameters; tensors are not copied.

    The adapters that a layer already has are not looked at, so the cost does not grow with their number.

    Args:
        model: The model.
        adapter_name: An adapter that may be replaced, if the model has it: its layers' entries are noted.
    """

    def __init__(self, model: nn.Module, adapter_name: str | None = None) -> None:
        self._root = model
        self._root_attributes = dict(model.__dict__)
        self._configs: dict[str, Any] = dict(model.__dict__.get("peft_config", {}))
        self._modules: list[tuple[nn.Module, dict[str, nn.Module | None], dict[str, Any], frozenset[int]]] = []
        self._parameters: list[tuple[nn.Parameter, bool]] = []
        self._replaced: list[Callable[[], None]] = []
        is_known = adapter_name in self._configs
        for visit in walk(model):
            module = visit.module
            if is_known and is_tuner_layer(module):
                self._replaced.append(adapter_restorer(module, str(adapter_name)))
            attributes = module.__dict__
            state = {name: attributes[name] for name in _STATE if name in attributes}
            hooks = frozenset(module._forward_hooks) if module._forward_hooks else _NO_HOOKS
            self._modules.append((module, module._modules.copy(), state, hooks))
            for parameter in module._parameters.values():
                if parameter is not None:
                    self._parameters.append((parameter, parameter.requires_grad))

    def restore(self, adapter_name: str) -> None:
        """Takes the adapter out, or puts the one of that name back, and modules, hooks and flags too."""
        is_new = adapter_name not in self._configs
        for module, children, state, hooks in self._modules:
            if is_new and isinstance(module, BaseTunerLayer):
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # that another adapter becomes active: it will not stay so
                    module.delete_adapter(adapter_name)
            elif is_new and isinstance(module, AuxiliaryTrainingWrapper):
                module._adapters.discard(adapter_name)
            module._modules.clear()
            module._modules.update(children)
            module.__dict__.update(state)
            for added in set(module._forward_hooks) - hooks:
                _remove_hook(module, added)
        for put_back in self._replaced:
            put_back()
        for parameter, requires_grad in self._parameters:
            parameter.requires_grad_(requires_grad)
        configs: dict[str, Any] = self._root.__dict__.get("peft_config", {})
        configs.clear()
        configs.update(self._configs)
        self._root.__dict__.clear()
        self._root.__dict__.update(self._root_attributes)


def _remove_hook(module: nn.Module, hook_id: int) -> None:
    tables: list[dict[int, Any]] = [
        module._forward_hooks,
        module._forward_hooks_with_kwargs,
        module._forward_hooks_always_called,
    ]
    for table in tables:
        table.pop(hook_id, None)
