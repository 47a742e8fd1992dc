"""What an adapter holds and does, layer by layer: sizes, norms, singular values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pylora.offline.adapter import Adapter, LayerWeights
from pylora.offline.base import BaseCheckpoint, match_names

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

_STYLES = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""Okabe and Ito's palette, told apart with any colour vision."""


@dataclass(frozen=True)
class LayerFacts:
    """One layer of an adapter.

    Attributes:
        name: The layer.
        kind: "linear", "embedding" or "conv".
        shape: (rows, columns) of the delta, scaling · B·A.
        rank: Of the factors.
        scaling: Factor on B·A.
        parameters: Numbers that the adapter has here.
        delta_norm: Frobenius norm of the delta.
        base_norm: Of the base weight; None where no base was given.
        effective_rank: exp of the entropy of the squared singular values' shares (Roy and Vetterli, 2007,
            "The effective rank", with energies as weights): how many directions the delta really uses.
        singular_values: Of the delta, the largest first, at most `rank`.
    """

    name: str
    kind: str
    shape: tuple[int, int]
    rank: int
    scaling: float
    parameters: int
    delta_norm: float
    base_norm: float | None
    effective_rank: float
    singular_values: list[float]

    @property
    def relative(self) -> float | None:
        """‖delta‖ / ‖W‖."""
        return None if not self.base_norm else self.delta_norm / self.base_norm


def inspect_adapter(
    adapter: Adapter, base: BaseCheckpoint | None = None, progress: Callable[[int], Any] | None = None
) -> list[LayerFacts]:
    """Measure every layer; no delta is formed that is larger than its factors.

    Args:
        adapter: From `read_adapter`.
        base: The base model's files, for norms beside the base's; layers that it has not get none.
        progress: Called with 1 after each layer.
    """
    found = match_names([f"{name}.weight" for name in adapter.layers], base) if base is not None else {}
    facts = []
    for name, layer in adapter.layers.items():
        key = found.get(f"{name}.weight")
        base_norm = None if base is None or key is None else float(base.read(key).float().norm())
        facts.append(_facts(name, layer, base_norm))
        if progress is not None:
            progress(1)
    return facts


def _facts(name: str, layer: LayerWeights, base_norm: float | None) -> LayerFacts:
    from pylora.combine import triplets_of_product

    a, b = (t.float() for t in layer.matrices())
    values = triplets_of_product(b * layer.scaling, a).s
    energy = values.double().square()
    total = float(energy.sum())
    shares = energy[energy > 0] / total if total > 0 else energy[:0]
    effective = float((-(shares * shares.log()).sum()).exp()) if len(shares) else 0.0
    numbers = [t for t in (layer.a, layer.b, layer.magnitude, layer.bias) if t is not None]
    return LayerFacts(
        name=name,
        kind=layer.kind,
        shape=(b.shape[0], a.shape[1]),
        rank=layer.rank,
        scaling=layer.scaling,
        parameters=sum(t.numel() for t in numbers),
        delta_norm=total**0.5,
        base_norm=base_norm,
        effective_rank=effective,
        singular_values=[float(value) for value in values],
    )


def draw(facts: list[LayerFacts], title: str, path: Path) -> None:
    """Write a PNG: norms by place in the model, a line for each kind of module, and the spectra.

    Raises:
        ImportError: matplotlib is not installed.
        OSError: the file cannot be written; an older one stays as it is.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    from pylora.config.files import replacing

    relative = all(layer.relative is not None for layer in facts)
    groups: dict[str, list[LayerFacts]] = {}
    for layer in facts:
        groups.setdefault(layer.name.rpartition(".")[2], []).append(layer)
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2))
    for i, (group, layers) in enumerate(groups.items()):
        style = {"color": _STYLES[i % len(_STYLES)], "linestyle": "-" if i < len(_STYLES) else "--", "label": group}
        heights = [layer.relative if relative else layer.delta_norm for layer in layers]
        left.plot(range(len(layers)), heights, marker="o", markersize=3, linewidth=1.3, **style)
        longest = max(len(layer.singular_values) for layer in layers)
        means = [
            sum(values) / len(values)
            for k in range(longest)
            if (values := [layer.singular_values[k] for layer in layers if k < len(layer.singular_values)])
        ]
        right.plot(range(1, longest + 1), means, marker="o", markersize=3, linewidth=1.3, **style)
    left.set(title="size of the change", xlabel="place in the model", ylabel="‖ΔW‖ / ‖W‖" if relative else "‖ΔW‖")
    right.set(title="singular values of ΔW, mean over layers", xlabel="direction", ylabel="σ")
    for axes in (left, right):
        axes.set_ylim(bottom=0)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    right.legend(fontsize=8, frameon=False, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=130, format="png")
    pyplot.close(figure)
