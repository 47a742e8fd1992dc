"""Modules made without their constructors are what the constructors make."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pylora.layers.blank import blank, empty_linear


@pytest.mark.parametrize("cls", [nn.ModuleDict, nn.ParameterDict, nn.Identity, nn.Module])
def test_as_the_constructor_leaves_it(cls: type[nn.Module]) -> None:
    made, one, other = cls(), blank(cls), blank(cls)
    assert type(one) is cls
    assert one.__dict__ == made.__dict__
    assert list(one.__dict__) == list(made.__dict__)
    assert [type(value) for value in one.__dict__.values()] == [type(value) for value in made.__dict__.values()]
    shared = [key for key, value in one.__dict__.items() if hasattr(value, "clear") and value is other.__dict__[key]]
    assert shared == []


@pytest.mark.parametrize("bias", [True, False])
def test_an_empty_linear_is_a_linear(bias: bool) -> None:
    made, empty = nn.Linear(3, 5, bias=bias), empty_linear(3, 5, bias)
    assert type(empty) is nn.Linear
    assert repr(empty) == repr(made)
    assert empty.__dict__.keys() == made.__dict__.keys()
    assert [(k, p.shape, p.dtype, p.requires_grad) for k, p in empty.named_parameters()] == [
        (k, p.shape, p.dtype, p.requires_grad) for k, p in made.named_parameters()
    ]
    empty.load_state_dict(made.state_dict())
    x = torch.randn(2, 3)
    assert torch.equal(empty(x), made(x))


def test_an_empty_linear_draws_nothing_and_obeys_the_device_context() -> None:
    state = torch.get_rng_state()
    with torch.device("meta"):
        assert empty_linear(3, 5, bias=True).weight.is_meta
    assert not empty_linear(3, 5, bias=True).weight.is_meta
    assert torch.equal(torch.get_rng_state(), state)
