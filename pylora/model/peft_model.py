"""PeftModel: a base model with its adapters, as a user of PEFT knows it.

The adapters themselves are handled by `LoraModel` (`PeftModel.base_model`), their files by `AdapterFiles`; this class
adds the active adapter as one name, and the interface that training and inference code calls. Signatures are those of
PEFT's `peft_model.py`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from pylora.checkpoint.keys import LORA_PREFIX, checked_adapter_name
from pylora.config import LoraConfig, PeftConfig
from pylora.model.adapter_files import AdapterFiles
from pylora.model.lora_model import LoraModel
from pylora.model.peft_class import AnswersAsPeft
from pylora.model.status import (
    TunerLayerStatus,
    TunerModelStatus,
    adapters_enabled,
    get_layer_status,
    get_model_status,
)
from pylora.model.trainable import count_parameters

if TYPE_CHECKING:
    import torch


class PeftModel(AnswersAsPeft, AdapterFiles, nn.Module):
    """A base model with LoRA adapters.

    The base model is changed in place: targeted modules are replaced by layers that hold them. If that fails, it is
    left as it was. Attributes that this class does not have are the base model's.

    Args:
        model: the base model.
        peft_config: configuration of the first adapter.
        adapter_name: its name; it becomes a submodule's and a folder's name.
        autocast_adapter_dtype: keep adapter weights in f32 where the base layer is f16, bf16 or float8.
        low_cpu_mem_usage: create the adapter on the meta device, to be filled by a load.

    Attributes:
        base_model: the `LoraModel`; the base model is `base_model.model`.
        active_adapter: name of the adapter set last; `base_model.active_adapters` may be several.
        peft_config: adapter name -> configuration.

    Raises:
        ValueError: a configuration of another method than LoRA, or an adapter name that is not a plain name.
    """

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig,
        adapter_name: str = "default",
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
    ) -> None:
        super().__init__()
        checked_adapter_name(adapter_name)
        require_lora(peft_config)
        self.active_adapter: str = adapter_name
        self.peft_type = peft_config.peft_type
        # Arguments meant for adapters, which the base model's forward does not know.
        self.special_peft_forward_args = set(_ADAPTER_ARGUMENTS)
        self._is_prompt_learning = False
        self._adapters_disabled = False

        # Asked now, as the answer takes a look at every module.
        checkpoints_activations = _checkpoints_activations(model)
        self.base_model = LoraModel(
            model, {adapter_name: peft_config}, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage
        )
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        if checkpoints_activations:
            self.prepare_model_for_gradient_checkpointing(model)
        # Models with this field can split products as tensor parallelism does, which changes their rounding.
        config: Any = getattr(model, "config", None)
        if hasattr(config, "pretraining_tp"):
            config.pretraining_tp = 1

    @property
    def peft_config(self) -> dict[str, PeftConfig]:
        """Adapter name -> configuration."""
        return self.base_model.peft_config

    @peft_config.setter
    def peft_config(self, value: dict[str, PeftConfig]) -> None:
        self.base_model.peft_config = value

    @property
    def active_adapters(self) -> list[str]:
        """Names of the adapters that take part in the forward pass."""
        return self.base_model.active_adapters

    @property
    def active_peft_config(self) -> PeftConfig:
        """Configuration of `active_adapter`."""
        return self.peft_config[self.active_adapter]

    @property
    def has_active_enabled_adapter(self) -> bool:
        """False inside `disable_adapter()`."""
        return not self._adapters_disabled or not self.active_adapters

    @property
    def modules_to_save(self) -> set[str] | None:
        """Names in any adapter's `modules_to_save`; None if there are none."""
        names = {
            name for config in self.peft_config.values() for name in getattr(config, "modules_to_save", None) or ()
        }
        return names or None

    @property
    def base_model_torch_dtype(self) -> torch.dtype | None:
        """The base model's dtype, None if it does not tell."""
        return getattr(self.base_model, "dtype", None)

    def __getattr__(self, name: str) -> Any:
        modules = self.__dict__.get("_modules")
        if modules is not None and name in modules:  # what each call asks for: the way through torch takes 1 us
            return modules[name]
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_model":  # not set yet: falling through to it would never end
                raise
            return getattr(self.base_model, name)

    def get_base_model(self) -> nn.Module:
        """The base model, with adapter layers in it."""
        return self.base_model.model

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        hooks = getattr(self.base_model, "_enable_peft_forward_hooks", None)
        if hooks is None or not self.has_active_enabled_adapter:
            yield
        else:
            with hooks(*args, **kwargs):
                yield

    def _without_adapter_arguments(self, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in kwargs.items() if key not in self.special_peft_forward_args}

    def _directly_called(self, kwargs: dict[str, Any]) -> nn.Module | None:
        """The base model, if a call with these arguments comes to calling it with them; else None.

        It does when none of them is meant for adapters, and neither this object's class nor the tuner's has methods of
        its own for what happens around the call. Two context managers that do nothing would take 15 us.
        """
        attributes = self.__dict__
        if kwargs and not (
            _ADAPTER_ARGUMENTS.isdisjoint(kwargs) and kwargs.keys().isdisjoint(self.special_peft_forward_args)
        ):
            return None
        cls, tuner = type(self), attributes["_modules"].get("base_model")
        if (
            type(tuner) is not LoraModel
            or cls._enable_peft_forward_hooks is not _ENABLE_HOOKS
            or cls._without_adapter_arguments is not _WITHOUT_ADAPTER_ARGUMENTS
            or cls.get_base_model is not _GET_BASE_MODEL
            or LoraModel._enable_peft_forward_hooks is not _PASS_TO_LAYERS
            or "_enable_peft_forward_hooks" in tuner.__dict__
            or "_enable_peft_forward_hooks" in attributes
            or "_without_adapter_arguments" in attributes
            or "get_base_model" in attributes
        ):
            return None
        return tuner._modules.get("model")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward pass with the active adapters.

        `adapter_names`, one name per row of the batch, chooses adapters row by row where the layers support it.
        """
        base = self._directly_called(kwargs)
        if base is not None:
            return base(*args, **kwargs)
        with self._enable_peft_forward_hooks(*args, **kwargs):
            return self.get_base_model()(*args, **self._without_adapter_arguments(kwargs))

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's `generate` with the active adapters; `adapter_names` as for `forward`."""
        with self._enable_peft_forward_hooks(*args, **kwargs):
            base: Any = self.get_base_model()
            return base.generate(*args, **self._without_adapter_arguments(kwargs))

    def prepare_model_for_gradient_checkpointing(self, model: nn.Module) -> None:
        """Makes the embeddings' output require a gradient: a checkpointed block whose input does not would get none."""
        if any(getattr(model, flag, False) for flag in ("is_loaded_in_8bit", "is_loaded_in_4bit", "is_quantized")):
            return  # prepare_model_for_kbit_training has done it
        enable: Any = getattr(model, "enable_input_require_grads", None)
        embeddings: Any = getattr(model, "get_input_embeddings", None)
        if enable is not None:
            enable()
        elif embeddings is not None:
            embeddings().register_forward_hook(_require_grad)

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """(numbers in trainable parameters, numbers in all parameters), adapters included."""
        return count_parameters(self)

    def print_trainable_parameters(self) -> None:
        """Prints how many of the parameters are trained."""
        trainable, total = self.get_nb_trainable_parameters()
        share = 100 * trainable / total if total else 0.0
        print(f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {share:.4f}")

    def add_adapter(
        self,
        adapter_name: str,
        peft_config: PeftConfig,
        low_cpu_mem_usage: bool = False,
        autocast_adapter_dtype: bool = True,
    ) -> None:
        """Adds a new, untrained adapter. It is neither active nor trainable until `set_adapter`.

        Args:
            adapter_name: its name, not yet taken.
            peft_config: its configuration.
            low_cpu_mem_usage: create it on the meta device, to be filled by a load.
            autocast_adapter_dtype: keep it in f32 where the base layer is f16, bf16 or float8.

        Raises:
            ValueError: a name that is taken or not a plain name, a configuration of another method.
        """
        checked_adapter_name(adapter_name)
        if adapter_name in self.peft_config:
            raise ValueError(f"Adapter with name '{adapter_name}' already exists.")
        require_lora(peft_config)
        warn_if_name_in_prefix(adapter_name)
        self.peft_config[adapter_name] = peft_config
        try:
            self.base_model.inject_adapter(self.base_model.model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage)
        except BaseException:
            self.peft_config.pop(adapter_name, None)
            raise
        self.base_model._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    def delete_adapter(self, adapter_name: str) -> None:
        """Removes an adapter. If it was the active one, another takes its place, with a warning.

        Raises:
            ValueError: no adapter of that name, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        self.base_model.delete_adapter(adapter_name=adapter_name)
        if len(self.active_adapters) == 1:
            self.active_adapter = self.active_adapters[0]

    def set_adapter(self, adapter_name: str, inference_mode: bool = False) -> None:
        """Makes one adapter the active one, and trainable unless `inference_mode`; the others are frozen.

        `base_model.set_adapter` also takes a list of names.

        Raises:
            ValueError: no adapter of that name.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} not found.")
        self.base_model.set_adapter(adapter_name, inference_mode=inference_mode)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Makes adapters trainable or not, whether they are active or not."""
        self.base_model.set_requires_grad(adapter_names=adapter_names, requires_grad=requires_grad)

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """A context in which the model computes as its base model does (biases trained along stay trained)."""
        was_disabled = self._adapters_disabled
        enabled = adapters_enabled(self.base_model)
        if enabled == "irregular":
            warnings.warn(
                "The model contains some adapter layers that are enabled and others that are disabled. This is most "
                "likely unintentional. After exiting the disable_adapter context, all adapters will be enabled",
                stacklevel=2,
            )
        try:
            self.base_model.disable_adapter_layers()
            self._adapters_disabled = True
            yield
        finally:
            if enabled is not False:
                self.base_model.enable_adapter_layers()
            self._adapters_disabled = was_disabled

    def get_layer_status(self) -> list[TunerLayerStatus]:
        """The state of each adapter layer."""
        return get_layer_status(self)

    def get_model_status(self) -> TunerModelStatus:
        """The state of the adapters as a whole."""
        return get_model_status(self)

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter adds a product to each weight, so that it can be written as plain LoRA."""
        return self.base_model.supports_lora_conversion()


# Arguments for the layers, and the methods that a call goes through, as they are before anyone replaces them.
_ADAPTER_ARGUMENTS = frozenset(("adapter_names", "alora_offsets"))
_ENABLE_HOOKS = PeftModel._enable_peft_forward_hooks
_WITHOUT_ADAPTER_ARGUMENTS = PeftModel._without_adapter_arguments
_GET_BASE_MODEL = PeftModel.get_base_model
_PASS_TO_LAYERS = LoraModel._enable_peft_forward_hooks


def require_lora(config: Any) -> None:
    """Raises ValueError for the configuration of another method."""
    if not isinstance(config, LoraConfig):
        kind = getattr(config, "peft_type", None) or type(config).__name__
        raise ValueError(f"peft_config: expected a LoraConfig (pylora is LoRA), got {kind}")


def warn_if_name_in_prefix(adapter_name: str) -> None:
    """Such a name makes PEFT, which finds keys by substring, take adapter weights for missing."""
    if adapter_name in LORA_PREFIX:
        warnings.warn(
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{LORA_PREFIX}'. "
            "This may lead to reinitialization of the adapter weights during loading.",
            stacklevel=2,
        )


def _checkpoints_activations(model: nn.Module) -> bool:
    """Whether gradient checkpointing is on; True for a model that does not tell, as the preparation costs little."""
    for name in ("is_activation_checkpointing", "is_gradient_checkpointing"):
        if hasattr(type(model), name):
            return bool(getattr(model, name))
    return bool(getattr(model, "is_gradient_checkpointing", True))


def _require_grad(module: nn.Module, args: Any, output: Tensor) -> None:
    output.requires_grad_(True)
