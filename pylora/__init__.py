"""LoRA for PyTorch with its own kernels: PEFT's API, configuration keys and checkpoint files.

Names are imported when first used, so that `import pylora` costs next to nothing beyond torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pylora._version import __version__

_EXPORTS = {
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
    "pylora.model.peft_model": ("PeftModel",),
    "pylora.model.mapping": ("get_peft_model",),
    "pylora.checkpoint": ("get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"),
}
_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from pylora.checkpoint import get_peft_model_state_dict, load_peft_weights, set_peft_model_state_dict
    from pylora.config import LoftQConfig, LoraConfig, LoraRuntimeConfig, PeftConfig, PeftType, TaskType
    from pylora.errors import (
        NoMatchingPeftModuleError,
        PeftError,
        PeftWarning,
        PyloraBuildError,
        UnsupportedFeatureError,
    )
    from pylora.model.lora_model import LoraModel
    from pylora.model.mapping import get_peft_model
    from pylora.model.peft_model import PeftModel


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'pylora' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
