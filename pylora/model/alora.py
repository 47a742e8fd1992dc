"""aLoRA on a whole model: where a batch invokes its adapters, and how the layers learn of it."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from pylora.layers import LoraLayer, walk
from pylora.layers.variants import calculate_alora_offsets

Offsets = Sequence["int | None"]


def is_alora_relevant_in_batch(model: Any, adapter_names: Sequence[str] | None = None) -> bool:
    """Whether the active adapter, or one of `adapter_names`, is an aLoRA adapter."""
    if getattr(model.active_peft_config, "alora_invocation_tokens", None):
        return True
    configs = (model.peft_config.get(name) for name in adapter_names or () if name != "__base__")
    return any(getattr(config, "alora_invocation_tokens", None) for config in configs)


def get_alora_offsets_for_forward(
    model: Any, input_ids: torch.Tensor | None = None, inputs_embeds: torch.Tensor | None = None, **kwargs: Any
) -> dict[str, Any]:
    """The arguments of a forward with `alora_offsets` among them, if the batch has aLoRA adapters.

    Args:
        model: The PeftModel.
        input_ids: [batch, tokens], to look for invocations in. Offsets that are given in `kwargs` are kept.
        inputs_embeds: Given in place of `input_ids`, they tell of no invocation: a warning, and no offsets.
        **kwargs: The forward's other arguments.
    """
    if not is_alora_relevant_in_batch(model, kwargs.get("adapter_names")) or kwargs.get("alora_offsets") is not None:
        return kwargs
    if input_ids is None and inputs_embeds is not None:
        warnings.warn(
            "Cannot calculate aLoRA offsets when only inputs_embeds are provided. Disabling aLoRA for this forward "
            "pass.",
            stacklevel=2,
        )
    kwargs["alora_offsets"] = _offsets(model, input_ids, kwargs)
    return kwargs


def get_alora_offsets_for_generate(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """As `get_alora_offsets_for_forward`, for `generate`: the prompt is `input_ids` or the first argument."""
    if not is_alora_relevant_in_batch(model, kwargs.get("adapter_names")) or kwargs.get("alora_offsets") is not None:
        return kwargs
    input_ids = kwargs.get("input_ids")
    if input_ids is None and args and isinstance(args[0], torch.Tensor):
        input_ids = args[0]
    if input_ids is None:
        warnings.warn(
            "Cannot calculate aLoRA offsets during generate as input_ids are not available. Disabling aLoRA.",
            stacklevel=2,
        )
    elif input_ids.ndim == 1:
        input_ids = input_ids.unsqueeze(0)
    kwargs["alora_offsets"] = _offsets(model, input_ids, kwargs)
    return kwargs


def _offsets(model: Any, input_ids: torch.Tensor | None, kwargs: dict[str, Any]) -> list[int | None] | None:
    if input_ids is None:
        return None
    return calculate_alora_offsets(
        model.peft_config, model.active_adapter, input_ids, adapter_names=kwargs.get("adapter_names")
    )


@contextmanager
def alora_offsets_passed(model: nn.Module, alora_offsets: Offsets | None, num_beams: Any = None) -> Iterator[None]:
    """Inside the context every layer that has an aLoRA adapter gets `alora_offsets` with its input.

    Blocks under gradient checkpointing are run again in the backward, after the context: to them the offsets stay
    attached until their backward is done.

    Args:
        model: The base model, adapters in place.
        alora_offsets: One for each sequence of the batch. None: the context does nothing.
        num_beams: The beams of a generation.

    Raises:
        ValueError: Beam search, a transformers without checkpointed blocks, or a second forward before the backward of
            the first under gradient checkpointing.
    """
    if alora_offsets is None:
        yield
        return
    if isinstance(num_beams, int) and num_beams > 1:
        raise ValueError("Beam search not yet supported for aLoRA.")
    blocks = _checkpointed_blocks(model)
    if any(getattr(block, _HANDLES, None) for block in blocks):
        raise ValueError(
            "Multiple invocations of PEFT forward hooks before .backward() with enabled gradient checkpointing. "
            "Disable gradient checkpointing or only call forward once per backward."
        )
    until_backward = [_attach_until_backward(block, alora_offsets) for block in blocks]
    handles = _attach(model, alora_offsets)
    try:
        yield
    except BaseException:
        for attached in until_backward:
            _remove(attached)
        raise
    finally:
        _remove(handles)


_HANDLES = "_peft_gradient_checkpointing_forward_hooks"


def _insert_offsets(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], alora_offsets: Offsets
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "alora_offsets": alora_offsets}


def _takes_offsets(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and any(
        "alora_offsets" in getattr(variant, "forward_kwargs", ()) for variant in module.lora_variant.values()
    )


def _attach(model: nn.Module, alora_offsets: Offsets) -> list[RemovableHandle]:
    hook = partial(_insert_offsets, alora_offsets=alora_offsets)
    return [
        visit.module.register_forward_pre_hook(hook, with_kwargs=True)
        for visit in walk(model)
        if _takes_offsets(visit.module)
    ]


def _checkpointed_blocks(model: nn.Module) -> list[nn.Module]:
    """The blocks of a transformers model that are computed again in a backward to come."""
    if "transformers" not in sys.modules or not torch.is_grad_enabled():
        return []
    try:
        from transformers.modeling_layers import GradientCheckpointingLayer
    except ImportError as error:
        raise ValueError("Using aLoRA requires transformers >= 4.52.1.") from error
    return [
        visit.module
        for visit in walk(model)
        if isinstance(visit.module, GradientCheckpointingLayer)
        and visit.module.gradient_checkpointing
        and visit.module.training
    ]


def _attach_until_backward(block: Any, alora_offsets: Offsets) -> list[RemovableHandle]:
    """Whenever the block is run, give its layers the offsets; its backward takes everything away again.

    Returns:
        What to take away if there is no backward.
    """
    handles: list[RemovableHandle] = []

    def before_forward(module: nn.Module, args: Any) -> None:
        handles.extend(_attach(module, alora_offsets))

    def in_backward(module: nn.Module, *gradients: Any) -> None:
        # Without inputs that need a gradient this hook runs before the block is computed again: wait for the end.
        engine: Any = torch.autograd.Variable._execution_engine
        engine.queue_callback(partial(_remove, handles))

    setattr(block, _HANDLES, handles)
    handles.append(block.register_forward_pre_hook(before_forward))
    handles.append(block.register_full_backward_hook(in_backward))
    return handles


def _remove(handles: list[RemovableHandle]) -> None:
    while handles:
        handles.pop().remove()
