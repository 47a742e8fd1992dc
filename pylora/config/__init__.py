"""Adapter configurations: LoraConfig, its sub-configurations, and their file. Nothing here imports torch."""

from pylora.config.base import CONFIG_NAME, PEFT_TYPE_TO_CONFIG_MAPPING, PeftConfig
from pylora.config.enums import PeftType, TaskType
from pylora.config.lora_config import LoraConfig
from pylora.config.patterns import get_pattern_key, pattern_value
from pylora.config.scaling import scaling_for
from pylora.config.sub_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)
from pylora.config.support import require_supported

__all__ = [
    "CONFIG_NAME",
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
    "get_pattern_key",
    "pattern_value",
    "require_supported",
    "scaling_for",
]
