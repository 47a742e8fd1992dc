"""The Riemannian preconditioner: its formula, beside PEFT's, and what it refuses."""

import pytest
import torch
from torch import nn

import pylora
from pylora.optimizers import create_riemannian_optimizer


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = nn.Linear(6, 5)
        self.lin1 = nn.Linear(5, 3)

    def forward(self, x):
        return self.lin1(self.lin0(x))


FIELDS = {"r": 2, "target_modules": ["lin0", "lin1"], "init_lora_weights": False}


@pytest.fixture
def model():
    return pylora.get_peft_model(Net(), pylora.LoraConfig(**FIELDS))


def train(model, optimizer, x, steps=3):
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()


def test_the_step_is_the_formula(model):
    layer = model.base_model.model.lin0
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1.0, reg=0.25)
    model(torch.randn(4, 6)).square().sum().backward()
    eye = torch.eye(2, dtype=torch.float64)
    old_a, old_b, grad_a, grad_b = (t.detach().double().clone() for t in (a, b, a.grad, b.grad))
    optimizer.step()
    wanted_a = old_a - torch.linalg.solve(old_b.T @ old_b + 0.25 * eye, grad_a)
    wanted_b = old_b - torch.linalg.solve(old_a @ old_a.T + 0.25 * eye, grad_b.T).T
    torch.testing.assert_close(a.detach().double(), wanted_a, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(b.detach().double(), wanted_b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("optimizer_cls", [torch.optim.AdamW, torch.optim.SGD])
def test_training_goes_as_with_peft(model, optimizer_cls):
    peft = pytest.importorskip("peft")
    from peft.optimizers import create_riemannian_optimizer as peft_create

    theirs = peft.get_peft_model(Net(), peft.LoraConfig(**FIELDS))
    theirs.load_state_dict(model.state_dict())
    x = torch.randn(7, 6)
    train(model, create_riemannian_optimizer(model, optimizer_cls, lr=1e-3), x)
    train(theirs, peft_create(theirs, optimizer_cls, lr=1e-3), x)
    for (name, own), (_, other) in zip(model.named_parameters(), theirs.named_parameters(), strict=True):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-6, msg=name)


def test_b_of_zeros_without_damping_stays_finite():
    model = pylora.get_peft_model(Net(), pylora.LoraConfig(r=2, target_modules=["lin0"]))
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3, reg=0.0)
    train(model, optimizer, torch.randn(4, 6))
    assert all(torch.isfinite(param).all() for param in model.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_gradients_are_inverted_in_f32_and_keep_their_dtype(model, dtype):
    model.to(dtype)
    layer = model.base_model.model.lin0
    a, b = layer.lora_A.default.weight, layer.lora_B.default.weight
    a.grad, b.grad = torch.full_like(a, 0.5), torch.full_like(b, 0.5)
    eye = torch.eye(2, dtype=torch.float64)
    wanted = torch.linalg.solve(b.detach().double().T @ b.detach().double() + 1e-2 * eye, a.grad.double())
    create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3).step()
    assert a.grad.dtype == b.grad.dtype == dtype
    torch.testing.assert_close(a.grad.double(), wanted, rtol=1e-2, atol=1e-3)


def test_parameters_outside_pairs_are_left_to_the_optimizer(model):
    model.base_model.model.lin1.base_layer.bias.requires_grad = True
    bias = model.base_model.model.lin1.base_layer.bias
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=0.5)
    model(torch.randn(4, 6)).square().sum().backward()
    wanted = bias.detach() - 0.5 * bias.grad
    optimizer.step()
    torch.testing.assert_close(bias.detach(), wanted)


def test_what_is_no_optimizer_is_a_type_error(model):
    for wrong in (nn.Linear, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0), None):
        with pytest.raises(TypeError, match=r"optimizer_cls must be a subclass of torch\.optim\.Optimizer"):
            create_riemannian_optimizer(model, wrong, lr=1e-3)


def test_a_model_without_pairs_is_a_value_error():
    with pytest.raises(ValueError, match="lora_A/lora_B parameter pairs"):
        create_riemannian_optimizer(nn.Linear(2, 2), torch.optim.SGD, lr=1e-3)


def test_closures_are_refused(model):
    with pytest.raises(ValueError, match="LBFGS requires a closure"):
        create_riemannian_optimizer(model, torch.optim.LBFGS, lr=1e-3)
    optimizer = create_riemannian_optimizer(model, torch.optim.SGD, lr=1e-3)
    before = [param.detach().clone() for param in model.parameters()]
    with pytest.raises(ValueError, match="does not support closures"):
        optimizer.step(lambda: None)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
