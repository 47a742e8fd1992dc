"""State and lifecycle that every adapter-carrying layer shares, whatever the adapter computes."""

from __future__ import annotations

import warnings
from abc import ABC
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn


def params_of(layer: nn.Module | torch.Tensor) -> list[torch.Tensor]:
    """A parameter, or a module's parameters. Almost always a module without children, for which this is quick."""
    if isinstance(layer, torch.Tensor):
        return [layer]
    if layer._modules:
        return list(layer.parameters())
    return [param for param in layer._parameters.values() if param is not None]


def set_layer_requires_grad(layer: nn.Module | torch.Tensor, requires_grad: bool) -> None:
    """Set `requires_grad` on a parameter or a module's parameters; non-leaf views (FSDP) are left alone."""
    for param in params_of(layer):
        if param.requires_grad is not requires_grad and param.is_leaf:
            param.requires_grad_(requires_grad)


# These keep their entries in `_modules` or `_parameters`. Their methods are Python functions of 1 us and more.
_TORCHS_CONTAINERS = (nn.ModuleDict, nn.ParameterDict)


def entry_of(container: Any, name: str) -> Any:
    """`container[name]`, None where it has no such entry."""
    if type(container) in _TORCHS_CONTAINERS:
        entry = container._modules.get(name)
        if entry is None:
            entry = container._parameters.get(name)
        if entry is not None:
            return entry
    return container[name] if name in container else None  # noqa: SIM401 (ModuleDict has no `get`)


class BaseTunerLayer(ABC):  # noqa: B024 (PEFT's is an ABC, and metaclasses of subclasses depend on it)
    """Mixin for modules that wrap a `base_layer` and hold adapters by name.

    Subclasses are also `nn.Module`s. They list the containers (`nn.ModuleDict`, `nn.ParameterDict`) whose entries are
    adapter weights in `adapter_layer_names`, and the plain per-adapter dictionaries in `other_param_names`.
    """

    adapter_layer_names: tuple[str, ...] = ()
    other_param_names: tuple[str, ...] = ()
    # Adapter name -> containers whose entry for that adapter never trains (some variants freeze one factor).
    frozen_peft_weight_names: dict[str, tuple[str, ...]] = {}  # noqa: RUF012 (a default, replaced on instances)
    _disable_adapters: bool = False
    _active_adapter: str | list[str] = "default"
    merged_adapters: list[str] = []  # noqa: RUF012 (a default, replaced on instances)
    # Adapters that this layer's methods may have made trainable, so that a switch need not look at all the others.
    # None: not kept, look at all.
    _may_train: set[str] | None = None
    quantization_backend: Any = None

    def get_base_layer(self) -> nn.Module:
        """The innermost wrapped module: tuner layers may wrap one another."""
        base_layer: Any = self
        # Not by way of torch's `__getattr__`, which takes 1 us, and 3 to say that there is none.
        while type(base_layer) is not nn.Linear:
            inner = base_layer._modules.get("base_layer")
            if inner is None:
                inner = getattr(base_layer, "base_layer", None)
            if inner is None:
                break
            base_layer = inner
        return base_layer

    def get_base_weight(self) -> torch.Tensor:
        """The base layer's weight, without autograd history."""
        base_layer: Any = self.get_base_layer()
        return base_layer.weight.data

    def set_base_weight(self, weight_data: torch.Tensor) -> None:
        """Make `weight_data` the base layer's weight."""
        base_layer: Any = self.get_base_layer()
        base_layer.weight.data = weight_data

    # Model code reads these through the wrapped layer (T5 looks at `self.wo.weight.dtype`, for one).
    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight."""
        base_layer: Any = self.get_base_layer()
        return base_layer.qweight if hasattr(base_layer, "qweight") else base_layer.weight

    @property
    def bias(self) -> torch.Tensor:
        """The base layer's bias."""
        base_layer: Any = self.get_base_layer()
        return base_layer.bias

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' deltas to the base weight."""
        raise NotImplementedError(f"{type(self).__name__} cannot merge its adapters")

    def unmerge(self) -> None:
        """Take every merged delta out of the base weight."""
        raise NotImplementedError(f"{type(self).__name__} cannot unmerge its adapters")

    @property
    def merged(self) -> bool:
        """Whether the base weight currently holds at least one adapter."""
        return bool(self.merged_adapters)

    @property
    def disable_adapters(self) -> bool:
        """Whether the forward ignores the adapters. Change it with `enable_adapters`."""
        return self._disable_adapters

    @property
    def active_adapter(self) -> str | list[str]:
        """The active adapter or adapters. Change them with `set_adapter`."""
        return self._active_adapter

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list; a name need not have weights on this layer."""
        active = self._active_adapter
        return [active] if isinstance(active, str) else active

    def _adapter_containers(self) -> list[tuple[str, Any]]:
        """The non-empty containers of adapter weights, with their attribute names."""
        modules: dict[str, Any] = self._modules  # type: ignore[attr-defined]
        return [
            (name, held)
            for name in self.adapter_layer_names
            if (held := modules[name])._modules
            or held._parameters
            or (type(held) not in _TORCHS_CONTAINERS and len(held))
        ]

    def _adapter_entries(self, adapter_name: str) -> list[tuple[str, Any, Any]]:
        """What the adapter has on this layer: (container's attribute name, container, entry)."""
        return [
            (attr, container, entry)
            for attr, container in self._adapter_containers()
            if (entry := entry_of(container, adapter_name)) is not None
        ]

    def _get_available_adapters(self) -> set[str]:
        """Names of the adapters that have weights on this layer."""
        return {name for _, container in self._adapter_containers() for name in container}

    def _all_available_adapter_names(self) -> list[str]:
        """Names found in any per-adapter container or dictionary, sorted."""
        names: set[str] = set()
        for attr in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, attr)
            if hasattr(container, "keys"):
                names.update(container.keys())
        return sorted(names)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch all adapters on or off. On makes the active ones trainable again, off freezes every one.

        Args:
            enabled: Whether the forward uses the active adapters.
        """
        if enabled:
            self.set_adapter(self.active_adapters)
        else:
            self._train_only([])
        self._disable_adapters = not enabled

    def _train_only(self, names: list[str]) -> None:
        """Make the weights of these adapters trainable and freeze the others'."""
        for _, container in self._adapter_containers():
            known = container.keys() if self._may_train is None else {*self._may_train, *self.active_adapters, *names}
            for name in known:
                entry = entry_of(container, name)
                if entry is not None:
                    set_layer_requires_grad(entry, name in names)
        if self._may_train is not None:
            self._may_train = set(names)
        self._freeze_non_trainable_peft_weights(names)

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make the named adapters the active ones, and only them trainable.

        Args:
            adapter_names: One name or several; names without weights on this layer are kept but do nothing here.
            inference_mode: Activate them frozen.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else adapter_names
        self._train_only([] if inference_mode else list(names))
        self._active_adapter = list(names)

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make the named adapters trainable or frozen, active or not.

        Args:
            adapter_names: One name or several.
            requires_grad: The new value of the flag.
        """
        names = {adapter_names} if isinstance(adapter_names, str) else set(adapter_names)
        for name in names:
            for _, _, entry in self._adapter_entries(name):
                set_layer_requires_grad(entry, requires_grad)
        if requires_grad:
            if self._may_train is not None:
                self._may_train |= names
            self._freeze_non_trainable_peft_weights(sorted(names))

    def _freeze_non_trainable_peft_weights(self, adapter_names: str | Sequence[str] | None = None) -> None:
        """Freeze again what `frozen_peft_weight_names` declares, after a call that may have made it trainable."""
        if not self.frozen_peft_weight_names:
            return
        if adapter_names is None:
            adapter_names = list(self.frozen_peft_weight_names)
        elif isinstance(adapter_names, str):
            adapter_names = [adapter_names]
        for name in adapter_names:
            for attr in self.frozen_peft_weight_names.get(name, ()):
                if attr in self.adapter_layer_names and name in getattr(self, attr):
                    set_layer_requires_grad(getattr(self, attr)[name], False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter's weights and settings; a layer without it is left as it is.

        If the adapter was active, the other active ones stay active; if it was the only one, the first remaining name
        in sorted order takes its place, with a warning.

        Args:
            adapter_name: The adapter to remove.
        """
        for attr in self.adapter_layer_names + self.other_param_names:
            container = getattr(self, attr)
            if adapter_name in container:
                del container[adapter_name]
        if self._may_train is not None:
            self._may_train.discard(adapter_name)
        if adapter_name in self.frozen_peft_weight_names:
            del self.frozen_peft_weight_names[adapter_name]

        active = self.active_adapters
        if adapter_name not in active:
            return
        still_active = [name for name in active if name != adapter_name]
        remaining = [] if still_active else self._all_available_adapter_names()
        if remaining:
            warnings.warn(
                f"Adapter {adapter_name} was active which is now deleted. Setting active adapter to {remaining[0]}.",
                stacklevel=2,
            )
        self.set_adapter(still_active or remaining[:1])

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        """Where the base weight lives and what it computes in; None for what cannot be told."""
        weight = base_layer._parameters.get("weight")
        if weight is not None and type(base_layer) is nn.Linear and "compute_dtype" not in base_layer.__dict__:
            return weight.device, weight.dtype
        weight = getattr(base_layer, "weight", None)
        if weight is None:
            weight = getattr(base_layer, "qweight", None)
        dtype = getattr(base_layer, "compute_dtype", None)
        if weight is None:
            return None, dtype
        return weight.device, dtype if dtype is not None else weight.dtype

    def _cast_input_dtype(self, x: Any, dtype: torch.dtype) -> Any:
        """`x` in the adapter's dtype, unless casting is switched off by `cast_input_dtype_enabled`."""
        if x is None or x.dtype == dtype or not getattr(self, "cast_input_dtype_enabled", True):
            return x
        return x.to(dtype)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be rewritten as a plain LoRA adapter."""
        return False
