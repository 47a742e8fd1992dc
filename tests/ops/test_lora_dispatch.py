"""The lora ops in torch's dispatcher: opcheck, torch.compile, autocast, and the implementation of other devices."""

import pytest
import torch

from pylora.ops import lora_add, lora_linear
from pylora.ops.reference import lora as reference
from pylora.testing.factories import lora_inputs
from pylora.testing.lora import DTYPES, RNG, lora_expected
from pylora.testing.tolerances import assert_near


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(dtype, dropout_p):
    inputs = lora_inputs(6, 16, 24, 4, dtype, torch.float32).requires_grad_()
    x, weight, bias, a, b = inputs.leaves()
    rng = RNG if dropout_p else None
    ops = torch.ops.pylora
    # Strided f32 gradients of autograd in two ways differ by rounding alone.
    tolerances = {"rtol": 1e-2, "atol": 1e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.library.opcheck(ops.lora_linear.default, (x, weight, bias, a, b, 0.5, dropout_p, rng), **tolerances)
    torch.library.opcheck(ops.lora_linear.default, (x, weight, None, a, b, 0.5, dropout_p, rng), **tolerances)
    torch.library.opcheck(ops.lora_add.default, (inputs.dy, x, a, b, 0.5, dropout_p, rng), **tolerances)
    torch.library.opcheck(ops.lora_dropout.default, (x, dropout_p, rng))
    detached = [t.detach() for t in (x, weight, bias, a, b)]
    x, weight, bias, a, b = detached
    torch.library.opcheck(ops.lora_linear_forward.default, (x, weight, bias, a, b, 0.5, dropout_p, rng))
    torch.library.opcheck(ops.lora_add_forward.default, (inputs.dy, x, a, b, 0.5, dropout_p, rng))
    v = torch.randn(6, 4)
    for needs in ([True] * 5, [True, False, False, True, True], [False, False, True, False, True]):
        torch.library.opcheck(
            ops.lora_linear_backward.default, (inputs.dy, x, weight, a, b, v, 0.5, dropout_p, rng, needs)
        )
    torch.library.opcheck(
        ops.lora_add_backward.default, (inputs.dy, x, a, b, v, 0.5, dropout_p, rng, [True, True, False])
    )


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile_fullgraph(dropout_p):
    inputs = lora_inputs(6, 16, 24, 4).requires_grad_()

    def layer(x, weight, bias, a, b, rng):
        return lora_linear(x * 2.0, weight, bias, a, b, 0.5, dropout_p, rng).relu()

    args = (*inputs.leaves(), RNG)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, y_compiled = layer(*args), compiled(*args)
    assert torch.equal(y, y_compiled)
    grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    grads_compiled = torch.autograd.grad(y_compiled, inputs.leaves(), inputs.dy)
    assert all(torch.equal(g, h) for g, h in zip(grads, grads_compiled, strict=True))


def test_compile_fullgraph_inductor_draws_its_own_mask():
    inputs = lora_inputs(64, 64, 64, 4)

    @torch.compile(fullgraph=True)
    def layer(x, weight, a, b):
        return lora_linear(x, weight, None, a, b, 1.0, 0.5) + lora_add(x, x, a, b, 1.0)

    args = (inputs.x, inputs.weight, inputs.a.requires_grad_(), inputs.b.requires_grad_())
    first, second = layer(*args), layer(*args)
    assert not torch.equal(first, second)
    # Its mean over masks is the layer without dropout; each mask keeps half of the elements of x.
    mean = torch.stack([layer(*args).detach() for _ in range(200)]).double().mean(0)
    plain = reference.lora_linear(inputs.x, inputs.weight, None, inputs.a, inputs.b, 1.0) + reference.lora_add(
        inputs.x, inputs.x, inputs.a, inputs.b, 1.0
    )
    assert (mean - plain).abs().max() < 1.0
    assert (mean - plain).abs().mean() < 0.1
    grads = torch.autograd.grad(first, args[2:], inputs.dy)
    assert all(bool(g.abs().sum() > 0) for g in grads)


@pytest.mark.parametrize(("create_graph", "backend"), [(False, None), (True, None), (False, "aot_eager")])
def test_backward_under_autocast_keeps_its_dtypes(create_graph, backend):
    """A forward outside autocast and its backward inside give the bits of both outside."""
    inputs = lora_inputs(24, 40, 56, 4).requires_grad_()

    def run_op(x, weight, bias, a, b):
        return lora_linear(x, weight, bias, a, b, 0.5, 0.25, RNG) + lora_add(x[:, :1] * weight[:, 0], x, a, b, 0.5)

    layer = torch.compile(run_op, backend=backend, fullgraph=True) if backend else run_op

    def grads(context):
        y = layer(*inputs.leaves())
        with context:
            return torch.autograd.grad(y, inputs.leaves(), inputs.dy, create_graph=create_graph)

    outside = grads(torch.autocast("cpu", enabled=False))
    inside = grads(torch.autocast("cpu", dtype=torch.bfloat16))
    assert [g.dtype for g in inside] == [torch.float32] * 5
    for g, h in zip(inside[2:], outside[2:], strict=True):  # x and weight also pass torch's own multiplication
        assert torch.equal(g, h)
    for g, h in zip(inside[:2], outside[:2], strict=True):
        assert_near(g, h.detach().double(), 40)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast(low):
    inputs = lora_inputs(8, 32, 24, 4).requires_grad_()
    with torch.autocast("cpu", dtype=low):
        y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling)
        added = lora_add(inputs.dy, inputs.x, inputs.a, inputs.b, inputs.scaling)
    assert y.dtype == added.dtype == low
    grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy.to(low))
    y_ref, grads_ref = lora_expected(inputs)
    assert_near(y, y_ref, 32, roundings=4)
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad.to(low), grad_ref, 32, roundings=8)


def test_grad_scaler_finds_overflow_and_scales():
    inputs = lora_inputs(8, 32, 24, 4)
    a, b = inputs.a.requires_grad_(), inputs.b.requires_grad_()
    optimizer = torch.optim.SGD([a, b], lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0)
    before = a.detach().clone()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = lora_linear(inputs.x, inputs.weight, inputs.bias, a, b, 1.0).float().pow(2).mean()
    scaler.scale(loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert not torch.equal(a, before)
    assert torch.isfinite(a).all()
    optimizer.zero_grad()
    with torch.autocast("cpu", dtype=torch.float16):
        loss = lora_linear(inputs.x * 1e6, inputs.weight, inputs.bias, a, b, 1.0).float().pow(2).mean()
    scaler.scale(loss).backward()
    before = a.detach().clone()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(a, before)
    assert scaler.get_scale() < 256.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_implementation_of_other_devices(dtype, dropout_p):
    """The ATen calls that serve devices without kernels, reached with CPU tensors through one's place in the table."""
    other = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    inputs = lora_inputs(11, 40, 24, 5, dtype, torch.float32)
    rng = RNG if dropout_p else None
    factors = (inputs.a, inputs.b, inputs.scaling, dropout_p, rng)
    ops = torch.ops.pylora
    for op, leading in [
        (ops.lora_linear_forward, (inputs.x, inputs.weight, inputs.bias)),
        (ops.lora_add_forward, (inputs.dy, inputs.x)),
    ]:
        y, v = op.default.redispatch(other, *leading, *factors)
        y_kernel, v_kernel = op.default(*leading, *factors)
        assert (y.dtype, v.dtype) == (y_kernel.dtype, v_kernel.dtype)
        assert_near(y, y_kernel.double(), 40)
        assert_near(v, v_kernel.double(), 40)
    v = v_kernel
    backward = (inputs.a, inputs.b, v, inputs.scaling, dropout_p, rng)
    for op, leading, needs in [
        (ops.lora_linear_backward, (inputs.dy, inputs.x, inputs.weight), [True, True, True, True, True]),
        (ops.lora_linear_backward, (inputs.dy, inputs.x, inputs.weight), [False, True, False, False, True]),
        (ops.lora_add_backward, (inputs.dy, inputs.x), [True, True, True]),
        (ops.lora_add_backward, (inputs.dy, inputs.x), [False, True, False]),
    ]:
        grads = op.default.redispatch(other, *leading, *backward, needs)
        for grad, grad_kernel in zip(grads, op.default(*leading, *backward, needs), strict=True):
            assert grad.dtype == grad_kernel.dtype
            assert_near(grad, grad_kernel.double(), 40)
