"""What an adapter trains beside its factors: `modules_to_save`, `trainable_token_indices`, and what is tied to them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pylora.layers import walk
from pylora.model.modules_to_save import set_trainable
from pylora.model.trainable_tokens import TrainableTokensWrapper
from pylora.targeting.model_info import config_value
from pylora.targeting.tied import module_names_tied_with_embedding, tied_partner_names

OnChange = Callable[[Callable[[], None]], Any]


def add_trained_modules(
    model: nn.Module, config: Any, adapter_name: str, activate: bool = True, on_change: OnChange | None = None
) -> None:
    """Wrap what the adapter's configuration has trained, or add the adapter to the wrappers that are there.

    Args:
        model: The base model, the adapter's layers in place.
        config: The adapter's LoraConfig, after `apply_tying`.
        adapter_name: The adapter.
        activate: Whether new wrappers use the adapter at once.
        on_change: Called after each change with a function that reverts it.

    Raises:
        ValueError: A module of `trainable_token_indices` is not there, is in `modules_to_save` as well, or must be tied
            to one with other tokens.
        TypeError: A module cannot be wrapped.
    """
    common: dict[str, Any] = {
        "inference_mode": config.inference_mode,
        "activate_adapter": activate,
        "on_change": on_change,
    }
    set_trainable(model, adapter_name, config.modules_to_save, **common)
    modules_to_tie = getattr(config, "modules_to_tie", None)
    if modules_to_tie:
        source: Any = model.get_input_embeddings()  # type: ignore[operator]
        set_trainable(model, adapter_name, modules_to_tie, tied_module=source.modules_to_save[adapter_name], **common)
    if config.trainable_token_indices is not None:
        _add_trained_tokens(model, config, adapter_name, common)


def trains_modules(config: Any) -> bool:
    """Whether `add_trained_modules` has anything to do."""
    return config.modules_to_save is not None or config.trainable_token_indices is not None


def _add_trained_tokens(model: nn.Module, config: Any, adapter_name: str, common: dict[str, Any]) -> None:
    tokens = config.trainable_token_indices
    if not isinstance(tokens, dict):
        tokens = {_input_embeddings_name(model): tokens}
    for name in tokens:
        if name in (config.modules_to_save or ()):
            raise ValueError(
                f"The embedding layer is already marked to be trained fully, either specify `modules_to_save=[..., "
                f'"{name}", ...]` or `trainable_token_indices={{"{name}": x}}` but not both.'
            )
    tied = bool(config_value(model, "tie_word_embeddings"))
    ensure = bool(config.ensure_weight_tying)
    together, left_to_tying = _tied_requests(model, tokens, ensure) if tied and len(tokens) > 1 else (True, set())
    if ensure and not tied:
        warnings.warn(
            "ensure_weight_tying=True but the model does not have tied weights (tie_word_embeddings=False). "
            "Weight tying will not be applied for trainable_token_indices.",
            stacklevel=5,
        )
    common = {**common, "strict_module_check": True, "wrapper_cls": TrainableTokensWrapper}
    for name, indices in tokens.items():
        if name not in left_to_tying:
            set_trainable(model, adapter_name, [name], token_indices=indices, **common)
    if not (tied and together):
        return
    source: Any = model.get_input_embeddings()  # type: ignore[operator]
    if isinstance(source, TrainableTokensWrapper) and adapter_name in source._adapters:
        adapter = source.token_adapter
        indices = adapter.token_indices[adapter_name]
        names = module_names_tied_with_embedding(model)
        set_trainable(model, adapter_name, names, token_indices=indices, tied_adapter=adapter, **common)


def _tied_requests(model: nn.Module, tokens: dict[str, Sequence[int]], ensure: bool) -> tuple[bool, set[str]]:
    """Whether all modules that have the embedding's weight are to train the same tokens, and which of them the tying
    then looks after.

    Raises:
        ValueError: They are not, and `ensure`.
    """
    partners = tied_partner_names(model)
    embedding = _input_embeddings_name(model)
    is_tied = {
        name: any(partner.endswith(name) or name in partner.split(".") for partner in partners) for name in tokens
    }
    concerned = [name for name in tokens if embedding.endswith(name) or is_tied[name]]
    together = all(list(tokens[name]) == list(tokens[concerned[0]]) for name in concerned)
    if ensure and not together:
        listed = ", ".join(f"{name}: {list(tokens[name])}" for name in concerned)
        raise ValueError(
            "Cannot ensure weight tying when different token indices are specified for tied layers. Conflicting "
            f"layers: {listed}. Please use the same indices for all tied layers or set ensure_weight_tying=False."
        )
    # Without the embedding itself among the requests there is nothing to tie to.
    has_source = any(embedding.endswith(name) for name in concerned)
    left = {name for name in concerned if is_tied[name] and not embedding.endswith(name)}
    return together, left if together and has_source else set()


def _input_embeddings_name(model: Any) -> str:
    if hasattr(model, "get_input_embeddings"):
        embeddings = model.get_input_embeddings()
        for visit in walk(model):
            if visit.module is embeddings:
                return visit.name
    return "embed_tokens"
