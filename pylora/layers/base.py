"""LoraLayer: what every LoRA layer holds, and how adapters enter and leave it.

Names and meaning of attributes and methods follow PEFT 0.21 (tuners/lora/layer.py), so that code written for it works.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from pylora.config import require_supported, scaling_for
from pylora.errors import PeftWarning
from pylora.init import BaseAccess, draws_left_out, init_adapter, is_left_out
from pylora.layers.base_weight import is_conv1d
from pylora.layers.blank import blank, empty_linear
from pylora.layers.tuner_layer import BaseTunerLayer, entry_of, params_of, set_layer_requires_grad
from pylora.layers.variants.protocol import LoraVariant
from pylora.layers.variants.registry import Variants, resolve_variant, variants_of

__all__ = ["VARIANT_KWARG_KEYS", "BaseTunerLayer", "LoraLayer"]

# Forward arguments that are for adapters and never reach the base layer.
VARIANT_KWARG_KEYS = ("alora_offsets",)
_WITHOUT_A_MODE_OF_THEIR_OWN = frozenset((nn.Linear, nn.Identity, nn.Dropout))


class LoraLayer(BaseTunerLayer):
    """Mixin of the LoRA layers. A subclass is also an `nn.Module` and calls `LoraLayer.__init__` after the module's.

    Attributes (dictionaries are keyed by adapter name):
        base_layer: The wrapped module.
        r, lora_alpha, scaling: Rank, alpha and the factor on B·A·x.
        lora_dropout: Dropout on the adapter's input, `nn.Identity` where it is 0.
        lora_A, lora_B: The factors, weights of shape [r, in_features] and [out_features, r].
        lora_embedding_A, lora_embedding_B: The factors of an embedding, [r, num_embeddings] and [embedding_dim, r].
        lora_magnitude_vector: DoRA's magnitudes.
        use_rslora, use_dora, lora_bias: The adapter's settings of these names.
        lora_variant: The variant of an adapter that is not plain LoRA, see `pylora.layers.variants`.
        merged_adapters: Adapters whose delta the base weight holds, in the order of merging.
        cast_input_dtype_enabled: Whether an input of another dtype is cast to the adapter's.
        in_features, out_features: Widths of the base layer.
    """

    adapter_layer_names: tuple[str, ...] = (
        "lora_A",
        "lora_B",
        "lora_embedding_A",
        "lora_embedding_B",
        "lora_magnitude_vector",
    )
    # Of these, the containers of A and of B in which this kind of layer keeps an adapter.
    factor_names: tuple[str, str] = ("lora_A", "lora_B")
    # The base layer's attribute that is the weight.
    weight_name: str = "weight"
    # What variants call this kind of layer; the variants that name it are the ones it has.
    variant_kind: str = ""
    other_param_names: tuple[str, ...] = (
        "r",
        "lora_alpha",
        "scaling",
        "lora_dropout",
        "use_dora",
        "use_rslora",
        "lora_bias",
        "lora_variant",
    )

    base_layer: nn.Module
    r: dict[str, int]
    lora_alpha: dict[str, float]
    scaling: dict[str, float]
    lora_dropout: nn.ModuleDict
    lora_A: nn.ModuleDict
    lora_B: nn.ModuleDict
    lora_embedding_A: nn.ParameterDict
    lora_embedding_B: nn.ParameterDict
    lora_magnitude_vector: nn.ModuleDict
    use_dora: dict[str, bool]
    use_rslora: dict[str, bool]
    lora_bias: dict[str, bool]
    lora_variant: dict[str, LoraVariant]
    in_features: Any
    out_features: Any
    ephemeral_gpu_offload: bool
    cast_input_dtype_enabled: bool
    kwargs: dict[str, Any]
    _modules: dict[str, Any]
    _caches: dict[str, Any]
    _tied_layers: dict[str, list[Any]]

    def __init__(self, base_layer: nn.Module, ephemeral_gpu_offload: bool = False, **kwargs: Any) -> None:
        # Not through `__setattr__`: torch looks at each value to see whether it is a module or a parameter, which
        # takes 3 us.
        self._modules.update(
            base_layer=base_layer,
            lora_dropout=blank(nn.ModuleDict),
            lora_A=blank(nn.ModuleDict),
            lora_B=blank(nn.ModuleDict),
            lora_embedding_A=blank(nn.ParameterDict),
            lora_embedding_B=blank(nn.ParameterDict),
            lora_magnitude_vector=blank(nn.ModuleDict),
        )
        self.__dict__.update(
            r={},
            lora_alpha={},
            scaling={},
            _disable_adapters=False,
            merged_adapters=[],
            _may_train=set(),
            use_dora={},
            use_rslora={},
            lora_bias={},
            _caches={},
            # Adapter -> the layers, this one among them, that share its factors and the weight it would be merged into.
            _tied_layers={},
            ephemeral_gpu_offload=ephemeral_gpu_offload,
            cast_input_dtype_enabled=True,
            lora_variant={},
            kwargs=kwargs,
        )
        in_features, out_features = self._get_in_out_features(self.get_base_layer())
        self.__dict__.update(in_features=in_features, out_features=out_features)

    def _get_in_out_features(self, module: nn.Module) -> tuple[Any, Any]:
        if isinstance(module, nn.Linear):
            return module.in_features, module.out_features
        if is_conv1d(module):
            in_features, out_features = module.weight.shape  # type: ignore[misc]
            return in_features, out_features
        warnings.warn(f"Unsupported layer type '{type(module)}' encountered, proceed at your own risk.", stacklevel=3)
        return getattr(module, "in_features", None), getattr(module, "out_features", None)

    @property
    def lora_variants(self) -> Variants:
        """The variants that this layer has, by the configuration's flags that ask for them, sorted."""
        return variants_of(self.variant_kind)

    def resolve_lora_variant(self, *, config: Any, **kwargs: Any) -> LoraVariant | None:
        """The variant that `config` asks for here, None for plain LoRA.

        Raises:
            ValueError: It asks for several, or for one that this layer does not have.
        """
        return resolve_variant(self.lora_variants, config)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: Any, **kwargs: Any) -> None:
        """Add an adapter, or replace the one of that name. The active adapters stay the active ones.

        Args:
            adapter_name: Name of the adapter.
            r: Its rank on this layer.
            lora_alpha: Its alpha on this layer.
            config: The adapter's LoraConfig: dropout, initialisation, rsLoRA, bias, inference_mode.
            **kwargs: For layer types and variants that need more.

        Raises:
            ValueError: `r` is not positive, the initialisation is unknown, or the config asks for something that pylora
                has no mechanism for. The layer is then as it was.
        """
        scaling = scaling_for(r, lora_alpha, config.use_rslora)
        require_supported(config)
        self._check_adapter(r, config)
        variant = self.resolve_lora_variant(config=config)
        if variant is not None:
            variant.check(self, r, config)
        if config.lora_bias and self._base_bias() is None:
            warnings.warn(
                f"`lora_bias=True` was passed but the targeted layer of type {type(self.get_base_layer()).__name__} "
                "has no bias. This means that merging LoRA weights won't be possible.",
                PeftWarning,
                stacklevel=2,
            )
        lora_a, lora_b = self._new_factors(r, config)
        if variant is not None:  # it starts from the factors
            with draws_left_out(False):
                self._initialise(lora_a, lora_b, config.init_lora_weights, scaling, config)
        elif not is_left_out(config.init_lora_weights):
            self._initialise(lora_a, lora_b, config.init_lora_weights, scaling, config)
        dropout = nn.Dropout(p=config.lora_dropout) if config.lora_dropout > 0.0 else blank(nn.Identity)

        if adapter_name in self.r:
            self._drop_variant(adapter_name)
        self.r[adapter_name] = r
        self.lora_alpha[adapter_name] = lora_alpha
        self.scaling[adapter_name] = scaling
        for attr, item in zip(("lora_dropout", *self.factor_names), (dropout, lora_a, lora_b), strict=True):
            self._modules[attr][adapter_name] = item
        self.lora_bias[adapter_name] = config.lora_bias
        self.use_rslora[adapter_name] = config.use_rslora
        self.use_dora[adapter_name] = config.use_dora
        self._move_adapter_to_device_of_base_layer(adapter_name)
        if variant is not None:
            self.lora_variant[adapter_name] = variant
            variant.init(self, adapter_name=adapter_name, config=config, **kwargs)
        self._settle_new_adapter(adapter_name, config.inference_mode)

    def _drop_variant(self, adapter_name: str) -> None:
        """Remove what a replaced adapter of that name had beside its factors."""
        self.lora_variant.pop(adapter_name, None)
        self._tied_layers.pop(adapter_name, None)
        for attr, container, _ in self._adapter_entries(adapter_name):
            if attr not in self.factor_names:
                del container[adapter_name]

    def _settle_new_adapter(self, adapter_name: str, inference_mode: bool) -> None:
        """The new adapter trains if it is active, in the layer's mode; the other adapters' flags are theirs."""
        trainable = adapter_name in self.active_adapters and not inference_mode
        if trainable and self._may_train is not None:
            self._may_train.add(adapter_name)
        training: bool = self.training  # type: ignore[attr-defined]
        items = [item for _, _, item in self._adapter_entries(adapter_name)]
        for item in items:
            set_layer_requires_grad(item, trainable)
        for item in () if training else (*items, entry_of(self._modules["lora_dropout"], adapter_name)):
            if isinstance(item, nn.Module):
                if item._modules or type(item) not in _WITHOUT_A_MODE_OF_THEIR_OWN:
                    item.eval()
                else:
                    item.__dict__["training"] = False  # what `eval` comes to, without its 4 us
        self._freeze_non_trainable_peft_weights([adapter_name])

    def _check_adapter(self, r: int, config: Any) -> None:
        """Raise ValueError when this kind of layer cannot have an adapter of this rank and configuration."""

    def _base_bias(self) -> torch.Tensor | None:
        """The base layer's bias, if it has one."""
        return getattr(self.get_base_layer(), "bias", None)

    def _new_factors(self, r: int, config: Any) -> tuple[Any, Any]:
        """New entries for the containers of A and of B, with undefined values."""
        lora_a = empty_linear(self.in_features, r, bias=False)
        lora_b = empty_linear(r, self.out_features, bias=config.lora_bias)
        return lora_a, lora_b

    def _initialise(self, lora_a: Any, lora_b: Any, scheme: Any, scaling: float, config: Any) -> None:
        """Give entries of the containers of A and of B their values; the scheme may change the base weight for it."""
        weight = getattr(self.get_base_layer(), self.weight_name, None)
        open_weight = getattr(self, "_base_weight", None)
        base = None
        if isinstance(weight, torch.Tensor) and open_weight is not None:
            base = BaseAccess(weight, open_weight)
        init_adapter(
            scheme,
            getattr(lora_a, "weight", lora_a),
            getattr(lora_b, "weight", lora_b),
            b_bias=getattr(lora_b, "bias", None),
            embedding=self.factor_names[0] == "lora_embedding_A",
            scaling=scaling,
            base=base,
            config=config,
        )

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Initialise an adapter's factors again.

        Args:
            adapter_name: The adapter; a name without factors here is ignored.
            init_lora_weights: True or "gaussian"; False leaves the factors as they are.

        Raises:
            ValueError: The scheme is another one: those may change the base weight, which has been changed already.
        """
        if init_lora_weights is False or not self._has_adapter(adapter_name):
            return
        if init_lora_weights is not True and str(init_lora_weights).lower() != "gaussian":
            raise ValueError(f"Unknown initialization {init_lora_weights=}: expected True, False or 'gaussian'")
        lora_a, lora_b = (getattr(self, name)[adapter_name] for name in self.factor_names)
        self._initialise(lora_a, lora_b, init_lora_weights, self.scaling[adapter_name], None)

    def _move_adapter_to_device_of_base_layer(self, adapter_name: str, device: torch.device | None = None) -> None:
        """Bring one adapter to the base layer's device and, if that is a floating type, its dtype. Meta stays meta."""
        base_device, dtype = self._get_base_layer_device_and_dtype(self.get_base_layer())
        device = base_device if device is None else device
        if device is None:
            return
        if dtype is not None and not (dtype.is_floating_point or dtype.is_complex):
            dtype = None
        for _, container, item in self._adapter_entries(adapter_name):
            for param in params_of(item):
                if param.is_meta:
                    container[adapter_name] = item.to(dtype=dtype)  # a load that follows keeps to this dtype
                    break
                if param.device != device or (dtype is not None and param.dtype != dtype):
                    container[adapter_name] = item.to(device=device, dtype=dtype)
                    break

    def _has_adapter(self, name: str) -> bool:
        """Whether the adapter has weights on this layer."""
        return name in getattr(self, self.factor_names[0])

    def set_scale(self, adapter: str, scale: float) -> None:
        """Make the adapter's scaling its configured one times `scale`; a name that is not on this layer is ignored."""
        if adapter in self.scaling:
            self._set_scaling(adapter, scale * self._configured_scaling(adapter))

    def scale_layer(self, scale: float) -> None:
        """Multiply the scaling of the active adapters by `scale`."""
        if scale == 1:
            return
        for name in self.active_adapters:
            if self._has_adapter(name):
                self.scaling[name] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Divide the scaling of the active adapters by `scale`; None sets it to the configured one."""
        for name in self.active_adapters:
            if not self._has_adapter(name):
                continue
            if scale is None:
                self._set_scaling(name, self._configured_scaling(name))
            else:
                self._set_scaling(name, self.scaling[name] / scale)

    def _set_scaling(self, adapter: str, value: float) -> None:
        current: Any = self.scaling[adapter]
        if isinstance(current, torch.Tensor):  # prepared for hot swap: a compiled model holds on to this tensor
            current.fill_(value)
        else:
            self.scaling[adapter] = value

    def _configured_scaling(self, adapter: str) -> float:
        return scaling_for(self.r[adapter], self.lora_alpha[adapter], self.use_rslora.get(adapter, False))

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Check `adapter_names`, one name for each row of the batch, against the input and the layer's state."""
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                "Length of `adapter_names` should be the same as the number of inputs, but got "
                f"{len(adapter_names)} and {len(x)} respectively."
            )
        if self.merged:
            raise ValueError(
                "Cannot pass `adapter_names` when there are merged adapters, please call `unmerge_adapter` first."
            )
