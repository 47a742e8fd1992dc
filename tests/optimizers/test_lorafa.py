"""LoRA-FA: the projection, AdamW around it, and what is frozen."""

import copy
import math

import pytest
import torch
from torch import nn

import pylora
from pylora.optimizers import LoraFAOptimizer, create_lorafa_optimizer

FIELDS = {"r": 4, "lora_alpha": 12, "target_modules": ["lin0", "lin1"], "init_lora_weights": False}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.emb = nn.Embedding(11, 6)
        self.lin0 = nn.Linear(6, 8)
        self.lin1 = nn.Linear(8, 3)

    def forward(self, ids):
        return self.lin1(self.lin0(self.emb(ids)))


@pytest.fixture
def ids():
    return torch.randint(0, 11, (5, 2))


@pytest.fixture
def model():
    return pylora.get_peft_model(Net(), pylora.LoraConfig(**FIELDS))


def make(model, **settings):
    return create_lorafa_optimizer(model, **{"r": 4, "lora_alpha": 12, "lr": 1e-2, **settings})


def train(model, optimizer, ids, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(ids).square().sum().backward()
        optimizer.step()


def test_the_step_is_adamw_on_the_projected_gradient(model, ids):
    optimizer = make(model, weight_decay=0.1)
    layer = model.base_model.model.lin0
    a, b = layer.lora_A.default.weight.detach().double(), layer.lora_B.default.weight
    model(ids).square().sum().backward()
    old = b.detach().double().clone()
    grad = b.grad.double() @ torch.linalg.inv(a @ a.T) / layer.scaling["default"] ** 2
    optimizer.step()
    # at the first step the bias-corrected averages are the gradient and its square; eps is added before the correction
    eps = 1e-6 / math.sqrt(1 - 0.999)
    wanted = (old - 1e-2 * grad / (grad.abs() + eps)) * (1 - 1e-2 * 0.1)
    torch.testing.assert_close(b.detach().double(), wanted, rtol=1e-4, atol=1e-6)


def test_a_is_frozen_and_stays(model, ids):
    optimizer = make(model)
    factors = {name: param for name, param in model.named_parameters() if "lora_A" in name}
    before = {name: param.detach().clone() for name, param in factors.items()}
    assert factors
    assert not any(param.requires_grad for param in factors.values())
    train(model, optimizer, ids)
    assert all(torch.equal(before[name], param) for name, param in factors.items())
    assert all(param.requires_grad for name, param in model.named_parameters() if "lora_B" in name)


def test_training_goes_as_with_peft_in_f32(model, ids, monkeypatch):
    peft = pytest.importorskip("peft")
    import peft.optimizers.lorafa as peft_lorafa

    monkeypatch.setattr(peft_lorafa, "is_bf16_available", lambda: False)  # otherwise it projects in bf16
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**FIELDS))
    theirs.load_state_dict(model.state_dict())
    for net in (model, theirs):
        net.base_model.model.emb.weight.requires_grad = True
    own, other = make(model, weight_decay=0.01), peft_lorafa.create_lorafa_optimizer(theirs, 4, 12, 1e-2, 0.01)
    assert own.param_groups[0]["names"] == other.param_groups[0]["names"]
    assert own.param_groups[0]["scaling_factors"] == other.param_groups[0]["scaling_factors"]
    train(model, own, ids)
    train(theirs, other, ids)
    assert set(own.state) == set(other.state)
    for (name, a), (_, b) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5, msg=name)
        assert a.requires_grad == b.requires_grad


def test_each_layer_has_its_own_scaling(ids):
    config = pylora.LoraConfig(**{**FIELDS, "rank_pattern": {"lin0": 2}, "use_rslora": True})
    optimizer = make(pylora.get_peft_model(Net(), config))
    group = optimizer.param_groups[0]
    scalings = dict(zip(group["names"], group["scaling_factors"], strict=True))
    assert scalings["base_model.model.lin0.lora_B.default.weight"] == pytest.approx(12 / math.sqrt(2))
    assert scalings["base_model.model.lin1.lora_B.default.weight"] == pytest.approx(12 / math.sqrt(4))
    assert scalings["base_model.model.lin1.base_layer.weight"] is None
    assert group["scaling_factor"] == pytest.approx(12 / math.sqrt(4))


def test_two_adapters_of_a_layer_have_states_of_their_own(model, ids):
    model.add_adapter("other", pylora.LoraConfig(**FIELDS))
    model.base_model.set_adapter(["default", "other"])
    optimizer = make(model)
    train(model, optimizer, ids, steps=1)
    assert {"base_model.model.lin0.lora", "base_model.model.lin0.lora.other"} <= set(optimizer.state)
    assert {state["step"] for state in optimizer.state.values()} == {1}


def test_inactive_adapters_are_left_alone(model, ids):
    model.add_adapter("other", pylora.LoraConfig(**FIELDS))
    optimizer = make(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters() if ".other." in name}
    train(model, optimizer, ids)
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters() if name in before)


def test_biases_and_other_parameters_get_plain_adamw(ids):
    model = pylora.get_peft_model(Net(), pylora.LoraConfig(**{**FIELDS, "lora_bias": True, "bias": "all"}))
    optimizer = make(model)
    bias = model.base_model.model.lin0.lora_B.default.bias
    model(ids).square().sum().backward()
    old, grad = bias.detach().clone(), bias.grad.clone()
    optimizer.step()
    torch.testing.assert_close(bias.detach(), old - 1e-2 * grad.sign(), rtol=1e-3, atol=1e-4)
    assert "base_model.model.lin0.lora_B.default.bias" in optimizer.state


def test_convolutions_are_projected_group_by_group():
    a = nn.Parameter(torch.randn(4, 3, 2))  # r = 4 in two groups of two, 3 channels each, kernel 2
    b = nn.Parameter(torch.zeros(6, 2, 1))
    names = ["conv.lora_A.default.weight", "conv.lora_B.default.weight"]
    optimizer = LoraFAOptimizer([{"params": [a, b], "names": names, "scaling_factors": [2.0, 2.0]}], betas=(0.0, 0.0))
    b.grad = torch.randn_like(b)
    optimizer.step()
    gram = a.detach().reshape(2, 2, 6)
    wanted = b.grad.reshape(2, 3, 2) @ torch.linalg.inv(gram @ gram.mT) / 4.0
    torch.testing.assert_close(optimizer.state["conv.lora"]["exp_avg_B"], wanted.reshape(6, 2, 1), rtol=1e-4, atol=1e-5)


def test_state_survives_saving_and_loading(model, ids):
    optimizer = make(model)
    train(model, optimizer, ids)
    twin = copy.deepcopy(model)
    fresh = make(twin, lr=0.5)
    fresh.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, ids)
    train(twin, fresh, ids)
    for (name, a), (_, b) in zip(model.named_parameters(), twin.named_parameters(), strict=True):
        assert torch.equal(a, b), name


def test_a_closure_has_gradients(model, ids):
    optimizer = make(model)

    def closure():
        optimizer.zero_grad()
        loss = model(ids).square().sum()
        loss.backward()
        return loss

    first = optimizer.step(closure)
    assert optimizer.step(closure) < first


def test_the_rslora_argument_must_agree(model):
    with pytest.raises(ValueError, match=r"was passed to create_lorafa_optimizer.*\['default'\]"):
        make(model, use_rslora=True)
    assert all(param.requires_grad for name, param in model.named_parameters() if "lora_A" in name)
    with pytest.warns(FutureWarning, match="use_rslora"):
        make(model, use_rslora=False)


def test_the_legacy_scaling_factor_warns_once(model, ids):
    optimizer = make(model)
    del optimizer.param_groups[0]["scaling_factors"]
    with pytest.warns(FutureWarning, match="`scaling_factor` is deprecated") as caught:
        train(model, optimizer, ids, steps=2)
    assert len([w for w in caught if "scaling_factor" in str(w.message)]) == 1
    del optimizer.param_groups[0]["scaling_factor"]
    with pytest.raises(KeyError, match="scaling_factors"):
        optimizer.step()


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lr": -1.0}, "Invalid learning rate"),
        ({"betas": (1.0, 0.9)}, "Invalid beta parameter"),
        ({"betas": (0.9, -0.1)}, "Invalid beta parameter"),
        ({"eps": -1e-9}, "Invalid epsilon value"),
    ],
)
def test_arguments_out_of_range(setting, message):
    with pytest.raises(ValueError, match=message):
        LoraFAOptimizer([nn.Parameter(torch.zeros(1))], **setting)
