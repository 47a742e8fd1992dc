"""Adapters on disk and as dictionaries of tensors, in PEFT's format."""

from pylora.checkpoint.extract import get_peft_model_state_dict
from pylora.checkpoint.keys import AdapterNameError
from pylora.checkpoint.load import load_peft_weights, set_peft_model_state_dict

__all__ = ["AdapterNameError", "get_peft_model_state_dict", "load_peft_weights", "set_peft_model_state_dict"]
