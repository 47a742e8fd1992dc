"""The entry point in `vllm.general_plugins`. Engine, workers and server each call it when they start, some twice.

It exchanges one thing: the name of the class that does LoRA's products on CPUs, which vLLM asks its platform for.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
from typing import Any

logger = logging.getLogger(__name__)

STOCK = "vllm.lora.punica_wrapper.punica_cpu.PunicaWrapperCPU"
OURS = "pylora.integrations.vllm.wrapper.PyloraPunicaWrapper"

# What `wrapper` and `products` rely on: methods of vLLM's base class, with the names of the arguments they are called
# by. (vllm 0.32)
_EXPECTED_METHODS = {
    "__init__": ("max_num_batched_tokens", "max_batches", "device"),
    "update_metadata": ("mapping", "lora_index_to_id", "max_loras", "vocab_size"),
    "add_shrink": ("y", "x", "lora_a_stacked", "scale"),
    "add_expand": ("y", "x", "lora_b_stacked", "output_slices", "offset_start", "add_inputs"),
    "add_lora_linear": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "output_slices", "buffer"),
    "add_lora_embedding": ("y", "x", "lora_b_stacked", "add_inputs"),
    "add_lora_logits": ("y", "x", "lora_a_stacked", "lora_b_stacked", "scale", "buffer"),
    "apply_lora_full_linear": ("y", "x", "weight_stacked", "bias_stacked", "module_enabled"),
    "_select_full_linear_output": ("y", "adapter_y", "bias_stacked", "module_enabled"),
}
_REST = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
_EXPECTED_PROPERTIES = ("token_lora_indices", "sampler_indices")


def register() -> None:
    """Let vLLM compute LoRA on CPUs by pylora.

    Nothing happens where vLLM is absent or runs on another device, or with PYLORA_VLLM=0; a second call changes
    nothing. A vLLM whose interface is another, or whose class somebody else has exchanged, is left alone with a
    warning.
    """
    if os.environ.get("PYLORA_VLLM") == "0" or importlib.util.find_spec("vllm") is None:
        return
    try:
        platform = importlib.import_module("vllm.platforms").current_platform
        if not platform.is_cpu():
            return
        current = platform.get_punica_wrapper()
        base = importlib.import_module("vllm.lora.punica_wrapper.punica_base").PunicaWrapperBase
    except Exception as error:  # vLLM loads one plugin after the other: what fails here would take its start with it
        _leave_alone(f"its interface is another: {error!r}")
        return
    if current == OURS:
        return
    if current != STOCK:
        _leave_alone(f"its LoRA products are {current}'s, not {STOCK}'s")
        return
    problem = misfit(base)
    if problem is not None:
        _leave_alone(f"its interface is another: {problem}")
        return
    type(platform).get_punica_wrapper = classmethod(lambda cls: OURS)
    logger.info("pylora: LoRA products by pylora's kernels")


def misfit(base: Any) -> str | None:
    """What is missing in vLLM's base class of LoRA products.

    Args:
        base: the class, or one that stands for it.

    Returns:
        None where everything is there that pylora relies on.
    """
    for method, expected in _EXPECTED_METHODS.items():
        function = getattr(base, method, None)
        if not inspect.isfunction(function):
            return f"{base.__name__} has no method {method}"
        found = inspect.signature(function).parameters
        missing = [name for name in expected if name not in found]
        if missing:
            return f"{base.__name__}.{method} has no argument {missing[0]}"
        required = {each.name for each in found.values() if each.default is each.empty and each.kind not in _REST}
        unknown = sorted(required - {"self", *expected})
        if unknown:
            return f"{base.__name__}.{method} has an argument {unknown[0]} that pylora does not know"
    for name in _EXPECTED_PROPERTIES:
        if not isinstance(inspect.getattr_static(base, name, None), property):
            return f"{base.__name__} has no property {name}"
    return None


def _leave_alone(why: str) -> None:
    logger.warning("pylora: vLLM is left as it is, since %s", why)
