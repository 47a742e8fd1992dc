"""LoRA on a dense layer: `nn.Linear`, and transformers' Conv1D, which keeps its weight transposed."""

from __future__ import annotations

import warnings
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.modules import module as torch_module

from pylora.layers.base_weight import DenseBaseWeight, conv1d_class, is_conv1d
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.registry import register_layer
from pylora.ops import lora_add, lora_linear

# Dtypes the op computes in; a base weight of another one (quantised) goes through its module.
_OP_DTYPES = frozenset((torch.float32, torch.bfloat16, torch.float16, torch.float64))
_PLAIN_TENSORS = (nn.Parameter, torch.Tensor)


class _Term(NamedTuple):
    """One adapter as the op takes it."""

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    dropout_p: float


def _is_hooked(module: nn.Module) -> bool:
    """Whether calling `module` does more than its class's forward (hooks, or a forward set on the instance)."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _calls_are_observed() -> bool:
    """Whether torch has to see the single calls: global module hooks, and the transforms that the op has no rule for
    (torch.func's, forward-mode differentiation).
    """
    return (
        torch_module._has_any_global_hook()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _autocast_matches(x_dtype: torch.dtype, weight_dtype: torch.dtype) -> bool:
    """Whether autocast brings the two to one dtype; it leaves f64 alone."""
    return torch.is_autocast_enabled("cpu") and torch.float64 not in (x_dtype, weight_dtype)


def _plain_weight(module: nn.Module) -> torch.Tensor | None:
    """The weight of an unhooked module without a bias, else None: what can be computed without calling the module."""
    params = module._parameters
    weight = params.get("weight")
    if type(module) is not nn.Linear or weight is None or params.get("bias") is not None:
        return None
    return None if type(weight) not in _PLAIN_TENSORS or _is_hooked(module) else weight


def _take_in(scaling: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """A, B and a number for a scaling that is a tensor: its value, or 1 with B scaled where reading it would break a
    compiled graph or wait for a device.
    """
    if scaling.is_cpu and not torch.compiler.is_compiling():
        return a, b, scaling.item()
    wide = torch.promote_types(b.dtype, torch.float32)
    return a.to(wide), b.to(wide) * scaling, 1.0


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
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self.is_target_conv_1d_layer = is_target_conv_1d_layer

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The base layer's output with the active adapters' added.

        Args:
            x: Input, [..., in_features].
            *args: For the base layer.
            **kwargs: For the base layer, except `adapter_names`: one adapter name, or "__base__", for each row of x.

        Raises:
            ValueError: `adapter_names` has another length than x, names a DoRA adapter, or the layer is merged.
        """
        if not args and not kwargs and not self._disable_adapters and not self.merged_adapters:
            result = self._fused_forward(x)
            if result is not None:
                return result
        return super().forward(x, *args, **kwargs)

    def _fused_forward(self, x: torch.Tensor) -> torch.Tensor | None:
        """The forward in one op (and one more for each further adapter), or None where a module has to be called."""
        modules: dict[str, Any] = self._modules
        base = modules["base_layer"]
        transposed = type(base) is not nn.Linear
        if (transposed and type(base) is not conv1d_class()) or _is_hooked(base):
            return None
        weight = base._parameters.get("weight")
        if type(weight) not in _PLAIN_TENSORS or weight.dtype not in _OP_DTYPES or type(x) not in _PLAIN_TENSORS:
            return None
        # Inputs that do not fit go to the modules too: torch's error is the one that callers know.
        if not x.is_cpu or x.is_nested or x.shape[-1:] != (self.in_features,) or _calls_are_observed():
            return None
        if x.dtype is not weight.dtype and not _autocast_matches(x.dtype, weight.dtype):
            return None

        a_modules = modules["lora_A"]._modules
        active = self._active_adapter
        terms = []
        for name in (active,) if type(active) is str else active:
            if name in a_modules:
                term = self._term(name, weight.dtype)
                if term is None:
                    return None
                terms.append(term)
        if not terms:
            return None
        a, b, scaling, p = terms[0]
        result = lora_linear(x, weight.t() if transposed else weight, base._parameters.get("bias"), a, b, scaling, p)
        for a, b, scaling, p in terms[1:]:
            result = lora_add(result, x, a, b, scaling, p)
        return result

    def _term(self, name: str, base_dtype: torch.dtype) -> _Term | None:
        """The adapter as the op takes it, or None where one of its modules is replaced or hooked."""
        modules: dict[str, Any] = self._modules
        a = _plain_weight(modules["lora_A"]._modules[name])
        b = _plain_weight(modules["lora_B"]._modules[name])
        if a is None or b is None or a.dtype is not b.dtype or name in self.lora_variant:
            return None
        if a.dtype is not base_dtype and (a.dtype is not torch.float32 or not self.cast_input_dtype_enabled):
            return None
        scaling: Any = self.scaling[name]
        if type(scaling) is torch.Tensor and not scaling.requires_grad:
            a, b, scaling = _take_in(scaling, a, b)
        elif type(scaling) is not float and type(scaling) is not int:
            return None
        dropout = modules["lora_dropout"]._modules[name]
        if type(dropout) is nn.Identity:
            p = 0.0
        elif type(dropout) is nn.Dropout and not dropout.inplace:
            p = dropout.p if dropout.training else 0.0
        else:
            return None
        return None if p >= 1.0 or _is_hooked(dropout) else _Term(a, b, scaling, p)

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
