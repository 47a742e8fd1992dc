"""A merged checkpoint against its definition: what should be unchanged by bytes, the rest by the merge in f64."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from pylora.offline.adapter import LayerWeights
from pylora.offline.errors import OfflineError
from pylora.offline.merge import MergePlan, is_transposed, unchanged_bytes
from pylora.offline.tensor_files import Progress, TensorFile

if TYPE_CHECKING:
    from torch import Tensor

_NUMBERS_AT_ONCE = 1 << 19


def check_merged(plan: MergePlan, folder: Path, progress: Progress | None = None) -> str:
    """Compare the files in `folder` with what `plan` says.

    Returns:
        A line for people: how many tensors, and the largest error of a merged number.

    Raises:
        OfflineError: a tensor is missing, or is not what it should be.
    """
    from safetensors import safe_open

    counts, worst = dict.fromkeys(("unchanged", "converted", "replaced", "merged"), 0), 0.0
    for name, file in plan.base.files.items():
        with safe_open(folder / name, framework="pt") as other_reader:
            names = set(other_reader.keys())
        with TensorFile(folder / name) as written:
            if missing := [key for key in file.entries if key not in names or key not in written.entries]:
                raise OfflineError(f"check: {folder / name}: {missing[0]} is missing")
            for key, entry in file.entries.items():
                if key in plan.layers:
                    worst = max(worst, _check_layer(plan, key, written.read(key)))
                    kind = "merged"
                elif plan.changes(key):
                    _check_other(plan, key, written.read(key))
                    kind = "replaced"
                else:
                    dtype = written.entries[key].dtype
                    kind = "unchanged" if dtype == entry.dtype else "converted"
                    if _digest(unchanged_bytes(file, key, dtype)) != _digest(written.chunks(key)):
                        raise OfflineError(f"check: {key}: expected the base's numbers, got others")
                counts[kind] += 1
                if progress is not None:
                    progress(written.entries[key].end - written.entries[key].begin)
    numbers = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    return f"checked: {numbers}; the largest error is {worst:.2f} of what rounding allows"


def _digest(chunks: Iterable[bytes | memoryview]) -> bytes:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return digest.digest()


def _check_other(plan: MergePlan, key: str, found: Tensor) -> None:
    expected = plan.source(key)
    if key in plan.biases:
        layer = plan.adapter.layers[plan.biases[key]]
        assert layer.bias is not None
        expected = expected.double() + layer.scaling * layer.bias.double()
    if not expected.to(found.dtype).equal(found):
        raise OfflineError(f"check: {key}: expected {plan.adapter.place}'s numbers, got others")


def _check_layer(plan: MergePlan, key: str, found: Tensor) -> float:
    """The largest error over what it may be; above 1 is an error."""
    layer = plan.adapter.layers[plan.layers[key]]
    weight = plan.source(key)
    transposed = is_transposed(layer, tuple(weight.shape), plan.adapter.config)
    weight, found = (t.t() if transposed else t.flatten(1) for t in (weight, found))
    worst = 0.0
    step = max(1, _NUMBERS_AT_ONCE // max(1, weight.shape[1]))
    for begin in range(0, weight.shape[0], step):
        rows = slice(begin, begin + step)
        expected, allowed = _merged_in_f64(weight[rows], layer, rows, found)
        share = ((found[rows].double() - expected).abs() / allowed).max().item()
        if not share <= 1:
            raise OfflineError(f"check: {key}: a merged number is off by {share:.3g} times what rounding allows")
        worst = max(worst, share)
    return worst


def _merged_in_f64(weight: Tensor, layer: LayerWeights, rows: slice, found: Tensor) -> tuple[Tensor, Tensor]:
    """The merged rows, and how far a merge in the base's arithmetic, rounded once, may be from them."""
    import torch

    a, b = (t.double() for t in layer.matrices())
    b = b[rows]
    delta = layer.scaling * (b @ a)
    base = weight.double()
    expected = base + delta
    size = base.abs() + abs(layer.scaling) * (b.abs() @ a.abs())
    arithmetic = torch.finfo(torch.float64 if weight.dtype == torch.float64 else torch.float32).eps
    slack = 4 * (1 + layer.rank**0.5) * arithmetic * size
    if layer.magnitude is not None:
        norm = expected.norm(dim=1, keepdim=True)
        factor = layer.magnitude.double().flatten()[rows, None] / norm
        expected, slack = expected * factor, slack * factor.abs() + 64 * arithmetic * (expected * factor).abs()
        # The factor itself is stored in the magnitude's dtype.
        slack = slack + torch.finfo(layer.magnitude.dtype).eps * expected.abs()
    rounding = torch.finfo(found.dtype)
    # Two roundings where the base is narrower than the result is wide: to the base's dtype, then to the result's.
    narrow = max(rounding.eps, torch.finfo(weight.dtype).eps if weight.dtype.itemsize > found.dtype.itemsize else 0)
    return expected, slack + 0.51 * narrow * expected.abs() + rounding.smallest_normal * rounding.eps
