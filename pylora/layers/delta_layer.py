"""What layers share whose adapters each add a low-rank matrix to one base weight: forward, mixed batches, merging."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from pylora.layers.base import VARIANT_KWARG_KEYS, LoraLayer
from pylora.layers.base_weight import BaseWeight
from pylora.layers.blank import become_blank
from pylora.layers.merging import Delta, MergedValues, check_adapters_to_merge
from pylora.layers.row_names import RowNames
from pylora.layers.undo import MergeRecord, check_merge_into_base, merge_into_base, unmerge_from_base, without


class AdaptedWeight(torch.Tensor):
    """A base weight that is not the whole story: adapters add to it.

    `nn.TransformerEncoder` and its layers compute from the weights of the modules inside them without calling these,
    unless one of the weights is of a type with `__torch_function__`, as this one is.
    """


class DeltaLayer(nn.Module, LoraLayer):
    """A LoRA layer that computes base(x) + sum over active adapters of a term, each term that of a low-rank delta.

    A subclass says what one adapter adds (`_adapter_output`), the matrices behind it (`_factors`) and how its base
    layer keeps the weight (`_base_weight`).
    """

    # Whether the module around this one may compute from `weight` instead of calling it.
    _parent_reads_weight: bool = False
    # What the base weight holds, the last merge at the end.
    _merge_records: list[MergeRecord]
    # Of the last mixed batch: sorting the names of 32 rows again would cost 20 us, comparing them less than 1.
    _last_row_names: RowNames | None = None

    def __init__(self, base_layer: nn.Module, **kwargs: Any) -> None:
        become_blank(self)
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.__dict__["_merge_records"] = []

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight; as an `AdaptedWeight` where that keeps adapters from being passed over."""
        base: Any = self.get_base_layer()
        weight = base.qweight if hasattr(base, "qweight") else base.weight
        return weight.as_subclass(AdaptedWeight) if self._parent_reads_weight and self._in_effect() else weight

    def _in_effect(self) -> list[str]:
        """The adapters that the forward adds."""
        if self._disable_adapters or self.merged:
            return []
        return [name for name in self.active_adapters if self._has_adapter(name)]

    def _adapter_output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        """What the adapter adds to the base layer's output for x, in any floating dtype."""
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        x = self._cast_input_dtype(x, lora_a.weight.dtype)
        return lora_b(lora_a(self.lora_dropout[name](x))) * self.scaling[name]

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A [rank, in] and B [out, rank] with B·A of the shape that `_base_weight` has."""
        raise NotImplementedError

    def _base_weight(self) -> BaseWeight:
        """Access to the base weight as [out, in].

        Raises:
            UnsupportedFeatureError: It cannot be read and written.
        """
        raise NotImplementedError

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters' added.

        Args:
            x: Input of the base layer.
            *args: For the base layer.
            **kwargs: For the base layer, except `adapter_names`: one adapter name, or "__base__", for each row of x.

        Raises:
            ValueError: `adapter_names` has another length than x, or the layer is merged.
        """
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        variant_kwargs = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **variant_kwargs, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        result_dtype = result.dtype
        for name in self.active_adapters:
            if not self._has_adapter(name):
                continue
            variant = self.lora_variant.get(name)
            if variant is None:
                result = result + self._adapter_output(name, x)
            else:
                result = variant.forward(self, active_adapter=name, x=x, result=result, **variant_kwargs, **kwargs)
        return result.to(result_dtype)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """A batch whose rows belong to different adapters: row i gets adapter_names[i], or none if that is not here."""
        variant_kwargs = {key: kwargs.pop(key, None) for key in VARIANT_KWARG_KEYS}
        rows_of_names = adapter_names if isinstance(adapter_names, RowNames) else self._last_row_names
        if rows_of_names is None or rows_of_names != adapter_names:
            rows_of_names = self._last_row_names = RowNames(adapter_names)
        fused = None if args or kwargs else self._fused_mixed_batch(x, rows_of_names)
        result, done = (self.base_layer(x, *args, **kwargs), ()) if fused is None else fused
        if len(done) == len(rows_of_names.rows_of):
            return result
        for name, rows in rows_of_names.rows_of.items():
            if name in done or not self._has_adapter(name):
                continue
            variant = self.lora_variant.get(name)
            if variant is None:
                result[rows] += self._adapter_output(name, x[rows]).to(result.dtype)
                continue
            for_rows = {key: None if item is None else [item[i] for i in rows] for key, item in variant_kwargs.items()}
            output = variant.forward(self, active_adapter=name, x=x[rows], result=result[rows], **for_rows, **kwargs)
            result[rows] = output.to(result.dtype)
        return result

    def _fused_mixed_batch(self, x: torch.Tensor, names: RowNames) -> tuple[torch.Tensor, tuple[str, ...]] | None:
        """The base layer's output with some adapters' added, and those adapters; None where no op serves the layer."""
        return None

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' deltas to the base weight (and, with `lora_bias`, to the base bias), in place.

        Args:
            safe_merge: Refuse values that are not finite. All adapters are checked before the first write.
            adapter_names: Adapters to merge; None means the active ones. Merged ones are skipped with a warning.

        Raises:
            ValueError: `safe_merge` and a merged value would be NaN or infinite. Nothing is changed then.
            RuntimeError: An adapter has a bias and the base layer has none. Nothing is changed then.
            TypeError: `adapter_names` is a string.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self._has_adapter(name)]
        if not names:
            return
        self._require_mergeable(names, safe_merge)
        deltas = self._deltas(names)
        record = merge_into_base(self._base_weight(), self._base_bias(), deltas, safe_merge)
        if record is not None:
            self._merge_records.append(record)
        for name in names:  # one weight holds the delta for all that share it
            for layer in self._sharing(name):
                layer.merged_adapters.append(name)

    def _sharing(self, name: str) -> list[Any]:
        """The layers, this one among them, whose base weight this adapter's delta goes into."""
        base: Any = self.get_base_layer()
        tied = self._tied_layers.get(name, ())
        return [self, *(each for each in tied if each is not self and each.get_base_layer().weight is base.weight)]

    def is_merged_by_partner(self, adapter_names: list[str] | None) -> bool:
        """Whether merging these adapters (None: the active ones) here has been done on layers that share them."""
        names = [name for name in adapter_names or self.active_adapters if self._has_adapter(name)]
        return bool(names) and all(name in self._tied_layers and name in self.merged_adapters for name in names)

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Raise what `merge` with these arguments would raise, and change nothing."""
        names = [name for name in check_adapters_to_merge(self, adapter_names, warn=False) if self._has_adapter(name)]
        if names:
            self._require_mergeable(names, safe_merge)
            weight = self._base_weight()
            if safe_merge:
                check_merge_into_base(weight, self._base_bias(), self._deltas(names))

    def _require_mergeable(self, names: list[str], safe_merge: bool) -> None:
        for name in names:
            variant = self.lora_variant.get(name)
            if variant is not None:
                variant.require_mergeable(self, name, safe_merge)
                continue
            self._factors(name)
            if self.lora_bias[name] and self._base_bias() is None:
                raise RuntimeError("Impossible to merge LoRA with `lora_bias=True` because the base layer has no bias.")

    def unmerge(self) -> None:
        """Take every merged delta out of the base weight and bias, the last first; warns when there is none.

        A weight that was on the CPU when it was merged gets the bits that it had before. One whose dtype has changed
        since then has the deltas subtracted, with a `PeftWarning`.

        Raises:
            ValueError: The base weight has been changed since the merge. Nothing is changed then.
        """
        if not self.merged:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        partners = [layer for name in self.merged_adapters for layer in self._sharing(name)]
        layers = list(dict.fromkeys([self, *partners]))
        merges = [(record, layer) for layer in layers for record in layer._merge_records]
        for record, owner in sorted(merges, key=lambda merge: merge[0].order, reverse=True):
            unmerge_from_base(owner._base_weight(), owner._base_bias(), record)
            owner._merge_records.remove(record)
        for layer in layers:
            layer.merged_adapters.clear()

    def drop_merge_log(self) -> None:
        """Forget how to undo merges bit for bit: `unmerge` then subtracts, whatever the base weight is by then."""
        for record in self._merge_records:
            record.log = None

    def _unmerged(self) -> MergedValues:
        """The base weight, [out, in], and bias without the merged adapters; views of them where none changed them."""
        weight, bias = self._base_weight(), self._base_bias()
        if not self._merge_records:
            return MergedValues(weight.read(), bias)
        return MergedValues(*without(weight, bias, self._merge_records[::-1]))

    def _merged_deltas(self) -> list[Delta]:
        """What the base weight holds, the last merged first."""
        return [delta for record in reversed(self._merge_records) for delta in reversed(record.deltas)]

    def _deltas(self, names: list[str]) -> list[Delta]:
        """What merging the adapters, which are not merged, does."""
        deltas = []
        for name in names:
            variant = self.lora_variant.get(name)
            deltas.append(self._plain_delta(name) if variant is None else variant.delta(self, name))
        return deltas

    def _plain_delta(self, name: str) -> Delta:
        a, b = self._factors(name)
        scaling, bias = self.scaling[name], None
        if self.lora_bias[name]:
            lora_b: Any = self.lora_B[name]
            bias = lora_b.bias.detach() * scaling
        return Delta(name, a.detach(), b.detach(), scaling, bias)

    def _delta_matrix(self, name: str) -> torch.Tensor:
        """scaling · B·A in B's dtype; on a CPU narrow factors are multiplied in f32."""
        a, b = self._factors(name)
        dtype = b.dtype
        if b.device.type == "cpu" and dtype in (torch.float16, torch.bfloat16):
            a, b = a.float(), b.float()
        return (b @ a * self.scaling[name]).to(dtype)
