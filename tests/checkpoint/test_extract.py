"""The tensors that make up an adapter: the same keys and values as the installed PEFT gives for the same model."""

import warnings

import peft
import pytest
import torch
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

import pylora
from pylora.checkpoint import get_peft_model_state_dict
from pylora.errors import PeftWarning


def assert_same_tensors(ours, theirs):
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key


# What pylora's own layers do not have yet is looked for in PEFT's.
ONLY_PEFT = {"target_modules": ["q_proj"], "use_dora": True}
FIELDS = [
    {"target_modules": "all-linear"},
    {"target_modules": ["q_proj", "v_proj"], "bias": "all"},
    {"target_modules": ["q_proj"], "bias": "lora_only"},
    {"target_modules": ["q_proj"], "lora_bias": True},
    {"target_modules": ["q_proj"], "lora_bias": True, "bias": "all"},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "embed_tokens"], "bias": "all"},
    {"target_modules": r".*\.0\.mlp\.(up|down)_proj", "rank_pattern": {"up_proj": 2}},
    ONLY_PEFT,
    {"target_modules": ["q_proj", "embed_tokens"]},
    {"target_modules": r".*(embed_tokens|q_proj)"},
    {"target_modules": ["q_proj"], "trainable_token_indices": [1, 5]},
    {"target_modules": ["q_proj"], "target_parameters": ["mlp.up_proj.weight"]},
]


@pytest.mark.parametrize("fields", FIELDS, ids=str)
@pytest.mark.parametrize("save_embedding_layers", ["auto", True, False])
def test_same_entries_as_peft_on_its_models(llama, wrap, fields, save_embedding_layers):
    model = wrap(peft, llama(), **fields)
    if fields.get("bias", "none") == "none":
        model.add_adapter("other", model.peft_config["default"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name in model.peft_config:
            arguments = {"adapter_name": name, "save_embedding_layers": save_embedding_layers}
            theirs = peft.get_peft_model_state_dict(model, **arguments)
            assert_same_tensors(get_peft_model_state_dict(model, **arguments), theirs)
            given = {key: tensor + 1 for key, tensor in model.state_dict().items()}
            theirs = peft.get_peft_model_state_dict(model, state_dict=given, **arguments)
            assert_same_tensors(get_peft_model_state_dict(model, state_dict=given, **arguments), theirs)


@pytest.mark.parametrize("fields", FIELDS[:8], ids=str)
def test_same_entries_as_peft_from_the_same_seed(llama, wrap, fields):
    ours = get_peft_model_state_dict(wrap(pylora, llama(), **fields))
    theirs = peft.get_peft_model_state_dict(wrap(peft, llama(), **fields))
    assert_same_tensors(ours, theirs)


def test_the_adapter_is_chosen_by_name(mlp, wrap):
    model = wrap(pylora, mlp(), target_modules=["lin0"])
    model.add_adapter("other", pylora.LoraConfig(target_modules=["lin1"], modules_to_save=["head"]))
    assert sorted(get_peft_model_state_dict(model)) == [
        "base_model.model.lin0.lora_A.weight",
        "base_model.model.lin0.lora_B.weight",
    ]
    assert sorted(get_peft_model_state_dict(model, adapter_name="other")) == [
        "base_model.model.head.bias",
        "base_model.model.head.weight",
        "base_model.model.lin1.lora_A.weight",
        "base_model.model.lin1.lora_B.weight",
    ]
    with pytest.raises(KeyError, match="missing"):
        get_peft_model_state_dict(model, adapter_name="missing")


def test_an_adapter_called_like_a_module_hides_nothing(mlp, wrap):
    """PEFT leaves out every key with ".lin0." in it when another adapter is called "lin0"."""
    model = wrap(pylora, mlp(), target_modules=["lin0", "lin1"])
    model.add_adapter("lin0", pylora.LoraConfig(target_modules=["lin0"]))
    assert "base_model.model.lin0.lora_A.weight" in get_peft_model_state_dict(model)


@pytest.mark.parametrize("name", ["bias", "weight", "base_layer", "norm"])
def test_an_adapter_called_like_a_part_of_the_base_keeps_the_bases_keys(mlp, wrap, name):
    fields = {"target_modules": ["lin0"], "bias": "all", "modules_to_save": ["head"]}
    model = pylora.get_peft_model(mlp(), pylora.LoraConfig(**fields), adapter_name=name)
    plain = get_peft_model_state_dict(wrap(pylora, mlp(), **fields))
    assert set(get_peft_model_state_dict(model, adapter_name=name)) == set(plain)


@pytest.mark.parametrize("fields", [{"target_modules": ["lin0"]}, {"target_modules": ["lin0"], "bias": "lora_only"}])
def test_activation_checkpointing_wrappers_leave_no_trace(mlp, wrap, fields):
    model = wrap(pylora, mlp(), modules_to_save=["head"], **fields)
    plain, base = get_peft_model_state_dict(model), set(pylora.get_base_model_state_dict(model))
    inner = model.get_base_model()
    for child in ("lin0", "head", "norm"):
        setattr(inner, child, checkpoint_wrapper(getattr(inner, child)))
    assert_same_tensors(get_peft_model_state_dict(model), plain)
    assert set(pylora.get_base_model_state_dict(model)) == base
    new = {key: torch.randn_like(tensor) for key, tensor in plain.items()}
    assert pylora.set_peft_model_state_dict(model, new).unexpected_keys == []
    assert_same_tensors(get_peft_model_state_dict(model), new)


def test_a_base_module_called_like_a_factor_is_not_taken_for_one(wrap):
    base = torch.nn.Sequential()
    base.add_module("lora_A", torch.nn.Linear(3, 3))
    base.add_module("q", torch.nn.Linear(3, 3))
    model = wrap(pylora, base, target_modules=["q"])
    assert sorted(get_peft_model_state_dict(model)) == [
        "base_model.model.q.lora_A.weight",
        "base_model.model.q.lora_B.weight",
    ]


def test_entries_are_the_models_tensors(mlp, wrap):
    model = wrap(pylora, mlp(), target_modules=["lin0"])
    entry = get_peft_model_state_dict(model)["base_model.model.lin0.lora_A.weight"]
    assert entry.data_ptr() == model.base_model.model.lin0.lora_A.default.weight.data_ptr()


def test_injected_models_have_no_prefix(mlp):
    from pylora.model.mapping import inject_adapter_in_model

    model = inject_adapter_in_model(pylora.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]), mlp())
    assert sorted(get_peft_model_state_dict(model)) == [
        "head.bias",
        "head.weight",
        "lin0.lora_A.weight",
        "lin0.lora_B.weight",
    ]


def test_compiled_models_are_unwrapped(mlp, wrap):
    model = wrap(pylora, mlp(), target_modules=["lin0"])
    compiled = torch.compile(model, backend="eager")
    assert_same_tensors(get_peft_model_state_dict(compiled, unwrap_compiled=True), get_peft_model_state_dict(model))


def test_shards_are_warned_about(mlp, wrap):
    model = wrap(pylora, mlp(), target_modules=["lin0"], lora_bias=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        get_peft_model_state_dict(model)
    model.base_model.model.lin0.lora_A.default.weight.data = torch.zeros(0)
    with pytest.warns(PeftWarning, match="invalid shape.*lin0.lora_A.weight"):
        get_peft_model_state_dict(model)


class TestEmbeddings:
    def test_targeted(self, llama, wrap):
        model = wrap(peft, llama(), target_modules=["q_proj", "embed_tokens"])
        with pytest.warns(UserWarning, match="embedding layers found in `target_modules`"):
            found = get_peft_model_state_dict(model)
        assert "base_model.model.model.embed_tokens.base_layer.weight" in found
        assert "base_model.model.lm_head.weight" not in found

    def test_resized_after_the_base_model_was_saved(self, llama, wrap, tmp_path):
        base = llama()
        base.save_pretrained(tmp_path)
        model = wrap(pylora, base, target_modules=["q_proj"])
        model.peft_config["default"].base_model_name_or_path = str(tmp_path)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert not any("embed_tokens" in key for key in get_peft_model_state_dict(model))
        base.resize_token_embeddings(56)
        with pytest.warns(UserWarning, match="has been resized during finetuning"):
            found = get_peft_model_state_dict(model)
        assert found["base_model.model.model.embed_tokens.weight"].shape == (56, 16)
        assert found["base_model.model.lm_head.weight"].shape == (56, 16)

    @pytest.mark.parametrize("base_id", ["owner/base", "a-folder"])
    def test_a_base_that_cannot_be_read_is_taken_for_unchanged(self, llama, wrap, base_id, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "a-folder").mkdir()
        if base_id == "a-folder":  # a local folder is not asked for on the hub, online or not
            monkeypatch.setenv("HF_HUB_OFFLINE", "0")
        model = wrap(pylora, llama(), target_modules=["q_proj"])
        model.peft_config["default"].base_model_name_or_path = base_id
        with pytest.warns(UserWarning, match="Could not find a config file in .*vocabulary was not modified"):
            found = get_peft_model_state_dict(model)
        assert all("lora_" in key for key in found)

    def test_asked_for_on_a_model_that_cannot_tell(self, mlp, wrap):
        model = wrap(pylora, mlp(), target_modules=["lin0"])
        with pytest.warns(UserWarning, match="Could not identify embedding layer"):
            get_peft_model_state_dict(model, save_embedding_layers=True)


def test_the_cost_does_not_grow_with_the_number_of_adapters(mlp, wrap, monkeypatch):
    """What other adapters hold is not asked for its state."""
    model = wrap(pylora, mlp(), target_modules=["lin0", "lin1"], modules_to_save=["head"])

    def modules_asked():
        asked = []
        original = torch.nn.Module._save_to_state_dict
        with monkeypatch.context() as patch:
            patch.setattr(
                torch.nn.Module, "_save_to_state_dict", lambda *args, **kw: asked.append(original(*args, **kw))
            )
            get_peft_model_state_dict(model)
        return len(asked)

    alone = modules_asked()
    for i in range(5):
        config = pylora.LoraConfig(target_modules=["lin0", "lin1"], modules_to_save=["head"])
        model.add_adapter(f"other{i}", config)
    assert 0 < modules_asked() == alone


def test_hooks_on_state_dicts_run(mlp, wrap):
    """A module with a hook gives its whole state, of which other adapters' tensors are left out afterwards."""
    model = wrap(pylora, mlp(), target_modules=["lin0"], modules_to_save=["head"])
    model.add_adapter("other", pylora.LoraConfig(target_modules=["lin0"], modules_to_save=["head"]))
    plain = get_peft_model_state_dict(model)
    seen = []
    for module in (model, model.get_base_model().lin0, model.get_base_model().lin0.lora_A["default"]):
        module.register_state_dict_post_hook(lambda module, state, prefix, metadata: seen.append(prefix))
        assert_same_tensors(get_peft_model_state_dict(model), plain)
    assert "base_model.model.lin0." in seen
    assert seen.count("") == 3
