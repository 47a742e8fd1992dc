"""What kind of module each weight of a checkpoint belongs to, from a model without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pylora.config import TaskType
from pylora.offline.base import BaseCheckpoint, match_names
from pylora.offline.errors import OfflineError

_TASKS = {
    "ForCausalLM": TaskType.CAUSAL_LM,
    "LMHeadModel": TaskType.CAUSAL_LM,
    "ForConditionalGeneration": TaskType.SEQ_2_SEQ_LM,
    "ForSequenceClassification": TaskType.SEQ_CLS,
    "ForTokenClassification": TaskType.TOKEN_CLS,
    "ForQuestionAnswering": TaskType.QUESTION_ANS,
}


def architecture(base: BaseCheckpoint) -> str:
    """The model class that `config.json` names.

    Raises:
        OfflineError: it names none.
    """
    names = base.config.get("architectures")
    if not isinstance(names, list) or not names or not isinstance(names[0], str):
        raise OfflineError(f"{base.folder}: expected a config.json with `architectures`, found none")
    return names[0]


def task_type(base: BaseCheckpoint) -> str | None:
    """The task of an adapter for this model, None where the class says nothing."""
    name = architecture(base)
    return next((str(task.value) for ending, task in _TASKS.items() if name.endswith(ending)), None)


def dense_weights(base: BaseCheckpoint) -> dict[str, tuple[str, bool]]:
    """Keys of the weights of dense layers, with the module's name and whether it is a Conv1D.

    The model is built from its configuration, on the meta device.

    Raises:
        OfflineError: transformers does not know the model, or its names are not those of the files.
    """
    model = _empty_model(base)
    from torch import nn

    from pylora.layers.base_weight import is_conv1d

    dense = {
        name: is_conv1d(module)
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or is_conv1d(module)) and isinstance(module.weight, nn.Parameter)
    }
    found = match_names([f"{name}.weight" for name in dense], base)
    if dense and not found:
        raise OfflineError(f"{base.folder}: expected the names of a {architecture(base)}, got others")
    return {key: (name.removesuffix(".weight"), dense[name.removesuffix(".weight")]) for name, key in found.items()}


def _empty_model(base: BaseCheckpoint) -> Any:
    import torch
    import transformers

    name = architecture(base)
    model_class: Any = getattr(transformers, name, None)
    if model_class is None:
        raise OfflineError(f"{base.folder}: transformers {transformers.__version__} has no {name}")
    try:
        config = transformers.AutoConfig.from_pretrained(Path(base.folder))
        with torch.device("meta"):
            return model_class(config)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise OfflineError(f"{base.folder}: config.json: {error}") from None
