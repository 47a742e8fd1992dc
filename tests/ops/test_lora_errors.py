"""Bad arguments of the lora ops: the error's type, and a message that names the argument and both values."""

import pytest
import torch

from pylora.ops import lora_add, lora_linear
from pylora.testing.factories import lora_inputs


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


def test_a_factor_that_does_not_fit_is_named():
    inputs = lora_inputs(4, 8, 6, 2)
    op, arguments = torch.ops.pylora.lora_linear_scaled, (inputs.x, inputs.weight, None, inputs.a, inputs.b)
    with pytest.raises(ValueError, match=r"lora_linear_scaled: factor: expected shape \[6\] .* got \[5\]"):
        op(*arguments, torch.ones(5), 1.0)
    with pytest.raises(TypeError, match="factor: expected Float, got Double"):
        op(*arguments, torch.ones(6, dtype=torch.float64), 1.0)
    with pytest.raises(ValueError, match="factor: expected a contiguous tensor"):
        op(*arguments, torch.ones(12)[::2], 1.0)


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


def test_missing_rng_is_named_by_the_op():
    inputs = lora_inputs(4, 8, 6, 2)
    with pytest.raises(ValueError, match=r"lora_linear: rng: expected an int64 tensor \[seed, offset\]"):
        torch.ops.pylora.lora_linear(inputs.x, inputs.weight, None, inputs.a, inputs.b, 1.0, 0.5, None)
