"""LoRA for PyTorch with its own kernels: PEFT's API, configuration keys and checkpoint files.

Names are imported when first used, so that `import pylora` costs next to nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pylora import _peft_paths
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
        "PEFT_TYPE_TO_CONFIG_MAPPING",
        "ArrowConfig",
        "BdLoraConfig",
        "CordaConfig",
        "EvaConfig",
        "KasaConfig",
        "LoftQConfig",
        "LoraConfig",
        "LoraGAConfig",
        "LoraRuntimeConfig",
        "MontecloraConfig",
        "PeftConfig",
        "PeftType",
        "TaskType",
        "VeloraConfig",
    ),
    "pylora.config.later": (
        "create_arrow_model",
        "get_eva_state_dict",
        "initialize_lora_eva_weights",
        "preprocess_loraga",
        "replace_lora_weights_loftq",
    ),
    "pylora.errors": (
        "NoMatchingPeftModuleError",
        "PeftError",
        "PeftWarning",
        "PyloraBuildError",
        "UnsupportedFeatureError",
    ),
    "pylora.integrations.patch_peft": ("patch_peft", "unpatch_peft"),
    "pylora.model.auto": (
        "AutoPeftModel",
        "AutoPeftModelForCausalLM",
        "AutoPeftModelForFeatureExtraction",
        "AutoPeftModelForQuestionAnswering",
        "AutoPeftModelForSeq2SeqLM",
        "AutoPeftModelForSequenceClassification",
        "AutoPeftModelForTokenClassification",
    ),
    "pylora.layers.undo": ("merge_log_bytes",),
    "pylora.layers.variants.dora_cache": ("DoraCaching", "invalidate"),
    "pylora.model.conversion": ("convert_to_lora", "save_as_lora"),
    "pylora.model.lora_model": ("LoraModel",),
    "pylora.model.mapping": (
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING",
        "PEFT_TYPE_TO_TUNER_MAPPING",
        "get_peft_config",
        "get_peft_model",
        "inject_adapter_in_model",
    ),
    "pylora.model.mixed_batch": ("mixed_training",),
    "pylora.model.peft_model": ("PeftModel",),
    "pylora.model.preparation": (
        "cast_mixed_precision_params",
        "prepare_model_for_kbit_training",
    ),
    "pylora.model.status": (
        "TunerLayerStatus",
        "TunerModelStatus",
        "get_layer_status",
        "get_model_status",
    ),
    "pylora.model.task_models": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING",
        "PeftModelForCausalLM",
        "PeftModelForFeatureExtraction",
        "PeftModelForQuestionAnswering",
        "PeftModelForSeq2SeqLM",
        "PeftModelForSequenceClassification",
        "PeftModelForTokenClassification",
    ),
    "pylora.model.tensors": (
        "bloom_model_postprocess_past_key_value",
        "shift_tokens_right",
    ),
    "pylora.targeting.kappa": ("find_kappa_target_modules",),
}
# Real modules, the first two PEFT's too, reached as attributes without an import of their own.
_SUBMODULES = ("config", "optimizers", "serving")
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:  # the same table for type checkers, which cannot read the one above
    from pylora.checkpoint import get_base_model_state_dict as get_base_model_state_dict
    from pylora.checkpoint import get_peft_model_state_dict as get_peft_model_state_dict
    from pylora.checkpoint import load_peft_weights as load_peft_weights
    from pylora.checkpoint import set_base_model_state_dict as set_base_model_state_dict
    from pylora.checkpoint import set_peft_model_state_dict as set_peft_model_state_dict
    from pylora.config import PEFT_TYPE_TO_CONFIG_MAPPING as PEFT_TYPE_TO_CONFIG_MAPPING
    from pylora.config import ArrowConfig as ArrowConfig
    from pylora.config import BdLoraConfig as BdLoraConfig
    from pylora.config import CordaConfig as CordaConfig
    from pylora.config import EvaConfig as EvaConfig
    from pylora.config import KasaConfig as KasaConfig
    from pylora.config import LoftQConfig as LoftQConfig
    from pylora.config import LoraConfig as LoraConfig
    from pylora.config import LoraGAConfig as LoraGAConfig
    from pylora.config import LoraRuntimeConfig as LoraRuntimeConfig
    from pylora.config import MontecloraConfig as MontecloraConfig
    from pylora.config import PeftConfig as PeftConfig
    from pylora.config import PeftType as PeftType
    from pylora.config import TaskType as TaskType
    from pylora.config import VeloraConfig as VeloraConfig
    from pylora.config.later import create_arrow_model as create_arrow_model
    from pylora.config.later import get_eva_state_dict as get_eva_state_dict
    from pylora.config.later import initialize_lora_eva_weights as initialize_lora_eva_weights
    from pylora.config.later import preprocess_loraga as preprocess_loraga
    from pylora.config.later import replace_lora_weights_loftq as replace_lora_weights_loftq
    from pylora.errors import NoMatchingPeftModuleError as NoMatchingPeftModuleError
    from pylora.errors import PeftError as PeftError
    from pylora.errors import PeftWarning as PeftWarning
    from pylora.errors import PyloraBuildError as PyloraBuildError
    from pylora.errors import UnsupportedFeatureError as UnsupportedFeatureError
    from pylora.integrations.patch_peft import patch_peft as patch_peft
    from pylora.integrations.patch_peft import unpatch_peft as unpatch_peft
    from pylora.layers.undo import merge_log_bytes as merge_log_bytes
    from pylora.layers.variants.dora_cache import DoraCaching as DoraCaching
    from pylora.layers.variants.dora_cache import invalidate as invalidate
    from pylora.model.auto import AutoPeftModel as AutoPeftModel
    from pylora.model.auto import AutoPeftModelForCausalLM as AutoPeftModelForCausalLM
    from pylora.model.auto import AutoPeftModelForFeatureExtraction as AutoPeftModelForFeatureExtraction
    from pylora.model.auto import AutoPeftModelForQuestionAnswering as AutoPeftModelForQuestionAnswering
    from pylora.model.auto import AutoPeftModelForSeq2SeqLM as AutoPeftModelForSeq2SeqLM
    from pylora.model.auto import AutoPeftModelForSequenceClassification as AutoPeftModelForSequenceClassification
    from pylora.model.auto import AutoPeftModelForTokenClassification as AutoPeftModelForTokenClassification
    from pylora.model.conversion import convert_to_lora as convert_to_lora
    from pylora.model.conversion import save_as_lora as save_as_lora
    from pylora.model.lora_model import LoraModel as LoraModel
    from pylora.model.mapping import PEFT_TYPE_TO_MIXED_MODEL_MAPPING as PEFT_TYPE_TO_MIXED_MODEL_MAPPING
    from pylora.model.mapping import PEFT_TYPE_TO_TUNER_MAPPING as PEFT_TYPE_TO_TUNER_MAPPING
    from pylora.model.mapping import get_peft_config as get_peft_config
    from pylora.model.mapping import get_peft_model as get_peft_model
    from pylora.model.mapping import inject_adapter_in_model as inject_adapter_in_model
    from pylora.model.mixed_batch import mixed_training as mixed_training
    from pylora.model.peft_model import PeftModel as PeftModel
    from pylora.model.preparation import cast_mixed_precision_params as cast_mixed_precision_params
    from pylora.model.preparation import prepare_model_for_kbit_training as prepare_model_for_kbit_training
    from pylora.model.status import TunerLayerStatus as TunerLayerStatus
    from pylora.model.status import TunerModelStatus as TunerModelStatus
    from pylora.model.status import get_layer_status as get_layer_status
    from pylora.model.status import get_model_status as get_model_status
    from pylora.model.task_models import MODEL_TYPE_TO_PEFT_MODEL_MAPPING as MODEL_TYPE_TO_PEFT_MODEL_MAPPING
    from pylora.model.task_models import PeftModelForCausalLM as PeftModelForCausalLM
    from pylora.model.task_models import PeftModelForFeatureExtraction as PeftModelForFeatureExtraction
    from pylora.model.task_models import PeftModelForQuestionAnswering as PeftModelForQuestionAnswering
    from pylora.model.task_models import PeftModelForSeq2SeqLM as PeftModelForSeq2SeqLM
    from pylora.model.task_models import PeftModelForSequenceClassification as PeftModelForSequenceClassification
    from pylora.model.task_models import PeftModelForTokenClassification as PeftModelForTokenClassification
    from pylora.model.tensors import bloom_model_postprocess_past_key_value as bloom_model_postprocess_past_key_value
    from pylora.model.tensors import shift_tokens_right as shift_tokens_right
    from pylora.targeting.kappa import find_kappa_target_modules as find_kappa_target_modules

_peft_paths.install()


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is not None:
        value = getattr(importlib.import_module(module), name)
    elif name in _SUBMODULES or name in _peft_paths.PATHS:
        value = importlib.import_module(f"pylora.{name}")
    elif _peft_paths.belongs_to_other_method(name):
        raise _peft_paths.refuse_other_method("pylora", name)
    else:
        raise AttributeError(f"module 'pylora' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
