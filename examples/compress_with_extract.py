"""Fine-tune a whole model, then keep only a LoRA adapter of the change: how much rank does it take?

python examples/compress_with_extract.py [--steps 120]

A tiny Llama learns to count by ones, and is then fine-tuned, all of it, to count by threes. Adapters of growing rank
are extracted from the two checkpoints; each is loaded onto the base and compared with the fine-tuned model. The command
line does the same for real models: pylora extract TUNED BASE OUT --rank 16
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

import pylora
from pylora.offline.base import BaseCheckpoint
from pylora.offline.extract import Wish, extract_adapter

VOCABULARY, LENGTH = 31, 16
RANKS = (1, 2, 4, 8, 16, 32)


class Row(NamedTuple):
    """One line of the table.

    Attributes:
        name: Which model.
        loss: On counting by threes.
        size: Bytes of its file.
    """

    name: str
    loss: float
    size: int


def make_model() -> Any:
    """An untrained Llama of two layers, width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=LENGTH,
    )
    return LlamaForCausalLM(config)


def batch(step: int, seed: int, rows: int = 32) -> torch.Tensor:
    """Rows that count by `step` from random numbers, [rows, LENGTH]."""
    start = torch.randint(VOCABULARY, (rows, 1), generator=torch.Generator().manual_seed(seed))
    return (start + step * torch.arange(LENGTH)) % VOCABULARY


def train(model: Any, step: int, steps: int, names: str = "") -> None:
    """Train the weights with `names` in their names to count by `step`."""
    weights = [weight for name, weight in model.named_parameters() if names in name]
    optimizer = torch.optim.AdamW(weights, lr=3e-3, weight_decay=0.0)
    for seed in range(steps):
        x = batch(step, seed)
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        model.zero_grad()


@torch.no_grad()
def loss_of(model: Any) -> float:
    """On counting by threes, from numbers that were not trained on."""
    x = batch(3, 10**6, rows=64)
    return model(input_ids=x, labels=x).loss.item()


def compare(folder: Path, ranks: Sequence[int], steps: int) -> list[Row]:
    """Train, extract at each rank, and evaluate: the base, the adapters, the fine-tuned model."""
    from transformers import AutoModelForCausalLM

    def weights(name: str, file: str = "model.safetensors") -> int:
        return (folder / name / file).stat().st_size

    model = make_model()
    train(model, 1, steps)
    model.save_pretrained(folder / "base")
    rows = [Row("base", loss_of(model), weights("base"))]
    train(model, 3, steps, "proj")
    model.save_pretrained(folder / "tuned")
    tuned = Row("fine-tuned", loss_of(model), weights("tuned"))
    for rank in ranks:
        name = f"rank-{rank}"
        with BaseCheckpoint(str(folder / "tuned")) as after, BaseCheckpoint(str(folder / "base")) as before:
            extract_adapter(after, before, folder / name, Wish(rank))
        base = AutoModelForCausalLM.from_pretrained(folder / "base")
        adapted = pylora.PeftModel.from_pretrained(base, folder / name)
        rows.append(Row(f"rank {rank}", loss_of(adapted), weights(name, "adapter_model.safetensors")))
    return [*rows, tuned]


def main() -> None:
    parser = argparse.ArgumentParser(description="Extract adapters of growing rank from a fine-tuned model.")
    parser.add_argument("--steps", type=int, default=120, help="of each of the two trainings")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for row in compare(Path(folder), RANKS, arguments.steps):
            print(f"{row.name:12} loss {row.loss:7.4f}   {row.size / 1024:6.0f} KiB")


if __name__ == "__main__":
    main()
