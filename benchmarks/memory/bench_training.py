"""Memory that training needs beyond the parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from pylora.bench import Sweep, Work, benchmark, libraries


def saved_megabytes(model: nn.Module, x: torch.Tensor) -> float:
    """10^6 bytes that one forward keeps for its backward, beside x and the parameters."""
    known = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), x)}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(x)  # held until the hooks are done: a freed tensor's address may be given out again
    del output
    return sum(kept.values()) / 1e6


@benchmark(
    base="",
    unit="MB",
    table=({"dropout": 0.0}, {"dropout": 0.1}),
    sweeps=[Sweep("rows", (128, 512, 1024, 4096), {"dropout": 0.1})],
)
def saved_activations(rows: int = 1024, width: int = 1024, dropout: float = 0.1) -> Work:
    """What one layer keeps for its backward beside its input and its parameters (f32, rank 16)."""
    x = torch.randn(rows, width, requires_grad=True)

    def layer(library: Any) -> Any:
        base = nn.Sequential(nn.Linear(width, width, bias=False)).requires_grad_(False)
        config = library.LoraConfig(r=16, target_modules=["0"], lora_dropout=dropout, init_lora_weights=False)
        return library.get_peft_model(base, config).train()

    models = {}
    for name, library in libraries().items():
        torch.manual_seed(1)
        models[name] = layer(library)

    def check() -> None:
        gradients = []
        for model in models.values():  # without dropout, whose masks differ
            gradients += torch.autograd.grad(model.eval()(x).square().sum(), [x])
            model.train()
        for gradient in gradients:
            torch.testing.assert_close(gradient, gradients[0], rtol=1e-3, atol=1e-3 * float(gradients[0].abs().max()))

    providers: dict[str, Callable[..., object]] = {
        name: (lambda model=model: saved_megabytes(model, x)) for name, model in models.items()
    }
    return Work(providers, check)
