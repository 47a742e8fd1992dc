"""A `PeftModel` for each task: the arguments its forward names, and the heads that are trained with the adapter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar, TypeVar

from torch import nn

from pylora.config import PeftConfig
from pylora.model.alora import get_alora_offsets_for_forward, get_alora_offsets_for_generate
from pylora.model.peft_model import PeftModel

MODEL_TYPE_TO_PEFT_MODEL_MAPPING: dict[str, type[PeftModel]] = {}
"""Task type -> class. Filled by `for_task`."""

C = TypeVar("C", bound=type[PeftModel])


def for_task(task_type: str) -> Callable[[C], C]:
    """Class decorator: `get_peft_model` and `from_pretrained` make this class for configurations of the task."""

    def register(cls: C) -> C:
        MODEL_TYPE_TO_PEFT_MODEL_MAPPING[task_type] = cls
        return cls

    return register


def peft_model_class(config: PeftConfig, default: type[PeftModel] = PeftModel) -> type[PeftModel]:
    """The class for the task that `config` names, `default` if it names none."""
    task: Any = config.task_type
    return MODEL_TYPE_TO_PEFT_MODEL_MAPPING.get(getattr(task, "value", task), default)


class _TaskModel(PeftModel):
    head_names: ClassVar[tuple[str, ...]] = ()
    """Modules that are trained and saved whole with every adapter: a pretrained base model has none for the task."""

    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        with _saving(peft_config, self.head_names):
            super().__init__(model, peft_config, adapter_name, **kwargs)

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """As `PeftModel.add_adapter`; the task's heads join the configuration's `modules_to_save`."""
        with _saving(peft_config, self.head_names):
            super().add_adapter(
                adapter_name,
                peft_config,
                low_cpu_mem_usage=low_cpu_mem_usage,
                autocast_adapter_dtype=autocast_adapter_dtype,
            )

    def _call(self, other: dict[str, Any], **named: Any) -> Any:
        """The base model on the task's named arguments and the caller's other ones."""
        if self._directly_called(other) is not None:
            return self.base_model(**named, **other)
        with self._enable_peft_forward_hooks(**other):
            return self.base_model(**named, **self._without_adapter_arguments(other))

    def _return_dict(self, return_dict: bool | None) -> bool:
        return getattr(self.config, "return_dict", True) if return_dict is None else return_dict


@contextmanager
def _saving(config: PeftConfig, names: tuple[str, ...]) -> Iterator[None]:
    """Names join `modules_to_save`, and leave it if the block fails.

    They are there before the layers are chosen, so that a head that is trained whole does not get an adapter too.
    """
    any_config: Any = config
    before = getattr(config, "modules_to_save", None)
    missing = [name for name in names if name not in (before or ())]
    if missing:
        any_config.modules_to_save = [*(before or ()), *missing]
    try:
        yield
    except BaseException:
        if missing:
            any_config.modules_to_save = before
        raise


class _GenerativeModel(_TaskModel):
    def __init__(self, model: nn.Module, peft_config: PeftConfig, adapter_name: str = "default", **kwargs: Any) -> None:
        # Asked for before anything is changed: without it the model cannot generate, and the task is the wrong one.
        _ = model.prepare_inputs_for_generation
        super().__init__(model, peft_config, adapter_name, **kwargs)

    @property
    def base_model_prepare_inputs_for_generation(self) -> Any:
        """The base model's own method."""
        return self.get_base_model().prepare_inputs_for_generation

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next decoding step, as the base model prepares them."""
        return self.base_model_prepare_inputs_for_generation(*args, **kwargs)


@for_task("CAUSAL_LM")
class PeftModelForCausalLM(_GenerativeModel):
    """A language model that continues its input. Arguments and attributes as `PeftModel`."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with the active adapters; an aLoRA adapter from its invocation on."""
        return self._call(
            get_alora_offsets_for_forward(self, input_ids, inputs_embeds, **kwargs),
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters; an aLoRA adapter from its invocation on."""
        return super().generate(*args, **get_alora_offsets_for_generate(self, *args, **kwargs))

    def prepare_inputs_for_generation(self, *args: Any, task_ids: Any = None, **kwargs: Any) -> dict[str, Any]:
        """The arguments of the next decoding step. The model works out `cache_position` for itself."""
        inputs = super().prepare_inputs_for_generation(*args, **kwargs)
        inputs.pop("cache_position", None)
        return inputs


@for_task("SEQ_2_SEQ_LM")
class PeftModelForSeq2SeqLM(_GenerativeModel):
    """An encoder-decoder language model. Arguments and attributes as `PeftModel`."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        decoder_input_ids: Any = None,
        decoder_attention_mask: Any = None,
        decoder_inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with the active adapters."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            decoder_input_ids=decoder_input_ids,
            decoder_attention_mask=decoder_attention_mask,
            decoder_inputs_embeds=decoder_inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )

    def generate(self, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters, by keyword: `input_ids=...`."""
        return super().generate(**kwargs)


class _ClassifierModel(_TaskModel):
    head_names = ("classifier", "score")

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        labels: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with the active adapters."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            labels=labels,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self._return_dict(return_dict),
        )


@for_task("SEQ_CLS")
class PeftModelForSequenceClassification(_ClassifierModel):
    """A model that classifies its input. `classifier` or `score` is trained too. Arguments as `PeftModel`."""


@for_task("TOKEN_CLS")
class PeftModelForTokenClassification(_ClassifierModel):
    """A model that classifies each token. `classifier` or `score` is trained too. Arguments as `PeftModel`."""


@for_task("QUESTION_ANS")
class PeftModelForQuestionAnswering(_TaskModel):
    """A model that finds where an answer starts and ends. `qa_outputs` is trained too. Arguments as `PeftModel`."""

    head_names = ("qa_outputs",)

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        token_type_ids: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        start_positions: Any = None,
        end_positions: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with the active adapters."""
        given = {"token_type_ids": token_type_ids, "position_ids": position_ids}
        return self._call(
            {**{name: value for name, value in given.items() if value is not None}, **kwargs},
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            start_positions=start_positions,
            end_positions=end_positions,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=self._return_dict(return_dict),
        )


@for_task("FEATURE_EXTRACTION")
class PeftModelForFeatureExtraction(_TaskModel):
    """A model without a head. Arguments and attributes as `PeftModel`."""

    def forward(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        inputs_embeds: Any = None,
        output_attentions: Any = None,
        output_hidden_states: Any = None,
        return_dict: Any = None,
        task_ids: Any = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's forward pass with the active adapters."""
        return self._call(
            kwargs,
            input_ids=input_ids,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            output_attentions=output_attentions,
            output_hidden_states=output_hidden_states,
            return_dict=return_dict,
        )
