"""uniform_, held to torch's own draws bit for bit: the numbers, and where the generator is left."""

import pytest
import torch

from pylora.ops import uniform_
from pylora.ops.reference import uniform as reference


def drawn(fill, out, bound, skip, seed=3, before=0):
    """`out` filled, then the generator's state and what torch draws next from it."""
    torch.manual_seed(seed)
    torch.rand(before)
    fill(out, bound, skip)
    return out, torch.get_rng_state(), torch.rand(5), torch.randn(17)


def check(make, bound, skip, **kwargs):
    expected = drawn(reference.uniform_, make(), bound, skip, **kwargs)
    for mine, theirs in zip(drawn(uniform_, make(), bound, skip, **kwargs), expected, strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("size", [0, 1, 7, 623, 624, 625, 5000])
@pytest.mark.parametrize("skip", [0, 1, 623, 624, 625, 1248, 4001])
def test_every_place_in_the_generators_block(isa, size, skip):
    for before in (0, 1, 622, 623, 624):
        check(lambda: torch.full((size,), torch.nan), 0.3, skip, before=before)


@pytest.mark.parametrize("bound", [0.0, 1e-45, 1e-38, 0.0441941738, 1.0, 3e37, 1.7e38])
def test_every_bound(isa, bound):
    check(lambda: torch.empty(2000), bound, 10)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_dtypes(dtype):
    check(lambda: torch.empty(700, dtype=dtype), 0.25, 99)


def test_strides():
    check(lambda: torch.zeros(40, 30).t(), 0.5, 3)
    check(lambda: torch.zeros(40, 30)[:, ::2], 0.5, 3)


def test_another_seed_gives_other_numbers():
    first, second = (drawn(uniform_, torch.empty(100), 1.0, 0, seed=seed)[0] for seed in (1, 2))
    assert not torch.equal(first, second)


def test_a_pending_normal_number_stays():
    """torch keeps the second number of a Box-Muller pair; a uniform draw in between does not lose it."""

    def normal_after(fill):
        torch.manual_seed(1)
        first = torch.empty((), dtype=torch.float64).normal_()
        fill(torch.empty(10), 1.0, 5)
        return first, torch.empty((), dtype=torch.float64).normal_()

    assert normal_after(uniform_) == normal_after(reference.uniform_)


def test_counts_as_a_write_and_needs_no_graph():
    out = torch.nn.Parameter(torch.zeros(4))
    before = out._version
    uniform_(out, 1.0)
    assert out._version == before + 1
    assert out.grad_fn is None
    assert out.requires_grad


def test_opcheck():
    torch.library.opcheck(
        torch.ops.pylora.uniform_,
        (torch.empty(30), 0.0, 4),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_under_fake_tensors():
    from torch._subclasses import FakeTensorMode

    state = torch.get_rng_state()
    with FakeTensorMode():
        uniform_(torch.empty(10), 1.0, 100)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    ("out", "bound", "skip", "error", "message"),
    [
        (torch.empty(3, dtype=torch.int64), 1.0, 0, TypeError, "uniform_: out: expected float32, bfloat16"),
        (torch.empty(3), -1.0, 0, ValueError, r"uniform_: bound: expected a number in \[0, 1.7"),
        (torch.empty(3), float("nan"), 0, ValueError, "uniform_: bound"),
        (torch.empty(3), 2e38, 0, ValueError, "uniform_: bound"),
        (torch.empty(3), 1.0, -1, ValueError, "uniform_: skip: expected 0 or more, got -1"),
    ],
)
def test_errors_leave_the_generator(out, bound, skip, error, message):
    state = torch.get_rng_state()
    with pytest.raises(error, match=message):
        uniform_(out, bound, skip)
    assert torch.equal(torch.get_rng_state(), state)
