"""`add_weighted_adapter` of PEFT's models under `patch_peft`, beside PEFT's own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pylora.integrations.patch_peft import weighted

peft = pytest.importorskip("peft")
KINDS = ("svd", "cat", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
SVD_KINDS = ("ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(12, 24)
        self.dense = nn.Linear(24, 27)
        self.conv = nn.Conv2d(3, 4, 3)


def adapted():
    torch.manual_seed(0)
    model = Net()
    config = peft.LoraConfig(r=4, target_modules=["words", "dense", "conv"], init_lora_weights=False)
    model = peft.get_peft_model(model, config)
    model.add_adapter("other", config)
    return model


def combined(model, kind, **options):
    torch.manual_seed(5)
    model.add_weighted_adapter(["default", "other"], [1.5, -0.5], "new", combination_type=kind, **options)
    assert model.active_adapters == ["default"]
    net = model.base_model.model
    return [layer.get_delta_weight("new") for layer in (net.words, net.dense, net.conv)]


@pytest.fixture
def calls(monkeypatch):
    found = []
    original = weighted.combine_terms
    monkeypatch.setattr(weighted, "combine_terms", lambda *args: found.append(args[1].kind) or original(*args))
    return found


@pytest.mark.parametrize("kind", KINDS + SVD_KINDS)
def test_combinations_are_those_of_peft(patch, calls, kind):
    options = {"density": 0.5} if kind not in ("svd", "cat", "linear") else {}
    expected = combined(adapted(), kind, **options)
    patch()
    for found, other in zip(combined(adapted(), kind, **options), expected, strict=True):
        assert found.dtype == other.dtype
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
    assert calls == ([] if kind == "cat" else [kind] * 3)


def test_a_smaller_rank_and_clamping(patch, calls):
    expected = combined(adapted(), "svd", svd_rank=2, svd_clamp=0.9)
    patch()
    for found, other in zip(combined(adapted(), "svd", svd_rank=2, svd_clamp=0.9), expected, strict=True):
        torch.testing.assert_close(found, other, rtol=1e-3, atol=1e-3)
    assert len(calls) == 3


@pytest.mark.parametrize("dim", [1, 3])
def test_svd_on_convolutions_that_peft_fails_on(patch, dim):
    torch.manual_seed(0)
    net = nn.ModuleDict({"conv": (nn.Conv1d, None, nn.Conv3d)[dim - 1](3, 4, 3)})
    config = peft.LoraConfig(r=4, target_modules=["conv"], init_lora_weights=False)
    model = peft.get_peft_model(net, config)
    model.add_adapter("other", config)
    patch()
    model.add_weighted_adapter(["default", "other"], [1.5, -0.5], "new", combination_type="svd", svd_rank=8)
    layer = model.base_model.model.conv
    expected = 1.5 * layer.get_delta_weight("default") - 0.5 * layer.get_delta_weight("other")
    torch.testing.assert_close(layer.get_delta_weight("new"), expected, rtol=1e-3, atol=1e-3)


def test_errors_are_those_of_peft(patch):
    patch()
    model = adapted()
    with pytest.raises(ValueError, match="Adapter nobody does not exist"):
        model.add_weighted_adapter(["nobody"], [1.0], "new")
    with pytest.raises(ValueError, match="Invalid combination_type"):
        combined(model, "mean")
