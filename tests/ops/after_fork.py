"""Program of test_threads.py: forward and backward here, then in a forked child, which has to get the same.

after_fork.py PARENT CHILD: torch's threads in each. Prints "agrees", or "skip: " and why.
"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable

import torch
from torch import Tensor

from pylora.ops import lora_add, lora_linear
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.lora import RNG
from pylora.testing.tolerances import assert_near

TOKENS, IN_FEATURES, OUT_FEATURES, RANK = 150, 520, 390, 16


def results(f32: LoraInputs, bf16: LoraInputs) -> list[Tensor]:
    """y and the gradients of x, a and b of `lora_linear`, then the same and base's of `lora_add`."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (f32.x, f32.a, f32.b))
    y = lora_linear(x, f32.weight, f32.bias, a, b, 0.7, 0.1, RNG)
    leaves = [t.detach().clone().requires_grad_() for t in (bf16.dy, bf16.x, bf16.a, bf16.b)]
    z = lora_add(*leaves, 0.7, 0.1, RNG)
    grads = torch.autograd.grad(y, [x, a, b], f32.dy)
    return [y.detach(), *grads, z.detach(), *torch.autograd.grad(z, leaves, bf16.dy)]


def in_forked_child(call: Callable[[], list[Tensor]], seconds: float) -> list[Tensor] | None:
    """The results of `call` in a forked child, flat and in f64, or None where it does not come back in time."""
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    # Bytes, since tensors would be shared through memory that the child may still need.
    child = context.Process(target=lambda: sender.send([t.double().numpy().tobytes() for t in call()]), daemon=True)
    child.start()
    sender.close()
    try:
        if not receiver.poll(seconds):
            return None
        return [torch.frombuffer(bytearray(data), dtype=torch.float64) for data in receiver.recv()]
    finally:
        child.kill()
        child.join()


def main(parent: int, child: int) -> str:
    f32 = lora_inputs(TOKENS, IN_FEATURES, OUT_FEATURES, RANK)
    bf16 = lora_inputs(TOKENS, IN_FEATURES, OUT_FEATURES, RANK, torch.bfloat16, torch.float32)

    def call_in_child() -> list[Tensor]:
        if child != parent:
            torch.set_num_threads(child)
        return results(f32, bf16)

    torch.set_num_threads(parent)
    expected = results(f32, bf16)
    if child > 1:
        big = torch.randn(1 << 20)
        big.exp()
        if in_forked_child(lambda: [big.exp()], seconds=5) is None:
            return "skip: torch's own threads do not survive a fork: big.exp() hangs in the child"
    got = in_forked_child(call_in_child, seconds=60)
    assert got is not None, "the child hung"
    for t, u in zip(got, expected, strict=True):
        if child == parent or u.dtype == torch.bfloat16:
            assert torch.equal(t, u.double().flatten())
        else:  # torch's products in another number of threads
            assert_near(t.to(u.dtype), u.double().flatten(), IN_FEATURES)
    return "agrees"


if __name__ == "__main__":
    print(main(int(sys.argv[1]), int(sys.argv[2])))
