"""Modules that share their weight with the input embedding."""

from __future__ import annotations

import re
import warnings
from typing import Any

from torch import nn

from pylora.targeting.defaults import EMBEDDING_LAYER_NAMES
from pylora.targeting.model_info import config_value

# What the path to a weight has gained when its module was wrapped.
_INSIDE = re.compile(r"(\.token_adapter)?\.(base_layer|original_module)$")


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


def tied_partner_names(model: nn.Module) -> list[str]:
    """Names of the modules that have the input embedding's weight, adapters or not: the outermost module's each."""
    return sorted({_INSIDE.sub("", name) for name in module_names_tied_with_embedding(model)})


def apply_tying(model: nn.Module, config: Any) -> None:
    """Carry out `ensure_weight_tying` in the configuration: one adapter, or one trained copy, for a tied weight.

    What is asked for on any of the modules that share the input embedding's weight is asked for on the embedding
    instead, and the others are listed in `config.target_modules_to_tie` or `config.modules_to_tie`.

    Args:
        model: The base model.
        config: A LoraConfig; changed in place, lists in it are replaced.

    Warns:
        UserWarning: There is nothing to tie.
    """
    if not config.ensure_weight_tying:
        return
    config.target_modules_to_tie, config.modules_to_tie = None, None
    partners = tied_partner_names(model)
    if not partners:
        _warn_nothing_to_tie("no tied modules were found in the model")
    elif _names_an_embedding(config.modules_to_save):
        config.modules_to_save = sorted(_moved_to_embedding(config.modules_to_save, partners, embedding_name(model)))
        config.modules_to_tie = partners
    elif _names_an_embedding(config.target_modules):
        name, targets = embedding_name(model), config.target_modules
        if not isinstance(targets, str):
            config.target_modules = _moved_to_embedding(targets, partners, name)
        elif re.fullmatch(targets, name) is None:
            config.target_modules = rf"(?:{targets}|^{re.escape(name)}$)"
        config.target_modules_to_tie = partners
    elif config.trainable_token_indices is None:
        _warn_nothing_to_tie("no tied modules are added in either `modules_to_save` or `target_modules`")


def embedding_name(model: Any) -> str:
    """The name of `model.get_input_embeddings()`; "" if that module is not in the model."""
    embedding = model.get_input_embeddings()
    return next((visit for visit, module in model.named_modules() if module is embedding), "")


def _moved_to_embedding(names: Any, partners: list[str], embedding: str) -> set[str]:
    """`names` with the embedding's in the place of those that mean one of its partners."""

    def means_partner(name: str) -> bool:
        return any(re.match(rf"(^|.*\.){name}($|\..*)", partner) for partner in partners)

    return {name for name in names if name == embedding or not means_partner(name)} | {embedding}


def _warn_nothing_to_tie(what: str) -> None:
    warnings.warn(f"You have requested `ensure_weight_tying`, but {what}", stacklevel=5)


def warn_about_tied_targets(model: nn.Module, config: Any) -> None:
    """Warn when one side of a tied weight gets an adapter or a trained copy of its own."""
    if config.ensure_weight_tying:
        return
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
    moved.update({name.replace("original_module.", ""): name for name in present if "original_module." in name})
    return [moved.get(key, key) for key, source in tied_keys.items() if moved.get(source, source) in present]
