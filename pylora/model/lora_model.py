"""LoraModel: the tuner for LoRA."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch

from pylora.checkpoint.convert import relative_to_initial
from pylora.checkpoint.extract import get_peft_model_state_dict
from pylora.layers import LoraLayer
from pylora.model.base_tuner import BaseTuner
from pylora.targeting.defaults import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING


class LoraModel(BaseTuner):
    """A model with LoRA adapters (https://arxiv.org/abs/2106.09685). See `BaseTuner` for arguments and attributes.

    Example:
        >>> config = LoraConfig(r=8, lora_alpha=16, target_modules=["q", "v"])
        >>> lora_model = LoraModel(model, config, "default")
    """

    prefix: str = "lora_"
    tuner_layer_cls = LoraLayer
    target_module_mapping: ClassVar[dict[str, Any]] = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    def subtract_mutated_init(
        self,
        output_state_dict: Mapping[str, torch.Tensor],
        adapter_name: str,
        kwargs: Mapping[str, Any] | None = None,
    ) -> dict[str, torch.Tensor]:
        """A trained adapter relative to its start, for the base weight that PiSSA or OLoRA had not changed yet.

        Args:
            output_state_dict: The trained adapter's tensors by checkpoint key ("base_model.model. ...").
            adapter_name: An adapter of this model that holds the same adapter as it was before training.
            kwargs: `state_dict`, the model's tensors where the caller has gathered them.

        Returns:
            Factors of twice the rank; what is no factor stays as it is.

        Raises:
            ValueError: The two adapters do not fit each other.
            KeyError: There is no such adapter.
        """
        gathered = (kwargs or {}).get("state_dict")
        initial = get_peft_model_state_dict(self, state_dict=gathered, adapter_name=adapter_name)
        return relative_to_initial(output_state_dict, {f"base_model.{key}": value for key, value in initial.items()})

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")
    def _check_new_adapter_config(self, config: PeftConfig) -> None:
        super()._check_new_adapter_config(config)
        targets = set(getattr(config, "target_parameters", None) or ())
        for name, other in self.peft_config.items():
            others = set(getattr(other, "target_parameters", None) or ())
            if targets and others and targets != others:
                # Wrappers of several parameters nest, and the checkpoint's keys tell them apart by their depth alone.
                raise ValueError(
                    "When using multiple adapters with `target_parameters`, all adapters must target the same set of "
                    f"parameters, but got {sorted(targets)} for the new adapter and {sorted(others)} for adapter "
                    f"'{name}'."
                )

