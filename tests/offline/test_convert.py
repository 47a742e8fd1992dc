"""`pylora convert`: names and numbers of each layout, there and back, and what a layout cannot hold."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import pylora
from pylora.offline.adapter import read_adapter
from pylora.offline.layouts.diffusers import _place
from tests.offline.conftest import fill, llama

ATTENTION = "down_blocks.0.attentions.1.transformer_blocks.0.attn1"


@pytest.fixture
def adapter(tmp_path):
    """A Llama's folder "base" and an adapter for it, all of one rank."""
    torch.manual_seed(0)
    model = llama()
    model.save_pretrained(tmp_path / "base")
    tuned = pylora.get_peft_model(
        model, pylora.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "down_proj"])
    )
    fill(tuned)
    tuned.save_pretrained(tmp_path / "adapter")
    return read_adapter(tmp_path / "adapter")


@pytest.fixture
def pipeline(tmp_path):
    """Adapters of a pipeline's two models in PEFT's layout, ranks and alphas mixed, one layer a convolution."""
    torch.manual_seed(0)

    def tensors(names: dict[str, tuple[int, ...]]) -> dict[str, torch.Tensor]:
        found = {}
        for name, (rank, columns, rows, *kernel) in names.items():
            found[f"base_model.model.{name}.lora_A.weight"] = torch.randn(rank, columns, *kernel)
            found[f"base_model.model.{name}.lora_B.weight"] = torch.randn(rows, rank, *[1] * len(kernel))
        return found

    unet = {
        f"{ATTENTION}.to_q": (4, 8, 8),
        f"{ATTENTION}.to_out.0": (2, 8, 8),
        "up_blocks.1.resnets.0.conv1": (4, 3, 5, 3, 3),
    }
    text = {
        "text_model.encoder.layers.0.self_attn.q_proj": (4, 8, 8),
        "text_model.encoder.layers.11.mlp.fc1": (4, 8, 16),
    }
    for name, layers in (("unet", unet), ("text_encoder", text)):
        (tmp_path / "pipeline" / name).mkdir(parents=True)
        save_file(tensors(layers), tmp_path / "pipeline" / name / "adapter_model.safetensors")
        pylora.LoraConfig(
            r=4, lora_alpha=8, target_modules=list(layers), rank_pattern={"to_out.0": 2}, alpha_pattern={"to_out.0": 3}
        ).save_pretrained(tmp_path / "pipeline" / name)
    return {name: read_adapter(tmp_path / "pipeline" / name) for name in ("unet", "text_encoder")}


def same(found, expected, folded: bool = False) -> None:
    """The layers of two adapters are the same; with `folded` only their products."""
    assert found.layers.keys() == expected.layers.keys()
    for name, layer in expected.layers.items():
        other = found.layers[name]
        if folded:
            torch.testing.assert_close(
                other.b @ other.a * other.scaling, layer.b @ layer.a * layer.scaling, rtol=1e-5, atol=1e-6
            )
            continue
        assert torch.equal(other.a, layer.a)
        assert torch.equal(other.b, layer.b)
        assert other.scaling == pytest.approx(layer.scaling, rel=1e-6)
        assert (other.magnitude is None) == (layer.magnitude is None)
        if layer.magnitude is not None:
            assert torch.equal(other.magnitude, layer.magnitude)


@pytest.mark.parametrize("layout", ["kohya", "diffusers"])
def test_pipeline_there_and_back(pipeline, cli, tmp_path, layout):
    file = tmp_path / "style.safetensors"
    result = cli("convert", tmp_path / "pipeline", file, "--to", layout)
    assert result.exit_code == 0, result.output
    result = cli("convert", file, tmp_path / "back")
    assert result.exit_code == 0, result.output
    assert f"from {layout}" in result.output
    for name, expected in pipeline.items():
        same(read_adapter(tmp_path / "back" / name), expected)


def test_names_of_kohya(pipeline, cli, tmp_path):
    cli("convert", tmp_path / "pipeline", tmp_path / "f.safetensors", "--to", "kohya")
    found = load_file(tmp_path / "f.safetensors")
    stem = "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_out_0"
    layer = pipeline["unet"].layers[f"{ATTENTION}.to_out.0"]
    assert torch.equal(found[f"{stem}.lora_down.weight"], layer.a)
    assert torch.equal(found[f"{stem}.lora_up.weight"], layer.b)
    assert found[f"{stem}.alpha"].item() == 3
    assert "lora_te_text_model_encoder_layers_11_mlp_fc1.lora_up.weight" in found


def test_names_of_diffusers(pipeline, cli, tmp_path):
    cli("convert", tmp_path / "pipeline", tmp_path / "f.safetensors", "--to", "diffusers")
    with safe_open(tmp_path / "f.safetensors", framework="pt") as file:
        keys, metadata = set(file.keys()), json.loads(file.metadata()["lora_adapter_metadata"])
    assert f"unet.{ATTENTION}.to_q.lora_A.weight" in keys
    assert "text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_B.weight" in keys
    assert metadata["unet.r"] == 4
    assert metadata["unet.lora_alpha"] == 8
    assert metadata["unet.rank_pattern"] == {f"{ATTENTION}.to_out.0": 2}
    assert metadata["unet.alpha_pattern"] == {f"{ATTENTION}.to_out.0": 3}
    assert set(metadata["text_encoder.target_modules"]) == set(pipeline["text_encoder"].layers)


@pytest.mark.parametrize(
    ("down", "up", "name"),
    [
        ("unet.mid_block.attn.to_q.lora.down.weight", "unet.mid_block.attn.to_q.lora.up.weight", "mid_block.attn.to_q"),
        ("unet.a.processor.to_out_lora.down.weight", "unet.a.processor.to_out_lora.up.weight", "a.to_out.0"),
    ],
)
def test_older_files_of_diffusers(cli, tmp_path, down, up, name):
    a, b = torch.randn(3, 6), torch.randn(5, 3)
    save_file({down: a, up: b}, tmp_path / "f.safetensors")
    result = cli("convert", tmp_path / "f.safetensors", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = read_adapter(tmp_path / "out").layers
    assert found.keys() == {name}
    assert torch.equal(found[name].a, a)
    assert torch.equal(found[name].b, b)
    assert found[name].scaling == 1


def test_diffusers_reads_what_is_written(pipeline, cli, tmp_path):
    loaders = pytest.importorskip("diffusers.loaders")
    cli("convert", tmp_path / "pipeline", tmp_path / "f.safetensors", "--to", "diffusers")
    state, *_ = loaders.StableDiffusionLoraLoaderMixin.lora_state_dict(
        str(tmp_path), weight_name="f.safetensors", return_lora_metadata=True
    )
    assert state.keys() == load_file(tmp_path / "f.safetensors").keys()


SDXL = {
    "input_blocks_0_0": (4, 32, 3),
    "input_blocks_1_0_in_layers_2": (32, 32, 3),
    "input_blocks_3_0_op": (32, 32, 3),
    "input_blocks_4_0_emb_layers_1": (48, 32),
    "input_blocks_4_0_skip_connection": (32, 32, 1),
    "input_blocks_4_1_proj_in": (32, 32),
    "input_blocks_8_1_transformer_blocks_9_attn1_to_q": (32, 32),
    "middle_block_0_out_layers_3": (32, 32, 3),
    "middle_block_1_transformer_blocks_0_ff_net_0_proj": (32, 64),
    "middle_block_2_emb_layers_1": (48, 32),
    "output_blocks_0_0_in_layers_2": (32, 32, 3),
    "output_blocks_0_1_transformer_blocks_3_attn2_to_out_0": (32, 32),
    "output_blocks_2_2_conv": (32, 32, 3),
    "output_blocks_5_1_proj_out": (32, 32),
    "output_blocks_8_0_skip_connection": (32, 32, 1),
    "time_embed_0": (32, 48),
    "label_emb_0_2": (48, 48),
    "out_2": (32, 4, 3),
}
FLUX = {
    "double_blocks_0_img_attn_qkv": (16, 48),
    "double_blocks_0_txt_attn_qkv": (16, 48),
    "double_blocks_1_img_attn_proj": (16, 16),
    "double_blocks_1_txt_attn_proj": (16, 16),
    "double_blocks_0_img_mlp_0": (16, 64),
    "double_blocks_0_img_mlp_2": (64, 16),
    "double_blocks_0_txt_mlp_0": (16, 64),
    "double_blocks_0_txt_mlp_2": (64, 16),
    "double_blocks_0_img_mod_lin": (16, 96),
    "double_blocks_0_txt_mod_lin": (16, 96),
    "single_blocks_0_linear1": (16, 7 * 3072),  # the only width for which diffusers splits it
    "single_blocks_1_linear2": (80, 16),
    "single_blocks_1_modulation_lin": (16, 48),
}


def original(layers, rank=2, alpha=3.0):
    """kohya's file for layers of these sizes: columns, rows, and the width of a convolution's kernel."""
    torch.manual_seed(0)
    tensors = {}
    for name, (columns, rows, *kernel) in layers.items():
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(rank, columns, *kernel * 2)
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(rows, rank, *[1] * len(kernel * 2))
        tensors[f"lora_unet_{name}.alpha"] = torch.tensor(alpha)
    return tensors


@pytest.mark.parametrize(("component", "layers"), [("unet", SDXL), ("transformer", FLUX)], ids=["SDXL", "Flux"])
def test_blocks_by_their_original_names(cli, tmp_path, component, layers):
    """The layers and their changes are those that diffusers makes of the same file."""
    diffusers = pytest.importorskip("diffusers")
    tensors = original(layers)
    save_file(tensors, tmp_path / "f.safetensors")
    result = cli("convert", tmp_path / "f.safetensors", tmp_path / "out")
    assert result.exit_code == 0, result.output
    found = read_adapter(tmp_path / "out").layers
    if component == "unet":
        config = SimpleNamespace(layers_per_block=2)
        theirs, alphas = diffusers.StableDiffusionXLPipeline.lora_state_dict(tensors, unet_config=config)
    else:
        theirs, alphas = diffusers.FluxPipeline.lora_state_dict(tensors, return_alphas=True)
    theirs = {key.removeprefix(f"{component}."): tensor for key, tensor in theirs.items()}
    places = {key: _place(key, "") for key in theirs}
    changes = {name: {} for name, _ in places.values()}
    for key, (name, part) in places.items():
        changes[name][part] = theirs[key].flatten(1)
    assert changes.keys() == found.keys()
    for name, parts in changes.items():
        expected = (1.5 if alphas else 1.0) * parts["b"] @ parts["a"]  # Flux's scaling is in the factors
        a, b = found[name].matrices()
        torch.testing.assert_close(found[name].scaling * b @ a, expected, rtol=1e-5, atol=1e-5)


def test_dora_of_kohya(cli, tmp_path):
    stem = "lora_unet_mid_block_attentions_0_proj_in"
    a, b, m = torch.randn(2, 6), torch.randn(4, 2), torch.rand(4, 1) + 1
    save_file(
        {
            f"{stem}.lora_down.weight": a,
            f"{stem}.lora_up.weight": b,
            f"{stem}.alpha": torch.tensor(1.0),
            f"{stem}.dora_scale": m,
        },
        tmp_path / "f.safetensors",
    )
    assert cli("convert", tmp_path / "f.safetensors", tmp_path / "out").exit_code == 0
    found = read_adapter(tmp_path / "out")
    assert found.config.use_dora
    layer = found.layers["mid_block.attentions.0.proj_in"]
    assert torch.equal(layer.magnitude, m.flatten())
    assert layer.scaling == 0.5
    assert (
        cli("convert", tmp_path / "out", tmp_path / "g.safetensors", "--to", "kohya", "--component", "unet").exit_code
        == 0
    )
    assert all(
        torch.equal(t, load_file(tmp_path / "f.safetensors")[key])
        for key, t in load_file(tmp_path / "g.safetensors").items()
    )


def test_names_by_the_base(adapter, cli, tmp_path):
    """Words that no list has: the base's own names say where the dots are."""
    (tmp_path / "b").mkdir()
    save_file({"odd_name.more_parts.x.weight": torch.zeros(4, 6)}, tmp_path / "b" / "model.safetensors")
    stem = "lora_unet_odd_name_more_parts_x"
    save_file(
        {f"{stem}.lora_down.weight": torch.randn(2, 6), f"{stem}.lora_up.weight": torch.randn(4, 2)},
        tmp_path / "f.safetensors",
    )
    result = cli("convert", tmp_path / "f.safetensors", tmp_path / "out")
    assert result.exit_code == 2
    assert "--base" in result.output
    assert cli("convert", tmp_path / "f.safetensors", tmp_path / "out", "--base", tmp_path / "b").exit_code == 0
    assert read_adapter(tmp_path / "out").layers.keys() == {"odd_name.more_parts.x"}


@pytest.mark.parametrize("ending", ["pt", "safetensors"])
def test_torchtune(adapter, cli, tmp_path, ending):
    file = tmp_path / f"adapter_0.{ending}"
    result = cli("convert", tmp_path / "adapter", file, "--to", "torchtune", "--base", tmp_path / "base")
    assert result.exit_code == 0, result.output
    assert "lora_rank: 4 and lora_alpha: 6" in result.output
    found = torch.load(file, weights_only=True) if ending == "pt" else load_file(file)
    names = {key.rpartition(".lora_")[0] for key in found}
    assert names == {f"layers.{i}.{part}" for i in (0, 1) for part in ("attn.q_proj", "attn.k_proj", "mlp.w2")}
    # Llama's heads here: 4 of q, 2 of k, 8 rows each. Row i of Meta's order is even numbers first in transformers'.
    for part, heads in (("q", 4), ("k", 2)):
        ours, theirs = (
            adapter.layers[f"model.layers.0.self_attn.{part}_proj"].b,
            found[f"layers.0.attn.{part}_proj.lora_b.weight"],
        )
        for head in range(heads):
            for i in range(4):
                assert torch.equal(ours[8 * head + i], theirs[8 * head + 2 * i])
                assert torch.equal(ours[8 * head + 4 + i], theirs[8 * head + 2 * i + 1])
    result = cli("convert", file, tmp_path / "back", "--base", tmp_path / "base", "--alpha", 6)
    assert result.exit_code == 0, result.output
    same(read_adapter(tmp_path / "back"), adapter)


def test_loralib(adapter, cli, tmp_path):
    result = cli("convert", tmp_path / "adapter", tmp_path / "lora.pt", "--to", "loralib")
    assert result.exit_code == 0, result.output
    found = torch.load(tmp_path / "lora.pt", weights_only=True)
    assert found["model.layers.0.self_attn.q_proj.lora_A"].shape == (4, 32)
    result = cli("convert", tmp_path / "lora.pt", tmp_path / "back", "--alpha", 4)
    assert result.exit_code == 0, result.output
    same(read_adapter(tmp_path / "back"), adapter, folded=True)


class TestRefused:
    def expect(self, result, *texts: str, out) -> None:
        assert result.exit_code == 2, result.output
        assert all(text in result.output for text in texts), result.output
        assert not out.exists()

    def test_what_files_do_not_say(self, adapter, cli, tmp_path):
        out = tmp_path / "out.safetensors"
        self.expect(cli("convert", tmp_path / "adapter", out, "--to", "kohya"), "--component", out=out)
        self.expect(cli("convert", tmp_path / "adapter", out, "--to", "torchtune"), "--base", out=out)
        save_file({"a.lora_A": torch.randn(2, 4), "a.lora_B": torch.randn(4, 2)}, tmp_path / "l.safetensors")
        self.expect(cli("convert", tmp_path / "l.safetensors", tmp_path / "back"), "--alpha", out=tmp_path / "back")

    def test_unknown_and_broken_files(self, cli, tmp_path):
        out, file = tmp_path / "out", tmp_path / "f.safetensors"
        self.expect(cli("convert", file, out), "found nothing", out=out)
        file.write_bytes(b"no tensors")
        self.expect(cli("convert", file, out), "cannot be read", out=out)
        save_file({"what.is.this": torch.zeros(2)}, file)
        self.expect(cli("convert", file, out), "what.is.this", out=out)
        save_file({"unet.a.lora_A.weight": torch.zeros(2, 3)}, file)
        self.expect(cli("convert", file, out), "found no B", out=out)
        save_file({"unet.a.lora_A.weight": torch.zeros(2, 3), "unet.a.lora_B.weight": torch.zeros(4, 3)}, file)
        self.expect(cli("convert", file, out), "(2, 3)", out=out)

    def test_blocks_that_are_not_known(self, cli, tmp_path):
        for name in ("double_blocks_0_other", "input_blocks_4_0_in_layers_7", "joint_blocks_0_x_block_attn_qkv"):
            save_file(
                {f"lora_unet_{name}.lora_down.weight": torch.zeros(2, 3)}
                | {f"lora_unet_{name}.lora_up.weight": torch.zeros(3, 2)},
                tmp_path / "f.safetensors",
            )
            self.expect(cli("convert", tmp_path / "f.safetensors", tmp_path / "out"), name, out=tmp_path / "out")

    def test_rows_that_cannot_be_divided(self, cli, tmp_path):
        stem = "lora_unet_single_blocks_0_linear1"
        save_file(
            {f"{stem}.lora_down.weight": torch.zeros(2, 3), f"{stem}.lora_up.weight": torch.zeros(8, 2)},
            tmp_path / "f.safetensors",
        )
        told = "expected a multiple of 7 rows, got 8"
        self.expect(cli("convert", tmp_path / "f.safetensors", tmp_path / "out"), told, out=tmp_path / "out")

    def test_output_that_exists(self, adapter, cli, tmp_path):
        out = tmp_path / "mine.safetensors"
        out.write_text("mine")
        result = cli("convert", tmp_path / "adapter", out, "--to", "kohya", "--component", "unet")
        assert result.exit_code == 2
        assert out.read_text() == "mine"

    def test_what_a_layout_cannot_hold(self, cli, tmp_path):
        torch.manual_seed(0)
        tuned = pylora.get_peft_model(
            llama(), pylora.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], rank_pattern={"v_proj": 2})
        )
        tuned.save_pretrained(tmp_path / "mixed")
        llama().save_pretrained(tmp_path / "base")
        out = tmp_path / "out.pt"
        args = ("convert", tmp_path / "mixed", out, "--to", "torchtune", "--base", tmp_path / "base")
        self.expect(cli(*args), "one rank", out=out)


def test_every_layout_has_its_name_on_the_command_line():
    from pylora.cli.commands.convert import Name
    from pylora.offline.layouts import LAYOUTS

    assert {name.value for name in Name} == {"peft", *LAYOUTS}
