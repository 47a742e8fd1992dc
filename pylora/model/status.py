"""What state the adapters of a model are in, layer by layer and as a whole."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

from torch import nn

from pylora.checkpoint.structure import adapter_sites
from pylora.layers.buffer_dict import BufferDict
from pylora.model.trainable import count_parameters

Irregular = Literal["irregular"]
T = TypeVar("T")


@dataclass
class TunerLayerStatus:
    """One adapter layer.

    Attributes:
        name: its path in the model.
        module_type: such as "lora.Linear".
        enabled: whether its adapters take part in the forward pass.
        active_adapters, merged_adapters, available_adapters: names.
        requires_grad: for each adapter whether its parameters are trained; "irregular" where only some are.
        devices: for each adapter the device types of its parameters.
        quantization_backend: name of the base weight's quantisation, None for a plain one.
    """

    name: str
    module_type: str
    enabled: bool
    active_adapters: list[str]
    merged_adapters: list[str]
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | None


@dataclass
class TunerModelStatus:
    """A model as a whole: as `TunerLayerStatus`, with "irregular" where its layers disagree.

    Attributes:
        base_model_type, adapter_model_type: class names.
        peft_types: adapter name -> method, such as "LORA".
        trainable_params, total_params: counts of numbers, not of tensors.
        num_adapter_layers: how many layers have adapters.
    """

    base_model_type: str
    adapter_model_type: str
    peft_types: dict[str, str]
    trainable_params: int
    total_params: int
    num_adapter_layers: int
    enabled: bool | Irregular
    active_adapters: list[str] | Irregular
    merged_adapters: list[str] | Irregular
    requires_grad: dict[str, bool | Irregular]
    available_adapters: list[str]
    devices: dict[str, list[str]]
    quantization_backend: str | Irregular | None


def get_layer_status(model: nn.Module) -> list[TunerLayerStatus]:
    """The status of each adapter layer of a `PeftModel` or of a model with adapters injected.

    Raises:
        ValueError: the model has no adapter layers.
    """
    from pylora.model.peft_model import PeftModel

    root = model.base_model if isinstance(model, PeftModel) else model
    statuses = [_layer_status(*_layer_of(site.name, site.module)) for site in adapter_sites(root)]
    if not statuses:
        raise ValueError(
            "No adapter layers found in the model, please ensure that it's a PEFT model or that you have PEFT adapters "
            "injected in the model."
        )
    return statuses


def _layer_of(name: str, module: Any) -> tuple[str, Any]:
    """The module with the adapters at a site: a wrapper of token rows has them in a layer inside."""
    inner = module._modules.get("token_adapter")
    return (name, module) if inner is None else (f"{name}.token_adapter", inner)


def _layer_status(name: str, layer: Any) -> TunerLayerStatus:
    flags: dict[str, list[bool]] = {}
    devices: dict[str, set[str]] = {}
    for attribute in (*layer.adapter_layer_names, *layer.other_param_names):
        container = getattr(layer, attribute)
        if not isinstance(container, (nn.ModuleDict, nn.ParameterDict, BufferDict)):
            continue
        for adapter, held in container.items():
            parameters = list(held.parameters()) if isinstance(held, nn.Module) else [held]
            devices.setdefault(adapter, set()).update(p.device.type for p in parameters)
            if attribute in layer.adapter_layer_names and parameters:
                flags.setdefault(adapter, []).extend(p.requires_grad for p in parameters)
    backend = getattr(layer, "quantization_backend", None)
    return TunerLayerStatus(
        name=name,
        module_type=repr(layer).partition("(")[0],
        enabled=not layer.disable_adapters,
        active_adapters=layer.active_adapters,
        merged_adapters=layer.merged_adapters,
        requires_grad={adapter: _common(values) for adapter, values in flags.items()},
        available_adapters=sorted(layer._get_available_adapters()),
        devices={adapter: sorted(types) for adapter, types in devices.items()},
        quantization_backend=None if backend is None else backend.backend_name,
    )


def get_model_status(model: nn.Module) -> TunerModelStatus:
    """The status of a `PeftModel` or of a model with adapters injected.

    Raises:
        ValueError: the model has no adapter layers.
    """
    from pylora.model.peft_model import PeftModel

    layers = get_layer_status(model)
    wrapped = model if isinstance(model, PeftModel) else None
    trainable, total = count_parameters(model)
    adapters = {adapter for layer in layers for adapter in layer.requires_grad}
    devices: dict[str, set[str]] = {}
    for layer in layers:
        for adapter, types in layer.devices.items():
            devices.setdefault(adapter, set()).update(types)
    return TunerModelStatus(
        base_model_type=_base_type(model),
        adapter_model_type="None" if wrapped is None else type(wrapped.base_model).__name__,
        peft_types={}
        if wrapped is None
        else {name: _type_name(c.peft_type) for name, c in wrapped.peft_config.items()},
        trainable_params=trainable,
        total_params=total,
        num_adapter_layers=len(layers),
        enabled=_common(layer.enabled for layer in layers),
        active_adapters=_common(layer.active_adapters for layer in layers),
        merged_adapters=_merged(layers),
        requires_grad={
            adapter: _common(layer.requires_grad[adapter] for layer in layers if adapter in layer.requires_grad)
            for adapter in adapters
        },
        available_adapters=sorted({adapter for layer in layers for adapter in layer.available_adapters}),
        devices={adapter: sorted(types) for adapter, types in devices.items()},
        quantization_backend=_common(layer.quantization_backend for layer in layers),
    )


def adapters_enabled(model: nn.Module) -> bool | Irregular:
    """Whether the adapter layers of `model` are enabled; True for a model without any."""
    layers = (_layer_of(site.name, site.module)[1] for site in adapter_sites(model))
    return _common((not layer.disable_adapters for layer in layers), default=True)


def _common(values: Iterable[T], default: Any = None) -> Any:
    """The value that all have, or "irregular"."""
    found = list(values)
    if not found:
        return default
    return found[0] if all(value == found[0] for value in found) else "irregular"


def _merged(layers: list[TunerLayerStatus]) -> list[str] | Irregular:
    """Adapters merged on every layer that has them; layers need not all have the same adapters."""
    merged = {adapter for layer in layers for adapter in layer.merged_adapters}
    for layer in layers:
        if merged & (set(layer.available_adapters) - set(layer.merged_adapters)):
            return "irregular"
    return sorted(merged)


def _base_type(model: nn.Module) -> str:
    from pylora.model.peft_model import PeftModel

    if isinstance(model, PeftModel):
        return type(model.get_base_model()).__name__
    # A class of transformers is told by its module, so that transformers need not be imported to ask.
    is_transformers = any(base.__name__ == "PreTrainedModel" for base in type(model).__mro__)
    return type(model).__name__ if is_transformers else "other"


def _type_name(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type))
