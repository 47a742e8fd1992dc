"""The training loop: nothing here knows about LoRA, except that only some parameters ask for a gradient."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class TrainingPlan:
    """How to train.

    Attributes:
        steps: optimiser steps.
        rows_per_step: rows of tokens in one batch. The logits of a row of 256 tokens over a vocabulary of 49,152 are
            50 MB, and several copies of them live in a backward pass: more rows cost memory, not accuracy.
        learning_rate: the peak. Adapters start as zero and are few, so it is about ten times that of full fine-tuning.
        warmup_steps: steps over which the rate rises to the peak before it falls along a half cosine.
        max_gradient_norm: longer gradients are scaled down to this length.
        seed: fixes the order of the rows and, with dropout, the masks.
    """

    steps: int
    rows_per_step: int
    learning_rate: float
    warmup_steps: int
    max_gradient_norm: float = 1.0
    seed: int = 0

    def rate_factor(self, step: int) -> float:
        """Learning rate at a step (from 0), as a share of the peak."""
        if step < self.warmup_steps:
            return (step + 1) / (self.warmup_steps + 1)
        progress = (step - self.warmup_steps) / max(1, self.steps - self.warmup_steps)
        return 0.5 * (1.0 + math.cos(math.pi * progress))


def fine_tune(
    model: torch.nn.Module, rows: torch.Tensor, plan: TrainingPlan, on_step: Callable[[int, float], None]
) -> list[float]:
    """Train the parameters that ask for a gradient to predict each next token.

    Args:
        model: a causal language model of transformers, adapters included.
        rows: int64 ``[num_rows, row_tokens]``; each is used once before any is used again.
        plan: how to train.
        on_step: called after each step with its number (from 0) and its loss.

    Returns:
        The loss of each step, in nats per token.
    """
    torch.manual_seed(plan.seed)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=plan.learning_rate, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, plan.rate_factor)
    needed = plan.steps * plan.rows_per_step
    epochs = math.ceil(needed / len(rows))
    order = torch.cat([torch.randperm(len(rows)) for _ in range(epochs)])[:needed]

    losses = []
    model.train()
    for step, chosen in enumerate(order.view(plan.steps, plan.rows_per_step)):
        batch = rows[chosen]
        loss = model(input_ids=batch, labels=batch, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, plan.max_gradient_norm)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        on_step(step, losses[-1])
    model.eval()
    return losses
