"""lora's CUDA launchers (csrc/lora/lora.cu), emulated, held to the op's definition in f64."""

import itertools

import pytest
import torch

from pylora.ops.reference import lora as reference
from pylora.ops.reference.lora import lora_dropout
from pylora.testing.cuda_segments import accumulator
from pylora.testing.emulator import emulated
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.lora import RNG
from pylora.testing.tolerances import assert_near

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
]
"""dtypes of the activations and of the factors."""
WIDTHS = [1, 17, 64, 200]
G_ERROR_TERMS = 2**14
"""v, g and factors in two bf16 are good to 2^-17 of their terms, 128 units of f32: as long a sum's error as this."""


@pytest.fixture
def device(schedule):
    with emulated(schedule) as module:
        yield module


def shape_of(inputs: LoraInputs) -> dict:
    return {
        "num_tokens": len(inputs.x),
        "in_features": inputs.x.shape[1],
        "out_features": len(inputs.b),
        "rank": len(inputs.a),
        "dtype": inputs.x.dtype,
        "factor_dtype": inputs.a.dtype,
    }


def workspace_of(device, inputs: LoraInputs, function: str) -> torch.Tensor:
    """NaN but for the counters."""
    shape = shape_of(inputs)
    workspace = torch.full((getattr(device.lora, function)(**shape),), 0xFF, dtype=torch.uint8)
    workspace[: device.lora.counter_bytes(**shape)] = 0
    return workspace


def forward(device, inputs: LoraInputs, base: torch.Tensor, dropout=None) -> tuple[torch.Tensor, torch.Tensor]:
    shape = shape_of(inputs)
    y, v = base.clone(), torch.full((len(inputs.x), len(inputs.a)), torch.nan, dtype=accumulator(inputs.x.dtype))
    workspace = workspace_of(device, inputs, "forward_workspace_bytes")
    more = {} if dropout is None else {"dropout": dropout}
    tensors = {"x": inputs.x, "a": inputs.a, "b": inputs.b}
    device.lora.forward(**shape, **tensors, **more, scaling=inputs.scaling, y=y, v=v, workspace=workspace)
    assert not workspace[: device.lora.counter_bytes(**shape)].any()
    return y, v


def backward(device, inputs: LoraInputs, v: torch.Tensor, base: torch.Tensor, dropout=None):
    """dx, da, db."""
    shape = shape_of(inputs)
    dx = base.clone()
    da, db = torch.full_like(inputs.a, torch.nan), torch.full_like(inputs.b, torch.nan)
    workspace = workspace_of(device, inputs, "backward_workspace_bytes")
    more = {} if dropout is None else {"dropout": dropout}
    tensors = {"x": inputs.x, "a": inputs.a, "b": inputs.b, "dy": inputs.dy, "v": v, "dx": dx, "da": da, "db": db}
    device.lora.backward(**shape, **tensors, **more, scaling=inputs.scaling, workspace=workspace)
    assert not workspace[: device.lora.counter_bytes(**shape)].any()
    return dx, da, db


def definition(inputs: LoraInputs, base_y, base_dx, dropout=None, absolute: bool = False):
    """y, dx, da, db in f64."""
    wide = [t.double() for t in (inputs.x, inputs.a, inputs.b, inputs.dy, base_y, base_dx)]
    x, a, b, dy, base_y, base_dx = [t.abs() if absolute else t for t in wide]
    x, a, b = (t.requires_grad_() for t in (x, a, b))
    p, rng = dropout or (0.0, None)
    delta = reference.lora_add(torch.zeros_like(base_y), x, a, b, inputs.scaling, p, rng)
    dx, da, db = torch.autograd.grad(delta, (x, a, b), dy)
    return base_y + delta.detach(), base_dx + dx, da, db


def check(device, inputs: LoraInputs, dropout=None) -> None:
    base_y, base_dx = torch.randn_like(inputs.dy), torch.randn_like(inputs.x)
    y, v = forward(device, inputs, base_y, dropout)
    p, rng = dropout or (0.0, None)
    expected_v = lora_dropout(inputs.x, p, rng) @ inputs.a.double().T
    size_v = lora_dropout(inputs.x, p, rng).abs() @ inputs.a.double().abs().T
    sums_in = accumulator(inputs.x.dtype)
    assert_near(v, expected_v, inputs.x.shape[1], "v", size_v, sums_in=sums_in)
    results = (y, *backward(device, inputs, v, base_dx, dropout))
    sizes = definition(inputs, base_y, base_dx, dropout, absolute=True)
    length = max(*inputs.x.shape, *inputs.dy.shape) + (0 if sums_in == torch.float64 else G_ERROR_TERMS)
    is_exact = inputs.x.dtype in (torch.float32, torch.float64)
    if is_exact:
        length -= 0 if sums_in == torch.float64 else G_ERROR_TERMS
    wanted = definition(inputs, base_y, base_dx, dropout)
    for name, result, expected, size in zip(("y", "dx", "da", "db"), results, wanted, sizes, strict=True):
        assert_near(result, expected, length, name, size, sums_in=sums_in)


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_grid(device, dtype, factor_dtype):
    """Every pair of widths; ranks, numbers of tokens and dropout take turns."""
    ranks, tokens = itertools.cycle([8, 1, 16, 70, 3]), itertools.cycle([1, 65, 8, 130, 17, 2])
    dropouts = itertools.cycle([None, (0.3, RNG), None])
    for in_features, out_features in itertools.product(WIDTHS, WIDTHS):
        inputs = lora_inputs(next(tokens), in_features, out_features, next(ranks), dtype, factor_dtype, bias=False)
        check(device, inputs, next(dropouts))


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_empty(device, dtype, factor_dtype):
    """No tokens: the factors' gradients are zeros. No columns: nothing to add."""
    for tokens, in_features, out_features in [(0, 8, 16), (3, 0, 8), (3, 8, 0)]:
        inputs = lora_inputs(tokens, in_features, out_features, 4, dtype, factor_dtype, bias=False)
        base = torch.randn_like(inputs.dy)
        y, v = forward(device, inputs, base)
        assert torch.equal(y, base) or in_features > 0
        dx, da, db = backward(device, inputs, v, torch.zeros_like(inputs.x))
        assert bool(dx.isfinite().all())
        if tokens == 0:
            assert not da.any()
            assert not db.any()


@pytest.mark.emulator
def test_few_tokens_take_one_launch(device):
    inputs = lora_inputs(16, 256, 256, 16, torch.bfloat16, bias=False)
    device.take_launches()
    forward(device, inputs, torch.zeros_like(inputs.dy))
    assert ["decode_kernel" in launch["kernel"] for launch in device.take_launches()] == [True]
    forward(device, inputs, torch.zeros_like(inputs.dy), (0.5, RNG))
    assert ["decode_kernel" in launch["kernel"] for launch in device.take_launches()] == [False, False]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_of_any_strides(device, dtype):
    inputs = lora_inputs(70, 40, 24, 6, dtype, bias=False)
    y, v = forward(device, inputs, inputs.dy)
    inputs.a = inputs.a.T.contiguous().T
    inputs.b = torch.cat([inputs.b, inputs.b.new_full((24, 3), torch.nan)], 1)[:, :6]
    y_strided, v_strided = forward(device, inputs, inputs.dy)
    close = {"magnitude": v.double().abs() + 1, "sums_in": torch.float32}
    assert_near(v_strided, v.double(), 40, "v", **close)
    assert_near(y_strided, y.double(), 46, "y", magnitude=y.double().abs() + 1)
