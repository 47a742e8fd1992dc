"""PEFT's models with `patch_peft` in effect, and what shows which way a layer took."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.integrations.patch_peft import forward as patched
from pylora.layers import linear


@pytest.fixture
def patch() -> Iterator[Callable[[], None]]:
    """Calls `patch_peft`, which ends with the test."""
    pytest.importorskip("peft")

    def call() -> None:
        assert pylora.patch_peft() is True

    yield call
    pylora.unpatch_peft()


@pytest.fixture
def ops(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """How many calls of dense layers pylora's ops have served: "dense", and "mixed" for batches of several adapters."""
    counts = {"dense": 0, "mixed": 0}

    def counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            result = function(*args)
            counts[name] += result is not None
            return result

        return call

    monkeypatch.setattr(patched, "dense_forward", counted("dense", patched.dense_forward))
    monkeypatch.setattr(linear, "dense_mixed_forward", counted("mixed", linear.dense_mixed_forward))
    return counts


class Net(nn.Module):
    """Two dense layers, the first with a bias."""

    def __init__(self, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(24, 40, dtype=dtype)
        self.second = nn.Linear(40, 24, bias=False, dtype=dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(torch.tanh(self.first(x)))


@pytest.fixture
def make() -> Callable[..., Any]:
    """Builds PEFT's model of a `Net`, the same weights each time, in evaluation mode; settings are LoraConfig's."""
    peft = pytest.importorskip("peft")

    def build(dtype: torch.dtype = torch.float32, adapters: int = 1, **settings: Any) -> Any:
        torch.manual_seed(0)
        settings = {"r": 4, "target_modules": ["first", "second"], "init_lora_weights": False} | settings
        model = peft.get_peft_model(Net(dtype).requires_grad_(False), peft.LoraConfig(**settings))
        for i in range(1, adapters):
            model.add_adapter(f"a{i}", peft.LoraConfig(**settings))
        if settings.get("use_dora"):
            for module in model.modules():
                if type(module).__name__ == "DoraLinearLayer":
                    module.weight.data *= torch.rand(len(module.weight)).to(dtype) + 0.5
        return model.eval()

    return build
