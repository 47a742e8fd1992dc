"""What happens to adapters in a model: activate, freeze, cast, delete. Each function is one walk over the model."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from pylora.init import draws_left_out, only_draws
from pylora.layers import BaseTunerLayer, LoraLayer, tuner_layers, walk
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper

# Storage types too narrow to train in, as far as this torch has them.
_NARROW_NAMES = (
    "float16",
    "bfloat16",
    "float8_e4m3fn",
    "float8_e4m3fnuz",
    "float8_e5m2",
    "float8_e5m2fnuz",
    "float8_e8m0fnu",
)
_NARROW_DTYPES = frozenset(getattr(torch, name) for name in _NARROW_NAMES if hasattr(torch, name))


def auxiliary_wrappers(model: nn.Module) -> list[AuxiliaryTrainingWrapper]:
    """The modules_to_save wrappers of the model and their like."""
    return [visit.module for visit in walk(model) if isinstance(visit.module, AuxiliaryTrainingWrapper)]


def unmerge_before_switch(layer: BaseTunerLayer) -> None:
    """Unmerge a merged layer, with a warning: what is merged could not be told from what is active afterwards."""
    if layer.merged:
        warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
        layer.unmerge()


def set_adapter(
    model: nn.Module,
    adapter_name: str | list[str],
    inference_mode: bool = False,
    layer_cls: type[BaseTunerLayer] = BaseTunerLayer,
) -> None:
    """Make one or several adapters the active ones of the whole model; merged layers are unmerged, with a warning.

    Args:
        model: The model.
        adapter_name: The adapters to activate; a layer without one of them does without it.
        inference_mode: Activate them frozen; otherwise they become trainable. All others become frozen.
        layer_cls: Only layers of this class are touched.

    Raises:
        ValueError: A `modules_to_save` module would have several active adapters, or the list is empty while there is
            such a module. Nothing is changed then.
    """
    modules = [visit.module for visit in walk(model)]
    chosen = [(m, m.check_set_adapter(adapter_name)) for m in modules if isinstance(m, AuxiliaryTrainingWrapper)]
    layers = [module for module in modules if isinstance(module, layer_cls)]
    for layer in reversed(layers):  # layers may share a weight: the last merge goes first
        unmerge_before_switch(layer)
    for wrapper, name in chosen:
        active: str | list[str] = name if name is not None and name in wrapper._adapters else []
        wrapper.set_adapter(active, inference_mode=inference_mode)
    for layer in layers:
        layer.set_adapter(adapter_name, inference_mode=inference_mode)


def enable_adapters(model: nn.Module, enabled: bool) -> None:
    """Switch all adapters and `modules_to_save` copies of the model on or off."""
    for module in [visit.module for visit in walk(model)]:
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.enable_adapters(enabled)


def eval_mode(model: nn.Module) -> None:
    """As `model.eval()`, without a look at the insides of layers that are in evaluation mode already.

    An adapter's modules are made in their layer's mode and follow it, so that the cost does not grow with adapters.
    """
    for visit in walk(model):
        module = visit.module
        if not module.training:
            continue
        if isinstance(module, BaseTunerLayer) or type(module).train is not nn.Module.train:
            module.eval()
        else:
            module.training = False


def initialise_left_out(model: nn.Module, adapter_name: str, keys: Iterable[str], scheme: Any) -> None:
    """Initialise the adapter on the layers that these keys belong to: a load that left the draws out has none for them.

    Args:
        model: The model that the keys are relative to.
        adapter_name: The adapter.
        keys: State-dict keys that the checkpoint lacks.
        scheme: The adapter's `init_lora_weights`.
    """
    owners = {key[: key.rfind(".lora_")] for key in keys if ".lora_" in key}
    if not owners or not only_draws(scheme):
        return
    with draws_left_out(False):
        for visit in walk(model):
            if visit.name in owners and isinstance(visit.module, LoraLayer):
                visit.module.reset_lora_parameters(adapter_name, scheme)


def set_requires_grad(model: nn.Module, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
    """Make adapters trainable or frozen, active or not.

    Args:
        model: The model.
        adapter_names: One name or several.
        requires_grad: The new value of the flag.
    """
    for module in [visit.module for visit in walk(model)]:
        if isinstance(module, (BaseTunerLayer, AuxiliaryTrainingWrapper)):
            module.set_requires_grad(adapter_names, requires_grad=requires_grad)


def delete_adapter(
    model: nn.Module, adapter_name: str, prefix: str, layer_cls: type[BaseTunerLayer] = BaseTunerLayer
) -> list[str] | None:
    """Remove an adapter's weights from the model. The layers stay wrapped, also when it was the last one.

    Args:
        model: The model.
        adapter_name: The adapter to remove.
        prefix: The method's prefix; kept for callers of PEFT's function, layers are found by their class.
        layer_cls: Only layers of this class are touched.

    Returns:
        The names active from now on, None if the model has no such layer.
    """
    new_active: list[str] | None = None
    for layer in tuner_layers(model):
        if isinstance(layer, layer_cls):
            layer.delete_adapter(adapter_name)
            if new_active is None:
                new_active = list(layer.active_adapters)
    for wrapper in auxiliary_wrappers(model):
        wrapper.delete_adapter(adapter_name, new_active_adapters=new_active)
    return new_active


def check_not_merged(model: nn.Module, adapter_name: str) -> None:
    """Raise ValueError if the adapter is merged somewhere: deleting it would leave its delta there for good."""
    if any(adapter_name in layer.merged_adapters for layer in tuner_layers(model)):
        raise ValueError(f"Cannot delete adapter(s) {[adapter_name]} while they are merged. Please unmerge them first.")


def cast_adapter_dtype(model: nn.Module, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
    """Turn an adapter's f16, bf16 and f8 weights into f32 ones. They become new parameters.

    Args:
        model: The model.
        adapter_name: The adapter.
        autocast_adapter_dtype: False: do nothing.
    """
    if not autocast_adapter_dtype:
        return
    for layer in tuner_layers(model):
        for _, container, item in layer._adapter_entries(adapter_name):
            if isinstance(item, torch.Tensor):
                if item.dtype in _NARROW_DTYPES:
                    container[adapter_name] = _as_float32(item)
                continue
            for module in item.modules() if item._modules else (item,):
                for name, param in module._parameters.items():
                    if param is not None and param.dtype in _NARROW_DTYPES:
                        module._parameters[name] = _as_float32(param)


def _as_float32(param: torch.Tensor) -> nn.Parameter:
    return nn.Parameter(param.detach().to(torch.float32), requires_grad=param.requires_grad)
