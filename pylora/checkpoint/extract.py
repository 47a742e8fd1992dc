"""One adapter's tensors out of a model, under the names that they have in a checkpoint."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from pylora.checkpoint.embeddings import embedding_entries
from pylora.checkpoint.keys import is_under, to_checkpoint_key
from pylora.checkpoint.structure import (
    Site,
    adapter_roots,
    adapter_sites,
    container_paths,
    is_of_another,
    join,
    state_without_other_adapters,
)
from pylora.errors import PeftWarning

if TYPE_CHECKING:
    from torch import Tensor, nn


def get_peft_model_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
    unwrap_compiled: bool = False,
    save_embedding_layers: bool | Literal["auto"] = "auto",
) -> dict[str, Tensor]:
    """The tensors that make up one adapter, without the adapter's name in their keys.

    Args:
        model: a `PeftModel`, or a model with adapters injected, that has a `peft_config` dictionary. Under DDP,
            DeepSpeed or FSDP pass the unwrapped model, and the gathered `state_dict`.
        state_dict: tensors to choose from, with the model's keys; the model's own by default.
        adapter_name: which adapter.
        unwrap_compiled: take the model inside a `torch.compile` wrapper.
        save_embedding_layers: add the base model's embeddings: True, False, or "auto" (when an adapter targets them or
            the vocabulary was resized; see `pylora.checkpoint.embeddings`).

    Returns:
        dictionary of the tensors themselves, not copies: the adapter's, the biases that `config.bias` trains, the
        contents of `modules_to_save`, and embeddings where they are saved.

    Raises:
        KeyError: no adapter of that name.
    """
    if unwrap_compiled:
        model = getattr(model, "_orig_mod", model)
    configs: Any = model.peft_config
    config = configs[adapter_name]
    was_inferred = state_dict is None
    sites = list(adapter_sites(model))
    containers = {path for site in sites for path in container_paths(site)}
    tensors = state_without_other_adapters(model, adapter_name) if state_dict is None else state_dict
    tensors = {key: tensor for key, tensor in tensors.items() if not is_of_another(key, containers, adapter_name)}

    chosen = _adapter_entries(sites, adapter_name, tensors)
    chosen.update(_bias_entries(sites, tensors, getattr(config, "bias", "none")))
    chosen.update(_auxiliary_entries(sites, adapter_name, tensors))
    chosen.update(embedding_entries(model, config, tensors, save_embedding_layers))
    # Elsewhere the adapter's name is that of a module or a tensor: an adapter may be called "bias".
    named = {root for site in sites for root in adapter_roots(site, adapter_name)}
    found = {
        to_checkpoint_key(key, adapter_name) if is_under(key, named) else key: tensor for key, tensor in chosen.items()
    }
    if was_inferred:
        _warn_about_shards(found, adapter_name)
    return found


def _adapter_entries(sites: list[Site], adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    roots = {root for site in sites if not site.is_auxiliary for root in adapter_roots(site, adapter_name)}
    return {key: tensor for key, tensor in tensors.items() if is_under(key, roots)}


def _bias_entries(sites: list[Site], tensors: Mapping[str, Tensor], bias: str) -> dict[str, Tensor]:
    """What `bias` adds: "all" every bias there is, "lora_only" those of the layers that have adapters."""
    if bias == "all":
        return {key: tensor for key, tensor in tensors.items() if key.rpartition(".")[2] == "bias"}
    if bias.endswith("_only"):
        names = (join(site.name, "base_layer", "bias") for site in sites if not site.is_auxiliary)
        return {name: tensors[name] for name in names if name in tensors}
    return {}


def _auxiliary_entries(sites: list[Site], adapter_name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Each wrapper says for itself which of its tensors are saved, and as what."""
    entries: dict[str, Tensor] = {}
    for site in sites:
        if site.is_auxiliary:
            prefix = f"{site.name}." if site.name else ""
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            wrapper: Any = site.module
            saved = wrapper.adapter_state_dict(adapter_name, own)
            entries.update((prefix + key, value) for key, value in saved.items())
    return entries


def _warn_about_shards(found: Mapping[str, Tensor], adapter_name: str) -> None:
    """A factor that is not a matrix is a shard: without this warning the file would only fail where it is loaded."""
    bad = [
        f"{key}: {tuple(tensor.shape)}"
        for key, tensor in found.items()
        if (".lora_A" in key or ".lora_B" in key)
        and (tensor.ndim < 2 or 0 in tensor.shape)
        and not key.endswith(".bias")
    ]
    if bad:
        more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
        warnings.warn(
            f"Adapter {adapter_name!r}: {len(bad)} LoRA tensor(s) have invalid shape, expected matrices, got "
            f"{', '.join(bad[:3])}{more}. These may be DeepSpeed ZeRO-3 / FSDP shards: gather the parameters "
            "before saving (deepspeed.zero.GatheredParameters, FullyShardedDataParallel.summon_full_params).",
            PeftWarning,
            stacklevel=2,
        )
