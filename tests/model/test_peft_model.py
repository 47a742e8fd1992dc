"""PeftModel as an object: construction, attributes, adapters, forward; its files are in test_peft_model_files.py."""

import copy
import pickle
import warnings

import pytest
import torch
from torch import nn

import pylora
from pylora import LoraConfig, PeftModel, UnsupportedFeatureError, get_peft_model
from pylora.model.mapping import get_peft_config, inject_adapter_in_model
from pylora.model.task_models import PeftModelForCausalLM


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = nn.Linear(10, 12)
        self.lin1 = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)
        self.note = "mine"

    def forward(self, x, scale=1.0):
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x))))) * scale


def config(**fields):
    return LoraConfig(**{"r": 4, "target_modules": ["lin0", "lin1"], "init_lora_weights": False, **fields})


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, 10)


@pytest.fixture
def model():
    torch.manual_seed(2)
    return get_peft_model(Mlp(), config()).eval()


def state_of(module):
    """Everything that a failed call must leave alone."""
    return (
        [(name, id(child), child.training) for name, child in module.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()],
        [(name, dict(child._forward_hooks)) for name, child in module.named_modules()],
        sorted(module.__dict__),
    )


def assert_unchanged(module, before):
    after = state_of(module)
    assert after[0] == before[0]
    assert after[2:] == before[2:]
    for now, then in zip(after[1], before[1], strict=True):
        assert now[:3] == then[:3]
        assert torch.equal(now[3], then[3])


class TestConstruction:
    def test_attributes(self, model):
        assert isinstance(model, PeftModel)
        assert model.active_adapter == "default"
        assert model.active_adapters == ["default"]
        assert list(model.peft_config) == ["default"]
        assert model.active_peft_config is model.peft_config["default"]
        assert model.peft_type == "LORA"
        assert model.modules_to_save is None
        assert model.get_base_model() is model.base_model.model
        assert model.has_active_enabled_adapter
        assert type(model.base_model).__name__ == "LoraModel"

    def test_other_attributes_are_the_base_models(self, model):
        assert model.note == "mine"
        assert model.lin0 is model.base_model.model.lin0
        with pytest.raises(AttributeError, match="no_such_thing"):
            _ = model.no_such_thing

    def test_an_object_that_was_never_initialised_has_no_attributes(self):
        with pytest.raises(AttributeError):
            _ = PeftModel.__new__(PeftModel).anything

    def test_only_the_adapter_is_trained(self, model, capsys):
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == {
            f"base_model.model.{layer}.lora_{ab}.default.weight" for layer in ("lin0", "lin1") for ab in "AB"
        }
        assert model.get_nb_trainable_parameters() == (4 * (10 + 12 + 12 + 8), 431)
        model.print_trainable_parameters()
        assert capsys.readouterr().out == "trainable params: 168 || all params: 431 || trainable%: 38.9791\n"

    def test_modules_to_save_of_all_adapters(self, model):
        model.add_adapter("other", config(modules_to_save=["head"]))
        assert model.modules_to_save == {"head"}

    def test_half_precision_adapters_are_kept_in_f32_unless_told(self):
        for autocast, expected in ((True, torch.float32), (False, torch.bfloat16)):
            model = get_peft_model(Mlp().bfloat16(), config(), autocast_adapter_dtype=autocast)
            assert model.lin0.lora_A.default.weight.dtype is expected
            model.add_adapter("other", config(), autocast_adapter_dtype=autocast)
            assert model.lin0.lora_A.other.weight.dtype is expected

    def test_meta(self):
        model = get_peft_model(Mlp(), config(), low_cpu_mem_usage=True)
        assert model.lin0.lora_A.default.weight.is_meta
        assert not model.lin0.base_layer.weight.is_meta

    @pytest.mark.parametrize("name", ["", "a.b", "..", "../up", "/abs", "a/b", "a\\b", "nul\0", "keys"])
    def test_refused_names_change_nothing(self, name):
        base = Mlp()
        before = state_of(base)
        with pytest.raises((ValueError, KeyError)):
            get_peft_model(base, config(), adapter_name=name)
        assert_unchanged(base, before)

    @pytest.mark.parametrize(
        "fields",
        [
            {"target_modules": ["nothing"]},
            {"target_modules": ["lin0"], "bias": "sometimes"},
            {"target_modules": ["lin0"], "velora_config": {}},
            {"target_modules": ["lin0"], "r": 0},
            {"target_modules": ["lin0"], "task_type": "CAUSAL_LM"},
        ],
        ids=str,
    )
    def test_a_failure_changes_neither_model_nor_configuration(self, fields):
        base, peft_config = Mlp(), config(**fields)
        base.name_or_path = "some/base"
        before, fields_before = state_of(base), dict(peft_config.__dict__)
        with pytest.raises((ValueError, NotImplementedError, AttributeError)):
            get_peft_model(base, peft_config)
        assert_unchanged(base, before)
        assert peft_config.__dict__ == fields_before

    def test_task_without_generation(self):
        with pytest.raises(AttributeError, match="prepare_inputs_for_generation"):
            get_peft_model(Mlp(), config(task_type="CAUSAL_LM"))

    def test_other_methods_and_mixed_models(self):
        with pytest.raises(ValueError, match="pylora is LoRA"):
            get_peft_model(Mlp(), pylora.PeftConfig(peft_type="IA3"))
        with pytest.raises(UnsupportedFeatureError, match="mixed"):
            get_peft_model(Mlp(), config(), mixed=True)

    def test_no_task_gives_a_plain_model(self):
        assert type(get_peft_model(Mlp(), config())) is PeftModel


class TestWarnings:
    def test_second_wrap(self):
        base = Mlp()
        get_peft_model(base, config())
        with pytest.warns(UserWarning, match="with PEFT for a second time"):
            get_peft_model(base, config(), adapter_name="second")

    def test_renamed_base(self):
        base = Mlp()
        base.name_or_path = "new/base"
        peft_config = config(base_model_name_or_path="old/base")
        with pytest.warns(UserWarning, match="renamed from 'old/base' to 'new/base'"):
            get_peft_model(base, peft_config)
        assert peft_config.base_model_name_or_path == "new/base"

    def test_revision(self):
        peft_config = config()
        get_peft_model(Mlp(), peft_config, revision="v1")
        assert peft_config.revision == "v1"
        with pytest.warns(UserWarning, match="already set base model revision to v1"):
            get_peft_model(Mlp(), peft_config, revision="v2")
        assert peft_config.revision == "v2"

    def test_name_inside_the_prefix(self, model):
        with pytest.warns(UserWarning, match="should not be contained in the prefix 'lora_'"):
            get_peft_model(Mlp(), config(), adapter_name="lora")
        with pytest.warns(UserWarning, match="should not be contained in the prefix 'lora_'"):
            model.add_adapter("ora", config())

    def test_none_otherwise(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            get_peft_model(Mlp(), config()).add_adapter("other", config())


class TestAdapters:
    def test_a_new_adapter_is_inactive_and_frozen(self, model, x):
        before = model(x)
        trainable = [p for p in model.parameters() if p.requires_grad]
        model.add_adapter("other", config(r=2))
        assert model.active_adapter == "default"
        assert torch.equal(model(x), before)
        assert [p for p in model.parameters() if p.requires_grad] == trainable

    def test_set_adapter(self, model, x):
        default = model(x)
        model.add_adapter("other", config(r=2))
        model.set_adapter("other")
        assert model.active_adapter == "other"
        assert model.active_adapters == ["other"]
        assert not torch.equal(model(x), default)
        assert all("other" in name for name, p in model.named_parameters() if p.requires_grad)
        model.set_adapter("default", inference_mode=True)
        assert torch.equal(model(x), default)
        assert not any(p.requires_grad for p in model.parameters())
        model.set_requires_grad("default")
        assert all("default" in name for name, p in model.named_parameters() if p.requires_grad)

    def test_several_active_adapters(self, model, x):
        model.add_adapter("other", config(r=2))
        model.base_model.set_adapter(["default", "other"])
        assert model.active_adapters == ["default", "other"]
        assert model.active_adapter == "default"
        assert model.get_model_status().active_adapters == ["default", "other"]

    def test_delete_adapter(self, model, x):
        default = model(x)
        model.add_adapter("other", config())
        model.set_adapter("other")
        with pytest.warns(UserWarning, match="Setting active adapter to default"):
            model.delete_adapter("other")
        assert model.active_adapter == "default"
        assert list(model.peft_config) == ["default"]
        assert torch.equal(model(x), default)

    def test_names_that_are_not_there_or_taken(self, model):
        before = state_of(model)
        with pytest.raises(ValueError, match="Adapter missing not found"):
            model.set_adapter("missing")
        with pytest.raises(ValueError, match="Adapter missing does not exist"):
            model.delete_adapter("missing")
        with pytest.raises(ValueError, match="'default' already exists"):
            model.add_adapter("default", config())
        with pytest.raises(ValueError, match="adapter_name"):
            model.add_adapter("../up", config())
        with pytest.raises(ValueError, match="pylora is LoRA"):
            model.add_adapter("other", pylora.PeftConfig(peft_type="IA3"))
        assert_unchanged(model, before)

    def test_add_adapter_that_fails_leaves_no_trace(self, model):
        before = state_of(model)
        with pytest.raises(ValueError):
            model.add_adapter("other", config(target_modules=["nothing"]))
        assert list(model.peft_config) == ["default"]
        assert_unchanged(model, before)

    def test_merging_is_reached_through_the_model(self, model, x):
        expected = model(x)
        model.merge_adapter()
        torch.testing.assert_close(model(x), expected)
        with pytest.raises(ValueError, match="merged"):
            model.delete_adapter("default")
        model.unmerge_adapter()
        torch.testing.assert_close(model(x), expected)
        merged = model.merge_and_unload()
        assert type(merged) is Mlp
        assert not hasattr(merged, "peft_config")
        torch.testing.assert_close(merged(x), expected)


class TestDisable:
    def test_the_base_model_shows(self, model, x):
        adapted, base = model(x), Mlp()(x)
        with model.disable_adapter():
            assert not model.has_active_enabled_adapter
            torch.testing.assert_close(model(x), base)
        assert model.has_active_enabled_adapter
        assert torch.equal(model(x), adapted)

    def test_it_ends_when_the_block_raises(self, model, x):
        adapted = model(x)
        with pytest.raises(RuntimeError, match="inside"), model.disable_adapter():
            raise RuntimeError("inside")
        assert torch.equal(model(x), adapted)

    def test_what_was_disabled_stays_disabled(self, model, x):
        base = Mlp()(x)
        model.base_model.disable_adapter_layers()
        with model.disable_adapter():
            pass
        torch.testing.assert_close(model(x), base)

    def test_partly_disabled(self, model, x):
        adapted = model(x)
        model.lin0.enable_adapters(False)
        with (
            pytest.warns(UserWarning, match="some adapter layers that are enabled and others"),
            model.disable_adapter(),
        ):
            pass
        assert torch.equal(model(x), adapted)


class TestForward:
    def test_arguments_reach_the_base_model(self, model, x):
        torch.testing.assert_close(model(x, scale=2.0), model(x) * 2)
        torch.testing.assert_close(model(x=x), model(x))

    def test_gradients_reach_the_adapter_only(self, model, x):
        model.train()
        model(x).sum().backward()
        for name, parameter in model.named_parameters():
            assert (parameter.grad is not None) == ("lora_" in name), name

    def test_copies_compute_the_same(self, model, x):
        expected = model(x)
        assert torch.equal(copy.deepcopy(model)(x), expected)
        assert torch.equal(pickle.loads(pickle.dumps(model))(x), expected)

    def test_adapters_by_row(self, model, x):
        model.add_adapter("other", config(r=2))
        default = model(x)
        model.set_adapter("other")
        other = model(x)
        names = ["default", "other", "__base__", "default", "other"]
        mixed = model(x, adapter_names=names)
        base = Mlp()(x)
        expected = {"default": default, "other": other, "__base__": base}
        for row, name in enumerate(names):
            torch.testing.assert_close(mixed[row], expected[name][row])


class TestStatus:
    def test_layers(self, model):
        model.add_adapter("other", config(target_modules=["lin1"], modules_to_save=["head"]))
        lin0, lin1, head = model.get_layer_status()
        assert (lin0.name, lin0.module_type, lin0.enabled) == ("model.lin0", "lora.Linear", True)
        assert (lin0.active_adapters, lin0.merged_adapters) == (["default"], [])
        assert lin0.requires_grad == {"default": True}
        assert lin1.available_adapters == ["default", "other"]
        assert lin1.requires_grad == {"default": True, "other": False}
        assert lin1.devices == {"default": ["cpu"], "other": ["cpu"]}
        assert (head.name, head.module_type) == ("model.head", "ModulesToSaveWrapper")

    def test_model(self, model):
        status = model.get_model_status()
        assert (status.base_model_type, status.adapter_model_type) == ("Mlp", "LoraModel")
        assert status.peft_types == {"default": "LORA"}
        assert (status.trainable_params, status.total_params) == (168, 431)
        assert status.num_adapter_layers == 2
        assert status.enabled is True
        assert status.requires_grad == {"default": True}
        model.lin0.merge()
        model.lin1.enable_adapters(False)
        model.lin1.lora_A.default.weight.requires_grad_(True)
        status = model.get_model_status()
        assert status.enabled == "irregular"
        assert status.merged_adapters == "irregular"
        assert status.requires_grad == {"default": "irregular"}

    def test_injected_and_plain_models(self):
        from pylora.model.status import get_model_status

        injected = inject_adapter_in_model(config(), Mlp())
        assert type(injected) is Mlp
        status = get_model_status(injected)
        assert (status.base_model_type, status.adapter_model_type) == ("other", "None")
        with pytest.raises(ValueError, match="No adapter layers found"):
            get_model_status(Mlp())


class TestGradientCheckpointing:
    def test_embeddings_output_requires_a_gradient(self):
        from transformers import LlamaConfig, LlamaForCausalLM

        tiny = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2
        )
        ids = torch.arange(6)[None]
        grads = []
        for checkpointing in (False, True):
            torch.manual_seed(0)
            base = LlamaForCausalLM(tiny)
            if checkpointing:
                base.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
            torch.manual_seed(1)
            model = get_peft_model(base, config(target_modules=["q_proj"], task_type="CAUSAL_LM")).train()
            model(input_ids=ids, labels=ids).loss.backward()
            grads.append([p.grad for p in model.parameters() if p.requires_grad])
        assert len(grads[0]) == 4
        for plain, replayed in zip(*grads, strict=True):
            torch.testing.assert_close(plain, replayed)

    def test_a_model_with_embeddings_only(self):
        class Embedding(Mlp):
            def __init__(self):
                super().__init__()
                self.emb = nn.Embedding(7, 10)

            def get_input_embeddings(self):
                return self.emb

            def forward(self, ids):
                return super().forward(self.emb(ids))

        model = get_peft_model(Embedding(), config())
        assert model.emb(torch.tensor([1])).requires_grad


def test_configuration_from_a_dictionary():
    made = get_peft_config({"peft_type": "LORA", "r": 3, "target_modules": ["q"]})
    assert isinstance(made, LoraConfig)
    assert made.r == 3
    with pytest.raises(KeyError):
        get_peft_config({"peft_type": "NO_METHOD"})


def test_injection_by_checkpoint_keys():
    keys = {"lin1.lora_A.weight": torch.zeros(1), "lin1.lora_B.weight": torch.zeros(1)}
    with pytest.warns(RuntimeWarning, match="lin0"):
        model = inject_adapter_in_model(config(), Mlp(), state_dict=keys)
    assert hasattr(model.lin1, "lora_A")
    assert not hasattr(model.lin0, "lora_A")


def test_task_class_is_chosen_for_models_that_generate():
    class Generator(Mlp):
        def prepare_inputs_for_generation(self, ids, **kwargs):
            return {"input_ids": ids, "cache_position": 1}

    model = get_peft_model(Generator(), config(task_type="CAUSAL_LM"))
    assert type(model) is PeftModelForCausalLM
    assert model.prepare_inputs_for_generation(3) == {"input_ids": 3}
