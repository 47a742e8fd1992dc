"""Measuring a model: perplexity on text, and whether two sets of logits agree."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch

from errors import DemoError


def perplexity(model: torch.nn.Module, rows: torch.Tensor, on_row: Callable[[], None]) -> float:
    """exp of the mean loss over every predicted token; each row's first token is given, not predicted.

    Args:
        model: a causal language model of transformers; it is left in evaluation mode.
        rows: int64 ``[num_rows, row_tokens]``; all rows are equally long, so the mean over rows is that over tokens.
        on_row: called after each row.
    """
    model.eval()
    total = 0.0
    with torch.inference_mode():
        for row in rows:
            total += model(input_ids=row[None], labels=row[None], use_cache=False).loss.item()
            on_row()
    return math.exp(total / len(rows))


def logits_of(model: torch.nn.Module, row: torch.Tensor) -> torch.Tensor:
    """The model's scores for the token after each token of one row: float32 ``[row_tokens, vocabulary]``."""
    model.eval()
    with torch.inference_mode():
        return model(input_ids=row[None], use_cache=False).logits[0].float()


def require_agreement(what: str, logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> float:
    """The largest difference between two sets of logits of one shape.

    Raises:
        DemoError: it is above ``tolerance``, or not a number.
    """
    difference = (logits - expected).abs().max().item()
    if not difference <= tolerance:  # written so that NaN fails, too
        raise DemoError(f"{what} logits: expected max |dlogit| <= {tolerance:g}, got {difference:g}")
    return difference
