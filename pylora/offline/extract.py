"""A LoRA adapter from the difference of two checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pylora.config import LoraConfig
from pylora.offline.adapter import LayerWeights, write_adapter
from pylora.offline.base import BaseCheckpoint
from pylora.offline.errors import OfflineError
from pylora.offline.folders import check_output, new_folder
from pylora.offline.module_kinds import dense_weights, task_type
from pylora.offline.tensor_files import torch_dtype

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Extracted:
    """One layer of the adapter.

    Attributes:
        name: The layer.
        rank: That it got.
        captured: Share of the squared norm of the difference that the adapter has.
        size: ‖tuned - base‖ / ‖base‖.
    """

    name: str
    rank: int
    captured: float
    size: float


@dataclass
class Report:
    """What was found.

    Attributes:
        layers: Those of the adapter.
        left: Other tensors that differ, with ‖tuned - base‖ / ‖base‖.
        kept: Of those, the ones that the adapter has whole.
    """

    layers: list[Extracted] = field(default_factory=list)
    left: dict[str, float] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Wish:
    """What adapter is wanted.

    Attributes:
        rank: The largest.
        energy: The share of a difference's squared norm at which a layer's rank is enough; 1 gives all the same rank.
        whole: Keep other changed modules whole, in `modules_to_save`.
        matches: Whether a layer of this name is to have an adapter.
    """

    rank: int
    energy: float = 1.0
    whole: bool = False
    matches: Callable[[str], bool] = lambda name: True


def extract_adapter(
    tuned: BaseCheckpoint, base: BaseCheckpoint, folder: Path, wish: Wish, progress: Callable[[int], Any] | None = None
) -> Report:
    """Write the adapter that brings `base` closest to `tuned`: of each difference the first singular directions.

    Args:
        tuned: The fine-tuned model.
        base: What it was tuned from.
        folder: New or empty. It is there when all is written, or not at all.
        wish: What adapter is wanted.
        progress: Called with 1 after each tensor.

    Raises:
        OfflineError: the two are not of one model, or do not differ in a dense layer.
        OSError: the files cannot be written.
    """
    check_output(folder, (tuned.folder, base.folder))
    dense = dense_weights(base)
    _check_alike(tuned, base)
    layers: dict[str, LayerWeights] = {}
    report = Report()
    for key in base:
        name, transposed = dense.get(key, ("", False))
        if name and wish.matches(name):
            found = _layer(name, tuned.read(key), base.read(key), transposed, wish)
            if found is not None:
                layers[name], extracted = found
                report.layers.append(extracted)
        elif (size := _difference(tuned, base, key)) > 0:
            report.left[key] = size
        if progress is not None:
            progress(1)
    if not layers:
        raise OfflineError(f"{tuned.folder}: expected dense layers that differ from {base.folder}, found none")
    others = _whole_modules(tuned, base, report.left) if wish.whole else {}
    report.kept = [key for key in report.left if key in others]
    config = _config(base, layers, wish.rank, others, any(transposed for _, transposed in dense.values()))
    with new_folder(folder) as staging:
        write_adapter(staging, config, layers, others)
    return report


def _check_alike(tuned: BaseCheckpoint, base: BaseCheckpoint) -> None:
    if missing := [key for key in base if key not in tuned]:
        raise OfflineError(f"{tuned.folder}: expected the tensors of {base.folder}, found no {missing[0]}")
    for key in base:
        if base.entry(key).shape != tuned.entry(key).shape:
            raise OfflineError(
                f"{tuned.folder}: {key}: expected shape {base.entry(key).shape} as in the base, got "
                f"{tuned.entry(key).shape}"
            )


def _difference(tuned: BaseCheckpoint, base: BaseCheckpoint, key: str) -> float:
    """‖tuned - base‖ / ‖base‖ of a tensor; 0 for what is not of floating point numbers."""
    if torch_dtype(base.entry(key).dtype) is None or torch_dtype(tuned.entry(key).dtype) is None:
        return 0.0
    before, after = base.read(key).float(), tuned.read(key).float()
    size = float((after - before).norm())
    return size / max(float(before.norm()), 1e-30) if size else 0.0


def _layer(
    name: str, after: Tensor, before: Tensor, transposed: bool, wish: Wish
) -> tuple[LayerWeights, Extracted] | None:
    from pylora.init import top_singular_triplets

    dtype = after.dtype
    before = before.float()
    delta = after.float() - before
    delta = delta.t() if transposed else delta
    total = float(delta.norm()) ** 2
    if total == 0:
        return None
    if not delta.isfinite().all():
        raise OfflineError(f"{name}: expected finite numbers in both models")
    u, s, vh = top_singular_triplets(delta, wish.rank)
    shares = s.double().square().cumsum(0) / total
    enough = int((shares < wish.energy).sum()) + 1 if wish.energy < 1 else len(s)
    rank = max(1, min(enough, len(s)))
    root = s[:rank].sqrt()
    a, b = (root[:, None] * vh[:rank]).to(dtype), (u[:, :rank] * root).to(dtype)
    captured = min(1.0, float(shares[rank - 1]))
    size = total**0.5 / max(float(before.norm()), 1e-30)
    return LayerWeights("linear", a.contiguous(), b.contiguous(), rank, 1.0), Extracted(name, rank, captured, size)


def _whole_modules(tuned: BaseCheckpoint, base: BaseCheckpoint, left: dict[str, float]) -> dict[str, Tensor]:
    """The tuned tensors of the modules that have a changed one, and of all modules whose names end alike, by which
    `modules_to_save` goes ("norm" is an "input_layernorm" too)."""
    names = tuple({key.split(".")[-2] for key in left if "." in key})
    keys = [key for key in base if key.rpartition(".")[0].endswith(names)]
    return {key: tuned.read(key) for key in keys if torch_dtype(tuned.entry(key).dtype) is not None}


def _config(
    base: BaseCheckpoint, layers: dict[str, LayerWeights], rank: int, others: dict[str, Tensor], conv1d: bool
) -> Any:
    largest = max(layer.rank for layer in layers.values())
    pattern = {name: layer.rank for name, layer in layers.items() if layer.rank != largest}
    return LoraConfig(
        r=largest,
        lora_alpha=largest,
        rank_pattern=dict(pattern),
        alpha_pattern=dict(pattern),
        target_modules=sorted(layers),
        modules_to_save=sorted({key.split(".")[-2] for key in others}) or None,
        fan_in_fan_out=conv1d,
        base_model_name_or_path=str(base.folder),
        task_type=task_type(base),
        inference_mode=True,
    )
