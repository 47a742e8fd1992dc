"""Some rows of an embedding, trained per adapter: every other row stays the base layer's.

The rows are replaced, not added to: an embedding that was resized has random values in its new rows, and they may be
other ones when the base model is loaded again.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pylora.layers.buffer_dict import BufferDict
from pylora.layers.embedding import embed_scale
from pylora.layers.merging import check_adapters_to_merge
from pylora.layers.tuner_layer import BaseTunerLayer


class TrainableTokensLayer(nn.Module, BaseTunerLayer):
    """An embedding, or a linear layer with an embedding's weight, some of whose rows adapters replace.

    Args:
        base_layer: `nn.Embedding`, or `nn.Linear` (an output layer whose rows are tokens).
        adapter_name: The first adapter's name; it becomes the active one. `update_layer` adds it.
        tied_adapter: A layer of this class whose rows are used here as well; its base layer has the same weight.

    Attributes:
        trainable_tokens_delta: Adapter name -> its rows, [tokens, embedding_dim].
        trainable_tokens_original: Adapter name -> the base layer's rows when the adapter was made, for unmerging.
        token_indices: Adapter name -> the rows' numbers.
    """

    adapter_layer_names: tuple[str, ...] = ("trainable_tokens_delta",)
    other_param_names: tuple[str, ...] = ("token_indices", "trainable_tokens_original", "token_lookup")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, tied_adapter: TrainableTokensLayer | None = None
    ) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._active_adapter = [adapter_name]
        self.merged_adapters: list[str] = []
        # In a list, so that it is no submodule and not saved a second time.
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        source = tied_adapter
        self.trainable_tokens_delta: nn.ParameterDict = (
            nn.ParameterDict() if source is None else source.trainable_tokens_delta
        )
        self.trainable_tokens_original: BufferDict = (
            BufferDict() if source is None else source.trainable_tokens_original
        )
        self.token_indices: dict[str, list[int]] = {} if source is None else source.token_indices
        # int64 [2, tokens]: the token numbers in ascending order, and the rows of the delta that they have.
        self.token_lookup: BufferDict = BufferDict() if source is None else source.token_lookup
        base: Any = base_layer
        is_embedding = isinstance(base, nn.Embedding)
        self.in_features = base.num_embeddings if is_embedding else base.in_features
        self.out_features = base.embedding_dim if is_embedding else base.out_features

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows this one uses, None if it has its own."""
        return self._tied_adapter[0] if self._tied_adapter else None

    def update_layer(self, adapter_name: str, token_indices: Sequence[int], **kwargs: Any) -> None:
        """Add an adapter that starts with the base layer's rows; a tied layer has what the layer it is tied to has.

        Args:
            adapter_name: Name of the adapter.
            token_indices: Numbers of the rows.
            **kwargs: Unused.

        Raises:
            IndexError: There is no such row. Nothing is changed then.
        """
        if self.tied_adapter is not None:
            return
        indices = list(token_indices)
        weight = self.get_base_weight()
        bad = [index for index in indices if not 0 <= index < len(weight)]
        if bad:
            raise IndexError(f"trainable_token_indices: expected numbers from 0 to {len(weight) - 1}, got {bad}")
        numbers = torch.tensor(indices, dtype=torch.int64, device=weight.device)
        rows = weight[numbers]
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(rows.clone(), requires_grad=True)
        self.trainable_tokens_original[adapter_name] = rows
        self.token_lookup[adapter_name] = torch.stack(torch.sort(numbers, stable=True))
        self.token_indices[adapter_name] = indices

    def _names_here(self, adapter_names: Sequence[str]) -> list[str]:
        return [name for name in adapter_names if name in self.trainable_tokens_delta]

    def _check_overlapping_tokens(self, adapter_names: list[str]) -> None:
        """Raise ValueError when two of the adapters, merged ones included, have a token in common."""
        taken: set[int] = set()
        for name in dict.fromkeys(self.merged_adapters + adapter_names):
            tokens = set(self.token_indices[name])
            if taken & tokens:
                raise ValueError(
                    f"Token indices of adapter {name} are already defined and would result in undefined merging "
                    f"behavior: {sorted(taken & tokens)}. Only disjunct token indices are currently supported."
                )
            taken |= tokens

    def _numbers(self, name: str, like: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.token_indices[name], dtype=torch.int64, device=like.device)

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` with these arguments would raise, and change nothing."""
        self._rows_to_merge(self._names_here(check_adapters_to_merge(self, adapter_names, warn=False)), safe_merge)

    def _rows_to_merge(self, names: list[str], safe_merge: bool) -> dict[str, torch.Tensor]:
        self._check_overlapping_tokens(names)
        weight = self.get_base_weight()
        rows = {name: self.trainable_tokens_delta[name].detach().to(weight) for name in names}
        for name, values in rows.items():
            if safe_merge and not torch.isfinite(values).all():
                raise ValueError(f"NaNs detected in the merged weights. The adapter {name} seems to be broken")
        return rows

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the adapters' rows into the base weight.

        Args:
            safe_merge: Refuse values that are not finite.
            adapter_names: Adapters to merge; None means the active ones. Merged ones are skipped with a warning.

        Raises:
            ValueError: Two adapters have a token in common, or `safe_merge` and a value is NaN or infinite. Nothing is
                changed then.
        """
        names = self._names_here(check_adapters_to_merge(self, adapter_names))
        for name, rows in self._rows_to_merge(names, safe_merge).items():
            self._write(name, rows)
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Write the base layer's own rows back; warns when no adapter is merged."""
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            self._write(name, self.trainable_tokens_original[name])

    def restore_merged(self, names: list[str]) -> None:
        """Make these the merged adapters, whichever are now."""
        while self.merged_adapters:
            self._write(self.merged_adapters[-1], self.trainable_tokens_original[self.merged_adapters.pop()])
        for name in names:
            self._write(name, self.trainable_tokens_delta[name].detach())
            self.merged_adapters.append(name)

    @torch.no_grad()
    def _write(self, name: str, rows: torch.Tensor) -> None:
        base: Any = self.base_layer  # in place: a tied weight stays tied
        base.weight.index_copy_(0, self._numbers(name, base.weight), rows.to(base.weight))

    def get_merged_weights(self, active_adapters: Sequence[str]) -> torch.Tensor:
        """The base weight with the adapters' rows in place, a tensor of that size; differentiable in the rows."""
        base: Any = self.base_layer
        weight: torch.Tensor = base.weight
        for name in self._names_here(active_adapters):
            rows = self.trainable_tokens_delta[name].to(weight)
            weight = weight.index_copy(0, self._numbers(name, weight), rows)
        return weight

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters' rows in the place of its own."""
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)

    def forward_adapters(
        self, x: torch.Tensor, active_adapters: Sequence[str], *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """As `forward`, with these adapters instead of the active ones.

        Raises:
            ValueError: Two of them have a token in common, or the base layer is neither embedding nor linear layer.
        """
        names = [] if self.disable_adapters else self._names_here(active_adapters)
        if self.merged and not names:
            self.unmerge()
        if self.merged or not names:
            return self.base_layer(x, *args, **kwargs)
        if len(names) > 1:
            self._check_overlapping_tokens(names)
        if isinstance(self.base_layer, nn.Embedding):
            return self._embed(x, names, *args, **kwargs)
        if isinstance(self.base_layer, nn.Linear):
            return self._project(x, names, *args, **kwargs)
        raise ValueError(
            f"trainable_token_indices: expected an nn.Embedding or nn.Linear, got {type(self.base_layer).__name__}: an "
            "unknown layer type, maybe you are targeting the wrong layer?"
        )

    def _embed(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.base_layer
        scale = embed_scale(base)
        if base.max_norm is not None or base.scale_grad_by_freq:  # these look at the weight as a whole
            result = F.embedding(
                x, self.get_merged_weights(names), base.padding_idx, base.max_norm, base.norm_type,
                base.scale_grad_by_freq,
            )  # fmt: skip
            return result if scale is None else result * scale.to(result.dtype)
        result = base(x, *args, **kwargs)
        for name in names:
            tokens, order = self.token_lookup[name]
            if len(tokens) == 0:
                continue
            place = torch.searchsorted(tokens, x.long().contiguous()).clamp(max=len(tokens) - 1)
            trained = tokens[place] == x
            rows = F.embedding(order[place], self.trainable_tokens_delta[name])
            if base.padding_idx is not None:  # its row gets no gradient
                rows = torch.where((x == base.padding_idx).unsqueeze(-1), rows.detach(), rows)
            rows = rows.to(result.dtype)
            rows = rows if scale is None else rows * scale.to(rows.dtype)
            result = torch.where(trained.unsqueeze(-1), rows, result)
        return result

    def _project(self, x: torch.Tensor, names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        base: Any = self.base_layer
        result = base(x, *args, **kwargs)
        for name in names:
            numbers = self.token_lookup[name][0]
            rows = self.trainable_tokens_delta[name][self.token_lookup[name][1]].to(base.weight.dtype)
            columns = F.linear(x, rows, None if base.bias is None else base.bias[numbers])
            result = result.index_copy(-1, numbers, columns.to(result.dtype))
        return result
