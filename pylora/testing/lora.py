"""The lora ops held to their definition: results and gradients in f64, and the comparison element by element."""

import torch
from torch import Tensor

from pylora.ops import lora_linear
from pylora.ops.reference import lora as reference
from pylora.testing.factories import LoraInputs
from pylora.testing.tolerances import assert_near

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
"""Storage types of every op."""

RNG = torch.tensor([0x0123456789ABCDEF, -0x0FEDCBA987654321])
"""A state of dropout's generator, both words with bits in either half."""


def lora_expected(
    inputs: LoraInputs, dropout_p: float = 0.0, rng: Tensor | None = None, absolute: bool = False
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """y and the gradients of the leaves from the definition of `lora_linear`, in f64.

    Args:
        inputs: The op's arguments.
        dropout_p: Probability of dropout.
        rng: State of its generator, int64 [2].
        absolute: Take every argument's magnitudes: the results are then the sums of the magnitudes of all terms.
    """
    wide = [t.detach().double() for t in (*inputs.leaves(), inputs.dy)]
    *leaves, dy = [t.abs() if absolute else t for t in wide]
    x, weight, *bias, a, b = [t.requires_grad_() for t in leaves]
    y = reference.lora_linear(x, weight, bias[0] if bias else None, a, b, inputs.scaling, dropout_p, rng)
    return y.detach(), torch.autograd.grad(y, leaves, dy)


def check_lora(inputs: LoraInputs, dropout_p: float = 0.0, rng: Tensor | None = None) -> None:
    """Fails unless `lora_linear` and its gradients of all leaves are within rounding of the definition.

    Args:
        inputs: The op's arguments; the leaves require gradients afterwards.
        dropout_p: Probability of dropout.
        rng: State of its generator, int64 [2].
    """
    inputs.requires_grad_()
    y = lora_linear(inputs.x, inputs.weight, inputs.bias, inputs.a, inputs.b, inputs.scaling, dropout_p, rng)
    grads = torch.autograd.grad(y, inputs.leaves(), inputs.dy)
    y_ref, grads_ref = lora_expected(inputs, dropout_p, rng)
    y_size, grads_size = lora_expected(inputs, dropout_p, rng, absolute=True)
    longest = max(*inputs.x.shape, *inputs.weight.shape, *inputs.a.shape)
    assert y.dtype == inputs.x.dtype
    sums_in = torch.float64 if inputs.x.dtype == torch.float64 else torch.float32
    # torch may round the product before it adds the bias: three roundings with the delta's.
    assert_near(y, y_ref, longest, "y", y_size, roundings=3, sums_in=sums_in)
    names = ["dx", "dweight", *(["dbias"] if inputs.bias is not None else []), "da", "db"]
    for name, leaf, grad, grad_ref, size in zip(names, inputs.leaves(), grads, grads_ref, grads_size, strict=True):
        assert grad.dtype == leaf.dtype
        assert_near(grad, grad_ref, longest, name, size, sums_in=sums_in)
