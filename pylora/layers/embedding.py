"""LoRA on `nn.Embedding`."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pylora.errors import PeftWarning
from pylora.layers.base_weight import DenseBaseWeight
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.registry import register_layer
from pylora.layers.row_names import RowNames
from pylora.layers.served import OP_DTYPES, adds_in_place, are_factors
from pylora.ops import AdapterPools, multi_lora_embedding_


def embed_scale(base: Any) -> torch.Tensor | None:
    """The number that an embedding's forward multiplies its rows by, if its class has one (Gemma's)."""
    scale = getattr(base, "embed_scale", None)
    if isinstance(scale, (int, float)):
        return torch.tensor(scale, device=base.weight.device, dtype=base.weight.dtype)
    if not isinstance(scale, torch.Tensor):
        return None
    if scale.numel() != 1:
        warnings.warn(
            f"Found embed_scale attribute with shape {scale.shape}, expected scalar. "
            "It is not applied to the adapter's output.",
            PeftWarning,
            stacklevel=4,
        )
        return None
    return scale


class Embedding(DeltaLayer):
    """An embedding with adapters: y = base(x) + sum over active adapters of scaling · (row x of Aᵀ) · Bᵀ.

    A is `lora_embedding_A[name]`, [rank, num_embeddings], and B `lora_embedding_B[name]`, [embedding_dim, rank]: bare
    parameters, not modules. Rows are looked up in A as the base layer looks them up in its weight (padding_idx,
    max_norm, norm_type, scale_grad_by_freq), and an `embed_scale` of the base layer (Gemma) applies to the
    adapters' part too.

    Args:
        base_layer: The embedding to wrap.
        adapter_name: The first adapter's name; it becomes the active one.
        config: Its LoraConfig. `lora_dropout` has nothing to act on here.
        r: Its rank here.
        lora_alpha: Its alpha here.
        **kwargs: Passed to `LoraLayer` and `update_layer`.

    Raises:
        ValueError: `lora_bias` is set, or what `update_layer` refuses.

    Shapes and dtypes: x [...], integers -> [..., embedding_dim] in the dtype that the base layer returns.
    """

    factor_names = ("lora_embedding_A", "lora_embedding_B")
    variant_kind = "embedding"

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.num_embeddings, module.embedding_dim

    def _check_adapter(self, r: int, config: Any) -> None:
        if config.lora_bias:
            raise ValueError(f"lora_bias={config.lora_bias} is not supported for {type(self).__name__}.")

    def _new_factors(self, r: int, config: Any) -> tuple[nn.Parameter, nn.Parameter]:
        a = nn.Parameter(torch.empty(r, self.in_features))
        b = nn.Parameter(torch.empty(self.out_features, r))
        return a, b

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return self.lora_embedding_A[name], self.lora_embedding_B[name]

    def _base_weight(self) -> DenseBaseWeight:
        return DenseBaseWeight(self.get_base_layer(), transposed=True)

    def _adapter_output(self, name: str, x: torch.Tensor) -> torch.Tensor:
        a, b = self._factors(name)
        output = self._embed(x, a.T) @ b.T * self.scaling[name]
        embed_scale = self._get_embed_scale()
        return output if embed_scale is None else output * embed_scale.to(output.dtype)

    def _fused_mixed_batch(self, x: torch.Tensor, names: RowNames) -> tuple[torch.Tensor, tuple[str, ...]] | None:
        base: Any = self.get_base_layer()
        served = tuple(name for name in names.rows_of if self._is_served(name))
        if not served or base.max_norm is not None or base.scale_grad_by_freq or not adds_in_place():
            return None
        result = self.base_layer(x)
        scale = self._get_embed_scale()
        takes = x.is_cpu and x.dtype in (torch.int64, torch.int32) and result.dtype in OP_DTYPES
        if not takes or not result.is_contiguous() or (scale is not None and torch.compiler.is_compiling()):
            return result, ()
        factors = [self._factors(name) for name in served]
        scalings = [float(self.scaling[name]) for name in served]
        if scale is not None:
            scalings = [each * float(scale.to(b.dtype)) for each, (_, b) in zip(scalings, factors, strict=True)]
        pools = AdapterPools([a for a, _ in factors], [b for _, b in factors], scalings)
        multi_lora_embedding_(result, x, pools, names.plan(served), base.padding_idx)
        return result, served

    def _is_served(self, name: str) -> bool:
        """Whether the adapter is here and multi_lora_embedding_ takes it."""
        if not self._has_adapter(name) or name in self.lora_variant:
            return False
        return are_factors(*self._factors(name), self.scaling[name])

    def _embed(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        """Rows x of `weight`, [num_embeddings, any], under the base layer's rules."""
        base: Any = self.get_base_layer()
        return F.embedding(
            x,
            weight,
            padding_idx=base.padding_idx,
            max_norm=base.max_norm,
            norm_type=base.norm_type,
            scale_grad_by_freq=base.scale_grad_by_freq,
            # Not `sparse`: torch cannot transpose the sparse gradient that A's transposed view would get.
        )

    def _get_embed_scale(self) -> torch.Tensor | None:
        return embed_scale(self.get_base_layer())

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """scaling · (B·A)ᵀ, [num_embeddings, embedding_dim], in B's dtype; on a CPU narrow factors multiply in f32.

        Args:
            adapter: Name of an adapter on this layer.

        Raises:
            AttributeError: There is no such adapter here (torch's ParameterDict says so).
        """
        return self._delta_matrix(adapter).T

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


@register_layer("torch.nn.Embedding", lambda module: isinstance(module, nn.Embedding))
def _wrap_embedding(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Embedding:
    return Embedding(target, adapter_name, config=config, **kwargs)
