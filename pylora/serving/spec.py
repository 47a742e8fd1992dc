"""Which layers of a model can have adapters from a pool, and their widths."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from torch import nn


class LayerShape(NamedTuple):
    """Widths of a dense layer."""

    in_features: int
    out_features: int


@dataclass(frozen=True)
class PoolSpec:
    """The layers that a pool keeps stacks for.

    Attributes:
        layers: path in the base model (as in `named_modules`) and widths of each layer.
    """

    layers: Mapping[str, LayerShape]

    @staticmethod
    def from_model(model: nn.Module, target_modules: Collection[str] | None = None) -> PoolSpec:
        """The dense layers of a base model.

        Args:
            model: a model without adapters.
            target_modules: names or ends of names (`q_proj`, `layers.0.q_proj`); None for all dense layers but the
                output embedding.

        Raises:
            ValueError: no layer fits, or a name fits none.
        """
        head = getattr(model, "get_output_embeddings", lambda: None)()
        dense = {name: shape for name, module in model.named_modules() if (shape := shape_of(module)) is not None}
        if target_modules is None:
            skipped = {name for name, module in model.named_modules() if module is head}
            layers = {name: shape for name, shape in dense.items() if name not in skipped}
        else:
            for target in target_modules:
                if not any(_ends_with(name, target) for name in dense):
                    raise ValueError(f"PoolSpec: target_modules: expected names of dense layers, got {target!r}")
            layers = {n: shape for n, shape in dense.items() if any(_ends_with(n, each) for each in target_modules)}
        if not layers:
            raise ValueError(f"PoolSpec: model: expected dense layers, found none in {type(model).__name__}")
        return PoolSpec(layers)


def _ends_with(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def shape_of(module: Any) -> LayerShape | None:
    """The widths of a dense layer: `nn.Linear` and its subclasses, and transformers' `Conv1D`; None of another."""
    from torch import nn

    if isinstance(module, nn.Linear):
        return LayerShape(module.in_features, module.out_features)
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        return LayerShape(*module.weight.shape)
    return None
