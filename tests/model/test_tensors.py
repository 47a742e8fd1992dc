"""Tensor and module functions of PEFT's API, beside the installed PEFT's."""

import pytest
import torch
from torch import nn

from pylora.model import submodules, tensors
from pylora.model.devices import infer_device

other = pytest.importorskip("peft.utils.other")
constants = pytest.importorskip("peft.utils.constants")


def test_shift_tokens_right():
    labels = torch.tensor([[5, 6, -100, 7], [-100, 8, 9, 2]])
    before = labels.clone()
    shifted = tensors.shift_tokens_right(labels, pad_token_id=1, decoder_start_token_id=3)
    assert shifted.tolist() == [[3, 5, 6, 1], [3, 1, 8, 9]]
    assert torch.equal(shifted, other.shift_tokens_right(labels, 1, 3))
    assert torch.equal(labels, before)
    with pytest.raises(ValueError, match="pad_token_id"):
        tensors.shift_tokens_right(labels, None, 3)


def test_bloom_postprocess():
    past = tuple(torch.randn(2, 3, 4, 5, 6) for _ in range(4))
    own = tensors.bloom_model_postprocess_past_key_value(past)
    wanted = constants.bloom_model_postprocess_past_key_value(past)
    assert len(own) == len(wanted) == 4
    for (key, value), (wanted_key, wanted_value) in zip(own, wanted, strict=True):
        assert torch.equal(key, wanted_key)
        assert torch.equal(value, wanted_value)


def test_starcoder_postprocess():
    past = tuple(torch.randn(2, 3, 4, 5, 6) for _ in range(3))
    own = tensors.starcoder_model_postprocess_past_key_value(past)
    for mine, wanted in zip(own, constants.starcoder_model_postprocess_past_key_value(past), strict=True):
        assert torch.equal(mine, wanted)


def test_transpose():
    weight = nn.Parameter(torch.randn(2, 3))
    assert tensors.transpose(weight, False) is weight
    turned = tensors.transpose(weight, True)
    assert isinstance(turned, nn.Parameter)
    assert torch.equal(turned, weight.T)
    assert not isinstance(tensors.transpose(weight.data, True), nn.Parameter)


def test_id_tensor_storage():
    x = torch.randn(4, 3)
    assert tensors.id_tensor_storage(x) == tensors.id_tensor_storage(x[1:]) == other.id_tensor_storage(x)
    assert tensors.id_tensor_storage(x) != tensors.id_tensor_storage(x.clone())


@pytest.mark.parametrize("key", ["0", "1.0"])
def test_submodules(key):
    model = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.ReLU()))
    assert submodules.get_submodules(model, key) == other._get_submodules(model, key)
    parent, grandparent, target, name = submodules.get_submodules_with_grandparent(model, key)
    assert (parent, target, name) == submodules.get_submodules(model, key)
    assert grandparent is (model if key == "1.0" else None)


def test_freeze_adapter():
    model = nn.ModuleDict({"mine": nn.Linear(2, 2), "yours": nn.Linear(2, 2)})
    submodules.freeze_adapter(model, "mine")
    assert [param.requires_grad for param in model.parameters()] == [False, False, True, True]


@pytest.mark.parametrize("available", ["cuda", "xpu", None])
def test_infer_device(monkeypatch, available):
    for name in ("cuda", "mps", "xpu"):
        monkeypatch.setattr(getattr(torch, name), "is_available", lambda name=name: name == available)
    assert infer_device() == (available or "cpu")
