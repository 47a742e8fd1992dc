"""LoRA+: groups and learning rates, beside PEFT's."""

import copy
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn

import pylora
from pylora.optimizers import create_loraplus_optimizer

FIELDS = {"r": 4, "target_modules": ["lin0", "lin1"], "bias": "all", "init_lora_weights": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = nn.Linear(6, 5)
        self.norm = nn.LayerNorm(5)
        self.lin1 = nn.Linear(5, 3)
        self.head = nn.Linear(3, 2)

    def forward(self, x):
        return self.head(self.lin1(self.norm(self.lin0(x))))


def groups_by_name(optimizer, model):
    names = {id(param): name for name, param in model.named_parameters()}
    return [
        (sorted(names[id(param)] for param in group["params"]), group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
    ]


def train(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_groups_and_steps_are_those_of_peft():
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_loraplus_optimizer as peft_create

    ours = pylora.get_peft_model(Net(), pylora.LoraConfig(**FIELDS, modules_to_save=["head", "norm"]))
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**FIELDS, modules_to_save=["head", "norm"]))
    theirs.load_state_dict(ours.state_dict())
    settings = {"lr": 1e-2, "loraplus_lr_ratio": 4.0, "loraplus_weight_decay": 0.1, "eps": 1e-7}
    own = create_loraplus_optimizer(ours, torch.optim.AdamW, **settings)
    other = peft_create(theirs, torch.optim.AdamW, **settings)
    assert groups_by_name(own, ours) == groups_by_name(other, theirs)
    x = torch.randn(7, 6)
    train(ours, own, x)
    train(theirs, other, x)
    for (name, a), (_, b) in zip(ours.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6, msg=name)


def test_a_has_the_rate_and_b_the_rate_times_the_ratio():
    model = pylora.get_peft_model(Net(), pylora.LoraConfig(r=4, target_modules=["lin0"]))
    optimizer = create_loraplus_optimizer(model, torch.optim.SGD, lr=0.5, loraplus_lr_ratio=8.0, momentum=0.9)
    groups = groups_by_name(optimizer, model)
    assert groups[0] == (["base_model.model.lin0.lora_A.default.weight"], 0.5, 0.0)
    assert groups[1] == ([], 1e-6, 0.0)
    assert groups[2] == (["base_model.model.lin0.lora_B.default.weight"], 4.0, 0.0)
    assert groups[3] == ([], 4.0, 0.0)
    assert isinstance(optimizer, torch.optim.SGD)
    assert {group["momentum"] for group in optimizer.param_groups} == {0.9}


def test_factors_of_embeddings_have_their_own_rate():
    class WithEmbedding(nn.Module):
        def __init__(self):
            super().__init__()
            self.emb = nn.Embedding(9, 4)
            self.lin = nn.Linear(4, 2)

        def forward(self, ids):
            return self.lin(self.emb(ids))

    model = pylora.get_peft_model(WithEmbedding(), pylora.LoraConfig(r=2, target_modules=["emb", "lin"]))
    optimizer = create_loraplus_optimizer(
        model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0, loraplus_lr_embedding=5e-5, loraplus_weight_decay=0.3
    )
    prefix = "base_model.model.emb.lora_embedding_"
    assert groups_by_name(optimizer, model)[1] == ([f"{prefix}A.default", f"{prefix}B.default"], 5e-5, 0.3)


def test_a_model_that_is_no_peft_model_is_taken():
    optimizer = create_loraplus_optimizer(nn.Linear(2, 3), torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0)
    assert [len(group["params"]) for group in optimizer.param_groups] == [1, 0, 0, 1]


def test_embeddings_keep_32_bit_state_in_8_bit_optimizers(monkeypatch):
    overridden = []
    manager = SimpleNamespace(register_module_override=lambda *args: overridden.append(args))
    fake = ModuleType("bitsandbytes")
    fake.optim = SimpleNamespace(GlobalOptimManager=SimpleNamespace(get_instance=lambda: manager))
    monkeypatch.setitem(sys.modules, "bitsandbytes", fake)

    class AdamW8bit(torch.optim.AdamW):
        pass

    model = nn.Sequential(nn.Embedding(3, 2), nn.Linear(2, 2))
    create_loraplus_optimizer(model, AdamW8bit, lr=1e-3, loraplus_lr_ratio=2.0)
    assert overridden == [(model[0], "weight", {"optim_bits": 32})]


def test_state_survives_saving_and_loading():
    model = pylora.get_peft_model(Net(), pylora.LoraConfig(**FIELDS))
    optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=2.0)
    train(model, optimizer, torch.randn(4, 6))
    state = copy.deepcopy(optimizer.state_dict())
    fresh = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1.0, loraplus_lr_ratio=1.0)
    fresh.load_state_dict(state)
    assert [group["lr"] for group in fresh.param_groups] == [1e-3, 1e-6, 2e-3, 2e-3]
