"""`pylora inspect`: the numbers are those of the deltas."""

from __future__ import annotations

import json

import pytest
import torch

import pylora
from tests.offline.conftest import llama


@pytest.fixture
def made(make):
    torch.manual_seed(0)
    config = pylora.LoraConfig(
        r=4,
        lora_alpha=6,
        target_modules=["q_proj", "down_proj", "embed_tokens"],
        rank_pattern={"down_proj": 2},
        use_rslora=True,
    )
    with pytest.warns(UserWarning, match="save_embedding_layers"):
        return make(llama(), config)


def test_numbers(made, cli):
    result = cli("inspect", made.adapter, "--base", made.base, "--json")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    base = llama_weights(made.base)
    assert len(found["layers"]) == 5
    for layer in found["layers"]:
        weight = base[f"{layer['name']}.weight"].double()
        delta = made.merged[f"{layer['name']}.weight"].double() - weight
        values = torch.linalg.svdvals(delta)
        rank = 2 if "down_proj" in layer["name"] else 4
        assert layer["rank"] == rank
        assert layer["scaling"] == pytest.approx(6 / rank**0.5)
        assert layer["delta_norm"] == pytest.approx(float(delta.norm()), rel=1e-4)
        assert layer["base_norm"] == pytest.approx(float(weight.norm()), rel=1e-4)
        torch.testing.assert_close(torch.tensor(layer["singular_values"]).double(), values[:rank], rtol=1e-3, atol=1e-4)
        shares = values[:rank].square() / values[:rank].square().sum()
        assert layer["effective_rank"] == pytest.approx(float((-(shares * shares.log()).sum()).exp()), rel=1e-3)
        assert 1 <= layer["effective_rank"] <= rank
    assert found["kind"] == "use_rslora"
    assert found["whole tensors"] == ["model.embed_tokens.base_layer.weight"]


def llama_weights(folder) -> dict[str, torch.Tensor]:
    from safetensors.torch import load_file

    return {key: t for path in folder.glob("*.safetensors") for key, t in load_file(path).items()}


def test_tables(made, cli):
    short, long = cli("inspect", made.adapter).output, cli("inspect", made.adapter, "--layers").output
    assert "2 x down_proj" in short
    assert "model.layers.1.mlp.down_proj" in long
    assert long.count("down_proj") == 2


def test_an_adapter_that_does_nothing(cli, tmp_path):
    pylora.get_peft_model(llama(), pylora.LoraConfig(r=4, target_modules=["q_proj"])).save_pretrained(tmp_path / "new")
    layers = json.loads(cli("inspect", tmp_path / "new", "--json").stdout)["layers"]
    assert {layer["delta_norm"] for layer in layers} == {0.0}
    assert {layer["effective_rank"] for layer in layers} == {0.0}


def test_plot(made, cli, tmp_path):
    pytest.importorskip("matplotlib")
    result = cli("inspect", made.adapter, "--plot", tmp_path / "plot.png")
    assert result.exit_code == 0, result.output
    from PIL import Image

    with Image.open(tmp_path / "plot.png") as image:
        assert len(image.convert("RGB").getcolors(1 << 20)) > 50  # lines in colours, not an empty frame


def test_refused(cli, tmp_path):
    for place, told in ((tmp_path, "cannot read"), (tmp_path / "nothing", "folder")):
        result = cli("inspect", place)
        assert result.exit_code == 2
        assert told in result.output
