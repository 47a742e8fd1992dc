"""lora_linear and lora_add on the CPU: values and gradients against their definitions in f64."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylora.ops import lora_add, lora_linear
from pylora.ops.reference import lora as reference
from pylora.testing.factories import lora_inputs
from pylora.testing.lora import DTYPES, RNG, check_lora, lora_expected
from pylora.testing.tolerances import assert_near

RANKS = [1, 3, 8, 16, 64, 200]
WIDTHS = [0, 1, 17, 64, 1000]
TOKENS = [0, 1, 2, 3, 7, 50]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("in_features", WIDTHS)
def test_forward_and_backward(isa, dtype, in_features):
    """Every pair of widths with every number of tokens; ranks and bias take turns, so that each meets each width."""
    ranks, biases = itertools.cycle(RANKS), itertools.cycle([True, False, False])
    for out_features, num_tokens in itertools.product(WIDTHS, TOKENS):
        check_lora(lora_inputs(num_tokens, in_features, out_features, next(ranks), dtype, bias=next(biases)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_base_products_of_many_rows(isa, dtype, transposed):
    """More rows than one block of the packed product, with ends in every direction; weights stored [in, out] too."""
    for num_tokens, in_features, out_features in [(200, 300, 70), (193, 64, 33), (30, 2100, 40)]:
        inputs = lora_inputs(num_tokens, in_features, out_features, 4, dtype)
        if transposed:
            inputs.weight = inputs.weight.t().contiguous().t()
        check_lora(inputs)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_rank(isa, dtype):
    for rank, (in_features, out_features) in itertools.product(RANKS, [(17, 64), (130, 33)]):
        check_lora(lora_inputs(29, in_features, out_features, rank, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_high_rank_or_great_width(isa, dtype):
    """Around the limits of what gemv stages on the stack: ranks of 512, widths of 8192."""
    for num_tokens, in_features, rank in [(1, 40, 512), (2, 40, 513), (3, 40, 600), (1, 8192, 3), (3, 8200, 16)]:
        check_lora(lora_inputs(num_tokens, in_features, 37, rank, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_factors_in_another_dtype(isa, dtype, factor_dtype):
    check_lora(lora_inputs(33, 129, 70, 12, dtype, factor_dtype))
    check_lora(lora_inputs(33, 129, 70, 12, dtype, factor_dtype), 0.25, RNG)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_tokens", [1, 5, 200])
def test_a_factor_for_each_output(isa, dtype, num_tokens):
    """In the product's own pass, and after torch's product (f64, and f32 of 200 rows)."""
    inputs = lora_inputs(num_tokens, 40, 37, 6, dtype)
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    factor = torch.linspace(-2.0, 3.0, 37, dtype=accumulator)
    arguments = (inputs.a, inputs.b)
    y = torch.ops.pylora.lora_linear_scaled(inputs.x, inputs.weight, inputs.bias, *arguments, factor, inputs.scaling)
    z = reference.lora_linear(inputs.x, inputs.weight, None, *arguments, inputs.scaling)
    assert y.dtype == dtype
    assert_near(y, factor.double() * z + inputs.bias.double(), 46, roundings=4)


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
    _, grads_ref = lora_expected(inputs)
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


def test_row_does_not_depend_on_its_batch(isa):
    """Tiles of every height among the slices; a scaling that is no power of two, which would hide a rounding."""
    inputs = lora_inputs(61, 200, 150, 9)
    whole = lora_add(inputs.dy, inputs.x, inputs.a, inputs.b, 0.7)
    for rows in (slice(0, 1), slice(1, 3), slice(5, 9), slice(12, 17), slice(17, 60)):
        assert torch.equal(whole[rows], lora_add(inputs.dy[rows], inputs.x[rows], inputs.a, inputs.b, 0.7))


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
    check_lora(lora_inputs(num_tokens, *widths, rank, dtype, bias=bias), dropout_p, RNG)
