"""What targeting wants to know about a model, asked without importing the library the model comes from."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

from torch import nn


def config_value(model: Any, key: str) -> Any:
    """`model.config`'s entry `key`, be the config a dict or an object; None without a config or an entry."""
    config = getattr(model, "config", None)
    if isinstance(config, Mapping):
        return config.get(key)
    return getattr(config, key, None)


def is_tuner_layer(module: nn.Module) -> bool:
    """Whether `module` is a layer that adapters were already put into, pylora's or PEFT's."""
    return "base_layer" in module._modules and hasattr(type(module), "adapter_layer_names")


def is_pretrained_model(module: nn.Module) -> bool:
    """Whether `module` is a transformers `PreTrainedModel`."""
    return _is_instance_of_loaded(module, "transformers.modeling_utils", "PreTrainedModel")


def is_linear_like(module: nn.Module) -> bool:
    """Whether `module` is an `nn.Linear` or transformers' `Conv1D`, a linear layer with a transposed weight."""
    return isinstance(module, nn.Linear) or _is_instance_of_loaded(module, "transformers.pytorch_utils", "Conv1D")


def _is_instance_of_loaded(module: nn.Module, library_module: str, class_name: str) -> bool:
    # An instance can only exist once its class's module has been imported, so there is nothing to import here.
    cls = getattr(sys.modules.get(library_module), class_name, None)
    return isinstance(cls, type) and isinstance(module, cls)
