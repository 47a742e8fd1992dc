"""The ops on CUDA tensors, where there is a GPU and pylora was built for it; skipped elsewhere."""

import pytest
import torch

from pylora.bench import gpu
from pylora.ops import bgmv_, lora_add, lora_dropout, lora_linear, sgmv_
from pylora.ops.reference import lora as reference
from pylora.ops.reference.sgmv import bgmv as bgmv_reference
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.lora import RNG
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
