"""Puts an adapter's weights into a model, after everything about them has been checked."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from pylora.checkpoint.fused_experts import fuse_expert_tensors, fused_experts
from pylora.checkpoint.keys import MODEL_PREFIX, to_checkpoint_key
from pylora.checkpoint.structure import (
    Place,
    Site,
    adapter_roots,
    adapter_sites,
    has_only_parameters,
    join,
    place_of,
    tensor_paths,
)

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn
    from torch.nn.modules.module import _IncompatibleKeys


def set_peft_model_state_dict(
    model: nn.Module,
    peft_model_state_dict: Mapping[str, Tensor],
    adapter_name: str = "default",
    ignore_mismatched_sizes: bool = False,
    low_cpu_mem_usage: bool = False,
) -> _IncompatibleKeys:
    """Puts one adapter's tensors into a model that already has an adapter of that name.

    Args:
        model: a `PeftModel`, or a model with adapters injected, that has a `peft_config` dictionary.
        peft_model_state_dict: tensors under checkpoint keys. The adapter may have had another name when saved.
        adapter_name: which adapter to fill.
        ignore_mismatched_sizes: leave out tensors of another shape than the model's, with a warning.
        low_cpu_mem_usage: let the given tensors take the place of those that are on the meta device, and move them to
            the device of their layer. Otherwise, and where the model has real tensors, they are copied.

    Returns:
        named tuple of `missing_keys` (everything in the model that was not given, the base model's parameters too)
        and `unexpected_keys`.

    Raises:
        KeyError: no adapter of that name, or a module of `modules_to_save` is not in the checkpoint.
        RuntimeError: a tensor of another shape than the model's, or a sparse or quantised one. Nothing has been copied
            then.
    """
    plan = plan_load(model, peft_model_state_dict, adapter_name, ignore_mismatched_sizes=ignore_mismatched_sizes)
    result = plan.apply(low_cpu_mem_usage=low_cpu_mem_usage)
    result.missing_keys[:] = [key for key in model.state_dict() if key not in plan.tensors]
    return result


@dataclass
class LoadPlan:
    """What a checkpoint will change in a model. Made, and thereby checked, before anything is changed.

    Attributes:
        tensors: model keys and the tensors to put there.
        places: where the model keeps each of them.
        missing: the adapter's model keys that the checkpoint does not have.
        unexpected: checkpoint keys with no place in the model.
        mismatched: (model key, shape in the checkpoint, shape in the model) of what is left out.
    """

    model: nn.Module
    adapter_name: str
    tensors: dict[str, Tensor] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[tuple[str, torch.Size, torch.Size]] = field(default_factory=list)

    def apply(self, low_cpu_mem_usage: bool = False, to_keep: bool = False) -> _IncompatibleKeys:
        """Copies the tensors, or with `low_cpu_mem_usage` puts them where there are only meta tensors.

        Args:
            low_cpu_mem_usage: as said.
            to_keep: the tensors are nobody else's, and the model's are new ones that nobody has a view of: where
                nothing has to be converted the parameter gets the tensor's memory, and nothing is copied.

        Returns:
            the adapter's missing keys, and the unexpected ones.
        """
        import torch
        from torch.nn.modules.module import _IncompatibleKeys

        kept: set[int] = set()
        for key, tensor in self.tensors.items():
            place = self.places[key]
            assign = low_cpu_mem_usage and place.held.is_meta
            if not assign and _loads_plainly(place.owner):
                if to_keep and _can_take_memory(place.held, tensor, kept):
                    place.held.data = tensor.detach()
                else:
                    with torch.no_grad():
                        place.held.copy_(tensor)
                continue
            value = tensor.to(place.held.dtype) if assign else tensor
            place.owner.load_state_dict({place.leaf: value}, strict=False, assign=assign)
        if low_cpu_mem_usage:
            for site in adapter_sites(self.model):
                if not site.is_auxiliary:
                    _bring_to_device(site, self.adapter_name)
        if self.mismatched:
            self._warn_about_sizes()
        return _IncompatibleKeys(list(self.missing), list(self.unexpected))

    def _warn_about_sizes(self) -> None:
        sizes = "\n".join(
            f"- {key}: found shape {found} in the checkpoint and {own} in the model instantiated"
            for key, found, own in self.mismatched
        )
        warnings.warn(
            f"Some weights of {type(self.model).__name__} were not initialized from the model checkpoint and are being "
            f"ignored because you passed `ignore_mismatched_sizes=True`: {sizes}.",
            stacklevel=2,
        )


def _loads_plainly(owner: nn.Module) -> bool:
    """Whether `owner.load_state_dict` would do no more than copy: it takes 40 us for one tensor."""
    import torch
    from torch import nn

    return (
        type(owner) in (nn.Linear, nn.ParameterDict)
        and not (owner._load_state_dict_pre_hooks or owner._load_state_dict_post_hooks)
        and "load_state_dict" not in owner.__dict__
        and not torch.__future__.get_swap_module_params_on_conversion()
    )


def _can_take_memory(held: Tensor, tensor: Tensor, kept: set[int]) -> bool:
    """Whether the tensor's memory can be the parameter's from now on. `kept` are the storages given away so far.

    Tensors of a pickle may be parts of one storage, or the same one twice.
    """
    if held.dtype != tensor.dtype or held.device != tensor.device or held.stride() != tensor.stride():
        return False
    storage = tensor.untyped_storage()
    place = storage.data_ptr()
    if storage.nbytes() != tensor.nbytes or place in kept:
        return False
    kept.add(place)
    return True


def _bring_to_device(site: Site, adapter_name: str) -> None:
    """Move an adapter's tensors to where the layer's base weight is."""
    layer: Any = site.module
    device, _ = layer._get_base_layer_device_and_dtype(layer.get_base_layer())
    if device is None or device.type == "meta":
        return
    for held in adapter_roots(site, adapter_name).values():
        tensors = held.parameters() if hasattr(held, "parameters") else [held]
        for tensor in tensors:
            if tensor.device != device and not tensor.is_meta:
                tensor.data = tensor.data.to(device)


def plan_load(
    model: nn.Module, checkpoint: Mapping[str, Tensor], adapter_name: str, ignore_mismatched_sizes: bool = False
) -> LoadPlan:
    """Finds each tensor's place and checks its shape. Arguments and errors are `set_peft_model_state_dict`'s."""
    configs: Any = model.peft_config
    config = configs[adapter_name]
    if config.peft_type != "LORA":
        raise ValueError(f"peft_type: expected LORA, got {config.peft_type}")
    experts = fused_experts(model)
    if experts is not None:
        checkpoint = fuse_expert_tensors(experts, checkpoint)
    sites = list(adapter_sites(model))
    own = _own_places(sites, adapter_name)
    places = _places(sites, own, adapter_name, checkpoint)
    wrapped = model._modules.get("base_model")
    has_prefix = wrapped is not None and "model" in wrapped._modules

    plan = LoadPlan(model, adapter_name)
    problems = []
    for key, tensor in checkpoint.items():
        model_key = places.get(key) or (key if has_prefix else key.removeprefix(MODEL_PREFIX))
        place = own.get(model_key) or place_of(model, model_key)
        if place is None:
            plan.unexpected.append(key)
            continue
        shape = place.held.shape
        if str(tensor.layout) != "torch.strided" or tensor.is_quantized:
            problems.append(f"{model_key}: expected a dense tensor, got a {tensor.layout} one of {tensor.dtype}.")
        elif tensor.shape == shape:
            plan.tensors[model_key] = tensor
            plan.places[model_key] = place
        elif ignore_mismatched_sizes:
            plan.mismatched.append((model_key, tensor.shape, shape))
        else:
            problems.append(size_mismatch(model_key, tensor.shape, shape))
    if problems:
        listed = "\n\t".join(problems)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(model).__name__}:\n\t{listed}")
    plan.missing = [key for key in own if key not in plan.tensors]
    return plan


def size_mismatch(key: str, found: torch.Size, own: torch.Size) -> str:
    """The line that torch's `load_state_dict` has for a tensor of another shape."""
    return (
        f"size mismatch for {key}: copying a param with shape {found} from checkpoint, "
        f"the shape in current model is {own}."
    )


def _own_places(sites: list[Site], adapter_name: str) -> dict[str, Place | None]:
    """The adapter's model keys, with their places where those take no search."""
    own: dict[str, Place | None] = {}
    for site in sites:
        if site.is_auxiliary:
            continue
        for root, held in adapter_roots(site, adapter_name).items():
            if has_only_parameters(held):
                for leaf, tensor in held._parameters.items():
                    if tensor is not None:
                        own[f"{root}.{leaf}"] = Place(held, leaf, tensor)
            else:
                own.update(dict.fromkeys(tensor_paths(root, held)))
    return own


def _places(
    sites: list[Site], own_keys: Iterable[str], adapter_name: str, checkpoint: Mapping[str, Tensor]
) -> dict[str, str]:
    """Checkpoint keys and the model keys they stand for, with and without the prefix of a `PeftModel`.

    Raises:
        KeyError: a wrapper (`modules_to_save`, trainable tokens) wants a tensor that the checkpoint lacks.
    """
    places = {}
    for key in own_keys:
        name = to_checkpoint_key(key, adapter_name)
        places[name] = places[MODEL_PREFIX + name] = key
    for site in sites:
        if site.is_auxiliary:
            wrapper: Any = site.module
            for saved, inside in wrapper.adapter_state_dict_load_map(adapter_name).items():
                name = join(site.name, saved)
                name = name if name in checkpoint else MODEL_PREFIX + name
                if name not in checkpoint:
                    raise KeyError(join(site.name, saved))
                places[name] = join(site.name, inside)
    return places
