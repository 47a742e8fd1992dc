"""LoRA on `nn.MultiheadAttention`: on the packed input projection and on the output projection, always both."""

from __future__ import annotations

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call
from torch.nn.modules import module as torch_module

from pylora.init import changes_base_weight
from pylora.layers.base import LoraLayer
from pylora.layers.base_weight import DenseBaseWeight
from pylora.layers.delta_layer import AdaptedWeight, DeltaLayer
from pylora.layers.linear import Linear
from pylora.layers.merging import Delta
from pylora.layers.registry import register_layer
from pylora.layers.served import is_hooked

# PEFT adds the output projection's delta twice, in its forward and when it merges. Adapters trained with it rely on
# that, so that loading them must mean the same here.
_OUT_PROJ_TIMES = 2


class _OutProjection(Linear):
    """The adapters of `out_proj`. Their delta counts `_OUT_PROJ_TIMES` times; the attention never calls this module."""

    def _plain_delta(self, name: str) -> Delta:
        delta = super()._plain_delta(name)
        return delta._replace(scaling=_OUT_PROJ_TIMES * delta.scaling)

    def _initialise(self, lora_a: Any, lora_b: Any, scheme: Any, scaling: float, config: Any) -> None:
        super()._initialise(lora_a, lora_b, scheme, _OUT_PROJ_TIMES * scaling, config)

    def _get_name(self) -> str:
        return "Linear"


def _of_base_layer(name: str) -> Any:
    return property(lambda layer: getattr(layer.get_base_layer(), name), doc=f"The base layer's `{name}`.")


class MultiheadAttention(DeltaLayer):
    """A multi-head attention with adapters, computed from W + scaling · B·A for both of its projections.

    `lora_A` and `lora_B` of this layer belong to `in_proj_weight`, [3 · embed_dim, embed_dim], those of
    `base_layer.out_proj`, a LoRA layer of its own, to the output projection. The base weights are not written in a
    forward. `lora_dropout` has nothing to act on: the deltas are not applied to an input.

    Args:
        base_layer: The attention to wrap, with query, key and value of one width.
        adapter_name: The first adapter's name; it becomes the active one.
        config: Its LoraConfig.
        r: Its rank here.
        lora_alpha: Its alpha here.
        **kwargs: Passed to `LoraLayer` and `update_layer`.

    Raises:
        ValueError: `kdim` or `vdim` differs from `embed_dim`, the config asks for a variant (DoRA, ...), or what
            `update_layer` refuses.
        TypeError: `out_proj` is not an `nn.Linear`.

    Shapes and dtypes: as the base layer's; both results in the dtype of the query.
    """

    weight_name = "in_proj_weight"

    # Code around an attention reads these of it.
    embed_dim = _of_base_layer("embed_dim")
    kdim = _of_base_layer("kdim")
    vdim = _of_base_layer("vdim")
    _qkv_same_embed_dim = _of_base_layer("_qkv_same_embed_dim")
    num_heads = _of_base_layer("num_heads")
    head_dim = _of_base_layer("head_dim")
    dropout = _of_base_layer("dropout")
    batch_first = _of_base_layer("batch_first")
    in_proj_bias = _of_base_layer("in_proj_bias")
    bias_k = _of_base_layer("bias_k")
    bias_v = _of_base_layer("bias_v")
    add_zero_attn = _of_base_layer("add_zero_attn")
    merge_masks = _of_base_layer("merge_masks")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: Any,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        base: Any = base_layer
        _check_variants(type(self).__name__, config)
        super().__init__(base_layer, **kwargs)
        if not isinstance(base.out_proj, nn.Linear):
            raise TypeError(f"out_proj must be an instance of nn.Linear for {type(self).__name__}.")
        first = copy.copy(config)
        if changes_base_weight(config.init_lora_weights):
            first.init_lora_weights = False
        out_proj = _OutProjection(base.out_proj, adapter_name, config=first, r=r, lora_alpha=lora_alpha, **kwargs)
        self._active_adapter = [adapter_name]
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        # Again, for the same seed to give PEFT's factors; and on the base layer last, when nothing can fail any more.
        out_proj.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        base.out_proj = out_proj

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        base: Any = module
        if not getattr(base, "_qkv_same_embed_dim", True):
            raise ValueError(f"Only same embed for query/key/value is supported as of now for {type(self).__name__}.")
        return base.embed_dim, 3 * base.embed_dim

    @property
    def in_proj_weight(self) -> torch.Tensor:
        """The base layer's input projection; an `AdaptedWeight` while adapters add to it."""
        base: Any = self.get_base_layer()
        weight = base.in_proj_weight
        return weight.as_subclass(AdaptedWeight) if self._in_effect() else weight

    @property
    def out_proj(self) -> nn.Module:
        """The base layer's output projection, without its adapters."""
        return self._out_proj_layer().get_base_layer()

    def _out_proj_layer(self) -> LoraLayer:
        base: Any = self.get_base_layer()
        return base.out_proj

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        _check_variants(type(self).__name__, config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        self._out_proj_layer().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def _check_adapter(self, r: int, config: Any) -> None:
        if config.lora_bias and self._base_bias() is None:
            raise ValueError("lora_bias=True is not supported for an attention without bias.")

    def _factors(self, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        lora_a: Any = self.lora_A[name]
        lora_b: Any = self.lora_B[name]
        return lora_a.weight, lora_b.weight

    def _base_weight(self) -> DenseBaseWeight:
        return DenseBaseWeight(self.get_base_layer(), transposed=False, name=self.weight_name)

    def _base_bias(self) -> torch.Tensor | None:
        base: Any = self.get_base_layer()
        return base.in_proj_bias

    def _get_base_layer_device_and_dtype(self, base_layer: nn.Module) -> tuple[torch.device | None, torch.dtype | None]:
        weight: Any = base_layer.in_proj_weight
        return weight.device, weight.dtype

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """scaling · B·A for the input projection, in B's dtype; on a CPU narrow factors are multiplied in f32.

        Args:
            adapter: Name of an adapter on this layer.

        Raises:
            KeyError: There is no such adapter here.
        """
        return self._delta_matrix(adapter)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters' deltas to both projections, see `DeltaLayer.merge`; both or neither is changed."""
        self.check_merge(safe_merge, adapter_names)
        super().merge(safe_merge, adapter_names)
        out_proj = self._out_proj_layer()
        missing = [name for name in self.merged_adapters if name not in out_proj.merged_adapters]
        if missing:
            out_proj.merge(safe_merge, missing)

    def check_merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        super().check_merge(safe_merge, adapter_names)
        out_proj: Any = self._out_proj_layer()
        out_proj.check_merge(safe_merge, adapter_names)

    def unmerge(self) -> None:
        super().unmerge()
        out_proj = self._out_proj_layer()
        if out_proj.merged:
            out_proj.unmerge()

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The base layer in its original structure, with the adapters merged into it if `merge`."""
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        base: Any = self.get_base_layer()
        base.out_proj = self.out_proj
        return base

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        if "adapter_names" in kwargs:
            raise TypeError(f"lora.{type(self).__name__} does not support mixed adapter batches.")
        super()._check_forward_args(x, *args, **kwargs)

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The attention's output and weights, see `nn.MultiheadAttention.forward` for the arguments.

        Raises:
            TypeError: `adapter_names` is given.
            ValueError: Other adapters are active or merged in the output projection than here.
        """
        dtype = query.dtype
        self._check_forward_args(query, *args, **kwargs)
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = self._in_effect()
        if names:
            output, weights = self._adapted_forward(names, query, *args, **kwargs)
        else:
            output, weights = self.base_layer(query, *args, **kwargs)
        return output.to(dtype), None if weights is None else weights.to(dtype)

    def _adapted_forward(self, names: list[str], query: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        base: Any = self.get_base_layer()
        out_proj = base.out_proj
        if out_proj.merged or out_proj.active_adapters != self.active_adapters:
            raise ValueError(
                f"The out_proj layer of {type(base).__name__} has other active or merged adapters than "
                f"{type(base).__name__} itself; please ensure that both have the same"
            )
        w_in, bias_in = _effective(self, names, base.in_proj_weight, base.in_proj_bias)
        dense = out_proj.get_base_layer()
        w_out, bias_out = _effective(out_proj, names, dense.weight, dense.bias, times=_OUT_PROJ_TIMES)
        if type(base) is nn.MultiheadAttention and not query.is_nested and not _is_observed(base):
            return _attention(base, w_in, bias_in, w_out, bias_out, query, *args, **kwargs)
        replaced = {
            "in_proj_weight": w_in,
            "in_proj_bias": bias_in,
            "out_proj.base_layer.weight": w_out,
            "out_proj.base_layer.bias": bias_out,
        }
        return functional_call(base, {k: v for k, v in replaced.items() if v is not None}, (query, *args), kwargs)

    def _restore_weights(self) -> None:
        """Nothing: the base weights are registered parameters at all times. PEFT's layer takes them out."""

    def __repr__(self) -> str:
        return "lora." + super().__repr__()


def _check_variants(layer_name: str, config: Any) -> None:
    if config.use_dora:
        raise ValueError(f"{layer_name} does not support DoRA (yet), please set use_dora to False")
    if config.velora_config is not None:
        raise ValueError(f"{layer_name} does not support VeLoRA, please set `velora_config=None`.")
    if config.kasa_config is not None:
        raise ValueError(f"{layer_name} does not support KaSA, please set `kasa_config=None`.")
    if config.alora_invocation_tokens:
        raise ValueError(f"{layer_name} does not support aLoRA (yet), please unset alora_invocation_tokens")


def _is_observed(module: nn.Module) -> bool:
    """Whether hooks have to see a call of `module`."""
    return is_hooked(module) or torch_module._has_any_global_hook()


def _effective(
    layer: DeltaLayer, names: list[str], weight: torch.Tensor, bias: torch.Tensor | None, times: int = 1
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """W + times · scaling · B·A of each adapter, and the bias with theirs; summed in f32 or wider, rounded once."""
    dtype = torch.promote_types(weight.dtype, torch.float32)
    total = weight.to(dtype)
    total_bias = bias
    # Autocast would narrow the sum.
    with torch.autocast(weight.device.type, enabled=False):
        for name in names:
            a, b = layer._factors(name)
            scaling = layer.scaling[name]
            total = torch.addmm(total, b.to(dtype) * (times * scaling), a.to(dtype))
            if layer.lora_bias[name] and total_bias is not None:
                lora_b: Any = layer.lora_B[name]
                total_bias = total_bias + lora_b.bias * scaling
    return total.to(weight.dtype), None if bias is None or total_bias is None else total_bias.to(bias.dtype)


def _attention(
    base: Any,
    w_in: torch.Tensor,
    bias_in: torch.Tensor | None,
    w_out: torch.Tensor,
    bias_out: torch.Tensor | None,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_padding_mask: torch.Tensor | None = None,
    need_weights: bool = True,
    attn_mask: torch.Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """`nn.MultiheadAttention.forward` of `base` with other weights; the arguments from `query` on are its."""
    swap = base.batch_first and query.dim() == 3
    if swap:
        # The same object stays the same: torch projects self-attention's three inputs at once.
        inputs = {id(x): x.transpose(0, 1) for x in (query, key, value)}
        query, key, value = (inputs[id(x)] for x in (query, key, value))
    output, weights = F.multi_head_attention_forward(
        query,
        key,
        value,
        base.embed_dim,
        base.num_heads,
        w_in,
        bias_in,
        base.bias_k,
        base.bias_v,
        base.add_zero_attn,
        base.dropout,
        w_out,
        bias_out,
        training=base.training,
        key_padding_mask=key_padding_mask,
        need_weights=need_weights,
        attn_mask=attn_mask,
        average_attn_weights=average_attn_weights,
        is_causal=is_causal,
    )
    return output.transpose(0, 1) if swap else output, weights


@register_layer("torch.nn.MultiheadAttention", lambda module: isinstance(module, nn.MultiheadAttention))
def _wrap_attention(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> MultiheadAttention:
    return MultiheadAttention(target, adapter_name, config=config, **kwargs)
