"""Which slot each row of a batch uses, in the forms that the ops take."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from pylora.ops import bgmv_, sgmv_
from pylora.serving.stacks import LayerStack


class RowPlan:
    """The slots of a batch's sequences. Made once a batch; every layer and every step uses it.

    Args:
        slots: of each sequence; -1 for the base model.
    """

    def __init__(self, slots: Sequence[int]) -> None:
        self.num_rows = len(slots)
        self.is_base = all(slot == -1 for slot in slots)
        self._slots = torch.tensor(list(slots), dtype=torch.int32)
        self._indptr: dict[int, Tensor] = {}

    def add_rows(self, name: str, y: Tensor, x: Tensor, stack: LayerStack) -> None:
        """Add to each sequence what its adapter gives: y[i] += scaling * (x[i] @ A.T) @ B.T. Base rows keep their bits.

        Args:
            name: the layer's, for the error.
            y: `[num_rows, ..., out_features]`, contiguous, written.
            x: `[num_rows, ..., in_features]`.
            stack: the layer's adapters.

        Raises:
            ValueError: x has another number of sequences than the batch.
        """
        if x.shape[0] != self.num_rows:
            raise ValueError(
                f"{name}: input: expected {self.num_rows} sequences, one for each request of the batch, "
                f"got shape {tuple(x.shape)}"
            )
        tokens = 1
        for length in x.shape[1:-1]:
            tokens *= length
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        pools = (stack.a_pool, stack.b_pool, stack.ranks, stack.scalings)
        if tokens == 1:
            bgmv_(y, x, *pools, self._slots)
            return
        indptr = self._indptr.get(tokens)
        if indptr is None:
            indptr = torch.arange(0, (self.num_rows + 1) * tokens, max(tokens, 1), dtype=torch.int32)
            indptr = self._indptr.setdefault(tokens, indptr if tokens else torch.zeros(self.num_rows + 1).int())
        sgmv_(y, x, *pools, indptr, self._slots)


class PackedPlan:
    """The slots of tokens that lie side by side in one row, request by request: transformers' continuous batching.

    Args:
        slots: of each request; -1 for the base model.
        lengths: how many tokens of it there are.
    """

    def __init__(self, slots: Sequence[int], lengths: Sequence[int]) -> None:
        self.is_base = all(slot == -1 for slot in slots)
        self.num_tokens = sum(lengths)
        self._slots = torch.tensor(list(slots), dtype=torch.int32)
        self._indptr = torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32)
        self._is_single = all(length == 1 for length in lengths)

    def add_rows(self, name: str, y: Tensor, x: Tensor, stack: LayerStack) -> None:
        """Add to each token what its request's adapter gives. Base tokens keep their bits.

        Args:
            name: the layer's, for the error.
            y: `[1, num_tokens, out_features]`, contiguous, written.
            x: `[1, num_tokens, in_features]`.
            stack: the layer's adapters.

        Raises:
            ValueError: x has another number of tokens than the batch.
        """
        y, x = y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1])
        if x.shape[0] != self.num_tokens:
            raise ValueError(f"{name}: input: expected the batch's {self.num_tokens} tokens, got {x.shape[0]}")
        pools = (stack.a_pool, stack.b_pool, stack.ranks, stack.scalings)
        if self._is_single:
            bgmv_(y, x, *pools, self._slots)
        else:
            sgmv_(y, x, *pools, self._indptr, self._slots)
