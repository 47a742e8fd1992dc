"""Layers other than dense ones called with `adapter_names`: one op for all adapters, each row as its adapter alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import pylora
from pylora import LoraConfig, get_peft_model
from pylora.layers.delta_layer import DeltaLayer

NAMES = ["b", "default", "__base__", "b", "c", "__base__"]
OPS = ("pylora.layers.embedding.multi_lora_embedding_", "pylora.layers.conv.multi_lora_conv_")
LAYERS = {
    "embedding": lambda: (nn.Embedding(30, 12, padding_idx=2), torch.arange(24).view(6, 4) % 13),
    "embedding, a token a row": lambda: (nn.Embedding(30, 12), torch.arange(6)),
    "conv1d": lambda: (nn.Conv1d(6, 8, 3, padding=1), torch.randn(6, 6, 37)),
    "conv1d, same, even": lambda: (nn.Conv1d(6, 8, 4, padding="same"), torch.randn(6, 6, 37)),
    "conv2d": lambda: (nn.Conv2d(6, 8, (3, 2), stride=(2, 1), padding=1, dilation=(1, 2)), torch.randn(6, 6, 9, 7)),
    "conv2d, patches": lambda: (nn.Conv2d(3, 12, 4, stride=4), torch.randn(6, 3, 12, 8)),
    "conv2d, reflected": lambda: (nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"), torch.randn(6, 3, 9, 8)),
    "conv2d, groups": lambda: (nn.Conv2d(6, 8, 3, groups=2), torch.randn(6, 6, 9, 7)),
    "conv3d": lambda: (nn.Conv3d(4, 5, 2, padding=(0, 1, 0)), torch.randn(6, 4, 5, 4, 3)),
}


def wrapped(kind: str, **settings):
    """A model of one layer with adapters "default", "b" and "c" of different ranks and scalings, and an input."""
    torch.manual_seed(1)
    module, x = LAYERS[kind]()

    def config(rank, alpha):
        return LoraConfig(r=rank, lora_alpha=alpha, target_modules=["0"], init_lora_weights=False, **settings)

    model = get_peft_model(nn.Sequential(module), config(4, 8))
    model.add_adapter("b", config(2, 3))
    model.add_adapter("c", config(6, 6))
    return model.eval(), model.base_model.model[0], x


@pytest.fixture
def calls(monkeypatch):
    """Counts of the ops that the layers call and of the adapters computed one by one."""
    counts = {"op": 0, "modules": 0}

    def counted(function, key):
        def call(*args, **kwargs):
            counts[key] += 1
            return function(*args, **kwargs)

        return call

    for path in OPS:
        module, name = path.rsplit(".", 1)
        monkeypatch.setattr(path, counted(getattr(__import__(module, fromlist=[name]), name), "op"))
    for cls in (DeltaLayer, *DeltaLayer.__subclasses__()):
        if "_adapter_output" in vars(cls):
            monkeypatch.setattr(cls, "_adapter_output", counted(cls._adapter_output, "modules"))
    return counts


@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("factor_dtype", [None, torch.float32])
def test_each_row_is_what_its_adapter_gives_in_one_op(kind, dtype, factor_dtype, calls) -> None:
    model, layer, x = wrapped(kind)
    model.to(dtype)
    if factor_dtype is not None:
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.data = p.data.to(factor_dtype)
    x = x if x.dtype == torch.int64 else x.to(dtype)
    with torch.no_grad():
        mixed = layer(x, adapter_names=NAMES)
        assert calls == {"op": 1, "modules": 0}
        assert mixed.dtype == dtype
        tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 3e-2)
        if dtype == torch.float64 and factor_dtype is not None:
            tolerance = 1e-5
        for name in ("default", "b", "c"):
            model.set_adapter(name)
            rows = [i for i, each in enumerate(NAMES) if each == name]
            alone = layer(x)[rows]
            torch.testing.assert_close(mixed[rows], alone.to(dtype), rtol=tolerance, atol=10 * tolerance)
        base_rows = [i for i, name in enumerate(NAMES) if name == "__base__"]
        assert torch.equal(mixed[base_rows], layer.base_layer(x)[base_rows])


@pytest.mark.parametrize("kind", LAYERS)
def test_training_gives_each_adapter_the_gradients_of_its_rows(kind, calls) -> None:
    model, layer, x = wrapped(kind)
    model.train()
    model.base_model.set_adapter(["default", "b", "c"])
    if x.is_floating_point():
        x.requires_grad_()
    with pylora.mixed_training(model, NAMES):
        mixed = model(x)
    assert calls == {"op": 1, "modules": 0}
    mixed.square().sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    dx, x.grad = x.grad, None
    model.zero_grad(set_to_none=True)
    compared = 0
    for name in ("default", "b", "c"):
        model.set_adapter(name)
        rows = [i for i, each in enumerate(NAMES) if each == name]
        own = layer(x[rows])
        torch.testing.assert_close(mixed[rows], own, rtol=1e-4, atol=1e-5)
        own.square().sum().backward()
        for key, p in model.named_parameters():
            if p.grad is not None:
                assert (grads[key] - p.grad).norm() <= 1e-4 * p.grad.norm(), key
                compared += 1
        if dx is not None:
            torch.testing.assert_close(dx[rows], x.grad[rows], rtol=1e-4, atol=1e-4)
            x.grad = None
        model.zero_grad(set_to_none=True)
    assert compared == len(grads) == 6


@pytest.mark.parametrize("kind", LAYERS)
def test_every_change_of_an_adapter_is_seen(kind) -> None:
    model, layer, x = wrapped(kind)
    with torch.no_grad():
        before = layer(x, adapter_names=NAMES)
        layer.set_scale("b", 3.0)
        after = layer(x, adapter_names=NAMES)
        model.set_adapter("b")
        rows = [0, 3]
        torch.testing.assert_close(after[rows], layer(x)[rows], rtol=1e-5, atol=1e-5)
        assert not torch.equal(after[rows], before[rows])
        model.delete_adapter("b")
        assert torch.equal(layer(x, adapter_names=NAMES)[rows], layer.base_layer(x)[rows])


@pytest.mark.parametrize("kind", LAYERS)
def test_dora_beside_plain_adapters(kind) -> None:
    model, layer, x = wrapped(kind)
    model.add_adapter("d", LoraConfig(r=2, target_modules=["0"], init_lora_weights=False, use_dora=True))
    names = ["d", "default", "__base__", "b", "d", "c"]
    with torch.no_grad():
        mixed = layer(x, adapter_names=names)
        for name in ("default", "b", "c", "d"):
            model.set_adapter(name)
            rows = [i for i, each in enumerate(names) if each == name]
            torch.testing.assert_close(mixed[rows], layer(x)[rows], rtol=1e-4, atol=1e-4)
        assert torch.equal(mixed[2], layer.base_layer(x)[2])


@pytest.mark.parametrize(
    "settings", [{"max_norm": 1.0}, {"scale_grad_by_freq": True}], ids=["max_norm", "scale_grad_by_freq"]
)
def test_embeddings_with_rules_of_their_own_look_up_one_by_one(settings, calls, monkeypatch) -> None:
    monkeypatch.setitem(LAYERS, "ruled", lambda: (nn.Embedding(30, 12, **settings), torch.arange(12).view(6, 2)))
    model, layer, x = wrapped("ruled")
    with torch.no_grad():
        mixed = layer(x, adapter_names=NAMES)
        assert calls == {"op": 0, "modules": 3}
        model.set_adapter("b")
        torch.testing.assert_close(mixed[[0, 3]], layer(x)[[0, 3]], rtol=1e-5, atol=1e-5)


def test_scaled_embedding(calls) -> None:
    """Gemma's, whose output is multiplied by a number, and with it the adapters' part."""
    gemma = pytest.importorskip("transformers.models.gemma3.modeling_gemma3")
    torch.manual_seed(1)
    module = gemma.Gemma3TextScaledWordEmbedding(30, 12, 0, embed_scale=3.5)
    config = LoraConfig(r=4, target_modules=["0"], init_lora_weights=False)
    model = get_peft_model(nn.Sequential(module), config).eval()
    layer, x = model.base_model.model[0], torch.arange(8).view(2, 4)
    with torch.no_grad():
        mixed = layer(x, adapter_names=["__base__", "default"])
        assert calls == {"op": 1, "modules": 0}
        torch.testing.assert_close(mixed[1], layer(x)[1])
        torch.testing.assert_close(mixed[0], module(x)[0])


def test_convolutions_with_dropout_in_training_run_one_by_one(calls) -> None:
    model, _, x = wrapped("conv2d", lora_dropout=0.5)
    model.train()
    model.base_model.set_adapter(["default", "b", "c"])
    with pylora.mixed_training(model, NAMES):
        model(x)
    assert calls == {"op": 0, "modules": 3}


def test_hooks_on_a_factor_of_a_convolution_run(calls) -> None:
    _, layer, x = wrapped("conv1d")
    seen = []
    with torch.no_grad():
        before = layer(x, adapter_names=NAMES)
        layer.lora_A["b"].register_forward_hook(lambda *_: seen.append(1))
        torch.testing.assert_close(layer(x, adapter_names=NAMES), before, rtol=1e-5, atol=1e-5)
    assert seen == [1]
    assert calls == {"op": 2, "modules": 1}


def test_autocast_of_a_convolution() -> None:
    _, layer, x = wrapped("conv2d")
    with torch.no_grad():
        expected = layer(x, adapter_names=NAMES)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = layer(x, adapter_names=NAMES)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.1)
