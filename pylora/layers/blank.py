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
    _fill(module.__dict__, _TEMPLATES.get(cls, _OF_MODULE))
    return module


def become_blank(module: nn.Module) -> None:
    """`nn.Module.__init__(module)`, for constructors."""
    _fill(module.__dict__, _OF_MODULE)


def _fill(attributes: dict[str, Any], template: _Template) -> None:
    for key, make, value in template:
        attributes[key] = value if make is None else make()


def empty_linear(in_features: int, out_features: int, bias: bool) -> nn.Linear:
    """An `nn.Linear` with undefined weights: its constructor would initialise them, which is the scheme's work."""
    linear = blank(nn.Linear)
    attributes = linear.__dict__
    attributes["in_features"], attributes["out_features"] = in_features, out_features
    attributes["_parameters"].update(
        weight=nn.Parameter(torch.empty(out_features, in_features)),
        bias=nn.Parameter(torch.empty(out_features)) if bias else None,
    )
    return linear
