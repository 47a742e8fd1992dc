"""lora_linear, lora_add and lora_dropout on the CPU, held against their definitions in f64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylora.ops import draw_rng, lora_add, lora_dropout, lora_linear
from pylora.ops.reference import lora as reference
from pylora.ops.reference.philox import dropout_bits, philox4x32
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = [1, 3, 8, 16, 64, 200]
WIDTHS = [0, 1, 17, 64, 1000]
TOKENS = [0, 1, 2, 3, 7, 50]
RNG = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def run(inputs: LoraInputs, dropout_p: float = 0.0, rng: torch.Tensor | None = None):
    """y and the gradients of the leaves, from the op."""
    inputs.requires_grad_()
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling, dropout_p, rng)
    return y, torch.autograd.grad(y, inputs.leaves(), inputs.dy)


def expected(inputs: LoraInputs, dropout_p: float = 0.0, rng: torch.Tensor | None = None, absolute: bool = False):
    """The same from the definition, in f64; with `absolute`, the sums of the magnitudes of all terms."""
    wide = [t.detach().double() for t in (*inputs.leaves(), inputs.dy)]
    *leaves, dy = [t.abs() if absolute else t for t in wide]
    x, weight, *bias, a, b = [t.requires_grad_() for t in leaves]
    y = reference.lora_linear(x, weight, bias[0] if bias else None, a, b, inputs.scaling, dropout_p, rng)
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def check(inputs: LoraInputs, dropout_p: float = 0.0, rng: torch.Tensor | None = None) -> None:
    y, grads = run(inputs, dropout_p, rng)
    y_ref, grads_ref = expected(inputs, dropout_p, rng)
    y_size, grads_size = expected(inputs, dropout_p, rng, absolute=True)
    longest = max(*inputs.x.shape, *inputs.weight.shape, *inputs.a.shape)
    assert y.dtype == inputs.x.dtype
    sums_in = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    # torch may round the product before it adds the bias: three roundings with the delta's.
    assert_near(y, y_ref, longest, "y", y_size, roundings=3, sums_in=sums_in)
    names = ["dx", "dweight", *(["dbias"] if inputs.bias is not None else []), "da", "db"]
    for name, leaf, grad, grad_ref, size in zip(names, inputs.leaves(), grads, grads_ref, grads_size, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, grad_ref, longest, name, size, sums_in=sums_in)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_forward_and_backward(isa, dtype, in_features):
    """Every pair of widths with every number of tokens; ranks and bias take turns, so that each meets each width."""
    ranks, biases = itertools.cycle(RANKS), itertools.cycle([True, False, False])
    for out_features, num_tokens in itertools.product(WIDTHS, TOKENS):
        check(lora_inputs(num_tokens, in_features, out_features, next(ranks), dtype, bias=next(biases)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_base_products_of_many_rows(isa, dtype, transposed):
    """More rows than one block of the packed product, with ends in every direction; weights stored [in, out] too."""
    for num_tokens, in_features, out_features in [(200, 300, 70), (193, 64, 33), (30, 2100, 40)]:
        inputs = lora_inputs(num_tokens, in_features, out_features, 4, dtype)
        if transposed:
            inputs.weight = inputs.weight.t().contiguous().t()
        check(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank(isa, dtype):
    for rank, (in_features, out_features) in itertools.product(RANKS, [(17, 64), (130, 33)]):
        check(lora_inputs(29, in_features, out_features, rank, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_factors_in_another_dtype(isa, dtype, factor_dtype):
    check(lora_inputs(33, 129, 70, 12, dtype, factor_dtype))
    check(lora_inputs(33, 129, 70, 12, dtype, factor_dtype), 0.25, RNG)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [1e-3, 0.1, 0.5, 1.0])
def test_dropout_forward_and_backward(isa, dtype, dropout_p):
    for num_tokens, width in [(1, 17), (7, 64), (130, 513)]:
        check(lora_inputs(num_tokens, width, 96, 8, dtype), dropout_p, RNG)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions(isa, dtype):
    base = lora_inputs(24, 40, 36, 5, dtype)
    wide = torch.zeros(24, 100, dtype=dtype)
    wide[:, 30:70] = base.x
    column_major = base.x.t().contiguous().t()
    fan_in = base.weight.t().contiguous().t()
    y = lora_linear(base.x, base.weight, base.bias, base.a, base.b, base.scaling)
    for x in (wide[:, 30:70], column_major):
        other = lora_linear(
            x, fan_in, base.bias, base.a.t().contiguous().t(), base.b.t().contiguous().t(), base.scaling
        )
        assert other.is_contiguous()
        assert_near(other, y.double(), 40)
    stacked = lora_linear(base.x.view(2, 3, 4, 40), base.weight, base.bias, base.a, base.b, base.scaling)
    assert stacked.shape == (2, 3, 4, 36)
    assert_near(stacked.view(24, 36), y.double(), 40)
    assert lora_linear(base.x[0], base.weight, base.bias, base.a, base.b, base.scaling).shape == (36,)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradient_of_strided_output(isa, dtype):
    inputs = lora_inputs(12, 20, 18, 4, dtype)
    _, grads_ref = expected(inputs)
    inputs.requires_grad_()
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling)
    grads = torch.autograd.grad(y.t(), inputs.leaves(), inputs.dy.t().contiguous())
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert_near(grad, grad_ref, 20, roundings=4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_add(isa, dtype, dropout_p):
    inputs = lora_inputs(19, 77, 33, 6, dtype, torch.float32 if dtype != torch.float64 else None)
    base = inputs.dy.clone().requires_grad_()
    leaves = [base, *(t.requires_grad_() for t in (inputs.x, inputs.a, inputs.b))]
    y = lora_add(base, inputs.x, inputs.a, inputs.b, inputs.scaling, dropout_p, RNG)
    grads = torch.autograd.grad(y, leaves, inputs.dy)
    wide = [t.detach().double().requires_grad_() for t in leaves]
    y_ref = reference.lora_add(*wide, inputs.scaling, dropout_p, RNG)
    grads_ref = torch.autograd.grad(y_ref, wide, inputs.dy.double())
    assert_near(y, y_ref, 77, "y")
    for grad, grad_ref in zip(grads, grads_ref, strict=True):
        assert_near(grad, grad_ref, 77)
    assert y.data_ptr() != base.data_ptr()


def test_add_of_two_adapters_leaves_the_base_alone(isa):
    inputs = lora_inputs(9, 30, 40, 4)
    base = inputs.dy.clone()
    before = base.clone()
    lora_add(base, inputs.x, inputs.a, inputs.b, 2.0)
    assert torch.equal(base, before)


def test_philox_known_answers():
    """The vectors published with the generator (Random123, kat_vectors)."""
    zeros = tuple(torch.zeros(1, dtype=torch.int64) for _ in range(4))
    ones = tuple(torch.full((1,), 0xFFFFFFFF) for _ in range(4))
    assert [w.item() for w in philox4x32(zeros, 0)] == [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]
    assert [w.item() for w in philox4x32(ones, -1)] == [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_the_elements_of_the_reference(isa, dtype):
    x = torch.ones(70, 333, dtype=dtype)
    out = lora_dropout(x, 0.2, RNG)
    kept = dropout_bits(70, 333, RNG) >= round(0.2 * 65536)
    assert torch.equal(out != 0, kept)
    assert_near(out, reference.lora_dropout(x, 0.2, RNG), 1)


def test_dropout_counts_rows_over_leading_dimensions():
    x = torch.randn(4, 5, 70)
    assert torch.equal(lora_dropout(x, 0.5, RNG).view(20, 70), lora_dropout(x.view(20, 70), 0.5, RNG))


def test_dropout_statistics():
    """Share of zeros and mean of 4 million elements, within five standard deviations."""
    out = lora_dropout(torch.ones(2000, 2000), 0.1, RNG)
    zeros = (out == 0).double().mean().item()
    assert abs(zeros - 0.1) < 5 * (0.1 * 0.9 / out.numel()) ** 0.5 + 2**-17
    assert abs(out.double().mean().item() - 1.0) < 5 * (0.1 / 0.9 / out.numel()) ** 0.5


def test_dropout_is_seeded_by_torch():
    x = torch.randn(8, 64)
    torch.manual_seed(3)
    first = lora_dropout(x, 0.5)
    second = lora_dropout(x, 0.5)
    torch.manual_seed(3)
    again = lora_dropout(x, 0.5)
    assert torch.equal(first, again)
    assert not torch.equal(first, second)


def test_every_isa_drops_the_same_elements():
    x = torch.randn(33, 700)
    outs = []
    for name in supported_isas():
        with cpu_isa(name):
            outs.append(lora_dropout(x, 0.3, RNG))
    assert all(torch.equal(outs[0], out) for out in outs[1:])
    assert len(outs) == len(supported_isas()) > 0


@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_gradient_checkpointing_replays_the_mask(dropout_p):
    inputs = lora_inputs(16, 64, 48, 4).requires_grad_()

    def layer(x):
        return lora_linear(x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling, dropout_p)

    torch.manual_seed(5)
    y = layer(inputs.x)
    grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    torch.manual_seed(5)
    y_replayed = torch.utils.checkpoint.checkpoint(layer, inputs.x, use_reentrant=False)
    grads_replayed = torch.autograd.grad(y_replayed, inputs.leaves(), inputs.dy)
    assert torch.equal(y, y_replayed)
    assert all(torch.equal(g, h) for g, h in zip(grads, grads_replayed, strict=True))


def test_keeps_only_x_and_rank_wide_tensors_for_backward():
    inputs = lora_inputs(256, 512, 384, 8).requires_grad_()
    known = {t.untyped_storage().data_ptr() for t in inputs.leaves()}
    kept = {}

    def pack(t):
        storage = t.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, 1.0, 0.1)
    assert sum(kept.values()) == 256 * 8 * 4 + 2 * 8  # v and the generator's state


def test_same_bits_for_any_thread_count():
    """pylora's part alone: the base product is torch's own, so it is left out by lora_add."""
    inputs = lora_inputs(300, 520, 390, 16)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaves = [t.detach().requires_grad_() for t in (inputs.dy, inputs.x, inputs.a, inputs.b)]
            y = lora_add(*leaves, 0.5, 0.1, RNG)
            results.append((y, *torch.autograd.grad(y, leaves, inputs.dy)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(results[0], result, strict=True))


def test_row_does_not_depend_on_its_batch(isa):
    inputs = lora_inputs(61, 200, 150, 9)
    whole = lora_add(inputs.dy, inputs.x, inputs.a, inputs.b, 0.5)
    for rows in (slice(0, 1), slice(5, 9), slice(17, 60)):
        assert torch.equal(whole[rows], lora_add(inputs.dy[rows], inputs.x[rows], inputs.a, inputs.b, 0.5))


def test_gradients_only_where_required():
    inputs = lora_inputs(6, 20, 30, 4)
    a, b = inputs.a.requires_grad_(), inputs.b.requires_grad_()
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, a, b, 1.0)
    y.backward(inputs.dy)
    assert [t.grad is None for t in inputs.leaves()] == [True, True, True, False, False]
    only_b = torch.autograd.grad(lora_linear(inputs.x, inputs.weight, None, a, b, 1.0), [b], inputs.dy)
    assert_near(only_b[0], b.grad.double(), 30)


def saved_bytes(call) -> int:
    kept = {}

    def pack(t):
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        call()
    return sum(kept.values())


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
    y_ref, grads_ref = expected(inputs)
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
    """The ATen calls that serve CUDA, reached with CPU tensors through CUDA's place in the dispatch table."""
    cuda = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    inputs = lora_inputs(11, 40, 24, 5, dtype, torch.float32)
    rng = RNG if dropout_p else None
    factors = (inputs.a, inputs.b, inputs.scaling, dropout_p, rng)
    ops = torch.ops.pylora
    for op, leading in [
        (ops.lora_linear_forward, (inputs.x, inputs.weight, inputs.bias)),
        (ops.lora_add_forward, (inputs.dy, inputs.x)),
    ]:
        y, v = op.default.redispatch(cuda, *leading, *factors)
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
        grads = op.default.redispatch(cuda, *leading, *backward, needs)
        for grad, grad_kernel in zip(grads, op.default(*leading, *backward, needs), strict=True):
            assert grad.dtype == grad_kernel.dtype
            assert_near(grad, grad_kernel.double(), 40)


def call_linear(**changes):
    inputs = lora_inputs(4, 8, 6, 2)
    arguments = {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "a": inputs.a,
        "b": inputs.b,
        "scaling": 1.0,
        "dropout_p": 0.0,
        "rng": None,
    } | changes
    return lora_linear(**arguments)


BAD_ARGUMENTS = [
    ({"x": torch.randn(4, 9)}, ValueError, r"lora_linear: weight: expected shape \[-1, 9\] .* got \[6, 8\]"),
    ({"x": torch.tensor(1.0)}, ValueError, r"lora_linear: x: expected at least 1 dimension"),
    ({"bias": torch.randn(5)}, ValueError, r"lora_linear: bias: expected shape \[6\] .* got \[5\]"),
    ({"a": torch.randn(2, 7)}, ValueError, r"lora_linear: a: expected shape \[-1, 8\] .* got \[2, 7\]"),
    ({"b": torch.randn(6, 3)}, ValueError, r"lora_linear: b: expected shape \[6, 2\] .* got \[6, 3\]"),
    ({"a": torch.randn(0, 8), "b": torch.randn(6, 0)}, ValueError, r"lora_linear: a: expected a rank of at least 1"),
    ({"weight": torch.randn(6, 8).bfloat16()}, TypeError, r"weight: expected the dtype of x, Float, got BFloat16"),
    ({"b": torch.randn(6, 2).half()}, TypeError, r"b: expected the dtype of a, Float, got Half"),
    (
        {"a": torch.zeros(2, 8, dtype=torch.int32), "b": torch.zeros(6, 2, dtype=torch.int32)},
        TypeError,
        r"a: expected fl",
    ),
    ({"a": torch.randn(2, 8, device="meta")}, ValueError, r"a: expected the device of x, cpu, got meta"),
    ({"dropout_p": 1.5}, ValueError, r"dropout_p: expected a probability in \[0, 1\], got 1.5"),
    ({"dropout_p": float("nan")}, ValueError, r"dropout_p: expected a probability"),
    ({"dropout_p": 0.1, "rng": torch.zeros(2)}, TypeError, r"rng: expected int64, got Float"),
    ({"dropout_p": 0.1, "rng": torch.zeros(3, dtype=torch.int64)}, ValueError, r"rng: expected shape \[2\]"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_ARGUMENTS, ids=range(len(BAD_ARGUMENTS)))
def test_bad_arguments_are_named(changes, error, message):
    with pytest.raises(error, match=message):
        call_linear(**changes)


def test_add_names_a_base_that_does_not_fit():
    inputs = lora_inputs(4, 8, 6, 2)
    with pytest.raises(ValueError, match=r"lora_add: base: expected shape \[4, -1\] .* got \[3, 6\]"):
        lora_add(torch.randn(3, 6), inputs.x, inputs.a, inputs.b, 1.0)
    with pytest.raises(TypeError, match="lora_add: base: expected the dtype of x"):
        lora_add(inputs.dy.half(), inputs.x, inputs.a, inputs.b, 1.0)


def test_backward_ops_check_what_they_are_given():
    """They are public through torch.ops, and `.data` of a parameter may change between forward and backward."""
    inputs = lora_inputs(4, 8, 6, 2)
    v = torch.randn(4, 2)
    op, needs = torch.ops.pylora.lora_linear_backward, [True] * 5

    def call(**changes):
        args = {"dy": inputs.dy, "x": inputs.x, "weight": inputs.weight, "a": inputs.a, "b": inputs.b, "v": v} | changes
        return op(*args.values(), 0.5, 0.0, None, needs)

    assert [g.shape for g in call()] == [(4, 8), (6, 8), (6,), (2, 8), (6, 2)]
    with pytest.raises(ValueError, match=r"lora_linear_backward: v: expected shape \[4, 2\]"):
        call(v=v[:1])
    with pytest.raises(TypeError, match="lora_linear_backward: v: expected the forward's v"):
        call(v=v.bfloat16())
    with pytest.raises(ValueError, match="lora_linear_backward: x: expected a tensor"):
        call(x=None)
    with pytest.raises(ValueError, match="lora_linear_backward: weight: expected a tensor"):
        call(weight=None)
    with pytest.raises(TypeError, match="lora_linear_backward: b: expected the dtype of a"):
        call(b=inputs.b.bfloat16())
    with pytest.raises(ValueError, match=r"lora_linear_backward: x: expected shape \[4, 8\]"):
        call(x=inputs.x[:2])
    a = torch.nn.Parameter(inputs.a)
    y = lora_linear(inputs.x, inputs.weight, None, a, inputs.b, 1.0)
    a.data = a.data.bfloat16()
    with pytest.raises((TypeError, RuntimeError)):
        y.backward(inputs.dy)


def test_dropped_infinity_is_a_nan_as_in_torch():
    assert torch.isnan(lora_dropout(torch.full((4, 64), torch.inf), 0.5, RNG)).any()


def test_dropout_of_nothing_is_a_copy():
    x = torch.randn(3, 5).t()
    for p in (0.0, 1e-9):
        out = lora_dropout(x, p)
        assert torch.equal(out, x)
        assert out.data_ptr() != x.data_ptr()
    assert lora_dropout(torch.empty(3, 0), 0.5).shape == (3, 0)


def test_missing_rng_is_named_by_the_op():
    inputs = lora_inputs(4, 8, 6, 2)
    with pytest.raises(ValueError, match=r"lora_linear: rng: expected an int64 tensor \[seed, offset\]"):
        torch.ops.pylora.lora_linear(inputs.x, inputs.weight, None, inputs.a, inputs.b, 1.0, 0.5, None)


def test_draw_rng_is_two_words_of_torchs_generator():
    torch.manual_seed(1)
    first = draw_rng("cpu")
    torch.manual_seed(1)
    assert torch.equal(first, draw_rng("cpu"))
    assert (first.dtype, first.shape) == (torch.int64, (2,))
    assert len({tuple(draw_rng("cpu").tolist()) for _ in range(50)}) == 50


@given(
    num_tokens=st.integers(0, 70),
    widths=st.tuples(st.integers(1, 150), st.integers(1, 150)),
    rank=st.integers(1, 40),
    dtype=st.sampled_from(DTYPES),
    dropout_p=st.sampled_from([0.0, 0.3]),
    bias=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_shape(num_tokens, widths, rank, dtype, dropout_p, bias):
    check(lora_inputs(num_tokens, *widths, rank, dtype, bias=bias), dropout_p, RNG)
