"""Adapters to and from disk: the methods of `PeftModel` that read and write files.

Everything is checked before the model is changed, and everything is written before a file is replaced. Data of a large
file is read while the layers get their adapter; if that fails, the model gets back what it had.
"""

from __future__ import annotations

import copy
import logging
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import nn

from pylora.checkpoint.convert import check_convertible, config_of_converted, relative_to_initial
from pylora.checkpoint.extract import get_peft_model_state_dict
from pylora.checkpoint.files import StagedFiles, StrPath, adapter_folder, split_hub_arguments, staged_files
from pylora.checkpoint.keys import LORA_PREFIX, checked_adapter_name
from pylora.checkpoint.load import plan_load
from pylora.checkpoint.read import ArrivingWeights, load_peft_weights, start_loading
from pylora.checkpoint.save import stage_weights, warn_if_shadowed
from pylora.config import PeftConfig
from pylora.config.support import as_trained
from pylora.errors import UnsupportedFeatureError
from pylora.init import base_updates_at_end, draws_left_out
from pylora.model.lifecycle import eval_mode, initialise_left_out
from pylora.model.model_card import CARD_NAME, model_card_text
from pylora.model.snapshot import ModelSnapshot

if TYPE_CHECKING:
    import torch
    from torch.nn.modules.module import _IncompatibleKeys

    from pylora.model.peft_model import PeftModel

logger = logging.getLogger(__name__)

# These initialisations take a part out of the base weight, which another adapter then misses.
_INITS_THAT_CHANGE_THE_BASE = {"pissa": "PiSSA", "corda": "CorDA", "olora": "OLoRA"}


class AdapterFiles:
    """Mixin of `PeftModel`: `save_pretrained`, `from_pretrained`, `load_adapter` and what belongs to them."""

    def save_pretrained(
        self,
        save_directory: StrPath,
        safe_serialization: bool = True,
        selected_adapters: list[str] | None = None,
        save_embedding_layers: bool | Literal["auto"] = "auto",
        is_main_process: bool = True,
        path_initial_model_for_weight_conversion: str | None = None,
        **kwargs: Any,
    ) -> None:
        """Writes adapters as PEFT does: `adapter_model.safetensors`, `adapter_config.json` and a README.md.

        "default" goes into `save_directory`, any other adapter into the subfolder of its name. Either all files are
        written or, on an error, none is: older ones stay whole. The configuration is stored with `inference_mode=True`;
        the one in memory does not change.

        Args:
            save_directory: made if it does not exist.
            safe_serialization: False writes `adapter_model.bin` (pickle) instead of safetensors.
            selected_adapters: which adapters; all by default.
            save_embedding_layers: True, False, or "auto": when they are targeted or were resized.
            is_main_process: False writes nothing, for all processes but one of a distributed job.
            path_initial_model_for_weight_conversion: folder of the same adapter, saved before training. What is
                written is then the change since: a plain LoRA of twice the rank for the original base weights, where
                PiSSA, OLoRA and their like have changed the base weights in memory.
            kwargs: `state_dict`, the model's tensors where the caller has gathered them (FSDP, DeepSpeed). Others are
                accepted as PEFT does, and unused.

        Raises:
            ValueError: `save_directory` is a file, an unknown name in `selected_adapters`, or the adapter cannot be
                converted: rsLoRA with rank or alpha patterns, or an initial adapter that does not fit.
        """
        model: Any = self
        if os.path.isfile(save_directory):
            raise ValueError(f"Provided path ({os.fspath(save_directory)}) should be a directory, not a file")
        names = list(model.peft_config) if selected_adapters is None else selected_adapters
        if any(name not in model.peft_config for name in names):
            raise ValueError(
                f"You passed an invalid `selected_adapters` arguments, current supported adapter names are "
                f"{list(model.peft_config)} - got {names}."
            )
        initial = None
        if path_initial_model_for_weight_conversion is not None:
            for name in names:
                check_convertible(model.peft_config[name])
            initial = load_peft_weights(path_initial_model_for_weight_conversion)
        folders = {name: adapter_folder(save_directory, name) for name in names}
        with staged_files() as stage:
            for name, folder in folders.items():
                # Every process takes part: gathering sharded tensors is a collective operation.
                tensors = get_peft_model_state_dict(
                    model, kwargs.get("state_dict"), adapter_name=name, save_embedding_layers=save_embedding_layers
                )
                if is_main_process:
                    config = model.peft_config[name]
                    if initial is not None:
                        tensors, config = relative_to_initial(tensors, initial), config_of_converted(config)
                    warn_if_shadowed(folder, safe_serialization)
                    stage_weights(tensors, stage.folder(folder), safe_serialization)
                    _stage_config(model, config, stage.folder(folder))
            if is_main_process:
                _stage_model_card(model, stage, Path(save_directory))

    @classmethod
    def from_pretrained(
        cls,
        model: nn.Module,
        model_id: StrPath,
        adapter_name: str = "default",
        is_trainable: bool = False,
        config: PeftConfig | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> PeftModel:
        """Puts a saved adapter onto a base model.

        If anything is wrong with the files, the base model is left as it was.

        Args:
            model: the base model; it is changed in place.
            model_id: folder that `save_pretrained` wrote, or a repository id on the hub.
            adapter_name: what to call the adapter; it need not be the name it was saved under.
            is_trainable: load it for training; by default it is frozen and the model is set to `eval()`.
            config: configuration to use instead of the file's.
            autocast_adapter_dtype: keep adapter weights in f32 where the base layer is f16, bf16 or float8.
            ephemeral_gpu_offload: stored in the configuration's `runtime_config`.
            low_cpu_mem_usage: create the adapter without initial values; the stored tensors then take their place.
            key_mapping: regular expressions to rename checkpoint keys by.
            kwargs: `subfolder`, `revision`, `token` and other arguments of `huggingface_hub.hf_hub_download`;
                `torch_device` to read the tensors to (each layer's own device by default);
                `ignore_mismatched_sizes` to leave out tensors of other shapes.

        Returns:
            a `PeftModel`, or its subclass for the configuration's `task_type`. Adapter tensors that the checkpoint
            lacks keep their initial values, with a warning.

        Raises:
            ValueError: no configuration or weights there, or `config` is no PeftConfig.
            RuntimeError: tensors of other shapes than the adapter's.
            KeyError: a module of `modules_to_save` is not in the checkpoint.
            safetensors.SafetensorError: a truncated or corrupt weights file.
        """
        from pylora.model.task_models import peft_model_class

        default: Any = cls
        checked_adapter_name(adapter_name)
        _refuse_offloaded(model)
        if config is None:
            config = PeftConfig.from_pretrained(model_id, **kwargs)
        elif not isinstance(config, PeftConfig):
            raise ValueError(f"The input config must be a PeftConfig, got {config.__class__}")
        if key_mapping is None:
            key_mapping = getattr(model, "_checkpoint_conversion_mapping", None)
        weights = _start_reading(model_id, kwargs.pop("torch_device", None), key_mapping, kwargs)

        old_config = copy.copy(config.__dict__)
        config.inference_mode = not is_trainable
        if hasattr(config, "runtime_config"):
            config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        before = ModelSnapshot(model, adapter_name)
        try:
            # The base weights change only once the adapter's tensors fit; see `base_updates_at_end`.
            with base_updates_at_end(), as_trained(config), draws_left_out():
                wrapped = peft_model_class(config, default)(
                    model,
                    config,
                    adapter_name,
                    autocast_adapter_dtype=autocast_adapter_dtype,
                    low_cpu_mem_usage=low_cpu_mem_usage,
                )
                result = wrapped._fill_adapter(
                    adapter_name,
                    weights,
                    autocast_adapter_dtype,
                    low_cpu_mem_usage,
                    kwargs.get("ignore_mismatched_sizes"),
                    is_new=True,
                )
        except BaseException:
            before.restore(adapter_name)
            config.__dict__.update(old_config)
            raise
        if not is_trainable:
            wrapped.eval()
        if result.missing_keys:
            _warn_about_missing_keys(adapter_name, result.missing_keys)
        return wrapped

    def load_adapter(
        self,
        model_id: StrPath,
        adapter_name: str,
        is_trainable: bool = False,
        torch_device: str | torch.device | None = None,
        autocast_adapter_dtype: bool = True,
        ephemeral_gpu_offload: bool = False,
        low_cpu_mem_usage: bool = False,
        key_mapping: Mapping[str, str] | None = None,
        **kwargs: Any,
    ) -> _IncompatibleKeys:
        """Adds a saved adapter beside the others, or fills the adapter that already has this name.

        The new adapter is not active until `set_adapter`. The model is set to `eval()` unless `is_trainable`. If
        anything is wrong with the files, the model is left as it was. Arguments and errors are `from_pretrained`'s.

        Returns:
            named tuple: the adapter's `missing_keys`, and `unexpected_keys`.
        """
        model: Any = self
        checked_adapter_name(adapter_name)
        is_new = adapter_name not in model.peft_config
        config = None
        if is_new:
            config = PeftConfig.from_pretrained(model_id, **split_hub_arguments(kwargs)[0])
            _warn_about_shared_base(config, model.peft_config.values())
            config.inference_mode = not is_trainable
            if hasattr(config, "runtime_config"):
                config.runtime_config.ephemeral_gpu_offload = ephemeral_gpu_offload
        weights = _start_reading(model_id, torch_device, key_mapping, kwargs)
        tuner = model.base_model
        before = ModelSnapshot(tuner.model) if is_new else None
        active, targeted = tuner.active_adapter, list(tuner.targeted_module_names)
        try:
            with base_updates_at_end(), as_trained(config), draws_left_out():
                if config is not None:
                    model.add_adapter(
                        adapter_name,
                        config,
                        low_cpu_mem_usage=low_cpu_mem_usage,
                        autocast_adapter_dtype=autocast_adapter_dtype,
                    )
                result = self._fill_adapter(
                    adapter_name,
                    weights,
                    autocast_adapter_dtype,
                    low_cpu_mem_usage,
                    kwargs.get("ignore_mismatched_sizes"),
                    is_new=is_new,
                )
        except BaseException:
            if before is not None:
                before.restore(adapter_name)
                tuner.active_adapter, tuner.targeted_module_names = active, targeted
            raise
        if is_new and is_trainable:
            model.set_requires_grad(adapter_name)
        if not is_trainable:
            eval_mode(model)
        return result

    def _fill_adapter(
        self,
        adapter_name: str,
        weights: ArrivingWeights,
        autocast_adapter_dtype: bool,
        low_cpu_mem_usage: bool,
        ignore_mismatched_sizes: bool | None,
        is_new: bool,
    ) -> _IncompatibleKeys:
        model: Any = self
        weights.wait()
        plan = plan_load(model, weights.tensors, adapter_name, ignore_mismatched_sizes=bool(ignore_mismatched_sizes))
        if is_new:
            lacking = [*plan.missing, *(key for key, _, _ in plan.mismatched)]
            initialise_left_out(model, adapter_name, lacking, model.peft_config[adapter_name].init_lora_weights)
        is_tied = bool(getattr(model.peft_config[adapter_name], "target_modules_to_tie", None))
        result = plan.apply(low_cpu_mem_usage=low_cpu_mem_usage, to_keep=is_new and not is_tied)
        if low_cpu_mem_usage or not is_new:  # else the tensors have been copied into cast ones
            tuner = model.base_model
            tuner._cast_adapter_dtype(adapter_name=adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)
        return result

    def create_or_update_model_card(self, output_dir: StrPath) -> None:
        """Writes README.md in `output_dir`, or brings the one there up to date: library, base model, tags, versions."""
        with staged_files() as stage:
            _stage_model_card(self, stage, Path(output_dir))

    def push_to_hub(self, repo_id: str, **kwargs: Any) -> str:
        """Uploads what `save_pretrained` writes to a repository on the Hugging Face Hub, made if it does not exist.

        Args:
            repo_id: "owner/name".
            kwargs: `private` and `token` of `HfApi.create_repo`; `commit_message`, `commit_description`, `revision` and
                `create_pr` of `HfApi.upload_folder`; the others go to `save_pretrained`.

        Returns:
            the commit's URL.
        """
        import tempfile

        from huggingface_hub import HfApi

        upload_names = ("commit_message", "commit_description", "revision", "create_pr")
        upload = {name: kwargs.pop(name) for name in upload_names if name in kwargs}
        upload.setdefault("commit_message", "Upload adapter")
        api = HfApi(token=kwargs.pop("token", None))
        private = kwargs.pop("private", None)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, **kwargs)
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **upload))


def _stage_config(model: Any, config: PeftConfig, folder: Path) -> None:
    saved = copy.copy(config)
    saved.inference_mode = True
    base = model.get_base_model()
    if saved.base_model_name_or_path is None:
        saved.base_model_name_or_path = base.__dict__.get("name_or_path") or None
    mapping = None
    if saved.task_type is None:
        mapping = {"base_model_class": type(base).__name__, "parent_library": type(base).__module__}
    saved.save_pretrained(folder, auto_mapping_dict=mapping)


def _stage_model_card(model: Any, stage: StagedFiles, folder: Path) -> None:
    text = model_card_text(model, existing=folder / CARD_NAME)
    if text is not None:
        (stage.folder(folder) / CARD_NAME).write_text(text, encoding="utf-8", newline="")


def _start_reading(
    model_id: StrPath, device: Any, key_mapping: Mapping[str, str] | None, kwargs: dict[str, Any]
) -> ArrivingWeights:
    hub, _ = split_hub_arguments(kwargs)
    return start_loading(model_id, device=device, key_mapping=key_mapping, **hub)


def _refuse_offloaded(model: nn.Module) -> None:
    """Weights that accelerate keeps on disk or beside an accelerator are not where a layer looks for them."""
    places = set(map(str, (getattr(model, "hf_device_map", None) or {}).values()))
    if "disk" in places or ("cpu" in places and len(places) > 1):
        raise UnsupportedFeatureError(
            f"model: expected weights in memory, got a model offloaded by accelerate (devices {sorted(places)})"
        )


def _warn_about_shared_base(new: PeftConfig, present: Any) -> None:
    inits = {getattr(config, "init_lora_weights", None) for config in (new, *present)}
    name = next((label for init, label in _INITS_THAT_CHANGE_THE_BASE.items() if init in inits), None)
    if name and present:
        warnings.warn(
            f"{name} changes the base weights of the model and should thus not be used with other adapters. "
            f"Consider converting the {name} adapter into a normal LoRA adapter.",
            stacklevel=2,
        )


def _warn_about_missing_keys(adapter_name: str, keys: list[str]) -> None:
    message = f"Found missing adapter keys while loading the checkpoint: {keys}."
    if adapter_name in LORA_PREFIX:
        message = (
            f"Adapter name '{adapter_name}' should not be contained in the prefix '{LORA_PREFIX}'. "
            f"This could be the potential reason for missing adapter keys. {message}"
        )
    warnings.warn(message, stacklevel=2)
