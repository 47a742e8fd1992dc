"""Hot swap: other weights and scalings for an adapter that is in place, without a change that a compiled model sees.

Everything is checked before the first tensor is written.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from pylora.checkpoint.files import StrPath, split_hub_arguments
from pylora.checkpoint.keys import MODEL_PREFIX, to_checkpoint_key
from pylora.checkpoint.read import load_peft_weights
from pylora.checkpoint.structure import adapter_roots, adapter_sites, join, place_of, tensor_paths
from pylora.config import PeftConfig, pattern_value, scaling_for
from pylora.layers import LoraLayer, tuner_layers

# Settings that are in the running model and not among the tensors, so that both adapters must agree on them.
_MUST_AGREE = ("use_rslora", "lora_dropout", "alpha_pattern", "use_dora")
# The dimension that the rank is, by the container that the factor is in.
_RANK_DIM = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}


@dataclass(frozen=True)
class _Slot:
    """A tensor of the adapter in the model.

    Attributes:
        layer_name, layer: The LoRA layer it is on.
        container: The layer's attribute that it is kept in.
        owner, leaf: The module that holds it, and its name there.
    """

    layer_name: str
    layer: LoraLayer
    container: str
    owner: nn.Module
    leaf: str

    @property
    def param(self) -> torch.Tensor:
        return self.owner._parameters[self.leaf]  # type: ignore[return-value]

    @property
    def rank_dim(self) -> int | None:
        """The dimension of the rank, None for a tensor without one (biases, magnitudes, stacks of experts)."""
        if self.param.ndim < 2 or getattr(self.layer, "num_experts", 1) > 1:
            return None
        return _RANK_DIM.get(self.container)

    @property
    def groups(self) -> int:
        """Groups of a convolution's channels: each has its own part of the rank."""
        return getattr(self.layer.get_base_layer(), "groups", 1)

    def resized(self, value: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """`value` with zeros behind each group's part of the rank, so that it has this shape."""
        padded = value.new_zeros(shape)
        if self.rank_dim == 0:
            blocks = (self.groups, -1, *shape[1:])
            padded.view(blocks)[:, : value.shape[0] // self.groups] = value.reshape(blocks)
        else:
            padded[:, : value.shape[1]] = value
        return padded

    def differs_in_rank_only(self, shape: torch.Size) -> bool:
        dim, own = self.rank_dim, self.param.shape
        return dim is not None and len(own) == len(shape) and _without(own, dim) == _without(shape, dim)


def hotswap_adapter(
    model: nn.Module, model_name_or_path: StrPath, adapter_name: str, torch_device: str | None = None, **kwargs: Any
) -> None:
    """Replace the weights of a loaded adapter by those of a saved one; name and modules stay.

    A compiled model is not compiled again where ranks and scalings agree, or where it was prepared with
    `prepare_model_for_compiled_hotswap`.

    Args:
        model: The model with the adapter, compiled or not.
        model_name_or_path: Folder or repository of the adapter to put in.
        adapter_name: The loaded adapter to replace.
        torch_device: Where to read the tensors to; by default the CPU, from where they go to each layer's device.
        **kwargs: `subfolder`, `revision`, `token` and what else `load_peft_weights` takes.

    Raises:
        ValueError: The adapters' configurations do not agree, the adapter is merged, or a tensor's shape differs in
            more than the rank.
        RuntimeError: The saved adapter has modules that the loaded one has not.
        The model is then as it was.
    """
    key_mapping = kwargs.pop("key_mapping", None)
    hub, _ = split_hub_arguments(kwargs)
    configs: dict[str, PeftConfig] = model.peft_config  # type: ignore[assignment]
    current = configs[adapter_name] if adapter_name in configs else next(iter(configs.values()))
    found_type = PeftConfig._get_peft_type(model_name_or_path, **hub)
    _check_types(_type_name(current.peft_type), found_type)
    config = PeftConfig.from_pretrained(model_name_or_path, **hub)
    check_hotswap_configs_compatible(current, config)
    tensors = load_peft_weights(model_name_or_path, device=torch_device, key_mapping=key_mapping, **hub)
    known = {to_checkpoint_key(key, adapter_name): key for key in _slots(model, adapter_name)}
    renamed = {}
    for key, tensor in tensors.items():
        model_key = known.get(key) or known.get(key.removeprefix(MODEL_PREFIX))
        renamed[model_key or _with_adapter_name(key, adapter_name)] = tensor
    hotswap_adapter_from_state_dict(model, renamed, adapter_name, config)


def hotswap_adapter_from_state_dict(
    model: nn.Module,
    state_dict: Mapping[str, torch.Tensor],
    adapter_name: str,
    config: Any,
    parameter_prefix: str = "lora_",
) -> None:
    """Replace the weights of a loaded adapter, see `hotswap_adapter`; that the configurations agree is not checked.

    A tensor of smaller rank is filled up with zeros; one of larger rank takes the old one's place, which a compiled
    model notices. Tensors that `state_dict` lacks become zero.

    Args:
        model: The model with the adapter, compiled or not.
        state_dict: The tensors under the model's keys, adapter name included.
        adapter_name: The adapter to replace.
        config: The new adapter's LoraConfig, for its ranks and alphas.
        parameter_prefix: Kept for callers of PEFT's function; the adapter's tensors are found by where they are.

    Raises:
        ValueError: The adapter is merged, or a tensor's shape differs in more than the rank.
        RuntimeError: A key has no place in the model. The model is then as it was.
    """
    slots = _slots(model, adapter_name)
    if any(adapter_name in layer.merged_adapters for layer in tuner_layers(model)):
        raise ValueError(
            f"Cannot hot-swap adapter '{adapter_name}' because it is currently merged into the base weights: "
            "unmerge_adapter() could not take the old values out any more. Unmerge it first."
        )
    tensors = {key.removeprefix("_orig_mod."): value for key, value in state_dict.items()}
    unexpected = [key for key in tensors if key not in slots]
    if unexpected:
        raise RuntimeError(f"Hot swapping the adapter did not succeed, unexpected keys found: {', '.join(unexpected)}.")
    values = {key: _checked_value(key, slots[key], value) for key, value in tensors.items()}
    scalings = {slots[key].layer: _scaling_on(slots[key].layer_name, config) for key in tensors}

    with torch.no_grad():
        for layer, (rank, alpha, scaling) in scalings.items():
            layer.r[adapter_name], layer.lora_alpha[adapter_name] = rank, alpha
            layer._set_scaling(adapter_name, scaling)
        for key, slot in slots.items():
            if key not in values:
                slot.param.zero_()
            elif values[key].shape == slot.param.shape:
                slot.param.copy_(values[key])
            else:
                slot.param.data = values[key].to(slot.param, copy=True)
                _note_sizes(slot.owner)


def prepare_model_for_compiled_hotswap(
    model: nn.Module,
    *,
    target_rank: int | None = None,
    config: Any = None,
    check_compiled: Literal["error", "warn", "ignore"] = "error",
) -> None:
    """Make hot swaps between adapters of different ranks and scalings invisible to a model that is compiled afterwards.

    Scalings become tensors, and factors are filled up with zeros to one rank; what the model computes stays the same.
    To be called when the first adapter is loaded and before `torch.compile`.

    Args:
        model: The model; it is changed in place.
        target_rank: The largest rank among the adapters to come; None leaves the factors as they are.
        config: A LoraConfig, or a dictionary of them, whose ranks are set to `target_rank`.
        check_compiled: What to do when the model is compiled already: "error", "warn" or "ignore".

    Raises:
        ValueError: The model is compiled already, has no adapters, or has one of a larger rank, or `target_rank` cannot
            be split among a convolution's groups. The model is then as it was.
    """
    _refuse_compiled(model, check_compiled)
    layers = [layer for layer in tuner_layers(model) if isinstance(layer, LoraLayer)]
    if not layers:
        raise ValueError(
            "No adapter layers found on the model: call `prepare_model_for_compiled_hotswap` after loading the first "
            "adapter and before loading the second one."
        )
    padded = {} if target_rank is None else _padded_factors(model, layers, target_rank)
    for layer in layers:
        device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
        scalings: dict[str, Any] = layer.scaling
        for name, scaling in scalings.items():
            if not isinstance(scaling, torch.Tensor):
                scalings[name] = torch.tensor(float(scaling), device=device)
    for slot, value in padded.items():
        slot.owner._parameters[slot.leaf] = nn.Parameter(value, requires_grad=slot.param.requires_grad)
        _note_sizes(slot.owner)
    if config and target_rank is not None:
        for each in config.values() if isinstance(config, dict) else [config]:
            each.r = target_rank
            for key in each.rank_pattern or ():
                each.rank_pattern[key] = target_rank


def check_hotswap_configs_compatible(config0: PeftConfig, config1: PeftConfig) -> None:
    """Check that adapters with these configurations may take each other's place.

    Raises:
        ValueError: They are of different methods, not LoRA, or differ in use_rslora, lora_dropout, alpha_pattern or
            use_dora.
    """
    _check_types(_type_name(config0.peft_type), _type_name(config1.peft_type))
    ours, theirs = config0.to_dict(), config1.to_dict()
    for key in _MUST_AGREE:
        if ours.get(key) != theirs.get(key):
            raise ValueError(f"Configs are incompatible: for {key}, {ours.get(key)} != {theirs.get(key)}")


def _check_types(ours: str, theirs: str) -> None:
    if ours != theirs:
        raise ValueError(f"Incompatible PEFT types found: {ours} and {theirs}")
    if ours != "LORA":
        raise ValueError(f"Hotswapping only supports LORA but {ours} was passed.")


def _type_name(peft_type: Any) -> str:
    return str(getattr(peft_type, "value", peft_type))


def _refuse_compiled(model: nn.Module, check_compiled: str) -> None:
    if not (hasattr(model, "_orig_mod") or getattr(model, "_compiled_call_impl", False)):
        return
    if check_compiled == "error":
        raise ValueError("Call prepare_model_for_compiled_hotswap *before* compiling the model")
    if check_compiled == "warn":
        warnings.warn(
            "prepare_model_for_compiled_hotswap was called with a model that is already compiled. It will probably be "
            "compiled again, which takes time.",
            stacklevel=3,
        )
    elif check_compiled != "ignore":
        raise ValueError(
            f"check_compiles should be one of 'error', 'warn', or 'ignore', got '{check_compiled}' instead."
        )


def _slots(model: nn.Module, adapter_name: str) -> dict[str, _Slot]:
    """The adapter's tensors by the keys they have in the (uncompiled) model's state dict."""
    return dict(_all_slots(model, [adapter_name]))


def _all_slots(model: nn.Module, adapter_names: list[str]) -> Iterator[tuple[str, _Slot]]:
    model = model._modules.get("_orig_mod") or model
    for site in adapter_sites(model):
        if not isinstance(site.module, LoraLayer):
            continue
        for name in adapter_names:
            for root, held in adapter_roots(site, name).items():
                container = root[len(join(site.name, "x")) - 1 :].partition(".")[0]
                for key in tensor_paths(root, held):
                    place = place_of(model, key)
                    if place is not None and place.leaf in place.owner._parameters:
                        yield key, _Slot(site.name, site.module, container, place.owner, place.leaf)


def _padded_factors(model: nn.Module, layers: list[LoraLayer], rank: int) -> dict[_Slot, torch.Tensor]:
    """Every factor of a smaller rank than this, filled up."""
    names = sorted({name for layer in layers for name in layer._get_available_adapters()})
    padded = {}
    for _, slot in _all_slots(model, names):
        if slot.rank_dim is None:
            continue
        groups, kind = slot.groups, type(slot.layer).__name__
        if rank % groups:
            raise ValueError(
                f"Trying to pad a {kind} LoRA adapter with groups={groups} to target rank {rank}, but the target rank "
                f"is not divisible by {groups}. Please choose a target rank that is divisible by {groups}."
            )
        shape = list(slot.param.shape)
        own_rank = shape[0] if slot.rank_dim == 0 else shape[1] * groups
        if own_rank > rank:
            raise ValueError(
                f"Trying to pad the adapter to the target rank {rank}, but the original rank is larger ({own_rank}). "
                "This is not possible."
            )
        shape[slot.rank_dim] = rank if slot.rank_dim == 0 else rank // groups
        if own_rank < rank:
            padded[slot] = slot.resized(slot.param.detach(), torch.Size(shape))
    return padded


def _checked_value(key: str, slot: _Slot, value: torch.Tensor) -> torch.Tensor:
    """What to put into the slot: `value`, filled up with zeros to the slot's rank if its own is smaller."""
    own, new = slot.param.shape, value.shape
    if own == new:
        return value
    dim = slot.rank_dim
    if dim is None or not slot.differs_in_rank_only(new) or (dim == 0 and new[0] % slot.groups):
        raise ValueError(
            f"Incompatible shapes found for LoRA weights {key}: {tuple(own)} vs {tuple(new)}: expected a difference in "
            "the rank alone."
        )
    return slot.resized(value, own) if new[dim] < own[dim] else value


def _scaling_on(layer_name: str, config: Any) -> tuple[int, float, float]:
    """(rank, alpha, scaling) that the configuration gives a layer."""
    name = layer_name.removeprefix(MODEL_PREFIX)
    rank = pattern_value(config.rank_pattern, name, config.r)
    alpha = pattern_value(config.alpha_pattern, name, config.lora_alpha)
    return rank, alpha, scaling_for(rank, alpha, config.use_rslora)


def _with_adapter_name(key: str, adapter_name: str) -> str:
    """Where a checkpoint's key would be in the model, for a message about it."""
    owner, _, leaf = key.rpartition(".")
    return f"{key}.{adapter_name}" if leaf.startswith("lora_") else join(owner, adapter_name, leaf)


def _without(shape: torch.Size, dim: int) -> tuple[int, ...]:
    return tuple(size for index, size in enumerate(shape) if index != dim)


def _note_sizes(module: nn.Module) -> None:
    """Let a linear or convolution say the sizes that its weight has now."""
    weight: Any = module._parameters.get("weight")
    if isinstance(module, nn.Linear):
        module.out_features, module.in_features = weight.shape
    elif isinstance(module, (nn.Conv1d, nn.Conv2d, nn.Conv3d)):
        module.out_channels, module.in_channels = weight.shape[0], weight.shape[1] * module.groups
