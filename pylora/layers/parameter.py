"""LoRA on a parameter of a module that is no layer of its own: `target_parameters`, such as the experts of a MoE."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.autograd import forward_ad
from torch.nn.utils import parametrize

from pylora.errors import UnsupportedFeatureError
from pylora.layers.base_weight import DenseBaseWeight
from pylora.layers.delta_layer import DeltaLayer
from pylora.layers.lazy_weight import LazyWeight, Parts, as_dense

# Settings without a meaning here, and how a message goes on.
_NO_MEANING = (
    ("lora_dropout", "with lora_dropout != 0."),
    ("fan_in_fan_out", "with fan_in_fan_out."),
    ("lora_bias", "with lora_bias=True."),
    ("use_dora", "with use_dora=True."),
    ("velora_config", "when `velora_config` is set."),
    ("kasa_config", "when `kasa_config` is set."),
)


class ParamWrapper(DeltaLayer):
    """A module one of whose parameters has adapters: in its forward the parameter is W + scaling · B·A.

    The parameter is a matrix [out, in], or a stack of them with an adapter of its own each: [experts, out, in], or
    [experts, in, out] where the module says `is_transposed`. For a stack, `lora_A` has the weight
    [experts · rank, in], expert by expert, and `lora_B` [out, rank · experts], in which the expert changes fastest.
    Wrappers nest to adapt several parameters of a module.

    Where the module only indexes and multiplies the parameter, the sum is never made, see `LazyWeight`; otherwise it is
    made in one operation for all active adapters together. No delta of the parameter's size exists in either case. The
    parameter itself is not written.

    Args:
        base_layer: The module, or a wrapper of it for another parameter.
        adapter_name: The first adapter's name; it becomes the active one.
        parameter_name: The module's attribute.
        config: The adapter's LoraConfig.
        r: Its rank here, per expert.
        lora_alpha: Its alpha here.
        **kwargs: Passed to `LoraLayer` and `update_layer`.

    Raises:
        ValueError: The parameter has neither 2 nor 3 dimensions, or the config asks for dropout, a bias,
            fan_in_fan_out, DoRA or another variant.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        self.parameter_name = parameter_name  # what the base class's constructor takes the widths from
        super().__init__(base_layer, **kwargs)
        if is_target_conv_1d_layer:
            raise ValueError(f"lora.{type(self).__name__} does not work with is_target_conv_1d_layer=True.")
        self.fan_in_fan_out = config.fan_in_fan_out
        self._active_adapter = [adapter_name]
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        param = self.get_param()
        # DeepSpeed partitions a parameter and keeps its shape here.
        shape = getattr(param, "ds_shape", param.shape)
        if len(shape) not in (2, 3):
            raise ValueError(
                f"lora.{type(self).__name__} was initialized with {len(shape)} dimensional Parameter "
                f"{self.parameter_name}, but only 2d and 3d are supported."
            )
        self.num_experts = shape[0] if len(shape) == 3 else 1
        self._is_stack = len(shape) == 3
        self._is_transposed = self._is_stack and bool(getattr(module, "is_transposed", False))
        out_features, in_features = shape[-2:]
        return (out_features, in_features) if self._is_transposed else (in_features, out_features)

    def _check_adapter(self, r: int, config: Any) -> None:
        for field, problem in _NO_MEANING:
            if getattr(config, field):
                raise ValueError(f"lora.{type(self).__name__} does not work {problem}")
        if config.init_lora_weights not in (True, False, None) and str(config.init_lora_weights).lower() != "gaussian":
            raise ValueError(
                f"lora.{type(self).__name__} does not work with init_lora_weights={config.init_lora_weights!r}."
            )

    def _new_factors(self, r: int, config: Any) -> tuple[nn.Linear, nn.Linear]:
        return super()._new_factors(r * self.num_experts, config)

    def _initialise(self, lora_a: Any, lora_b: Any, scheme: Any, scaling: float, config: Any) -> None:
        super()._initialise(lora_a, lora_b, scheme, scaling, config)
        if isinstance(scheme, str) and not lora_a.weight.is_meta:
            # "gaussian" has the deviation 1/rank, and the scheme takes the rows of all experts for the rank.
            lora_a.weight.data.mul_(self.num_experts)

    def get_param(self) -> torch.Tensor:
        """The parameter, without the adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        param = self.get_param()
        return param.device, param.dtype

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        a, b = lora_a.weight, lora_b.weight
        if not self._is_stack:
            return a, b
        a = a.reshape(self.num_experts, -1, a.shape[-1])
        return a, b.reshape(b.shape[0], -1, self.num_experts).permute(2, 0, 1)

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """(lhs, rhs, scaling) such that scaling · lhs · rhs is the delta as the parameter is stored."""
        a, b = self._factors(adapter_name)
        lhs, rhs = (a.mT, b.mT) if self._is_transposed else (b, a)
        return lhs, rhs, self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """scaling · B·A for every matrix of the parameter, in its layout and dtype (B's beside a float8 one).

        Args:
            adapter_name: Name of an adapter on this layer.

        Raises:
            KeyError: There is no such adapter here.
        """
        delta = self._delta_matrix(adapter_name)
        delta = delta.mT if self._is_transposed else delta
        param = self.get_param()
        return delta.to(param.device, delta.dtype if param.dtype.itemsize == 1 else param.dtype)

    def _base_weight(self) -> DenseBaseWeight:
        base = self.get_base_layer()
        if parametrize.is_parametrized(base, self.parameter_name):
            raise UnsupportedFeatureError(
                f"merge: {self.parameter_name} of {type(base).__name__}: expected a parameter, got a parametrization"
            )
        return DenseBaseWeight(base, transposed=self._is_transposed, name=self.parameter_name)

    def _base_bias(self) -> torch.Tensor | None:
        return None

    def _check_forward_args(self, *args: Any, **kwargs: Any) -> None:
        if kwargs.get("adapter_names"):
            raise ValueError(f"lora.{type(self).__name__} does not support mixed adapter batches yet.")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module returns for these arguments, with the active adapters in its parameter.

        Raises:
            ValueError: `adapter_names` is given.
        """
        self._check_forward_args(*args, **kwargs)
        kwargs.pop("adapter_names", None)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._in_effect()
        if not names:
            return self.base_layer(*args, **kwargs)
        with self._adapted(names):
            return self.base_layer(*args, **kwargs)

    @contextmanager
    def _adapted(self, names: list[str]) -> Iterator[None]:
        """The module reads the adapted value under the parameter's name; the parameter stays registered as it is."""
        base, name = self.get_base_layer(), self.parameter_name
        if parametrize.is_parametrized(base, name):
            chain: Any = base.parametrizations[name]  # type: ignore[index]
            last = _Adapted(lambda value: as_dense(self._adapted_value(value, names)))
            chain.append(last)
            try:
                with parametrize.cached():
                    yield
            finally:
                del chain[next(i for i, link in enumerate(chain) if link is last)]
            return
        # An attribute of the instance is found before nn.Module looks among its parameters.
        outer = base.__dict__.get(name)
        object.__setattr__(base, name, self._adapted_value(base._parameters[name], names))
        try:
            yield
        finally:
            if outer is None:
                object.__delattr__(base, name)
            else:
                object.__setattr__(base, name, outer)

    def _adapted_value(self, weight: Any, names: list[str]) -> torch.Tensor:
        """W + scaling · B·A of all the adapters, as W is stored, in W's dtype."""
        narrow = weight.dtype.itemsize == 1  # float8, which has no arithmetic
        dtype = torch.float32 if narrow else weight.dtype
        left, right = [], []
        for name in names:
            lhs, rhs, scaling = self.get_delta_factors(name)
            left.append((lhs * scaling).to(dtype))
            right.append(rhs.to(dtype))
        lhs = torch.cat(left, dim=-1) if len(left) > 1 else left[0]
        rhs = torch.cat(right, dim=-2) if len(right) > 1 else right[0]
        parts = Parts(weight.to(dtype), lhs, rhs)
        if not narrow:
            return parts.dense() if _wants_plain_tensors() else LazyWeight.make(parts)
        limits = torch.finfo(weight.dtype)
        return parts.dense().clamp(limits.min, limits.max).to(weight.dtype)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The module, with the adapters of all its parameters merged if `merge`."""
        layer: Any = self
        while isinstance(layer, ParamWrapper):
            if merge:
                layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
            layer = layer.base_layer
        return layer

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition("(")
        return f"lora.{head}(\n  parameter_name={self.parameter_name!r},{rest}"


def _wants_plain_tensors() -> bool:
    """Whether torch.compile or a transform (torch.func's, forward-mode differentiation) has to see the operations."""
    return (
        torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0
    )


class _Adapted(nn.Module):
    """The last link of a chain of parametrizations while the module runs."""

    def __init__(self, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: torch.Tensor) -> torch.Tensor:
        return self.function(value)
