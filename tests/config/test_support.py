"""Which configurations can be applied to a model so far."""

import pytest

import pylora.config as pc
from pylora.config.support import _MISSING, require_supported
from pylora.errors import PeftError, UnsupportedFeatureError

SUPPORTED = [
    {},
    {"r": 3, "lora_alpha": 7, "lora_dropout": 0.5, "use_rslora": True},
    {"target_modules": ["q"], "exclude_modules": ["k"], "modules_to_save": ["head"]},
    {"target_modules": "all-linear", "fan_in_fan_out": True, "bias": "all", "task_type": "CAUSAL_LM"},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "h", "bias": "lora_only"},
    {"rank_pattern": {"q": 2}, "alpha_pattern": {"q": 4}},
    *({"init_lora_weights": scheme} for scheme in (True, False, "gaussian", "GAUSSIAN", None)),
    *({"init_lora_weights": scheme} for scheme in ("olora", "OLoRA", "pissa", "pissa_niter_4", "orthogonal")),
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 4, "loftq_iter": 1}},
    {"init_lora_weights": "unknown"},  # for the registry of schemes to refuse
    {"lora_bias": True},
    {"use_dora": True},
    {"runtime_config": pc.LoraRuntimeConfig(ephemeral_gpu_offload=True)},
    {"megatron_core": "other"},
    {"target_parameters": []},
    {"target_parameters": ["experts.w"]},
    *({"alora_invocation_tokens": tokens, "task_type": "CAUSAL_LM"} for tokens in ([], [1, 2])),
    {"qalora_group_size": 4},
    {"trainable_token_indices": {"embed": [1]}},
    {"layer_replication": [(0, 1)]},
    {"ensure_weight_tying": True},
]

UNSUPPORTED = {
    "init_lora_weights": [
        "mica",
        "MiCA",
        "corda",
        "eva",
        "lora_ga",
    ],
    "lora_ga_config": [pc.LoraGAConfig()],
    "megatron_config": [{"a": 1}],
    "velora_config": [pc.VeloraConfig()],
    "use_qalora": [True],
    "monteclora_config": [pc.MontecloraConfig()],
    "use_bdlora": [pc.BdLoraConfig()],
    "arrow_config": [pc.ArrowConfig()],
    "kasa_config": [pc.KasaConfig()],
}


@pytest.mark.parametrize("kwargs", SUPPORTED, ids=str)
def test_supported(kwargs):
    require_supported(pc.LoraConfig(**kwargs))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("field", "value"), [(f, v) for f, values in UNSUPPORTED.items() for v in values], ids=str)
def test_unsupported_is_refused_by_name_and_value(field, value):
    with pytest.raises(UnsupportedFeatureError) as caught:
        require_supported(pc.LoraConfig(**{field: value}))
    assert f"{field}={value!r}" in str(caught.value)
    assert isinstance(caught.value, (PeftError, ValueError))


def test_every_row_is_tested():
    assert {field for field, _ in _MISSING} == set(UNSUPPORTED)


def test_a_setting_of_an_unused_scheme_is_no_obstacle():
    with pytest.warns(UserWarning, match="eva_config"):
        config = pc.LoraConfig(eva_config=pc.EvaConfig())
    require_supported(config)
