"""Modules that share their weight with the input embedding."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from pylora.targeting.defaults import EMBEDDING_LAYER_NAMES
from pylora.targeting.model_info import config_value


def module_names_tied_with_embedding(model: nn.Module) -> list[str]:
    """Names of the modules whose weight the model declares to be the input embedding's; [] when it does not tie.

    Transformers models declare it in `_tied_weights_keys`: as a list of parameter names up to version 4, as
    `{parameter: its source}` on every level of the model from version 5 on. Where an adapter was put in, the names are
    those inside it (`embed_tokens.base_layer`).

    Raises:
        ValueError: the keys are a dict and the model has no `get_input_embeddings`.
    """
    keys = getattr(model, "_tied_weights_keys", None)
    if keys is None or config_value(model, "tie_word_embeddings") is False:
        return []
    if isinstance(keys, dict):
        if not hasattr(model, "get_input_embeddings"):
            raise ValueError(
                "_tied_weights_keys: it is a dict, but the model has no 'get_input_embeddings' to tell which of the "
                "tied weights are the embedding's"
            )
        tied = _tied_with_input_embedding(model, _collect_tied_keys(model))
    else:
        tied = list(keys)
    return sorted({name.rpartition(".")[0] for name in tied})


def warn_about_tied_targets(model: nn.Module, config: Any) -> None:
    """Warn when one side of a tied weight gets an adapter or a trained copy of its own."""
    if not (_names_an_embedding(config.target_modules) or _names_an_embedding(config.modules_to_save)):
        return
    tied = module_names_tied_with_embedding(model)
    if tied:
        warnings.warn(
            "Model has `tie_word_embeddings=True` and a tied layer is part of the adapter, but `ensure_weight_tying` "
            "is not set to True. This can lead to complications, for example when merging the adapter or converting "
            f"your model to formats other than safetensors: the embedding and {tied} differ once they are trained.",
            stacklevel=4,
        )


def _names_an_embedding(value: Any) -> bool:
    if isinstance(value, str):
        return any(re.fullmatch(value, name) for name in EMBEDDING_LAYER_NAMES)
    return any(name.rpartition(".")[2] in EMBEDDING_LAYER_NAMES for name in value or ())


def _collect_tied_keys(model: nn.Module) -> dict[str, str]:
    """All levels' declarations, as full parameter names."""
    collected: dict[str, str] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        for key, source in (getattr(module, "_tied_weights_keys", None) or {}).items():
            collected[prefix + key] = prefix + source
    return collected


def _tied_with_input_embedding(model: nn.Module, tied_keys: dict[str, str]) -> list[str]:
    embedding = {id(parameter) for parameter in model.get_input_embeddings().parameters()}  # type: ignore[operator]
    present = [name for name, p in model.named_parameters(remove_duplicate=False) if id(p) in embedding]
    # The declarations name parameters as they were before adapters moved them into a `base_layer` or, for a token
    # adapter, into its inner module's one.
    moved = {re.sub(r"[^.]+\.base_layer\.", "", name): name for name in present}
    moved.update({name.replace("base_layer.", ""): name for name in present})
    return [moved.get(key, key) for key, source in tied_keys.items() if moved.get(source, source) in present]
