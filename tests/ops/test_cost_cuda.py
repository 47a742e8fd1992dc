"""The cost model of the CUDA kernels: formulas by hand, and what data sheets make of them."""

import pytest

from pylora.ops.cost import Cost, cuda

ONE = [cuda.Segment(64, 16)]


def test_by_hand():
    assert cuda.shrink(ONE, 4096, "bfloat16") == Cost(2 * 64 * 16 * 4096, 2 * 64 * 4096 + 2 * 16 * 4096 + 4 * 64 * 16)
    assert cuda.expand(ONE, 4096, "bfloat16").bytes == 4 * 64 * 4096 + 2 * 16 * 4096 + 4 * 64 * 16
    assert cuda.decode(ONE, 4096, 1024, "bfloat16").bytes == 2 * 64 * (4096 + 2048) + 2 * 16 * 5120
    assert cuda.dora_scale(3, 8, "bfloat16") == Cost(24, 2 * 2 * 24 + 10 * 8)
    assert cuda.dora_scale_backward(3, 8, "float32") == Cost(72, 3 * 4 * 24 + 16 * 8)
    assert cuda.embedding(ONE, 4096, "bfloat16") == cuda.expand(ONE, 4096, "bfloat16") + Cost(0, 2 * 64 * 16 + 8 * 64)
    wide = cuda.backward(ONE, 8, 24, "float64", "float32")
    assert wide == Cost(4 * 64 * 16 * 32, 8 * 64 * (24 + 24) + 4 * 2 * 16 * 32 + 8 * 64 * 16)


def test_segments_count_their_own_ranks():
    """A slot without rank costs nothing, one without rows neither; rows of two slots read two factors."""
    mixed = [cuda.Segment(64, 16), cuda.Segment(100, 0), cuda.Segment(0, 8)]
    assert cuda.shrink(mixed, 512, "bfloat16") == cuda.shrink(ONE, 512, "bfloat16")
    halves = [cuda.Segment(32, 16), cuda.Segment(32, 16)]
    extra = cuda.expand(halves, 512, "bfloat16").bytes - cuda.expand(ONE, 512, "bfloat16").bytes
    assert extra == 2 * 16 * 512


@pytest.mark.parametrize(("gpu", "microseconds"), [("A100", 0.33), ("H100", 0.20), ("L40S", 0.77)])
def test_floor_of_a_shrink(gpu, microseconds):
    """64 rows, rank 16, width 4096: bound by memory on each."""
    seconds = cuda.floor_seconds(cuda.shrink(ONE, 4096, "bfloat16"), cuda.GPUS[gpu], "bfloat16")
    assert seconds * 1e6 == pytest.approx(microseconds, rel=0.03)


def test_f32_is_bound_by_arithmetic():
    cost = cuda.shrink([cuda.Segment(4096, 64)], 4096, "float32")
    gpu = cuda.GPUS["A100"]
    assert cuda.floor_seconds(cost, gpu, "float32") == cost.flops / gpu.fma > cost.bytes / gpu.bandwidth


def test_merge_is_the_cpus_and_its_log():
    plain = cuda.merge(64, 200, 8, "bfloat16", "float32")
    assert plain == Cost(2 * 8 * 64 * 200, 2 * 2 * 64 * 200 + 4 * 8 * 264)
    assert cuda.merge(64, 200, 8, "bfloat16", "float32", payload_bytes=100) == plain + Cost(0, 100 + 16 * 2 * 2)
