"""Modules without the cost of their constructors, of which a layer has nine and a model thousands."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import nn

M = TypeVar("M", bound=nn.Module)
_CONTAINERS = (dict, set, list)
_Template = list[tuple[str, Any, Any]]


def _template(module: nn.Module) -> _Template:
    """(attribute, type of the empty container to make or None, value) as this torch's constructor left them."""
    return [(key, type(v) if isinstance(v, _CONTAINERS) else None, v) for key, v in module.__dict__.items()]


_OF_MODULE = _template(nn.Module())
# Containers and modules whose constructors, without arguments, leave nothing but empty containers and constants.
_TEMPLATES: dict[type[nn.Module], _Template] = {
    cls: _template(cls()) for cls in (nn.ModuleDict, nn.ParameterDict, nn.Identity)
}


def blank(cls: type[M]) -> M:
    """`cls()` for ModuleDict, ParameterDict and Identity; of any other module what `nn.Module.__init__` makes of it.

    That constructor takes 9 us, most of it for setting 17 attributes one by one.
    """
    module = cls.__new__(cls)
    attributes = module.__dict__
    for key, make, value in _TEMPLATES.get(cls, _OF_MODULE):
        attributes[key] = value if make is None else make()
    return module


def empty_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """An `nn.Linear` with undefined weights: its constructor would initialise them, which is the scheme's work."""
    linear = blank(nn.Linear)
    linear.__dict__.update(in_features=in_features, out_features=out_features)
    linear._parameters["weight"] = nn.Parameter(torch.empty(out_features, in_features))
    linear._parameters["bias"] = nn.Parameter(torch.empty(out_features)) if bias else None
    return linear
