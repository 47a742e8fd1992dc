"""Adapters on disk and as dictionaries of tensors, in PEFT's format."""

from pylora.checkpoint.base_state import get_base_model_state_dict, set_base_model_state_dict
from pylora.checkpoint.extract import get_peft_model_state_dict
from pylora.checkpoint.keys import AdapterNameError
from pylora.checkpoint.load import set_peft_model_state_dict
from pylora.checkpoint.read import load_peft_weights

__all__ = [
    "AdapterNameError",
    "get_base_model_state_dict",
    "get_peft_model_state_dict",
    "load_peft_weights",
    "set_base_model_state_dict",
    "set_peft_model_state_dict",
]
