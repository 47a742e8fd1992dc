"""Signatures for tools that look at them: `forward` and `generate` of a wrapper described as the base model's."""

from __future__ import annotations

import functools
import inspect
from types import FunctionType, MethodType
from typing import Any

from pylora.config import PeftConfig

_COPIED_ATTRIBUTES = ("__doc__", "__name__", "__annotations__")


def update_forward_signature(model: Any) -> None:
    """Give `model.forward` the documentation and signature of the base model's, if its own says only `*args, **kwargs`.

    Args:
        model: a `PeftModel`. The method is set on this object; its class stays as it is.
    """
    if set(inspect.signature(model.forward).parameters) == {"args", "kwargs"}:
        _describe_as_base(model, "forward")


def update_generate_signature(model: Any) -> None:
    """The same for `generate`, whose own signature may also be `**kwargs` alone. No `generate`: nothing happens."""
    if not hasattr(model, "generate"):
        return
    if set(inspect.signature(model.generate).parameters) in ({"args", "kwargs"}, {"kwargs"}):
        _describe_as_base(model, "generate")


def update_signature(model: Any, method: str = "all") -> None:
    """Update the signature of "forward", of "generate", or of "all" two.

    Raises:
        ValueError: `method` is none of these.
    """
    if method not in ("forward", "generate", "all"):
        raise ValueError(f"method {method} is not supported: expected one of ['forward', 'generate', 'all']")
    if method in ("forward", "all"):
        update_forward_signature(model)
    if method in ("generate", "all"):
        update_generate_signature(model)


def check_if_peft_model(model_name_or_path: str) -> bool:
    """Whether a folder or a repository of the hub holds an adapter: whether its configuration can be read."""
    try:
        PeftConfig.from_pretrained(model_name_or_path)
    except Exception:  # the hub client has many ways to say that there is no such file
        return False
    return True


def _describe_as_base(model: Any, method: str) -> None:
    own = getattr(model, method).__func__
    described = FunctionType(own.__code__, own.__globals__, own.__name__, own.__defaults__, own.__closure__)
    described.__kwdefaults__ = own.__kwdefaults__
    base_method = getattr(type(model.get_base_model()), method)
    functools.update_wrapper(described, base_method, assigned=_COPIED_ATTRIBUTES)
    setattr(model, method, MethodType(described, model))
