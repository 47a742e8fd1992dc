"""LoRA on a dense layer: `nn.Linear`, and transformers' Conv1D, which keeps its weight transposed."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn
from torch.compiler import is_dynamo_compiling

from pylora.layers import fused
from pylora.layers.base_weight import DenseBaseWeight, is_conv1d
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.registry import register_layer
from pylora.layers.row_names import RowNames
from pylora.ops import dense_forward, dense_mixed_forward


class Linear(DeltaLayer):
    """A dense layer with adapters: y = base(x) + sum over active adapters of scaling · B·A·dropout(x).

    Args:
        base_layer: The layer to wrap.
        adapter_name: The first adapter's name; it becomes the active one.
        config: Its LoraConfig.
        r: Its rank here.
        lora_alpha: Its alpha here.
        is_target_conv_1d_layer: Whether `base_layer` is a Conv1D.
        **kwargs: Passed to `LoraLayer` and `update_layer`.

    Shapes and dtypes: x [..., in_features] -> [..., out_features] in the dtype that the base layer returns. Adapters
    may be f32 beside a bf16 or f16 base.
    """

    variant_kind = "linear"

    fan_in_fan_out: bool
    is_target_conv_1d_layer: bool

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, **kwargs)
        self.__dict__.update(
            fan_in_fan_out=config.fan_in_fan_out,
            is_target_conv_1d_layer=is_target_conv_1d_layer,
            _active_adapter=[adapter_name],
        )
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters' added.

        Args:
            x: Input, [..., in_features].
            *args: For the base layer.
            **kwargs: For the base layer, except `adapter_names`: one adapter name, or "__base__", for each row of x.

        Raises:
            ValueError: `adapter_names` has another length than x, or the layer is merged.
        """
        if not args and not kwargs:
            # One call, as each bytecode and each object that it touches may have to come from memory.
            result = fused.forward(self, x) if is_dynamo_compiling() else dense_forward(self, x)
            if result is not None:
                return result
        return super().forward(x, *args, **kwargs)

    def _fused_mixed_batch(self, x: torch.Tensor, names: RowNames) -> tuple[torch.Tensor, tuple[str, ...]] | None:
        here, variants = self._modules["lora_A"]._modules, self.lora_variant  # type: ignore[union-attr]
        served = tuple(name for name in names.rows_of if name in here and name not in variants)
        if not served:
            return None
        plan = names.plan(served, None if x.is_cpu else x.device)
        if is_dynamo_compiling():
            result = fused.mixed_forward(self, x, served, plan)
        else:
            result = dense_mixed_forward(self, x, served, *plan)
        return None if result is None else (result, served)

    def _base_weight(self) -> DenseBaseWeight:
        return DenseBaseWeight(self.get_base_layer(), transposed=self.fan_in_fan_out)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        return lora_a.weight, lora_b.weight

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """scaling · B·A in the base weight's own layout and B's dtype; on a CPU narrow factors are multiplied in f32.

        Args:
            adapter: Name of an adapter on this layer.

        Raises:
            KeyError: There is no such adapter here.
        """
        delta = self._delta_matrix(adapter)
        return delta.T if self.fan_in_fan_out else delta

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        variant = self.lora_variant.get(adapter_name)
        return True if variant is None else variant.supports_lora_conversion()

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


@register_layer("torch.nn.Linear", lambda module: isinstance(module, nn.Linear))
def _wrap_linear(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Linear:
    if config.fan_in_fan_out:
        warnings.warn(
            "fan_in_fan_out is set to True but the target module is `torch.nn.Linear`. "
            "Setting fan_in_fan_out to False.",
            stacklevel=2,
        )
        config.fan_in_fan_out = False
    return Linear(target, adapter_name, config=config, **kwargs)


@register_layer("transformers.pytorch_utils.Conv1D", is_conv1d)
def _wrap_conv1d(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Linear:
    if not config.fan_in_fan_out:
        warnings.warn(
            "fan_in_fan_out is set to False but the target module is `Conv1D`. Setting fan_in_fan_out to True.",
            stacklevel=2,
        )
        config.fan_in_fan_out = True
    return Linear(target, adapter_name, config=config, is_target_conv_1d_layer=True, **kwargs)
