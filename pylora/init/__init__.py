"""Initialisation of adapters: tensors in, filled in place."""

from pylora.init import basic  # noqa: F401 (registers its schemes)
from pylora.init.registry import Factors, InitScheme, find_init, init_adapter, register_init

__all__ = ["Factors", "InitScheme", "find_init", "init_adapter", "register_init"]
