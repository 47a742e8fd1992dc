"""On which devices a layer's forward uses the ops; csrc/binding/kernel_device.h."""

import torch

from pylora._native import C


def kernels_serve(device: torch.device) -> bool:
    """Whether this build's kernels run on the device: the CPU, and GPUs that it has code for.

    The ops themselves run elsewhere too, as torch's operators one after another. torch.compile takes the answer for a
    constant.

    Args:
        device: Of a tensor, so that a GPU has its index.
    """
    return device.type == "cpu" or (device.type == "cuda" and _has_code_for_gpu(device.index))


def _has_code_for_gpu(index: int) -> bool:
    return C.has_code_for_gpu(index)


# What torch.compiler.assume_constant_result does, without the second that its import of the compiler takes.
_has_code_for_gpu._dynamo_marked_constant = True  # type: ignore[attr-defined]
