"""aLoRA: an adapter that acts from a token sequence on that invokes it (https://arxiv.org/abs/2504.12397).

Before the invocation the model computes as its base does, so a key-value cache made by the base model serves. Numerics
and rules are PEFT 0.21's (tuners/lora/variants.py).
"""

from __future__ import annotations

import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from pylora.layers.merging import Delta
from pylora.layers.variants.protocol import LoraVariant
from pylora.layers.variants.registry import register_variant


@register_variant("alora_invocation_tokens", "linear")
class ALoraLinearVariant(LoraVariant):
    """aLoRA on a dense layer. Which tokens a call concerns comes with it, as `alora_offsets`."""

    forward_kwargs: ClassVar[tuple[str, ...]] = ("alora_offsets",)

    @classmethod
    def init(cls, module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Nothing: the factors are all there is."""

    @classmethod
    def require_mergeable(cls, module: Any, active_adapter: str, safe_merge: bool) -> None:
        raise NotImplementedError(f"aLoRA does not support {'safe ' if safe_merge else ''}merging.")

    @classmethod
    def delta(cls, module: Any, active_adapter: str) -> Delta:
        raise NotImplementedError("aLoRA does not support merging.")

    @classmethod
    def unmerge(cls, module: Any, active_adapter: str, orig_weight: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError("aLoRA does not support unmerging.")

    @classmethod
    def forward(
        cls,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        result: torch.Tensor,
        alora_offsets: Sequence[int | None] | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """The running result with the adapter on each sequence's last tokens.

        Args:
            module: The layer.
            active_adapter: The adapter.
            x: [batch, tokens, in] or, with one token a sequence, [batch, in].
            result: The output so far, of x's shape but for the last dimension.
            alora_offsets: For each sequence how many tokens from its end the adapter acts on, None for none. Without
                offsets it acts on none at all; its weights then get gradients of zero.
            **kwargs: Not used.

        Raises:
            ValueError: There are more or fewer offsets than sequences.
        """
        rows = _concerned_rows(alora_offsets, result)
        flat = result.reshape(-1, result.shape[-1])
        output = module._adapter_output(active_adapter, x.reshape(-1, x.shape[-1])[rows])
        return flat.index_copy(0, rows, (flat[rows] + output).to(flat.dtype)).view(result.shape)


def _concerned_rows(alora_offsets: Sequence[int | None] | None, result: torch.Tensor) -> torch.Tensor:
    """Indices, into [batch · tokens], of the tokens that the adapter acts on."""
    if alora_offsets is None:
        return torch.empty(0, dtype=torch.long, device=result.device)
    batch, tokens = result.shape[0], result.shape[1] if result.dim() == 3 else 1
    if len(alora_offsets) != batch:
        raise ValueError(f"alora_offsets: expected one for each of the {batch} sequences, got {len(alora_offsets)}")
    starts = [tokens - min(int(offset or 0), tokens) for offset in alora_offsets]
    rows = [row * tokens + token for row, start in enumerate(starts) for token in range(start, tokens)]
    return torch.tensor(rows, dtype=torch.long, device=result.device)


def calculate_alora_offsets(
    peft_config: Mapping[str, Any],
    active_adapter: str,
    input_ids: torch.Tensor | None,
    adapter_names: Sequence[str] | None = None,
) -> list[int | None]:
    """How far from the end of each sequence its adapter was invoked last: the length from the invocation's start on.

    Args:
        peft_config: Configurations by adapter name.
        active_adapter: The adapter of sequences that `adapter_names` has none for.
        input_ids: [batch, tokens].
        adapter_names: One name, or "__base__", for each sequence.

    Returns:
        One number for each sequence, None where it has no aLoRA adapter or does not invoke it. Empty without input_ids.
    """
    if input_ids is None:
        return []
    rows_of: dict[str, list[int]] = defaultdict(list)
    for row in range(input_ids.shape[0]):
        name = adapter_names[row] if adapter_names and row < len(adapter_names) else active_adapter
        if name == "__base__":
            continue
        if name not in peft_config:
            warnings.warn(f"Adapter '{name}' not found in peft_config. Using base model for row {row}.", stacklevel=2)
        elif getattr(peft_config[name], "alora_invocation_tokens", None):
            rows_of[name].append(row)

    offsets: list[int | None] = [None] * input_ids.shape[0]
    for name, rows in rows_of.items():
        found = _offsets_of(input_ids[rows], peft_config[name].alora_invocation_tokens)
        for row, offset in zip(rows, found, strict=True):
            offsets[row] = offset or None
    return offsets


def _offsets_of(input_ids: torch.Tensor, tokens: Sequence[int]) -> list[int]:
    """For each row of [rows, length], the length from the start of the last occurrence of `tokens` on; 0 for none."""
    length, wanted = input_ids.shape[1], len(tokens)
    if wanted > length:
        return [0] * input_ids.shape[0]
    pattern = torch.tensor(tokens, dtype=input_ids.dtype, device=input_ids.device)
    matches = (input_ids.unfold(1, wanted, 1) == pattern).all(2)
    lengths = torch.arange(length, wanted - 1, -1, device=input_ids.device)
    # The last occurrence has the least of the lengths; none at all must not look like a short one.
    least = torch.where(matches, lengths, length + 1).amin(1)
    return torch.where(least > length, 0, least).tolist()
