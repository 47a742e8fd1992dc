"""multi_lora_embedding_ on the CPU, held against its definition in f64."""

import pytest
import torch

from pylora.ops import AdapterPools, BatchPlan, multi_lora_embedding_
from pylora.ops.reference import multi_lora as reference
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
ROW_SLOTS = [2, -1, 0, 2, 1, 0, -1]
SCALINGS = [0.5, 2.0, 1.25]


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


def make(shape, out_features, ranks, dtype, factor_dtype=None, num_embeddings=11):
    """The output, tokens (some several times, in one row and in several), factors, gradient of y."""
    generator = torch.Generator().manual_seed(0)

    def normal(*size, to=dtype):
        return torch.randn(*size, generator=generator, dtype=torch.float64).to(to)

    a = [normal(rank, num_embeddings, to=factor_dtype or dtype).requires_grad_() for rank in ranks]
    b = [normal(out_features, rank, to=factor_dtype or dtype).requires_grad_() for rank in ranks]
    tokens = torch.randint(num_embeddings, shape, generator=generator)
    return normal(*shape, out_features).requires_grad_(), tokens, a, b, normal(*shape, out_features)


def run(base, tokens, a, b, slots=ROW_SLOTS, padding_idx=None):
    y = base.clone()
    multi_lora_embedding_(y, tokens, AdapterPools(a, b, SCALINGS[: len(a)]), BatchPlan.from_slots(slots), padding_idx)
    return y


def check(shape, out_features, ranks, dtype, factor_dtype=None, padding_idx=None):
    base, tokens, a, b, dy = make(shape, out_features, ranks, dtype, factor_dtype)
    leaves = [base, *a, *b]
    y = run(base, tokens, a, b, padding_idx=padding_idx)
    grads = torch.autograd.grad(y, leaves, dy)
    results = []
    for absolute in (False, True):
        *wide, wide_dy = [t.detach().double().abs() if absolute else t.detach().double() for t in (*leaves, dy)]
        wide = [t.requires_grad_() for t in wide]
        y_ref = reference.multi_lora_embedding(wide[0], tokens, wide[1:4], wide[4:], SCALINGS, ROW_SLOTS, padding_idx)
        results.append((y_ref.detach(), torch.autograd.grad(y_ref, wide, wide_dy)))
    (y_ref, grads_ref), (y_size, grads_size) = results
    sums_in = torch.float64 if dtype == torch.float64 else torch.float32
    longest = max(tokens.numel(), out_features, *ranks)
    assert_near(y.detach(), y_ref, longest, "y", y_size, roundings=3, sums_in=sums_in)
    for i, (leaf, grad, grad_ref, size) in enumerate(zip(leaves, grads, grads_ref, grads_size, strict=True)):
        assert grad.dtype == leaf.dtype
        assert_near(grad, grad_ref, longest, f"gradient {i}", size, sums_in=sums_in)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding_idx", [None, 3])
def test_forward_and_backward(isa, dtype, padding_idx):
    check((7,), 70, [16, 3, 8], dtype, padding_idx=padding_idx)
    check((7, 5), 33, [1, 64, 9], dtype, padding_idx=padding_idx)
    check((7, 2, 9), 64, [4, 4, 4], dtype, padding_idx=padding_idx)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor_dtype", DTYPES)
def test_factors_in_another_dtype(isa, dtype, factor_dtype):
    check((7, 3), 48, [8, 2, 17], dtype, factor_dtype)


def test_rows_without_an_adapter_keep_their_bits(isa):
    base, tokens, a, b, _ = make((7, 5), 40, [16, 5, 8], torch.bfloat16)
    y = run(base, tokens, a, b)
    for i, slot in enumerate(ROW_SLOTS):
        assert torch.equal(y[i], base[i]) == (slot < 0)


def test_each_row_has_the_bits_of_its_adapter_alone(isa):
    base, tokens, a, b, _ = make((7, 6), 130, [16, 5, 8], torch.float32)
    y = run(base, tokens, a, b)
    for i, slot in enumerate(ROW_SLOTS):
        assert torch.equal(y[i], run(base[i : i + 1], tokens[i : i + 1], a, b, [slot])[0])


def test_gradients_of_a_row_alone_and_of_an_unused_adapter():
    base, tokens, a, b, dy = make((2, 6), 20, [4, 5], torch.float32)
    y = run(base, tokens, a, b, [0, 0])
    *used, unused_a, unused_b = torch.autograd.grad(y, [a[0], b[0], a[1], b[1]], dy)
    assert all(bool(grad.any()) for grad in used)
    assert not unused_a.any()
    assert not unused_b.any()
    first = run(base, tokens, a, b, [0, -1])
    alone = run(base[:1], tokens[:1], a, b, [0])
    for grad, own in zip(
        torch.autograd.grad(first, [a[0], b[0]], dy), torch.autograd.grad(alone, [a[0], b[0]], dy[:1]), strict=True
    ):
        torch.testing.assert_close(grad, own)


@pytest.mark.parametrize("threads", [1, 3])
def test_threads_give_the_same_bits(threads):
    base, tokens, a, b, dy = make((7, 400), 64, [16, 5, 8], torch.float32, num_embeddings=1000)
    results = []
    before = torch.get_num_threads()
    for count in (1, threads):
        torch.set_num_threads(count)
        try:
            y = run(base, tokens, a, b)
            results.append([y.detach(), *torch.autograd.grad(y, [*a, *b], dy)])
        finally:
            torch.set_num_threads(before)
    assert all(torch.equal(one, many) for one, many in zip(*results, strict=True))


def test_other_layouts_and_integers():
    base, tokens, a, b, dy = make((7, 5), 40, [16, 5, 8], torch.float32)
    expected = run(base, tokens, a, b)
    views = [t.detach().t().contiguous().t().requires_grad_() for t in (*a, *b)]
    assert not views[0].is_contiguous()
    y = run(base, tokens.t().contiguous().t().int(), views[:3], views[3:])
    assert torch.equal(y, expected)
    strided_dy = dy.transpose(0, 1).contiguous().transpose(0, 1)
    for grad, own in zip(
        torch.autograd.grad(y, views, strided_dy), torch.autograd.grad(expected, [*a, *b], dy), strict=True
    ):
        assert torch.equal(grad, own)


def test_no_adapter_no_rows_no_tokens():
    base, tokens, a, b, _ = make((3, 5), 4, [2], torch.float32)
    assert torch.equal(run(base, tokens, [], [], [-1, -1, -1]), base)
    assert run(base[:0], tokens[:0], a, b, []).shape == (0, 5, 4)
    assert run(base[:, :0], tokens[:, :0], a, b, [0, 0, -1]).shape == (3, 0, 4)


GOOD = {
    "y": torch.zeros(4, 3, 10),
    "tokens": torch.zeros(4, 3, dtype=torch.int64),
    "a": [torch.ones(2, 20), torch.ones(3, 20)],
    "b": [torch.ones(10, 2), torch.ones(10, 3)],
    "scalings": [1.0, 1.0],
    "dropout": (),
    "slots": [0, 1, -1, 0],
}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"slots": [0, 1, 0]}, "y: expected 3 rows, as the plan has"),
        ({"slots": [0, 2, -1, 0]}, "slots: expected slots from -1 to 1, got 2"),
        ({"tokens": torch.zeros(4, 3)}, "tokens: expected int64 or int32"),
        ({"tokens": torch.zeros(4, 2, dtype=torch.int64)}, "tokens: expected shape"),
        ({"tokens": torch.full((4, 3), 20)}, "tokens: expected numbers from 0 to 19, got 20"),
        ({"tokens": torch.full((4, 3), -1)}, "tokens: expected numbers from 0 to 19, got -1"),
        ({"y": torch.zeros(4, 3, 10, dtype=torch.int32)}, "y: expected float32"),
        ({"y": torch.zeros(3, 4, 10).transpose(0, 1)}, "y: expected a contiguous tensor"),
        ({"y": torch.tensor(1.0)}, "y: expected at least 1 dimension"),
        ({"a": [torch.ones(2, 20), torch.ones(3, 19)]}, "a: expected shape"),
        ({"a": [torch.ones(2), torch.ones(3, 20)]}, "a: expected shape"),
        ({"b": [torch.ones(10, 2), torch.ones(9, 3)]}, "b: expected shape"),
        ({"b": [torch.ones(10, 2), torch.ones(10, 3).double()]}, "b: expected the dtype of a"),
        ({"b": [torch.ones(10, 2)]}, "b: expected as many as a, 2, got 1"),
        ({"dropout": (0.0, 0.1)}, "pools: expected no dropout"),
    ],
)
def test_bad_input_touches_nothing(change, message):
    settings = GOOD | change
    y = settings["y"].clone()
    pools = AdapterPools(settings["a"], settings["b"], settings["scalings"], settings["dropout"])
    with pytest.raises((ValueError, TypeError, IndexError), match=f"multi_lora_embedding_: {message}"):
        multi_lora_embedding_(y, settings["tokens"], pools, BatchPlan.from_slots(settings["slots"]))
    assert torch.equal(y, settings["y"])


def test_tokens_of_rows_without_an_adapter_are_not_looked_up():
    y = torch.zeros(2, 10)
    pools = AdapterPools(GOOD["a"], GOOD["b"], [1.0, 1.0])
    multi_lora_embedding_(y, torch.tensor([99, 0]), pools, BatchPlan.from_slots([-1, 1]))
    assert not y[0].any()
    assert y[1].all()


def test_refuses_second_derivatives_and_leaves():
    base, tokens, a, b, _ = make((7, 5), 4, [1, 1, 1], torch.float32)
    y = run(base, tokens, a, b)
    with pytest.raises(NotImplementedError, match="multi_lora_embedding_: no second derivative"):
        torch.autograd.grad(y.sum(), a[0], create_graph=True)
    with pytest.raises(RuntimeError, match="y: expected a tensor that is no leaf"):
        multi_lora_embedding_(base, tokens, AdapterPools(a, b, SCALINGS), BatchPlan.from_slots(ROW_SLOTS))


def test_opcheck_and_compile():
    base, tokens, a, b, _ = make((7, 3), 10, [2, 3, 1], torch.float32)
    a, b = [t.detach() for t in a], [t.detach() for t in b]
    plan = BatchPlan.from_slots(ROW_SLOTS)
    args = (base.detach(), tokens, a, b, SCALINGS, *plan, -1)
    torch.library.opcheck(torch.ops.pylora.multi_lora_embedding_, args, test_utils=("test_schema", "test_faketensor"))

    def call(y, tokens):
        y = y.clone()
        multi_lora_embedding_(y, tokens, AdapterPools(a, b, SCALINGS), plan)
        return y

    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(base.detach(), tokens), call(base.detach(), tokens))
