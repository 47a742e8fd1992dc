"""Plans that the device makes (csrc/cuda/plan.cu), emulated."""

import pytest
import torch

from pylora.ops.plan import BatchPlan
from pylora.testing.cuda_segments import Rows, SegmentKernels
from pylora.testing.pools import token_slots

POPULARITIES = ["one", "distinct", "uniform", "zipf", "skewed", "none"]


def rows_of(plan: Rows) -> list[tuple[int, int, int]]:
    """(item, row, slot) of each position of the items."""
    count = int(plan.fields["num_items"])
    order = plan.fields["order"]
    found = []
    for i, (first, rows, slot, _) in enumerate(plan.fields["items"][:count].tolist()):
        found += [(i, p if order is None else int(order[p]), slot) for p in range(first, first + rows)]
    return found


@pytest.mark.parametrize("item_rows", [8, 64])
@pytest.mark.parametrize("popularity", POPULARITIES)
@pytest.mark.parametrize(("num_rows", "num_slots"), [(0, 3), (1, 1), (33, 5), (700, 300), (1500, 2)])
def test_grouped(kernels, num_rows, num_slots, popularity, item_rows):
    """Every row that has a slot, once, sorted by slot, then in order; whole items but for the last of a slot."""
    slots = token_slots(popularity, num_rows, num_slots)
    plan = kernels.grouped(slots, num_slots, item_rows)
    found = rows_of(plan)
    expected = sorted((int(slot), row) for row, slot in enumerate(slots) if slot >= 0)
    assert [(slot, row) for _, row, slot in found] == expected
    assert len({i for i, *_ in found}) == sum(-(-int((slots == s).sum()) // item_rows) for s in range(num_slots))


def test_sequences(kernels):
    """An order of sequences is an order of their rows."""
    slots = torch.tensor([2, -1, 0, 2, 1], dtype=torch.int32)
    plan = BatchPlan.from_slots(slots)
    made = kernels.segments(plan.segment_indptr, plan.segment_slots, 35, 3, plan.order, tokens_per_row=7)
    expected = [(slot, 7 * row + t) for slot, row in [(0, 2), (1, 4), (2, 0), (2, 3)] for t in range(7)]
    assert [(slot, row) for _, row, slot in rows_of(made)] == expected


def test_what_the_device_is_given_cannot_make_it_write_elsewhere(kernels):
    """Slots that do not exist have no item; offsets are cut; items end where their memory does."""
    slots = torch.tensor([5, 0, -7, 1], dtype=torch.int32)
    made = kernels.segments(torch.tensor([0, 3, 6, 9, 900], dtype=torch.int32), slots, 12, num_slots=2)
    assert [(slot, row) for _, row, slot in rows_of(made)] == [(0, 3), (0, 4), (0, 5), (1, 9), (1, 10), (1, 11)]
    overlapping = torch.tensor([0, 12, 0, 12, 0, 12], dtype=torch.int32)
    made = kernels.segments(overlapping, torch.zeros(5, dtype=torch.int32), 12, num_slots=1, item_rows=8)
    assert int(made.fields["num_items"]) <= len(made.fields["items"])
    assert not bool((kernels.grouped(torch.tensor([4, 9, -3], dtype=torch.int32), 4).fields["num_items"]).any())


@pytest.mark.parametrize(("dtype", "num_splits"), [(torch.bfloat16, 1), (torch.float32, 3)])
def test_kernels_take_a_grouped_plan(kernels: SegmentKernels, dtype, num_splits):
    """The same bits as with the plan that is sorted on the host."""
    slots = token_slots("zipf", 150, 4)
    x, a = torch.randn(150, 1100).to(dtype), torch.randn(4, 8, 1100).to(dtype)
    of_host, of_device = (
        kernels.shrink(plan, x, [a], num_splits) for plan in (kernels.plan(slots), kernels.grouped(slots, 4))
    )
    assert torch.equal(of_host, of_device)
