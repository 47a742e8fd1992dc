"""AutoPeftModel classes: base model and adapter loaded together, from what the adapter's configuration names."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from typing import Any, ClassVar

from pylora.config import PeftConfig
from pylora.model.peft_model import PeftModel
from pylora.model.task_models import (
    MODEL_TYPE_TO_PEFT_MODEL_MAPPING,
    PeftModelForCausalLM,
    PeftModelForFeatureExtraction,
    PeftModelForQuestionAnswering,
    PeftModelForSeq2SeqLM,
    PeftModelForSequenceClassification,
    PeftModelForTokenClassification,
)

TOKENIZER_CONFIG_NAME = "tokenizer_config.json"


def get_default_import_allowlist() -> list[str]:
    """The packages that a configuration's `auto_mapping` may name: importing a module runs its code."""
    return ["diffusers", "lerobot", "megatron-core", "transformers"]


def check_import_allowlist(allowlist: Iterable[str], parent_name: str) -> bool:
    """Whether `parent_name` is one of the packages of a list, or a module inside one."""
    return any(parent_name == allowed or parent_name.startswith(f"{allowed}.") for allowed in allowlist)


class _BaseAutoPeftModel:
    """What the classes below share. They are not instantiated: `from_pretrained` returns a `PeftModel`."""

    # Name of the class in transformers that loads the base model; None: the configuration's `auto_mapping` says it.
    _auto_class_name: ClassVar[str | None] = None
    _target_peft_class: ClassVar[type[PeftModel]] = PeftModel

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        name = type(self).__name__
        raise OSError(f"{name} is made by `{name}.from_pretrained(pretrained_model_name_or_path)`, not by calling it")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        revision: str | None = None,
        import_allowlist: Iterable[str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Loads an adapter and, first, the base model that its configuration names.

        The embeddings of the base model grow when a tokenizer was saved beside the adapter and has more tokens.

        Args:
            pretrained_model_name_or_path: folder or hub repository of the adapter.
            adapter_name: name that the adapter gets.
            is_trainable: whether the adapter is loaded for training.
            config: a configuration in place of the adapter's own, for `PeftModel.from_pretrained`.
            revision: revision of the adapter's repository. That of the base model is in the configuration.
            import_allowlist: packages from which a base model may be imported when the configuration names a class
                rather than a task; by default `get_default_import_allowlist()`.
            **kwargs: for the configuration, the base model and `PeftModel.from_pretrained` alike.

        Raises:
            ValueError: the configuration's task is another than this class's, the package it names is not allowed, or
                it does not say how to load the base model.
        """
        peft_config = PeftConfig.from_pretrained(pretrained_model_name_or_path, revision=revision, **kwargs)
        base_class = cls._base_class(peft_config, import_allowlist)
        base_model = base_class.from_pretrained(
            peft_config.base_model_name_or_path, revision=peft_config.revision, **kwargs
        )
        _grow_embeddings(base_model, pretrained_model_name_or_path, revision, kwargs)
        return cls._target_peft_class.from_pretrained(
            base_model,
            pretrained_model_name_or_path,
            adapter_name=adapter_name,
            is_trainable=is_trainable,
            config=config,
            revision=revision,
            **kwargs,
        )

    @classmethod
    def _base_class(cls, peft_config: PeftConfig, import_allowlist: Iterable[str] | None) -> Any:
        task_type = peft_config.task_type
        if task_type is None:
            return _mapped_class(peft_config.auto_mapping, import_allowlist)
        if cls._auto_class_name is None:
            raise ValueError(
                "Cannot use `AutoPeftModel` with a task type: expected a configuration without one, got "
                f"{str(getattr(task_type, 'value', task_type))!r}; use the class for the task, such as "
                "`AutoPeftModelForCausalLM`"
            )
        expected = MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type]
        if cls._target_peft_class is not expected:
            raise ValueError(
                f"Expected target PEFT class: {expected.__name__}, but you have asked for: "
                f"{cls._target_peft_class.__name__}: the adapter was made for another task"
            )
        return getattr(importlib.import_module("transformers"), cls._auto_class_name)


def _mapped_class(auto_mapping: dict[str, str] | None, import_allowlist: Iterable[str] | None) -> Any:
    """The base model's class as `auto_mapping` names it."""
    if auto_mapping is None:
        raise ValueError("Cannot infer the auto class from the config: it has neither `task_type` nor `auto_mapping`")
    library = auto_mapping["parent_library"]
    allowed = get_default_import_allowlist() if import_allowlist is None else list(import_allowlist)
    if not check_import_allowlist(allowed, library):
        raise ValueError(
            f"The auto mapping wants to import '{library}' which is not in the import allowlist; if importing it is "
            f"safe, pass `import_allowlist=['{library}']`"
        )
    return getattr(importlib.import_module(library), auto_mapping["base_model_class"])


def _grow_embeddings(
    base_model: Any, adapter_path: str | os.PathLike[str], revision: str | None, kwargs: dict[str, Any]
) -> None:
    """Give the base model rows for the tokens that the adapter's tokenizer has beyond the base model's."""
    if not hasattr(base_model, "get_input_embeddings") or not _has_tokenizer(adapter_path, revision, kwargs):
        return
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(
        adapter_path,
        revision=revision,
        token=kwargs.get("token") or kwargs.get("use_auth_token"),
        trust_remote_code=kwargs.get("trust_remote_code", False),
    )
    if len(tokenizer) > base_model.get_input_embeddings().weight.shape[0]:
        base_model.resize_token_embeddings(len(tokenizer))


def _has_tokenizer(adapter_path: str | os.PathLike[str], revision: str | None, kwargs: dict[str, Any]) -> bool:
    if os.path.isdir(adapter_path):
        return os.path.isfile(os.path.join(adapter_path, TOKENIZER_CONFIG_NAME))
    import huggingface_hub

    if huggingface_hub.constants.HF_HUB_OFFLINE:
        return False
    try:
        return huggingface_hub.file_exists(
            str(adapter_path),
            TOKENIZER_CONFIG_NAME,
            revision=revision,
            repo_type=kwargs.get("repo_type"),
            token=kwargs.get("token") or kwargs.get("use_auth_token"),
        )
    except Exception:  # a hub that cannot be asked is no reason to fail: the adapter itself may be in the cache
        return False


class AutoPeftModel(_BaseAutoPeftModel):
    """Loads adapters that have no task type; see `from_pretrained`."""


class AutoPeftModelForCausalLM(_BaseAutoPeftModel):
    """Loads adapters of causal language models; see `from_pretrained`."""

    _auto_class_name = "AutoModelForCausalLM"
    _target_peft_class = PeftModelForCausalLM


class AutoPeftModelForSeq2SeqLM(_BaseAutoPeftModel):
    """Loads adapters of encoder-decoder language models; see `from_pretrained`."""

    _auto_class_name = "AutoModelForSeq2SeqLM"
    _target_peft_class = PeftModelForSeq2SeqLM


class AutoPeftModelForSequenceClassification(_BaseAutoPeftModel):
    """Loads adapters of sequence classifiers; see `from_pretrained`."""

    _auto_class_name = "AutoModelForSequenceClassification"
    _target_peft_class = PeftModelForSequenceClassification


class AutoPeftModelForTokenClassification(_BaseAutoPeftModel):
    """Loads adapters of token classifiers; see `from_pretrained`."""

    _auto_class_name = "AutoModelForTokenClassification"
    _target_peft_class = PeftModelForTokenClassification


class AutoPeftModelForQuestionAnswering(_BaseAutoPeftModel):
    """Loads adapters of extractive question answering; see `from_pretrained`."""

    _auto_class_name = "AutoModelForQuestionAnswering"
    _target_peft_class = PeftModelForQuestionAnswering


class AutoPeftModelForFeatureExtraction(_BaseAutoPeftModel):
    """Loads adapters of models without a head; see `from_pretrained`."""

    _auto_class_name = "AutoModel"
    _target_peft_class = PeftModelForFeatureExtraction
