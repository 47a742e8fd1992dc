"""multi_lora's CUDA launchers (csrc/multi_lora/multi_lora.cu), emulated, held to the op's definition in f64."""

import itertools
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pylora.ops.plan import BatchPlan
from pylora.ops.reference.multi_lora import multi_lora_linear
from pylora.testing.cuda_segments import accumulator, planes, shifted
from pylora.testing.emulator import SCHEDULES, emulated
from pylora.testing.lora import RNG
from pylora.testing.pools import token_slots
from pylora.testing.tolerances import assert_near

PAIRS = [
    (torch.float32, torch.float32),
    (torch.bfloat16, torch.bfloat16),
    (torch.float16, torch.float16),
    (torch.float64, torch.float64),
    (torch.bfloat16, torch.float32),
]
"""dtypes of the activations and of the adapters."""
WIDTHS = [1, 17, 64, 200]
RANKS = [[8, 8], [1, 3, 16], [64, 5], [70, 16, 2]]
POPULARITIES = ["one", "distinct", "uniform", "zipf", "skewed", "none"]
PART_TERMS = 2**14
"""v, g and factors in two bf16 are good to 2^-17 of their terms, 128 units of f32: as long a sum's error as this."""


@pytest.fixture
def device(schedule):
    with emulated(schedule) as module:
        yield module


class Batch(NamedTuple):
    x: Tensor
    dy: Tensor
    a: list[Tensor]
    b: list[Tensor]
    scalings: list[float]
    row_slots: Tensor
    dropouts: list[tuple[float, Tensor]]
    tokens_per_row: int

    def fields(self, plan: BatchPlan, on_device: bool) -> dict[str, Any]:
        where = "" if on_device else "host_"
        return {
            f"{where}order": plan.order,
            f"{where}indptr": plan.segment_indptr,
            f"{where}plan_slots": plan.segment_slots,
            "on_device": on_device,
            "num_tokens": len(self.x),
            "in_features": self.x.shape[1],
            "out_features": self.dy.shape[1],
            "v_stride": max(len(each) for each in self.a),
            "dtype": self.x.dtype,
            "a": self.a,
            "b": self.b,
            "scalings": self.scalings,
            "dropouts": self.dropouts,
            "num_segments": len(plan.segment_slots),
            "tokens_per_row": self.tokens_per_row,
        }

    def definition(self, base_y: Tensor, base_dx: Tensor, absolute: bool = False):
        """y, dx and, for each adapter, da and db, in f64."""
        wide = [t.double() for t in (self.x, self.dy, base_y, base_dx, *self.a, *self.b)]
        x, dy, base_y, base_dx, *factors = [t.abs() if absolute else t for t in wide]
        leaves = [t.requires_grad_() for t in (x, *factors)]
        a, b = leaves[1 : 1 + len(self.a)], leaves[1 + len(self.a) :]
        weight = torch.zeros(dy.shape[1], x.shape[1], dtype=torch.float64)
        slots = self.row_slots.repeat_interleave(self.tokens_per_row).tolist()
        probabilities = [p for p, _ in self.dropouts]
        delta = multi_lora_linear(x, weight, None, a, b, self.scalings, slots, probabilities, RNG)
        if not delta.requires_grad:
            return base_y, base_dx, [torch.zeros_like(t) for t in factors]
        dx, *grads = torch.autograd.grad(delta, leaves, dy, allow_unused=True, materialize_grads=True)
        return base_y + delta.detach(), base_dx + dx, grads


def batch_of(
    rows: int,
    in_features: int,
    out_features: int,
    ranks: list[int],
    dtype: torch.dtype,
    factor_dtype: torch.dtype,
    popularity: str = "uniform",
    dropouts: tuple[float, ...] = (),
    tokens_per_row: int = 1,
    seed: int = 0,
) -> Batch:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    a = [normal(rank, in_features, scale=in_features**-0.5).to(factor_dtype) for rank in ranks]
    b = [normal(out_features, rank, scale=rank**-0.5).to(factor_dtype) for rank in ranks]
    probabilities = [*dropouts, *[0.0] * len(ranks)][: len(ranks)]
    return Batch(
        normal(rows * tokens_per_row, in_features).to(dtype),
        normal(rows * tokens_per_row, out_features).to(dtype),
        a,
        b,
        [0.5 + i for i in range(len(ranks))],
        token_slots(popularity, rows, len(ranks), seed),
        [(p, RNG) for p in probabilities],
        tokens_per_row,
    )


def run(device, batch: Batch, base_y: Tensor, base_dx: Tensor, on_device: bool, offset: int = 0):
    """y, dx, and the gradients of a, then of b."""
    fields = batch.fields(BatchPlan.from_slots(batch.row_slots), on_device)
    y, dx = shifted(base_y, offset), shifted(base_dx, offset)
    x, dy = shifted(batch.x, offset), shifted(batch.dy, offset)
    v = torch.full((len(x), fields["v_stride"]), torch.nan, dtype=accumulator(x.dtype))
    workspace = planes(device.multi_lora.forward_workspace_bytes(**fields))
    device.multi_lora.forward(**fields, x=x, y=y, v=v, workspace=workspace)
    da, db = ([torch.full_like(factor, torch.nan) for factor in factors] for factors in (batch.a, batch.b))
    workspace = planes(device.multi_lora.backward_workspace_bytes(**fields))
    device.multi_lora.backward(**fields, x=x, dy=dy, v=v, dx=dx, da=da, db=db, workspace=workspace)
    return y, dx, [*da, *db]


def check(device, batch: Batch, on_device: bool = True, offset: int = 0) -> None:
    base_y, base_dx = torch.randn_like(batch.dy), torch.randn_like(batch.x)
    y, dx, grads = run(device, batch, base_y, base_dx, on_device, offset)
    wanted_y, wanted_dx, wanted = batch.definition(base_y, base_dx)
    size_y, size_dx, sizes = batch.definition(base_y, base_dx, absolute=True)
    sums_in = accumulator(batch.x.dtype)
    length = max(*batch.x.shape, *batch.dy.shape) + (PART_TERMS if batch.x.dtype.itemsize == 2 else 0)
    assert_near(y, wanted_y, length, "y", size_y, sums_in=sums_in)
    assert_near(dx, wanted_dx, length, "dx", size_dx, sums_in=sums_in)
    for grad, expected, size in zip(grads, wanted, sizes, strict=True):
        assert_near(grad, expected, length, "gradient of a factor", size, sums_in=sums_in)
    without = batch.row_slots.repeat_interleave(batch.tokens_per_row) < 0
    assert torch.equal(y[without], base_y[without])
    assert torch.equal(dx[without], base_dx[without])


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_grid(device, dtype, factor_dtype):
    """Every pair of widths; ranks, popularities, rows, sequences, dropouts and where the plan is take turns."""
    turns = zip(
        itertools.cycle(RANKS),
        itertools.cycle(POPULARITIES),
        itertools.cycle([(1, 1), (70, 1), (9, 1), (5, 13), (2, 40)]),
        itertools.cycle([(), (0.3,), (), (0.0, 0.5)]),
        strict=False,
    )
    for i, (in_features, out_features) in enumerate(itertools.product(WIDTHS, WIDTHS)):
        ranks, popularity, (rows, tokens), dropouts = next(turns)
        batch = batch_of(
            rows, in_features, out_features, ranks, dtype, factor_dtype, popularity, dropouts, tokens, seed=i
        )
        check(device, batch, on_device=i % 2 == 0, offset=i % 3)


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_no_rows(device, dtype, factor_dtype):
    """The factors' gradients are zeros."""
    check(device, batch_of(0, 8, 16, [4, 2], dtype, factor_dtype))


@pytest.mark.emulator
def test_more_adapters_and_rows_than_a_launch_carries(device):
    """In 3840 bytes: 37 adapters of 128, and with a plan in the host's memory 2000 rows of 4, in each direction."""
    batch = batch_of(2000, 16, 24, [1 + i % 5 for i in range(37)], torch.float32, torch.float32, "zipf")
    for on_device in (False, True):
        device.take_launches()
        check(device, batch, on_device)
        sent = ["send_kernel" in launch["kernel"] for launch in device.take_launches()]
        assert sum(sent) == 2 * (2 if on_device else 4)


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_few_rows_take_three_launches(device, dtype):
    """What the host knows, the plan, and shrink with expand."""
    batch = batch_of(12, 64, 64, [8, 16], dtype, dtype, "distinct")
    fields = batch.fields(BatchPlan.from_slots(batch.row_slots), on_device=True)
    y, v = batch.dy.clone(), torch.zeros(12, 16)
    workspace = planes(device.multi_lora.forward_workspace_bytes(**fields))
    device.multi_lora.forward(**fields, x=batch.x, y=y, v=v, workspace=workspace)
    names = [launch["kernel"] for launch in device.take_launches()]
    assert [any(kernel in name for name in names) for kernel in ("send_kernel", "plan_kernel", "decode_kernel")] == [
        True
    ] * 3
    assert len(names) == 3


@pytest.mark.parametrize(("dtype", "factor_dtype"), PAIRS)
def test_factors_of_any_strides(device, dtype, factor_dtype):
    """One adapter's factors lie the other way round, so that no kernel for aligned ones serves."""
    batch = batch_of(70, 40, 24, [8, 16], dtype, factor_dtype)
    batch.a[1], batch.b[0] = batch.a[1].T.contiguous().T, batch.b[0].T.contiguous().T
    fields = batch.fields(BatchPlan.from_slots(batch.row_slots), on_device=True)
    base_y = torch.randn_like(batch.dy)
    y, v = base_y.clone(), torch.full((70, 16), torch.nan, dtype=accumulator(dtype))
    workspace = planes(device.multi_lora.forward_workspace_bytes(**fields))
    device.multi_lora.forward(**fields, x=batch.x, y=y, v=v, workspace=workspace)
    base_dx = torch.zeros_like(batch.x)
    size = batch.definition(base_y, base_dx, absolute=True)[0]
    assert_near(y, batch.definition(base_y, base_dx)[0], 56, "y", size, sums_in=accumulator(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_same_bits_in_any_order(dtype):
    batch = batch_of(90, 200, 64, [16, 7], dtype, dtype, dropouts=(0.3,))
    base_y, base_dx = torch.randn_like(batch.dy), torch.randn_like(batch.x)
    results = []
    for schedule in [*SCHEDULES, SCHEDULES[0]._replace(resident_blocks=16)]:
        with emulated(schedule) as module:
            y, dx, grads = run(module, batch, base_y, base_dx, on_device=True)
            results.append([y, dx, *grads])
    for other in results[1:]:
        assert all(torch.equal(one, two) for one, two in zip(results[0], other, strict=True))


def test_adapters_of_different_dtypes_are_refused():
    batch = batch_of(3, 8, 8, [4, 2], torch.float32, torch.float32)
    batch.a[1], batch.b[1] = batch.a[1].bfloat16(), batch.b[1].bfloat16()
    with emulated(SCHEDULES[0]) as module, pytest.raises(RuntimeError, match="expected adapters of one dtype"):
        run(module, batch, batch.dy, batch.x, on_device=True)
