"""LoraConfig: every field of PEFT 0.21.2's, in its order, so that positional arguments and files agree."""

# ruff: noqa: RUF009 (option() makes a dataclasses.field)

from __future__ import annotations

import importlib.util
import warnings
from dataclasses import dataclass
from typing import Any, Literal

from pylora.config.base import PeftConfig, register_config
from pylora.config.enums import PeftType
from pylora.config.fields import as_sub_config, option
from pylora.config.sub_configs import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

# Fields that hold a sub-configuration, given as an instance or as the dict that a file has.
_SUB_CONFIGS: dict[str, type] = {
    "velora_config": VeloraConfig,
    "kasa_config": KasaConfig,
    "eva_config": EvaConfig,
    "corda_config": CordaConfig,
    "lora_ga_config": LoraGAConfig,
    "arrow_config": ArrowConfig,
    "use_bdlora": BdLoraConfig,
    "monteclora_config": MontecloraConfig,
}


@dataclass
class LoraConfig(PeftConfig):
    """What to adapt in a model, and how: y = W·x + scaling·B·A·dropout(x), with A [r, in] and B [out, r].

    A mechanism that pylora does not have yet can be configured, read and written; applying the configuration to a model
    then raises UnsupportedFeatureError (see `pylora.config.support`).

    Raises:
        ValueError, TypeError: fields that contradict one another, or have the wrong type.
        ImportError: `init_lora_weights="loftq"` without scipy.
    """

    r: int = option(8, help="Rank of the update.")
    target_modules: list[str] | str | None = option(
        None,
        help="Modules to adapt. A list: modules of that name, or whose name ends with it after a dot. A string: "
        "a regular expression for the whole name, or 'all-linear': every linear layer but the output layer. None: "
        "the default for the model's architecture. []: none, for use with `target_parameters`.",
    )
    exclude_modules: list[str] | str | None = option(
        None, help="Modules to leave alone even when they are targets; a list or a regular expression as above."
    )
    lora_alpha: int = option(8, help="Size of the update: scaling = lora_alpha / r.")
    lora_dropout: float = option(0.0, help="Probability of dropping a feature of the update's input while training.")
    fan_in_fan_out: bool = option(False, help="The base weight is stored [in, out], as transformers' Conv1D does.")
    bias: Literal["none", "all", "lora_only"] = option(
        "none",
        help="Which bias vectors of the base model are trained: 'none', 'all', or 'lora_only' (adapted modules'). "
        "Trained biases stay changed when the adapter is disabled.",
    )
    use_rslora: bool = option(
        False, help="Scale by lora_alpha / sqrt(r), which keeps the update's size at large ranks (arXiv:2312.03732)."
    )
    modules_to_save: list[str] | None = option(
        None, help="Modules that are copied, trained as a whole and saved with the adapter, such as a new head."
    )
    init_lora_weights: (
        bool
        | Literal[
            "gaussian",
            "eva",
            "olora",
            "pissa",
            "pissa_niter_[number of iters]",
            "corda",
            "loftq",
            "orthogonal",
            "mica",
            "lora_ga",
        ]
    ) = option(
        True,
        help="Start of A and B. True: A as torch initialises a linear layer, B zero, so the update starts at zero. "
        "False: both random, to see the adapter work untrained. 'gaussian': A normal with deviation 1/r, B zero. "
        "From the base weight: 'olora' (QR), 'pissa' and 'pissa_niter_N' (its principal directions, exact or by N "
        "subspace iterations), 'mica' (its minor directions, B frozen), 'loftq' (its quantisation error), 'orthogonal' "
        "(orthogonal to one another, base untouched, even r). From data: 'eva', 'corda', 'lora_ga'.",
        lora_variants=["mica"],
    )
    layers_to_transform: list[int] | int | None = option(
        None, help="Numbers of the layers to adapt: only targets whose name has one of them. Needs a list as target."
    )
    layers_pattern: list[str] | str | None = option(
        None,
        help="Name of the list that `layers_to_transform` counts in, such as 'layers' or 'h'; when empty, the first "
        "number in a module's name counts.",
    )
    rank_pattern: dict | None = option(
        factory=dict, help="Ranks of single modules: {name or regular expression for the name's end: rank}."
    )
    alpha_pattern: dict | None = option(
        factory=dict, help="Alphas of single modules: {name or regular expression for the name's end: alpha}."
    )
    megatron_config: dict | None = option(
        None, help="Megatron's TransformerConfig as a dict, for its column- and row-parallel linear layers."
    )
    megatron_core: str | None = option("megatron.core", help="Name of the Megatron core package.")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = option(
        None, help="Token ids whose embedding rows are trained; {module: ids} for other than the input embedding."
    )
    loftq_config: LoftQConfig | dict = option(factory=dict, help="Settings of `init_lora_weights='loftq'`.")
    eva_config: EvaConfig | None = option(None, help="Settings of `init_lora_weights='eva'`.")
    corda_config: CordaConfig | None = option(None, help="Settings of `init_lora_weights='corda'`.")
    lora_ga_config: LoraGAConfig | None = option(None, help="Settings of `init_lora_weights='lora_ga'`.")
    use_dora: bool = option(
        False,
        help="DoRA: train the length of each weight row apart from its direction (arXiv:2402.09353).",
        is_lora_variant=True,
    )
    velora_config: VeloraConfig | dict | None = option(
        None, help="VeLoRA: keep a compressed input for the backward pass of A.", is_lora_variant=True
    )
    alora_invocation_tokens: list[int] | None = option(
        None,
        help="aLoRA: adapt only from the last place on where these tokens occur in the input (arXiv:2504.12397), so "
        "that the cache before it is the base model's. Cannot be merged.",
        is_lora_variant=True,
    )
    use_qalora: bool = option(False, help="QALoRA: average the input over groups, for GPTQ weights (arXiv:2309.14717).")
    qalora_group_size: int = option(16, help="Features that QALoRA averages into one.")
    monteclora_config: MontecloraConfig | None = option(
        None, help="MonteCLoRA: perturb the factors with learnt samples.", is_lora_variant=True
    )
    layer_replication: list[tuple[int, int]] | None = option(
        None,
        help="Ranges [start, end) of layers that make up a new, deeper stack. The copies share base weights and have "
        "adapters of their own.",
    )
    runtime_config: LoraRuntimeConfig = option(
        factory=LoraRuntimeConfig, help="How to run on this machine; never saved."
    )
    lora_bias: bool = option(
        False, help="Give B a bias, for adapters that were extracted from a trained layer with one."
    )
    target_parameters: list[str] | None = option(
        None, help="Names of parameters to adapt that no linear layer holds, such as the stacked weights of experts."
    )
    use_bdlora: BdLoraConfig | None = option(
        None, help="BD-LoRA: make A or B block-diagonal, for sharded serving.", is_lora_variant=True
    )
    arrow_config: ArrowConfig | None = option(
        None, help="Arrow: route tokens among several trained adapters.", is_lora_variant=True
    )
    kasa_config: KasaConfig | None = option(
        None, help="KaSA: train a diagonal between A and B on a truncated base weight.", is_lora_variant=True
    )
    ensure_weight_tying: bool = option(
        False, help="Layers that share one weight in the base model also share their adapter or trained copy."
    )

    def to_dict(self) -> dict[str, Any]:
        """The fields as a dict, without `runtime_config`."""
        content = super().to_dict()
        del content["runtime_config"]
        return content

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        self._normalise_types()
        self._check_targets()
        self._settle_init()
        self._check_combinations()
        # Layer classes for module types that pylora has none for: {module type: LoRA layer type}. Not part of the file.
        self._custom_modules: dict[type, type] | None = None

    def _normalise_types(self) -> None:
        if isinstance(self.target_modules, list):
            self.target_modules = set(self.target_modules)  # type: ignore[assignment]
        if isinstance(self.exclude_modules, list):
            self.exclude_modules = set(self.exclude_modules)  # type: ignore[assignment]
        if self.ensure_weight_tying:
            # Names that are found when the adapter is put in place; they belong to the model, not to the file.
            self.modules_to_tie: list[str] | None = None
            self.target_modules_to_tie: list[str] | None = None
        for name, config_cls in _SUB_CONFIGS.items():
            setattr(self, name, as_sub_config(getattr(self, name), config_cls))

    def _check_targets(self) -> None:
        if isinstance(self.target_parameters, str):
            raise TypeError("`target_parameters` must be a list of strings or None.")
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(f"`{name}` cannot be used when `target_modules` is a str.")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("When `layers_pattern` is specified, `layers_to_transform` must also be specified.")

    def _settle_init(self) -> None:
        """Give the chosen scheme its settings; warn about settings of a scheme that was not chosen."""
        scheme = self.init_lora_weights
        if scheme == "loftq":
            if importlib.util.find_spec("scipy") is None:
                raise ImportError("The required package 'scipy' is not installed: init_lora_weights='loftq' needs it.")
            if not self.loftq_config:
                raise ValueError("`loftq_config` must be specified when `init_lora_weights` is 'loftq'.")
            if not isinstance(self.loftq_config, dict):
                self.loftq_config = dict(vars(self.loftq_config))
            return
        if self.loftq_config:
            self.loftq_config = {}
            _warn("`loftq_config` specified but will be ignored when `init_lora_weights` is not 'loftq'.")
            return
        for name, config_cls, label in (("eva", EvaConfig, "EVA"), ("corda", CordaConfig, "CorDA")):
            attribute = f"{name}_config"
            given = getattr(self, attribute) is not None
            if scheme == name and not given:
                _warn(
                    f"`init_lora_weights` is '{name}' but `{attribute}` is not specified. Using default {label} config."
                )
                setattr(self, attribute, config_cls())
                return
            if scheme != name and given:
                _warn(f"`{attribute}` specified but will be ignored when `init_lora_weights` is not '{name}'.")
                return

    def _check_combinations(self) -> None:
        scheme = self.init_lora_weights
        if self.use_dora and self.megatron_config:
            raise ValueError("DoRA does not support megatron_core, please set `use_dora=False`.")
        if self.lora_bias:
            if scheme not in (True, False):
                raise ValueError(
                    "The argument lora_bias=True is only supported with init_lora_weights=True or False, got "
                    f"init_lora_weights={scheme} instead."
                )
            if self.use_dora:
                raise ValueError("The argument lora_bias=True is not supported for DoRA, please pass use_dora=False")
        if self.alora_invocation_tokens is not None and self.task_type != "CAUSAL_LM":
            _warn("aLoRA is currently only supported for CAUSAL_LM task.")
        changes_base = isinstance(scheme, str) and (
            scheme.startswith("pissa") or scheme in ("olora", "corda", "lora_ga")
        )
        if changes_base and self.use_rslora and (self.rank_pattern or self.alpha_pattern):
            _warn(
                "Using Rank-Stabilized LoRA with rank_pattern/alpha_pattern and post-training conversion of modified "
                "base weights PiSSA/CorDA/OLoRA/LoRA-GA means that you won't be able to pass "
                "`path_initial_model_for_weight_conversion` to `save_pretrained`. Training is not affected; to save an "
                "adapter for the original base weights, do without use_rslora or without the patterns."
            )

    def _register_custom_module(self, mapping: dict[type, type]) -> None:
        """Use own LoRA layer classes: `{type of base module: class of LoRA layer}`. Experimental, as in PEFT."""
        self._custom_modules = {**(self._custom_modules or {}), **mapping}


def _warn(message: str) -> None:
    # The frames between here and the caller's line: the checking method, __post_init__ and the generated __init__.
    warnings.warn(message, stacklevel=5)


register_config(PeftType.LORA, LoraConfig)
