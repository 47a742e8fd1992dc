"""transformers' Trainer where PEFT is not installed."""

from __future__ import annotations

from typing import Any

import torch
from transformers import Trainer
from transformers.utils import is_peft_available

from pylora.checkpoint.keys import LORA_PREFIX
from pylora.model.peft_model import PeftModel

# In the names of tensors that belong to adapters.
_ADAPTER_PARTS = (LORA_PREFIX, "modules_to_save.", "token_adapter.")


def adapter_tensors(model: PeftModel) -> dict[str, torch.Tensor]:
    """What a checkpoint has to hold of the model: the tensors of its adapters, and others that train.

    Args:
        model: The model.

    Returns:
        Name in `model.state_dict()` -> tensor, not copied.
    """
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name in trained or any(part in name for part in _ADAPTER_PARTS)
    }


class AdapterTrainer(Trainer):
    """A Trainer that saves the adapters of a `PeftModel` alone, with or without PEFT installed.

    transformers' own does so where PEFT is installed, and writes the whole base model into every checkpoint where it is
    not. This one then writes the adapter in PEFT's format, to be loaded by `PeftModel.from_pretrained`, and beside it
    `model.safetensors` with the adapters' tensors under the model's own names, from which training is resumed.

    Args:
        *args: Those of `transformers.Trainer`.
        **kwargs: Likewise.
    """

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        model = self._adapted()
        if model is None:
            super()._save(output_dir, state_dict)
            return
        tensors = adapter_tensors(model)
        if state_dict is not None:  # gathered from other processes
            tensors = {name: tensor for name, tensor in state_dict.items() if name in tensors}
        super()._save(output_dir, tensors)
        if self.args.should_save:
            model.save_pretrained(output_dir or self.args.output_dir, state_dict=state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        model = self._adapted()
        if model is not None:  # the base model's tensors are not in the file
            missing = [name for name in load_result.missing_keys if name in adapter_tensors(model)]
            load_result = load_result._replace(missing_keys=missing)
        super()._issue_warnings_after_load(load_result)

    def _adapted(self) -> PeftModel | None:
        """The model, if transformers would take it for any module."""
        model = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        return model if isinstance(model, PeftModel) and not is_peft_available() else None
