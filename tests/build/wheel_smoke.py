"""Run by `make wheel` with an empty venv's Python: the installed wheel is whole, and an adapter trains and merges."""

from __future__ import annotations

from pathlib import Path

import torch

import pylora
from pylora import LoraConfig, get_peft_model

package = Path(pylora.__file__).parent
assert "site-packages" in package.parts, package
assert (package / "py.typed").is_file()
assert (package / "_C.pyi").is_file()
assert (package / "bench" / "cases" / "ops" / "bench_lora.py").is_file()

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(16, 32), torch.nn.ReLU(), torch.nn.Linear(32, 4))
model = get_peft_model(model, LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False))
x = torch.randn(8, 16)
optimizer = torch.optim.SGD((p for p in model.parameters() if p.requires_grad), lr=0.05)
losses = []
for _ in range(5):
    loss = model(x).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
assert losses[-1] < losses[0], losses
adapted = model(x)
torch.testing.assert_close(model.merge_and_unload()(x), adapted)
print(f"wheel: pylora {pylora.__version__} from {package}; loss {losses[0]:.4f} -> {losses[-1]:.4f}, merged agrees")
