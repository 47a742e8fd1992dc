"""BufferDict as a dictionary, and as a module whose tensors are buffers."""

import pytest
import torch

from pylora.tuners._buffer_dict import BufferDict


@pytest.mark.parametrize("as_what", [BufferDict, dict, lambda d: d.items()])
def test_update_takes_dictionaries_and_pairs(as_what):
    first, second = torch.randn(3), torch.randn(2)
    buffers = BufferDict({"a": first})
    buffers.update(as_what({"b": second}))
    assert list(buffers) == list(buffers.keys()) == ["a", "b"]
    assert torch.equal(buffers["a"], first)
    assert torch.equal(dict(buffers.items())["b"], second)


def test_a_dictionary_s_ways():
    buffers = BufferDict({"a": torch.ones(1), "b": torch.zeros(1)})
    assert len(buffers) == 2
    assert "a" in buffers
    assert buffers.pop("a").item() == 1.0
    del buffers["b"]
    assert len(buffers) == 0
    for missing in (lambda: buffers["a"], lambda: buffers.pop("a")):
        with pytest.raises(KeyError, match="a"):
            missing()
    buffers["c"] = torch.ones(2)
    buffers.clear()
    assert not list(buffers.values())


@pytest.mark.parametrize("persistent", [False, True])
def test_buffers_move_and_are_saved_if_asked(persistent):
    buffers = BufferDict({"a": torch.ones(2)}, persistent=persistent).to(torch.float64)
    assert buffers["a"].dtype is torch.float64
    assert not list(buffers.parameters())
    assert set(buffers.state_dict()) == ({"a"} if persistent else set())
