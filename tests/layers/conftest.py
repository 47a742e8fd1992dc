"""Factories for the layer tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.layers import Linear


@pytest.fixture
def make_layer() -> Callable[..., Linear]:
    """Builds a layer with random adapters default, a1, a2, ..., all active, on an `nn.Linear` or the given base."""

    def make(
        base: nn.Module | None = None,
        adapters: int = 1,
        dtype: torch.dtype = torch.float32,
        bias: bool = True,
        rank: int = 4,
        adapter_dtype: torch.dtype | None = torch.float32,
        **config: Any,
    ) -> Linear:
        base = nn.Linear(24, 40, bias=bias, dtype=dtype) if base is None else base
        base.requires_grad_(False)
        conv1d = not isinstance(base, nn.Linear)
        settings = {"init_lora_weights": False, "fan_in_fan_out": conv1d, **config}
        layer = Linear(base, "default", LoraConfig(**settings), r=rank, lora_alpha=6, is_target_conv_1d_layer=conv1d)
        names = ["default"]
        for i in range(1, adapters):
            names.append(f"a{i}")
            layer.update_layer(names[-1], rank + i, lora_alpha=5, config=LoraConfig(**settings))
        if adapter_dtype is not None:
            layer.lora_A.to(adapter_dtype)
            layer.lora_B.to(adapter_dtype)
        layer.set_adapter(names)
        return layer.eval()

    return make


@pytest.fixture
def reference() -> Callable[..., torch.Tensor]:
    """The layer's output in f64 from its weights: base + sum of scaling * B A x (+ scaling * B's bias)."""

    def compute(layer: Any, x: torch.Tensor, names: list[str] | None = None) -> torch.Tensor:
        base = layer.get_base_layer()
        weight = base.weight.double().t() if layer.fan_in_fan_out else base.weight.double()
        result = x.double() @ weight.t()
        if base.bias is not None:
            result = result + base.bias.double()
        for name in layer.active_adapters if names is None else names:
            a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double()
            low = x.double() @ a.t() @ b.t()
            if layer.lora_B[name].bias is not None:
                low = low + layer.lora_B[name].bias.double()
            result = result + layer.scaling[name] * low
        return result

    return compute
