"""LoRA on nn.MultiheadAttention: against an attention with the effective weights, and beside PEFT."""

from __future__ import annotations

import copy
import itertools
import pickle
import warnings

import peft
import pytest
import torch
from torch import nn

import pylora
from pylora import LoraConfig, get_peft_model, get_peft_model_state_dict
from pylora.layers import Linear, MultiheadAttention, create_layer

DIM, HEADS = 16, 2


class Model(nn.Module):
    def __init__(self, **kwargs) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(DIM, HEADS, **kwargs)
        self.lin = nn.Linear(DIM, 3)

    def forward(self, x):
        return self.lin(self.mha(x, x, x)[0])


class Subclass(nn.MultiheadAttention):
    def forward(self, query, *args, **kwargs):
        return super().forward(2 * query, *args, **kwargs)


def make(base=None, adapters=("default",), **config) -> MultiheadAttention:
    base = nn.MultiheadAttention(DIM, HEADS) if base is None else base
    settings = LoraConfig(**{"init_lora_weights": False, **config})
    layer = create_layer(base.requires_grad_(False), "default", settings, r=4, lora_alpha=6)
    for name in adapters[1:]:
        layer.update_layer(name, 3, lora_alpha=5, config=settings)
    for each in (layer, layer.base_layer.out_proj):
        each.set_adapter(list(adapters))
    return layer.eval()


def effective(layer: MultiheadAttention, names=("default",)) -> nn.MultiheadAttention:
    """A plain attention in f64 with the adapters' deltas in its weights: the output projection's twice, as PEFT's."""
    base = copy.deepcopy(layer.base_layer)
    out = base.out_proj
    base.out_proj = copy.deepcopy(out.base_layer)
    base.double()
    with torch.no_grad():
        for name in names:
            for part, weight, bias, times in (
                (layer, base.in_proj_weight, base.in_proj_bias, 1),
                (out, base.out_proj.weight, base.out_proj.bias, 2),
            ):
                a, b = part.lora_A[name].weight.double(), part.lora_B[name].weight.double()
                weight += times * part.scaling[name] * (b @ a)
                if part.lora_B[name].bias is not None:
                    bias += part.scaling[name] * part.lora_B[name].bias.double()
    return base


def assert_same(actual, wanted, tolerance=1e-5) -> None:
    for ours, theirs in zip(actual, wanted, strict=True):
        if theirs is None:
            assert ours is None
        else:
            torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance)


def causal(n: int) -> torch.Tensor:
    return torch.triu(torch.ones(n, n, dtype=torch.bool), 1)


CALLS = [
    {},
    {"need_weights": False},
    {"average_attn_weights": False},
    {"attn_mask": causal(5)},
    {"attn_mask": causal(5), "is_causal": True, "need_weights": False},
    {"attn_mask": torch.zeros(5, 5).masked_fill(causal(5), -1e4)},
    {"attn_mask": torch.stack([causal(5)] * 2 * HEADS)},
    {"key_padding_mask": torch.tensor([[False] * 5, [False] * 3 + [True] * 2])},
]
MODULES = list(itertools.product([False, True], [{}, {"bias": False}, {"add_bias_kv": True}, {"add_zero_attn": True}]))


@pytest.mark.parametrize("call", range(len(CALLS)))
@pytest.mark.parametrize(("batch_first", "settings"), MODULES, ids=str)
def test_arguments(call, batch_first, settings) -> None:
    torch.manual_seed(0)
    layer = make(nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first, **settings))
    x = torch.randn(2, 5, DIM)
    x = x if batch_first else x.transpose(0, 1)
    kwargs = CALLS[call]
    wide = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v for k, v in kwargs.items()}
    wanted = effective(layer)(x.double(), x.double(), x.double(), **wide)
    assert_same(layer(x, x, x, **kwargs), wanted)
    layer.base_layer.register_forward_hook(lambda *_: None)  # then the module is called
    assert_same(layer(x, x, x, **kwargs), wanted)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("adapters", [("default",), ("default", "other")])
def test_cross_attention_unbatched_and_positional(batch_first, adapters) -> None:
    layer = make(nn.MultiheadAttention(DIM, HEADS, batch_first=batch_first), adapters)
    reference = effective(layer, adapters)
    q, k, v = torch.randn(3, 4, DIM), torch.randn(3, 4, DIM), torch.randn(3, 4, DIM)
    for args in ((q, k, v), (q, k, k), (q[0], k[0], v[0]), (q[0], q[0], q[0])):
        assert_same(layer(*args, None, True), reference(*(x.double() for x in args), None, True))


def test_subclass_runs_its_own_forward() -> None:
    layer = make(Subclass(DIM, HEADS))
    x = torch.randn(5, 2, DIM)
    assert_same(layer(x, x, x), effective(layer)(x.double(), x.double(), x.double()))


def test_attention_dropout() -> None:
    layer = make(nn.MultiheadAttention(DIM, HEADS, dropout=0.5)).train()
    reference = effective(layer).float().train()
    x = torch.randn(5, 2, DIM)
    torch.manual_seed(3)
    wanted = reference(x, x, x)
    torch.manual_seed(3)
    assert_same(layer(x, x, x), [each.double() for each in wanted])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wide_adapter", [False, True])
def test_narrow_dtypes_leave_the_base_weight_alone(dtype, wide_adapter) -> None:
    """PEFT adds and subtracts the rounded delta in the base weight at each forward, which changes it."""
    layer = make(nn.MultiheadAttention(DIM, HEADS, dtype=dtype))
    if wide_adapter:
        for part in (layer, layer.base_layer.out_proj):
            part.lora_A.float()
            part.lora_B.float()
    state = {key: value.clone() for key, value in layer.state_dict().items()}
    versions = [layer.base_layer.in_proj_weight._version, layer.base_layer.out_proj.base_layer.weight._version]
    x = torch.randn(5, 2, DIM, dtype=dtype)
    output = layer(x, x, x)
    assert output[0].dtype is output[1].dtype is dtype
    assert_same(output, effective(layer)(x.double(), x.double(), x.double()), 5e-2)
    assert all(torch.equal(value, state[key]) for key, value in layer.state_dict().items())
    now = [layer.base_layer.in_proj_weight._version, layer.base_layer.out_proj.base_layer.weight._version]
    assert now == versions


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("init", [True, False])
def test_beside_peft(batch_first, init, tmp_path) -> None:
    base = Model(batch_first=batch_first)
    x = torch.randn(2, 5, DIM)
    results = []
    for package in (peft, pylora):
        torch.manual_seed(1)
        config = package.LoraConfig(target_modules=["mha"], init_lora_weights=init)
        model = package.get_peft_model(copy.deepcopy(base), config)
        output = model(x)
        output.square().sum().backward()
        model.save_pretrained(tmp_path / package.__name__)
        results.append((model, output.detach(), package.get_peft_model_state_dict(model)))
    (theirs, output, state), (ours, our_output, our_state) = results
    torch.testing.assert_close(our_output, output)
    assert list(our_state) == list(state)
    assert "base_model.model.mha.base_layer.out_proj.lora_A.weight" in our_state
    for key in state:
        torch.testing.assert_close(our_state[key], state[key])
    grads = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    for name, param in ours.named_parameters():
        assert (param.grad is None) == (name not in grads)
        if param.grad is not None:
            times = 2 if "out_proj" in name else 1  # PEFT's second addition is outside of the graph
            torch.testing.assert_close(param.grad, times * grads[name])
    loaded = pylora.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "peft")
    torch.testing.assert_close(loaded(x), output)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path / "pylora")
    torch.testing.assert_close(loaded(x), output)


@pytest.mark.parametrize("safe_merge", [False, True])
def test_merge_and_unmerge(safe_merge) -> None:
    layer = make(adapters=("default", "other"))
    x = torch.randn(5, 2, DIM)
    wanted = layer(x, x, x)
    before = {key: value.clone() for key, value in layer.state_dict().items()}
    layer.merge(safe_merge=safe_merge)
    assert layer.merged_adapters == layer.base_layer.out_proj.merged_adapters == ["default", "other"]
    assert_same(layer(x, x, x), [each.double() for each in wanted])
    layer.unmerge()
    assert not layer.merged
    assert not layer.base_layer.out_proj.merged
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, before[key])
    with pytest.warns(UserWarning, match="Already unmerged"):
        layer.unmerge()


def test_a_failed_safe_merge_changes_neither_projection() -> None:
    layer = make()
    with torch.no_grad():
        layer.base_layer.out_proj.lora_A["default"].weight[0, 0] = float("inf")
    before = layer.base_layer.in_proj_weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        layer.merge(safe_merge=True)
    assert torch.equal(layer.base_layer.in_proj_weight, before)
    assert not layer.merged


@pytest.mark.filterwarnings("ignore:.*has no bias", "ignore:All adapters are already merged", "ignore:Already unmerged")
def test_whole_model_lifecycle() -> None:
    model = get_peft_model(Model(), LoraConfig(target_modules=["mha", "lin"], init_lora_weights=False)).eval()
    x = torch.randn(2, 5, DIM)
    base_output = model.get_base_model().lin.base_layer(
        pickle.loads(pickle.dumps(model)).base_model.model.mha.unload_and_optionally_merge_module(
            merge=False, safe_merge=False, adapter_names=None
        )(x, x, x)[0]
    )
    wanted = model(x)
    with model.disable_adapter():
        torch.testing.assert_close(model(x), base_output)
    model.merge_adapter()
    torch.testing.assert_close(model(x), wanted)
    model.unmerge_adapter()
    torch.testing.assert_close(model(x), wanted)
    model.add_adapter("other", LoraConfig(target_modules=["mha"], init_lora_weights=False, r=2))
    torch.testing.assert_close(model(x), wanted)
    model.set_adapter("other")
    assert not torch.allclose(model(x), wanted)
    model.delete_adapter("other")
    model.set_adapter("default")
    torch.testing.assert_close(model(x), wanted)
    torch.testing.assert_close(copy.deepcopy(model).merge_and_unload()(x), wanted)
    unloaded = model.unload()
    assert type(unloaded.mha) is nn.MultiheadAttention
    assert type(unloaded.mha.out_proj) is type(nn.MultiheadAttention(2, 1).out_proj)
    assert unloaded.state_dict().keys() == Model().state_dict().keys()
    torch.testing.assert_close(unloaded(x), base_output)


def test_attributes() -> None:
    base = nn.MultiheadAttention(DIM, HEADS, dropout=0.1, batch_first=True, add_bias_kv=True)
    out_proj = base.out_proj
    layer = make(base)
    for name in ("embed_dim", "kdim", "vdim", "num_heads", "head_dim", "dropout", "batch_first", "add_zero_attn"):
        assert getattr(layer, name) == getattr(base, name)
    assert layer._qkv_same_embed_dim is True
    assert layer.out_proj is out_proj
    for name in ("in_proj_weight", "in_proj_bias", "bias_k", "bias_v"):
        assert torch.equal(getattr(layer, name), getattr(base, name))
    assert layer.merge_masks(None, None, torch.zeros(1, 2, DIM)) == base.merge_masks(None, None, torch.zeros(1, 2, DIM))
    assert (layer.in_features, layer.out_features) == (DIM, 3 * DIM)
    assert isinstance(base.out_proj, Linear)
    assert repr(layer).startswith("lora.MultiheadAttention(")
    assert "(out_proj): lora.Linear(" in repr(layer)
    assert layer._restore_weights() is None


def test_refusals() -> None:
    with pytest.raises(ValueError, match="Only same embed for query/key/value is supported as of now for Multihead"):
        make(nn.MultiheadAttention(DIM, HEADS, kdim=4))
    with pytest.raises(ValueError, match=r"MultiheadAttention does not support DoRA \(yet\), please set use_dora"):
        make(use_dora=True)
    with pytest.raises(ValueError, match="lora_bias"):
        make(nn.MultiheadAttention(DIM, HEADS, bias=False), lora_bias=True)
    base = nn.MultiheadAttention(DIM, HEADS)
    base.out_proj = nn.Identity()
    with pytest.raises(TypeError, match=r"out_proj must be an instance of nn\.Linear"):
        make(base)
    base = nn.MultiheadAttention(DIM, HEADS)
    out_proj = base.out_proj
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        MultiheadAttention(base, "default", LoraConfig(), r=0)
    assert base.out_proj is out_proj
    layer = make()
    x = torch.randn(5, 2, DIM)
    with pytest.raises(TypeError, match=r"lora\.MultiheadAttention does not support mixed adapter batches"):
        layer(x, x, x, adapter_names=["default"] * 5)
    layer.base_layer.out_proj.set_adapter(["other"])
    with pytest.raises(ValueError, match="The out_proj layer of MultiheadAttention has other active or merged"):
        layer(x, x, x)


def test_a_failed_injection_leaves_the_attention_whole() -> None:
    model = nn.ModuleDict({"mha": nn.MultiheadAttention(DIM, HEADS), "mha2": nn.MultiheadAttention(DIM, HEADS, kdim=3)})
    parts = list(model.named_modules())
    with pytest.raises(ValueError, match="Only same embed"):
        get_peft_model(model, LoraConfig(target_modules=["mha", "mha2"]))
    assert list(model.named_modules()) == parts


def test_lora_bias() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # PEFT warns that there is no bias to merge into
        layer = make(lora_bias=True)
    x = torch.randn(5, 2, DIM)
    wanted = effective(layer)(x.double(), x.double(), x.double())
    assert_same(layer(x, x, x), wanted)
    layer.merge()
    assert_same(layer(x, x, x), wanted)


def test_out_proj_inside_a_targeted_attention_is_no_second_target() -> None:
    model = get_peft_model(Model(), LoraConfig(target_modules=["mha", "out_proj"]))
    assert list(get_peft_model_state_dict(model)) == list(
        get_peft_model_state_dict(get_peft_model(Model(), LoraConfig(target_modules=["mha"])))
    )


@pytest.mark.filterwarnings("ignore:.*nested tensors", "ignore:enable_nested_tensor")
@pytest.mark.parametrize("targets", [["self_attn"], ["linear1", "linear2"], ["self_attn", "linear1", "linear2"]])
@pytest.mark.parametrize("padding", [False, True])
def test_torch_s_encoder_does_not_bypass_the_adapters(targets, padding) -> None:
    """In eval mode without gradients torch's encoder computes from its children's weights: PEFT's adapters get lost."""
    torch.manual_seed(0)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(DIM, HEADS, 32, batch_first=True), 2)
    model = get_peft_model(encoder, LoraConfig(target_modules=targets, init_lora_weights=False)).eval()
    x = torch.randn(2, 5, DIM)
    mask = torch.tensor([[False] * 5, [False] * 3 + [True] * 2]) if padding else None
    wanted = model(x, src_key_padding_mask=mask)
    with torch.no_grad():
        output = model(x, src_key_padding_mask=mask)
        kept = slice(0, 3) if padding else slice(None)
        torch.testing.assert_close(output[:, kept], wanted[:, kept])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "All adapters are already merged")
            model.merge_adapter()
        torch.testing.assert_close(model(x, src_key_padding_mask=mask)[:, kept], wanted[:, kept])


def test_compiles() -> None:
    layer = make()
    x = torch.randn(5, 2, DIM)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    assert_same(compiled(x, x, x), [each.double() for each in layer(x, x, x)])
