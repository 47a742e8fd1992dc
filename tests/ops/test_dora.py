"""dora_row_norms, dora_row_squares, dora_linear and dora_linear_norms on the CPU, against their definitions in f64."""

import itertools

import pytest
import torch
from torch.testing import assert_close

from pylora.ops import dora_linear, dora_linear_norms, dora_row_norms, dora_row_squares
from pylora.ops.reference import dora as reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
RANKS = [1, 3, 8, 16, 64, 200]
WIDTHS = [0, 1, 17, 64, 300]
TOKENS = [0, 1, 2, 7, 50]
RNG = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])
NAMES = ("x", "weight", "bias", "a", "b", "magnitude")


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def magnitudes(out_features: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return (0.5 + torch.rand(out_features, generator=generator, dtype=torch.float64)).to(dtype)


def assert_norms(norms: torch.Tensor, weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scaling: float) -> None:
    """Each norm within a few roundings of the norm of the magnitudes of its terms."""
    assert norms.dtype == torch.float64
    expected = reference.dora_row_norms(weight, a, b, scaling)
    size = reference.dora_row_norms(weight.abs(), a.abs(), b.abs(), abs(scaling))
    length = 8 + a.shape[0] ** 0.5 + weight.shape[1] ** 0.5
    limit = size * length * (2.0**-53 if weight.dtype == torch.float64 else 2.0**-24) * 4
    assert ((norms - expected).abs() <= limit).all()


def views(weight: torch.Tensor) -> list[torch.Tensor]:
    """The same matrix as it is, transposed in memory, with rows apart, and with no unit stride."""
    apart = torch.zeros(weight.shape[0], weight.shape[1] + 5, dtype=weight.dtype)
    apart[:, 3 : 3 + weight.shape[1]] = weight
    scattered = torch.stack([weight, weight], 2)[:, :, 0]
    return [weight, weight.t().contiguous().t(), apart[:, 3 : 3 + weight.shape[1]], scattered]


@pytest.mark.parametrize("dtype", DTYPES)
def test_row_norms_and_squares(isa, dtype):
    ranks, factor_dtypes = itertools.cycle(RANKS), itertools.cycle(DTYPES)
    for out_features, in_features in itertools.product([0, 1, 5, 6, 49, 130], [0, 1, 17, 256, 300, 600]):
        inputs = lora_inputs(0, in_features, out_features, next(ranks), dtype, next(factor_dtypes))
        exact = inputs.weight.double().square().sum(1)
        for weight, a, b in zip(views(inputs.weight), views(inputs.a), views(inputs.b), strict=True):
            assert_norms(dora_row_norms(weight, a, b, inputs.scaling), weight, a, b, inputs.scaling)
            rtol = 1e-14 if dtype == torch.float64 else 2e-6
            assert_close(dora_row_squares(weight), exact, rtol=rtol, atol=1e-30)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("left", [0.0, 1e-6, 1e-3, 3e-2])
def test_rows_that_cancel(isa, dtype, left):
    """B A takes all but a share `left` of some rows of W away; both ways to the norms compute these in f64."""
    generator = torch.Generator().manual_seed(1)
    a = torch.randn(4, 300, generator=generator, dtype=torch.float64).to(dtype)
    b = torch.randn(30, 4, generator=generator, dtype=torch.float64).to(dtype)
    weight = -(b.double() @ a.double())
    weight[::3] += torch.randn(10, 300, generator=generator) * 5
    weight[1::3] += left * torch.randn(10, 300, generator=generator)
    weight = weight.to(dtype)
    expected = reference.dora_row_norms(weight, a, b, 1.0)
    assert_close(dora_row_norms(weight, a, b, 1.0), expected, rtol=5e-5, atol=1e-12)
    x = torch.randn(20, 300, generator=generator).to(dtype)
    _, norms = dora_linear_norms(x, weight, None, a, b, magnitudes(30), None, 1.0)
    assert_close(norms, expected, rtol=1e-4, atol=1e-12)  # from sums of |W|^2: half of 1e-7 / kCancelled


def test_rows_of_zeros_and_overflow():
    a, b = torch.randn(2, 9), torch.randn(3, 2)
    b[1] = 0
    assert dora_row_norms(torch.zeros(3, 9), a, b, 1.0)[1] == 0
    huge = torch.full((3, 9), 1e30)  # the squares do not fit into f32
    assert_close(dora_row_norms(huge, a, b, 1.0), torch.full((3,), 3e30, dtype=torch.float64), rtol=1e-6, atol=0)
    assert dora_row_norms(torch.full((3, 9), float("nan")), a, b, 1.0).isnan().all()


def leaves(inputs: LoraInputs, magnitude: torch.Tensor) -> list[torch.Tensor | None]:
    return [inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, magnitude]


def expected_of(inputs, magnitude, norms, dropout_p, rng, absolute=False):
    """y and gradients of the definition, in f64; with `absolute`, the sums of the magnitudes of all terms."""
    wide = [None if t is None else t.detach().double() for t in (*leaves(inputs, magnitude), inputs.dy)]
    if absolute:
        wide = [None if t is None else t.abs() for t in wide]
    *tensors, dy = wide
    for tensor in tensors:
        if tensor is not None:
            tensor.requires_grad_()
    # The norm as it is rounded to magnitude's dtype, since a magnitude in f64 would not round it.
    y = reference.dora_linear(*tensors, norms.to(magnitude.dtype).double(), inputs.scaling, dropout_p, rng)
    if absolute and dropout_p:  # |x - drop(x)| in place of the difference
        x, weight = tensors[0], tensors[1]
        y = y + 2 * x @ weight.T
    return y.detach(), torch.autograd.grad(y, [t for t in tensors if t is not None], dy)


def unit(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps / 2


def check(inputs: LoraInputs, magnitude_dtype=torch.float32, dropout_p=0.0, rng=None, given=False) -> None:
    magnitude = magnitudes(inputs.weight.shape[0], magnitude_dtype)
    norms = reference.dora_row_norms(inputs.weight, inputs.a, inputs.b, inputs.scaling)
    tensors = leaves(inputs, magnitude)
    wanted = [t.requires_grad_() for t in tensors if t is not None]
    rest = (inputs.scaling, dropout_p, rng)
    if given:
        y = dora_linear(*tensors, norms, *rest)
    else:
        y, norms = dora_linear_norms(*tensors, None, *rest)
        assert not norms.requires_grad
        assert_norms_from_products(norms, inputs)
    grads = torch.autograd.grad(y, wanted, inputs.dy)
    y_ref, grads_ref = expected_of(inputs, magnitude, norms, dropout_p, rng)
    y_size, grads_size = expected_of(inputs, magnitude, norms, dropout_p, rng, absolute=True)
    dtype = inputs.x.dtype
    sums = 4 * max(*inputs.x.shape, *inputs.weight.shape, *inputs.a.shape, 1) ** 0.5
    sums *= unit(torch.float64 if dtype == torch.float64 else torch.float32)
    names = ["y", *(name for name, t in zip(NAMES, tensors, strict=True) if t is not None)]
    results = zip(names, (y, *wanted), (y, *grads), (y_ref, *grads_ref), (y_size, *grads_size), strict=True)
    for name, leaf, result, result_ref, size in results:
        assert result.dtype == leaf.dtype
        # Products, rest and dz are rounded to the activations' dtype, the result to its own.
        limit = size * (sums + 4 * unit(dtype) + 2 * unit(leaf.dtype)) + torch.finfo(leaf.dtype).tiny
        excess = ((result.double() - result_ref).abs() / limit).max() if result.numel() else 0
        assert excess <= 1, f"{name}: {float(excess):.3g} x the allowed error"


def assert_norms_from_products(norms: torch.Tensor, inputs: LoraInputs) -> None:
    """As `assert_norms`, but of squares: a norm of which little is left has lost more."""
    weight, a, b = (t.detach() for t in (inputs.weight, inputs.a, inputs.b))
    exact = reference.dora_row_norms(weight, a, b, inputs.scaling)
    size = reference.dora_row_norms(weight.abs(), a.abs(), b.abs(), inputs.scaling).square()
    length = 8 + a.shape[0] ** 0.5 + weight.shape[1] ** 0.5
    limit = size * length * (2.0**-53 if weight.dtype == torch.float64 else 2.0**-24) * 4
    assert ((norms.square() - exact.square()).abs() <= limit).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_forward_and_backward(isa, dtype, in_features):
    """Every pair of widths with every number of tokens; ranks, biases and norms given or not take turns."""
    ranks, biases, given = itertools.cycle(RANKS), itertools.cycle([True, False, False]), itertools.cycle([True, False])
    for out_features, num_tokens in itertools.product([1, 17, 64, 300], TOKENS):
        check(
            lora_inputs(num_tokens, in_features, out_features, next(ranks), dtype, bias=next(biases)), given=next(given)
        )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_factors_and_magnitudes_in_another_dtype(isa, dtype, factor_dtype):
    check(lora_inputs(33, 129, 70, 12, dtype, factor_dtype), factor_dtype)
    check(lora_inputs(33, 129, 70, 12, dtype, factor_dtype), factor_dtype, 0.25, RNG, given=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.1, 0.5, 1.0])
@pytest.mark.parametrize("given", [True, False])
def test_dropout(isa, dtype, dropout_p, given):
    for num_tokens, width in [(1, 17), (7, 64), (130, 513)]:
        check(lora_inputs(num_tokens, width, 96, 8, dtype), dropout_p=dropout_p, rng=RNG, given=given)


@pytest.mark.parametrize("dtype", DTYPES)
def test_strides_and_leading_dimensions(isa, dtype):
    base = lora_inputs(24, 40, 36, 5, dtype)
    magnitude = torch.stack([magnitudes(36)] * 2, 1)[:, 0]
    norms = dora_row_norms(base.weight, base.a, base.b, base.scaling)
    y = dora_linear(base.x, base.weight, base.bias, base.a, base.b, magnitude, norms, base.scaling)
    others = zip(*(views(t) for t in (base.x, base.weight, base.a, base.b)), strict=True)
    for x, weight, a, b in others:
        other = dora_linear(x, weight, base.bias, a, b, magnitude, norms, base.scaling)
        assert other.is_contiguous()
        assert_near(other, y.double(), 40, roundings=4)
        stacked, _ = dora_linear_norms(
            x.reshape(2, 3, 4, 40), weight, base.bias, a, b, magnitude, dora_row_squares(weight), base.scaling
        )
        assert stacked.shape == (2, 3, 4, 36)
        assert_near(stacked.view(24, 36), y.double(), 40, roundings=4)
    assert dora_linear(base.x[0], base.weight, None, base.a, base.b, magnitude, norms, 1.0).shape == (36,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("magnitude_dtype", DTYPES)
def test_a_magnitude_that_is_the_norm_changes_nothing(isa, dtype, magnitude_dtype):
    inputs = lora_inputs(5, 64, 40, 4, dtype)
    norms = dora_row_norms(inputs.weight, inputs.a, inputs.b, inputs.scaling)
    arguments = (inputs.x, inputs.weight, None, inputs.a, inputs.b)
    y = dora_linear(*arguments, norms.to(magnitude_dtype), norms, inputs.scaling)
    z = torch.ops.pylora.lora_linear(*arguments, inputs.scaling)
    if magnitude_dtype == torch.float64 and dtype == torch.float32:
        assert_close(y, z)
    else:
        assert torch.equal(y, z)


def test_same_bits_for_any_thread_count():
    """The norms and the factor's part; the products are those of lora and of the base layer."""
    inputs = lora_inputs(300, 520, 390, 16)
    magnitude = magnitudes(390)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            norms = dora_row_norms(inputs.weight, inputs.a, inputs.b, 0.5)
            args = (inputs.dy, None, None, inputs.a, inputs.b, magnitude, norms, inputs.dy.contiguous(), None)
            grads = torch.ops.pylora.dora_linear_backward(*args, 0.5, 0.0, None, [False] * 5 + [True])
            results.append((norms, dora_row_squares(inputs.weight), grads[5]))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(t, u) for t, u in zip(results[0], result, strict=True))


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_gradcheck_and_double_backward(isa, dropout_p):
    inputs = lora_inputs(5, 9, 7, 3, torch.float64)
    tensors = [t.requires_grad_() for t in leaves(inputs, magnitudes(7, torch.float64))]
    norms = reference.dora_row_norms(*(t.detach() for t in (inputs.weight, inputs.a, inputs.b)), 0.5)

    def linear(*tensors):
        return dora_linear(*tensors, norms, 0.5, dropout_p, RNG)

    assert torch.autograd.gradcheck(linear, tensors)
    assert torch.autograd.gradgradcheck(linear, tensors)


def test_gradients_only_where_required():
    inputs = lora_inputs(6, 20, 30, 4)
    tensors = leaves(inputs, magnitudes(30).requires_grad_())
    norms = dora_row_norms(inputs.weight, inputs.a, inputs.b, 1.0)
    y = dora_linear(*tensors, norms, 1.0)
    y.backward(inputs.dy)
    assert [t.grad is None for t in tensors] == [True] * 5 + [False]


def test_no_graph_without_a_gradient_and_inference_mode():
    inputs = lora_inputs(3, 8, 8, 2)
    tensors = leaves(inputs, magnitudes(8))
    y, norms = dora_linear_norms(*tensors, None, 1.0)
    assert not y.requires_grad
    with torch.inference_mode():
        assert dora_linear(*tensors, norms, 1.0).is_inference()


def test_forward_mode_is_refused_not_dropped():
    inputs = lora_inputs(3, 8, 8, 2)
    with torch.autograd.forward_ad.dual_level():
        x = torch.autograd.forward_ad.make_dual(inputs.x, torch.ones_like(inputs.x))
        with pytest.raises(NotImplementedError, match="jvp"):
            dora_linear_norms(x, inputs.weight, None, inputs.a, inputs.b, magnitudes(8), None, 1.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_opcheck(dtype, dropout_p):
    inputs = lora_inputs(6, 16, 24, 4, dtype, torch.float32).requires_grad_()
    magnitude = magnitudes(24).requires_grad_()
    tensors = leaves(inputs, magnitude)
    rng = RNG if dropout_p else None
    norms = dora_row_norms(inputs.weight, inputs.a, inputs.b, 0.5)
    squares = dora_row_squares(inputs.weight)
    ops = torch.ops.pylora
    tolerances = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
    torch.library.opcheck(ops.dora_linear.default, (*tensors, norms, 0.5, dropout_p, rng), **tolerances)
    torch.library.opcheck(ops.dora_linear_norms.default, (*tensors, squares, 0.5, dropout_p, rng), **tolerances)
    torch.library.opcheck(ops.dora_row_norms.default, (inputs.weight, inputs.a, inputs.b, 0.5))
    torch.library.opcheck(ops.dora_row_squares.default, (inputs.weight,))
    detached = [t.detach() for t in tensors]
    for given in (norms, None):
        arguments = (*detached, given, squares, 0.5, dropout_p, rng)
        torch.library.opcheck(ops.dora_linear_forward.default, arguments)
    _, z, v, _ = ops.dora_linear_forward(*detached, norms, None, 0.5, dropout_p, rng)
    x, weight, _, a, b, magnitude = detached
    for needs in ([True] * 6, [True, False, False, True, False, True], [False] * 5 + [True], [False] * 6):
        arguments = (inputs.dy, x, weight, a, b, magnitude, norms, z, v, 0.5, dropout_p, rng, needs)
        torch.library.opcheck(ops.dora_linear_backward.default, arguments)


@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_compile_fullgraph(dropout_p):
    inputs = lora_inputs(6, 16, 24, 4).requires_grad_()
    tensors = leaves(inputs, magnitudes(24).requires_grad_())

    def layer(rng, x, *others):
        return dora_linear_norms(x * 2.0, *others, None, 0.5, dropout_p, rng)[0].relu()

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    y, y_compiled = layer(RNG, *tensors), compiled(RNG, *tensors)
    assert torch.equal(y, y_compiled)
    grads = torch.autograd.grad(y, tensors, inputs.dy)
    assert all(
        torch.equal(g, h) for g, h in zip(grads, torch.autograd.grad(y_compiled, tensors, inputs.dy), strict=True)
    )


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_takes_the_norms_of_the_stored_weight(low):
    inputs = lora_inputs(8, 32, 24, 4).requires_grad_()
    tensors = leaves(inputs, magnitudes(24).requires_grad_())
    exact = reference.dora_row_norms(*(t.detach() for t in (inputs.weight, inputs.a, inputs.b)), inputs.scaling)
    with torch.autocast("cpu", dtype=low):
        y, norms = dora_linear_norms(*tensors, None, inputs.scaling)
        again = dora_linear(*tensors, norms, inputs.scaling)
    assert y.dtype == low
    assert torch.equal(y, again)
    assert_close(norms, exact, rtol=2e-6, atol=0)
    y_ref, grads_ref = expected_of(inputs, tensors[-1], exact, 0.0, None)
    assert_near(y, y_ref, 32, roundings=6)
    for grad, grad_ref in zip(torch.autograd.grad(y, tensors, inputs.dy.to(low)), grads_ref, strict=True):
        assert grad.dtype == torch.float32
        assert_near(grad.to(low), grad_ref, 32, roundings=10)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_implementation_of_other_devices(dtype, dropout_p):
    """The ATen calls that serve devices without kernels, reached with CPU tensors through one's place in the table."""
    other_device = torch._C.DispatchKeySet(torch._C.DispatchKey.XPU)
    inputs = lora_inputs(11, 40, 24, 5, dtype, torch.float32)
    with torch.no_grad():
        inputs.weight[3] = (-inputs.scaling * (inputs.b[3].double() @ inputs.a.double())).to(dtype)
    tensors = leaves(inputs, magnitudes(24))
    rng = RNG if dropout_p else None
    ops = torch.ops.pylora
    norm_arguments = (inputs.weight, inputs.a, inputs.b, inputs.scaling)
    norms = ops.dora_row_norms(*norm_arguments)
    assert_close(ops.dora_row_norms.default.redispatch(other_device, *norm_arguments), norms, rtol=2e-6, atol=1e-9)
    squares = ops.dora_row_squares.default.redispatch(other_device, inputs.weight)
    assert_close(squares, ops.dora_row_squares(inputs.weight), rtol=2e-6, atol=0)
    outputs = [
        call(*tensors, norms, None, inputs.scaling, dropout_p, rng)
        for call in (
            lambda *args: ops.dora_linear_forward.default.redispatch(other_device, *args),
            ops.dora_linear_forward,
        )
    ]
    for mine, other in zip(*outputs, strict=True):
        assert mine.dtype == other.dtype
        if mine.numel():
            assert_near(mine, other.double(), 40, roundings=4)
    x, weight, _, a, b, magnitude = tensors
    _, z, v, _ = outputs[1]
    for needs in ([True] * 6, [False, True, False, True, False, True]):
        arguments = (inputs.dy, x, weight, a, b, magnitude, norms, z, v, inputs.scaling, dropout_p, rng, needs)
        grads = ops.dora_linear_backward.default.redispatch(other_device, *arguments)
        for grad, kernel in zip(grads, ops.dora_linear_backward(*arguments), strict=True):
            assert grad.dtype == kernel.dtype
            if grad.numel():
                assert_close(grad, kernel, rtol=0, atol=float(kernel.abs().max()) * 8 * torch.finfo(dtype).eps + 1e-12)


def call_norms(**changes):
    inputs = lora_inputs(4, 8, 6, 2)
    arguments = {"weight": inputs.weight, "a": inputs.a, "b": inputs.b, "scaling": 1.0} | changes
    return dora_row_norms(**arguments)


def call_linear(**changes):
    inputs = lora_inputs(4, 8, 6, 2)
    arguments = {
        "x": inputs.x,
        "weight": inputs.weight,
        "bias": inputs.bias,
        "a": inputs.a,
        "b": inputs.b,
        "magnitude": magnitudes(6),
        "norms": torch.ones(6, dtype=torch.float64),
        "scaling": 1.0,
        "dropout_p": 0.0,
        "rng": None,
    } | changes
    return dora_linear(**arguments)


BAD_NORMS = [
    ({"weight": torch.zeros(8)}, ValueError, "dora_row_norms: weight: expected 2 dimensions, got shape [8]"),
    ({"weight": torch.zeros(6, 8, dtype=torch.int8)}, TypeError, "dora_row_norms: weight: expected float32"),
    ({"a": torch.zeros(2, 7)}, ValueError, "dora_row_norms: a: expected shape [-1, 8] (-1: any), got [2, 7]"),
    ({"b": torch.zeros(6, 3)}, ValueError, "dora_row_norms: b: expected shape [6, 2] (-1: any), got [6, 3]"),
    ({"b": torch.zeros(6, 2).half()}, TypeError, "dora_row_norms: b: expected the dtype of a"),
    ({"a": torch.zeros(0, 8), "b": torch.zeros(6, 0)}, ValueError, "a: expected a rank of at least 1"),
    ({"a": torch.zeros(2, 8, device="meta")}, ValueError, "dora_row_norms: a: expected the device of weight"),
]
BAD_LINEAR = [
    ({"x": torch.zeros(4, 9)}, ValueError, "dora_linear: weight: expected shape [-1, 9] (-1: any), got [6, 8]"),
    ({"x": torch.zeros(4, 8).half()}, TypeError, "dora_linear: weight: expected the dtype of x"),
    ({"bias": torch.zeros(5)}, ValueError, "dora_linear: bias: expected shape [6] (-1: any), got [5]"),
    ({"magnitude": torch.zeros(1, 6)}, ValueError, "dora_linear: magnitude: expected shape [6] (-1: any), got [1, 6]"),
    ({"magnitude": torch.zeros(6).int()}, TypeError, "dora_linear: magnitude: expected float32"),
    ({"norms": torch.zeros(5).double()}, ValueError, "dora_linear: norms: expected shape [6] (-1: any), got [5]"),
    ({"norms": torch.zeros(6)}, TypeError, "dora_linear: norms: expected float64, got Float"),
    ({"norms": torch.zeros(12).double()[::2]}, ValueError, "dora_linear: norms: expected a contiguous tensor"),
    ({"dropout_p": 1.5}, ValueError, "dora_linear: dropout_p: expected a probability in [0, 1], got 1.5"),
    ({"norms": torch.zeros(6, device="meta").double()}, ValueError, "dora_linear: norms: expected the device of x"),
]


@pytest.mark.parametrize(("changes", "error", "message"), BAD_NORMS, ids=lambda value: str(value)[:30])
def test_bad_arguments_of_the_norms(changes, error, message):
    with pytest.raises(error) as raised:
        call_norms(**changes)
    assert message in str(raised.value)


@pytest.mark.parametrize(("changes", "error", "message"), BAD_LINEAR, ids=lambda value: str(value)[:30])
def test_bad_arguments_of_the_linear_layer(changes, error, message):
    with pytest.raises(error) as raised:
        call_linear(**changes)
    assert message in str(raised.value)


def test_backward_says_what_it_lacks():
    inputs = lora_inputs(4, 8, 6, 2)
    norms = torch.ones(6, dtype=torch.float64)
    arguments = (inputs.dy, None, None, inputs.a, inputs.b, magnitudes(6), norms, None, None, 1.0, 0.0, None)
    for index, name in [(0, "weight"), (1, "x"), (3, "x"), (4, "v"), (5, "z")]:
        needs = [position == index for position in range(6)]
        with pytest.raises(ValueError, match=f"dora_linear_backward: {name}: expected a tensor"):
            torch.ops.pylora.dora_linear_backward(*arguments, needs)
