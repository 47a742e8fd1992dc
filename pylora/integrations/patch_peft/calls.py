"""Calls of a PeftModel without arguments for adapters: they need none of the context managers around them (20 us)."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from pylora.integrations.patch_peft.replacements import Replacements

_ADAPTER_ARGUMENTS = ("adapter_names", "alora_offsets")
_NOTHING = nullcontext()


def patch_calls(changes: Replacements, peft_model: Any, model: Any) -> None:
    """Shorten the way of a call to the base model.

    Args:
        changes: Records what is replaced.
        peft_model: peft.peft_model.
        model: peft.tuners.lora.model.
    """
    changes.wrap(peft_model.PeftModel, "_enable_peft_forward_hooks", lambda original: _hooks(original, model.LoraModel))


def _hooks(original: Callable[..., AbstractContextManager[None]], lora: Any) -> Callable[..., Any]:
    around = lora._enable_peft_forward_hooks

    def enable_peft_forward_hooks(self: Any, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        tuner = self._modules.get("base_model")
        is_plain = type(tuner) is lora and lora._enable_peft_forward_hooks is around
        if is_plain and all(kwargs.get(name) is None for name in _ADAPTER_ARGUMENTS):
            return _NOTHING
        return original(self, *args, **kwargs)

    return enable_peft_forward_hooks
