"""Merging PEFT's layers under `patch_peft`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import pylora
from pylora.integrations.patch_peft.merge import _RECORDS

peft = pytest.importorskip("peft")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def weights(model):
    return [p.detach().clone() for name, p in model.named_parameters() if "base_layer" in name]


def assert_equal(found, expected):
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
@pytest.mark.parametrize("safe", [False, True])
def test_unmerging_gives_the_bits_from_before(patch, make, dtype, settings, safe):
    model, x = make(dtype, adapters=2, **settings), torch.randn(5, 24, dtype=dtype)
    model.base_model.set_adapter(["default", "a1"])
    before, expected = weights(model), model(x)
    patch()
    for _ in range(3):
        model.merge_adapter(safe_merge=safe)
        assert model.base_model.model.first.merged_adapters == ["default", "a1"]
        torch.testing.assert_close(model(x), expected, rtol=5e-2, atol=5e-2)
        assert not torch.equal(weights(model)[0], before[0])
        model.unmerge_adapter()
        assert model.base_model.model.first.merged_adapters == []
        assert_equal(weights(model), before)


def test_merged_weights_are_rounded_once(patch, make):
    model = make(torch.bfloat16)
    layer = model.base_model.model.first
    a, b = (getattr(layer, name)["default"].weight.double() for name in ("lora_A", "lora_B"))
    exact = layer.base_layer.weight.double() + layer.scaling["default"] * b @ a
    patch()
    model.merge_adapter()
    assert (layer.base_layer.weight != exact.to(torch.bfloat16)).float().mean() < 1e-2  # ties of f32 sums


def test_adapters_merged_one_after_the_other(patch, make):
    model = make(adapters=3)
    before = weights(model)
    patch()
    model.merge_adapter(["default"])
    model.merge_adapter(["a1", "a2"])
    with pytest.warns(UserWarning, match="All adapters are already merged"):
        model.merge_adapter(["a1"])
    model.unmerge_adapter()
    assert_equal(weights(model), before)
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()


def test_biases_of_b(patch, make):
    model, x = make(target_modules=["first"], lora_bias=True), torch.randn(5, 24)
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].bias.normal_()
    before, expected = weights(model), model(x)
    patch()
    model.merge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    model.unmerge_adapter()
    assert_equal(weights(model), before)


def test_what_cannot_be_merged_is_found_before_another_adapter_is(patch, make):
    model = make(adapters=2, target_modules=["first"])
    model.base_model.set_adapter(["default", "a1"])
    model.base_model.model.first.lora_A["a1"].weight.data[0, 0] = float("nan")
    before = weights(model)
    patch()
    with pytest.raises(ValueError, match="The adapter a1 seems to be broken"):
        model.merge_adapter(safe_merge=True)
    assert_equal(weights(model), before)
    with pytest.warns(peft.utils.warning.PeftWarning, match="merging LoRA weights won't be possible"):
        biased = make(target_modules=["second"], lora_bias=True)
    before = weights(biased)
    with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
        biased.merge_adapter()
    assert_equal(weights(biased), before)


def test_a_weight_edited_while_merged_is_subtracted_from(patch, make):
    model = make(adapters=2)
    before = weights(model)
    patch()
    model.merge_adapter(["default"])
    model.merge_adapter(["a1"])
    with torch.no_grad():
        model.base_model.model.first.base_layer.weight += 1
    model.unmerge_adapter()
    torch.testing.assert_close(weights(model)[0], before[0] + 1, rtol=1e-5, atol=1e-5)
    assert torch.equal(weights(model)[1], before[1])


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_either_unmerges_what_the_other_has_merged(patch, make, settings):
    model, x = make(**settings), torch.randn(5, 24)
    before, expected = weights(model), model(x)
    patch()
    model.merge_adapter()
    pylora.unpatch_peft()
    model.unmerge_adapter()
    for found, other in zip(weights(model), before, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    model.merge_adapter()
    patch()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_logs_of_merges_that_others_have_undone_are_forgotten(patch, make):
    """Merged with pylora, unmerged and merged again without, the adapter trained in between."""
    model, x = make(), torch.randn(5, 24)
    patch()
    model.merge_adapter()
    pylora.unpatch_peft()
    model.unmerge_adapter()
    with torch.no_grad():
        model.base_model.model.first.lora_B["default"].weight.mul_(2)
    expected = model(x)
    model.merge_adapter()
    patch()
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-4)


def test_a_copy_of_a_merged_model_unmerges(patch, make):
    model, x = make(), torch.randn(5, 24)
    expected = model(x)
    patch()
    model.merge_adapter()
    twin = copy.deepcopy(model)
    twin.unmerge_adapter()
    torch.testing.assert_close(twin(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_merge_and_unload_keeps_no_logs(patch, make, settings):
    model, x = make(**settings), torch.randn(5, 24)
    expected = model(x)
    patch()
    layers = [model.base_model.model.first, model.base_model.model.second]
    plain = model.merge_and_unload()
    assert type(plain.first) is nn.Linear
    assert not any(_RECORDS.get(layer) for layer in layers)
    torch.testing.assert_close(plain(x), expected, rtol=1e-5, atol=1e-5)


class Picture(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(10, 9)
        self.conv = nn.Conv2d(3, 4, 3)
        self.line = nn.Conv1d(4, 4, 1)

    def forward(self, ids):
        image = self.words(ids).view(len(ids), 3, 3, 3)
        return self.line(self.conv(image).flatten(2))


@pytest.mark.parametrize("settings", [{}, {"use_dora": True}])
def test_embeddings_and_convolutions(patch, settings):
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["words", "conv", "line"], init_lora_weights=False, **settings)
    model = peft.get_peft_model(Picture(), config).eval()
    ids = torch.randint(0, 10, (2, 3))
    before, expected = weights(model), model(ids)
    patch()
    model.merge_adapter()
    torch.testing.assert_close(model(ids), expected, rtol=1e-4, atol=1e-4)
    model.unmerge_adapter()
    if settings:  # DoRA on these is PEFT's: up to rounding
        for found, other in zip(weights(model), before, strict=True):
            torch.testing.assert_close(found, other, rtol=1e-4, atol=1e-5)
    else:
        assert_equal(weights(model), before)


def test_attention_falls_through(patch):
    """PEFT's own merge of it: it puts tensors in the place of weights, which have no log."""
    torch.manual_seed(0)
    base = nn.ModuleDict({"attention": nn.MultiheadAttention(16, 2)})
    config = peft.LoraConfig(r=2, target_modules=["attention"], init_lora_weights=False)
    attention = peft.inject_adapter_in_model(config, base)["attention"]
    x = torch.randn(5, 2, 16)
    expected = attention(x, x, x)[0]
    attention.merge()
    merged = attention(x, x, x)[0]
    attention.unmerge()
    patch()
    torch.testing.assert_close(attention(x, x, x)[0], expected, rtol=1e-4, atol=1e-5)
    attention.merge()
    torch.testing.assert_close(attention(x, x, x)[0], merged, rtol=1e-4, atol=1e-5)
    assert not _RECORDS.get(attention.base_layer.out_proj)
    attention.unmerge()


def test_layers_that_share_a_weight(patch):
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(8, 8, bias=False), nn.Linear(8, 8, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x))

    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["first", "second"], init_lora_weights=False)
    model = peft.get_peft_model(Tied(), config).eval()
    before = weights(model)[0]
    patch()
    model.merge_adapter()
    model.unmerge_adapter()
    torch.testing.assert_close(weights(model)[0], before, rtol=1e-5, atol=1e-5)
