"""The lora ops as their definitions (csrc/lora/lora.h), in f64 and differentiable by autograd."""

from torch import Tensor

from pylora.ops.reference.philox import dropout_multiplier


def lora_dropout(x: Tensor, dropout_p: float, rng: Tensor | None) -> Tensor:
    """drop(x), f64, in x's shape."""
    x = x.double()
    if dropout_p == 0.0 or rng is None:
        return x
    width = x.shape[-1]
    return x * dropout_multiplier(x.numel() // max(width, 1), width, dropout_p, rng).view(x.shape)


def lora_add(
    base: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float, dropout_p: float = 0.0, rng: Tensor | None = None
) -> Tensor:
    """base + scaling * (drop(x) a^T) b^T, f64."""
    v = lora_dropout(x, dropout_p, rng) @ a.double().T
    return base.double() + scaling * (v @ b.double().T)


def lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Tensor,
    b: Tensor,
    scaling: float,
    dropout_p: float = 0.0,
    rng: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias + scaling * (drop(x) a^T) b^T, f64."""
    base = x.double() @ weight.double().T
    if bias is not None:
        base = base + bias.double()
    return lora_add(base, x, a, b, scaling, dropout_p, rng)
