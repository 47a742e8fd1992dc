"""The products of pylora's vLLM plugin against their definition in f64, without vLLM."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pylora.integrations.vllm.layer_slots import LayerSlots
from pylora.integrations.vllm.products import LoraProducts
from pylora.integrations.vllm.token_slots import TokenSlots

NUM_SLOTS, MAX_RANK, IN, SLICES = 5, 8, 24, (16, 12, 12)
RANKS = (8, 3, 0, 1, 8)  # of the slots' adapters; the rest of a slot is zeros, as vLLM pads it
SLOTS = (3, -1, 0, 4, 0, 2, -1, 1, 3)


def stacks(width: int, outs: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple:
    generator = torch.Generator().manual_seed(seed)
    a = tuple(torch.zeros(NUM_SLOTS, 1, MAX_RANK, width, dtype=dtype) for _ in outs)
    b = tuple(torch.zeros(NUM_SLOTS, 1, out, MAX_RANK, dtype=dtype) for out in outs)
    for each in (*a, *b):
        for slot, rank in enumerate(RANKS):
            write(each, slot, rank, generator)
    return a, b


def write(stacked: Tensor, slot: int, rank: int, generator: torch.Generator) -> None:
    """As vLLM's set_lora: zeros first, then the factor at its own rank."""
    is_a = stacked.shape[2] == MAX_RANK
    stacked[slot] = 0
    into = stacked[slot, 0, :rank] if is_a else stacked[slot, 0, :, :rank]
    into.copy_(torch.randn(into.shape, generator=generator) * 0.3)


def products(slots: tuple[int, ...] = SLOTS, capacity: int = 32) -> LoraProducts:
    made = LoraProducts(capacity)
    made.tokens.set(torch.tensor(slots))
    made.outputs.set(torch.tensor(slots))
    return made


def expected(y: Tensor, x: Tensor, a: tuple[Tensor, ...], b: tuple[Tensor, ...], slots=SLOTS, scale=1.0) -> Tensor:
    rows = y.double().clone()
    for row, slot in enumerate(slots):
        if slot >= 0:
            parts = [
                bs[slot, 0].double() @ (as_[slot, 0].double() @ x[row].double()) for as_, bs in zip(a, b, strict=True)
            ]
            rows[row] += scale * torch.cat(parts)
    return rows


def inputs(width: int, out: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x, y = (torch.randn(len(SLOTS), each, generator=generator).to(dtype) for each in (width, out))
    return x, y


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2), (torch.float64, 1e-12)]
)
@pytest.mark.parametrize("outs", [SLICES, (20,)])
def test_linear_adds_each_tokens_adapter(dtype, tolerance, outs):
    a, b = stacks(IN, outs, dtype)
    x, y = inputs(IN, sum(outs), dtype)
    before, right = y.clone(), expected(y, x, a, b)
    products().add_lora_linear(y, x, a, b, 1.0, outs)
    torch.testing.assert_close(y.double(), right, atol=tolerance, rtol=tolerance)
    base = [row for row, slot in enumerate(SLOTS) if slot == -1 or RANKS[slot] == 0]
    assert torch.equal(y[base], before[base])
    changed = [row for row, slot in enumerate(SLOTS) if slot >= 0 and RANKS[slot]]
    assert (y[changed] != before[changed]).any(1).all()


def test_linear_takes_a_scale_and_a_dimension_of_sequences():
    a, b = stacks(IN, SLICES)
    x, y = inputs(IN, sum(SLICES))
    right = expected(y, x, a, b, scale=0.5)
    products().add_lora_linear(y[None], x[None], a, b, 0.5, SLICES)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_rows_keep_their_bits_whatever_shares_their_batch():
    a, b = stacks(IN, SLICES)
    x, y = inputs(IN, sum(SLICES))
    together = y.clone()
    products().add_lora_linear(together, x, a, b, 1.0, SLICES)
    for row, slot in enumerate(SLOTS):
        alone = y[row : row + 1].clone()
        products((slot,)).add_lora_linear(alone, x[row : row + 1], a, b, 1.0, SLICES)
        assert torch.equal(alone[0], together[row])


def test_a_slot_that_is_written_again_has_its_new_rank():
    a, b = stacks(IN, SLICES)
    ours, generator = products(), torch.Generator().manual_seed(4)
    x, y = inputs(IN, sum(SLICES))
    ours.add_lora_linear(y.clone(), x, a, b, 1.0, SLICES)  # ranks are known now, and the tensors have moved
    for slot, rank in ((0, 2), (1, 8), (2, 5)):
        for each in (*a, *b):
            write(each, slot, rank, generator)
    right = expected(y, x, a, b)
    ours.add_lora_linear(y, x, a, b, 1.0, SLICES)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_a_new_batch_replaces_the_old_one_whole():
    a, b = stacks(IN, SLICES)
    ours = products()
    ours.tokens.set(torch.tensor((1, -1)))
    x, y = inputs(IN, sum(SLICES))
    slots = (1, -1) + (-1,) * (len(SLOTS) - 2)  # rows beyond the batch are the engine's padding
    right = expected(y, x, a, b, slots)
    ours.add_lora_linear(y, x, a, b, 1.0, SLICES)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_setting_instead_of_adding_leaves_base_rows():
    a, b = stacks(IN, SLICES)
    x, y = inputs(IN, sum(SLICES))
    zeroed = torch.where(torch.tensor(SLOTS)[:, None] >= 0, 0, y)
    products().add_lora_linear(y, x, a, b, 1.0, SLICES, add_inputs=False)
    torch.testing.assert_close(y.double(), expected(zeroed, x, a, b), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("width", [14, 20, 23])
def test_logits_narrower_and_wider_than_b(width):
    a, b = stacks(IN, (20,))
    x, y = inputs(IN, width)
    common = min(width, 20)
    right = y.double().clone()
    right[:, :common] = expected(y[:, :common], x, a, (b[0][:, :, :common],))
    products().add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_logits_use_the_slots_of_outputs():
    a, b = stacks(IN, (20,))
    x, y = inputs(IN, 20)
    ours = products()
    slots = tuple(reversed(SLOTS))
    ours.outputs.set(torch.tensor(slots))
    right = expected(y, x, a, b, slots)
    ours.add_lora_logits(y, x, a[0], b[0], 1.0)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("as_list", [False, True])
def test_shrink_and_expand_make_the_whole(as_list):
    a, b = stacks(IN, SLICES)
    x, y = inputs(IN, 5 + sum(SLICES))
    right = y.double().clone()
    right[:, 5:] = expected(y[:, 5:], x, a, b, scale=2.0)
    v = torch.full((len(SLICES), len(SLOTS), MAX_RANK), 7.0)
    ours, given = products(), list(v) if as_list else v
    ours.add_shrink(given, x, a, 2.0)
    assert not v[:, [i for i, slot in enumerate(SLOTS) if slot == -1]].any()
    ours.add_expand(y, given, b, SLICES, offset_start=5)
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_embedding_expands():
    _, b = stacks(IN, (20,))
    v, y = inputs(MAX_RANK, 20)
    right = y.double().clone()
    for row, slot in enumerate(SLOTS):
        if slot >= 0:
            right[row] += b[0][slot, 0].double() @ v[row].double()
    products().add_lora_embedding(y, v, b[0])
    torch.testing.assert_close(y.double(), right, atol=1e-5, rtol=1e-5)


def test_full_linear_is_each_outputs_own_layer():
    weight = torch.randn(NUM_SLOTS, 1, 3, IN)
    x, _ = inputs(IN, 3)
    y = products().full_linear(x, weight)
    for row, slot in enumerate(SLOTS):
        right = weight[slot, 0].double() @ x[row].double() if slot >= 0 else torch.zeros(3).double()
        torch.testing.assert_close(y[row].double(), right, atol=1e-5, rtol=1e-5)


def test_a_batch_without_adapters_reads_nothing():
    a, b = stacks(IN, SLICES)
    x, y = inputs(IN, sum(SLICES))
    before = y.clone()
    for each in (*a, *b):
        each.fill_(torch.nan)
    ours = products((-1,) * len(SLOTS))
    ours.add_lora_linear(y, x, a, b, 1.0, SLICES)
    ours.add_lora_logits(y, x, a[0], b[0], 1.0)
    ours.add_expand(y, torch.ones(len(SLICES), len(SLOTS), MAX_RANK), b, SLICES)
    assert torch.equal(y, before)


def test_vllms_tensors_keep_shape_and_values_where_they_move():
    (a,), (b,) = stacks(IN, (20,))
    values = a.clone(), b.clone()
    layer = LayerSlots((a,), (b,))
    assert a.shape == (NUM_SLOTS, 1, MAX_RANK, IN)
    assert b.shape == (NUM_SLOTS, 1, 20, MAX_RANK)
    assert torch.equal(a, values[0])
    assert torch.equal(b, values[1])
    assert layer.b_pool[0].stride(1) == 1  # columns of an output side by side
    b[2] = 3.0
    assert (layer.b_pool[0][2] == 3).all()


def test_ranks_are_counted_for_the_slots_in_use():
    a, b = stacks(IN, SLICES)
    layer = LayerSlots(a, b)
    assert layer.ranks((0, 1, 2, 3)).tolist()[:4] == list(RANKS[:4])
    a[1][2, 0, 4, 7] = 1e-30
    assert layer.ranks((2,)).tolist()[2] == 5  # the largest of the slices'
    _, b = stacks(IN, (20,))
    assert LayerSlots((), b).ranks((0, 1, 2, 3, 4)).tolist() == list(RANKS)
    with torch.inference_mode():
        uncounted = LayerSlots([torch.zeros(NUM_SLOTS, 1, MAX_RANK, IN)], ())
    assert uncounted.ranks((0,)).tolist() == [MAX_RANK] * NUM_SLOTS


def test_token_slots_of_a_shorter_batch():
    slots = TokenSlots(6)
    slots.set(torch.tensor([2, 0, 2, 1]))
    assert slots.used == (0, 1, 2)
    slots.set(torch.tensor([-1, 1]))
    assert slots.used == (1,)
    assert slots.first(4).tolist() == [-1, 1, -1, -1]
    assert slots.slots.tolist() == [-1, 1, -1, -1, -1, -1]
    assert not slots.is_idle
    slots.set(torch.tensor([-1]))
    assert slots.is_idle


def test_compiled_graphs_follow_each_batch():
    """vLLM compiles its models; a graph must not keep the slots of the batch that it was made for."""
    a, b = stacks(IN, SLICES)
    ours = products()
    x, y = inputs(IN, sum(SLICES))

    def step(y: Tensor, x: Tensor) -> Tensor:
        y = y * 1.0
        ours.add_lora_linear(y, x, a, b, 1.0, SLICES)
        return y

    compiled = torch.compile(step, backend="eager", fullgraph=True)
    with torch.no_grad():
        for slots in (SLOTS, tuple(reversed(SLOTS)), (-1,) * len(SLOTS), SLOTS):
            ours.tokens.set(torch.tensor(slots))
            torch.testing.assert_close(compiled(y, x).double(), expected(y, x, a, b, slots), atol=1e-5, rtol=1e-5)
