"""The adapter methods of transformers' and diffusers' models, whose layers are PEFT's, under `patch_peft`."""

from __future__ import annotations

import pytest
import torch

from pylora.testing.llama import tiny_llama

peft = pytest.importorskip("peft")
TARGETS = ["q_proj", "down_proj"]
LAYERS = 2 * len(TARGETS)


def llama():
    return tiny_llama(layers=2, width=64)


@pytest.fixture
def adapters(tmp_path):
    """Two folders with adapters of different ranks."""
    folders = []
    for rank in (2, 5):
        config = peft.LoraConfig(r=rank, target_modules=TARGETS, init_lora_weights=False)
        folders.append(tmp_path / f"rank{rank}")
        peft.get_peft_model(llama(), config).save_pretrained(folders[-1])
    return folders


def test_transformers_adapters_load_and_switch(patch, ops, adapters):
    ids = torch.randint(0, 100, (2, 6))

    def results(model):
        yield model(ids).logits
        model.set_adapter("second")
        yield model(ids).logits
        model.set_adapter(["first", "second"])
        yield model(ids).logits
        model.disable_adapters()
        yield model(ids).logits
        model.enable_adapters()
        model.delete_adapter("second")
        yield model(ids).logits

    def loaded():
        model = llama()
        for name, folder in zip(("first", "second"), adapters, strict=True):
            model.load_adapter(str(folder), adapter_name=name)
        model.set_adapter("first")
        return model

    with torch.no_grad():
        expected = list(results(loaded()))
        patch()
        found = list(results(loaded()))
    for each, other in zip(found, expected, strict=True):
        torch.testing.assert_close(each, other, rtol=1e-4, atol=1e-4)
    assert torch.equal(found[3], llama()(ids).logits)
    assert ops["dense"] == 4 * LAYERS


def test_transformers_adapters_train_and_are_saved(patch, ops, tmp_path):
    patch()
    torch.manual_seed(0)
    model = llama()
    model.add_adapter(peft.LoraConfig(r=4, target_modules=TARGETS, lora_dropout=0.1), adapter_name="mine")
    ids = torch.randint(0, 100, (2, 6))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(8):
        loss = model.train()(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert ops["dense"] == 8 * LAYERS
    model.save_pretrained(tmp_path)
    assert (tmp_path / "adapter_model.safetensors").exists()
    again = llama()
    again.load_adapter(str(tmp_path))
    torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, rtol=1e-4, atol=1e-4)


def unet():
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        block_out_channels=(8, 16),
        layers_per_block=1,
        sample_size=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=16,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def test_diffusers_adapters(patch, ops, tmp_path):
    """A UNet's adapters: added, scaled one against the other, saved, loaded, fused and unfused."""
    pytest.importorskip("diffusers")
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 5, 16)

    def results(model):
        with torch.no_grad():
            model.set_adapters(["first", "second"], [0.7, 0.4])
            yield model(*inputs).sample
            model.fuse_lora()
            yield model(*inputs).sample
            model.unfuse_lora()
            model.set_adapters("second")
            yield model(*inputs).sample

    def adapted():
        model = unet()
        for seed, name in enumerate(("first", "second")):
            torch.manual_seed(seed)
            config = peft.LoraConfig(r=3, target_modules=["to_q", "to_v", "conv1"], init_lora_weights=False)
            model.add_adapter(config, adapter_name=name)
        return model

    expected = list(results(adapted()))
    patch()
    model = adapted()
    attention = [module for name, module in model.named_modules() if name.endswith(("to_q", "to_v"))]
    for found, other in zip(results(model), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-4)
    assert ops["dense"] == 2 * len(attention)

    model.save_lora_adapter(tmp_path, adapter_name="second", weight_name="unet.safetensors")
    again = unet()
    again.load_lora_adapter(tmp_path, prefix=None, weight_name="unet.safetensors", adapter_name="second")
    with torch.no_grad():
        torch.testing.assert_close(again(*inputs).sample, expected[2], rtol=1e-4, atol=1e-4)
