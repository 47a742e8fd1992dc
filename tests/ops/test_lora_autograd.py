"""Autograd of the lora ops: what is kept, what is computed, and derivatives of every order."""

import pytest
import torch

from pylora.ops import lora_add, lora_dropout, lora_linear
from pylora.testing.factories import lora_inputs
from pylora.testing.lora import RNG
from pylora.testing.tolerances import assert_near


def saved_bytes(call) -> int:
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


def test_keeps_only_x_and_rank_wide_tensors_for_backward():
    inputs = lora_inputs(256, 512, 384, 8).requires_grad_()
    arguments = (inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, 1.0, 0.1)
    known = sum(t.nbytes for t in (inputs.x, inputs.weight, inputs.a, inputs.b))
    kept = saved_bytes(lambda: lora_linear(*arguments))
    assert kept == known + 256 * 8 * 4 + 2 * 8  # v and the generator's state


def test_gradients_only_where_required():
    inputs = lora_inputs(6, 20, 30, 4)
    a, b = inputs.a.requires_grad_(), inputs.b.requires_grad_()
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, a, b, 1.0)
    y.backward(inputs.dy)
    assert [t.grad is None for t in inputs.leaves()] == [True, True, True, False, False]
    only_b = torch.autograd.grad(lora_linear(inputs.x, inputs.weight, None, a, b, 1.0), [b], inputs.dy)
    assert_near(only_b[0], b.grad.double(), 30)


def test_keeps_nothing_that_no_gradient_reads():
    inputs = lora_inputs(256, 64, 48, 8)
    x, weight, a, b = inputs.x, inputs.weight, inputs.a, inputs.b
    weight_bytes, factor_bytes = weight.nbytes, a.nbytes + b.nbytes
    x.requires_grad_()  # frozen adapter, as under prompt tuning: no x and no v
    assert saved_bytes(lambda: lora_linear(x, weight, None, a, b, 1.0)) == weight_bytes + factor_bytes
    assert saved_bytes(lambda: lora_add(inputs.dy, x, a, b, 1.0)) == factor_bytes
    x.requires_grad_(False)
    b.requires_grad_()  # the first layer of a model: no weight
    v_bytes = 256 * 8 * 4
    assert saved_bytes(lambda: lora_linear(x, weight, None, a, b, 1.0)) == x.nbytes + factor_bytes + v_bytes
    y = lora_linear(x, weight, None, a, b, 1.0)
    with torch.no_grad():
        weight.mul_(2.0)  # not read by this backward, so not guarded by it
    torch.autograd.grad(y, [b], inputs.dy)


def test_no_graph_without_a_gradient():
    inputs = lora_inputs(3, 8, 8, 2)
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, 1.0)
    assert not y.requires_grad
    inputs.requires_grad_()
    with torch.no_grad():
        assert not lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, 1.0).requires_grad
    with torch.inference_mode():
        assert lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, 1.0).is_inference()


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gradcheck_and_double_backward(isa, dropout_p):
    inputs = lora_inputs(5, 9, 7, 3, torch.float64).requires_grad_()
    x, weight, bias, a, b = inputs.leaves()

    def linear(x, weight, bias, a, b):
        return lora_linear(x, weight, bias, a, b, 0.5, dropout_p, RNG)

    def add(base, x, a, b):
        return lora_add(base, x, a, b, 0.5, dropout_p, RNG)

    base = inputs.dy.requires_grad_()
    assert torch.autograd.gradcheck(linear, (x, weight, bias, a, b))
    assert torch.autograd.gradgradcheck(linear, (x, weight, bias, a, b))
    assert torch.autograd.gradcheck(add, (base, x, a, b))
    assert torch.autograd.gradgradcheck(add, (base, x, a, b))
    assert torch.autograd.gradgradcheck(lambda x: lora_dropout(x, 0.25, RNG), (x,))


def test_forward_mode_is_refused_not_dropped():
    inputs = lora_inputs(3, 8, 8, 2)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(inputs.x, torch.ones_like(inputs.x))
        with pytest.raises(NotImplementedError, match="jvp"):
            lora_linear(x, inputs.weight, None, inputs.a, inputs.b, 1.0)
        with pytest.raises(NotImplementedError, match="jvp"):
            lora_dropout(x, 0.5)
