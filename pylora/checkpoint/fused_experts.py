"""Adapters for experts that were modules (transformers 4) on a model where they are parameters (transformers 5).

transformers 5 keeps the experts of a block in two stacks, `gate_up_proj` and `down_proj`. An adapter of before has
factors for each expert's projections. Those of gate and up become one of twice the rank, whose B is block diagonal.
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn


@dataclass(frozen=True)
class FusedExperts:
    """How an architecture's experts were called.

    Attributes:
        gate, up, down: The projections of an expert, as modules.
        block: The module around experts and router, where it was called otherwise than `mlp`.
    """

    gate: str
    up: str
    down: str
    block: str | None = None

    @property
    def parameter_of(self) -> dict[str, str]:
        """Module names of before, the router's too, and the parameters that they have become."""
        return {
            "gate": "gate.weight",
            self.gate: "gate_up_proj",
            self.up: "gate_up_proj",
            self.down: "down_proj",
        }


_ARCHITECTURES = {
    "mixtral": FusedExperts("w1", "w3", "w2", block="block_sparse_moe"),
    "qwen2_moe": FusedExperts("gate_proj", "up_proj", "down_proj"),
}


def fused_experts(model: nn.Module) -> FusedExperts | None:
    """The names of before of a transformers model whose experts are stacked by now, None for any other model."""
    model_type = getattr(getattr(model, "config", None), "model_type", None)
    if not isinstance(model_type, str) or "transformers" not in sys.modules:
        return None
    try:
        from transformers.conversion_mapping import _MODEL_TO_CONVERSION_PATTERN as patterns
    except ImportError:
        return None
    experts = _ARCHITECTURES.get(patterns.get(model_type, model_type))
    # The parameter of a wrapped module is deeper.
    stacked = re.compile(r"(.*\.)?experts(\.base_layer)*\.gate_up_proj")
    if experts is None or not any(stacked.fullmatch(name) for name, _ in model.named_parameters()):
        return None
    return experts


def fuse_expert_tensors(experts: FusedExperts, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """An adapter's tensors as they are for stacked experts; those that are so already stay.

    Raises:
        ValueError: The factors of an expert are missing.
    """
    key = re.compile(
        rf"(?P<owner>.*\.experts)\.(?P<expert>\d+)\.(?P<name>{experts.gate}|{experts.up}|{experts.down})"
        r"\.lora_(?P<factor>[AB])\.weight"
    )
    result: dict[str, Tensor] = {}
    found: dict[str, dict[tuple[str, str], dict[int, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    for name, tensor in tensors.items():
        if experts.block is not None and ".lora_" in name:
            name = name.replace(f".{experts.block}.", ".mlp.")
        match = key.fullmatch(name)
        if match is None:
            result[name] = tensor
        else:
            found[match["owner"]][match["name"], match["factor"]][int(match["expert"])] = tensor
    for owner, parts in found.items():
        result.update(_fused(experts, owner, parts))
    return result


def _fused(
    experts: FusedExperts, owner: str, parts: Mapping[tuple[str, str], Mapping[int, Tensor]]
) -> dict[str, Tensor]:
    """The tensors of one block's experts. The wrapper of `down_proj` is around that of `gate_up_proj`."""
    stacks: dict[tuple[str, str], Any] = {part: _stacked(owner, part, tensors) for part, tensors in parts.items()}
    result: dict[str, Tensor] = {}
    has_down = (experts.down, "A") in stacks
    if has_down:
        result.update(_flattened(owner, stacks[experts.down, "A"], stacks[experts.down, "B"]))
    if (experts.gate, "A") in stacks:
        import torch

        a = torch.cat([stacks[name, "A"] for name in (experts.gate, experts.up)], dim=1)
        gate, up = stacks[experts.gate, "B"], stacks[experts.up, "B"]
        b = torch.stack([torch.block_diag(*pair) for pair in zip(gate, up, strict=True)])
        result.update(_flattened(f"{owner}.base_layer" if has_down else owner, a, b))
    return result


def _stacked(owner: str, part: tuple[str, str], tensors: Mapping[int, Tensor]) -> Tensor:
    import torch

    if sorted(tensors) != list(range(len(tensors))):
        raise ValueError(f"{owner}: expected {part[0]}.lora_{part[1]} of every expert, got those of {sorted(tensors)}")
    return torch.stack([tensors[i] for i in range(len(tensors))])


def _flattened(owner: str, a: Tensor, b: Tensor) -> dict[str, Tensor]:
    """[experts, rank, in] and [experts, out, rank] in the layout of `ParamWrapper`."""
    return {
        f"{owner}.lora_A.weight": a.flatten(0, 1),
        f"{owner}.lora_B.weight": b.permute(1, 2, 0).flatten(1).contiguous(),
    }
