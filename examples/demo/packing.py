"""Text to fixed-length rows of tokens: no padding, so every token that is computed is also learnt from."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

from errors import DemoError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_BETWEEN_TOPICS = "\n\n\n"


def pack(tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], row_tokens: int) -> torch.Tensor:
    """Tokenise the texts, lay them end to end and cut that into rows; what does not fill a last row is dropped.

    Returns:
        int64 ``[num_rows, row_tokens]``.

    Raises:
        DemoError: the texts do not fill a single row.
    """
    stream = [token for text in texts for token in tokenizer(text + _BETWEEN_TOPICS)["input_ids"]]
    num_rows = len(stream) // row_tokens
    if num_rows == 0:
        raise DemoError(f"text: expected at least {row_tokens} tokens for one row, got {len(stream)}")
    return torch.tensor(stream[: num_rows * row_tokens]).view(num_rows, row_tokens)
