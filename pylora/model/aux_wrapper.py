"""AuxiliaryTrainingWrapper: modules that train and are saved beside the adapters, without being adapters."""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import nn

from pylora.layers.tuner_layer import BaseTunerLayer, set_layer_requires_grad

# Modules that are containers: they have a `forward` attribute and cannot be called.
_CONTAINERS = (nn.ModuleDict, nn.ModuleList, nn.ParameterDict, nn.ParameterList)
# Kinds whose rows are independent, so that a batch may be split by adapter.
_ROWWISE = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d)


class AuxiliaryTrainingWrapper(nn.Module):
    """Holds `original_module` and, per adapter, what replaces it while that adapter is active.

    Attribute access falls through to the active adapter's module, or to the original one when none is active.

    Args:
        module_to_save: The module to wrap.
        adapter_name: The first adapter.
        **kwargs: Passed to `init_modules` and `update`.

    Raises:
        TypeError: `module_to_save` is a container or a tuner layer.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    merged_adapters: list[str] = []  # noqa: RUF012 (nothing here merges)

    def __init__(self, module_to_save: nn.Module, adapter_name: str, **kwargs: Any) -> None:
        super().__init__()
        self.original_module = module_to_save
        self._active_adapter: str | list[str] = [adapter_name]
        self._disable_adapters = False
        self._adapters: set[str] = set()
        self.check_module()
        self.init_modules(adapter_name, **kwargs)
        self.update(adapter_name, **kwargs)

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        """Make the containers that `update` fills."""
        raise NotImplementedError

    def _error_message_name(self) -> str:
        return "training wrapper"

    def check_module(self) -> None:
        """Raise TypeError for an original module that cannot be wrapped."""
        if isinstance(self.original_module, (*_CONTAINERS, BaseTunerLayer)):
            raise TypeError(
                f"{self._error_message_name()} cannot be applied to modules of type {type(self.original_module)}"
            )

    @property
    def disable_adapters(self) -> bool:
        """Whether the original module is used whatever is active. Change it with `enable_adapters`."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter, or [] when none is. Change it with `set_adapter`."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapter as a list of at most one name."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def _hasattr_wrapped(self, name: str, modules: dict[str, Any]) -> bool:
        return False

    def _getattr_wrapped(self, name: str, modules: dict[str, Any]) -> Any:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            pass
        modules = self.__dict__.get("_modules")
        # During unpickling and __init__ there is nothing to fall through to yet.
        if modules is not None and "original_module" in modules:
            if self.disable_adapters or not self.active_adapters:
                return getattr(self.original_module, name)
            if self._hasattr_wrapped(name, modules):
                return self._getattr_wrapped(name, modules)
        raise AttributeError(f"'{type(self).__name__}' object has no attribute '{name}'")

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Take part in one more adapter."""
        self._adapters.add(adapter_name)

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is not None and args and len(args[0]) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(args[0])} respectively."
            )

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _forward_wrapped_mixed_batch(self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError

    def _mixed_batch_forward(
        self, input: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """A batch whose rows belong to different adapters, one forward for each adapter's rows."""
        if not isinstance(self.original_module, _ROWWISE):
            names = ", ".join(cls.__name__ for cls in _ROWWISE)
            raise TypeError(f"Mixed batching is only supported for the following modules: {names}.")
        results: list[Any] = [None] * len(input)
        for name in dict.fromkeys(adapter_names):
            rows = [i for i, row_name in enumerate(adapter_names) if row_name == name]
            if name == "__base__":
                output = self.original_module(input[rows], *args, **kwargs)
            else:
                output = self._forward_wrapped_mixed_batch(input[rows], name, *args, **kwargs)
            for row, value in zip(rows, output, strict=True):
                results[row] = value
        return torch.stack(results)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The active adapter's module, or the original one when disabled or when none of this wrapper's is active.

        Args:
            *args: For the wrapped module.
            **kwargs: For the wrapped module, except `adapter_names`: one name, or "__base__", for each row.

        Raises:
            ValueError: `adapter_names` has another length than the input.
            TypeError: `adapter_names` is given and the module's rows are not independent.
        """
        self._check_forward_args(*args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters or any(name not in self._adapters for name in self.active_adapters):
            return self._forward_wrapped_passthrough(*args, **kwargs)
        if adapter_names is None:
            return self._forward_wrapped(*args, **kwargs)
        return self._mixed_batch_forward(*args, adapter_names=adapter_names, **kwargs)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the adapters' modules and the original one."""
        self._disable_adapters = not enabled

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """Which of the names this wrapper would activate, None for none; raises ValueError where it cannot tell."""
        raise NotImplementedError

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter the active one.

        Raises:
            ValueError: The wrapper takes no part in that adapter.
        """
        if not isinstance(adapter_names, str):
            for name in adapter_names:
                if name not in self._adapters:
                    raise ValueError(f"Adapter {name} not found in {self._adapters}")
        self._active_adapter = adapter_names if isinstance(adapter_names, str) else list(adapter_names)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Leave an adapter and activate another if needed."""
        raise NotImplementedError

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the named adapters' modules trainable or frozen."""
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for attr in self.adapter_layer_names:
            for name, layer in attrgetter(attr)(self).items():
                if name in names:
                    set_layer_requires_grad(layer, requires_grad)

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The entries of this module's state dict that belong to the adapter, under their names in a checkpoint."""
        raise NotImplementedError

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        """Checkpoint name -> state-dict name, both relative to this module, of everything that a load must fill."""
        raise NotImplementedError

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module to put in this wrapper's place when adapters are removed from the model."""
        raise NotImplementedError

    def _get_available_adapters(self) -> set[str]:
        raise NotImplementedError
