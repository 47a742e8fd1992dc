"""DoRA: direction and magnitude of each weight row trained apart (https://arxiv.org/abs/2402.09353).

y = m / ‖W + s·B·A‖ · (W + s·B·A)·x, the norm of each row taken as a constant (section 4.3 of the paper), m starting as
the norm. Numerics, state-dict keys and shapes are PEFT 0.21's (tuners/lora/dora.py and variants.py). Norms and a dense
layer's whole forward are computed by `pylora.ops.dora`; when norms are computed anew is up to `dora_cache`.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from pylora.errors import UnsupportedFeatureError
from pylora.layers.merging import Delta, RowScale
from pylora.layers.served import PLAIN_TENSORS, is_hooked
from pylora.layers.variants.dora_cache import writes_and_trust
from pylora.layers.variants.dora_norm import row_norms
from pylora.layers.variants.protocol import LoraVariant
from pylora.layers.variants.registry import register_variant
from pylora.ops import KeptNorms, dora_linear, dora_linear_norms, dora_row_squares, draw_rng, register_dora

_NUMBERS = (float, int)


class DoraLinearLayer(nn.Module):
    """The magnitudes of one adapter on one layer, in `layer.lora_magnitude_vector[adapter_name]`.

    Args:
        weight: Their first values, the row norms, in the shape they are saved in.

    Attributes:
        weight: The magnitudes.
    """

    def __init__(self, weight: torch.Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        # One or two numbers a row, and no reference to the weights. A copy's is empty.
        self._kept_norms = KeptNorms()

    def forward(self, norm: torch.Tensor) -> torch.Tensor:
        """The factor on each row, magnitude / norm, in the magnitudes' shape; the magnitude where the norm is 0."""
        norm = norm.to(self.weight.dtype).view_as(self.weight)
        return self.weight / torch.where(norm == 0, 1, norm)

    def __repr__(self) -> str:
        return "lora.dora." + super().__repr__()


class DoraEmbeddingLayer(DoraLinearLayer):
    """The magnitudes of an adapter on an embedding, see `DoraLinearLayer`."""


class _DoraConvNdLayer(DoraLinearLayer):
    """The magnitudes of an adapter on a convolution, of shape [1, out_channels, 1...], see `DoraLinearLayer`."""


class DoraConv1dLayer(_DoraConvNdLayer):
    """As `_DoraConvNdLayer`."""


class DoraConv2dLayer(_DoraConvNdLayer):
    """As `_DoraConvNdLayer`."""


class DoraConv3dLayer(_DoraConvNdLayer):
    """As `_DoraConvNdLayer`."""


class _Dora(LoraVariant):
    """What DoRA is on every kind of layer. A subclass knows where the factors are and how the layer computes."""

    layer_cls: type[DoraLinearLayer] = DoraLinearLayer

    @staticmethod
    def _factors(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B as parameters."""
        return module.lora_A[name].weight, module.lora_B[name].weight

    @classmethod
    def _row_norms(cls, module: Any, name: str, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
        """The norms of the rows of `weight`, [out, in], with the adapter's delta, computed on `device`: [out], f64."""
        a, b = cls._factors(module, name)
        return row_norms(weight.to(device), a.detach().to(device), b.detach().to(device), module.scaling[name])

    @classmethod
    def _factor(cls, module: Any, name: str) -> torch.Tensor:
        """magnitude / norm for each row, [out], differentiable by the magnitude."""
        magnitude = module.lora_magnitude_vector[name]
        return cls._row_factor(magnitude, cls._kept_row_norms(module, name, magnitude._kept_norms)).flatten()

    @staticmethod
    def _row_factor(magnitudes: Any, norm: torch.Tensor) -> torch.Tensor:
        """magnitude / norm, in the magnitudes' shape."""
        return magnitudes(norm)

    @classmethod
    def _kept_row_norms(cls, module: Any, name: str, kept: KeptNorms) -> torch.Tensor:
        """The row norms, from an earlier call where nothing that they depend on has changed since."""
        weight: torch.Tensor = module.get_base_layer().weight
        scaling = module.scaling[name]
        matrix = module._base_weight().as_matrix(weight.detach())
        if torch.compiler.is_compiling() or type(scaling) not in _NUMBERS:
            return cls._row_norms(module, name, matrix, matrix.device)
        a, b = cls._factors(module, name)
        writes, trust = writes_and_trust()
        norms = kept.find(weight, a, b, scaling, writes, trust)
        if norms is None:
            norms = cls._row_norms(module, name, matrix, matrix.device)
            kept.keep(weight, a, b, scaling, writes, trust, norms)
        return norms

    @staticmethod
    def check(module: Any, r: int, config: Any) -> None:
        weight = module.get_base_layer().weight
        # A weight without data is fine: so are magnitudes, until both are loaded.
        if weight.is_meta:
            return
        try:
            module._base_weight()
        except UnsupportedFeatureError as error:
            raise UnsupportedFeatureError(f"use_dora: {error}") from error

    @classmethod
    def init(cls, module: Any, adapter_name: str, config: Any, **kwargs: Any) -> None:
        """Magnitudes are the norms of the rows at first, in the base weight's dtype, so that nothing is changed yet."""
        weight: torch.Tensor = module.get_base_layer().weight
        a, _ = cls._factors(module, adapter_name)
        if weight.is_meta or a.is_meta:
            norms = torch.empty(module.out_features, device="meta")
        else:
            device = _working_device(weight.device, module.ephemeral_gpu_offload)
            norms = cls._row_norms(module, adapter_name, module._unmerged().weight, device).to(weight.device)
        shape = (1, -1, *(1 for _ in weight.shape[2:])) if weight.ndim > 2 else (-1,)
        module.lora_magnitude_vector[adapter_name] = cls.layer_cls(norms.to(weight.dtype).view(shape))

    @staticmethod
    def require_mergeable(module: Any, active_adapter: str, safe_merge: bool) -> None:
        module._factors(active_adapter)

    @classmethod
    def delta(cls, module: Any, active_adapter: str) -> Delta:
        unmerged = module._unmerged()
        norm = cls._row_norms(module, active_adapter, unmerged.weight, unmerged.weight.device)
        factor = cls._row_factor(module.lora_magnitude_vector[active_adapter], norm).detach().flatten()
        # The forward does not scale the base bias, but it does scale the bias of an adapter that came before.
        has_biases = unmerged.bias is not None and any(module.lora_bias.values())
        kept_bias = unmerged.bias.detach().clone() if has_biases else None
        lost = ((factor == 0) | ~factor.isfinite()).nonzero().flatten()
        row_scale = RowScale(factor, kept_bias, lost, unmerged.weight[lost])
        return module._plain_delta(active_adapter)._replace(row_scale=row_scale)


def _working_device(device: torch.device, offload: bool) -> torch.device:
    """Where to compute the first norms: with `ephemeral_gpu_offload` on the accelerator, if there is one."""
    if offload and device.type == "cpu" and torch.accelerator.is_available():
        return torch.accelerator.current_accelerator() or device
    return device


class _DoraOnModules(_Dora):
    """DoRA where the factors are modules to call: linear layers and convolutions."""

    @staticmethod
    def _base_without_bias(module: Any, x: torch.Tensor) -> torch.Tensor:
        """The base layer on x, in x's dtype, without its bias."""
        raise NotImplementedError

    @staticmethod
    def _along_output(vector: torch.Tensor, base_layer: Any) -> torch.Tensor:
        """A value for each output feature, shaped to be multiplied with the output."""
        return vector

    @classmethod
    def forward(
        cls, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        """As `LoraVariant.forward`. Without dropout the running result stands in for the base layer's output."""
        lora_a, lora_b = module.lora_A[active_adapter], module.lora_B[active_adapter]
        dropout = module.lora_dropout[active_adapter]
        base_layer = module.get_base_layer()
        x = module._cast_input_dtype(x, lora_a.weight.dtype)
        if isinstance(dropout, nn.Identity) or not module.training:
            bias = base_layer.bias
            base_result = result if bias is None else result - cls._along_output(bias, base_layer)
        else:
            x = dropout(x)
            base_result = cls._base_without_bias(module, x)
        factor = cls._along_output(cls._factor(module, active_adapter), base_layer)
        return result + ((factor - 1) * base_result + factor * lora_b(lora_a(x)) * module.scaling[active_adapter])


@register_variant("use_dora", "linear")
class DoraLinearVariant(_DoraOnModules):
    """DoRA on a dense layer."""

    @staticmethod
    def _base_without_bias(module: Any, x: torch.Tensor) -> torch.Tensor:
        weight = module.get_base_layer().weight
        return F.linear(x, module._base_weight().as_matrix(weight).to(x.dtype))

    @classmethod
    def fused_forward(
        cls,
        module: Any,
        active_adapter: str,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        scaling: float,
        dropout_p: float,
    ) -> torch.Tensor | None:
        magnitudes = module._modules["lora_magnitude_vector"]._modules[active_adapter]
        parameters = magnitudes._parameters
        magnitude = parameters.get("weight")
        if type(magnitudes) is not cls.layer_cls or type(magnitude) not in PLAIN_TENSORS or is_hooked(magnitudes):
            return None
        rng = draw_rng(x.device) if dropout_p > 0.0 else None
        if torch.compiler.is_compiling():
            return dora_linear_norms(x, weight, bias, a, b, magnitude, None, scaling, dropout_p, rng)[0]
        kept = magnitudes._kept_norms
        writes, trust = writes_and_trust()
        norms = kept.find(weight, a, b, scaling, writes, trust)
        if norms is not None:  # `register_dora` spares eager calls the way here
            return dora_linear(x, weight, bias, a, b, magnitude, norms, scaling, dropout_p, rng)
        squares = kept.find_squares(weight, writes, trust)
        if squares is None:
            squares = dora_row_squares(weight)
            kept.keep_squares(weight, writes, trust, squares)
        y, norms = dora_linear_norms(x, weight, bias, a, b, magnitude, squares, scaling, dropout_p, rng)
        kept.keep(weight, a, b, scaling, writes, trust, norms)
        return y


register_dora(DoraLinearVariant, DoraLinearLayer, writes_and_trust)


class _DoraConvNdVariant(_DoraOnModules):
    """DoRA on a convolution: each output channel's kernel is a row."""

    layer_cls = _DoraConvNdLayer

    @classmethod
    def _row_norms(cls, module: Any, name: str, weight: torch.Tensor, device: torch.device) -> torch.Tensor:
        """As the superclass; with groups as PEFT, whose files hold magnitudes that were trained against these norms.

        PEFT multiplies B, seen as [out / groups, rank], with A [rank, in · kernel] and lays the product out as the base
        weight [out, in / groups · kernel]: row o of it is part o % groups of the product's row o // groups.
        """
        lora_a, lora_b = cls._factors(module, name)
        groups = module.get_base_layer().groups
        a = lora_a.detach().flatten(1).to(device)
        b = lora_b.detach().reshape(-1, a.shape[0]).to(device)
        weight = weight.to(device)
        norms = weight.new_empty(weight.shape[0], dtype=torch.float64)
        for part, columns in enumerate(a.chunk(groups, dim=1)):
            norms[part::groups] = row_norms(weight[part::groups], columns, b, module.scaling[name])
        return norms

    @staticmethod
    def _base_without_bias(module: Any, x: torch.Tensor) -> torch.Tensor:
        base_layer = module.get_base_layer()
        return base_layer._conv_forward(x, base_layer.weight.to(x.dtype), None)

    @staticmethod
    def _along_output(vector: torch.Tensor, base_layer: Any) -> torch.Tensor:
        return vector.view(-1, *(1 for _ in base_layer.kernel_size))


@register_variant("use_dora", "conv1d")
class DoraConv1dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv1d`."""

    layer_cls = DoraConv1dLayer


@register_variant("use_dora", "conv2d")
class DoraConv2dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv2d`."""

    layer_cls = DoraConv2dLayer


@register_variant("use_dora", "conv3d")
class DoraConv3dVariant(_DoraConvNdVariant):
    """DoRA on `nn.Conv3d`."""

    layer_cls = DoraConv3dLayer


@register_variant("use_dora", "embedding")
class DoraEmbeddingVariant(_Dora):
    """DoRA on an embedding: a row of the weight is an embedding dimension, over all embeddings."""

    layer_cls = DoraEmbeddingLayer

    @staticmethod
    def _factors(module: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
        return module.lora_embedding_A[name], module.lora_embedding_B[name]

    @classmethod
    def forward(
        cls, module: Any, active_adapter: str, x: torch.Tensor, result: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        return cls._factor(module, active_adapter) * (result + module._adapter_output(active_adapter, x))
