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

if TYPE_CHECKING:  # the same table for type checkers, which cannot read the one above
    from pylora.checkpoint import get_peft_model_state_dict as get_peft_model_state_dict
    from pylora.checkpoint import load_peft_weights as load_peft_weights
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
    from pylora.model.mapping import get_peft_model as get_peft_model
    from pylora.model.peft_model import PeftModel as PeftModel


def __getattr__(name: str) -> Any:
    module = _MODULE_OF.get(name)
    if module is None:
        raise AttributeError(f"module 'pylora' has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
