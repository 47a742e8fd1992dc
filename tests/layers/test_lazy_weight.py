"""The tensor W + lhs · rhs that is not made: every rule against the dense sum, values and gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pylora.layers.lazy_weight import LazyWeight, Parts

N, ROWS, COLUMNS, RANK = 4, 24, 32, 2


def parts(dim: int = 3, dtype: torch.dtype = torch.float64) -> Parts:
    stack = (N,) if dim == 3 else ()
    shapes = ((*stack, ROWS, COLUMNS), (*stack, ROWS, RANK), (*stack, RANK, COLUMNS))
    return Parts(*(torch.randn(shape, dtype=dtype, requires_grad=i > 0) for i, shape in enumerate(shapes)))


class Function(torch.autograd.Function):
    """Does not go through `__torch_function__`."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return x @ weight

    @staticmethod
    def backward(ctx, grad):
        x, weight = ctx.saved_tensors
        return grad @ weight.mT, x.mT @ grad


class Largest(TorchDispatchMode):
    """Notes the size of the largest result that has storage of its own."""

    size = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if type(result) is torch.Tensor and not func.is_view and result.numel() > self.size:
            self.size = result.numel()
        return result


OFFSETS = torch.tensor([1, 1, 3, 8], dtype=torch.int32)
X = {n: torch.randn(8, n, dtype=torch.float64) for n in (ROWS, COLUMNS)}
BATCH = {n: torch.randn(N, 3, n, dtype=torch.float64) for n in (ROWS, COLUMNS)}
LAZY = {
    "linear": lambda w: F.linear(X[COLUMNS], w[1], torch.ones(ROWS, dtype=torch.float64)),
    "linear by keywords": lambda w: F.linear(X[COLUMNS], weight=w[1], bias=None),
    "linear of a transposed one": lambda w: F.linear(X[ROWS], w[1].T),
    "linear by a tensor index": lambda w: F.linear(X[COLUMNS], w[torch.tensor(2)]),
    "matmul": lambda w: X[ROWS] @ w[0],
    "matmul with a vector": lambda w: w[0] @ X[COLUMNS][0],
    "vector matmul": lambda w: X[ROWS][0] @ w[0],
    "mm": lambda w: torch.mm(X[ROWS], w[3]),
    "left matmul": lambda w: w[0].matmul(X[COLUMNS].T),
    "bmm": lambda w: torch.bmm(BATCH[ROWS], w),
    "left bmm": lambda w: torch.bmm(w, BATCH[COLUMNS].mT),
    "bmm of a transposed one": lambda w: torch.bmm(BATCH[COLUMNS], w.transpose(1, 2)),
    "mT": lambda w: BATCH[COLUMNS].matmul(w.mT),
    "t": lambda w: X[COLUMNS] @ w[1].t(),
    "broadcast": lambda w: X[ROWS] @ w,
    "slice": lambda w: torch.bmm(BATCH[ROWS][1:3], w[1:3]),
}
DENSE = {
    "gather": lambda w: torch.bmm(BATCH[ROWS], w[torch.tensor([3, 3, 0, 1])]),
    "sum": lambda w: (w * 2).sum(0),
    "cat": lambda w: torch.cat([w, w]),
    "other index": lambda w: w[0, 1:3],
    "other transpose": lambda w: w.transpose(0, 1),
    "einsum": lambda w: torch.einsum("bi,eio->beo", X[ROWS], w),
    "function": lambda w: Function.apply(X[ROWS], w[0]),
    "keywords": lambda w: torch.bmm(BATCH[ROWS], mat2=w),
    "two lazy ones": lambda w: torch.bmm(w, w.mT),
    "to": lambda w: w.to(torch.float32).sum(),
}


@pytest.mark.parametrize("use", [*LAZY.values(), *DENSE.values()], ids=[*LAZY, *DENSE])
def test_values_and_gradients(use: Callable[[torch.Tensor], torch.Tensor]) -> None:
    leaves = parts()
    results = []
    for weight in (LazyWeight.make(leaves), leaves.dense()):
        output = use(weight)
        assert type(output) is torch.Tensor
        results.append((output.detach(), torch.autograd.grad(output.square().sum(), [leaves.lhs, leaves.rhs])))
        with torch.no_grad():
            torch.testing.assert_close(use(LazyWeight.make(leaves)), output)
        with torch.inference_mode():
            torch.testing.assert_close(use(LazyWeight.make(leaves)), output)
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("use", LAZY)
def test_the_sum_is_not_made(use) -> None:
    weight = LazyWeight.make(parts())
    with Largest() as largest:
        LAZY[use](weight)
    # The result of "broadcast" alone is larger than one matrix.
    assert largest.size < ROWS * COLUMNS * (N if use == "broadcast" else 1)


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_mm(transposed, dtype) -> None:
    leaves = parts(dtype=dtype)
    x = X[COLUMNS if transposed else ROWS].to(dtype)
    results = []
    for weight in (LazyWeight.make(leaves), leaves.dense()):
        output = F.grouped_mm(x, weight.transpose(-2, -1) if transposed else weight, offs=OFFSETS)
        grads = torch.autograd.grad(output.float().square().sum(), [leaves.lhs, leaves.rhs])
        results.append([output, *grads])
    for ours, theirs in zip(*results, strict=True):
        bound = (1e-4 if dtype is torch.float32 else 5e-2) * theirs.abs().max().item()
        torch.testing.assert_close(ours, theirs, rtol=0, atol=bound)


def test_questions_make_nothing() -> None:
    leaves = parts(2, torch.bfloat16)
    weight = LazyWeight.make(leaves)
    with Largest() as largest:
        assert weight.shape == (ROWS, COLUMNS)
        assert weight.size(0) == len(weight) == ROWS
        assert weight.dtype is torch.bfloat16
        assert weight.device == leaves.weight.device
        assert (weight.ndim, weight.dim(), weight.numel()) == (2, 2, ROWS * COLUMNS)
        assert weight.requires_grad
        assert weight.is_contiguous()
        assert not weight.is_nested
        assert repr(weight) == "LazyWeight((24, 32), dtype=torch.bfloat16, rank=2)"
    assert largest.size == 0


def test_a_trained_weight_gets_its_gradient() -> None:
    leaves = parts()
    leaves.weight.requires_grad_()
    for use in (LAZY["bmm"], DENSE["sum"], DENSE["function"]):
        wanted = torch.autograd.grad(use(leaves.dense()).sum(), leaves.weight)
        torch.testing.assert_close(torch.autograd.grad(use(LazyWeight.make(leaves)).sum(), leaves.weight), wanted)
