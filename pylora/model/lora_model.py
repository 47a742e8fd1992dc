"""LoraModel: the tuner for LoRA."""

from __future__ import annotations

from typing import Any, ClassVar

from pylora.layers import LoraLayer
from pylora.model.base_tuner import BaseTuner
from pylora.targeting.defaults import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


class LoraModel(BaseTuner):
    """A model with LoRA adapters (https://arxiv.org/abs/2106.09685). See `BaseTuner` for arguments and attributes.

    Example:
        >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"])
        >>> lora_model = LoraModel(model, config, "default")
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping: ClassVar[dict[str, Any]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")
