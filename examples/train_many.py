"""Train several adapters on different data in one loop: their batches run as one, each row with its own adapter.

python examples/train_many.py [--steps 30]

Each adapter learns its own task; the losses are those of training each alone (pass --separate to see them).
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence

import torch
from torch import nn

import pylora

RANKS = {"sums": 4, "maxima": 8, "signs": 16}
ROWS = 8  # of each adapter in a step
WIDTH = 64


def make_model() -> pylora.PeftModel:
    """A small network with one adapter for each task, ranks mixed."""
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, 1))
    first, *others = RANKS
    model = pylora.get_peft_model(base, make_config(RANKS[first]), adapter_name=first)
    for name in others:
        model.add_adapter(name, make_config(RANKS[name]))
    return model


def make_config(rank: int) -> pylora.LoraConfig:
    return pylora.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=["0", "2"])


def data(task: str, steps: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Inputs and targets, the same for every run: four batches, over and over."""
    generator = torch.Generator().manual_seed(list(RANKS).index(task))
    x = torch.randn(4, ROWS, WIDTH, generator=generator)
    y = {"sums": x.sum(2) / WIDTH**0.5, "maxima": x.amax(2), "signs": x[:, :, 0].sign()}[task]
    for step in range(steps):
        yield x[step % 4], y[step % 4, :, None]


def train(tasks: Sequence[str], steps: int = 30) -> dict[str, list[float]]:
    """Train the tasks' adapters together, one optimizer for each, and return the losses of every step by task."""
    model = make_model().train()
    model.base_model.set_adapter(list(tasks))
    optimizers = [
        torch.optim.AdamW([p for key, p in model.named_parameters() if f".{task}." in key], lr=1e-2) for task in tasks
    ]
    names = [task for task in tasks for _ in range(ROWS)]
    losses: dict[str, list[float]] = {task: [] for task in tasks}
    for batches in zip(*(data(task, steps) for task in tasks), strict=True):
        with pylora.mixed_training(model, names):
            outputs = model(torch.cat([x for x, _ in batches]))
        # The mean of each task's own rows, then a sum: no adapter's gradient depends on the others.
        means = [nn.functional.mse_loss(output, y) for output, (_, y) in zip(outputs.split(ROWS), batches, strict=True)]
        torch.stack(means).sum().backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        for task, mean in zip(tasks, means, strict=True):
            losses[task].append(mean.item())
    return losses


def main() -> None:
    parser = argparse.ArgumentParser(description="Train several adapters in one loop.")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--separate", action="store_true", help="train each adapter alone too, and print both losses")
    arguments = parser.parse_args()
    together = train(list(RANKS), arguments.steps)
    for task, losses in together.items():
        line = f"{task:8} rank {RANKS[task]:2}: loss {losses[0]:.4f} -> {losses[-1]:.4f}"
        if arguments.separate:
            line += f", alone {train([task], arguments.steps)[task][-1]:.4f}"
        print(line)


if __name__ == "__main__":
    main()
