"""LoRA on embeddings: beside PEFT, and against its definition."""

from __future__ import annotations

import copy
import warnings

import peft
import pytest
import torch
from torch import nn

from pylora import LoraConfig, get_peft_model, get_peft_model_state_dict
from pylora.errors import PeftWarning
from pylora.layers import Embedding, create_layer


class Model(nn.Module):
    def __init__(self, **embedding) -> None:
        super().__init__()
        self.emb = nn.Embedding(17, 12, **embedding)
        self.lin = nn.Linear(12, 5)

    def forward(self, x):
        return self.lin(self.emb(x))


class ScaledEmbedding(nn.Embedding):
    def __init__(self, *args, scale=3.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.embed_scale = torch.tensor(scale)

    def forward(self, x):
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


def make(base: nn.Embedding | None = None, adapters=("default",), **config) -> Embedding:
    base = nn.Embedding(17, 12) if base is None else base
    settings = LoraConfig(**{"init_lora_weights": False, **config})
    layer = create_layer(base.requires_grad_(False), "default", settings, r=4, lora_alpha=6)
    for name in adapters[1:]:
        layer.update_layer(name, 3, lora_alpha=5, config=settings)
    layer.set_adapter(list(adapters))
    return layer


def expected(layer: Embedding, x: torch.Tensor, names=("default",), scale: float = 1.0) -> torch.Tensor:
    weight = layer.get_base_layer().weight.double()
    for name in names:
        a, b = layer.lora_embedding_A[name].double(), layer.lora_embedding_B[name].double()
        weight = weight + layer.scaling[name] * (b @ a).T
    return weight[x] * scale


SETTINGS = [
    {},
    {"padding_idx": 3},
    {"max_norm": 0.5},
    {"max_norm": 0.5, "norm_type": 1.0},
    {"scale_grad_by_freq": True},
]


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_beside_peft(settings, init) -> None:
    """Same weights from the same seed, same outputs, same gradients, same keys."""
    torch.manual_seed(0)
    base = Model(**settings)
    x = torch.tensor([[1, 3, 3], [16, 0, 1]])
    results = []
    for package in (peft, __import__("pylora")):
        torch.manual_seed(1)
        config = package.LoraConfig(r=4, lora_alpha=6, target_modules=["emb"], init_lora_weights=init)
        model = package.get_peft_model(copy.deepcopy(base), config)
        output = model(x)
        output.square().sum().backward()
        state = package.get_peft_model_state_dict(model)
        grads = {name: p.grad.to_dense() for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.detach(), grads, state))
    (output, grads, state), (ours, our_grads, our_state) = results
    torch.testing.assert_close(ours, output)
    assert list(our_state) == list(state)
    assert list(our_state) == ["base_model.model.emb.lora_embedding_A", "base_model.model.emb.lora_embedding_B"]
    assert our_grads.keys() == grads.keys()
    for key in state:
        torch.testing.assert_close(our_state[key], state[key])
    for key in grads:
        torch.testing.assert_close(our_grads[key], grads[key])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("names", [("default",), ("default", "other")])
def test_definition_and_merge(dtype, names) -> None:
    torch.manual_seed(0)
    layer = make(nn.Embedding(17, 12, dtype=dtype), names)
    x = torch.tensor([[1, 3, 3], [16, 0, 1]])
    wanted = expected(layer, x, names)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}.get(dtype, 2e-2)
    before = layer.base_layer.weight.clone()
    outputs = [layer(x)]
    for safe_merge in (False, True):
        layer.merge(safe_merge=safe_merge)
        assert layer.merged_adapters == list(names)
        outputs.append(layer(x))
        layer.unmerge()
        torch.testing.assert_close(layer.base_layer.weight, before, rtol=tolerance, atol=tolerance)
    for output in outputs:
        assert output.dtype is dtype
        torch.testing.assert_close(output.double(), wanted, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_f32_adapter_beside_a_narrow_base(dtype) -> None:
    layer = make(nn.Embedding(17, 12, dtype=dtype))
    for container in (layer.lora_embedding_A, layer.lora_embedding_B):
        container["default"] = nn.Parameter(torch.randn_like(container["default"], dtype=torch.float32))
    x = torch.tensor([1, 5])
    assert layer(x).dtype is dtype
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=2e-2, atol=5e-2)
    mixed = layer(x, adapter_names=["default", "__base__"])
    assert torch.equal(mixed[1], layer.base_layer(x)[1])
    torch.testing.assert_close(mixed[0], layer(x)[0], rtol=2e-2, atol=5e-2)


def test_delta_weight() -> None:
    layer = make()
    a, b = layer.lora_embedding_A["default"], layer.lora_embedding_B["default"]
    torch.testing.assert_close(layer.get_delta_weight("default"), 1.5 * (b @ a).T)
    with pytest.raises(AttributeError):
        layer.get_delta_weight("unknown")


@pytest.mark.parametrize("scale", [3.0, [3.0]])
def test_embed_scale_applies_to_the_adapter(scale) -> None:
    layer = make(ScaledEmbedding(17, 12, scale=scale))
    x = torch.tensor([[1, 3], [16, 0]])
    torch.testing.assert_close(layer(x).double(), expected(layer, x, scale=3.0), rtol=1e-5, atol=1e-5)
    mixed = layer(x, adapter_names=["__base__", "default"])
    torch.testing.assert_close(mixed, torch.stack([layer.base_layer(x)[0], layer(x)[1]]))
    unmerged = layer(x)
    layer.merge()
    torch.testing.assert_close(layer(x), unmerged)


def test_embed_scale_of_a_number_and_of_a_vector() -> None:
    layer = make()
    layer.base_layer.embed_scale = 2
    assert torch.equal(layer._get_embed_scale(), torch.tensor(2.0))
    layer.base_layer.embed_scale = torch.ones(12)
    with pytest.warns(PeftWarning, match="embed_scale attribute with shape"):
        layer(torch.tensor([1]))


def test_mixed_batch() -> None:
    layer = make(adapters=("default", "other"))
    x = torch.tensor([[1, 2], [3, 4], [1, 2], [5, 6]])
    mixed = layer(x, adapter_names=["other", "__base__", "default", "not here"])
    for row, name in ((0, "other"), (2, "default")):
        torch.testing.assert_close(mixed[row].double(), expected(layer, x, [name])[row], rtol=1e-5, atol=1e-5)
    assert torch.equal(mixed[[1, 3]], layer.base_layer(x)[[1, 3]])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=["other"])


def test_disabled_and_merged() -> None:
    layer = make()
    x = torch.tensor([1, 2])
    base = layer.base_layer(x).clone()
    layer.merge()
    layer.enable_adapters(False)
    torch.testing.assert_close(layer(x), base)
    assert not layer.merged


def test_refusals_leave_the_layer_alone() -> None:
    with pytest.raises(ValueError, match="lora_bias=True is not supported for Embedding"):
        make(lora_bias=True)
    layer = make()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    with pytest.raises(ValueError, match="lora_bias"):
        layer.update_layer("default", 2, lora_alpha=1, config=LoraConfig(lora_bias=True))
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        layer.update_layer("default", 0, lora_alpha=1, config=LoraConfig())
    with torch.no_grad():
        layer.lora_embedding_B["default"][0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert not layer.merged
    with torch.no_grad():
        layer.lora_embedding_B["default"][0, 0] = state["lora_embedding_B.default"][0, 0]
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())


def test_scale_layer_reaches_embeddings() -> None:
    layer = make()
    layer.scale_layer(2.0)
    assert layer.scaling == {"default": 3.0}
    layer.unscale_layer()
    assert layer.scaling == {"default": 1.5}


def test_reset_lora_parameters() -> None:
    layer = make()
    layer.reset_lora_parameters("default", False)
    assert layer.lora_embedding_A["default"].abs().sum() > 0
    layer.reset_lora_parameters("default", True)
    assert not layer.lora_embedding_A["default"].any()
    assert layer.lora_embedding_B["default"].any()


def test_f16_adapter_weights_become_f32_and_load(tmp_path) -> None:
    config = {"r": 4, "target_modules": ["emb", "lin"], "init_lora_weights": False}
    model = get_peft_model(Model().half(), LoraConfig(**config))
    assert model.base_model.model.emb.lora_embedding_A["default"].dtype is torch.float32
    model.save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        loaded = peft.PeftModel.from_pretrained(Model().half(), tmp_path)
    state, theirs = get_peft_model_state_dict(model), peft.get_peft_model_state_dict(loaded)
    assert state.keys() == theirs.keys()
    assert all(torch.equal(value, theirs[key]) for key, value in state.items())


def test_sparse_base_layer_trains() -> None:
    """PEFT fails in the backward: torch cannot transpose the sparse gradient."""
    x = torch.tensor([3, 4])
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = make(nn.Embedding(17, 12, sparse=sparse))
        layer(x).square().sum().backward()
        grads.append(layer.lora_embedding_A["default"].grad)
    assert torch.equal(*grads)


def test_padding_row() -> None:
    """Its gradient stays zero, as in the base layer."""
    layer = make(nn.Embedding(17, 12, padding_idx=3))
    layer(torch.tensor([3, 4])).sum().backward()
    grad = layer.lora_embedding_A["default"].grad
    assert not grad[:, 3].any()
    assert grad[:, 4].any()
    torch.testing.assert_close(
        layer(torch.tensor([3])).double(), expected(layer, torch.tensor([3])), rtol=1e-5, atol=1e-5
    )
