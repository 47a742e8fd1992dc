"""LoraConfig beside PEFT's: the same arguments give the same fields, the same exception type and the same warnings."""

import copy
import dataclasses
import inspect
import pickle
import re
import warnings

import pytest

import pylora.config as pc

peft = pytest.importorskip("peft")
peft_config = pytest.importorskip("peft.tuners.lora.config")

SUB_CONFIGS = [
    "LoraRuntimeConfig",
    "VeloraConfig",
    "LoftQConfig",
    "ArrowConfig",
    "BdLoraConfig",
    "EvaConfig",
    "KasaConfig",
    "CordaConfig",
    "LoraGAConfig",
    "MontecloraConfig",
]


def build(cls, *args, **kwargs):
    """(result, exception, warnings) of one construction."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result, error = cls(*args, **kwargs), None
        except Exception as exc:
            result, error = None, exc
    return result, error, caught


def both(name, *args, **kwargs):
    return build(getattr(peft_config, name), *args, **kwargs), build(getattr(pc, name), *args, **kwargs)


def words(text):
    return [word for part in re.findall(r"[\w'./=`]+", str(text)) if (word := part.strip(".,"))]


def assert_begins_alike(ours, theirs):
    """The beginning of a message is what callers match on; what follows is each library's own."""
    ours, theirs = words(ours)[:12], words(theirs)[:12]
    shorter = min(len(ours), len(theirs))
    assert ours[:shorter] == theirs[:shorter]


def assert_same_outcome(theirs, ours):
    assert type(ours[1]) is type(theirs[1]), ours[1]
    assert [w.category for w in ours[2]] == [w.category for w in theirs[2]]
    for mine, its in zip(ours[2], theirs[2], strict=True):
        assert_begins_alike(mine.message, its.message)
    if theirs[1] is None:
        assert ours[0].__dict__.keys() == theirs[0].__dict__.keys()
        assert dataclasses.asdict(ours[0]) == dataclasses.asdict(theirs[0])
    else:
        assert_begins_alike(ours[1], theirs[1])


@pytest.mark.parametrize("name", ["LoraConfig", *SUB_CONFIGS])
def test_parameters_and_defaults_are_peft_s(name):
    theirs = inspect.signature(getattr(peft_config, name)).parameters
    ours = inspect.signature(getattr(pc, name)).parameters
    assert list(ours) == list(theirs)
    for key, parameter in theirs.items():
        if not callable(parameter.default) and "factory" not in repr(parameter.default):
            assert ours[key].default == parameter.default, key
    assert_same_outcome(*both(name))


@pytest.mark.parametrize("name", ["LoraConfig", *SUB_CONFIGS])
def test_fields_and_their_metadata_are_peft_s(name):
    theirs = {f.name: f for f in dataclasses.fields(getattr(peft_config, name))}
    for field in dataclasses.fields(getattr(pc, name)):
        other = theirs.pop(field.name)
        assert field.init == other.init
        assert field.metadata["help"]
        extra = {key: value for key, value in other.metadata.items() if key != "help"}
        assert {key: value for key, value in field.metadata.items() if key != "help"} == extra
    assert not theirs


def test_help_is_not_peft_s():
    theirs = {f.name: f.metadata["help"] for f in dataclasses.fields(peft.LoraConfig)}
    for field in dataclasses.fields(pc.LoraConfig):
        assert field.metadata["help"] != theirs[field.name], field.name


CASES = [
    # target_modules, exclude_modules
    {"target_modules": ["q", "v", "q"]},
    {"target_modules": ("q", "v")},
    {"target_modules": {"q"}},
    {"target_modules": "all-linear"},
    {"target_modules": []},
    {"target_modules": ".*q", "exclude_modules": ["a"]},
    {"exclude_modules": "a.*"},
    # layers
    {"target_modules": ".*q", "layers_to_transform": 1},
    {"target_modules": ".*q", "layers_to_transform": []},
    {"target_modules": ".*q", "layers_pattern": "h"},
    {"target_modules": ".*q", "layers_pattern": []},
    {"target_modules": ["q"], "layers_pattern": "h"},
    {"target_modules": ["q"], "layers_pattern": ["h"]},
    {"target_modules": ["q"], "layers_pattern": ""},
    {"target_modules": ["q"], "layers_pattern": "h", "layers_to_transform": 0},
    {"layers_pattern": "h"},
    # target_parameters
    {"target_parameters": "a.weight"},
    {"target_parameters": ["a.weight"]},
    # task type
    *({"task_type": name} for name in [*pc.TaskType.__members__, "causal_lm", "", "IMAGE", 3]),
    {"task_type": pc.TaskType.CAUSAL_LM},
    # the type of the method cannot be chosen
    {"peft_type": "IA3"},
    # initialisation and its settings
    {"init_lora_weights": "gaussian"},
    {"init_lora_weights": "anything"},
    {"init_lora_weights": "loftq"},
    {"init_lora_weights": "loftq", "loftq_config": {}},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2}},
    {"loftq_config": {"loftq_bits": 2}},
    {"init_lora_weights": "eva"},
    {"init_lora_weights": "corda"},
    {"init_lora_weights": "lora_ga"},
    {"init_lora_weights": "eva", "eva_config": {"rho": 1.5}},
    {"init_lora_weights": "eva", "eva_config": {"rho": 0.5}},
    {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm"}},
    {"eva_config": {"tau": 0.5}},
    {"corda_config": {"verbose": True}},
    {"eva_config": {}, "corda_config": {}},
    {"init_lora_weights": "corda", "eva_config": {}},
    {"init_lora_weights": "eva", "corda_config": {}},
    {"init_lora_weights": "eva", "eva_config": {}, "corda_config": {}},
    {"init_lora_weights": "eva", "loftq_config": {"loftq_bits": 2}},
    {"lora_ga_config": {"scale": "unit"}},
    # sub-configurations of a wrong type
    *(
        {name: 7}
        for name in ["velora_config", "kasa_config", "eva_config", "corda_config", "lora_ga_config", "arrow_config"]
    ),
    {"use_bdlora": "yes"},
    {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o"], "target_modules_bd_b": ["q"]}},
    {"use_bdlora": {"target_modules_bd_a": ["o"], "target_modules_bd_b": ["o"]}},
    {"arrow_config": {"top_k": 2, "task_adapter_names": ["a"], "gks_adapter_names": None}},
    {"velora_config": {"num_groups": 8}},
    {"kasa_config": {"beta": 0.1}},
    {"monteclora_config": {"num_samples": 2}},
    {"monteclora_config": {"num_samples": 0}},
    # combinations
    {"use_dora": True, "megatron_config": {"a": 1}},
    {"use_dora": True, "megatron_config": {}},
    {"megatron_config": {"a": 1}, "megatron_core": "other"},
    *({"lora_bias": True, "init_lora_weights": scheme} for scheme in [True, False, "gaussian", 1, None]),
    {"lora_bias": True, "use_dora": True},
    {"alora_invocation_tokens": [1, 2]},
    {"alora_invocation_tokens": [1, 2], "task_type": "CAUSAL_LM"},
    {"alora_invocation_tokens": [], "task_type": "SEQ_CLS"},
    *(
        {"use_rslora": True, "init_lora_weights": scheme, **pattern}
        for scheme in ["pissa", "pissa_niter_4", "olora", "lora_ga", "orthogonal", True]
        for pattern in [{"rank_pattern": {"q": 4}}, {"alpha_pattern": {"q": 4}}, {}]
    ),
    {"use_rslora": True, "init_lora_weights": "corda", "corda_config": {}, "rank_pattern": {"q": 4}},
    {"ensure_weight_tying": True},
    # plain values are kept as they are, checked where they are used
    {"r": 0},
    {"r": -1, "lora_alpha": 2.5, "lora_dropout": 3},
    {"bias": "some"},
    {"rank_pattern": None},
    {"layers_to_transform": 3},
    {"layer_replication": [(0, 2), (1, 3)]},
    {"trainable_token_indices": {"embed": [1]}},
    {"no_such_field": 1},
    {"peft_version": "0.9"},
    {"auto_mapping": {"base_model_class": "X"}},
]


@pytest.mark.parametrize("kwargs", CASES, ids=str)
def test_same_outcome_as_peft(kwargs):
    # Each library gets its own copy, so that neither sees what the other did to it.
    assert_same_outcome(
        build(peft.LoraConfig, **copy.deepcopy(kwargs)),
        build(pc.LoraConfig, **copy.deepcopy(kwargs)),
    )


SUB_CASES = [
    *(("VeloraConfig", {"num_groups": value}) for value in (0, -1, 1)),
    *(("VeloraConfig", {"scale": value}) for value in (0, -0.5, 0.1)),
    *(("VeloraConfig", {"init_type": value}) for value in ("random", "batch_average_once", "mean")),
    *(("ArrowConfig", {"top_k": value}) for value in (0, -1, 1)),
    *(("ArrowConfig", {"router_temperature": value}) for value in (0, -1, 0.1)),
    ("ArrowConfig", {"task_adapter_names": ["a"]}),
    *(("EvaConfig", {"rho": value}) for value in (0.99, 1.0)),
    *(("EvaConfig", {"tau": value}) for value in (-0.1, 0.0, 1.0, 1.1)),
    *(("KasaConfig", {key: value}) for key in ("beta", "gamma") for value in (-1e-9, 0)),
    *(
        ("MontecloraConfig", {key: value})
        for key in ("num_samples", "dirichlet_prior", "buffer_size")
        for value in (0, -1, 1)
    ),
    ("BdLoraConfig", {"target_modules_bd_a": ["a", "b"], "target_modules_bd_b": ["b"]}),
    ("BdLoraConfig", {"target_modules_bd_a": ["a"], "target_modules_bd_b": ["b"]}),
    ("CordaConfig", {"corda_method": "xyz"}),
    ("LoraGAConfig", {"direction": "xyz"}),
]


@pytest.mark.parametrize(("name", "kwargs"), SUB_CASES, ids=str)
def test_sub_configs_have_the_same_outcome_as_peft_s(name, kwargs):
    theirs, ours = both(name, **kwargs)
    assert type(ours[1]) is type(theirs[1])
    if theirs[1] is None:
        assert dataclasses.asdict(ours[0]) == dataclasses.asdict(theirs[0])
    else:
        field = next(iter(kwargs))
        assert (field in str(ours[1])) == (field in str(theirs[1]))


def test_positional_arguments_go_where_peft_puts_them():
    args = ["CAUSAL_LM", None, None, "0.1", "base", "rev", True, 16, ["q"], ["k"], 32, 0.5, True, "all", True, ["head"]]
    assert_same_outcome(build(peft.LoraConfig, *args), build(pc.LoraConfig, *args))


def test_loftq_config_object_becomes_a_dict():
    config = pc.LoraConfig(init_lora_weights="loftq", loftq_config=pc.LoftQConfig(loftq_bits=2))
    assert config.loftq_config == {"loftq_bits": 2, "loftq_iter": 1}


def test_loftq_needs_scipy(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name, *args: None)
    with pytest.raises(ImportError, match="scipy"):
        pc.LoraConfig(init_lora_weights="loftq", loftq_config={"loftq_bits": 4})


def test_unknown_keys_of_a_sub_config_are_named():
    with pytest.warns(UserWarning, match=r"Unexpected keyword arguments \['new'\] for class EvaConfig"):
        config = pc.LoraConfig(init_lora_weights="eva", eva_config={"rho": 1.0, "new": 1})
    assert config.eva_config == pc.EvaConfig(rho=1.0)


def test_a_warning_points_at_the_caller():
    for kwargs in ({"eva_config": pc.EvaConfig()}, {"alora_invocation_tokens": [1]}):
        with pytest.warns(UserWarning, match="eva_config|aLoRA") as caught:
            pc.LoraConfig(**kwargs)
        assert caught[0].filename == __file__


def test_the_caller_s_lists_are_not_shared():
    names = ["q"]
    config = pc.LoraConfig(target_modules=names)
    names.append("v")
    assert config.target_modules == {"q"}
    one, other = pc.LoraConfig(), pc.LoraConfig()
    one.rank_pattern["q"] = 1
    assert other.rank_pattern == {}
    assert one.runtime_config is not other.runtime_config


def test_custom_modules_stay_out_of_the_dict():
    config = pc.LoraConfig()
    assert config._custom_modules is None
    config._register_custom_module({int: float})
    config._register_custom_module({str: bytes})
    assert config._custom_modules == {int: float, str: bytes}
    assert config.to_dict() == pc.LoraConfig().to_dict()


def test_copies_are_equal_and_independent():
    config = pc.LoraConfig(target_modules=["q"], rank_pattern={"q": 3}, ensure_weight_tying=True)
    for duplicate in (copy.deepcopy(config), pickle.loads(pickle.dumps(config)), dataclasses.replace(config)):
        assert duplicate == config
        assert duplicate.__dict__ == config.__dict__
    copied = copy.deepcopy(config)
    copied.rank_pattern["k"] = 1
    assert config.rank_pattern == {"q": 3}


def test_it_is_no_prompt_method():
    assert not pc.LoraConfig().is_prompt_learning
    assert not pc.LoraConfig().is_adaption_prompt


@pytest.mark.parametrize("name", ["PeftType", "TaskType"])
def test_enums_are_peft_s(name):
    theirs, ours = getattr(peft, name), getattr(pc, name)
    assert {member.name: member.value for member in ours} == {member.name: member.value for member in theirs}
    assert issubclass(ours, str)


def test_enum_members_are_their_strings():
    assert pc.PeftType.LORA == "LORA"
    assert pc.TaskType("CAUSAL_LM") is pc.TaskType.CAUSAL_LM
    assert pc.LoraConfig(task_type=pc.TaskType.CAUSAL_LM).task_type == "CAUSAL_LM"
