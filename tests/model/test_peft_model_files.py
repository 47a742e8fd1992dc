"""PeftModel and its files: to and from the installed PEFT, and what is left when something goes wrong."""

import copy
import json
import pickle
import warnings

import peft
import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

import pylora
from pylora import LoraConfig, PeftModel, UnsupportedFeatureError, get_peft_model, get_peft_model_state_dict
from pylora.checkpoint import safetensors_file

WEIGHTS, CONFIG, CARD = "adapter_model.safetensors", "adapter_config.json", "README.md"


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.lin0 = nn.Linear(10, 12)
        self.lin1 = nn.Linear(12, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(torch.relu(self.lin1(torch.relu(self.lin0(x)))))


FIELDS = {"r": 4, "target_modules": ["lin0", "lin1"], "init_lora_weights": False}


@pytest.fixture(autouse=True)
def offline(monkeypatch):
    import huggingface_hub

    def refuse(*args, **kwargs):
        raise AssertionError(f"asked the hub: {args} {kwargs}")

    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", refuse)
    monkeypatch.setattr(huggingface_hub, "file_exists", refuse)


@pytest.fixture
def x():
    torch.manual_seed(1)
    return torch.randn(5, 10)


def make(library=pylora, seed=2, adapter_name="default", **fields):
    torch.manual_seed(seed)
    return library.get_peft_model(Mlp(), library.LoraConfig(**{**FIELDS, **fields}), adapter_name=adapter_name).eval()


def files_below(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def contents(folder):
    return {name: (folder / name).read_bytes() for name in files_below(folder)}


def state_of(module):
    return (
        [(name, id(child), child.training, sorted(child.__dict__)) for name, child in module.named_modules()],
        [(name, id(p), p.requires_grad, p.detach().clone()) for name, p in module.named_parameters()],
    )


def assert_unchanged(module, before):
    after = state_of(module)
    assert after[0] == before[0]
    for now, then in zip(after[1], before[1], strict=True):
        assert now[:3] == then[:3]
        assert torch.equal(now[3], then[3])


@pytest.fixture
def saved(tmp_path, x):
    """(folder of a saved adapter, its model's output)"""
    model = make()
    model.save_pretrained(tmp_path / "saved")
    return tmp_path / "saved", model(x).detach()


class TestBetweenPyloraAndPeft:
    @pytest.mark.parametrize("safe", [True, False])
    @pytest.mark.parametrize(
        "fields",
        [
            {},
            {"use_rslora": True, "lora_alpha": 3},
            {"bias": "all"},
            {"bias": "lora_only", "lora_bias": True},
            {"modules_to_save": ["head"], "rank_pattern": {"lin0": 2}, "alpha_pattern": {"lin1": 5}},
        ],
        ids=str,
    )
    @pytest.mark.parametrize(("writer", "reader"), [(pylora, peft), (peft, pylora)], ids=["to peft", "from peft"])
    def test_same_output_without_a_warning(self, writer, reader, fields, safe, tmp_path, x):
        model = make(writer, **fields)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PEFT takes the bias of lora_B for a shard
            model.save_pretrained(tmp_path, safe_serialization=safe)
            tensors = writer.get_peft_model_state_dict(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loaded = reader.PeftModel.from_pretrained(Mlp(), str(tmp_path))
        assert (loaded(x) - model(x)).abs().max() <= 1e-4
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = reader.get_peft_model_state_dict(loaded)
        assert set(found) == set(tensors)
        assert all(torch.equal(found[key], tensors[key]) for key in tensors)

    def test_same_files(self, tmp_path):
        folders = [tmp_path / "ours", tmp_path / "theirs"]
        for library, folder in zip((pylora, peft), folders, strict=True):
            model = make(library, modules_to_save=["head"])
            model.add_adapter("other", library.LoraConfig(r=2, target_modules=["lin1"], task_type="FEATURE_EXTRACTION"))
            model.save_pretrained(folder)
        ours, theirs = folders
        assert files_below(ours) == files_below(theirs)
        assert files_below(ours) == [CARD, CONFIG, WEIGHTS, f"other/{CONFIG}", f"other/{WEIGHTS}"]
        for name in files_below(ours):
            if name.endswith(CONFIG):
                first, second = (json.loads((folder / name).read_text()) for folder in folders)
                first["target_modules"].sort()
                second["target_modules"].sort()
                first.pop("auto_mapping"), second.pop("auto_mapping")  # names of the two Mlp's modules
                assert first == second
            if name.endswith(WEIGHTS):
                assert set(load_file(ours / name)) == set(load_file(theirs / name))


class TestSaving:
    def test_configuration(self, tmp_path):
        model = make()
        model.get_base_model().name_or_path = "some/base"
        model.save_pretrained(tmp_path)
        stored = json.loads((tmp_path / CONFIG).read_text())
        assert stored["inference_mode"] is True
        assert stored["base_model_name_or_path"] == "some/base"
        assert stored["auto_mapping"] == {"base_model_class": "Mlp", "parent_library": Mlp.__module__}
        assert model.peft_config["default"].inference_mode is False
        assert model.peft_config["default"].base_model_name_or_path is None

    def test_selected_adapters(self, tmp_path):
        model = make()
        model.add_adapter("other", LoraConfig(**FIELDS))
        model.save_pretrained(tmp_path / "one", selected_adapters=["other"])
        assert files_below(tmp_path / "one") == [CARD, f"other/{CONFIG}", f"other/{WEIGHTS}"]
        with pytest.raises(ValueError, match=r"selected_adapters.*'default', 'other'"):
            model.save_pretrained(tmp_path / "two", selected_adapters=["default", "missing"])
        assert not (tmp_path / "two").exists()

    def test_other_processes_write_nothing(self, tmp_path):
        make().save_pretrained(tmp_path / "none", is_main_process=False)
        assert not (tmp_path / "none").exists()

    def test_given_tensors(self, tmp_path):
        model = make()
        given = {key: torch.full_like(tensor, 7.0) for key, tensor in model.state_dict().items()}
        model.save_pretrained(tmp_path, state_dict=given)
        assert all(bool((tensor == 7).all()) for tensor in load_file(tmp_path / WEIGHTS).values())

    def test_a_file_where_the_folder_should_be(self, tmp_path):
        (tmp_path / "file").write_text("x")
        with pytest.raises(ValueError, match="should be a directory, not a file"):
            make().save_pretrained(tmp_path / "file")
        assert (tmp_path / "file").read_text() == "x"

    def test_a_name_that_got_past_the_checks_does_not_leave_the_folder(self, tmp_path):
        model = make()
        model.peft_config["../escaped"] = model.peft_config["default"]
        with pytest.raises(ValueError, match="adapter_name"):
            model.save_pretrained(tmp_path / "in" / "here")
        assert not any(tmp_path.iterdir())

    def test_bin_beside_older_safetensors(self, saved):
        folder, _ = saved
        with pytest.warns(UserWarning, match="is read before adapter_model.bin"):
            make(seed=3).save_pretrained(folder, safe_serialization=False)

    @pytest.mark.parametrize("failing", ["weights", "config", "card", "second adapter"])
    def test_a_failed_save_leaves_all_old_files_whole(self, saved, monkeypatch, failing):
        folder, _ = saved
        model = make(seed=3)
        model.add_adapter("other", LoraConfig(**FIELDS))
        before = contents(folder)

        def fail(*args, **kwargs):
            raise OSError("disk full")

        if failing == "weights":
            monkeypatch.setattr("safetensors.torch.save_file", fail)
        elif failing == "config":
            monkeypatch.setattr(LoraConfig, "save_pretrained", fail)
        elif failing == "card":
            monkeypatch.setattr("pylora.model.adapter_files.model_card_text", fail)
        else:
            model.lin1.lora_A["other"].to("meta")
        with pytest.raises((OSError, NotImplementedError, RuntimeError)):
            model.save_pretrained(folder)
        assert contents(folder) == before

    def test_saving_again_replaces(self, saved, x):
        folder, _ = saved
        model = make(seed=3)
        model.save_pretrained(folder)
        assert files_below(folder) == [CARD, CONFIG, WEIGHTS]
        assert torch.equal(PeftModel.from_pretrained(Mlp(), folder)(x), model(x))


class TestLoading:
    def test_frozen_and_in_eval_unless_trainable(self, saved, x):
        folder, expected = saved
        model = PeftModel.from_pretrained(Mlp().train(), folder)
        assert not model.training
        assert not any(p.requires_grad for p in model.parameters())
        assert model.peft_config["default"].inference_mode is True
        assert torch.equal(model(x), expected)

        model = PeftModel.from_pretrained(Mlp().train(), folder, is_trainable=True)
        assert model.training
        assert {n for n, p in model.named_parameters() if p.requires_grad} == {
            n for n, p in make().named_parameters() if p.requires_grad
        }
        assert torch.equal(model(x), expected)

    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_another_name(self, saved, x, low_cpu_mem_usage):
        folder, expected = saved
        model = PeftModel.from_pretrained(
            Mlp(), str(folder), adapter_name="renamed", low_cpu_mem_usage=low_cpu_mem_usage
        )
        assert model.active_adapters == ["renamed"]
        assert torch.equal(model(x), expected)
        assert not any(p.is_meta for p in model.parameters())

    def test_no_initial_values_are_drawn_for_a_load_with_low_cpu_mem_usage(self, saved):
        folder, _ = saved
        torch.manual_seed(7)
        expected = torch.rand(1)
        base = Mlp()
        torch.manual_seed(7)
        PeftModel.from_pretrained(base, folder, low_cpu_mem_usage=True)
        assert torch.equal(torch.rand(1), expected)

    def test_subfolder(self, tmp_path, x):
        model = make(adapter_name="other")
        model.save_pretrained(tmp_path)
        assert files_below(tmp_path) == [CARD, f"other/{CONFIG}", f"other/{WEIGHTS}"]
        expected = model(x)
        assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path / "other")(x), expected)
        assert torch.equal(PeftModel.from_pretrained(Mlp(), tmp_path, subfolder="other")(x), expected)

    def test_configuration_of_ones_own(self, saved, x):
        folder, expected = saved
        config = LoraConfig(**{**FIELDS, "lora_alpha": 16})
        model = PeftModel.from_pretrained(Mlp(), folder, config=config)
        assert model.peft_config["default"] is config
        assert config.inference_mode is True
        assert not torch.allclose(model(x), expected)
        with pytest.raises(ValueError, match="The input config must be a PeftConfig"):
            PeftModel.from_pretrained(Mlp(), folder, config={"r": 4})

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    @pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
    def test_dtype(self, saved, dtype, low_cpu_mem_usage):
        folder, _ = saved
        for autocast, expected in ((True, torch.float32), (False, dtype)):
            model = PeftModel.from_pretrained(
                Mlp().to(dtype), folder, autocast_adapter_dtype=autocast, low_cpu_mem_usage=low_cpu_mem_usage
            )
            assert model.lin0.lora_A.default.weight.dtype is expected

    def test_missing_keys(self, saved):
        folder, _ = saved
        tensors = load_file(folder / WEIGHTS)
        key = "base_model.model.lin1.lora_B.weight"
        del tensors[key]
        tensors["base_model.model.lin9.lora_B.weight"] = torch.zeros(1)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        with pytest.warns(UserWarning, match=r"Found missing adapter keys .*\['base_model.model.lin1.lora_B.default"):
            PeftModel.from_pretrained(Mlp(), folder)
        result = make().load_adapter(folder, "other")
        assert result.missing_keys == ["base_model.model.lin1.lora_B.other.weight"]
        assert result.unexpected_keys == ["base_model.model.lin9.lora_B.weight"]

    def test_a_name_that_is_part_of_another_is_not_mistaken(self, saved):
        """PEFT finds an adapter's keys by substring."""
        folder, _ = saved
        model = make(adapter_name="longer")
        assert model.load_adapter(folder, "long").missing_keys == []

    def test_sizes_may_be_ignored(self, saved, x):
        folder, _ = saved
        tensors = load_file(folder / WEIGHTS)
        tensors["base_model.model.lin1.lora_B.weight"] = torch.zeros(9, 4)
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        with (
            pytest.warns(UserWarning, match="Some weights of PeftModel were not initialized"),
            pytest.warns(UserWarning, match="Found missing adapter keys"),
        ):
            PeftModel.from_pretrained(Mlp(), folder, ignore_mismatched_sizes=True)

    def test_key_mapping(self, saved, x):
        folder, expected = saved
        tensors = {key.replace(".lin", ".old"): value for key, value in load_file(folder / WEIGHTS).items()}
        save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
        model = PeftModel.from_pretrained(Mlp(), folder, key_mapping={"^old": "lin"})
        assert torch.equal(model(x), expected)
        base = Mlp()
        base._checkpoint_conversion_mapping = {"^old": "lin"}
        assert torch.equal(PeftModel.from_pretrained(base, folder)(x), expected)

    def test_trained_biases_and_heads_keep_their_dtype_with_low_cpu_mem_usage(self, tmp_path):
        make(bias="all", modules_to_save=["head"]).save_pretrained(tmp_path)
        model = PeftModel.from_pretrained(Mlp().bfloat16(), tmp_path, low_cpu_mem_usage=True)
        assert model.lin0.base_layer.bias.dtype is torch.bfloat16
        assert model.head.modules_to_save.default.weight.dtype is torch.bfloat16
        assert model.lin0.lora_A.default.weight.dtype is torch.float32

    def test_hooks_of_gradient_checkpointing_are_taken_back(self, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        tiny = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        config = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
        get_peft_model(LlamaForCausalLM(tiny), config).save_pretrained(tmp_path)
        tensors = {key: torch.zeros(1, 1) for key in load_file(tmp_path / WEIGHTS)}
        save_file(tensors, tmp_path / WEIGHTS, metadata={"format": "pt"})
        base = LlamaForCausalLM(tiny)
        base.activation_checkpointing_enable()
        before, hooks = state_of(base), list(base.get_input_embeddings()._forward_hooks)
        with pytest.raises(RuntimeError, match="size mismatch"):
            PeftModel.from_pretrained(base, tmp_path)
        assert_unchanged(base, before)
        assert list(base.get_input_embeddings()._forward_hooks) == hooks

    def test_offloaded_models_are_refused(self, saved):
        base = Mlp()
        base.hf_device_map = {"lin0": 0, "lin1": "disk"}
        with pytest.raises(UnsupportedFeatureError, match="offloaded"):
            PeftModel.from_pretrained(base, saved[0])
        base.hf_device_map = {"": "cpu"}
        PeftModel.from_pretrained(base, saved[0])


class TestLoadAdapter:
    def test_beside_others(self, saved, x):
        folder, expected = saved
        model = make(seed=3).train()
        own = model(x)
        result = model.load_adapter(folder, "other")
        assert result.missing_keys == result.unexpected_keys == []
        assert not model.training
        assert model.active_adapter == "default"
        assert torch.equal(model(x), own)
        assert not any(p.requires_grad for n, p in model.named_parameters() if "other" in n)
        model.set_adapter("other")
        assert torch.equal(model(x), expected)

    def test_trainable(self, saved):
        model = make(seed=3).train()
        model.load_adapter(saved[0], "other", is_trainable=True, low_cpu_mem_usage=True)
        assert model.training
        assert model.active_adapter == "default"
        assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
        assert model.peft_config["other"].inference_mode is False

    def test_into_an_adapter_that_exists(self, saved, x):
        folder, expected = saved
        model = make(seed=3)
        model.load_adapter(folder, "default")
        assert torch.equal(model(x), expected)

    def test_names(self, saved):
        model = make()
        with pytest.raises(ValueError, match="adapter_name"):
            model.load_adapter(saved[0], "../up")

    def test_inits_that_change_the_base_are_warned_about(self, saved):
        folder, _ = saved
        model = make()
        model.peft_config["default"].init_lora_weights = "pissa"
        with pytest.warns(UserWarning, match="PiSSA changes the base weights"):
            model.load_adapter(folder, "other")

    def test_its_tensors_are_the_models_own(self, saved, tmp_path):
        """What was read becomes the parameters' memory: nothing else may see it."""
        folder, _ = saved
        stored = load_file(folder / WEIGHTS)
        model = make(seed=3)
        for name in ("first", "second"):
            model.load_adapter(folder, name, is_trainable=True)
        first = [p for n, p in model.named_parameters() if ".first." in n]
        places = {p.untyped_storage().data_ptr() for p in model.parameters()}
        assert len(places) == len(list(model.parameters()))
        for param in first:
            assert type(param) is nn.Parameter
            assert param.is_leaf
            assert param.untyped_storage().nbytes() == param.nbytes
            param.grad = torch.ones_like(param)
        torch.optim.SGD(first, lr=1.0).step()
        copied = copy.deepcopy(model)
        torch.save(model.state_dict(), tmp_path / "state.pt")
        for name, change in (("first", 1), ("second", 0)):
            for key, tensor in get_peft_model_state_dict(model, adapter_name=name).items():
                assert torch.equal(tensor, stored[key] - change)
        assert_same_state(copied.state_dict(), model.state_dict())
        assert_same_state(torch.load(tmp_path / "state.pt"), model.state_dict())
        assert_same_state(load_file(folder / WEIGHTS), stored)

    def test_tensors_of_a_pickle_that_share_memory_are_copied(self, saved):
        folder, _ = saved
        tensors = load_file(folder / WEIGHTS)
        (folder / WEIGHTS).unlink()
        keys = [key for key in tensors if key.endswith("lora_A.weight")]
        whole = torch.randn(2 * tensors[keys[0]].numel())
        assert tensors[keys[0]].shape != tensors[keys[1]].shape
        tensors[keys[0]] = whole[: tensors[keys[0]].numel()].view_as(tensors[keys[0]])
        torch.save(tensors, folder / "adapter_model.bin")
        model = make(seed=3)
        model.load_adapter(folder, "new")
        parameter = model.lin0.lora_A["new"].weight
        assert torch.equal(parameter, tensors[keys[0]])
        assert parameter.untyped_storage().nbytes() == parameter.nbytes

    def test_one_tensor_under_two_names_in_a_pickle(self, tmp_path):
        """They are two parameters in the model, so that training one must not change the other."""

        class Two(nn.Module):
            def __init__(self):
                super().__init__()
                self.one, self.two = nn.Linear(6, 6), nn.Linear(6, 6)

        config = LoraConfig(r=2, target_modules=["one", "two"])
        get_peft_model(Two(), config).save_pretrained(tmp_path)
        tensors = load_file(tmp_path / WEIGHTS)
        shared = torch.randn(2, 6)
        for key in tensors:
            if key.endswith("lora_A.weight"):
                tensors[key] = shared
        (tmp_path / WEIGHTS).unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
        model = PeftModel.from_pretrained(Two(), tmp_path)
        one, two = (layer.lora_A["default"].weight for layer in (model.one, model.two))
        with torch.no_grad():
            one.zero_()
        assert torch.equal(two, shared)

    @pytest.mark.parametrize("worth_a_thread", [0, 1 << 40])
    def test_a_file_that_is_truncated_under_a_load(self, saved, truncating, monkeypatch, worth_a_thread):
        """Also while a thread reads it and the layers have got the adapter."""
        monkeypatch.setattr(safetensors_file, "_WORTH_A_THREAD", worth_a_thread)
        folder, _ = saved
        model, base = make(seed=3), Mlp()
        before, base_before = state_of(model), copy.deepcopy(base.state_dict())
        truncating(folder / WEIGHTS, 200 + int.from_bytes((folder / WEIGHTS).read_bytes()[:8], "little"))
        whole = (folder / WEIGHTS).read_bytes()
        with pytest.raises(SafetensorError, match="became shorter while it was read"):
            model.load_adapter(folder, "new")
        assert_unchanged(model, before)
        assert list(model.peft_config) == ["default"]
        (folder / WEIGHTS).write_bytes(whole)
        with pytest.raises(SafetensorError, match="became shorter while it was read"):
            PeftModel.from_pretrained(base, folder)
        assert_same_state(base.state_dict(), base_before)

    def test_in_inference_mode(self, saved, x):
        folder, expected = saved
        model = make(seed=3)
        with torch.inference_mode():
            model.load_adapter(folder, "new")
            model.set_adapter("new")
            assert torch.equal(model(x), expected)


def assert_same_state(got, expected):
    assert got.keys() == expected.keys()
    for key, tensor in expected.items():
        assert torch.equal(got[key], tensor), key


def truncate(folder):
    (folder / WEIGHTS).write_bytes((folder / WEIGHTS).read_bytes()[:-50])


def empty(folder):
    (folder / WEIGHTS).write_bytes(b"")


def no_weights(folder):
    (folder / WEIGHTS).unlink()


def no_config(folder):
    (folder / CONFIG).unlink()


def broken_config(folder):
    (folder / CONFIG).write_text((folder / CONFIG).read_text()[:60])


def other_method(folder):
    (folder / CONFIG).write_text('{"peft_type": "IA3"}')


def bad_pickle(folder):
    (folder / WEIGHTS).unlink()
    (folder / "adapter_model.bin").write_bytes(b"garbage")


def wrong_shape(folder):
    tensors = load_file(folder / WEIGHTS)
    tensors["base_model.model.lin1.lora_B.weight"] = torch.zeros(9, 4)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def wrong_targets(folder):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, "target_modules": ["nothing"]}))


def head_not_saved(folder):
    content = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**content, "modules_to_save": ["head"]}))


# What the installed PEFT raises for the same damage; where pylora has a class of its own, its base class.
DAMAGE = {
    truncate: SafetensorError,
    empty: SafetensorError,
    no_weights: ValueError,
    no_config: ValueError,
    broken_config: json.JSONDecodeError,
    other_method: ValueError,
    bad_pickle: pickle.UnpicklingError,
    wrong_shape: RuntimeError,
    wrong_targets: ValueError,
    head_not_saved: KeyError,
}


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda function: function.__name__)
class TestDamagedFiles:
    def test_the_base_model_is_left_as_it_was(self, saved, damage, x):
        damage(saved[0])
        base = Mlp().train()
        base.lin0.bias.requires_grad_(False)
        before, expected = state_of(base), base(x)
        with pytest.raises(DAMAGE[damage]):
            PeftModel.from_pretrained(base, saved[0])
        assert_unchanged(base, before)
        assert torch.equal(base(x), expected)
        get_peft_model(base, LoraConfig(**FIELDS))

    def test_the_adapted_model_is_left_as_it_was(self, saved, damage, x):
        damage(saved[0])
        model = make(seed=3, target_modules=["lin0"])
        model.add_adapter("frozen", LoraConfig(r=2, target_modules=["lin0"], modules_to_save=["head"]))
        model.train()
        before, expected, names = state_of(model), model(x), list(model.peft_config)
        with pytest.raises(DAMAGE[damage]):
            model.load_adapter(saved[0], "new")
        assert_unchanged(model, before)
        assert list(model.peft_config) == names
        assert (model.active_adapter, model.active_adapters) == ("default", ["default"])
        assert model.base_model.targeted_module_names == ["lin0"]
        assert torch.equal(model(x), expected)
        assert type(model.lin1) is nn.Linear
        assert "new" not in {*model.lin0.r, *model.lin0.scaling, *model.lin0.lora_A, *model.lin0.lora_dropout}
        assert model.head._adapters == {"frozen"}

    def test_a_base_model_that_has_adapters_already(self, saved, damage, x):
        damage(saved[0])
        wrapped = make(seed=3, target_modules=["lin0"])
        base = wrapped.get_base_model()
        before, expected = state_of(base), base(x)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with pytest.raises(DAMAGE[damage]):
                PeftModel.from_pretrained(base, saved[0], adapter_name="new")
        assert [name for name, *_ in state_of(base)[1]] == [name for name, *_ in before[1]]
        assert list(wrapped.peft_config) == ["default"]
        assert torch.equal(wrapped(x), expected)


@pytest.mark.parametrize("damage", [d for d in DAMAGE if d is not other_method], ids=lambda function: function.__name__)
def test_peft_raises_the_same_for_damaged_files(saved, damage):
    damage(saved[0])
    with pytest.raises(DAMAGE[damage]):
        peft.PeftModel.from_pretrained(Mlp(), str(saved[0]))


class TestModelCard:
    def front_matter(self, folder):
        from huggingface_hub import ModelCard

        return ModelCard.load(folder / CARD).data.to_dict()

    def test_plain_model(self, saved):
        data = self.front_matter(saved[0])
        assert data == {"library_name": "peft", "tags": ["lora"]}
        assert "PeftModel.from_pretrained" in (saved[0] / CARD).read_text()

    def test_transformers_model(self, tmp_path):
        from transformers import LlamaConfig, LlamaForCausalLM

        tiny = LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
        )
        base = LlamaForCausalLM(tiny)
        base.save_pretrained(tmp_path / "base")
        base = LlamaForCausalLM.from_pretrained(tmp_path / "base")
        base.add_model_tags(["mine"])
        model = get_peft_model(base, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM"))
        model.save_pretrained(tmp_path / "adapter")
        data = self.front_matter(tmp_path / "adapter")
        base_id = str(tmp_path / "base")
        assert data["base_model"] == base_id
        assert data["pipeline_tag"] == "text-generation"
        assert set(data["tags"]) == {"lora", "transformers", "mine", f"base_model:adapter:{base_id}"}

    def test_a_new_card_tells_the_settings_and_asks_for_the_rest(self, tmp_path):
        make(r=3, target_modules="lin0|lin1", lora_dropout=0.1).save_pretrained(tmp_path)
        text = (tmp_path / CARD).read_text()
        for line in ("| `r` | `3` |", "| `lora_dropout` | `0.1` |", r"| `target_modules` | `lin0\|lin1` |"):
            assert line in text.splitlines()
        assert "use_dora" not in text
        assert "**Training data:** [" in text

    def test_an_existing_card_is_brought_up_to_date(self, tmp_path):
        (tmp_path / CARD).write_text("---\nlicense: mit\ntags:\n- own\n---\n\n# My words\n")
        model = make()
        model.save_pretrained(tmp_path)
        model.create_or_update_model_card(tmp_path)
        text = (tmp_path / CARD).read_text()
        assert "# My words" in text
        assert text.count("- PEFT") == text.count("### Framework versions") == 1
        assert self.front_matter(tmp_path) == {"license": "mit", "library_name": "peft", "tags": ["lora", "own"]}

    def test_quantization(self, tmp_path):
        model = make()
        model.get_base_model().config = {"model_type": "custom", "quantization_config": {"load_in_4bit": True}}
        model.create_or_update_model_card(tmp_path)
        assert "- load_in_4bit: True" in (tmp_path / CARD).read_text()

    def test_without_the_hub_library_there_is_no_card(self, tmp_path, monkeypatch):
        monkeypatch.setattr("pylora.model.model_card.find_spec", lambda name: None)
        make().save_pretrained(tmp_path)
        assert files_below(tmp_path) == [CONFIG, WEIGHTS]


def test_push_to_hub_uploads_what_is_saved(monkeypatch):
    import huggingface_hub

    uploads = []

    class Api:
        def __init__(self, token=None):
            self.token = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            assert exist_ok
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            from pathlib import Path

            uploads.append((repo_id, files_below(Path(folder_path)), self.token, kwargs))
            return "https://commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    url = make().push_to_hub("name", token="t", commit_message="first", safe_serialization=False)
    assert url == "https://commit"
    assert uploads == [("me/name", [CARD, CONFIG, "adapter_model.bin"], "t", {"commit_message": "first"})]
