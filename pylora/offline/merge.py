"""Merge an adapter into a checkpoint, file by file: what is in memory is one tensor, and the adapter."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.config import LoraConfig
from pylora.config.support import belongs_to_changed_base
from pylora.errors import UnsupportedFeatureError
from pylora.offline.adapter import Adapter, LayerWeights
from pylora.offline.base import BaseCheckpoint, match_names
from pylora.offline.errors import OfflineError
from pylora.offline.folders import check_output, check_space, new_folder
from pylora.offline.tensor_files import Progress, TensorFile, TensorFileWriter, dtype_name, torch_dtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

# What has no place in a weight. (field of the configuration, why)
_NOT_MERGEABLE = {
    "alora_invocation_tokens": "aLoRA applies to a part of a sequence only",
    "trainable_token_indices": "rows of an embedding are trained beside it; use merge_and_unload in Python",
    "target_parameters": "the adapter belongs to parameters of modules; use merge_and_unload in Python",
    "layer_replication": "the adapter's model has more layers than the base's files",
}

_AT_ONCE = 1 << 20
"""Numbers that are looked at at a time, so that what is computed of them stays small."""


@dataclass(frozen=True)
class MergePlan:
    """A merge that has been checked and not begun.

    Attributes:
        base: The model.
        adapter: What is merged into it.
        layers: Adapted weights of the base by key, with the layers' names in the adapter.
        biases: Biases of the base that the adapter adds to, likewise.
        replaced: Tensors that take the place of the base's, by key; where that is an adapted weight too, the adapter is
            merged into these.
        added: Tensors that the base has not, such as a classifier, by key.
        dtype: Of all floating-point tensors of the result; None keeps each one's.
    """

    base: BaseCheckpoint
    adapter: Adapter
    layers: dict[str, str]
    biases: dict[str, str]
    replaced: dict[str, Tensor]
    added: dict[str, Tensor]
    dtype: torch.dtype | None

    def changes(self, key: str) -> bool:
        """Whether the result has other numbers in this tensor of the base."""
        return key in self.layers or key in self.biases or key in self.replaced

    def source(self, key: str) -> Tensor:
        """A tensor as it is before the merge, in memory of its own."""
        replaced = self.replaced.get(key)
        return self.base.read(key) if replaced is None else replaced.clone()

    def result_dtype(self, dtype: str) -> str:
        """What a tensor whose dtype the file calls `dtype` is stored as."""
        return dtype if self.dtype is None or torch_dtype(dtype) is None else dtype_name(self.dtype)

    def total_bytes(self) -> int:
        """Bytes of the result's tensors."""
        layouts = [layout for name in self.base.files for layout in _layout(self, name).values()]
        return sum(size for *_, size in layouts)


def plan_merge(base: BaseCheckpoint, adapter: Adapter, dtype: torch.dtype | None = None) -> MergePlan:
    """Find the base tensor of everything in the adapter, and check all that can be checked without reading them.

    Raises:
        OfflineError: the adapter does not fit the base.
        UnsupportedFeatureError: the adapter cannot be merged into weights.
    """
    _require_mergeable(adapter)
    weights = {name: f"{name}.weight" for name in adapter.layers}
    # Embeddings that were saved with the adapter are called as inside the LoRA layer.
    others = {name.replace(".base_layer.", "."): tensor for name, tensor in adapter.others.items()}
    found = match_names([*weights.values(), *others], base)
    missing = [name for name, weight in weights.items() if weight not in found]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise OfflineError(
            f"{adapter.place}: the base in {base.folder} has no weights for {len(missing)} of {len(weights)} layers: "
            f"{', '.join(missing[:3])}{more}. Is it the adapter of another model, or are the weights tied?"
        )
    layers = {found[weight]: name for name, weight in weights.items()}
    for key, name in layers.items():
        _check_shape(base, key, name, adapter.layers[name])
    if any(adapter.layers[name].kind == "embedding" for name in layers.values()):
        _check_not_tied(base, adapter)
    biases = {}
    for key, name in layers.items():
        if adapter.layers[name].bias is not None:
            biases[key.removesuffix("weight") + "bias"] = name
    if absent := [key for key in biases if key not in base]:
        raise OfflineError(f"{adapter.place}: lora_bias: expected the base to have {absent[0]}, found none")
    replaced = {found[name]: tensor for name, tensor in others.items() if name in found}
    for key, tensor in replaced.items():
        if base.entry(key).shape != tuple(tensor.shape):
            raise OfflineError(
                f"{adapter.place}: {key}: expected the base's shape {base.entry(key).shape}, got "
                f"{tuple(tensor.shape)}: the base was resized; merge in Python, where its configuration follows"
            )
    added = {name: tensor for name, tensor in others.items() if name not in found}
    return MergePlan(base, adapter, layers, biases, replaced, added, dtype)


def _require_mergeable(adapter: Adapter) -> None:
    for field, why in _NOT_MERGEABLE.items():
        if getattr(adapter.config, field, None):
            raise UnsupportedFeatureError(f"{adapter.place}: {field}: cannot be merged into a checkpoint: {why}")
    if belongs_to_changed_base(adapter.config):
        raise UnsupportedFeatureError(
            f"{adapter.place}: init_lora_weights={adapter.config.init_lora_weights!r}: the adapter belongs to a base "
            "that its initialisation changed. Save it with `path_initial_model_for_weight_conversion` first"
        )


def _check_not_tied(base: BaseCheckpoint, adapter: Adapter) -> None:
    """An output layer that is the embedding would change with it, which it does not under the adapter."""
    if any(key.endswith("lm_head.weight") for key in base) or adapter.config.ensure_weight_tying:
        return
    if base.config.get("tie_word_embeddings", True):
        raise UnsupportedFeatureError(
            f"{adapter.place}: the adapter is on an embedding, and {base.folder} has no output weights of its own: "
            "they are tied, and merging would change both. Save the base with tie_word_embeddings=False first"
        )


def _check_shape(base: BaseCheckpoint, key: str, name: str, layer: LayerWeights) -> None:
    entry = base.entry(key)
    if torch_dtype(entry.dtype) is None:
        raise OfflineError(f"{base.folder}: {key}: expected F64, F32, F16 or BF16, got {entry.dtype}: is it quantised?")
    rows, columns = layer.b.shape[0], layer.a.shape[1:]
    shapes = [(rows, *columns)] if layer.kind == "conv" else [(*columns, rows)]
    if layer.kind == "linear":
        shapes.append((rows, *columns))
    if entry.shape not in shapes:
        raise OfflineError(f"{name}: expected a base weight of shape {shapes[-1]}, got {entry.shape}")


def is_transposed(layer: LayerWeights, shape: tuple[int, ...], config: Any) -> bool:
    """Whether the base keeps this layer's weight as [in, out] (embeddings, Conv1D)."""
    rows, columns = layer.b.shape[0], layer.a.shape[1]
    if layer.kind != "linear" or rows == columns:
        return layer.kind == "embedding" or (layer.kind == "linear" and config.fan_in_fan_out)
    return shape == (columns, rows)


def write_merged(plan: MergePlan, folder: Path, progress: Progress | None = None, check: bool = False) -> str | None:
    """Write the merged model: shards, index, configuration and tokenizer, in the base's layout.

    Args:
        plan: From `plan_merge`.
        folder: New or empty. It is there when all is written, or not at all.
        progress: Told of bytes that were written (with `check`, of those that were checked too).
        check: Read the result again before it gets its name, and compare it with the merge in f64.

    Returns:
        what the check found, None without one.

    Raises:
        OfflineError: a merged value is not finite, the disk has no room, `folder` is not empty, or the check failed.
        OSError: the files cannot be written.
    """
    from pylora.offline.check import check_merged

    check_output(folder, (plan.base.folder,))
    check_space(folder, plan.total_bytes() + (16 << 20))
    with new_folder(folder) as staging:
        for path in plan.base.other_files():
            (staging / path).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(plan.base.folder / path, staging / path)
        for name in plan.base.files:
            _write_file(plan, name, staging / name, progress)
        _write_index(plan, staging)
        _write_config(plan, staging)
        return check_merged(plan, staging, progress) if check else None


def _layout(plan: MergePlan, file_name: str) -> dict[str, tuple[str, tuple[int, ...], int]]:
    """dtype, shape and bytes of what a file of the result holds; tensors that the base has not go to the last one."""
    file = plan.base.files[file_name]
    layout = {}
    for key, entry in file.entries.items():
        dtype = plan.result_dtype(entry.dtype)
        stored = torch_dtype(dtype)
        size = entry.end - entry.begin if stored is None else math.prod(entry.shape) * stored.itemsize
        layout[key] = (dtype, entry.shape, size)
    if file_name == list(plan.base.files)[-1]:
        for key, tensor in plan.added.items():
            dtype = plan.result_dtype(dtype_name(tensor.dtype))
            layout[key] = (dtype, tuple(tensor.shape), tensor.numel() * _stored(dtype).itemsize)
    return layout


def _stored(dtype: str) -> torch.dtype:
    found = torch_dtype(dtype)
    assert found is not None
    return found


def _write_file(plan: MergePlan, name: str, path: Path, progress: Progress | None) -> None:
    file, layout = plan.base.files[name], _layout(plan, name)
    with TensorFileWriter(path, layout, file.metadata, progress) as writer:
        for key, (dtype, _, _) in layout.items():
            if plan.changes(key) or key in plan.added:
                writer.write(key, _result(plan, key, dtype))
            else:
                writer.write_chunks(key, unchanged_bytes(file, key, dtype))
        writer.finish()


def _result(plan: MergePlan, key: str, dtype: str) -> Tensor:
    """A tensor that is not the base's, as it is stored in the result."""
    stored = _stored(dtype)
    if key in plan.layers:
        value = _merged_weight(plan, key, stored)
    elif key in plan.biases:
        layer = plan.adapter.layers[plan.biases[key]]
        assert layer.bias is not None
        value = plan.source(key).double() + layer.scaling * layer.bias.double()
    else:
        value = plan.added[key] if key in plan.added else plan.source(key)
    return _rounded(value, stored, key)


def unchanged_bytes(file: TensorFile, key: str, dtype: str) -> Iterator[bytes | memoryview]:
    """The bytes of a tensor of the base, in the result's dtype, piece by piece."""
    import torch

    if dtype == file.entries[key].dtype:
        yield from file.chunks(key)
        return
    source, stored = _stored(file.entries[key].dtype), _stored(dtype)
    for chunk in file.chunks(key):
        values = _rounded(torch.frombuffer(bytearray(chunk), dtype=source), stored, key)
        yield values.view(torch.uint8).numpy().data


def _rounded(value: Tensor, dtype: torch.dtype, key: str) -> Tensor:
    """`value` in `dtype`.

    Raises:
        OfflineError: finite numbers become infinite in it.
    """
    result = value.to(dtype)
    if result.dtype != value.dtype:
        for before, after in zip(value.view(-1).split(_AT_ONCE), result.view(-1).split(_AT_ONCE), strict=True):
            if not after.isfinite().equal(before.isfinite()):
                raise OfflineError(f"{key}: numbers up to {before.abs().max():.3g} are beyond {dtype}")
    return result


def _merged_weight(plan: MergePlan, key: str, stored: torch.dtype) -> Tensor:
    import torch

    weight = plan.source(key)
    if stored.itemsize > weight.dtype.itemsize:
        weight = weight.to(stored)
    name = plan.layers[key]
    layer = plan.adapter.layers[name]
    in_place = weight.t() if is_transposed(layer, tuple(weight.shape), plan.adapter.config) else weight
    with torch.no_grad():
        _merge_layer(in_place, layer, plan.adapter.config, name)
    return weight


def _merge_layer(weight: Tensor, layer: LayerWeights, config: Any, name: str) -> None:
    """Merge in place, by the layer that a model would have: W as [out, in, kernel...]."""
    from torch import nn

    from pylora.layers import create_layer
    from pylora.layers.undo import for_good
    from pylora.model.factor_access import set_factors

    rows, columns = weight.shape[:2]
    if layer.kind == "conv":
        kind: Any = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.dim()]
        module = kind(columns, rows, tuple(weight.shape[2:]), bias=False, device="meta")
    else:  # an embedding's rows are the columns here: its merge is that of a dense layer
        module = nn.Linear(columns, rows, bias=False, device="meta")
    module.weight = nn.Parameter(weight, requires_grad=False)
    here = LoraConfig(r=layer.rank, lora_alpha=1, use_dora=layer.magnitude is not None, init_lora_weights=False)
    adapted: Any = create_layer(module, "default", here, r=layer.rank, lora_alpha=1)
    adapted.scaling["default"] = layer.scaling
    set_factors(adapted, "default", layer.a, layer.b)
    if layer.magnitude is not None:
        magnitude = adapted.lora_magnitude_vector["default"]
        magnitude.weight = nn.Parameter(layer.magnitude.view_as(magnitude.weight), requires_grad=False)
    try:
        with for_good():
            adapted.merge(safe_merge=True)
    except ValueError as error:
        raise OfflineError(f"{name}: {error}") from None


def _write_index(plan: MergePlan, staging: Path) -> None:
    if plan.base.index_name is None:
        return
    places = {key: name for name in plan.base.files for key in _layout(plan, name)}
    content = {"metadata": {"total_size": plan.total_bytes()}, "weight_map": dict(sorted(places.items()))}
    (staging / plan.base.index_name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _write_config(plan: MergePlan, staging: Path) -> None:
    if plan.dtype is None or not plan.base.config:
        return
    config = dict(plan.base.config)
    field = "torch_dtype" if "torch_dtype" in config else "dtype"
    config[field] = str(plan.dtype).removeprefix("torch.")
    (staging / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
