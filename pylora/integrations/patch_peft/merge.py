"""Merging PEFT's layers by pylora's kernels: rounded once, and undone bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from pylora.integrations.patch_peft.dora import leave_norms, take_norms
from pylora.integrations.patch_peft.replacements import Replacements
from pylora.layers.conv import Conv1d
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.embedding import Embedding
from pylora.layers.linear import Linear
from pylora.layers.undo import MergeRecord, for_good
from pylora.ops import kernels_serve

# What pylora's methods ask of a layer that merges, and PEFT's have not; the rest has the same names.
_BORROWED = (
    "factor_names",
    "_base_weight",
    "_factors",
    "_has_adapter",
    "_base_bias",
    "_sharing",
    "_require_mergeable",
    "_deltas",
    "_plain_delta",
    "_unmerged",
)
# Beside the layers, so that a model that is pickled can be read where there is no pylora.
_RECORDS: WeakKeyDictionary[Any, list[MergeRecord]] = WeakKeyDictionary()


def patch_merging(changes: Replacements, layer: Any, variants: Any, model: Any) -> None:
    """Put pylora's merging in.

    Args:
        changes: Records what is replaced.
        layer: peft.tuners.lora.layer.
        variants: peft.tuners.lora.variants.
        model: peft.tuners.lora.model.
    """
    for theirs, ours in ((layer.Linear, Linear), (layer.Embedding, Embedding), (layer._ConvNd, Conv1d)):
        for name in _BORROWED:
            changes.add(theirs, name, getattr(ours, name))
        changes.add(theirs, "_merge_records", property(_records))
        changes.add(theirs, "_tied_layers", MappingProxyType({}))
    served = Served(layer, variants)
    for cls in (layer.Linear, layer.Embedding, layer._ConvNd):
        changes.wrap(cls, "merge", lambda original: _merge(original, served))
        changes.wrap(cls, "unmerge", lambda original: _unmerge(original, served))
    changes.wrap(model.LoraModel, "_unload_and_optionally_merge", _unload)


def forget_merges() -> None:
    """Drop the logs of merges: who unmerges without pylora does it by subtraction, and they would be of the past."""
    _RECORDS.clear()


def _records(layer: Any) -> list[MergeRecord]:
    records = _RECORDS.get(layer)
    if records is None:
        records = _RECORDS[layer] = []
    return records


class Served:
    """Which merges pylora makes; PEFT makes the others.

    Args:
        layer: peft.tuners.lora.layer.
        variants: peft.tuners.lora.variants.
    """

    def __init__(self, layer: Any, variants: Any) -> None:
        self._layers = (layer.Linear, layer.Embedding, layer.Conv1d, layer.Conv2d, layer.Conv3d)
        self._linear, self._dora = layer.Linear, variants.DoraLinearVariant

    def merge(self, module: Any, adapter_names: Any) -> bool:
        """Whether pylora can merge these adapters (None: the active ones) into the layer."""
        if type(module) not in self._layers or isinstance(adapter_names, str) or not self.owns_merges(module):
            return False
        # A registered parameter: MultiheadAttention puts tensors with a graph in the place of weights.
        weight = module.get_base_layer()._parameters.get("weight")
        if type(weight) is not nn.Parameter or not kernels_serve(weight.device) or not weight.is_floating_point():
            return False
        names = module.active_adapters if adapter_names is None else adapter_names
        variants = [module.lora_variant[name] for name in names if name in module.lora_variant]
        return all(type(module) is self._linear and type(variant) is self._dora for variant in variants)

    def owns_merges(self, module: Any) -> bool:
        """Whether the layer holds what pylora has merged, as far as it is merged."""
        merged = [delta.adapter_name for record in _RECORDS.get(module, ()) for delta in record.deltas]
        return merged == module.merged_adapters


def _merge(original: Callable[..., None], served: Served) -> Callable[..., None]:
    def merge(self: Any, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        if not served.merge(self, adapter_names):
            original(self, safe_merge=safe_merge, adapter_names=adapter_names)
            return
        records = _records(self)
        before = len(records)
        DeltaLayer.merge(self, safe_merge, adapter_names)
        for record in records[before:]:
            leave_norms(self, record.deltas)

    return merge


def _unmerge(original: Callable[..., None], served: Served) -> Callable[..., None]:
    def unmerge(self: Any) -> None:
        records = _RECORDS.get(self)
        if not records or not served.owns_merges(self):
            _RECORDS.pop(self, None)
            original(self)
            return
        deltas = [delta for record in records for delta in record.deltas]
        try:
            DeltaLayer.unmerge(self)
        except ValueError:  # the weight has been changed since the merge: subtract, as PEFT does
            DeltaLayer.drop_merge_log(self)
            DeltaLayer.unmerge(self)
        take_norms(self, deltas)

    return unmerge


def _unload(original: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    def unload_and_optionally_merge(self: Any, *args: Any, **kwargs: Any) -> nn.Module:
        with for_good():
            return original(self, *args, **kwargs)

    return unload_and_optionally_merge
