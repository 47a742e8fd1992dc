"""A model with every kind of layer that has DoRA, alone and beside the installed PEFT's."""

import copy

import peft
import pytest
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

import pylora

TARGETS = ["emb", "lin", "nobias", "tr", "conv1", "conv2", "conv3", "grouped"]


class ZooModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 6)
        self.nobias = nn.Linear(6, 10, bias=False)
        self.tr = Conv1D(6, 10)
        self.conv1 = nn.Conv1d(6, 5, 3, padding=1)
        self.conv2 = nn.Conv2d(1, 3, (3, 2), stride=2)
        self.conv3 = nn.Conv3d(1, 2, 2)
        self.grouped = nn.Conv1d(6, 4, 3, groups=2)

    def forward(self, ids):
        x = self.tr(torch.tanh(self.nobias(torch.relu(self.lin(self.emb(ids))))))
        channels = x.transpose(1, 2)
        return (
            x,
            self.conv1(channels),
            self.conv2(x.unsqueeze(1)),
            self.conv3(x.view(-1, 1, 4, 3, 2)),
            self.grouped(channels),
        )


@pytest.fixture
def ids():
    """An input of the model."""
    return torch.arange(8).view(2, 4)


@pytest.fixture
def Zoo():
    """The model's class."""
    return ZooModel


@pytest.fixture
def make():
    """Makes the model, wrapped by `lib`, with random adapters, none of them a no-op, all active."""
    return _make


def _make(lib, targets=TARGETS, names=("default",), dtype=torch.float32, base_seed=0, **config):
    torch.manual_seed(base_seed)
    base = ZooModel().to(dtype)
    fields = {"target_modules": list(targets), "r": 4, "lora_alpha": 6, "use_dora": True, "init_lora_weights": False}
    fields.update(config)
    model = lib.get_peft_model(base, lib.LoraConfig(**copy.deepcopy(fields)), adapter_name=names[0])
    for name in names[1:]:
        model.add_adapter(name, lib.LoraConfig(**copy.deepcopy(fields)))
    model.base_model.set_adapter(list(names))
    torch.manual_seed(7)
    with torch.no_grad():
        for name, param in sorted(model.named_parameters()):
            if "lora_" in name:
                param.add_(torch.randn(param.shape).to(param) * 0.1)
    return model


@pytest.fixture
def both():
    """(PEFT's model, pylora's), of the same weights, for the arguments of `make`."""

    def pair(**config):
        theirs, ours = _make(peft, **config), _make(pylora, **config)
        assert list(theirs.state_dict()) == list(ours.state_dict())
        ours.load_state_dict(theirs.state_dict())
        return theirs, ours

    return pair
