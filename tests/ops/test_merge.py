"""merge_, unmerge_, swap_, merge_is_finite on the CPU: values against the definition, and bits after the way back."""

import itertools
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pylora.ops import merge_, merge_is_finite, swap_, unmerge_
from pylora.ops.reference import merge as reference
from pylora.testing.isa import built_isas, cpu_isa, supported_isas
from pylora.testing.merge import adapter, bits, changed_bits, check_values, copy, weight
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
SHAPES = [(1, 1), (1, 7), (7, 1), (5, 17), (40, 24), (33, 130), (3, 5000), (130, 333), (64, 4096), (700, 64)]


@pytest.fixture(params=built_isas())
def isa(request):
    if request.param not in supported_isas():
        pytest.skip(f"this CPU has no {request.param}")
    with cpu_isa(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_merge_and_back(isa, dtype, transposed):
    """Every shape; shares, ranks and the factors' dtype take turns."""
    shares, ranks = itertools.cycle([0.02, 1.0, 0.0, 30.0, 0.3]), itertools.cycle([1, 3, 16, 70])
    factor_dtypes = itertools.cycle(DTYPES)
    for out, inp in SHAPES:
        for _ in range(3):
            w = weight(out, inp, dtype, transposed=transposed)
            before, (a, b) = copy(w), adapter(out, inp, next(ranks), next(shares), next(factor_dtypes))
            log = merge_(w, [a], [b], [0.75])
            check_values(w, before, [a], [b], [0.75])
            merged = copy(w)
            unmerge_(w, [a], [b], [0.75], log=log)
            assert changed_bits(w, before) == 0
            # The log changes nothing of the values.
            assert merge_(w, [a], [b], [0.75], log=False).numel() == 0
            assert changed_bits(w, merged) == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("transposed", [False, True])
def test_several_adapters_with_row_scales(isa, dtype, transposed):
    for out, inp in [(1, 7), (40, 24), (130, 333), (66, 64)]:
        w = weight(out, inp, dtype, transposed=transposed)
        before = copy(w)
        (a1, b1), (a2, b2) = adapter(out, inp, 4, 0.1), adapter(out, inp, 3, 0.2, torch.bfloat16, seed=2)
        scale = torch.linspace(-0.5, 2.0, out)
        scale[out // 2] = 0.0
        args = [a1, a2, a1], [b1, b2, b1], [0.5, -1.0, 2.0], [None, scale, scale.double()]
        log = merge_(w, *args)
        check_values(w, before, *args)
        unmerge_(w, *args, log=log)
        assert changed_bits(w, before) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_stacks_and_strides(isa, dtype):
    a, b = adapter(33, 40, 5, 0.3, stack=(3,))
    for transposed in (False, True):
        w = weight(33, 40, dtype, stack=(3,), transposed=transposed)
        before = copy(w)
        log = merge_(w, [a], [b.mT.contiguous().mT], [2.0])
        check_values(w, before, [a], [b], [2.0])
        unmerge_(w, [a], [b], [2.0], log=log)
        assert changed_bits(w, before) == 0
    whole = weight(66, 130, dtype)
    before = whole.clone()
    part = whole[::2, 30:70]
    log = merge_(part, [a[0]], [b[0]], [2.0])
    check_values(part, before[::2, 30:70], [a[0]], [b[0]], [2.0])
    outside = torch.ones(66, 130, dtype=torch.bool)
    outside[::2, 30:70] = False
    assert torch.equal(bits(whole)[outside], bits(before)[outside])
    unmerge_(part, [a[0]], [b[0]], [2.0], log=log)
    assert changed_bits(whole, before) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_unmerge_under_another_instruction_set(dtype):
    """Fused multiply-adds or not: the log says which, and the way back takes the same."""
    a, b = adapter(130, 333, 16, 0.3)
    for there, back in itertools.product(supported_isas(), repeat=2):
        w = weight(130, 333, dtype)
        before = w.clone()
        with cpu_isa(there):
            log = merge_(w, [a], [b], [0.7])
        with cpu_isa(back):
            unmerge_(w, [a], [b], [0.7], log=log)
        assert changed_bits(w, before) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_threads(isa, dtype):
    a, b = adapter(300, 1000, 16, 0.3)
    results = []
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            w = weight(300, 1000, dtype)
            log = merge_(w, [a], [b], [0.7])
            results.append((bits(w).clone(), log))
        torch.set_num_threads(3)
        unmerge_(w, [a], [b], [0.7], log=results[0][1])
    finally:
        torch.set_num_threads(threads)
    assert changed_bits(w, weight(300, 1000, dtype)) == 0
    for merged, log in results[1:]:
        assert torch.equal(merged, results[0][0])
        assert torch.equal(log, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_flushing_subnormals_does_not_matter(dtype):
    """The mode belongs to a thread, and a way back may run on another one."""
    w = weight(64, 64, dtype, special=False) * torch.finfo(dtype).tiny
    before, (a, b) = w.clone(), adapter(64, 64, 4, 1.0)
    scaling = torch.finfo(dtype).tiny if dtype != torch.float64 else 1e-300
    log = merge_(w, [a], [b], [scaling])
    if not torch.set_flush_denormal(True):
        pytest.skip("this CPU cannot flush subnormals")
    try:
        unmerge_(w, [a], [b], [scaling], log=log)
    finally:
        torch.set_flush_denormal(False)
    assert changed_bits(w, before) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_thousand_cycles(dtype):
    w = weight(48, 200, dtype)
    before = w.clone()
    adapters = [adapter(48, 200, 4, share, seed=i) for i, share in enumerate((0.02, 0.5, 3.0))]
    a, b = [x for x, _ in adapters], [x for _, x in adapters]
    for cycle in range(1000):
        count = 1 + cycle % 3
        log = merge_(w, a[:count], b[:count], [0.5] * count)
        unmerge_(w, a[:count], b[:count], [0.5] * count, log=log)
        assert changed_bits(w, before) == 0


@settings(max_examples=40, deadline=None)
@given(
    dtype=st.sampled_from(DTYPES),
    shape=st.tuples(st.integers(1, 90), st.integers(1, 200)),
    transposed=st.booleans(),
    steps=st.lists(st.tuples(st.sampled_from(["merge", "unmerge", "swap"]), st.integers(0, 3)), max_size=8),
    shares=st.lists(st.sampled_from([0.0, 0.005, 0.02, 1.0, 100.0]), min_size=4, max_size=4),
)
def test_sequences(dtype, shape, transposed, steps, shares):
    """A stack of merges: whatever is taken off leaves the bits from before."""
    w = weight(*shape, dtype, transposed=transposed)
    adapters = [adapter(*shape, 1 + i, share, seed=i) for i, share in enumerate(shares)]
    merged: list[tuple[tuple, torch.Tensor, torch.Tensor]] = []
    for step, which in steps:
        a, b = adapters[which]
        args = [a], [b], [0.5 + which]
        if step == "merge":
            before = copy(w)
            merged.append((args, merge_(w, *args), before))
        elif merged and step == "unmerge":
            old, log, before = merged.pop()
            unmerge_(w, *old, log=log)
            assert changed_bits(w, before) == 0
        elif merged:
            old, log, before = merged.pop()
            expected = copy(before)
            expected_log = merge_(expected, *args)
            log = swap_(w, *old, None, log, *args)
            assert changed_bits(w, expected) == 0
            assert torch.equal(log, expected_log)
            merged.append((args, log, before))
    while merged:
        old, log, before = merged.pop()
        unmerge_(w, *old, log=log)
        assert changed_bits(w, before) == 0


def test_swap_without_logs(isa):
    w = weight(40, 64, torch.float32, special=False)
    (a1, b1), (a2, b2) = adapter(40, 64, 4), adapter(40, 64, 3, seed=2)
    expected = reference.merge(w, [a2], [b2], [2.0])
    merge_(w, [a1], [b1], [1.0], log=False)
    assert swap_(w, [a1], [b1], [1.0], None, None, [a2], [b2], [2.0], log=False).numel() == 0
    assert_near(w, expected, 4, roundings=3, magnitude=expected.abs() + 1)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_swap_without_the_old_log_makes_a_log(dtype, isa):
    """As `unmerge_` by subtraction and `merge_`, here in rows that lie apart."""
    w, old, new = weight(70, 333, dtype)[:, :300], adapter(70, 300, 4, 0.5), adapter(70, 300, 3, seed=2)
    merge_(w, [old[0]], [old[1]], [1.0], log=False)
    expected = copy(w)
    unmerge_(expected, [old[0]], [old[1]], [1.0])
    without = copy(expected)
    expected_log = merge_(expected, [new[0]], [new[1]], [2.0])
    log = swap_(w, [old[0]], [old[1]], [1.0], None, None, [new[0]], [new[1]], [2.0])
    assert changed_bits(w, expected) == 0
    assert torch.equal(log, expected_log)
    unmerge_(w, [new[0]], [new[1]], [2.0], log=log)
    assert changed_bits(w, without) == 0


def test_unmerge_without_a_log_subtracts(isa):
    w = weight(40, 64, torch.bfloat16, special=False)
    before, (a, b) = w.clone(), adapter(40, 64, 4, 0.1)
    merge_(w, [a], [b], [1.0], log=False)
    unmerge_(w, [a], [b], [1.0])
    assert_near(w, before.double(), 4, magnitude=before.double().abs() + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("share", "limit"), [(0.02, 0.03), (1.0, 0.5), (1000.0, 1.01)])
def test_the_log_is_small(isa, dtype, share, limit):
    w = weight(512, 1024, dtype, special=False)
    a, b = adapter(512, 1024, 16, share)
    log = merge_(w, [a], [b], [1.0])
    assert log.numel() <= limit * w.numel() * w.element_size()


def test_empty_weights(isa):
    for shape in [(0, 5), (5, 0), (0, 0)]:
        w = torch.empty(shape)
        a, b = torch.zeros(2, shape[1]), torch.zeros(shape[0], 2)
        unmerge_(w, [a], [b], [1.0], log=merge_(w, [a], [b], [1.0]))
        assert merge_is_finite(w, [a], [b], [1.0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_is_finite(isa, dtype):
    w = weight(65, 130, dtype, special=False)
    before, (a, b) = w.clone(), adapter(65, 130, 4)
    assert merge_is_finite(w, [a], [b], [1.0])
    for value in (float("inf"), -float("inf"), float("nan")):
        for row, column in [(0, 0), (64, 129), (3, 77)]:
            broken = w.clone()
            broken[row, column] = value
            assert not merge_is_finite(broken, [a], [b], [1.0])
        broken = b.clone()
        broken[64, 3] = value
        assert not merge_is_finite(w, [a], [broken], [1.0])
    if dtype == torch.float16:
        assert not merge_is_finite(w, [a], [b], [1e7])
    assert changed_bits(w, before) == 0


def test_a_write_moves_the_version_counter():
    w = torch.randn(8, 8)
    a, b = adapter(8, 8, 2)
    versions = [w._version]
    log = merge_(w, [a], [b], [1.0])
    versions.append(w._version)
    log = swap_(w, [a], [b], [1.0], None, log, [a], [b], [2.0])
    versions.append(w._version)
    unmerge_(w, [a], [b], [2.0], log=log)
    versions.append(w._version)
    assert versions == sorted(set(versions))


def test_changed_weights_are_refused():
    w = weight(40, 300, torch.bfloat16)
    a, b = adapter(40, 300, 4)
    log = merge_(w, [a], [b], [1.0])
    merged = w.clone()
    for index in [(0, 0), (39, 299), (20, 7)]:
        bits(w)[index] ^= 1
        edited = w.clone()
        with pytest.raises(ValueError, match="unmerge_: w: expected the values that the merge left"):
            unmerge_(w, [a], [b], [1.0], log=log)
        with pytest.raises(ValueError, match="swap_: w: expected the values that the merge left"):
            swap_(w, [a], [b], [1.0], None, log, [a], [b], [1.0])
        assert changed_bits(w, edited) == 0
        bits(w)[index] ^= 1
    w[[3, 30]] = w[[30, 3]]
    with pytest.raises(ValueError, match="the weight was changed after the merge"):
        unmerge_(w, [a], [b], [1.0], log=log)
    w.copy_(merged)
    unmerge_(w, [a], [b], [1.0], log=log)


def test_foreign_and_damaged_logs_are_refused():
    w = weight(40, 300, torch.bfloat16)
    a, b = adapter(40, 300, 4, 1.0)
    log = merge_(w, [a], [b], [1.0])
    merged = w.clone()
    other = merge_(weight(300, 40, torch.bfloat16), [b.T.contiguous()], [a.T.contiguous()], [1.0])
    damaged = log.clone()
    damaged[64 + 14] = 255  # the first payload's size
    cases = [
        (log[:10], ValueError, "expected the log of a merge, got 10 bytes"),
        (torch.zeros(200, dtype=torch.uint8), ValueError, "expected the log of a merge, got other bytes"),
        (other, ValueError, "expected the log of a weight of this shape"),
        (log[:-1], ValueError, "expected the whole log of a merge, got a damaged one"),
        (torch.cat([log, log[:1]]), ValueError, "got a damaged one"),
        (log.float(), TypeError, "log: expected uint8, got Float"),
        (log.view(1, -1), ValueError, "expected a contiguous vector"),
    ]
    for bad, error, message in cases:
        with pytest.raises(error, match=message):
            unmerge_(w, [a], [b], [1.0], log=bad)
        assert changed_bits(w, merged) == 0
    unmerge_(w, [a], [b], [1.0], log=torch.cat([log[:1], log])[1:])  # a view that begins at an odd address


def test_any_bytes_for_a_payload_are_safe():
    """A log may come from a file: payloads of random bytes give some weight, never an access beyond the log."""
    a, b = adapter(40, 300, 4, 1.0)
    for share in (0.02, 1.0):
        w = weight(40, 300, torch.bfloat16)
        log = merge_(w, [a], [b * share], [1.0])
        start = 64 + 16 * 3
        log[start:] = torch.randint(0, 256, log[start:].shape, dtype=torch.uint8)
        unmerge_(w, [a], [b * share], [1.0], log=log)
        assert w.shape == (40, 300)


W, A, B = torch.randn(6, 8), torch.randn(2, 8), torch.randn(6, 2)
STACK = torch.randn(200)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((W[0], [A], [B], [1.0]), ValueError, r"w: expected 2 or 3 dimensions, got shape \[8\]"),
        ((W.int(), [A], [B], [1.0]), TypeError, "w: expected float32, bfloat16, float16 or float64, got Int"),
        ((torch.randn(6, 16)[:, ::2].T[::2], [A], [B], [1.0]), ValueError, "w: expected elements that do not overlap"),
        ((torch.randn(8).expand(6, 8), [A], [B], [1.0]), ValueError, "w: expected elements that do not overlap"),
        ((STACK.as_strided((2, 6, 8), (8, 8, 1)), [A], [B], [1.0]), ValueError, "w: expected elements that do not"),
        ((STACK.as_strided((3, 6, 8), (8, 16, 1)), [A], [B], [1.0]), ValueError, "w: expected elements that do not"),
        ((W, [], [], []), ValueError, "a: expected at least one adapter, got none"),
        ((W, [A], [B, B], [1.0]), ValueError, "b, scalings: expected as many as a, 1, got 2 and 1"),
        ((W, [A], [B], [1.0, 2.0]), ValueError, "b, scalings: expected as many as a, 1, got 1 and 2"),
        ((W, [A, A], [B, B], [1.0, 1.0], [None]), ValueError, "row_scales: expected as many as a, 2, or none, got 1"),
        ((W, [A[:, :7]], [B], [1.0]), ValueError, r"a: expected shape \[-1, 8\] .* got \[2, 7\]"),
        ((W, [A], [B[:5]], [1.0]), ValueError, r"b: expected shape \[6, 2\] .* got \[5, 2\]"),
        ((W, [A[:0]], [B[:, :0]], [1.0]), ValueError, "a: expected a rank of at least 1"),
        ((W, [A], [B.half()], [1.0]), TypeError, "b: expected the dtype of a, Float, got Half"),
        ((W, [A.int()], [B.int()], [1.0]), TypeError, "a: expected float32, bfloat16, float16 or float64, got Int"),
        ((W, [A], [B], [1.0], [torch.ones(5)]), ValueError, r"row_scales: expected shape \[6\]"),
        ((W, [A], [B], [1.0], [torch.ones(6).int()]), TypeError, "row_scales: expected float32"),
    ],
)
def test_errors(args, error, message):
    before = args[0].clone()
    for name, call in [("merge_", merge_), ("unmerge_", unmerge_), ("merge_is_finite", merge_is_finite)]:
        with pytest.raises(error, match=f"{name}: .*{message}"):
            call(*args)
    w, a, b, scalings, *scales = args
    scales = scales[0] if scales else None
    with pytest.raises(error, match=f"swap_: .*{message}"):
        swap_(w, [A], [B], [1.0], None, None, a, b, scalings, scales)
    if w is W:
        with pytest.raises(error) as raised:
            swap_(w, a, b, scalings, scales, None, [A], [B], [1.0])
        assert re.search(f"swap_: {message}", str(raised.value).replace("old_", ""))
    assert torch.equal(args[0], before)


def test_a_stack_whose_matrices_lie_between_one_another():
    """Each in the gaps between the rows of the others: no element is another's."""
    a, b = adapter(6, 8, 2, 0.3, stack=(3,))
    w = weight(6, 8, torch.float32, stack=(3,), special=False)
    between = w.transpose(0, 1).contiguous().transpose(0, 1)
    assert between.stride() == (8, 24, 1)
    before = w.clone()
    log = merge_(between, [a], [b], [1.0])
    merge_(w, [a], [b], [1.0])
    assert torch.equal(between, w)
    unmerge_(between, [a], [b], [1.0], log=log)
    assert torch.equal(between, before)


def test_opcheck():
    w, (a, b) = torch.randn(40, 64), adapter(40, 64, 4)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pylora.merge_, (w, [a], [b], [1.0], [None], False), test_utils=tests)
    log = merge_(w, [a], [b], [1.0])
    torch.library.opcheck(torch.ops.pylora.unmerge_, (w.clone(), [a], [b], [1.0], [], None), test_utils=tests)
    args = (w.clone(), [a], [b], [1.0], [], None, [a], [b], [2.0], [], False)
    torch.library.opcheck(torch.ops.pylora.swap_, args, test_utils=tests)
    assert log.numel() > 64


OUT_OF_MEMORY = """
import resource, torch
from pylora.ops import merge_, swap_
torch.set_num_threads(1)
w, a, b = torch.randn(4096, 4096).bfloat16(), torch.randn(4, 4096), torch.randn(4096, 4)
small = b * 0.001
log = merge_(w, [a], [small], [1.0])
before = w.clone()
with open("/proc/self/statm") as file:
    size = int(file.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (size + (8 << 20), resource.RLIM_INFINITY))
calls = [lambda: merge_(w, [a], [b], [50.0])]
calls += [lambda log=log: swap_(w, [a], [small], [1.0], None, log, [a], [b], [50.0]) for log in (log, None)]
for call in calls:
    try:
        call()
    except RuntimeError as error:
        assert "memory" in str(error), error
        assert all(torch.equal(x.view(torch.int16), y.view(torch.int16)) for x, y in zip(w.split(64), before.split(64)))
        print("refused")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="limits a process's memory as Linux does")
def test_memory_that_runs_out_leaves_the_weight_whole():
    """A log of about half the weight's 32 MB, and 8 MB left."""
    done = subprocess.run([sys.executable, "-c", OUT_OF_MEMORY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["refused"] * 3, done.stdout
