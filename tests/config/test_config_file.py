"""adapter_config.json: written by one library and read by the other, broken files, and that reading runs nothing."""

import json
import os
import stat
import subprocess
import sys
import warnings

import pytest

import pylora.config as pc
from pylora.config import base, files
from pylora.errors import UnsupportedFeatureError

peft = pytest.importorskip("peft")

# Every field of the file with a value that is not its default, in groups that the constructor accepts together.
NON_DEFAULT = [
    {
        "task_type": "CAUSAL_LM",
        "auto_mapping": {"base_model_class": "X", "parent_library": "os"},
        "peft_version": "0.1.2",
        "base_model_name_or_path": "some/model",
        "revision": "main",
        "inference_mode": True,
        "r": 3,
        "target_modules": ["b", "a"],
        "exclude_modules": ["d", "c"],
        "lora_alpha": 5,
        "lora_dropout": 0.25,
        "fan_in_fan_out": True,
        "bias": "lora_only",
        "use_rslora": True,
        "modules_to_save": ["head", "a"],
        "init_lora_weights": "gaussian",
        "layers_to_transform": [1, 2],
        "layers_pattern": ["h"],
        "rank_pattern": {"a": 2},
        "alpha_pattern": {"b": 7},
        "megatron_config": {"x": 1},
        "megatron_core": "other.core",
        "trainable_token_indices": {"embed": [1, 2]},
        "layer_replication": [[0, 2], [1, 3]],
        "target_parameters": ["experts.w"],
        "ensure_weight_tying": True,
        "qalora_group_size": 32,
        "use_qalora": True,
    },
    {"use_dora": True, "target_modules": ".*q", "exclude_modules": ".*k", "init_lora_weights": False},
    {"lora_bias": True},
    {"init_lora_weights": "loftq", "loftq_config": {"loftq_bits": 2, "loftq_iter": 3}},
    {"init_lora_weights": "eva", "eva_config": {"rho": 1.5, "tau": 0.5, "whiten": True}},
    {"init_lora_weights": "corda", "corda_config": {"corda_method": "kpm", "cache_file": "x"}},
    {"init_lora_weights": "lora_ga", "lora_ga_config": {"direction": "ArBr", "scale": "unit", "stable_gamma": 2}},
    {"velora_config": {"num_groups": 8, "scale": 0.5, "init_type": "random"}},
    {"task_type": "CAUSAL_LM", "alora_invocation_tokens": [5, 6]},
    {"monteclora_config": {"num_samples": 2}},
    {"use_bdlora": {"nblocks": 2, "target_modules_bd_a": ["o"]}},
    {"arrow_config": {"top_k": 1, "rng_seed": 4}},
    {"kasa_config": {"beta": 0.5}},
]


def quietly(function, *args, **kwargs):
    """The result of a call that must not warn."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return function(*args, **kwargs)


def write(folder, text):
    (folder / base.CONFIG_NAME).write_text(text)
    return folder


def test_the_groups_cover_every_field():
    covered = {key for group in NON_DEFAULT for key in group}
    default = pc.LoraConfig().to_dict()
    assert covered == set(default) - {"peft_type"}
    for group in NON_DEFAULT:
        for key, value in group.items():
            assert default[key] != value, key


@pytest.mark.parametrize("kwargs", [{}, *NON_DEFAULT], ids=lambda kwargs: ",".join(kwargs)[:40])
@pytest.mark.parametrize("reader", ["LoraConfig", "PeftConfig"])
def test_each_library_reads_the_other_s_file(tmp_path, kwargs, reader):
    ours, theirs = pc.LoraConfig(**kwargs), peft.LoraConfig(**kwargs)
    ours.save_pretrained(tmp_path / "pylora")
    theirs.save_pretrained(tmp_path / "peft")

    read_by_peft = quietly(getattr(peft, reader).from_pretrained, tmp_path / "pylora")
    assert type(read_by_peft) is peft.LoraConfig
    assert read_by_peft.to_dict() == theirs.to_dict()

    read_by_us = quietly(getattr(pc, reader).from_pretrained, tmp_path / "peft")
    assert type(read_by_us) is pc.LoraConfig
    assert read_by_us == ours
    assert quietly(getattr(pc, reader).from_pretrained, tmp_path / "pylora") == ours


@pytest.mark.parametrize("kwargs", [{}, *NON_DEFAULT], ids=lambda kwargs: ",".join(kwargs)[:40])
def test_the_file_is_peft_s_but_for_the_order_of_sets(tmp_path, kwargs):
    pc.LoraConfig(**kwargs).save_pretrained(tmp_path / "pylora")
    peft.LoraConfig(**kwargs).save_pretrained(tmp_path / "peft")
    ours = (tmp_path / "pylora" / base.CONFIG_NAME).read_text()
    theirs = json.loads((tmp_path / "peft" / base.CONFIG_NAME).read_text())
    for key in ("target_modules", "exclude_modules"):
        if isinstance(theirs[key], list):
            theirs[key].sort()
    assert ours == json.dumps(theirs, indent=2, sort_keys=True)


def test_the_version_written_is_the_format_s():
    assert pc.LoraConfig().peft_version == base.PEFT_FORMAT_VERSION == peft.LoraConfig().peft_version


def test_runtime_config_is_neither_saved_nor_loaded(tmp_path):
    config = pc.LoraConfig(runtime_config=pc.LoraRuntimeConfig(ephemeral_gpu_offload=True))
    config.save_pretrained(tmp_path)
    content = json.loads((tmp_path / base.CONFIG_NAME).read_text())
    assert "runtime_config" not in content
    content["runtime_config"] = {"ephemeral_gpu_offload": True}
    write(tmp_path, json.dumps(content))
    with pytest.warns(UserWarning, match="contains a `runtime_config` key. This is ignored"):
        loaded = pc.LoraConfig.from_pretrained(tmp_path)
    assert loaded.runtime_config == pc.LoraRuntimeConfig()


def test_auto_mapping_of_a_model_without_a_task(tmp_path):
    config = pc.LoraConfig()
    config.save_pretrained(tmp_path, auto_mapping_dict={"base_model_class": "Net", "parent_library": "mine"})
    assert pc.LoraConfig.from_pretrained(tmp_path).auto_mapping == {"base_model_class": "Net", "parent_library": "mine"}
    assert config.auto_mapping is None


def test_unknown_keys_are_dropped_with_peft_s_warning(tmp_path):
    write(tmp_path, json.dumps({"peft_type": "LORA", "r": 4, "zeta": 1, "alphabet": {"a": [1]}}))
    for cls in (pc.PeftConfig, pc.LoraConfig, peft.PeftConfig):
        message = r"Unexpected keyword arguments \['alphabet', 'zeta'\] for class LoraConfig, these are ignored"
        with pytest.warns(UserWarning, match=message):
            assert cls.from_pretrained(tmp_path).r == 4


@pytest.mark.parametrize(
    "text", ['{"r": 4, "target_modules": ["q"]}', '{"r": 4, "zeta": 1}', '{"zeta": 1}', "{}", "[]"]
)
@pytest.mark.parametrize("reader", ["LoraConfig", "PeftConfig"])
def test_files_without_a_type(tmp_path, text, reader):
    write(tmp_path, text)
    outcomes = []
    for library in (peft, pc):
        try:
            outcomes.append(getattr(library, reader).from_pretrained(tmp_path).to_dict())
        except Exception as error:
            outcomes.append(type(error))
    assert outcomes[0] == outcomes[1]


def test_what_a_file_without_a_type_lacks(tmp_path):
    write(tmp_path, '{"zeta": 1}')
    for library in (peft, pc):
        with pytest.raises(TypeError, match=r"missing required keys: \{'peft_type'\}"):
            library.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("text", ["", "{", '{"peft_type": "LORA", "r": }', "\0"])
def test_broken_json(tmp_path, text):
    write(tmp_path, text)
    for library in (peft, pc):
        with pytest.raises(json.JSONDecodeError):
            library.LoraConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("name", ["NO_SUCH_METHOD", "", None, 3])
def test_unknown_method(tmp_path, name):
    write(tmp_path, json.dumps({"peft_type": name}))
    for library in (peft, pc):
        with pytest.raises(KeyError):
            library.PeftConfig.from_pretrained(tmp_path)


def test_another_method_is_refused_by_name(tmp_path):
    peft.IA3Config(target_modules=["q"]).save_pretrained(tmp_path)
    with pytest.raises(UnsupportedFeatureError, match="IA3"):
        pc.PeftConfig.from_pretrained(tmp_path)


def test_values_that_the_constructor_refuses(tmp_path):
    write(tmp_path, json.dumps({"peft_type": "LORA", "task_type": "PAINTING"}))
    for library in (peft, pc):
        with pytest.raises(ValueError, match="Invalid task type: 'PAINTING'"):
            library.PeftConfig.from_pretrained(tmp_path)


@pytest.mark.parametrize("source", ["missing", "missing/twice", "far/too/deep", "bad name!"])
def test_no_such_file(tmp_path, monkeypatch, source):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)
    for library in (peft, pc):
        with pytest.raises(ValueError, match=f"Can't find 'adapter_config.json' at '{source}'"):
            library.PeftConfig.from_pretrained(source)


def test_a_folder_is_never_taken_for_a_repository(tmp_path, monkeypatch):
    def hf_hub_download(*args, **kwargs):
        pytest.fail("asked the hub")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "owner" / "name").mkdir(parents=True)
    for arguments in ({}, {"subfolder": "sub"}):
        with pytest.raises(ValueError, match=r"Can't find 'adapter_config\.json' at 'owner/name'"):
            pc.PeftConfig.from_pretrained("owner/name", **arguments)


def test_without_huggingface_hub_a_missing_file_is_still_a_missing_file(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ValueError, match="Can't find"):
        pc.PeftConfig.from_pretrained("owner/name")


def test_subfolder_and_hub_arguments(tmp_path, monkeypatch):
    pc.LoraConfig(r=5).save_pretrained(tmp_path / "sub")
    assert pc.PeftConfig.from_pretrained(tmp_path, subfolder="sub", token="x", unknown=1).r == 5
    assert pc.PeftConfig._get_peft_type(tmp_path, subfolder="sub") == "LORA"

    calls = []

    def hf_hub_download(repo_id, filename, *, subfolder=None, revision=None, token=None):
        calls.append((repo_id, filename, subfolder, revision, token))
        return str(tmp_path / "sub" / filename)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", hf_hub_download)
    config = pc.PeftConfig.from_pretrained("some/repo", subfolder="s", revision="v1", token="t", unknown=1)
    assert calls == [("some/repo", "adapter_config.json", "s", "v1", "t")]
    assert (config.r, config.revision) == (5, None)


def test_fields_as_keyword_arguments_fill_what_the_file_lacks(tmp_path):
    write(tmp_path, json.dumps({"peft_type": "LORA", "r": 4}))
    for library in (peft, pc):
        config = library.LoraConfig.from_pretrained(tmp_path, r=9, lora_alpha=3, task_type="CAUSAL_LM")
        assert (config.r, config.lora_alpha, config.task_type) == (4, 3, None)


def test_from_peft_type_and_check_kwargs():
    assert pc.PeftConfig.from_peft_type(peft_type="LORA", r=2) == pc.LoraConfig(r=2)
    assert pc.LoraConfig.from_peft_type(r=2) == pc.LoraConfig(r=2)
    assert pc.LoraConfig.check_kwargs(r=2) == {"r": 2}
    assert type(pc.PeftConfig.from_peft_type(task_type="CAUSAL_LM")) is pc.PeftConfig


def test_saving_into_a_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("content")
    for library in (peft, pc):
        with pytest.raises(AssertionError, match="should be a directory, not a file"):
            library.LoraConfig().save_pretrained(path)
    assert path.read_text() == "content"


def test_a_value_that_json_cannot_express_leaves_the_old_file(tmp_path):
    pc.LoraConfig(r=4).save_pretrained(tmp_path)
    before = (tmp_path / base.CONFIG_NAME).read_bytes()
    broken = pc.LoraConfig(megatron_config={"a": object()})
    with pytest.raises(TypeError, match=r"adapter_config\.json: cannot store a value of type object"):
        broken.save_pretrained(tmp_path)
    with pytest.raises(TypeError):
        broken.save_pretrained(tmp_path / "new")
    assert (tmp_path / base.CONFIG_NAME).read_bytes() == before
    assert os.listdir(tmp_path) == [base.CONFIG_NAME]


@pytest.mark.parametrize("stage", ["open", "replace"])
def test_a_failing_disk_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, stage):
    pc.LoraConfig(r=4).save_pretrained(tmp_path)
    before = (tmp_path / base.CONFIG_NAME).read_bytes()

    def fail(*args, **kwargs):
        raise OSError("disk full")

    if stage == "open":
        monkeypatch.setattr(base, "open", fail, raising=False)
    else:
        monkeypatch.setattr(files.os, "replace", fail)
    with pytest.raises(OSError, match="disk full"):
        pc.LoraConfig(r=5).save_pretrained(tmp_path)
    monkeypatch.undo()
    assert (tmp_path / base.CONFIG_NAME).read_bytes() == before
    assert os.listdir(tmp_path) == [base.CONFIG_NAME]


def test_the_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    pc.LoraConfig().save_pretrained(tmp_path)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", base.CONFIG_NAME)]
    assert modes[0] == modes[1]


def test_push_to_hub_uploads_the_file(monkeypatch):
    seen = {}

    class Api:
        def __init__(self, token=None):
            seen["token"] = token

        def create_repo(self, repo_id, private=None, exist_ok=False):
            seen["created"] = (repo_id, private, exist_ok)
            return type("Url", (), {"repo_id": f"me/{repo_id}"})()

        def upload_folder(self, repo_id, folder_path, **kwargs):
            seen["uploaded"] = (repo_id, os.listdir(folder_path), kwargs)
            return "commit"

    monkeypatch.setattr("huggingface_hub.HfApi", Api)
    assert pc.LoraConfig().push_to_hub("name", private=True, token="t", revision="r") == "commit"
    assert seen == {
        "token": "t",
        "created": ("name", True, True),
        "uploaded": ("me/name", ["adapter_config.json"], {"commit_message": "Upload config", "revision": "r"}),
    }


def test_reading_a_file_imports_nothing_that_it_names(tmp_path):
    """A module that the file names everywhere must stay unloaded, and so must torch."""
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    content = pc.LoraConfig(
        base_model_name_or_path="trap",
        auto_mapping={"base_model_class": "trap", "parent_library": "trap"},
        megatron_config={"trap": "trap"},
        megatron_core="trap",
    ).to_dict()
    content |= {"_custom_modules": {"trap": "trap"}, "__class__": "trap", "trap": "trap"}
    write(tmp_path, json.dumps(content, default=list))
    code = (
        "import sys, warnings; warnings.simplefilter('ignore')\n"
        "from pylora.config import PeftConfig\n"
        "config = PeftConfig.from_pretrained('.')\n"
        "assert config.megatron_core == 'trap' and config._custom_modules is None\n"
        "heavy = {'trap', 'torch', 'numpy', 'transformers', 'peft', 'huggingface_hub', 'safetensors'}\n"
        "loaded = heavy & set(sys.modules)\n"
        "assert not loaded, loaded\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
