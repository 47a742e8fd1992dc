"""The ops under any number of torch's threads, from several Python threads, without the GIL, and after a fork."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

from pylora.ops import lora_add, lora_dropout, lora_linear
from pylora.testing.factories import LoraInputs, lora_inputs
from pylora.testing.lora import RNG
from pylora.testing.tolerances import assert_near

LOW = [torch.bfloat16, torch.float16]
# A row's work is far above the launchers' grain, so that torch gives each thread a range.
TOKENS, IN_FEATURES, OUT_FEATURES, RANK = 150, 520, 390, 16


@contextmanager
def torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def with_threads(call: Callable[[], list[Tensor]]) -> list[list[Tensor]]:
    """The results with one, two and three threads."""
    results = []
    for count in (1, 2, 3):
        with torch_threads(count):
            results.append(call())
    return results


def same_bits(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(t, u) for t, u in zip(left, right, strict=True))


def linear(inputs: LoraInputs, dropout_p: float = 0.0) -> list[Tensor]:
    """y of `lora_linear`, and the gradients of x, a and b."""
    x, a, b = (t.detach().clone().requires_grad_() for t in (inputs.x, inputs.a, inputs.b))
    y = lora_linear(x, inputs.weight, inputs.bias, a, b, 0.7, dropout_p, RNG)
    return [y.detach(), *torch.autograd.grad(y, [x, a, b], inputs.dy)]


def add(inputs: LoraInputs, dropout_p: float = 0.0) -> list[Tensor]:
    """y of `lora_add`, and the gradients of base, x, a and b."""
    leaves = [t.detach().clone().requires_grad_() for t in (inputs.dy, inputs.x, inputs.a, inputs.b)]
    y = lora_add(*leaves, 0.7, dropout_p, RNG)
    return [y.detach(), *torch.autograd.grad(y, leaves, inputs.dy)]


@pytest.mark.parametrize("dtype", LOW)
@pytest.mark.parametrize("factor_dtype", [torch.float32, None])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_16_bit_adapters_have_the_same_bits_with_any_number_of_threads(dtype, factor_dtype, dropout_p):
    """Forward and backward of the low-rank part, all of it pylora's own kernels."""
    inputs = lora_inputs(TOKENS, IN_FEATURES, OUT_FEATURES, RANK, dtype, factor_dtype)
    one, two, three = with_threads(lambda: add(inputs, dropout_p))
    assert same_bits(one, two)
    assert same_bits(one, three)


@pytest.mark.parametrize("num_tokens", [1, 2, 3, 64, TOKENS])
def test_f32_forward_has_the_same_bits_with_any_number_of_threads(num_tokens):
    """Up to 192 rows the base product of f32 is pylora's own as well."""
    inputs = lora_inputs(num_tokens, IN_FEATURES, OUT_FEATURES, RANK)

    def forward() -> list[Tensor]:
        return [lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, 0.7)]

    one, two, three = with_threads(forward)
    assert same_bits(one, two)
    assert same_bits(one, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
def test_dropout_has_the_same_bits_with_any_number_of_threads(dtype):
    x = torch.randn(700, 1000).to(dtype)
    one, two, three = with_threads(lambda: [lora_dropout(x, 0.3, RNG)])
    assert same_bits(one, two)
    assert same_bits(one, three)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *LOW])
@pytest.mark.parametrize("dropout_p", [0.0, 0.1])
def test_torch_products_agree_with_any_number_of_threads(dtype, dropout_p):
    """Base products and f32 gradients may be torch's, which promises no bits: within rounding."""
    inputs = lora_inputs(300, IN_FEATURES, OUT_FEATURES, RANK, dtype)
    one, *others = with_threads(lambda: linear(inputs, dropout_p))
    for other in others:
        for got, expected in zip(other, one, strict=True):
            assert_near(got, expected.double(), IN_FEATURES, roundings=4)


@pytest.mark.parametrize("threads", [1, 2])
def test_several_python_threads_at_once(threads):
    """Forward and backward of eight inputs in four Python threads give the bits that each gives alone."""
    cases = [
        lora_inputs(40 + i, 130, 90, 8, [torch.float32, torch.bfloat16][i % 2], torch.float32, seed=i) for i in range(8)
    ]
    with torch_threads(threads):
        alone = [linear(case, 0.1) + add(case) for case in cases]
        with ThreadPoolExecutor(4) as pool:
            for _ in range(5):
                together = list(pool.map(lambda case: linear(case, 0.1) + add(case), cases))
                assert all(same_bits(t, u) for t, u in zip(together, alone, strict=True))


def order_of_events(call: Callable[[], object]) -> list[str]:
    """What comes after what when a thread makes `call` while this one waits to run.

    The interpreter takes the GIL from no thread meanwhile: this one runs before "after" only if `call` gives it up.
    """
    events: list[str] = []
    started = threading.Event()

    def work() -> None:
        started.set()
        call()
        events.append("after")

    interval = sys.getswitchinterval()
    worker = threading.Thread(target=work)
    sys.setswitchinterval(1e4)
    try:
        worker.start()
        started.wait()
        events.append("another thread")
        worker.join()
    finally:
        sys.setswitchinterval(interval)
    return events


def test_ops_run_without_the_gil():
    inputs = lora_inputs(4000, 2048, 2048, 64, torch.bfloat16, torch.float32)
    x, weight, a, b = inputs.x, inputs.weight, inputs.a, inputs.b
    released = ["another thread", "after"]
    assert order_of_events(lambda: sum(range(10**6))) == ["after", "another thread"]  # the method sees a held GIL
    assert order_of_events(lambda: lora_linear(x, weight, None, a, b, 1.0)) == released
    assert order_of_events(lambda: lora_add(inputs.dy, x, a, b, 1.0)) == released
    assert order_of_events(lambda: lora_dropout(x, 0.5, RNG)) == released


def test_grad_modes_belong_to_their_thread():
    """inference_mode and no_grad in other threads, entered before and left after this thread's call."""
    inputs = lora_inputs(6, 16, 24, 4).requires_grad_()
    entered, leave = threading.Barrier(3), threading.Event()

    def call() -> Tensor:
        return lora_linear(*inputs.leaves(), inputs.scaling)

    def inside(mode: Callable[[], object]) -> tuple[Tensor, Tensor]:
        with mode():  # type: ignore[attr-defined]
            first = call()
            entered.wait(60)
            assert leave.wait(60)
            return first, call()

    with ThreadPoolExecutor(2) as pool:
        inference, no_grad = pool.submit(inside, torch.inference_mode), pool.submit(inside, torch.no_grad)
        entered.wait(60)
        y = call()
        grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
        leave.set()
        assert all(t.is_inference() for t in inference.result(60))
        assert not any(t.requires_grad or t.is_inference() for t in no_grad.result(60))
    assert y.requires_grad
    assert not y.is_inference()
    assert all(bool(g.abs().sum() > 0) for g in grads)
    assert same_bits([y], [inference.result()[0].clone()])


THREADS_STARTED = """
import os, torch
from pylora.ops import lora_dropout
x, rng = torch.empty(700, 1000), torch.tensor([1, 2])
torch.set_num_threads(3)
before = len(os.listdir("/proc/self/task"))
lora_dropout(x, 0.3, rng)
print(len(os.listdir("/proc/self/task")) - before)
"""


def test_kernels_run_on_torchs_threads():
    """In a process of its own, where nothing has started them yet. Compiled without OpenMP, they would not be."""
    program = [sys.executable, "-c", THREADS_STARTED]
    done = subprocess.run(program, capture_output=True, text=True, timeout=100, check=True)
    assert int(done.stdout) == 2


@pytest.mark.parametrize(("parent", "child"), [(1, 1), (2, 1), (2, 2)])
def test_forward_and_backward_after_fork(parent, child):
    """In a child forked from a process that has run both; (2, 1) is what torch's own data loader does.

    The parent is a process of its own: torch refuses a backward in a child once any test before this one has made
    it start threads for a device other than the CPU.
    """
    program = [sys.executable, str(Path(__file__).with_name("after_fork.py")), str(parent), str(child)]
    done = subprocess.run(program, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr
    if done.stdout.startswith("skip: "):
        pytest.skip(done.stdout.removeprefix("skip: ").strip())
    assert done.stdout == "agrees\n"
