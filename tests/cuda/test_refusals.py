"""What a device refuses before a kernel runs is said by the launcher, and nothing has been written."""

import pytest
import torch

from pylora.testing.cuda_segments import SegmentKernels
from pylora.testing.emulator import emulated, load
from pylora.testing.pools import pool_inputs


@pytest.mark.emulator
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_too_much_shared_memory(dtype):
    inputs = pool_inputs(70, 64, 64, [64], dtype, popularity="one")
    y, v = inputs.y.clone(), torch.zeros(1, 70, 64)
    with emulated(max_shared_bytes=4096) as module:
        kernels = SegmentKernels(module)
        rows = kernels.one_slot(70)
        message = "shared memory: expected at most 4096 bytes, got [0-9]+"
        with pytest.raises(RuntimeError, match=message):
            kernels.shrink(rows, inputs.x, [inputs.a_pool])
        with pytest.raises(RuntimeError, match=message):
            kernels.expand(rows, y, v, [inputs.b_pool])
        with pytest.raises(RuntimeError, match=message):
            kernels.outer(rows, v[0], inputs.x, 1, dtype)
    assert torch.equal(y, inputs.y)


@pytest.mark.without_gpu
def test_a_missing_driver_is_named():
    """A launch that needs no memory gets as far as the runtime."""
    with pytest.raises(RuntimeError, match=r"driver: expected one that runs CUDA \d+\.\d+, got|device: expected a GPU"):
        load().segments.plan_segments(num_segments=0)
