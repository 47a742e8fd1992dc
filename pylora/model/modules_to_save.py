"""`modules_to_save`: modules that each adapter trains fully, as a copy of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from pylora.layers import BaseTunerLayer
from pylora.layers.tuner_layer import set_layer_requires_grad
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper


class ModulesToSaveWrapper(AuxiliaryTrainingWrapper):
    """Holds a trainable copy of `original_module` for each adapter, in `modules_to_save.<adapter>`.

    At most one adapter is active here: two copies of one module could not both be used.

    Args:
        module_to_save: The module to copy; it is frozen.
        adapter_name: The first adapter.
        tied_module: A module whose weight the adapter's copy shares instead of having its own.
    """

    adapter_layer_names: tuple[str, ...] = ("modules_to_save",)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, tied_module: nn.Module | None = None) -> None:
        super().__init__(module_to_save, adapter_name, tied_module=tied_module)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.modules_to_save = nn.ModuleDict()

    def _error_message_name(self) -> str:
        return "modules_to_save"

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        if not self.active_adapters:
            return self._forward_wrapped_passthrough(*args, **kwargs)
        return self.modules_to_save[self.active_adapters[0]](*args, **kwargs)

    def _forward_wrapped_mixed_batch(self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        return self.modules_to_save[active_adapter](x, *args, **kwargs)

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        return self.original_module(*args, **kwargs)

    def _hasattr_wrapped(self, name: str, modules: dict[str, Any]) -> bool:
        return self.active_adapters[0] in modules["modules_to_save"]

    def _getattr_wrapped(self, name: str, modules: dict[str, Any]) -> Any:
        return getattr(modules["modules_to_save"][self.active_adapters[0]], name)

    def update(self, adapter_name: str, tied_module: nn.Module | None = None, **kwargs: Any) -> None:
        """Give the adapter its copy, unless it has one. It trains if the adapter is the active one."""
        super().update(adapter_name)
        if adapter_name not in self.modules_to_save:
            self.modules_to_save[adapter_name] = self._copy(tied_module)
        self.original_module.requires_grad_(False)
        if adapter_name == self.active_adapter:
            set_layer_requires_grad(self.modules_to_save[adapter_name], True)

    def _copy(self, tied_module: nn.Module | None) -> nn.Module:
        if tied_module is not None:
            weight: Any = tied_module.weight
            own: Any = self.original_module.weight
            return copy.deepcopy(self.original_module, memo={id(own): weight})
        duplicate = copy.deepcopy(self.original_module)
        if hasattr(duplicate, "_hf_hook"):
            _renew_accelerate_hook(duplicate)
        return duplicate

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the copies and the original; on makes the active copy trainable, off freezes all copies."""
        super().enable_adapters(enabled)
        if enabled:
            for name in self.active_adapters:
                set_layer_requires_grad(self.modules_to_save[name], True)
        else:
            for module in self.modules_to_save.values():
                set_layer_requires_grad(module, False)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The one of the names that has a copy here, None if none has.

        Raises:
            ValueError: The list is empty, or several of its names have a copy here.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if len(adapter_name) == 0:
            raise ValueError("Please specify at least one adapter to set")
        here = [name for name in adapter_name if name in self.modules_to_save]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(here)}")
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter's copy the active and trainable one, or none for [].

        Args:
            adapter_names: A name, or a list of at most one.
            inference_mode: Activate it frozen.

        Raises:
            ValueError: More than one name, or one without a copy here.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise ValueError(f"Attempted to set multiple ({names}) adapters at once for modules_to_save.")
        if names and names[0] not in self._adapters:
            raise ValueError(f"Adapter {names[0]} not found in {self._adapters}")
        for name in self.active_adapters:
            set_layer_requires_grad(self.modules_to_save[name], False)
        if not names:
            self._active_adapter = []
            return
        set_layer_requires_grad(self.modules_to_save[names[0]], not inference_mode)
        self._active_adapter = names[0]

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Drop the adapter's copy and activate the new active adapter's, if it has one here.

        Args:
            adapter_name: The adapter to leave; one without a copy here is ignored.
            new_active_adapters: The model's active adapters from now on.

        Raises:
            ValueError: More than one new active adapter.
        """
        if adapter_name not in self.modules_to_save:
            return
        new_active = list(new_active_adapters or [])
        if len(new_active) > 1:
            raise ValueError(
                f"Attempted to set multiple ({new_active}) adapters at once for {type(self).__name__}, "
                "which is not allowed."
            )
        self._adapters.discard(adapter_name)
        if not new_active or new_active[0] not in self.modules_to_save:
            self._active_adapter = []
        elif new_active != self.active_adapters:
            self.set_adapter(new_active[0])
        del self.modules_to_save[adapter_name]

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self._adapters:
            return {}
        keys = self.modules_to_save[adapter_name].state_dict()
        return {key: f"modules_to_save.{adapter_name}.{key}" for key in keys}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        load_map = self.adapter_state_dict_load_map(adapter_name)
        return {key: state_dict[model_key] for key, model_key in load_map.items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The active adapter's copy, merged and unwrapped if it is a tuner layer; the original when none is active."""
        if not self.active_adapters:
            return self.original_module
        module = self.modules_to_save[self.active_adapters[0]]
        if isinstance(module, BaseTunerLayer):
            if merge:
                module.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            module = module.get_base_layer()
        return module

    def _get_available_adapters(self) -> set[str]:
        return set(self.modules_to_save.keys())


def _renew_accelerate_hook(module: nn.Module) -> None:
    """Replace a deep-copied accelerate hook, which still points at the copied-from module's state, by a fresh one."""
    import inspect

    from accelerate import hooks

    old: Any = module._hf_hook
    cls = getattr(hooks, type(old).__name__)
    parameters = inspect.signature(cls.__init__).parameters
    fresh = cls(**{name: value for name, value in vars(old).items() if name in parameters})
    hooks.remove_hook_from_module(module)
    hooks.add_hook_to_module(module, fresh)


def _names(root: nn.Module, adapter_name: str) -> Iterator[str]:
    """Names of all modules, repeated ones too, without what other adapters than this one consist of."""
    stack = [("", root)]
    while stack:
        name, module = stack.pop()
        yield name
        prefix = f"{name}." if name else ""
        for key, child in reversed(module._modules.items()):
            if child is None:
                continue
            if key in getattr(module, "adapter_layer_names", ()) or key == "lora_dropout":
                if adapter_name in child and isinstance(child[adapter_name], nn.Module):  # type: ignore[operator,index]
                    yield f"{prefix}{key}.{adapter_name}"
            else:
                stack.append((prefix + key, child))


def set_trainable(
    model: nn.Module,
    adapter_name: str,
    module_names: Iterable[str] | None,
    inference_mode: bool,
    strict_module_check: bool = False,
    wrapper_cls: type[AuxiliaryTrainingWrapper] | None = None,
    activate_adapter: bool = True,
    *,
    on_change: Callable[[Callable[[], None]], Any] | None = None,
    **wrapper_kwargs: Any,
) -> list[AuxiliaryTrainingWrapper]:
    """Wrap the modules whose name ends with one of `module_names`; where wrappers are, add the adapter to them.

    Args:
        model: The model to change.
        adapter_name: The adapter that trains the modules.
        module_names: Name endings. None or empty: nothing is done.
        inference_mode: Leave the adapter's modules frozen.
        strict_module_check: Raise when no module matches.
        wrapper_cls: `ModulesToSaveWrapper` unless given.
        activate_adapter: Whether new wrappers use the adapter at once.
        on_change: Called after each change with a function that reverts it.
        **wrapper_kwargs: For the wrapper's constructor and `update`.

    Returns:
        The new wrappers.

    Raises:
        ValueError: A name matches something inside a tuner layer, or nothing matches and `strict_module_check` is set.
        TypeError: A match is a container or a tuner layer.
    """
    wrapper_cls = ModulesToSaveWrapper if wrapper_cls is None else wrapper_cls
    names = list(module_names or ())
    if not names:
        return []
    endings = tuple(names)
    new_wrappers: list[AuxiliaryTrainingWrapper] = []
    found = False
    # Tied modules count under each of their names, hence no removal of duplicates.
    for key in [key for key in _names(model, adapter_name) if key.endswith(endings)]:
        *path, child_name = key.split(".")
        parent, target = model.get_submodule(".".join(path)), model.get_submodule(key)
        grandparent = model.get_submodule(".".join(path[:-1])) if path else None
        found = True
        if isinstance(grandparent, BaseTunerLayer):
            raise ValueError(
                f"You are trying to target a module with {wrapper_cls} that is a child of {type(grandparent)}. "
                "This is almost certainly not the intended behavior. Please ensure that the adapter name, "
                f"'{adapter_name}', does not conflict with any of the targeted modules."
            )
        wrapper = grandparent if isinstance(grandparent, wrapper_cls) else target
        if isinstance(wrapper, wrapper_cls):
            is_new = adapter_name not in wrapper._adapters
            wrapper.update(adapter_name, **wrapper_kwargs)
            if on_change and is_new:
                active = list(wrapper.active_adapters)
                on_change(lambda w=wrapper, a=active: w.delete_adapter(adapter_name, a))  # type: ignore[misc]
            wrapper.set_adapter(wrapper.active_adapter, inference_mode=inference_mode)
            continue
        wrapper = wrapper_cls(target, adapter_name, **wrapper_kwargs)
        wrapper.set_adapter(adapter_name if activate_adapter else [], inference_mode=inference_mode)
        setattr(parent, child_name, wrapper)
        new_wrappers.append(wrapper)
        if on_change:
            on_change(lambda p=parent, n=child_name, t=target: setattr(p, n, t))  # type: ignore[misc]
    if strict_module_check and not found:
        raise ValueError(
            f"Target modules {set(names)} not found in the base model. Please check the target modules and try again."
        )
    return new_wrappers
