"""LoRA on convolutions: `nn.Conv1d`, `nn.Conv2d`, `nn.Conv3d`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from pylora.layers.base_weight import ConvBaseWeight
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.registry import register_layer
from pylora.layers.row_names import RowNames
from pylora.layers.served import OP_DTYPES, adds_in_place, are_factors, is_hooked
from pylora.ops import AdapterPools, multi_lora_conv_

_TORCH_CLASSES = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class _ConvNd(DeltaLayer):
    """A convolution with adapters: y = base(x) + sum over active adapters of scaling · B * (A * dropout(x)).

    A is a convolution to `rank` channels that slides as the base layer does (kernel, stride, padding, dilation and
    padding mode), B one of kernel size 1 from there to `out_channels`, in the base layer's groups.

    Args:
        base_layer: The convolution to wrap.
        adapter_name: The first adapter's name; it becomes the active one.
        config: Its LoraConfig.
        r: Its rank here; with a grouped base layer a multiple of the groups.
        lora_alpha: Its alpha here.
        **kwargs: Passed to `LoraLayer` and `update_layer`.

    Raises:
        ValueError: The rank is not a multiple of the groups, the kernel is not of this class's dimensions, or what
            `update_layer` refuses.

    Shapes and dtypes: as the base layer's. Adapters may be f32 beside a bf16 or f16 base.

    A grouped base layer cannot be merged into: A reads all input channels, the base weight only those of its group.
    """

    _dim: ClassVar[int]
    conv_fn: Callable[..., torch.Tensor]

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
        base: Any = self.get_base_layer()
        self._kernel_dim = base.weight.dim()
        if self._kernel_dim != self._dim + 2:
            raise ValueError(
                f"{type(self).__name__} layer kernel must have {self._dim + 2} dimensions, not {self._kernel_dim}"
            )
        if base.groups > 1:
            warnings.warn("LoRA adapter added to ConvNd layer with groups > 1. Merging is not supported.", stacklevel=2)
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        return module.in_channels, module.out_channels

    def _check_adapter(self, r: int, config: Any) -> None:
        base: Any = self.get_base_layer()
        if r % base.groups != 0:
            raise ValueError(
                f"Targeting a {type(base).__name__} with groups={base.groups} and rank {r}. "
                "Currently, support is limited to conv layers where the rank is divisible by groups. "
                "Either choose a different rank or do not target this specific layer."
            )

    def _new_factors(self, r: int, config: Any) -> tuple[nn.Module, nn.Module]:
        base: Any = self.get_base_layer()
        lora_a: Any = _empty_conv(
            base,
            self.in_features,
            r,
            base.kernel_size,
            stride=base.stride,
            padding=base.padding,
            dilation=base.dilation,
            padding_mode=base.padding_mode,
            bias=False,
        )
        ones = (1,) * self._dim
        lora_b: Any = _empty_conv(base, r, self.out_features, ones, groups=base.groups, bias=config.lora_bias)
        return lora_a, lora_b

    def _get_dora_factor_view(self) -> tuple[int, ...]:
        return (-1,) + (1,) * (self._kernel_dim - 1)

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        groups = lora_b.groups
        if groups > 1:
            raise NotImplementedError("Merging is not supported for _ConvNd layers with groups > 1!")
        return lora_a.weight.flatten(1), lora_b.weight.flatten(1)

    def _fused_mixed_batch(self, x: torch.Tensor, names: RowNames) -> tuple[torch.Tensor, tuple[str, ...]] | None:
        served = tuple(name for name in names.rows_of if self._is_served(name))
        if not served or not adds_in_place():
            return None
        base: Any = self.get_base_layer()
        result = self.base_layer(x)
        if not x.is_cpu or x.dim() != self._kernel_dim or result.dtype not in OP_DTYPES or not result.is_contiguous():
            return result, ()
        padding = base.padding
        if isinstance(padding, str) or base.padding_mode != "zeros":
            mode = "constant" if base.padding_mode == "zeros" else base.padding_mode
            x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=mode), (0,) * self._dim
        a: list[Any] = [self.lora_A[name] for name in served]
        b: list[Any] = [self.lora_B[name] for name in served]
        scalings = [float(self.scaling[name]) for name in served]
        pools = AdapterPools([each.weight for each in a], [each.weight for each in b], scalings)
        # Under autocast the base layer's output has the narrower dtype, in which A computes there too.
        x = x.to(result.dtype)
        multi_lora_conv_(result, x, pools, names.plan(served), base.stride, padding, base.dilation, base.groups)
        return result, served

    def _is_served(self, name: str) -> bool:
        """Whether the adapter is here and multi_lora_conv_ takes it: none that drops elements of its input."""
        if not self._has_adapter(name) or name in self.lora_variant:
            return False
        a: Any = self.lora_A[name]
        b: Any = self.lora_B[name]
        dropout = self.lora_dropout[name]
        if type(a) not in _TORCH_CLASSES or type(b) not in _TORCH_CLASSES or b.bias is not None:
            return False
        if is_hooked(a) or is_hooked(b) or is_hooked(dropout):
            return False
        drops = type(dropout) is not nn.Identity and (type(dropout) is not nn.Dropout or dropout.training)
        fits = self.cast_input_dtype_enabled or a.weight.dtype is self.weight.dtype
        return fits and not drops and are_factors(a.weight, b.weight, self.scaling[name])

    def _base_weight(self) -> ConvBaseWeight:
        return ConvBaseWeight(self.get_base_layer(), transposed=False)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The kernel that the adapter adds to the base layer's, in B's dtype; on a CPU narrow factors multiply in f32.

        Args:
            adapter: Name of an adapter on this layer.

        Raises:
            KeyError: There is no such adapter here.
            NotImplementedError: The base layer has groups.
        """
        weight: Any = self.get_base_layer().weight
        return self._delta_matrix(adapter).view_as(weight)

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


class Conv1d(_ConvNd):
    """LoRA on `nn.Conv1d`, see `_ConvNd`."""

    variant_kind = "conv1d"
    _dim = 1
    conv_fn = staticmethod(F.conv1d)


class Conv2d(_ConvNd):
    """LoRA on `nn.Conv2d`, see `_ConvNd`."""

    variant_kind = "conv2d"
    _dim = 2
    conv_fn = staticmethod(F.conv2d)


class Conv3d(_ConvNd):
    """LoRA on `nn.Conv3d`, see `_ConvNd`."""

    variant_kind = "conv3d"
    _dim = 3
    conv_fn = staticmethod(F.conv3d)


def _empty_conv(
    base: nn.Module, in_channels: int, out_channels: int, kernel_size: tuple[int, ...], **settings: Any
) -> nn.Module:
    """A convolution of the base layer's class; undefined weights, where the class is torch's own.

    Torch's constructors would initialise the weights, which is the scheme's work.
    """
    cls: Any = type(base)
    if cls not in _TORCH_CLASSES:
        return cls(in_channels, out_channels, kernel_size, **settings)
    device = torch.empty(0).device
    return nn.utils.skip_init(cls, in_channels, out_channels, kernel_size, device=device, **settings)


@register_layer("torch.nn.Conv1d", lambda module: isinstance(module, nn.Conv1d))
def _wrap_conv1d(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Conv1d:
    return Conv1d(target, adapter_name, config=config, **kwargs)


@register_layer("torch.nn.Conv2d", lambda module: isinstance(module, nn.Conv2d))
def _wrap_conv2d(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Conv2d:
    return Conv2d(target, adapter_name, config=config, **kwargs)


@register_layer("torch.nn.Conv3d", lambda module: isinstance(module, nn.Conv3d))
def _wrap_conv3d(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> Conv3d:
    return Conv3d(target, adapter_name, config=config, **kwargs)
