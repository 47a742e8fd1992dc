"""`trainable_token_indices`: the wrapper that gives each adapter rows of its own in an embedding."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from pylora.layers.trainable_tokens import TrainableTokensLayer
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper

_ROWS = "token_adapter.trainable_tokens_delta"


class TrainableTokensWrapper(AuxiliaryTrainingWrapper):
    """Holds an embedding and, in `token_adapter`, the rows that adapters train.

    `weight` is the embedding's with the active adapter's rows in place. At most one adapter is active here.

    Args:
        module_to_save: The embedding, or an output layer with its weight.
        adapter_name: The first adapter.
        token_indices: Numbers of the rows it trains.
        tied_adapter: The `token_adapter` of the embedding whose weight `module_to_save` has, to use its rows.
    """

    adapter_layer_names: tuple[str, ...] = (_ROWS,)
    other_param_names: tuple[str, ...] = ("token_adapter.token_indices", "token_adapter.trainable_tokens_original")

    def __init__(
        self,
        module_to_save: nn.Module,
        adapter_name: str,
        token_indices: Sequence[int],
        tied_adapter: TrainableTokensLayer | None = None,
    ) -> None:
        super().__init__(module_to_save, adapter_name, token_indices=token_indices, tied_adapter=tied_adapter)
        # `token_adapter` has the module: here it would be in the state dict a second time.
        self._modules["original_module"] = None

    @property
    def original_module(self) -> Any:  # type: ignore[override]
        """The wrapped module."""
        adapter: Any = self._modules.get("token_adapter")
        return self._modules["original_module"] if adapter is None else adapter.base_layer

    def init_modules(self, adapter_name: str, **kwargs: Any) -> None:
        self.token_adapter = TrainableTokensLayer(self.original_module, adapter_name, kwargs["tied_adapter"])

    def _error_message_name(self) -> str:
        return "trainable_token_indices"

    def _hasattr_wrapped(self, name: str, modules: dict[str, Any]) -> bool:
        return name == "weight"

    def _getattr_wrapped(self, name: str, modules: dict[str, Any]) -> Any:
        adapter: Any = modules["token_adapter"]
        return adapter.base_layer.weight if adapter.merged else adapter.get_merged_weights(adapter.active_adapters)

    def _forward_wrapped(self, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter(*args, **kwargs)

    def _forward_wrapped_mixed_batch(self, x: torch.Tensor, active_adapter: str, *args: Any, **kwargs: Any) -> Any:
        return self.token_adapter.forward_adapters(x, [active_adapter], *args, **kwargs)

    def _forward_wrapped_passthrough(self, *args: Any, **kwargs: Any) -> Any:
        # Not the original module: it may hold merged rows, which the adapter layer takes out.
        return self.token_adapter(*args, **kwargs)

    def update(self, adapter_name: str, **kwargs: Any) -> None:
        """Give the adapter its rows, unless it has some."""
        if adapter_name not in self._adapters:
            self.token_adapter.update_layer(adapter_name, kwargs["token_indices"])
        super().update(adapter_name)

    def enable_adapters(self, enabled: bool) -> None:
        """Switch between the adapters' rows and the base layer's."""
        super().enable_adapters(enabled)
        self.token_adapter.enable_adapters(enabled)

    def check_set_adapter(self, adapter_name: str | list[str]) -> str | None:
        """The one of the names that has rows here, None if none has.

        Raises:
            ValueError: The list is empty, or several of its names have rows here.
        """
        if isinstance(adapter_name, str):
            return adapter_name
        if len(adapter_name) == 0:
            raise ValueError("Please specify at least one adapter to set")
        here = [name for name in adapter_name if name in self.token_adapter.trainable_tokens_delta]
        if len(here) > 1:
            raise ValueError(f"Only one adapter can be set at a time for {self}, got {len(here)}")
        return here[0] if here else None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Make an adapter's rows the ones used and trained, or none for []. Merged rows are taken out, with a warning.

        Raises:
            ValueError: The wrapper takes no part in that adapter.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if self.token_adapter.merged and names != self.active_adapters:
            warnings.warn("Adapter cannot be set when the model is merged. Unmerging the model first.", stacklevel=3)
            self.token_adapter.unmerge()
        super().set_adapter(adapter_names, inference_mode=inference_mode)
        self.token_adapter.set_adapter(adapter_names, inference_mode=inference_mode)

    def delete_adapter(self, adapter_name: str, new_active_adapters: list[str] | None) -> None:
        """Drop the adapter's rows and activate the new active adapter's, if it has some here.

        Args:
            adapter_name: The adapter to leave; one without rows here is ignored.
            new_active_adapters: The model's active adapters from now on.

        Raises:
            ValueError: More than one new active adapter.
        """
        if adapter_name not in self._adapters:
            return
        new_active = list(new_active_adapters or [])
        if len(new_active) > 1:
            raise ValueError(
                f"Attempted to set multiple ({new_active}) adapters at once for {type(self).__name__}, "
                "which is not allowed."
            )
        self._adapters.discard(adapter_name)
        here = [name for name in new_active if name in self._adapters]
        self.set_adapter(here)
        self.token_adapter.delete_adapter(adapter_name)

    def adapter_state_dict_load_map(self, adapter_name: str) -> dict[str, str]:
        if adapter_name not in self._adapters or self.token_adapter.tied_adapter is not None:
            return {}
        return {_ROWS: f"{_ROWS}.{adapter_name}"}

    def adapter_state_dict(self, adapter_name: str, state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        load_map = self.adapter_state_dict_load_map(adapter_name)
        return {key: state_dict[model_key] for key, model_key in load_map.items()}

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped module, with the adapters' rows in it if `merge`."""
        if merge:
            self.token_adapter.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        return self.token_adapter.base_layer

    def _get_available_adapters(self) -> set[str]:
        return set(self.token_adapter.trainable_tokens_delta.keys())
