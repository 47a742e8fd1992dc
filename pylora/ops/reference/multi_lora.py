"""multi_lora_linear and its like as their definitions, in f64 and differentiable by autograd."""

from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.ops.reference.lora import lora_dropout


def multi_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_slots: Sequence[int],
    dropout_p: Sequence[float] = (),
    rng: Tensor | None = None,
) -> Tensor:
    """Row i of x through the layer with adapter row_slots[i], or with none where that is -1; f64."""
    y = x.double() @ weight.double().T
    if bias is not None:
        y = y + bias.double()
    rows = list(y)
    for i, slot in enumerate(row_slots):
        if slot >= 0:
            dropped = lora_dropout(x, dropout_p[slot] if dropout_p else 0.0, rng)[i]
            rows[i] = rows[i] + scalings[slot] * (dropped @ a[slot].double().T @ b[slot].double().T)
    return torch.stack(rows) if rows else y


def multi_lora_embedding(
    y: Tensor,
    tokens: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_slots: Sequence[int],
    padding_idx: int | None = None,
) -> Tensor:
    """y[i] with what adapter row_slots[i] adds for the tokens of row i, or as it is where that is -1; f64."""
    rows = list(y.double())
    for i, slot in enumerate(row_slots):
        if slot >= 0:
            found = torch.nn.functional.embedding(tokens[i], a[slot].double().T, padding_idx)
            rows[i] = rows[i] + scalings[slot] * (found @ b[slot].double().T)
    return torch.stack(rows) if rows else y.double()


def multi_lora_conv(
    y: Tensor,
    x: Tensor,
    a: Sequence[Tensor],
    b: Sequence[Tensor],
    scalings: Sequence[float],
    row_slots: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int = 1,
) -> Tensor:
    """y[i] with what adapter row_slots[i] adds for x[i], or as it is where that is -1; f64."""
    functional = torch.nn.functional
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[x.dim() - 3]
    rows = list(y.double())
    for i, slot in enumerate(row_slots):
        if slot >= 0:
            v = conv(x[i].double(), a[slot].double(), None, stride, padding, dilation)
            rows[i] = rows[i] + scalings[slot] * conv(v, b[slot].double(), groups=groups)
    return torch.stack(rows) if rows else y.double()
