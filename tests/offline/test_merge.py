"""`pylora merge`: the files are those of the merged model, the inputs are untouched, the output is whole or absent."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import pylora
from pylora.offline.adapter import read_adapter
from pylora.offline.base import BaseCheckpoint
from pylora.offline.check import check_merged
from pylora.offline.errors import OfflineError
from pylora.offline.merge import plan_merge
from tests.offline.conftest import llama


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    return {key: t for path in sorted(folder.glob("*.safetensors")) for key, t in load_file(path).items()}


def digest(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in sorted(folder.iterdir()) if p.is_file()}


CONFIGS = {
    "all-linear": {"target_modules": "all-linear"},
    "dora, rslora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True, "use_rslora": True},
    "patterns": {"target_modules": ["q_proj", "o_proj"], "rank_pattern": {"o_proj": 7}, "alpha_pattern": {"q_proj": 3}},
    "embedding and head": {"target_modules": ["embed_tokens", "v_proj"], "modules_to_save": ["lm_head"]},
    "trained biases": {"target_modules": ["q_proj"], "bias": "lora_only"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.*(embed|Setting `save_embedding_layers`)")
def test_same_bits_as_the_merged_model(make, cli, tmp_path, name, dtype):
    made = make(llama(attention_bias="biases" in name), pylora.LoraConfig(r=4, **CONFIGS[name]), dtype)
    before = digest(made.base) | digest(made.adapter)
    result = cli("merge", made.base, made.adapter, tmp_path / "out", "--check")
    assert result.exit_code == 0, result.output
    assert "checked: " in result.output
    found = read_all(tmp_path / "out")
    assert found.keys() == made.merged.keys()
    assert [key for key in found if not torch.equal(found[key], made.merged[key])] == []
    assert digest(made.base) | digest(made.adapter) == before


def test_layout_of_the_base_is_kept(make, cli, tmp_path):
    made = make(llama(), pylora.LoraConfig(r=4, target_modules=["q_proj"]))
    (made.base / "tokenizer.json").write_text("{}")
    (made.base / "extra").mkdir()
    (made.base / "extra" / "note.txt").write_text("kept")
    (made.base / "pytorch_model.bin").write_bytes(b"older weights")
    assert cli("merge", made.base, made.adapter, tmp_path / "out").exit_code == 0
    base, out = (json.loads((f / "model.safetensors.index.json").read_text()) for f in (made.base, tmp_path / "out"))
    assert len(set(base["weight_map"].values())) > 2
    assert out["weight_map"] == base["weight_map"]
    assert out["metadata"]["total_size"] == base["metadata"]["total_size"]
    names = {str(p.relative_to(made.base)) for p in made.base.rglob("*") if p.is_file()} - {"pytorch_model.bin"}
    assert {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()} == names
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out").state_dict()
    assert all(torch.equal(loaded[key], made.merged[key]) for key in made.merged)


@pytest.mark.parametrize(("stored", "wanted"), [(torch.float32, "bfloat16"), (torch.bfloat16, "float32")], ids=str)
def test_dtype(make, cli, tmp_path, stored, wanted):
    made = make(llama(), pylora.LoraConfig(r=4, target_modules=["q_proj"]), stored)
    result = cli("merge", made.base, made.adapter, tmp_path / "out", "--dtype", wanted, "--check")
    assert result.exit_code == 0, result.output
    dtype, found = getattr(torch, wanted), read_all(tmp_path / "out")
    assert {t.dtype for t in found.values()} == {dtype}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == wanted
    base = read_all(made.base)
    for key, tensor in found.items():
        if "q_proj" not in key:
            assert torch.equal(tensor, base[key].to(dtype))
        elif stored == torch.float32:
            assert torch.equal(tensor, made.merged[key].to(dtype))
        else:  # merged in f32: the model's own merge rounded to bf16
            assert torch.equal(tensor.to(stored), made.merged[key])
            assert not torch.equal(tensor, made.merged[key].to(dtype))


def test_conv1d_and_a_base_that_leaves_out_the_prefix(make, cli, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(n_embd=24, n_layer=2, n_head=2, vocab_size=40, n_positions=16, bos_token_id=0, eos_token_id=0)
    )
    config = pylora.LoraConfig(r=3, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    made = make(model, config)
    whole = read_all(made.base)
    shutil.rmtree(made.base)
    made.base.mkdir()
    save_file({key.removeprefix("transformer."): t for key, t in whole.items()}, made.base / "model.safetensors")
    result = cli("merge", made.base, made.adapter, tmp_path / "out", "--check")
    assert result.exit_code == 0, result.output
    found = read_all(tmp_path / "out")
    assert len(found) == len(whole)
    assert all(torch.equal(found[key], made.merged[f"transformer.{key}"]) for key in found)


def test_convolution(cli, tmp_path):
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Conv1d(8, 4, 5))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    tuned = pylora.get_peft_model(model, pylora.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False))
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    result = cli("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--check")
    assert result.exit_code == 0, result.output
    found = read_all(tmp_path / "out")
    assert all(torch.equal(found[key], merged[key]) for key in merged)


def test_lora_bias(cli, tmp_path):
    model = torch.nn.Sequential(torch.nn.Linear(6, 5))
    (tmp_path / "base").mkdir()
    save_file(model.state_dict(), tmp_path / "base" / "model.safetensors")
    config = pylora.LoraConfig(r=2, target_modules=["0"], lora_bias=True, init_lora_weights=False)
    tuned = pylora.get_peft_model(model, config)
    tuned.base_model.model[0].lora_B["default"].bias.data.normal_()
    tuned.save_pretrained(tmp_path / "adapter")
    merged = tuned.merge_and_unload().state_dict()
    result = cli("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "out", "--check")
    assert result.exit_code == 0, result.output
    found = read_all(tmp_path / "out")
    torch.testing.assert_close(found["0.bias"], merged["0.bias"], rtol=1e-6, atol=1e-6)
    assert torch.equal(found["0.weight"], merged["0.weight"])


class TestRefused:
    def expect(self, result, *texts: str, out: Path) -> None:
        assert result.exit_code == 2, result.output
        assert all(text in result.output for text in texts), result.output
        assert not out.exists()
        assert [p.name for p in out.parent.iterdir() if p.name.startswith(".")] == []

    @pytest.fixture
    def made(self, make):
        return make(llama(), pylora.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))

    def test_no_such_folder(self, made, cli, tmp_path):
        self.expect(
            cli("merge", tmp_path / "nothing", made.adapter, tmp_path / "out"), "base model", out=tmp_path / "out"
        )
        self.expect(
            cli("merge", made.base, "./nothing", tmp_path / "out"), "./nothing", "adapter", out=tmp_path / "out"
        )

    def test_output_that_holds_something(self, made, cli, tmp_path):
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "mine").write_text("mine")
        result = cli("merge", made.base, made.adapter, tmp_path / "out")
        assert result.exit_code == 2
        assert "new or empty folder" in result.output
        assert [p.name for p in (tmp_path / "out").iterdir()] == ["mine"]

    def test_output_inside_the_base(self, made, cli):
        before = digest(made.base)
        assert cli("merge", made.base, made.adapter, made.base / "out").exit_code == 2
        assert digest(made.base) == before

    def test_adapter_of_another_model(self, made, cli, tmp_path):
        shutil.rmtree(made.base)
        llama(hidden_size=48).save_pretrained(made.base)
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), "shape", out=tmp_path / "out")
        shutil.rmtree(made.base)
        llama(num_hidden_layers=1).save_pretrained(made.base)
        result = cli("merge", made.base, made.adapter, tmp_path / "out")
        self.expect(result, "no weights for 2 of 4 layers", "model.layers.1.self_attn.q_proj", out=tmp_path / "out")

    @pytest.mark.parametrize("length", [0, 5, 100, -1])
    def test_truncated_shard(self, made, cli, tmp_path, length):
        shard = sorted(made.base.glob("*.safetensors"))[1]
        data = shard.read_bytes()
        shard.write_bytes(data[:length])
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), shard.name, out=tmp_path / "out")

    def test_missing_shard(self, made, cli, tmp_path):
        shard = sorted(made.base.glob("*.safetensors"))[1]
        shard.unlink()
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), shard.name, out=tmp_path / "out")

    def test_broken_adapter(self, made, cli, tmp_path):
        weights = made.adapter / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes()[:-9])
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), "adapter", out=tmp_path / "out")

    def test_values_that_are_not_finite(self, made, cli, tmp_path):
        path = made.adapter / "adapter_model.safetensors"
        tensors = load_file(path)
        tensors[sorted(tensors)[0]][0, 0] = float("nan")
        save_file(tensors, path)
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), "q_proj", out=tmp_path / "out")

    def test_values_beyond_the_dtype(self, made, cli, tmp_path):
        shard = next(p for p in made.base.glob("*.safetensors") if "model.norm.weight" in load_file(p))
        save_file(load_file(shard) | {"model.norm.weight": torch.full((32,), 1e6)}, shard)
        result = cli("merge", made.base, made.adapter, tmp_path / "out", "--dtype", "float16")
        self.expect(result, "model.norm.weight", "float16", out=tmp_path / "out")

    def test_tied_embedding(self, make, cli, tmp_path):
        with pytest.warns(UserWarning, match="tie"):
            made = make(llama(tie_word_embeddings=True), pylora.LoraConfig(r=4, target_modules=["embed_tokens"]))
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), "tied", out=tmp_path / "out")

    def test_what_cannot_be_merged(self, made, cli, tmp_path):
        path = made.adapter / "adapter_config.json"
        config = json.loads(path.read_text())
        for field, value, told in (
            ("init_lora_weights", "pissa", "init_lora_weights"),
            ("alora_invocation_tokens", [1], "alora_invocation_tokens"),
            ("peft_type", "LOHA", "LOHA"),
        ):
            path.write_text(json.dumps(config | {field: value}))
            self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), told, out=tmp_path / "out")

    def test_no_room(self, made, cli, tmp_path, monkeypatch):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        self.expect(cli("merge", made.base, made.adapter, tmp_path / "out"), "free space", out=tmp_path / "out")


@pytest.mark.parametrize("wrong", ["a merged number", "an unchanged number", "a missing tensor"])
def test_check_finds(make, tmp_path, wrong):
    made = make(llama(), pylora.LoraConfig(r=4, target_modules=["q_proj"]), shard="1GB")
    key = "model.layers.0.self_attn.q_proj.weight" if "merged" in wrong else "model.norm.weight"
    tensors = {name: t.clone() for name, t in made.merged.items()}
    (tmp_path / "out").mkdir()
    with BaseCheckpoint(str(made.base)) as base:
        plan = plan_merge(base, read_adapter(made.adapter))
        save_file(tensors, tmp_path / "out" / "model.safetensors")
        assert "21 " not in check_merged(plan, tmp_path / "out")
        if wrong == "a missing tensor":
            del tensors[key]
        else:
            tensors[key].view(-1)[3] += 1e-5 * tensors[key].view(-1)[3].abs() + 1e-6
        save_file(tensors, tmp_path / "out" / "model.safetensors")
        with pytest.raises(OfflineError, match=key):
            check_merged(plan, tmp_path / "out")


def test_memory_holds_one_tensor(make, tmp_path):
    """What a merge of 100 MB takes beside the imports is a small part of it."""
    made = make(
        llama(hidden_size=512, intermediate_size=1536, num_hidden_layers=8, vocab_size=1000),
        pylora.LoraConfig(r=4, target_modules=["q_proj", "down_proj"]),
        shard="1GB",
    )
    assert (made.base / "model.safetensors").stat().st_size > 100e6
    script = (
        "import sys, resource\n"
        "from typer.testing import CliRunner\n"
        "from pylora.cli.app import build_app\n"
        "import torch, tqdm, safetensors.torch, pylora.model, pylora.offline.check\n"
        "from pylora.offline import adapter, base, merge\n"
        "app, before = build_app(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "result = CliRunner().invoke(app, ['merge', *sys.argv[1:]])\n"
        "assert result.exit_code == 0, result.output\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", script, made.base, made.adapter, tmp_path / "out"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) < 50_000, "KiB"
