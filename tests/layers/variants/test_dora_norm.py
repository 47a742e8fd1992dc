"""The row norms of W + s·B·A from the factors, against the norms of the matrix itself in f64."""

import math

import pytest
import torch
from torch.testing import assert_close

from pylora.layers.variants.dora_norm import row_norms


def direct(weight, a, b, scaling):
    return (weight.double() + scaling * (b.double() @ a.double())).norm(dim=1)


def factors(out_features, in_features, rank=4, dtype=torch.float32):
    return (
        torch.randn(out_features, in_features).to(dtype),
        torch.randn(rank, in_features) / math.sqrt(in_features),
        torch.randn(out_features, rank),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (7, 300), (300, 7), (64, 1000)], ids=str)
@pytest.mark.parametrize("scaling", [0.0, -1.5, 0.25])
def test_as_of_the_whole_matrix(dtype, shape, scaling):
    weight, a, b = factors(*shape, dtype=dtype)
    norms = row_norms(weight, a, b, scaling)
    assert norms.dtype == torch.float64
    assert_close(norms, direct(weight, a, b, scaling), rtol=1e-6, atol=1e-9)


def test_any_strides():
    weight, a, b = factors(50, 40)
    expected = direct(weight, a, b, 2.0)
    for view in (weight, weight.t().contiguous().t(), torch.cat([weight, weight], 1)[:, :40]):
        assert_close(row_norms(view, a, b, 2.0), expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("left", [0.0, 1e-6, 1e-3, 3e-2])
def test_rows_that_cancel(left):
    """B·A takes all but a share `left` of some rows of W away."""
    torch.manual_seed(1)
    a = torch.randn(4, 200)
    b = torch.randn(30, 4)
    weight = -(b @ a)
    weight[::3] += torch.randn(10, 200) * 5
    weight[1::3] += left * torch.randn(10, 200)
    expected = direct(weight, a, b, 1.0)
    assert_close(row_norms(weight, a, b, 1.0), expected, rtol=5e-5, atol=1e-12)


def test_rows_of_zeros():
    _, a, b = factors(3, 5)
    b[1] = 0
    assert row_norms(torch.zeros(3, 5), a, b, 1.0)[1] == 0


def test_scaling_may_be_a_tensor():
    weight, a, b = factors(6, 5)
    assert_close(row_norms(weight, a, b, torch.tensor(0.5)), row_norms(weight, a, b, 0.5))


def test_no_gradient_and_no_autocast():
    weight, a, b = (tensor.requires_grad_() for tensor in factors(6, 50))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        norms = row_norms(weight, a, b, 1.0)
    assert not norms.requires_grad
    assert_close(norms, direct(weight, a, b, 1.0).detach(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("on_meta", [0, 1, 2])
def test_meta(on_meta):
    tensors = list(factors(6, 5))
    tensors[on_meta] = tensors[on_meta].to("meta")
    norms = row_norms(*tensors, 1.0)
    assert norms.is_meta
    assert norms.shape == (6,)


def test_factors_in_two_dtypes():
    weight, a, b = factors(6, 5)
    assert_close(row_norms(weight, a.half(), b.bfloat16(), 0.5), direct(weight, a.half(), b.bfloat16(), 0.5))


def test_nothing_of_the_weight_s_size_is_made():
    weight, a, b = factors(256, 4096)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        row_norms(weight, a, b, 1.0)
    largest = max(event.cpu_memory_usage for event in profile.events())
    assert 0 < largest <= weight.nbytes / 8


def test_no_elements():
    assert row_norms(torch.zeros(0, 4), torch.zeros(2, 4), torch.zeros(0, 2), 1.0).shape == (0,)


def test_in_a_compiled_graph():
    weight, a, b = factors(6, 50)
    weight[2] = -(b[2] @ a)  # a row that cancels
    compiled = torch.compile(lambda *args: row_norms(*args) * 2, backend="eager", fullgraph=True)
    for scaling in (1.0, torch.tensor(0.5)):
        assert_close(compiled(weight, a, b, scaling), row_norms(weight, a, b, scaling) * 2)
