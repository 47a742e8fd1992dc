"""The ops on CUDA tensors, where there is a GPU and pylora was built for it; skipped elsewhere."""

import pytest
import torch

from pylora.bench import gpu
from pylora.ops import (
    bgmv_,
    lora_add,
    lora_dropout,
    lora_linear,
    merge_,
    merge_is_finite,
    sgmv_,
    swap_,
    unmerge_,
)
from pylora.ops.reference import lora as reference
from pylora.ops.reference.sgmv import bgmv as bgmv_reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.lora import RNG
from pylora.testing.merge import adapter, bits, changed_bits, check_values, copy, weight
from pylora.testing.pools import pool_inputs
from pylora.testing.tolerances import assert_near

LACKING = gpu.unusable()
pytestmark = [pytest.mark.cuda, pytest.mark.skipif(bool(LACKING), reason=LACKING)]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TWO_PARTS = 2**14
"""v and g in two bf16 are good to 2^-17 of their terms: as long a sum's error as this."""


@pytest.fixture(autouse=True)
def full_precision():
    """torch's own f32 products without TF32, which the definition knows nothing of."""
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def on_gpu(inputs: LoraInputs) -> LoraInputs:
    for name, value in vars(inputs).items():
        if isinstance(value, torch.Tensor):
            setattr(inputs, name, value.cuda())
    return inputs


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [0, 1, 9, 130])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_lora_linear_and_its_gradients(dtype, rows, dropout_p):
    inputs = on_gpu(lora_inputs(rows, 136, 200, 9, dtype)).requires_grad_()
    rng = RNG.cuda()
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling, dropout_p, rng)
    grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    wide = [t.detach().double().requires_grad_() for t in inputs.leaves()]
    expected = reference.lora_linear(*wide, inputs.scaling, dropout_p, rng)
    assert_near(y, expected, 136 + TWO_PARTS, "y", roundings=2)
    expected_grads = torch.autograd.grad(expected, wide, inputs.dy.double())
    for name, grad, wanted in zip(("x", "weight", "bias", "a", "b"), grads, expected_grads, strict=True):
        assert_near(grad, wanted, 200 + rows + TWO_PARTS, f"gradient of {name}", roundings=2)


@pytest.mark.parametrize("dtype", DTYPES)
def test_dropout_drops_what_the_cpu_drops(dtype):
    x = torch.randn(37, 133).to(dtype)
    assert torch.equal(lora_dropout(x.cuda(), 0.3, RNG.cuda()).cpu(), lora_dropout(x, 0.3, RNG))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sort", [False, True])
def test_pools(dtype, sort):
    inputs = pool_inputs(70, 136, 200, [16, 5, 0, 70], dtype)
    if sort:
        inputs.token_slots = inputs.token_slots.sort().values
    expected = bgmv_reference(
        inputs.y, inputs.x, inputs.a_pool, inputs.b_pool, inputs.ranks, inputs.scalings, inputs.token_slots
    )
    y = inputs.y.cuda()
    tensors = (y, inputs.x.cuda(), inputs.a_pool.cuda(), inputs.b_pool.cuda(), inputs.ranks, inputs.scalings)
    if sort:
        sgmv_(*tensors, *inputs.sorted_segments())
    else:
        bgmv_(*tensors, inputs.token_slots)
    assert_near(y.cpu(), expected, 206 + TWO_PARTS, "y", roundings=2)
    untouched = inputs.token_slots < 0
    assert torch.equal(y.cpu()[untouched], inputs.y[untouched])


@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_a_graph_replays(dropout_p):
    """On new inputs, and with the masks of the rng that is there at the time."""
    inputs, rng = on_gpu(lora_inputs(33, 136, 200, 9, torch.bfloat16)), RNG.cuda()

    def call() -> torch.Tensor:
        with torch.inference_mode():
            return lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling, dropout_p, rng)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = call()
    for seed in range(3):
        inputs.x.copy_(torch.randn_like(inputs.x))
        rng.copy_(torch.tensor([seed, 5]))
        graph.replay()
        assert torch.equal(y, call())


def test_autocast():
    inputs = on_gpu(lora_inputs(9, 64, 40, 4))
    with torch.autocast("cuda", dtype=torch.bfloat16):
        y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling)
    assert y.dtype == torch.bfloat16


def test_mixed_devices_are_named():
    inputs = on_gpu(lora_inputs(9, 64, 40, 4))
    with pytest.raises(ValueError, match=r"lora_add: a: expected .*cuda:0.*, got cpu"):
        lora_add(inputs.dy, inputs.x, inputs.a.cpu(), inputs.b, inputs.scaling)
    pools = pool_inputs(9, 64, 40, [4])
    with pytest.raises(ValueError, match=r"bgmv_: \w+: expected .*, got"):
        bgmv_(pools.y, pools.x.cuda(), pools.a_pool, pools.b_pool, pools.ranks, pools.scalings, pools.token_slots)


MERGED = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


@pytest.mark.parametrize("dtype", MERGED)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("share", [0.02, 30.0])
def test_merge_and_back(dtype, transposed, share):
    """A large share asks for more room than a log begins with. f32 and f64 have the CPU's bits."""
    w = weight(300, 1000, dtype, transposed=transposed).cuda()
    before, (a, b) = copy(w), adapter(300, 1000, 16, share)
    factors = [a.cuda()], [b.cuda()], [0.75]
    log = merge_(w, *factors)
    assert log.device == w.device
    on_cpu = copy(before.cpu())
    merge_(on_cpu, [a], [b], [0.75], log=False)
    if dtype in (torch.float32, torch.float64):
        assert changed_bits(w.cpu(), on_cpu) == 0
    else:
        check_values(w.cpu(), before.cpu(), [a], [b], [0.75], factor_error=2.0**-15)
    unmerge_(w, *factors, log=log)
    assert changed_bits(w, before) == 0


@pytest.mark.parametrize("dtype", MERGED)
@pytest.mark.parametrize("logged", [True, False])
def test_swap(dtype, logged):
    w = weight(130, 333, dtype).cuda()
    old, new = (adapter(130, 333, rank, 0.3, seed=rank) for rank in (4, 20))
    old_factors, factors = (([a.cuda()], [b.cuda()], [0.5]) for a, b in (old, new))
    old_log = merge_(w, *old_factors)
    expected = copy(w)
    unmerge_(expected, *old_factors, log=old_log if logged else None)
    back = copy(expected)
    merge_(expected, *factors)
    log = swap_(w, *old_factors, None, old_log if logged else None, *factors)
    assert changed_bits(w, expected) == 0
    unmerge_(w, *factors, log=log)
    assert changed_bits(w, back) == 0


def test_a_log_is_undone_where_it_was_made():
    w, (a, b) = weight(70, 200, torch.float32), adapter(70, 200, 4)
    on_gpu, factors = w.cuda(), ([a.cuda()], [b.cuda()], [1.0])
    cpu_log, log = merge_(w, [a], [b], [1.0]), merge_(on_gpu, *factors)
    merged, merged_on_gpu = w.clone(), on_gpu.clone()
    with pytest.raises(ValueError, match="log: expected a contiguous vector on cuda:0, got"):
        unmerge_(on_gpu, *factors, log=cpu_log)
    with pytest.raises(
        NotImplementedError, match="log: expected the log of a merge on a GPU, got that of one on the CPU"
    ):
        unmerge_(on_gpu, *factors, log=cpu_log.cuda())
    with pytest.raises(
        NotImplementedError, match="log: expected the log of a merge on the CPU, got that of one on a GPU"
    ):
        unmerge_(w, [a], [b], [1.0], log=log.cpu())
    assert changed_bits(w, merged) == changed_bits(on_gpu, merged_on_gpu) == 0


@pytest.mark.parametrize("dtype", MERGED)
def test_a_changed_weight_is_not_unmerged(dtype):
    w, (a, b) = weight(300, 700, dtype, special=False).cuda(), adapter(300, 700, 4)
    factors = [a.cuda()], [b.cuda()], [1.0]
    log = merge_(w, *factors)
    bits(w)[299, 699] ^= 1
    edited = w.clone()
    with pytest.raises(ValueError, match="changed after the merge"):
        unmerge_(w, *factors, log=log)
    with pytest.raises(ValueError, match="changed after the merge"):
        swap_(w, *factors, None, log, *factors)
    assert changed_bits(w, edited) == 0
    assert merge_is_finite(w, *factors)
    w[0, 0] = torch.inf
    assert not merge_is_finite(w, *factors)
