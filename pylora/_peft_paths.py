"""PEFT's public module paths under `pylora`: one table, and the import hook that makes modules of it.

`from pylora.tuners.lora.layer import LoraLayer` works as it does with PEFT's name in place of pylora's, although pylora
is laid out otherwise. A module of the table is made when it is first imported, and each of its names is fetched from
its home when first asked for. Real modules of pylora go first: the hook is the last that Python asks.

Names and modules of PEFT's other methods raise ImportError that says so.
"""

from __future__ import annotations

import importlib
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Module of pylora -> the names of PEFT's that live there; "theirs=ours" where the two differ.
_HOMES = {
    "checkpoint.base_state": "get_base_model_state_dict set_base_model_state_dict",
    "checkpoint.extract": "get_peft_model_state_dict",
    "checkpoint.files": "SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME",
    "checkpoint.keys": "_filter_state_dict_by_key_prefixes=select_under",
    "checkpoint.load": "set_peft_model_state_dict",
    "checkpoint.read": "load_peft_weights",
    "combine.arithmetic": (
        "calculate_majority_sign_mask dare_linear dare_ties disjoint_merge magnitude_based_pruning magnitude_prune "
        "prune random_pruning reshape_weight_task_tensors task_arithmetic ties"
    ),
    "checkpoint.structure": "_get_tuner_state_dict_key_prefixes=adapter_prefixes",
    "config": (
        "ArrowConfig BdLoraConfig CONFIG_NAME CordaConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig "
        "LoraRuntimeConfig MontecloraConfig PEFT_TYPE_TO_CONFIG_MAPPING PeftConfig PeftType TaskType VeloraConfig "
        "get_pattern_key"
    ),
    "config.later": (
        "ArrowLinearVariant BdLoraLinearVariant KasaLinearVariant MiCAEmbeddingVariant MiCALinearVariant "
        "MontecloraLinearVariant MontecloraSampler MontecloraTrainerMixin QALoraLinearVariant VeloraLinearVariant "
        "create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_corda preprocess_loraga "
        "replace_lora_weights_loftq"
    ),
    "errors": "NoMatchingPeftModuleError PeftError PeftWarning",
    "integrations.empty_weights": "init_empty_weights skip_init_on_device",
    "integrations.packages": (
        "is_aqlm_available is_bnb_4bit_available is_bnb_available is_diffusers_available is_eetq_available "
        "is_gptqmodel_available is_hqq_available is_inc_available is_optimum_available is_te_available "
        "is_te_pytorch_available is_torch_tpu_available is_torchao_available is_torchao_ge_v0_18_0 "
        "is_transformers_dtensor_tp is_transformers_ge_v5 is_transformers_ge_v5_13_0 is_transformers_ge_v5_17_0 "
        "is_transformers_ge_v5_1_0 is_transformers_ge_v5_4_0 is_transformers_ge_v5_6_0 is_transformers_le_4_53 "
        "is_xpu_available"
    ),
    "integrations.fsdp": "fsdp_auto_wrap_policy _get_no_split_modules=no_split_modules",
    "layers.attention": "MultiheadAttention",
    "layers.base": "LoraLayer VARIANT_KWARG_KEYS",
    "layers.buffer_dict": "BufferDict",
    "layers.conv": "Conv1d Conv2d Conv3d _ConvNd",
    "layers.embedding": "Embedding",
    "layers.linear": "Linear",
    "layers.merging": "check_adapters_to_merge",
    "layers.parameter": "ParamWrapper",
    "layers.trainable_tokens": "TrainableTokensLayer",
    "layers.tuner_layer": "BaseTunerLayer _set_layer_requires_grad=set_layer_requires_grad",
    "layers.variants.alora": "ALoraLinearVariant calculate_alora_offsets",
    "layers.variants.dora": (
        "DoraConv1dLayer DoraConv1dVariant DoraConv2dLayer DoraConv2dVariant DoraConv3dLayer DoraConv3dVariant "
        "DoraEmbeddingLayer DoraEmbeddingVariant DoraLinearLayer DoraLinearVariant _DoraConvNdLayer _DoraConvNdVariant"
    ),
    "layers.variants.dora_cache": "DoraCaching",
    "layers.variants.protocol": "LoraVariant",
    "model.alora": "get_alora_offsets_for_forward get_alora_offsets_for_generate is_alora_relevant_in_batch",
    "model.auto": (
        "AutoPeftModel AutoPeftModelForCausalLM AutoPeftModelForFeatureExtraction AutoPeftModelForQuestionAnswering "
        "AutoPeftModelForSeq2SeqLM AutoPeftModelForSequenceClassification AutoPeftModelForTokenClassification "
        "TOKENIZER_CONFIG_NAME check_import_allowlist get_default_import_allowlist"
    ),
    "model.aux_wrapper": "AuxiliaryTrainingWrapper",
    "model.base_tuner": "BaseTuner DUMMY_MODEL_CONFIG=_NO_CONFIG",
    "model.contexts": "disable_input_dtype_casting rescale_adapter_scale",
    "model.conversion": "convert_to_lora save_as_lora",
    "model.devices": "infer_device",
    "model.hotswap": (
        "check_hotswap_configs_compatible hotswap_adapter hotswap_adapter_from_state_dict "
        "prepare_model_for_compiled_hotswap"
    ),
    "model.intruders": "reduce_intruder_dimension",
    "model.lifecycle": "cast_adapter_dtype delete_adapter set_adapter set_requires_grad _set_adapter=set_adapter",
    "model.lora_model": "LoraModel",
    "model.mapping": (
        "PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PEFT_TYPE_TO_TUNER_MAPPING get_peft_config "
        "get_peft_model inject_adapter_in_model"
    ),
    "model.modules_to_save": "ModulesToSaveWrapper _set_trainable=set_trainable",
    "model.peft_model": "PeftModel",
    "model.preparation": "cast_mixed_precision_params prepare_model_for_kbit_training",
    "model.replicate": "replicate_layers",
    "model.signatures": ("check_if_peft_model update_forward_signature update_generate_signature update_signature"),
    "model.status": "TunerLayerStatus TunerModelStatus get_layer_status get_model_status",
    "model.submodules": (
        "_get_submodules=get_submodules _get_submodules_with_grandparent=get_submodules_with_grandparent "
        "_freeze_adapter=freeze_adapter"
    ),
    "model.task_models": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PeftModelForCausalLM PeftModelForFeatureExtraction "
        "PeftModelForQuestionAnswering PeftModelForSeq2SeqLM PeftModelForSequenceClassification "
        "PeftModelForTokenClassification"
    ),
    "model.tensors": (
        "bloom_model_postprocess_past_key_value id_tensor_storage shift_tokens_right "
        "starcoder_model_postprocess_past_key_value transpose"
    ),
    "model.trainable_tokens": "TrainableTokensWrapper",
    "targeting.defaults": (
        "DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES INCLUDE_LINEAR_LAYERS_SHORTHAND "
        "MIN_TARGET_MODULES_FOR_OPTIMIZATION SEQ_CLS_HEAD_NAMES TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING"
    ),
    "targeting.kappa": "KappaTuneSelector find_kappa_target_modules",
    "targeting.match": "check_target_module_exists",
    "targeting.resolve": "inspect_matched_modules _maybe_include_all_linear_layers=maybe_include_all_linear_layers",
    "targeting.suffixes": "_find_minimal_target_modules=find_minimal_target_modules",
    "targeting.tied": "_get_module_names_tied_with_embedding=module_names_tied_with_embedding",
}

_CONFIGS = (
    "ArrowConfig BdLoraConfig EvaConfig KasaConfig LoftQConfig LoraConfig LoraGAConfig LoraRuntimeConfig "
    "MontecloraConfig VeloraConfig "
)
_MODELS = (
    "PeftModel PeftModelForCausalLM PeftModelForFeatureExtraction PeftModelForQuestionAnswering PeftModelForSeq2SeqLM "
    "PeftModelForSequenceClassification PeftModelForTokenClassification "
)
_CONSTANTS = (
    "CONFIG_NAME INCLUDE_LINEAR_LAYERS_SHORTHAND SAFETENSORS_WEIGHTS_NAME "
    "TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING WEIGHTS_NAME "
)
_OTHER = (
    "AuxiliaryTrainingWrapper ModulesToSaveWrapper TrainableTokensWrapper _freeze_adapter _get_submodules "
    "_set_adapter _set_trainable "
    "bloom_model_postprocess_past_key_value cast_mixed_precision_params id_tensor_storage infer_device "
    "prepare_model_for_kbit_training shift_tokens_right transpose "
)
_STATE_DICTS = (
    "get_base_model_state_dict get_peft_model_state_dict load_peft_weights set_base_model_state_dict "
    "set_peft_model_state_dict "
)

# Mechanisms that come later, at the top of packages.
_LATER = "create_arrow_model get_eva_state_dict initialize_lora_eva_weights preprocess_loraga "

# PEFT's module path -> the names it offers. A path that others begin with is a package and also offers those modules.
_PATHS = {
    "auto": _HOMES["model.auto"] + " PeftConfig MODEL_TYPE_TO_PEFT_MODEL_MAPPING " + _MODELS,
    "functional": (
        "cast_adapter_dtype delete_adapter get_peft_model_state_dict inject_adapter_in_model set_adapter "
        "set_peft_model_state_dict set_requires_grad"
    ),
    "helpers": (
        _HOMES["model.signatures"] + " BaseTunerLayer DoraCaching KappaTuneSelector LoraLayer LoraModel PeftConfig "
        "MontecloraTrainerMixin PeftModel disable_input_dtype_casting find_kappa_target_modules rescale_adapter_scale"
    ),
    "import_utils": _HOMES["integrations.packages"],
    "mapping": (
        "PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_MIXED_MODEL_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING PeftType get_peft_config inject_adapter_in_model"
    ),
    "mapping_func": (
        "MODEL_TYPE_TO_PEFT_MODEL_MAPPING PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING PeftConfig PeftModel "
        "get_peft_model"
    ),
    "peft_model": (
        _MODELS + _HOMES["model.status"] + " PEFT_TYPE_TO_CONFIG_MAPPING PEFT_TYPE_TO_PREFIX_MAPPING "
        "PEFT_TYPE_TO_TUNER_MAPPING PeftConfig PeftType SAFETENSORS_WEIGHTS_NAME TaskType WEIGHTS_NAME "
        "get_peft_model_state_dict id_tensor_storage infer_device load_peft_weights set_peft_model_state_dict "
        "shift_tokens_right"
    ),
    "tuners": _CONFIGS + _LATER + "LoraModel convert_to_lora save_as_lora",
    "tuners._buffer_dict": "BufferDict",
    "tuners.lora": (
        _CONFIGS + _LATER + "Conv2d Conv3d Embedding Linear LoraLayer LoraModel ParamWrapper is_bnb_4bit_available "
        "convert_to_lora is_bnb_available is_eetq_available save_as_lora"
    ),
    "tuners.lora.arrow": "create_arrow_model",
    "tuners.lora.corda": "preprocess_corda",
    "tuners.lora.eva": "get_eva_state_dict initialize_lora_eva_weights",
    "tuners.lora.loraga": "preprocess_loraga",
    "tuners.lora.monteclora": "MontecloraSampler",
    "tuners.lora.config": _CONFIGS + "CordaConfig PeftConfig",
    "tuners.lora.conversion": "LoraConfig convert_to_lora save_as_lora",
    "tuners.lora.dora": (
        "DoraConv1dLayer DoraConv2dLayer DoraConv3dLayer DoraEmbeddingLayer DoraLinearLayer _DoraConvNdLayer"
    ),
    "tuners.lora.intruders": "LoraLayer reduce_intruder_dimension",
    "tuners.lora.layer": (
        "BaseTunerLayer Conv1d Conv2d Conv3d Embedding Linear LoraConfig LoraLayer LoraVariant MultiheadAttention "
        "ParamWrapper VARIANT_KWARG_KEYS _ConvNd transpose"
    ),
    "tuners.lora.model": (
        "BaseTuner BaseTunerLayer LoraConfig LoraLayer LoraModel TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING "
    ),
    "tuners.lora.variants": (
        "ALoraLinearVariant ArrowLinearVariant BdLoraLinearVariant KasaLinearVariant MiCAEmbeddingVariant "
        "MiCALinearVariant MontecloraLinearVariant QALoraLinearVariant VeloraLinearVariant DoraConv1dVariant "
        "DoraConv2dVariant DoraConv3dVariant DoraEmbeddingVariant "
        "DoraLinearVariant LoraVariant _DoraConvNdVariant calculate_alora_offsets get_alora_offsets_for_forward "
        "get_alora_offsets_for_generate is_alora_relevant_in_batch"
    ),
    "tuners.trainable_tokens": "TrainableTokensLayer",
    "tuners.trainable_tokens.layer": "TrainableTokensLayer",
    "tuners.tuners_utils": (
        "AuxiliaryTrainingWrapper BaseTuner BaseTunerLayer PeftConfig "
        "_filter_state_dict_by_key_prefixes _find_minimal_target_modules _get_submodules "
        "_get_tuner_state_dict_key_prefixes _maybe_include_all_linear_layers cast_adapter_dtype "
        "check_adapters_to_merge check_target_module_exists delete_adapter inspect_matched_modules replicate_layers "
        "set_adapter set_requires_grad"
    ),
    "utils": _CONSTANTS + _OTHER + _STATE_DICTS + "NoMatchingPeftModuleError PeftError PeftType PeftWarning TaskType",
    "utils.constants": (
        _CONSTANTS
        + "DUMMY_MODEL_CONFIG DUMMY_TARGET_MODULES EMBEDDING_LAYER_NAMES MIN_TARGET_MODULES_FOR_OPTIMIZATION "
        "SEQ_CLS_HEAD_NAMES TOKENIZER_CONFIG_NAME bloom_model_postprocess_past_key_value "
        "starcoder_model_postprocess_past_key_value"
    ),
    "utils.error": "NoMatchingPeftModuleError PeftError",
    "utils.hotswap": _HOMES["model.hotswap"],
    "utils.integrations": "init_empty_weights skip_init_on_device",
    "utils.loftq_utils": "replace_lora_weights_loftq",
    "utils.merge_utils": _HOMES["combine.arithmetic"],
    "utils.other": (
        _CONSTANTS
        + _OTHER
        + "_get_module_names_tied_with_embedding _get_no_split_modules _get_submodules_with_grandparent "
        "_set_layer_requires_grad "
        "fsdp_auto_wrap_policy get_pattern_key"
    ),
    "utils.peft_types": "PeftType TaskType",
    "utils.save_and_load": _STATE_DICTS + "EMBEDDING_LAYER_NAMES SAFETENSORS_WEIGHTS_NAME WEIGHTS_NAME infer_device",
    "utils.warning": "PeftWarning",
}


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# PEFT's other methods: modules under `tuners`, and the stems of public names.
_OTHER_MODULES = _words(
    "adalora adamss adaption_prompt beft boft c3a cartridge cpt deft delora fourierft frod glora gralora hira hra "
    "ia3 lily ln_tuning loha lokr lycoris_utils miss mixed multitask_prompt_tuning oft osf p_tuning peanut poly "
    "prefix_tuning prompt_tuning psoft pvera randlora road shadow shira supertuning tinylora unilora vblora vera "
    "waveft xlora"
)
_OTHER_STEMS = _words(
    "AdaLora Adamss AdaptionPrompt BOFT Beft C3A CPT Cartridge Deft Delora FourierFT Frod Glora Gralora HRA Hira "
    "IA3 LNTuning Lily LoHa LoKr Miss Mixed MultitaskPromptTuning OFT OSF Peanut PeftMixed Poly PrefixTuning "
    "PromptEncoder PromptLearning PromptTuning Psoft Pvera RandLora Road Shadow Shira Supertuning TinyLora "
    "TrainableTokens UniLora VBLoRA Vera WaveFT XLora"
)
_OTHER_NAMES = _words(
    "CPTEmbedding CartridgeEncoder MultitaskPromptEmbedding MultitaskPromptTuningInit PrefixEncoder "
    "PromptEmbedding PromptEncoder PromptEncoderReparameterizationType PromptTuningInit "
    "compose_cartridge_adapters initialize_kv_prefix_from_past_key_values initialize_kv_prefix_from_text "
    "prompt_embeddings_from_past_key_values TRANSFORMERS_MODELS_TO_PREFIX_TUNING_POSTPROCESS_MAPPING "
    "register_peft_method"
)


def _split_homes() -> dict[str, tuple[str, str]]:
    homes = {}
    for module, names in _HOMES.items():
        for entry in names.split():
            theirs, _, ours = entry.partition("=")
            homes[theirs] = (f"pylora.{module}", ours or theirs)
    return homes


HOMES: dict[str, tuple[str, str]] = _split_homes()
"""PEFT's name -> (pylora's module, the name there)."""

PATHS: dict[str, tuple[str, ...]] = {path: tuple(names.split()) for path, names in _PATHS.items()}
"""PEFT's module path below `peft` -> the names it offers here."""


def belongs_to_other_method(name: str) -> bool:
    """Whether a public name of PEFT's is about a method other than LoRA."""
    if name in _OTHER_NAMES:
        return True
    return any(name.endswith(end) and name[: -len(end)] in _OTHER_STEMS for end in ("Config", "Model", "Layer"))


def refuse_other_method(module: str, name: str) -> ImportError:
    """The error for a name of another method."""
    return ImportError(
        f"cannot import name {name!r} from {module!r}: pylora is LoRA, and {name} belongs to another of PEFT's methods",
        name=module,
    )


def resolve(path: str, name: str) -> Any:
    """What `name` is in the module `pylora.<path>`.

    Raises:
        AttributeError: the path does not offer the name.
        ImportError: the name belongs to another method.
    """
    if name in PATHS.get(path, ()):
        module, own_name = HOMES[name]
        return getattr(importlib.import_module(module), own_name)
    full_name = f"{path}.{name}"
    if full_name in PATHS:
        return importlib.import_module(f"pylora.{full_name}")
    if belongs_to_other_method(name):
        raise refuse_other_method(f"pylora.{path}", name)
    raise AttributeError(f"module 'pylora.{path}' has no attribute {name!r}")


class _PathModule(ModuleType):
    """A module of the table."""

    @property
    def _path(self) -> str:
        return self.__name__.partition(".")[2]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        value = resolve(self._path, name)
        self.__dict__[name] = value
        return value

    def __dir__(self) -> list[str]:
        return sorted({*self.__dict__, *PATHS[self._path]})


class _PathFinder:
    """The import hook: finds and makes the modules of the table."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        package, _, inner = fullname.partition(".")
        if package != "pylora" or not inner:
            return None
        if inner in PATHS:
            loader: Any = self
            return ModuleSpec(fullname, loader, is_package=any(other.startswith(f"{inner}.") for other in PATHS))
        if inner.startswith("tuners.") and inner.split(".")[1] in _OTHER_MODULES:
            raise ModuleNotFoundError(
                f"No module named {fullname!r}: pylora is LoRA, and {inner} belongs to another of PEFT's methods",
                name=fullname,
            )
        return None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _PathModule(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        path = module.__name__.partition(".")[2]
        module.__doc__ = f"PEFT's module path `peft.{path}`: names of pylora, from the table in pylora/_peft_paths.py."
        module.__dict__["__all__"] = [name for name in PATHS[path] if not name.startswith("_")]


def install() -> None:
    """Put the hook at the end of `sys.meta_path`, once."""
    if not any(isinstance(finder, _PathFinder) for finder in sys.meta_path):
        sys.meta_path.append(_PathFinder())
