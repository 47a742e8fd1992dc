"""BaseTuner: a model with adapters in it, and everything that can be done to them."""

from __future__ import annotations

import dataclasses
import warnings
from abc import ABC
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import nn

from pylora.config import PeftConfig
from pylora.layers import BaseTunerLayer, tuner_layers, walk
from pylora.layers.undo import all_or_nothing, for_good
from pylora.model import lifecycle
from pylora.model.alora import alora_offsets_passed
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper
from pylora.model.fused_targets import targets_of_fused_experts
from pylora.model.inject import Injection
from pylora.model.mixed_batch import adapter_names_passed
from pylora.model.tied import record_broken_tie, tied_target_modules, warn_tied_merge
from pylora.model.tying import tie_factors
from pylora.targeting.tied import module_names_tied_with_embedding

_NO_CONFIG = {"model_type": "custom"}


class BaseTuner(nn.Module, ABC):
    """Wraps a model and puts adapters into it, in place.

    Args:
        model: The base model; it is changed.
        peft_config: One configuration, or configurations by adapter name of which the named one is injected.
        adapter_name: The adapter to inject; it becomes the active one.
        low_cpu_mem_usage: Make the adapter's weights on the meta device, for a load that follows.
        state_dict: If given, its keys choose the modules instead of the configuration.

    Attributes:
        model: The base model.
        peft_config: Configuration by adapter name; also set on the base model.
        active_adapter: Name or names of the active adapters.
        targeted_module_names: Names of all modules that have adapters.
        prefix: Beginning of the attribute names that hold adapter weights.

    Raises:
        ValueError: The configuration does not fit the model, see `inject_adapter`. The model is then unchanged.
    """

    prefix: str
    tuner_layer_cls: type[BaseTunerLayer] = BaseTunerLayer
    target_module_mapping: ClassVar[dict[str, Any]] = {}
    # Whether layers of the method share weights that the tuner holds, so that it cannot be injected without one.
    uses_shared_state: bool = False

    def __init__(
        self,
        model: nn.Module,
        peft_config: PeftConfig | dict[str, PeftConfig],
        adapter_name: str,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.targeted_module_names: list[str] = []
        self.targeted_parameter_names: list[str] = []
        added = {adapter_name: peft_config} if isinstance(peft_config, PeftConfig) else peft_config
        # The attribute of a model that was wrapped before is seen through `__getattr__`.
        known: dict[str, PeftConfig] | None = getattr(self, "peft_config", None)
        if known is not None:
            warnings.warn(
                "Already found a `peft_config` attribute in the model. This will lead to having multiple adapters "
                "in the model. Make sure to know what you are doing!",
                stacklevel=2,
            )
        before = dict(known or {})
        if known is None:
            self.peft_config = added
        else:
            known.update(added)
            self.peft_config = known
        self.active_adapter: str | list[str] = adapter_name
        try:
            self.inject_adapter(model, adapter_name, low_cpu_mem_usage=low_cpu_mem_usage, state_dict=state_dict)
        except BaseException:
            if known is not None:
                known.clear()
                known.update(before)
            raise
        self.model.peft_config = self.peft_config  # type: ignore[assignment]

    @property
    def active_adapters(self) -> list[str]:
        """The active adapters as a list."""
        active = self.active_adapter
        return [active] if isinstance(active, str) else active

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The base model's forward, adapters in place."""
        model = self._modules.get("model")  # `self.model` takes 1 us
        return (self.model if model is None else model)(*args, **kwargs)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        # A copied parameter has memory of its own, also where the original was a view of another.
        for name, config in self.peft_config.items():
            tie_factors(self.model, config, name)

    def __getattr__(self, name: str) -> Any:
        """What this module does not have, the base model is asked for."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "model":  # not set yet, as while unpickling
                raise
            return getattr(self.model, name)

    def inject_adapter(
        self,
        model: nn.Module,
        adapter_name: str,
        autocast_adapter_dtype: bool = True,
        low_cpu_mem_usage: bool = False,
        state_dict: dict[str, torch.Tensor] | None = None,
    ) -> None:
        """Put the adapter that `peft_config[adapter_name]` describes into the model.

        Args:
            model: The base model.
            adapter_name: The adapter. If it is not active it is added frozen.
            autocast_adapter_dtype: As in PEFT without effect here: `_cast_adapter_dtype` casts.
            low_cpu_mem_usage: Make its weights on the meta device, for a load that follows.
            state_dict: If given, its keys choose the modules instead of the configuration.

        Raises:
            ValueError: Unsupported field or module type, no module matches, or a second adapter with bias.
            KeyError: The name cannot be a key of a ModuleDict ("a.b", "keys", "").
            The model and the configuration are then unchanged.
        """
        config = self.peft_config[adapter_name]
        with targets_of_fused_experts(config, model):
            self._check_new_adapter_config(config)
            targets = Injection(
                model=model,
                config=config,
                adapter_name=adapter_name,
                active_adapters=self.active_adapters,
                low_cpu_mem_usage=low_cpu_mem_usage,
                state_dict_keys=None if state_dict is None else list(state_dict),
            ).run()
        _extend_unique(self.targeted_module_names, targets.names)
        _extend_unique(self.targeted_parameter_names, [target.key for target in targets.parameters])
        self.active_adapter = list(self.active_adapters)

    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        """Raise ValueError when the configuration cannot stand beside those of the other adapters."""
        if len(self.peft_config) <= 1:
            return
        if sum(getattr(other, "bias", "none") != "none" for other in self.peft_config.values()) > 1:
            raise ValueError(
                f"{type(self).__name__} supports only 1 adapter with bias. When using multiple adapters, "
                "set bias to 'none' for all adapters."
            )

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Turn the adapter's narrow floating-point weights into f32 ones, see `lifecycle.cast_adapter_dtype`."""
        lifecycle.cast_adapter_dtype(self.model, adapter_name, autocast_adapter_dtype)
        # Casting, like loading, may have given tied factors memory of their own.
        tie_factors(self.model, self.peft_config.get(adapter_name), adapter_name)

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        """Make one or several adapters the active ones, see `lifecycle.set_adapter`."""
        lifecycle.set_adapter(self.model, adapter_name, inference_mode=inference_mode, layer_cls=self.tuner_layer_cls)
        self.active_adapter = adapter_name

    def set_requires_grad(self, adapter_names: str | Sequence[str], requires_grad: bool = True) -> None:
        """Make adapters trainable or frozen, active or not."""
        lifecycle.set_requires_grad(self.model, adapter_names, requires_grad)

    def enable_adapter_layers(self) -> None:
        """Use the active adapters again, and make them trainable."""
        lifecycle.enable_adapters(self.model, True)

    def disable_adapter_layers(self) -> None:
        """Compute as the base model does. Warns when an active adapter has trained biases, which stay in place."""
        for name in self.active_adapters:
            bias = getattr(self.peft_config[name], "bias", "none")
            if bias != "none":
                warnings.warn(
                    f"Careful, disabling adapter layers with bias configured to be '{bias}' does not produce the "
                    "same output as the base model would without adaption.",
                    stacklevel=2,
                )
        lifecycle.enable_adapters(self.model, False)

    def delete_adapter(self, adapter_name: str) -> None:
        """Remove an adapter. If no active one is left, each layer activates its first remaining one, with a warning.

        Args:
            adapter_name: The adapter to remove.

        Raises:
            ValueError: There is no such adapter, or it is merged.
        """
        if adapter_name not in self.peft_config:
            raise ValueError(f"Adapter {adapter_name} does not exist")
        lifecycle.check_not_merged(self.model, adapter_name)
        del self.peft_config[adapter_name]
        active = lifecycle.delete_adapter(self.model, adapter_name, self.prefix, layer_cls=self.tuner_layer_cls)
        self.active_adapter = active or []

    @staticmethod
    def get_model_config(model: nn.Module) -> dict[str, Any]:
        """The model's `config` as a dictionary, `{"model_type": "custom"}` without one."""
        config: Any = getattr(model, "config", _NO_CONFIG)
        if hasattr(config, "to_dict"):
            return config.to_dict()
        if dataclasses.is_dataclass(config) and not isinstance(config, type):
            return dataclasses.asdict(config)
        return config

    def _check_merge_allowed(self) -> None:
        """Raise ValueError when adapters cannot be merged into this model; warn when they change a tied weight."""
        if any(getattr(config, "layer_replication", None) for config in self.peft_config.values()):
            raise ValueError("Cannot merge LORA layers when base model layers are replicated")
        warn_tied_merge(self._get_tied_target_modules(self.model))

    def _get_module_names_tied_with_embedding(self) -> list[str]:
        return module_names_tied_with_embedding(self.model)

    def _get_tied_target_modules(self, model: nn.Module) -> list[str]:
        return tied_target_modules(self.get_model_config(model), self.targeted_module_names)

    def _check_merge(self, layers: Iterable[BaseTunerLayer], safe_merge: bool, adapter_names: list[str] | None) -> None:
        """Raise now what merging one of the layers would raise, so that none is merged when one cannot be."""
        for layer in layers:
            check = getattr(layer, "check_merge", None)
            if check is not None:
                check(safe_merge=safe_merge, adapter_names=adapter_names)

    def merge_adapter(self, adapter_names: list[str] | None = None, safe_merge: bool = False) -> None:
        """Add adapters' deltas to the base weights; the adapters stay, for `unmerge_adapter`.

        Args:
            adapter_names: Adapters to merge; None means the active ones.
            safe_merge: Refuse values that are not finite.

        Raises:
            ValueError: `safe_merge` and a merged value would be NaN or infinite.
            RuntimeError: An adapter has a bias and its base layer has none.
            TypeError: `adapter_names` is a string.
            Every layer of the model is then as it was.
        """
        self._check_merge_allowed()
        layers = tuner_layers(self.model)
        self._check_merge(layers, safe_merge, adapter_names)
        with all_or_nothing(layers):
            for layer in layers:
                _merge(layer, safe_merge, adapter_names)

    def unmerge_adapter(self) -> None:
        """Take all merged deltas out of the base weights; warns for layers that hold none.

        Raises:
            ValueError: A base weight has been changed since the merge. Every layer of the model is then as it was.
        """
        layers = tuner_layers(self.model)
        with all_or_nothing(layers):
            for layer in reversed(layers):  # layers may share a weight: the last merge goes first
                if layer.merged or not getattr(layer, "_tied_layers", None):
                    layer.unmerge()

    def merge_and_unload(
        self, progressbar: bool = False, safe_merge: bool = False, adapter_names: list[str] | None = None
    ) -> nn.Module:
        """Merge adapters for good and take pylora's modules out of the model.

        Args:
            progressbar: Show one.
            safe_merge: Refuse values that are not finite.
            adapter_names: Adapters to merge; None means the active ones. The others are dropped.

        Returns:
            The base model, of its original structure.

        Raises:
            As `merge_adapter`; the model is then as it was.
        """
        return self._unload_and_optionally_merge(
            progressbar=progressbar, safe_merge=safe_merge, adapter_names=adapter_names
        )

    def unload(self) -> nn.Module:
        """Take pylora's modules out of the model without merging, and return the base model."""
        return self._unload_and_optionally_merge(merge=False)

    def _unload_and_optionally_merge(
        self,
        merge: bool = True,
        progressbar: bool = False,
        safe_merge: bool = False,
        adapter_names: list[str] | None = None,
    ) -> nn.Module:
        if merge:
            self._check_merge_allowed()
            self._check_merge(tuner_layers(self.model), safe_merge, adapter_names)
        sites = _wrappers(self.model)
        progress = None
        if progressbar:
            from tqdm import tqdm

            progress = tqdm(total=len(sites), desc=f"Unloading {'and merging ' if merge else ''}model")
        while sites:
            _, module, parent, child_name = sites.pop()
            with for_good():
                replacement = _unload(module, merge, safe_merge, adapter_names)
            setattr(parent, child_name, replacement)
            sites.extend(_wrappers(replacement))
            if progress is not None:
                progress.update()

        # A model that is wrapped again later must not be taken for one that has adapters.
        if hasattr(self.model, "peft_config"):
            del self.model.peft_config
        if merge:
            record_broken_tie(self.model, self.get_model_config(self.model))
        return self.model

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether the adapter can be rewritten as plain LoRA on every layer."""
        return all(layer.supports_lora_conversion(adapter_name) for layer in tuner_layers(self.model))

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """The context for a forward or generate with these arguments: it passes layers what is meant for adapters."""
        num_beams = kwargs.get("num_beams")
        with (
            alora_offsets_passed(self.model, kwargs.get("alora_offsets"), num_beams=num_beams),
            adapter_names_passed(self.model, self.training, kwargs.get("adapter_names"), num_beams=num_beams),
        ):
            yield


def _merge(layer: Any, safe_merge: bool, adapter_names: list[str] | None) -> None:
    done = getattr(layer, "is_merged_by_partner", None)
    if done is None or not done(adapter_names):
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)


def _unload(module: Any, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
    """What takes the place of a tuner layer or wrapper."""
    if hasattr(module, "unload_and_optionally_merge_module"):
        return module.unload_and_optionally_merge_module(
            merge=merge, safe_merge=safe_merge, adapter_names=adapter_names
        )
    if merge:
        _merge(module, safe_merge, adapter_names)
    return module.get_base_layer()


def _wrappers(root: nn.Module) -> list[Any]:
    """The outermost tuner layers and wrappers of whole modules in `root`, the first one last."""
    visits = walk(root, enter_tuner_layers=False)
    found = [visit for visit in visits if isinstance(visit.module, (BaseTunerLayer, AuxiliaryTrainingWrapper))]
    return found[::-1]


def _extend_unique(names: list[str], new: Iterable[str]) -> None:
    known = set(names)
    names.extend(name for name in new if name not in known)
