"""LoraModel: the tuner for LoRA."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch

from pylora.checkpoint.convert import relative_to_initial
from pylora.checkpoint.extract import get_peft_model_state_dict
from pylora.combine import Combination
from pylora.combine.arithmetic import SignMethod
from pylora.config import PeftConfig
from pylora.layers import LoraLayer
from pylora.model.base_tuner import BaseTuner
from pylora.model.weighted import add_weighted_adapter
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

    def add_weighted_adapter(
        self,
        adapters: Sequence[str],
        weights: Sequence[float],
        adapter_name: str,
        combination_type: str = "svd",
        svd_rank: int | None = None,
        svd_clamp: float | None = None,
        svd_full_matrices: bool = True,
        svd_driver: str | None = None,
        density: float | None = None,
        majority_sign_method: SignMethod = "total",
    ) -> None:
        """Add an adapter that combines others. It is neither active nor trainable.

        Args:
            adapters: Names of the adapters to combine; a single one is always combined by "linear".
            weights: One for each; negative ones subtract.
            adapter_name: The new adapter. If there is one of that name, nothing happens.
            combination_type: "svd": the best approximation of the weighted sum of deltas; "cat": the sum itself, with
                the sum of all ranks; "linear": sums of A and of B, a rough approximation for equal ranks; "ties",
                "dare_linear", "dare_ties", "magnitude_prune": the same with pruning and votes, see
                `pylora.combine.arithmetic`; these with "_svd": on the deltas, whose sum is then approximated.
            svd_rank: Rank of the new adapter for the svd kinds; by default the largest rank there is.
            svd_clamp: For the svd kinds: clamp the new factors' numbers to this quantile of theirs (0 to 1).
            svd_full_matrices: Without effect: singular vectors beyond the rank are not used.
            svd_driver: cuSOLVER's method for the svd kinds, on CUDA only.
            density: Share of numbers that the pruning kinds leave, 0 to 1.
            majority_sign_method: "total" or "frequency", for the ties kinds.

        Raises:
            ValueError: An adapter that does not exist or targets parameters; no adapter; weights of another number;
                an unknown kind; different ranks where they have to be equal; targets given as strings and as lists;
                a module of `modules_to_save` that several adapters train; a negative density.
            TypeError: No density where one is needed, or no target modules.
            RuntimeError: An unknown `majority_sign_method`, or `svd_driver` without CUDA.
            NotImplementedError: A svd kind on a convolution in groups. The model is as it was in all cases.
        """
        if adapter_name in self.peft_config:
            return
        how = Combination(combination_type, svd_rank or 0, svd_clamp, svd_driver, density, majority_sign_method)
        add_weighted_adapter(self, adapters, weights, adapter_name, how)

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

    def _check_merge_allowed(self) -> None:
        super()._check_merge_allowed()
        if getattr(self.model, "quantization_method", None) == "gptq":
            raise ValueError("Cannot merge LORA layers when the model is gptq quantized")
