"""Modules whose weights have no memory."""

import pytest
import torch
from torch import nn

from pylora.integrations.empty_weights import init_empty_weights, skip_init_on_device


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 2, bias=False)
        self.frozen = nn.Parameter(torch.ones(2), requires_grad=False)
        self.norm = nn.BatchNorm1d(2)


def places(module):
    return {p.device.type for p in module.parameters()}, {b.device.type for b in module.buffers()}


@pytest.mark.parametrize(("include_buffers", "buffers"), [(None, "cpu"), (False, "cpu"), (True, "meta")])
def test_parameters_are_on_meta_and_buffers_if_asked(include_buffers, buffers):
    with init_empty_weights(include_buffers):
        net = Net()
    assert places(net) == ({"meta"}, {buffers})
    assert [p.requires_grad for p in net.parameters()] == [False, True, True, True]
    assert places(Net()) == ({"cpu"}, {"cpu"})


@pytest.mark.parametrize("include_buffers", [False, True])
def test_a_decorated_function_makes_real_parameters(include_buffers):
    @skip_init_on_device
    def outer():
        return skip_init_on_device(Net)(), Net()

    with init_empty_weights(include_buffers):
        nets = outer()
        after = Net()
    assert [places(net) for net in nets] == [({"cpu"}, {"cpu"})] * 2
    assert places(after)[0] == {"meta"}
    assert places(outer()[1]) == ({"cpu"}, {"cpu"})


def test_an_error_ends_it():
    def failing():
        with init_empty_weights():
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        failing()
    assert places(Net()) == ({"cpu"}, {"cpu"})
