"""LoRA for PyTorch with its own kernels: PEFT's API, configuration keys and checkpoint files.

Names are imported when first used, so that `import pylora` costs next to nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pylora._version import __version__

_EXPORTS = {
    "pylora.checkpoint": (
        "get_base_model_state_dict",
        "get_peft_model_state_dict",
        "load_peft_weights",
        "set_base_model_state_dict",
        "set_peft_model_state_dict",
    ),
    "pylora.config": (
        "LoftQConfig",
        "LoraConfig",
        "LoraRuntimeConfig",
        "PeftConfig",
        "PeftType",
        "TaskType",
    ),
    "pylora.errors": (
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftWarning",
        "PyloraBuildError",
        "UnsupportedFeatureError",
    ),
    "pylora.model.lora_model": ("LoraModel",),
    "pylora.model.mapping": (
        "get_peft_config",
        "get_peft_model",
        "inject_adapter_in_model",
    ),
    "pylora.model.peft_model": ("PeftModel",),
    "pylora.model.status": (
        "TunerLayerStatus",
        "TunerModelStatus",
        "get_layer_status",
        "get_model_status",
    ),
    "pylora.model.task_models": (
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same table for type checkers, which cannot read the one above
    from pylora.checkpoint import get_base_model_state_dict as get_base_model_state_dict
    from pylora.checkpoint import get_peft_model_state_dict as get_peft_model_state_dict
    from pylora.checkpoint import load_peft_weights as load_peft_weights
    from pylora.checkpoint import set_base_model_state_dict as set_base_model_state_dict
    from pylora.checkpoint import set_peft_model_state_dict as set_peft_model_state_dict
    from pylora.config import LoftQConfig as LoftQConfig
    from pylora.config import LoraConfig as LoraConfig
    from pylora.config import LoraRuntimeConfig as LoraRuntimeConfig
    from pylora.config import PeftConfig as PeftConfig
    from pylora.config import PeftType as PeftType
    from pylora.config import TaskType as TaskType
    from pylora.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from pylora.errors import PeftError as PeftError
    from pylora.errors import PeftWarning as PeftWarning
    from pylora.errors import PyloraBuildError as PyloraBuildError
    from pylora.errors import UnsupportedFeatureError as UnsupportedFeatureError
    from pylora.model.lora_model import LoraModel as LoraModel
    from pylora.model.mapping import get_peft_config as get_peft_config
    from pylora.model.mapping import get_peft_model as get_peft_model
    from pylora.model.mapping import inject_adapter_in_model as inject_adapter_in_model
    from pylora.model.peft_model import PeftModel as PeftModel
    from pylora.model.status import TunerLayerStatus as TunerLayerStatus
    from pylora.model.status import TunerModelStatus as TunerModelStatus
    from pylora.model.status import get_layer_status as get_layer_status
    from pylora.model.status import get_model_status as get_model_status
    from pylora.model.task_models import PeftModelForCausalLM as PeftModelForCausalLM
    from pylora.model.task_models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from pylora.model.task_models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from pylora.model.task_models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from pylora.model.task_models import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from pylora.model.task_models import PeftModelForTokenClassification as PeftModelForTokenClassification


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'pylora' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
