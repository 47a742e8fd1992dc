"""Building modules without memory for their weights, by the names of accelerate and PEFT."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook

F = TypeVar("F", bound=Callable[..., Any])

_skipping: ContextVar[bool] = ContextVar("skipping", default=False)


@contextmanager
def init_empty_weights(include_buffers: bool | None = None) -> Iterator[None]:
    """Inside, the parameters of new modules are on the meta device.

    Args:
        include_buffers: whether buffers are as well, and every other tensor that is made.
    """
    if include_buffers:
        with torch.device("meta"):
            yield
        return
    hook: Any = _to_meta  # torch's annotation leaves out that a hook may return the parameter to register
    handle = register_module_parameter_registration_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def skip_init_on_device(func: F) -> F:
    """Decorates a function that makes modules: its parameters are real even inside `init_empty_weights`."""

    @functools.wraps(func)
    def real(*args: Any, **kwargs: Any) -> Any:
        token = _skipping.set(True)
        try:
            if torch.get_default_device().type != "meta":
                return func(*args, **kwargs)
            with torch.device("cpu"):
                return func(*args, **kwargs)
        finally:
            _skipping.reset(token)

    return real  # type: ignore[return-value]


def _to_meta(module: nn.Module, name: str, param: nn.Parameter | None) -> nn.Parameter | None:
    if param is None or _skipping.get():
        return None
    return nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
