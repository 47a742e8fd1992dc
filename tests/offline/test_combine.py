"""`pylora combine`: the files are those that `add_weighted_adapter` and `save_pretrained` write."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import pylora
from tests.offline.conftest import fill, llama

KINDS = [
    "svd",
    "cat",
    "linear",
    "ties",
    "ties_svd",
    "dare_linear",
    "dare_ties_svd",
    "magnitude_prune",
    "magnitude_prune_svd",
]


@pytest.fixture
def two(tmp_path):
    """A model with adapters "math" and "code", saved as folders of these names."""
    torch.manual_seed(3)
    model = pylora.get_peft_model(
        llama(), pylora.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "v_proj"]), "math"
    )
    model.add_adapter(
        "code", pylora.LoraConfig(r=4, lora_alpha=2, use_rslora=True, target_modules=["q_proj", "o_proj"])
    )
    fill(model)
    model.save_pretrained(tmp_path)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_as_in_a_model(two, cli, tmp_path, kind):
    options = {} if kind in ("svd", "cat", "linear") else {"density": 0.4}
    torch.manual_seed(0)
    two.add_weighted_adapter(["math", "code"], [0.7, -0.5], "new", combination_type=kind, **options)
    two.save_pretrained(tmp_path / "expected", selected_adapters=["new"])
    flags = [f"--{name}={value}" for name, value in options.items()]
    result = cli(
        "combine",
        f"{tmp_path / 'math'}=0.7",
        f"{tmp_path / 'code'}=-0.5",
        "--out",
        tmp_path / "out",
        "--kind",
        kind,
        *flags,
    )
    assert result.exit_code == 0, result.output
    found = load_file(tmp_path / "out" / "adapter_model.safetensors")
    expected = load_file(tmp_path / "expected" / "new" / "adapter_model.safetensors")
    assert found.keys() == expected.keys()
    random = "dare" in kind  # which number a layer's pruning draws depends on the order of the layers
    for key in found:
        assert found[key].shape == expected[key].shape
        if not random:
            torch.testing.assert_close(found[key].abs(), expected[key].abs(), rtol=1e-4, atol=1e-5)
    configs = [
        json.loads(f.read_text())
        for f in (tmp_path / "out" / "adapter_config.json", tmp_path / "expected" / "new" / "adapter_config.json")
    ]
    for field in ("r", "lora_alpha", "target_modules", "use_rslora", "rank_pattern"):
        assert configs[0][field] == configs[1][field] or set(configs[0][field]) == set(configs[1][field])


def test_cat_is_the_sum(two, cli, tmp_path):
    assert (
        cli("combine", tmp_path / "math", f"{tmp_path / 'code'}=2", "-o", tmp_path / "out", "--kind", "cat").exit_code
        == 0
    )
    base, x = llama().eval(), torch.arange(20).view(2, 10)
    base.load_state_dict(
        {
            k.replace("base_model.model.", "").replace(".base_layer", ""): v
            for k, v in two.state_dict().items()
            if "lora_" not in k
        }
    )
    combined = pylora.PeftModel.from_pretrained(base, tmp_path / "out")
    layer = combined.base_model.model.model.layers[0].self_attn
    original = two.base_model.model.model.layers[0].self_attn
    for name, terms in (("q_proj", (("math", 1), ("code", 2))), ("v_proj", (("math", 1),)), ("o_proj", (("code", 2),))):
        expected = sum(weight * getattr(original, name).get_delta_weight(each) for each, weight in terms)
        torch.testing.assert_close(getattr(layer, name).get_delta_weight("default"), expected, rtol=1e-5, atol=1e-6)
    assert combined(x).logits.isfinite().all()


class TestRefused:
    def test_pruning_without_a_density(self, two, cli, tmp_path):
        result = cli("combine", tmp_path / "math", tmp_path / "code", "-o", tmp_path / "out", "--kind", "ties")
        assert result.exit_code == 2
        assert "density" in result.output
        assert not (tmp_path / "out").exists()

    def test_unequal_ranks(self, two, cli, tmp_path):
        two.add_adapter("c", pylora.LoraConfig(r=2, target_modules=["q_proj"]))
        two.save_pretrained(tmp_path)
        result = cli("combine", tmp_path / "math", tmp_path / "c", "-o", tmp_path / "out", "--kind", "linear")
        assert result.exit_code == 2
        assert "same r" in result.output
        assert not (tmp_path / "out").exists()

    def test_dora_and_whole_tensors(self, two, cli, tmp_path):
        two.add_adapter("d", pylora.LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
        two.add_adapter("w", pylora.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]))
        two.save_pretrained(tmp_path)
        for name, told in (("d", "use_dora"), ("w", "lm_head.weight")):
            result = cli("combine", tmp_path / "math", tmp_path / name, "-o", tmp_path / "out")
            assert result.exit_code == 2
            assert told in result.output
            assert not (tmp_path / "out").exists()

    def test_adapters_of_two_models(self, two, cli, tmp_path):
        other = pylora.get_peft_model(llama(hidden_size=48), pylora.LoraConfig(r=4, target_modules=["q_proj"]))
        other.save_pretrained(tmp_path / "other")
        result = cli("combine", tmp_path / "math", tmp_path / "other", "-o", tmp_path / "out")
        assert result.exit_code == 2
        assert "one model" in result.output
        assert not (tmp_path / "out").exists()


def test_every_kind_has_its_name_on_the_command_line():
    from pylora.cli.commands.combine import Kind
    from pylora.combine import COMBINATIONS

    assert {kind.value for kind in Kind} == COMBINATIONS
