"""Making a base model ready for training: quantised models, and dtypes for mixed precision."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import torch
from torch import nn

# Methods whose 16-bit parameters must keep their dtype, since their kernels expect it.
_DTYPE_BOUND_METHODS = frozenset({"gptq", "aqlm", "eetq", "torchao", "hqq"})


def prepare_model_for_kbit_training(
    model: Any,
    use_gradient_checkpointing: bool = True,
    gradient_checkpointing_kwargs: dict[str, Any] | None = None,
    auto_clear_cache: bool = True,
) -> Any:
    """Prepares a transformers model for training adapters on it; made for quantised models.

    Every parameter is frozen. Parameters in f16 and bf16 (norms, embeddings, head) become f32, unless the quantisation
    method is bound to its dtype. A quantised model gets gradient checkpointing, and inputs that require gradients where
    the reentrant kind needs them.

    Args:
        model: the model, changed in place.
        use_gradient_checkpointing: whether a quantised model checkpoints.
        gradient_checkpointing_kwargs: arguments of `torch.utils.checkpoint.checkpoint`.
        auto_clear_cache: whether to give the accelerator's cached memory back after the conversion to f32.

    Returns:
        `model`.
    """
    checkpointing_kwargs = dict(gradient_checkpointing_kwargs or {})
    dtype_bound = _is_dtype_bound(model)
    quantised = dtype_bound or getattr(model, "is_loaded_in_8bit", False) or getattr(model, "is_loaded_in_4bit", False)
    for param in model.parameters():
        param.requires_grad = False
    if not dtype_bound:
        _widen_half_precision(model)
        if auto_clear_cache:
            _empty_caches()
    if quantised and use_gradient_checkpointing:
        _enable_checkpointing(model, checkpointing_kwargs)
    return model


def cast_mixed_precision_params(model: nn.Module, dtype: torch.dtype) -> None:
    """Casts frozen parameters to `dtype` and trainable ones to f32, in place.

    Halves the memory of the base model while training in mixed precision, where the trained weights should be f32.

    Args:
        model: the model, already with its adapter.
        dtype: `torch.float16` or `torch.bfloat16`.
    """
    for param in model.parameters():
        param.data = param.data.to(torch.float32 if param.requires_grad else dtype)


def _is_dtype_bound(model: Any) -> bool:
    return getattr(model, "quantization_method", None) in _DTYPE_BOUND_METHODS or bool(
        getattr(model, "hqq_quantized", False)
    )


def _widen_half_precision(model: nn.Module) -> None:
    for param in model.parameters():
        # bitsandbytes keeps packed 4-bit values in parameters of its own type, whatever dtype they show.
        if param.dtype in (torch.float16, torch.bfloat16) and type(param).__name__ != "Params4bit":
            param.data = param.data.to(torch.float32)


def _empty_caches() -> None:
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if hasattr(torch, "xpu") and torch.xpu.is_available():
        torch.xpu.empty_cache()


def _enable_checkpointing(model: Any, checkpointing_kwargs: dict[str, Any]) -> None:
    if checkpointing_kwargs.get("use_reentrant", True):
        # Reentrant checkpointing computes no gradient for a block none of whose inputs requires one.
        if hasattr(model, "enable_input_require_grads"):
            model.enable_input_require_grads()
        else:
            model.get_input_embeddings().register_forward_hook(_require_grad)
    if "gradient_checkpointing_kwargs" in inspect.signature(model.gradient_checkpointing_enable).parameters:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing_kwargs)
        return
    if checkpointing_kwargs:
        warnings.warn(
            "gradient_checkpointing_kwargs is not supported by this model's gradient_checkpointing_enable: ignored",
            FutureWarning,
            stacklevel=3,
        )
    model.gradient_checkpointing_enable()


def _require_grad(module: nn.Module, args: Any, output: torch.Tensor) -> None:
    output.requires_grad_(True)
