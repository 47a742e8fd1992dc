"""What `target_modules="all-linear"` stands for in a given model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from pylora.config import TaskType
from pylora.targeting.defaults import INCLUDE_LINEAR_LAYERS_SHORTHAND, SEQ_CLS_HEAD_NAMES
from pylora.targeting.model_info import is_linear_like, is_pretrained_model, is_tuner_layer


def asks_for_all_linear(target_modules: Any) -> bool:
    """Whether `target_modules` is the shorthand, in any case of letters."""
    return isinstance(target_modules, str) and target_modules.lower() == INCLUDE_LINEAR_LAYERS_SHORTHAND


def linear_module_names(
    model: nn.Module,
    task_type: str | None,
    named_modules: Sequence[tuple[str, nn.Module]],
    is_tuner_layer: Callable[[nn.Module], bool] = is_tuner_layer,
) -> set[str]:
    """Names of the model's linear layers, its output layer left out.

    Linear are `nn.Linear`, transformers' `Conv1D`, and tuner layers whose class name says Linear. The output layer is a
    transformers model's output embedding or, for a sequence classifier without one, its `score` or `classifier`.

    Args:
        model: The model, for its output layer.
        task_type: The adapter's task type.
        named_modules: The model's modules as `named_modules()` gives them, without the insides of tuner layers.
        is_tuner_layer: Tells layers that already have adapters.
    """
    head = _output_layer(model, task_type)
    return {
        name
        for name, module in named_modules
        if module is not head
        and (is_linear_like(module) or ("Linear" in type(module).__name__ and is_tuner_layer(module)))
    }


def _output_layer(model: nn.Module, task_type: str | None) -> nn.Module | None:
    if not is_pretrained_model(model):
        return None
    output: nn.Module | None = model.get_output_embeddings()  # type: ignore[operator]
    if output is None and task_type == TaskType.SEQ_CLS:
        heads = (getattr(model, name, None) for name in SEQ_CLS_HEAD_NAMES)
        output = next((head for head in heads if head is not None), None)
    return output
