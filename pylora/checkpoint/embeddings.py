"""Whether the base model's embeddings go into an adapter's checkpoint, and which entries those are.

They do when they were asked for, when an adapter targets them, or when the vocabulary was resized after the base model
was published: the base model on disk then no longer has the rows that the adapter was trained with.
"""

from __future__ import annotations

import logging
import os
import re
import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pylora.checkpoint.structure import state_dict_name

if TYPE_CHECKING:
    from torch import Tensor, nn

logger = logging.getLogger(__name__)

EMBEDDING_LAYER_NAMES = ["embed_tokens", "lm_head"]
_ALL_LINEAR = "all-linear"


def embedding_entries(
    model: Any, config: Any, state_dict: Mapping[str, Tensor], save_embedding_layers: bool | Literal["auto"]
) -> dict[str, Tensor]:
    """The entries of `state_dict` that belong to input and output embeddings, if the rules say that they are saved.

    Warns when "auto" decides for saving, and when the model has no `get_input_embeddings` to find them by.
    """
    targeted = _embedding_is_targeted(model, config)
    if save_embedding_layers == "auto":
        save_embedding_layers = _decide(model, config, targeted)
    if not save_embedding_layers:
        return {}
    if not hasattr(model, "get_input_embeddings"):
        warnings.warn(
            "Could not identify embedding layer(s) because the model is not a 🤗 transformers model.",
            stacklevel=2,
        )
        return {}
    entries: dict[str, Tensor] = {}
    for layer in (model.get_input_embeddings(), model.get_output_embeddings()):
        wanted = getattr(layer, "base_layer", None) if targeted else layer
        name = None if wanted is None else next((n for n, m in model.named_modules() if m is wanted), None)
        if name:
            prefix = f"{state_dict_name(name)}."
            entries.update((key, value) for key, value in state_dict.items() if key.startswith(prefix))
    return entries


def _embedding_is_targeted(model: Any, config: Any) -> bool:
    targets = getattr(config, "target_modules", None)
    if not targets or targets == _ALL_LINEAR:
        return False
    if not isinstance(targets, str):
        return any(name in targets for name in EMBEDDING_LAYER_NAMES)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return any(
        re.fullmatch(targets, name)
        for name, _ in base.named_modules()
        if name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES
    )


def _decide(model: nn.Module, config: Any, targeted: bool) -> bool:
    if targeted and getattr(config, "trainable_token_indices", None) is None:
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as embedding layers found in `target_modules`.", stacklevel=2
        )
        return True
    if _vocabulary_was_resized(model, config):
        warnings.warn(
            "Setting `save_embedding_layers` to `True` as the embedding layer has been resized during finetuning.",
            stacklevel=2,
        )
        return True
    return False


def _vocabulary_was_resized(model: nn.Module, config: Any) -> bool:
    base_id = getattr(config, "base_model_name_or_path", None)
    if not base_id:
        return False
    has_config = _has_base_config(base_id)
    if has_config is None:
        warnings.warn(
            f"Could not find a config file in {base_id} - will assume that the vocabulary was not modified.",
            stacklevel=2,
        )
        return False
    model_config = getattr(model, "config", None)
    vocab_size = getattr(model_config, "vocab_size", None)
    if not has_config or not vocab_size or model_config is None:
        return False
    return bool(vocab_size != type(model_config).from_pretrained(base_id).vocab_size)


def _has_base_config(base_id: str) -> bool | None:
    """Whether the base model has a config.json; None where that cannot be told without going online."""
    if os.path.exists(os.path.join(base_id, "config.json")):
        return True
    if os.path.isdir(base_id) or os.environ.get("HF_HUB_OFFLINE", "0").lower() in ("1", "true", "t", "yes", "y", "on"):
        return None
    try:
        from huggingface_hub import file_exists

        return bool(file_exists(base_id, "config.json"))
    except Exception as error:  # any trouble with the hub must not stop a save of what is at hand
        logger.info("could not ask the hub about %s: %s", base_id, error)
        return None
