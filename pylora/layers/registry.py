"""Which LoRA layer wraps which kind of module. Adding a kind is one file with one decorator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import nn

from pylora.layers.tuner_layer import BaseTunerLayer

LayerFactory = Callable[..., nn.Module]
Matcher = Callable[[nn.Module], bool]
F = TypeVar("F", bound=LayerFactory)

_FACTORIES: list[tuple[str, Matcher, LayerFactory]] = []


def register_layer(display_name: str, matches: Matcher) -> Callable[[F], F]:
    """Decorate a factory `(target, adapter_name, config, **kwargs) -> LoRA layer` for a kind of module.

    Args:
        display_name: How messages call the kind of module.
        matches: Tells from a module, unwrapped of tuner layers, whether the factory wraps it. The first registered
            that says yes does.
    """

    def register(factory: F) -> F:
        _FACTORIES.append((display_name, matches, factory))
        return factory

    return register


def find_factory(target: nn.Module, config: Any = None) -> LayerFactory:
    """The factory for `target`, which may itself be a tuner layer.

    Args:
        target: The module.
        config: The adapter's LoraConfig. The classes registered on it come before pylora's own.

    Raises:
        ValueError: pylora has no layer for this kind of module.
    """
    module = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    for module_class, layer_class in (getattr(config, "_custom_modules", None) or {}).items():
        if isinstance(module, module_class):
            return layer_class
    for _, matches, factory in _FACTORIES:
        if matches(module):
            return factory
    supported = ", ".join(f"`{name}`" for name, _, _ in _FACTORIES)
    raise ValueError(
        f"Target module {target} is not supported. Currently, only the following modules are supported: {supported}."
    )


def create_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module:
    """Wrap `target` in the LoRA layer for its kind, with one adapter.

    Args:
        target: The module to wrap; it is not changed.
        adapter_name: The adapter's name.
        config: Its LoraConfig. `fan_in_fan_out` is corrected, with a warning, where it contradicts the module.
        **kwargs: `r`, `lora_alpha` and what else the layer's constructor takes.

    Raises:
        ValueError: The kind of module, or the configuration on it, is not supported.
    """
    return find_factory(target, config)(target, adapter_name, config=config, **kwargs)
