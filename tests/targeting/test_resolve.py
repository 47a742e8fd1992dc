"""A configuration against a whole model, beside what PEFT's LoraModel does to a copy of it."""

import copy
import re
import subprocess
import sys
import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from torch import nn

from pylora.config import LoraConfig
from pylora.errors import NoMatchingPeftModuleError
from pylora.targeting import inspect_matched_modules, maybe_include_all_linear_layers, resolve, resolve_targets
from pylora.targeting.all_linear import linear_module_names
from pylora.targeting.tied import module_names_tied_with_embedding

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
tuners_utils = pytest.importorskip("peft.tuners.tuners_utils")
peft_other = pytest.importorskip("peft.utils.other")


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.v, self.norm = nn.Linear(4, 4), nn.Linear(4, 4), nn.LayerNorm(4)
        self.experts = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])


class Net(nn.Module):
    """Three blocks, one of them in two places, and a head."""

    def __init__(self, config=None):
        super().__init__()
        self.embed_tokens = nn.Embedding(8, 4)
        self.layers = nn.ModuleList([Block(), Block(), Block()])
        self.again = self.layers[2]
        self.body = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        self.score = nn.Linear(4, 2)
        if config is not None:
            self.config = config


TINY = {"vocab_size": 32, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 16}


def llama(layers=2, **kwargs):
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=layers, num_key_value_heads=2, **kwargs)
    return transformers.LlamaForCausalLM(config)


def llama_classifier(task="SequenceClassification"):
    config = transformers.LlamaConfig(**TINY, num_hidden_layers=2, num_key_value_heads=2, pad_token_id=0)
    return getattr(transformers, f"LlamaFor{task}")(config)


def gpt2():
    return transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))


def bert_classifier():
    return transformers.BertForSequenceClassification(transformers.BertConfig(**TINY, num_hidden_layers=2))


def t5():
    config = transformers.T5Config(vocab_size=32, d_model=16, d_ff=16, d_kv=8, num_layers=2, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def mamba():
    return transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=32, hidden_size=16, num_hidden_layers=2))


def peft_outcome(model, kwargs):
    """(names, resulting target_modules, warnings, exception) of PEFT on a copy of the model."""
    model, config = copy.deepcopy(model), peft.LoraConfig(**copy.deepcopy(kwargs))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            tuner = peft.LoraModel(model, config, "new")
            layers = {name for name, m in model.named_modules() if "new" in getattr(m, "r", ())}
            names = [name for name in tuner.targeted_module_names if name in layers]
            return names, config.target_modules, caught, None
        except Exception as error:
            return None, None, caught, error


def our_outcome(model, kwargs):
    config = LoraConfig(**copy.deepcopy(kwargs))
    before = copy.deepcopy(config)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            result = resolve_targets(model, config)
        except Exception as error:
            return None, None, caught, error
        finally:
            assert config == before
    for name, module in result.modules.items():
        assert model.get_submodule(name) is module
    return result.names, result.target_modules, caught, None


def assert_same_outcome(model, kwargs):
    theirs, ours = peft_outcome(model, kwargs), our_outcome(model, kwargs)
    # That a model has adapters already is the wrapper's to say, not targeting's.
    their_warnings = [w for w in theirs[2] if "Already found a `peft_config`" not in str(w.message)]
    if theirs[3] is None:
        assert ours[3] is None, ours[3]
        assert ours[0] == theirs[0]
        assert ours[1] == theirs[1]
    else:
        assert type(ours[3]).__name__ == type(theirs[3]).__name__, ours[3]
        # PEFT's first sentence is what callers match on; ours goes on to explain.
        assert str(ours[3]).startswith(str(theirs[3])), (str(ours[3]), str(theirs[3]))
    assert [beginning(w) for w in ours[2]] == [beginning(w) for w in their_warnings]


def beginning(warning):
    return warning.category, str(warning.message)[:90]


MODELS = {
    "net": Net,
    "linear": lambda: nn.Linear(2, 2),
    "empty": nn.Sequential,
    "llama": llama,
    "deep llama": lambda: llama(layers=6),
    "tied llama": lambda: llama(tie_word_embeddings=True),
    "untied llama": lambda: llama(tie_word_embeddings=False),
    "llama classifier": llama_classifier,
    "llama tokens": lambda: llama_classifier("TokenClassification"),
    "bert classifier": bert_classifier,
    "gpt2": gpt2,
    "t5": t5,
    "mamba": mamba,
}

CASES = [
    ("net", {"target_modules": ["q", "v"]}),
    ("net", {"target_modules": ["q", "v", "nothing"]}),
    ("net", {"target_modules": {"layers.0.q"}}),
    ("net", {"target_modules": ["experts.0", "score"]}),
    ("net", {"target_modules": r".*\.q"}),
    ("net", {"target_modules": r"again.*"}),
    ("net", {"target_modules": "all-linear"}),
    ("net", {"target_modules": "ALL-Linear", "exclude_modules": ["score"]}),
    ("net", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("net", {"target_modules": "all-linear", "modules_to_save": ["score"]}),
    ("net", {"target_modules": ["q"], "exclude_modules": ["layers.0.q"]}),
    ("net", {"target_modules": ["q"], "exclude_modules": ["nothing"]}),
    ("net", {"target_modules": ["q"], "exclude_modules": ["nothing"], "modules_to_save": ["score"]}),
    ("net", {"target_modules": ["q"], "exclude_modules": "(layers|again).*"}),
    ("net", {"target_modules": ["q"], "exclude_modules": ".*"}),
    ("net", {"target_modules": ["q"], "exclude_modules": [], "modules_to_save": []}),
    ("net", {"target_modules": ["score"], "modules_to_save": ["score"]}),
    ("net", {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"}),
    ("net", {"target_modules": ["q"], "layers_to_transform": [1]}),
    ("net", {"target_modules": ["q"], "layers_to_transform": 7, "layers_pattern": ["layers"]}),
    ("net", {"target_modules": ["q"], "layers_to_transform": [0], "layers_pattern": "h", "exclude_modules": ["v"]}),
    ("net", {"target_modules": ["nothing"]}),
    ("net", {"target_modules": ["nothing", "at_all"], "exclude_modules": ["q"]}),
    ("net", {"target_modules": "q"}),
    ("net", {"target_modules": ""}),
    ("net", {"target_modules": []}),
    ("net", {"target_modules": [], "exclude_modules": ["q"]}),
    ("net", {"target_modules": None}),
    ("net", {"target_modules": "dummy-target-modules"}),
    ("net", {"target_modules": ["q"], "rank_pattern": {"q": 2, "layers.1.q": 3, "k": 4}, "alpha_pattern": {"v": 1}}),
    ("net", {"target_modules": [f"layers.{i}.{p}" for i in range(3) for p in "qv"] * 4}),
    ("net", {"target_modules": [f"layers.{i}.{p}" for i in range(12) for p in "qv"]}),
    ("net", {"target_modules": [f"layers.{i}.{p}" for i in range(12) for p in ("q", "experts.0")]}),
    ("net", {"target_modules": [f"nothing{i}" for i in range(25)]}),
    ("linear", {"target_modules": "all-linear"}),
    ("linear", {"target_modules": [""]}),
    ("empty", {"target_modules": "all-linear"}),
    ("llama", {}),
    ("llama", {"target_modules": "all-linear"}),
    ("llama", {"target_modules": "all-linear", "modules_to_save": ["embed_tokens"]}),
    ("deep llama", {"target_modules": "all-linear"}),
    ("deep llama", {"target_modules": "all-linear", "exclude_modules": ["q_proj"]}),
    ("deep llama", {"target_modules": ["q_proj"], "layers_to_transform": [4, 5]}),
    ("tied llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("tied llama", {"target_modules": ["embed_tokens"]}),
    ("tied llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}),
    ("tied llama", {"target_modules": r"lm_head"}),
    ("untied llama", {"target_modules": ["q_proj", "lm_head"]}),
    ("llama classifier", {"target_modules": "all-linear"}),
    ("llama classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("llama classifier", {"target_modules": "all-linear", "task_type": "TOKEN_CLS"}),
    ("llama tokens", {"target_modules": "all-linear", "task_type": "TOKEN_CLS"}),
    ("bert classifier", {"target_modules": "all-linear", "task_type": "SEQ_CLS"}),
    ("bert classifier", {"task_type": "SEQ_CLS"}),
    ("gpt2", {"target_modules": "all-linear", "fan_in_fan_out": True}),
    ("gpt2", {"fan_in_fan_out": True}),
    ("gpt2", {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    ("t5", {}),
    ("t5", {"target_modules": "all-linear"}),
    ("t5", {"target_modules": ".*decoder.*(SelfAttention|EncDecAttention).*(q|v)$"}),
    ("mamba", {"target_modules": ["x_proj", "in_proj"]}),
]


@pytest.mark.parametrize(("model_name", "kwargs"), CASES, ids=lambda value: str(value)[:90])
def test_same_outcome_as_peft(model_name, kwargs):
    assert_same_outcome(MODELS[model_name](), kwargs)


@dataclass
class DataConfig:
    model_type: str = "llama"


class ObjectConfig:
    model_type = "llama"


class NestedConfig:
    """Like transformers' configs: a dict on demand."""

    model_type = "llama"

    def to_dict(self):
        return {"model_type": "llama"}


@pytest.mark.parametrize(
    "config",
    [{"model_type": "bert"}, DataConfig("bert"), NestedConfig(), {"model_type": "nobody"}, {"model_type": None}],
)
def test_default_by_model_type_as_peft(config):
    model = Net(config)
    model.query = nn.Linear(4, 4)
    model.q_proj = nn.Linear(4, 4)
    assert_same_outcome_but_for_hint(model)


def assert_same_outcome_but_for_hint(model):
    theirs, ours = peft_outcome(model, {}), our_outcome(model, {})
    assert ours[:2] == theirs[:2]
    assert type(ours[3]) is type(theirs[3])
    if ours[3] is not None:
        assert str(ours[3]).startswith(str(theirs[3]))


@pytest.mark.parametrize("config", [None, {}, {"other": 1}, object(), ObjectConfig, SimpleNamespace(), 5])
def test_no_default_is_one_error(config):
    model = Net(config)
    if config is ObjectConfig:
        model.q_proj = nn.Linear(4, 4)
        assert resolve_targets(model, LoraConfig()).names == ["q_proj"]
        return
    with pytest.raises(ValueError, match="Please specify `target_modules` or `target_parameters`"):
        resolve_targets(model, LoraConfig())


def test_the_defaults_are_peft_s():
    from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as theirs

    from pylora.targeting import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as ours

    assert ours == theirs


def test_a_default_that_is_an_expression():
    model = nn.Module()
    model.config = {"model_type": "gemma4"}
    model.language_model = nn.ModuleList([nn.ModuleDict({"q_proj": nn.Linear(2, 2), "k_proj": nn.Linear(2, 2)})])
    model.vision = nn.ModuleDict({"q_proj": nn.Linear(2, 2)})
    # The pattern wants something before `language_model`.
    model = nn.ModuleDict({"model": model})
    model.config = model["model"].config
    result = resolve_targets(model, LoraConfig())
    assert result.names == ["model.language_model.0.q_proj"]
    assert isinstance(result.target_modules, str)


def add_peft_adapter(model, **kwargs):
    """The model with an adapter of PEFT's in it."""
    return peft.inject_adapter_in_model(peft.LoraConfig(**kwargs), model, adapter_name="old")


SECOND = [
    {"target_modules": ["q"]},
    {"target_modules": ["q", "v"]},
    {"target_modules": r".*\.(q|experts\.0)"},
    {"target_modules": "all-linear"},
    {"target_modules": "all-linear", "exclude_modules": ["q"]},
    {"target_modules": ["base_layer"]},
    {"target_modules": ["lora_A.old", "old"]},
    {"target_modules": r".*lora_A.*"},
    {"target_modules": ["q"], "modules_to_save": ["body"]},
    {"target_modules": ["q"], "layers_to_transform": [1], "layers_pattern": "layers"},
    {"target_modules": [f"layers.{i}.{p}" for i in range(12) for p in "qv"]},
]


@pytest.mark.parametrize("kwargs", SECOND, ids=str)
@pytest.mark.parametrize("first", [{"target_modules": ["q"]}, {"target_modules": ["v", "score"]}], ids=str)
def test_a_second_adapter_extends_layers_and_leaves_their_insides(first, kwargs):
    model = add_peft_adapter(Net(), **first)
    assert_same_outcome(model, kwargs)
    if our_outcome(model, kwargs)[3] is None:
        names = resolve_targets(model, LoraConfig(**kwargs)).names
        assert not any("lora_" in name or "base_layer" in name for name in names)


def test_a_second_adapter_on_a_model_with_saved_modules():
    model = add_peft_adapter(Net(), target_modules=["q"], modules_to_save=["score"])
    for kwargs in (
        {"target_modules": ["q"], "modules_to_save": ["score"]},
        {"target_modules": "all-linear", "modules_to_save": ["score"]},
    ):
        assert_same_outcome(model, kwargs)


def test_the_caller_s_marker_of_adapted_layers_is_used():
    model = Net()
    kept = model.layers[0]
    result = resolve_targets(model, LoraConfig(target_modules=["q"]), is_tuner_layer=lambda module: module is kept)
    assert result.names == ["layers.1.q", "layers.2.q"]
    marked = resolve_targets(model, LoraConfig(target_modules=["layers.0"]), is_tuner_layer=lambda m: m is kept)
    assert marked.modules == {"layers.0": kept}


def test_the_whole_model_being_an_adapted_layer_hides_nothing():
    model = Net()
    result = resolve_targets(model, LoraConfig(target_modules=["q"]), is_tuner_layer=lambda module: module is model)
    assert len(result.names) == 3


def test_the_model_is_walked_once(monkeypatch):
    model = llama(layers=6)
    walks = []
    original = resolve._outside_tuner_layers

    def counting(root, is_tuner_layer):
        walks.append(root)
        return original(root, is_tuner_layer)

    monkeypatch.setattr(resolve, "_outside_tuner_layers", counting)
    monkeypatch.delattr(nn.Module, "named_modules")
    for target in ("all-linear", ["q_proj"], None, r".*q_proj"):
        walks.clear()
        resolve_targets(model, LoraConfig(target_modules=target))
        assert walks == [model]


STATE_DICT_CASES = [
    ["layers.0.q.lora_A.weight", "layers.0.q.lora_B.weight"],
    ["layers.0.q.lora_A.weight", "layers.1.v.lora_B.weight"],
    ["_orig_mod.layers.0.q.lora_A.weight"],
    ["layers.0.q.lora_A.weight", "layers.1.q.lora_A.weight", "layers.2.q.lora_A.weight"],
    ["elsewhere.lora_A.weight"],
    [],
]


@pytest.mark.parametrize("keys", STATE_DICT_CASES, ids=str)
@pytest.mark.parametrize(
    "kwargs", [{"target_modules": ["q"]}, {"target_modules": ["q"], "exclude_modules": ["layers.0.q"]}]
)
def test_keys_of_a_state_dict_decide(keys, kwargs):
    theirs, theirs_error, model = [], None, Net()
    with warnings.catch_warnings(record=True) as their_warnings:
        warnings.simplefilter("always")
        try:
            tuner = peft.LoraModel(
                copy.deepcopy(model), peft.LoraConfig(**kwargs), "new", state_dict=dict.fromkeys(keys)
            )
            theirs = tuner.targeted_module_names
        except ValueError as error:
            theirs_error = error
    with warnings.catch_warnings(record=True) as our_warnings:
        warnings.simplefilter("always")
        if theirs_error is not None:
            with pytest.raises(NoMatchingPeftModuleError):
                resolve_targets(model, LoraConfig(**kwargs), state_dict_keys=keys)
        else:
            assert resolve_targets(model, LoraConfig(**kwargs), state_dict_keys=keys).names == theirs
    assert [w.category for w in our_warnings] == [w.category for w in their_warnings]
    for ours, other in zip(our_warnings, their_warnings, strict=True):
        for named in re.findall(r"additional target modules: \[.*?\]", str(other.message)):
            assert named in str(ours.message)


@pytest.mark.parametrize("target", [["out_proj"], ["x_proj", "conv1d"], r".*mixer\.out_proj", "all-linear"])
def test_modules_that_mamba_bypasses_are_refused(target):
    model = mamba()
    with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
        resolve_targets(model, LoraConfig(target_modules=target))
    with pytest.raises(ValueError, match="is incompatible with Mamba-based models"):
        peft.LoraModel(model, peft.LoraConfig(target_modules=target), "new")


@pytest.mark.parametrize(
    ("kwargs", "hint"),
    [
        ({"target_modules": ["qq"]}, "Similar names in the model: 'layers.0.q'"),
        ({"target_modules": ["embed_token"]}, "Similar names in the model: 'embed_tokens'"),
        ({"target_modules": r"layers\.\d\.q$x|q"}, "this one matches a part of 'layers.0.q'"),
        ({"target_modules": "q"}, "pass a list: ['q']"),
        ({"target_modules": ["q"], "layers_to_transform": [9]}, "Only the layer rules it out for: 'layers.0.q'"),
        ({"target_modules": ["q"], "exclude_modules": ["q"]}, "Excluded although they are targets: 'layers.0.q'"),
        ({"target_modules": ["score"], "modules_to_save": ["score"]}, "Excluded although they are targets: 'score'"),
    ],
    ids=str,
)
def test_an_empty_result_says_what_came_close(kwargs, hint):
    with pytest.raises(NoMatchingPeftModuleError) as caught:
        resolve_targets(Net(), LoraConfig(**kwargs))
    assert hint in str(caught.value)


def test_a_model_without_modules_gets_advice():
    with pytest.raises(NoMatchingPeftModuleError, match=r"put it into an nn\.Sequential"):
        resolve_targets(nn.Linear(2, 2), LoraConfig(target_modules="all-linear"))


def test_warnings_come_before_anything_is_returned_or_changed():
    config = LoraConfig(target_modules=["q"], exclude_modules=["nothing"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(UserWarning, match="but no modules were excluded"):
            resolve_targets(Net(), config)


@pytest.mark.parametrize(
    "build", [llama, lambda: llama(tie_word_embeddings=True), t5, gpt2, bert_classifier, mamba, Net], ids=range(7)
)
def test_tied_names_are_peft_s(build):
    model = build()
    assert module_names_tied_with_embedding(model) == peft_other._get_module_names_tied_with_embedding(model)


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings")
def test_tied_names_inside_adapters_are_peft_s():
    model = llama(tie_word_embeddings=True)
    add_peft_adapter(model, target_modules=["embed_tokens", "lm_head"])
    assert module_names_tied_with_embedding(model) == peft_other._get_module_names_tied_with_embedding(model)
    assert module_names_tied_with_embedding(model) == ["lm_head.base_layer"]


def test_tied_keys_of_other_shapes():
    model = Net()
    model._tied_weights_keys = ["score.weight"]
    assert module_names_tied_with_embedding(model) == ["score"]
    model.config = {"tie_word_embeddings": False}
    assert module_names_tied_with_embedding(model) == []
    del model.config
    model._tied_weights_keys = {"score.weight": "embed_tokens.weight"}
    with pytest.raises(ValueError, match="get_input_embeddings"):
        module_names_tied_with_embedding(model)


def test_inspect_matched_modules_is_peft_s():
    model = Net()
    tuner = peft.LoraModel(model, peft.LoraConfig(target_modules=["q"], exclude_modules=["layers.1.q"]), "default")
    assert inspect_matched_modules(tuner) == tuners_utils.inspect_matched_modules(tuner)


@pytest.mark.parametrize("target", ["all-linear", "All-Linear", ["q"], "q", None])
def test_maybe_include_all_linear_layers_is_peft_s(target):
    model = llama()
    ours, theirs = LoraConfig(target_modules=target), peft.LoraConfig(target_modules=target)
    assert maybe_include_all_linear_layers(ours, model) is ours
    tuners_utils._maybe_include_all_linear_layers(theirs, model)
    assert ours.target_modules == theirs.target_modules


def test_the_head_stays_out_by_identity():
    model = llama()
    names = linear_module_names(model, None, list(model.named_modules()))
    assert "lm_head" not in names
    assert "model.layers.0.mlp.up_proj" in names


def test_without_transformers():
    """Neither needed nor imported, and a class that is only called Conv1D is not taken for a linear layer."""
    code = """
import sys
for name in ("transformers", "peft", "accelerate"):
    sys.modules[name] = None
from torch import nn
from pylora.config import LoraConfig
from pylora.targeting import resolve_targets

class Conv1D(nn.Linear.__mro__[1]):
    pass

model = nn.Sequential(nn.Linear(2, 2), Conv1D(), nn.Sequential(nn.Linear(2, 2)))
assert resolve_targets(model, LoraConfig(target_modules="all-linear")).names == ["0", "2.0"]
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
