"""The CUDA kernels of csrc/merge: the CPU op's bits by FMA, its definition by tensor cores, and the way back."""

import itertools

import pytest
import torch

from pylora.ops import merge_, unmerge_
from pylora.ops.cost import Cost
from pylora.ops.cost import cuda as cost
from pylora.testing.cuda_merge import (
    BITMAP,
    DENSE,
    EMPTY,
    PENDING,
    SPARSE,
    TILE_COLUMNS,
    TILE_ROWS,
    Adapter,
    DeviceLog,
    MergeKernels,
)
from pylora.testing.emulator import SCHEDULES, emulated
from pylora.testing.isa import cpu_isa, supported_isas
from pylora.testing.merge import adapter, bits, changed_bits, check_values, copy, weight

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
HALVES = [torch.bfloat16, torch.float16]
WAYS = [*((dtype, False) for dtype in DTYPES), *((dtype, True) for dtype in HALVES)]
"""dtype of W, and whether sums are taken by tensor cores."""
SHAPES = [(1, 1), (1, 7), (7, 1), (33, 17), (40, 130), (3, 300), (64, 128), (70, 136), (130, 33)]
SPLIT_ERROR = 2.0**-15
"""Of two factors, each as two bf16 without the product of the lower ones, relative to their product."""


@pytest.fixture
def device(schedule):
    with emulated(schedule) as module:
        yield module


@pytest.fixture
def one_order():
    """For what does not depend on how threads take turns."""
    with emulated(SCHEDULES[0]) as module:
        yield module


@pytest.fixture
def fused():
    """The arithmetic that FMA kernels share with the CPU."""
    found = [isa for isa in supported_isas() if isa in ("avx512", "avx2", "neon")]
    if not found:
        pytest.skip("this CPU has no fused multiply-adds")
    with cpu_isa(found[0]):
        yield


def there_and_back(kernels: MergeKernels, w: torch.Tensor, adapters: list[Adapter]) -> torch.Tensor:
    """Merges, unmerges by the log, and returns what was merged; asserts that w has its bits again."""
    before, log = copy(w), kernels.new_log(w, 2 * w.nbytes + 64 * 1024)
    kernels.merge(w, adapters, log)
    assert kernels.answers.pending == 0
    merged = copy(w)
    assert kernels.is_unchanged(w, log)
    kernels.unmerge(w, adapters, log, check=True)
    assert kernels.answers.changed == 0
    assert changed_bits(w, before) == 0
    kernels.merge(w, adapters)  # the log changes nothing of the values
    assert changed_bits(w, merged) == 0
    w.copy_(before)
    bits(w).copy_(bits(before))
    return merged


def between_foreign(w: torch.Tensor, offset: int) -> torch.Tensor:
    """The same weight with rows that begin `offset` elements late, and other elements between them."""
    wide = torch.full((*w.shape[:-1], w.shape[-1] + offset + 3), 7.0, dtype=w.dtype)
    wide[..., offset : offset + w.shape[-1]] = w
    inner = wide[..., offset : offset + w.shape[-1]]
    inner.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[w.itemsize]).copy_(bits(w))
    return inner


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_merge_and_back(device, fused, dtype, tensor_cores, transposed):
    """Sizes; shares, ranks and the factors' dtype take turns. By FMA the CPU op has the same bits."""
    kernels = MergeKernels(device, tensor_cores)
    shares, ranks = itertools.cycle([0.02, 1.0, 0.0, 30.0, 0.3]), itertools.cycle([1, 3, 16, 70])
    factor_dtypes = itertools.cycle(DTYPES)
    for out, inp in SHAPES:
        w = weight(out, inp, dtype, transposed=transposed)
        before, (a, b) = copy(w), adapter(out, inp, next(ranks), next(shares), next(factor_dtypes))
        merged = there_and_back(kernels, w, [Adapter(a, b, 0.75)])
        check_values(merged, before, [a], [b], [0.75], factor_error=SPLIT_ERROR if tensor_cores else 0.0)
        if tensor_cores:
            continue
        on_cpu = copy(before)
        merge_(on_cpu, [a], [b], [0.75], log=False)
        assert changed_bits(merged, on_cpu) == 0
        unmerge_(on_cpu, [a], [b], [0.75])
        w = copy(merged)
        kernels.unmerge(w, [Adapter(a, b, 0.75)])
        assert changed_bits(w, on_cpu) == 0


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_several_adapters_with_row_scales(device, fused, dtype, tensor_cores):
    kernels = MergeKernels(device, tensor_cores)
    for out, inp, transposed in [(1, 7, False), (40, 130, False), (66, 64, True)]:
        w = weight(out, inp, dtype, transposed=transposed)
        before = copy(w)
        (a1, b1), (a2, b2) = adapter(out, inp, 4, 0.1), adapter(out, inp, 3, 0.2, torch.bfloat16, seed=2)
        scale = torch.linspace(-0.5, 2.0, out)
        scale[out // 2] = 0.0
        scales = [None, scale, scale.double()]
        adapters = [Adapter(a1, b1, 0.5), Adapter(a2, b2, -1.0, scale), Adapter(a1, b1, 2.0, scale.double())]
        merged = there_and_back(kernels, w, adapters)
        args = [a1, a2, a1], [b1, b2, b1], [0.5, -1.0, 2.0], scales
        check_values(merged, before, *args, factor_error=2 * SPLIT_ERROR if tensor_cores else 0.0)
        if not tensor_cores:
            on_cpu = copy(before)
            merge_(on_cpu, *args, log=False)
            assert changed_bits(merged, on_cpu) == 0


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_strides_and_stacks(device, dtype, tensor_cores):
    """Rows that begin anywhere, foreign elements between them; factors of any strides; several matrices."""
    kernels = MergeKernels(device, tensor_cores)
    for offset, inp in [(0, 40), (1, 133), (2, 130)]:
        w = between_foreign(weight(35, inp, dtype), offset)
        whole = w._base.clone()
        a, b = adapter(35, inp, 5, 0.3)
        before, log = w.clone(), kernels.new_log(w, 2 * w.nbytes + 1024)
        kernels.merge(w, [Adapter(a.T.contiguous().T, b.T.contiguous().T, 2.0)], log)
        check_values(w, before, [a], [b], [2.0], factor_error=SPLIT_ERROR if tensor_cores else 0.0)
        kernels.unmerge(w, [Adapter(a, b, 2.0)], log, check=True)
        assert changed_bits(w._base, whole) == 0
    a, b = adapter(33, 40, 5, 0.3, stack=(3,))
    for transposed in (False, True):
        w = weight(33, 40, dtype, stack=(3,), transposed=transposed)
        before = copy(w)
        merged = there_and_back(kernels, w, [Adapter(a, b, -0.5)])
        check_values(merged, before, [a], [b], [-0.5], factor_error=SPLIT_ERROR if tensor_cores else 0.0)


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_blocks_take_one_tile_after_another(schedule, dtype, tensor_cores):
    """One multiprocessor: the next tile, and its log, follow in the same shared memory."""
    with emulated(schedule, multiprocessors=1) as module:
        adapters = [Adapter(*adapter(330, 260, 70, 0.3), 0.5)]
        there_and_back(MergeKernels(module, tensor_cores), weight(330, 260, dtype), adapters)


@pytest.mark.parametrize("tensor_cores", [False, True])
def test_more_factors_than_a_grid_packs_at_once(tensor_cores):
    w, (a, b), scale = weight(2100, 3, torch.float16), adapter(2100, 3, 2, 0.3), torch.linspace(0.5, 2.0, 2100)
    before = copy(w)
    with emulated(SCHEDULES[0], multiprocessors=1) as module:
        merged = there_and_back(MergeKernels(module, tensor_cores), w, [Adapter(a, b, 0.5, scale)])
    check_values(merged, before, [a], [b], [0.5], [scale], factor_error=SPLIT_ERROR if tensor_cores else 0.0)


def test_sums_that_vanish(one_order, fused):
    """A product too small for f32 leaves a zero with its sign, and so does W."""
    w, a, b = torch.full((33, 40), -0.0), torch.full((1, 40), 1e-30), torch.full((33, 1), -1e-30)
    on_cpu = w.clone()
    MergeKernels(one_order).merge(w, [Adapter(a, b)])
    merge_(on_cpu, [a], [b], [1.0], log=False)
    assert changed_bits(w, on_cpu) == 0
    assert bool(w.signbit().all())


def decoded(log: DeviceLog, chunk: int, tile: torch.Tensor) -> torch.Tensor:
    """The tile's elements as integers, corrected as csrc/merge/README.md says; an account of the format in Python."""
    offset, kind, _, entries, size = log.header(chunk)
    payload = log.data[offset : offset + size].numpy().tobytes()
    words, width = tile.reshape(-1).tolist(), 8 * tile.itemsize
    count, minus_zero = len(words), -(1 << (width - 1))
    if kind == DENSE:
        return torch.frombuffer(bytearray(payload), dtype=tile.dtype).view(tile.shape)
    if kind == SPARSE:
        pairs = [(payload[2 * i], payload[2 * i + 1]) for i in range(entries)]
        positions, full = list(itertools.accumulate(gap for gap, _ in pairs)), 2 * entries
        codes = [code for _, code in pairs]
    else:
        mask = int.from_bytes(payload[: (count + 7) // 8], "little")
        positions = [p for p in range(count) if mask >> p & 1]
        full = (count + 7) // 8 + entries
        codes = list(payload[(count + 7) // 8 : full])
        assert kind == BITMAP
        assert len(positions) == entries
    for position, unsigned in zip(positions, codes, strict=True):
        code = unsigned - 256 if unsigned > 127 else unsigned
        if code == -128:
            words[position] = int.from_bytes(payload[full : full + tile.itemsize], "little", signed=True)
            full += tile.itemsize
        elif code == -127:
            words[position] = minus_zero
        else:
            total = words[position] + code & (1 << width) - 1
            words[position] = total - (1 << width) if total >> (width - 1) else total
    assert full == size
    return torch.tensor(words, dtype=tile.dtype).view(tile.shape)


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_the_log_is_what_its_format_says(one_order, dtype, tensor_cores):
    """Payloads of every kind, held to an account of the format that shares nothing with the kernels."""
    kernels, kinds = MergeKernels(one_order, tensor_cores), set()
    for share, sparse_rows, nans in [(0.02, 40, False), (1.0, 1, False), (1e30, 1, True), (0.0, 1, False)]:
        w = weight(41, 200, dtype, special=nans)
        a, b = adapter(41, 200, 3, min(share, 1e4 if dtype == torch.float16 else share))
        b[1:39] *= sparse_rows == 1  # rows between that need no entry: gaps beyond 255
        if share == 1.0:
            a[0, 130] = torch.inf  # beyond W's edge 0 * inf is no zero
        if nans:
            w[:, :TILE_COLUMNS] = torch.nan
            bits(w)[:, :TILE_COLUMNS] += torch.arange(TILE_COLUMNS, dtype=bits(w).dtype)
            w[3, 100:110] = -0.0
        before, adapters = copy(w), [Adapter(a, b, 0.5)]
        log = kernels.new_log(w, 4 * w.nbytes)
        kernels.merge(w, adapters, log)
        kinds |= set(log.kinds().tolist())
        kernels.unmerge(w, adapters)
        across = -(-200 // TILE_COLUMNS)
        for chunk in range(len(log.chunks) // 16):
            row, column = chunk // across * TILE_ROWS, chunk % across * TILE_COLUMNS
            part = slice(row, row + TILE_ROWS), slice(column, column + TILE_COLUMNS)
            if log.header(chunk)[1] == EMPTY:
                assert torch.equal(bits(w)[part], bits(before)[part])
            else:
                assert torch.equal(decoded(log, chunk, bits(w)[part].clone()), bits(before)[part])
    assert kinds == {EMPTY, SPARSE, BITMAP, DENSE}


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_chunk_that_is_the_cpus_has_its_payload(one_order, fused, dtype):
    """One of 32 x 128 is 4096 elements in row order; gaps of any length."""
    kernels = MergeKernels(one_order)
    far_a, far_b = torch.zeros(2, 128), torch.zeros(32, 2)
    far_a[0, 0] = far_a[1, 126] = 1.0
    far_b[0, 0] = far_b[3, 1] = 3e4  # elements 0 and 510
    factors = [adapter(32, 128, 3, share, torch.float32) for share in (0.0, 0.003, 0.3, 30.0)]
    for special, (a, b) in itertools.product((False, True), [*factors, (far_a, far_b)]):
        w = weight(32, 128, dtype, special=special)
        on_cpu, log = copy(w), kernels.new_log(w, 2 * w.nbytes)
        kernels.merge(w, [Adapter(a, b, 0.5)], log)
        cpu_log = merge_(on_cpu, [a], [b], [0.5])
        _, kind, _, entries, size = log.header(0)
        expected = DeviceLog(cpu_log[64:80], cpu_log[80:]).header(0)
        assert (kind, entries, size) == (expected[1], expected[3], expected[4])
        assert torch.equal(log.data[:size], cpu_log[80:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_chunks_without_room_stay_as_they_were(device, dtype):
    """They are pending; a second launch with more room does them alone, and what is done can be taken back."""
    kernels = MergeKernels(device, dtype.itemsize == 2)
    w = weight(100, 300, dtype)
    before, (a, b) = copy(w), adapter(100, 300, 8, 1.0)
    adapters = [Adapter(a, b, 1.0)]
    kernels.merge(w, adapters, kernels.new_log(w, 2 * w.nbytes))
    w, small = copy(before), kernels.new_log(w, 16 * (kernels.answers.used // 2))
    kernels.merge(w, adapters, small)
    pending = small.kinds() == PENDING
    assert 0 < int(pending.sum()) == kernels.answers.pending < len(pending)
    across = -(-300 // TILE_COLUMNS)
    for chunk in pending.nonzero().flatten().tolist():
        row, column = chunk // across * TILE_ROWS, chunk % across * TILE_COLUMNS
        part = slice(row, row + TILE_ROWS), slice(column, column + TILE_COLUMNS)
        assert torch.equal(bits(w)[part], bits(before)[part])
    half_done = copy(w)
    kernels.unmerge(w, adapters, small)  # pending chunks are left alone
    assert changed_bits(w, before) == 0
    w = half_done
    large = DeviceLog(small.chunks, torch.cat([small.data, torch.zeros(4 * w.nbytes, dtype=torch.uint8)]))
    kernels.merge(w, adapters, large, used=len(small.data) // 16)
    assert kernels.answers.pending == 0
    expected = copy(before)
    kernels.merge(expected, adapters)
    assert changed_bits(w, expected) == 0
    kernels.unmerge(w, adapters, large, check=True)
    assert changed_bits(w, before) == 0


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_a_changed_weight_is_left_as_it_is(schedule, dtype, tensor_cores):
    """A bit of one element, wherever it is; two that change places."""
    w = weight(70, 270, dtype, special=False)
    a, b = adapter(70, 270, 4, 0.3)
    adapters = [Adapter(a, b, 1.0)]
    with emulated(schedule, multiprocessors=1) as module:
        kernels = MergeKernels(module, tensor_cores)
        log = kernels.new_log(w, 2 * w.nbytes)
        kernels.merge(w, adapters, log)
        for place in [(0, 0), (31, 127), (32, 128), (69, 269), (69, 255)]:
            bits(w)[place] ^= 1 << (8 * w.itemsize - 3)
            edited = copy(w)
            assert not kernels.is_unchanged(w, log)
            kernels.unmerge(w, adapters, log, check=True)
            assert kernels.answers.changed == 1
            assert changed_bits(w, edited) == 0
            bits(w)[place] ^= 1 << (8 * w.itemsize - 3)
        w[[3, 5], 7] = w[[5, 3], 7]
        assert not kernels.is_unchanged(w, log)
        w[[3, 5], 7] = w[[5, 3], 7]
        kernels.unmerge(w, adapters, log, check=True)
    assert changed_bits(w, weight(70, 270, dtype, special=False)) == 0


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
@pytest.mark.parametrize("logged", [True, False])
def test_swap_is_unmerge_and_merge(device, dtype, tensor_cores, logged):
    kernels = MergeKernels(device, tensor_cores)
    w = weight(70, 200, dtype)
    before = copy(w)
    old, new = ([Adapter(*adapter(70, 200, rank, 0.3, seed=rank), 0.5)] for rank in (3, 20))
    old_log, log, expected_log = (kernels.new_log(w, 2 * w.nbytes) for _ in range(3))
    kernels.merge(w, old, old_log)
    expected = copy(w)
    kernels.unmerge(expected, old, old_log if logged else None)
    back = copy(expected)
    assert not logged or changed_bits(back, before) == 0
    kernels.merge(expected, new, expected_log)
    kernels.swap(w, old, old_log if logged else None, new, log)
    assert changed_bits(w, expected) == 0
    kernels.unmerge(w, new, log, check=True)
    assert kernels.answers.changed == 0
    assert changed_bits(w, back) == 0


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_is_finite(one_order, dtype, tensor_cores):
    """One element that is not, in W or by its sum; elements beyond W's edges do not count."""
    kernels = MergeKernels(one_order, tensor_cores)
    w, largest = weight(40, 140, dtype, special=False), torch.finfo(dtype).max
    before = copy(w)
    assert kernels.is_finite(w, [Adapter(*adapter(40, 140, 3, 0.1))])
    for row, column in [(39, 139), (0, 127), (33, 128)]:
        a, b = torch.zeros(2, 140, dtype=dtype), torch.zeros(40, 2, dtype=dtype)
        a[1, column] = b[row, 1] = 1.0
        for value, scaling, finite in [
            (torch.inf, 1.0, False),
            (torch.nan, 1.0, False),
            (largest, largest, False),
            (-largest, largest, True),
        ]:
            w[row, column] = value
            assert kernels.is_finite(w, [Adapter(a, b, scaling)]) is finite
            w.copy_(before)
    assert changed_bits(w, before) == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing(one_order, dtype):
    kernels = MergeKernels(one_order, dtype.itemsize == 2)
    for shape in [(0, 8), (8, 0), (0, 4, 8)]:
        w = torch.zeros(shape, dtype=dtype)
        a, b = torch.ones(*shape[:-2], 2, shape[-1]), torch.ones(*shape[:-1], 2)
        log = kernels.new_log(w)
        kernels.merge(w, [Adapter(a, b)], log)
        kernels.unmerge(w, [Adapter(a, b)], log, check=True)
        assert kernels.is_finite(w, [Adapter(a, b)])
        assert kernels.answers == (0, 0, 0, 0)


def test_bad_arguments(one_order):
    w, (a, b) = weight(8, 8, torch.float32), adapter(8, 8, 2)
    for message, call in [
        ("rank: expected at least 1", lambda k: k.merge(w, [Adapter(a[:0], b[:, :0])])),
        ("adapters: expected at least one", lambda k: k.merge(w, [])),
        ("check: expected a log", lambda k: k.unmerge(w, [Adapter(a, b)], None, check=True)),
        ("tensor_cores: expected 16-bit w", lambda _: MergeKernels(one_order, True).merge(w, [Adapter(a, b)])),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(MergeKernels(one_order))
    assert changed_bits(w, weight(8, 8, torch.float32)) == 0


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_a_damaged_log_is_read_within_its_memory(one_order, dtype, tensor_cores):
    """Sizes are compared before a launch; payloads may be anything, and the emulator traps what leaves them."""
    kernels = MergeKernels(one_order, tensor_cores)
    w = weight(32, 130, dtype, special=False)
    a, b = adapter(32, 130, 3, 0.01)
    generator = torch.Generator().manual_seed(3)
    for kind, entries, size in [(SPARSE, 3000, 6000), (SPARSE, 1, 2), (BITMAP, 7, 519), (BITMAP, 2, 10)]:
        log = kernels.new_log(w, 6016 if size > 2000 else 528)
        log.data.copy_(torch.randint(0, 256, log.data.shape, generator=generator, dtype=torch.uint8))
        for chunk in log.chunks.view(-1, 16):
            chunk.zero_()
            chunk[7] = kind
            chunk[12:16] = torch.tensor([entries & 255, entries >> 8, size & 255, size >> 8], dtype=torch.uint8)
        kernels.unmerge(w, [Adapter(a, b)], log)
    assert kernels.answers == (0, 0, 0, 0)


@pytest.mark.parametrize(("dtype", "tensor_cores"), WAYS)
def test_the_same_bits_in_every_order(dtype, tensor_cores):
    """Of W and, but for where payloads lie, of the log."""
    a, b = adapter(100, 300, 20, 0.1)
    results = []
    for schedule in [*SCHEDULES, SCHEDULES[0]._replace(resident_blocks=16)]:
        with emulated(schedule) as module:
            kernels, w = MergeKernels(module, tensor_cores), weight(100, 300, dtype)
            log = kernels.new_log(w, 2 * w.nbytes)
            kernels.merge(w, [Adapter(a, b)], log)
            headers = [log.header(i) for i in range(len(log.chunks) // 16)]
            payloads = [log.data[h[0] : h[0] + h[4]].tolist() for h in headers]
            results.append((bits(w).clone(), [h[1:] for h in headers], payloads))
    for w, headers, payloads in results[1:]:
        assert torch.equal(w, results[0][0])
        assert (headers, payloads) == results[0][1:]


COSTS = [
    # dtype, factors', rank, requested over the least, products of mma a product of factors
    (torch.bfloat16, torch.bfloat16, 8, 1.25, 1),
    (torch.bfloat16, torch.bfloat16, 64, 2.0, 1),
    (torch.bfloat16, torch.float32, 16, 1.5, 3),
    (torch.float16, torch.float16, 16, 1.5, 3),
    (torch.float32, torch.float32, 16, 1.5, 0),
    (torch.float32, torch.float32, 64, 2.5, 0),
]


@pytest.mark.emulator
@pytest.mark.parametrize(("dtype", "factor_dtype", "rank", "requested", "terms"), COSTS)
def test_bytes(dtype, factor_dtype, rank, requested, terms):
    """W passes once, and little besides; tensor cores multiply what the factors ask for."""
    out, inp = 512, 2048
    w, (a, b) = weight(out, inp, dtype, special=False), adapter(out, inp, rank, 0.02, factor_dtype)
    adapters, names = [Adapter(a, b, 0.5)], (str(dtype)[6:], str(factor_dtype)[6:])
    with emulated(SCHEDULES[0], multiprocessors=108) as module:
        kernels = MergeKernels(module, dtype.itemsize == 2)
        log = kernels.new_log(w)
        kernels.merge(w, adapters, log)
        assert kernels.answers.pending == 0
        merging, kernels.launches = kernels.launches, []
        kernels.unmerge(w, adapters, log, check=True)
    least = cost.merge(out, inp, rank, *names, payload_bytes=log.payload_bytes())
    assert 0 < log.payload_bytes() < w.nbytes // 16  # the room that a log begins with is enough
    for launches, count in [(merging, cost.LAUNCHES["merge"]), (kernels.launches, cost.LAUNCHES["unmerge"])]:
        assert len(launches) == count
        hold(launches, least, requested)
        assert sum(launch["mma"] for launch in launches) == out // 16 * (inp // 8) * -(-rank // 16) * terms


def hold(launches: list[dict], least: Cost, requested: float) -> None:
    """Distinct sectors, and bytes asked for."""
    moved = 32 * sum(launch["load_sectors"] + launch["store_sectors"] for launch in launches)
    asked = sum(launch["load_bytes"] + launch["store_bytes"] for launch in launches)
    assert least.bytes <= moved <= 1.25 * least.bytes, moved / least.bytes
    assert asked <= requested * least.bytes, asked / least.bytes
