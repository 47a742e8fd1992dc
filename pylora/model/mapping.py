"""From a model and a configuration to an adapted model."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from pylora.checkpoint.keys import checked_adapter_name
from pylora.config import PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig, PeftType
from pylora.errors import UnsupportedFeatureError
from pylora.model.base_tuner import BaseTuner
from pylora.model.lora_model import LoraModel
from pylora.model.peft_model import PeftModel, require_lora, warn_if_name_in_prefix
from pylora.model.task_models import peft_model_class
from pylora.model.trainable import has_tuner_layers

# PEFT's tables of its methods, for code that looks a tuner or a prefix up by the type of a configuration.
PEFT_TYPE_TO_TUNER_MAPPING: dict[PeftType, type[BaseTuner]] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_MIXED_MODEL_MAPPING: dict[PeftType, type[BaseTuner]] = {PeftType.LORA: LoraModel}
PEFT_TYPE_TO_PREFIX_MAPPING: dict[PeftType, str] = {PeftType.LORA: LoraModel.prefix}


def get_peft_model(
    model: nn.Module,
    peft_config: PeftConfig,
    adapter_name: str = "default",
    mixed: bool = False,
    autocast_adapter_dtype: bool = True,
    revision: str | None = None,
    low_cpu_mem_usage: bool = False,
) -> PeftModel:
    """Wraps a model for LoRA training; the model is changed in place.

    Args:
        model: the base model, of transformers or any `nn.Module`.
        peft_config: a `LoraConfig`. Its `task_type` chooses the class of the result, and its
            `base_model_name_or_path` is set to the model's.
        adapter_name: name of the adapter.
        mixed: adapters of several methods at once; pylora is LoRA, so only False.
        autocast_adapter_dtype: keep adapter weights in f32 where the base layer is f16, bf16 or float8.
        revision: the base model's revision, stored in the configuration.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by a load.

    Returns:
        a `PeftModel`, or its subclass for the task.

    Raises:
        ValueError: a configuration of another method, an adapter name that is not a plain name, targets that are not in
            the model, or a field that pylora has no mechanism for. The model and the configuration are then unchanged.
    """
    checked_adapter_name(adapter_name)
    require_lora(peft_config)
    if mixed:
        raise UnsupportedFeatureError("mixed: expected False: pylora has no adapters of other methods to mix with")
    before = dict(peft_config.__dict__)
    old_name = peft_config.base_model_name_or_path
    new_name = model.__dict__.get("name_or_path") or None
    if has_tuner_layers(model):
        warnings.warn(
            "You are trying to modify a model with PEFT for a second time. If you want to reload the model with a "
            "different config, make sure to call `.unload()` before.",
            stacklevel=2,
        )
    if old_name is not None and old_name != new_name:
        warnings.warn(
            f"The PEFT config's `base_model_name_or_path` was renamed from '{old_name}' to '{new_name}'. "
            "Please ensure that the correct base model is loaded when loading this checkpoint.",
            stacklevel=2,
        )
    if revision is not None and peft_config.revision not in (None, revision):
        warnings.warn(
            f"peft config has already set base model revision to {peft_config.revision}, "
            f"overwriting with revision {revision}",
            stacklevel=2,
        )
    warn_if_name_in_prefix(adapter_name)
    try:
        peft_config.base_model_name_or_path = new_name
        if revision is not None:
            peft_config.revision = revision
        return peft_model_class(peft_config)(
            model,
            peft_config,
            adapter_name=adapter_name,
            autocast_adapter_dtype=autocast_adapter_dtype,
            low_cpu_mem_usage=low_cpu_mem_usage,
        )
    except BaseException:
        peft_config.__dict__.update(before)
        raise


def inject_adapter_in_model(
    peft_config: PeftConfig,
    model: nn.Module,
    adapter_name: str = "default",
    low_cpu_mem_usage: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
) -> nn.Module:
    """Puts adapter layers into a model and returns that model, not wrapped.

    Args:
        peft_config: a `LoraConfig`.
        model: the model; it is changed in place.
        adapter_name: name of the adapter.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by `set_peft_model_state_dict`.
        state_dict: a checkpoint whose keys, rather than the configuration, say which modules are adapted. Its tensors
            are not loaded.

    Raises:
        ValueError: a configuration of another method.
    """
    checked_adapter_name(adapter_name)
    require_lora(peft_config)
    tensors = None if state_dict is None else dict(state_dict)
    tuner = LoraModel(model, peft_config, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=tensors)
    return tuner.model


def get_peft_config(config_dict: dict[str, Any]) -> PeftConfig:
    """The configuration object for a dictionary with a `peft_type` and that class's fields.

    Raises:
        KeyError: no `peft_type`, or an unknown one.
    """
    return PEFT_TYPE_TO_CONFIG_MAPPING[config_dict["peft_type"]](**config_dict)
