"""LoRA on convolutions: every hyper-parameter against the definition, beside PEFT where PEFT is right."""

from __future__ import annotations

import copy
import itertools
import warnings

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import pylora
from pylora import LoraConfig, get_peft_model
from pylora.layers import Conv1d, Conv2d, Conv3d, create_layer

CONVS = {1: (nn.Conv1d, Conv1d), 2: (nn.Conv2d, Conv2d), 3: (nn.Conv3d, Conv3d)}
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-10, torch.bfloat16: 5e-2, torch.float16: 5e-3}


def make(base: nn.Module, adapters=("default",), rank: int = 4, **config):
    config = LoraConfig(**{"init_lora_weights": False, **config})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "LoRA adapter added to ConvNd")
        layer = create_layer(base.requires_grad_(False), "default", config, r=rank, lora_alpha=6)
    for name in adapters[1:]:
        layer.update_layer(name, 2 * rank, lora_alpha=5, config=config)
    layer.set_adapter(list(adapters))
    return layer.eval()


def dense_delta(layer, name: str) -> torch.Tensor:
    """scaling * B A as one kernel over all input channels, in f64."""
    a, b = layer.lora_A[name].weight.double(), layer.lora_B[name].weight.double().flatten(1)
    groups = layer.get_base_layer().groups
    full_b = torch.block_diag(*b.chunk(groups))
    return layer.scaling[name] * torch.einsum("or,r...->o...", full_b, a)


def expected(layer, x: torch.Tensor) -> torch.Tensor:
    """base(x) plus a convolution by the dense delta that slides as the base layer does, in f64."""
    base = copy.deepcopy(layer.get_base_layer()).double()
    result = base(x.double())
    for name in layer.active_adapters:
        delta = copy.deepcopy(base)
        delta.groups = 1
        delta.weight = nn.Parameter(dense_delta(layer, name))
        bias = layer.lora_B[name].bias
        delta.bias = None if bias is None else nn.Parameter(layer.scaling[name] * bias.double())
        result = result + delta(x.double())
    return result


@st.composite
def convolutions(draw):
    dim = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2]))
    sizes = st.tuples(*[st.integers(1, 3)] * dim)
    kernel, dilation = draw(sizes), draw(sizes)
    stride = draw(sizes)
    padding = draw(st.one_of(sizes, st.sampled_from(["valid", "same"])))
    if padding == "same":
        stride = (1,) * dim
    modes = ["zeros", "circular", "replicate", "reflect"]
    return dim, {
        "in_channels": 2 * draw(st.integers(1, 2)),
        "out_channels": 2 * draw(st.integers(1, 3)),
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "groups": groups,
        "bias": draw(st.booleans()),
        "padding_mode": draw(st.sampled_from(modes)),
    }


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@settings(max_examples=150, deadline=None)
@given(convolutions(), st.sampled_from([("default",), ("default", "other")]))
def test_any_hyperparameters(convolution, adapters) -> None:
    dim, hyper = convolution
    layer = make(CONVS[dim][0](**hyper, dtype=torch.float64), adapters)
    assert type(layer) is CONVS[dim][1]
    x = torch.randn(2, hyper["in_channels"], *[9, 8, 7][:dim], dtype=torch.float64)
    wanted = expected(layer, x)
    torch.testing.assert_close(layer(x), wanted)
    before = layer.base_layer.weight.clone()
    if hyper["groups"] > 1:
        for call in (layer.merge, layer.check_merge):
            with pytest.raises(NotImplementedError, match="groups > 1"):
                call()
        assert torch.equal(layer.base_layer.weight, before)
        return
    layer.merge(safe_merge=True)
    torch.testing.assert_close(layer(x), wanted)
    layer.unmerge()
    torch.testing.assert_close(layer.base_layer.weight, before)
    assert layer.get_delta_weight("default").shape == before.shape
    torch.testing.assert_close(layer.get_delta_weight("default"), dense_delta(layer, "default"))


@pytest.mark.parametrize("dim", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes(dim, dtype) -> None:
    torch.manual_seed(0)
    layer = make(CONVS[dim][0](4, 6, 3, dilation=2, padding=1, dtype=dtype))
    x = torch.randn(2, 4, *[9] * dim, dtype=dtype)
    wanted = expected(layer, x)
    bound = TOLERANCE[dtype] * wanted.abs().max().item()
    for narrow in (True, False):
        if not narrow:
            layer.lora_A.float()
            layer.lora_B.float()
        assert layer(x).dtype is dtype
        torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=bound)
        layer.merge()
        torch.testing.assert_close(layer(x).double(), wanted, rtol=0, atol=bound)
        layer.unmerge()


PEFT_RIGHT = [
    (1, {"kernel_size": 3, "stride": 2}),
    (2, {"kernel_size": 1}),
    (2, {"kernel_size": (3, 1), "stride": (2, 1), "padding": (1, 0)}),
    (2, {"kernel_size": 3, "padding": "same", "bias": False}),
    (2, {"kernel_size": 3, "groups": 2}),
    (3, {"kernel_size": 2}),
]


@pytest.mark.parametrize("init", [True, False, "gaussian"])
@pytest.mark.parametrize("lora_bias", [False, True])
@pytest.mark.parametrize(("dim", "hyper"), PEFT_RIGHT, ids=str)
@pytest.mark.filterwarnings(
    "ignore:LoRA adapter added to ConvNd", "ignore:.*has no bias", "ignore:.*have invalid shape"
)
def test_beside_peft(dim, hyper, lora_bias, init) -> None:
    if lora_bias and init == "gaussian":
        return
    base = nn.Sequential(CONVS[dim][0](4, 6, **hyper))
    x = torch.randn(2, 4, *[9, 8, 7][:dim])
    results = []
    for package in (peft, pylora):
        torch.manual_seed(1)
        config = package.LoraConfig(r=4, target_modules=["0"], init_lora_weights=init, lora_bias=lora_bias)
        model = package.get_peft_model(copy.deepcopy(base), config)
        output = model(x)
        output.square().sum().backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        results.append((output.detach(), grads, package.get_peft_model_state_dict(model)))
    (output, grads, state), (ours, our_grads, our_state) = results
    torch.testing.assert_close(ours, output)
    assert list(our_state) == list(state)
    assert our_grads.keys() == grads.keys()
    for key in state:
        torch.testing.assert_close(our_state[key], state[key])
    for key in grads:
        torch.testing.assert_close(our_grads[key], grads[key])


def test_dilation_and_padding_mode_that_peft_drops() -> None:
    """PEFT fails on the first and computes another function before merging than after on the second."""
    x = torch.randn(2, 4, 9, 9)
    for hyper in ({"dilation": 2}, {"padding": 1, "padding_mode": "circular"}):
        model = get_peft_model(
            nn.Sequential(nn.Conv2d(4, 6, 3, **hyper)),
            LoraConfig(target_modules=["0"], init_lora_weights=False),
        ).eval()
        unmerged = model(x)
        torch.testing.assert_close(unmerged.double(), expected(model.base_model.model[0], x), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(model.merge_and_unload()(x), unmerged, rtol=1e-4, atol=1e-4)


def test_groups_and_rank() -> None:
    with pytest.raises(ValueError, match=r"Targeting a Conv2d with groups=3 and rank 4\. .* divisible by groups"):
        make(nn.Conv2d(3, 6, 3, groups=3))
    layer = make(nn.Conv2d(3, 6, 3, groups=3), rank=3)
    with pytest.raises(ValueError, match="divisible by groups"):
        layer.update_layer("other", 4, lora_alpha=1, config=LoraConfig())
    assert list(layer.lora_A) == ["default"]
    with pytest.warns(UserWarning, match=r"groups > 1\. Merging is not supported"):
        create_layer(nn.Conv2d(3, 6, 3, groups=3), "default", LoraConfig(), r=3, lora_alpha=1)


@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd")
def test_a_grouped_layer_stops_a_whole_merge() -> None:
    model = get_peft_model(
        nn.Sequential(nn.Conv1d(2, 4, 1), nn.Conv1d(4, 4, 1, groups=2)),
        LoraConfig(target_modules=["0", "1"], r=4, init_lora_weights=False),
    )
    before = model.base_model.model[0].weight.clone()
    with pytest.raises(NotImplementedError):
        model.merge_adapter()
    assert torch.equal(model.base_model.model[0].weight, before)
    assert not model.base_model.model[0].merged


def test_mixed_batch() -> None:
    layer = make(nn.Conv2d(4, 6, 3), ("default", "other"))
    x = torch.randn(4, 4, 5, 5)
    mixed = layer(x, adapter_names=["other", "__base__", "default", "not here"])
    for row, names in ((0, ["other"]), (2, ["default"]), (1, []), (3, [])):
        layer.set_adapter(names)
        torch.testing.assert_close(mixed[row], layer(x)[row])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.filterwarnings("ignore:.*has no bias")
def test_lora_bias(bias) -> None:
    layer = make(nn.Conv2d(4, 6, 3, bias=bias), lora_bias=True)
    x = torch.randn(2, 4, 5, 5)
    wanted = expected(layer, x)
    torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    if bias:
        layer.merge()
        torch.testing.assert_close(layer(x).double(), wanted, rtol=1e-4, atol=1e-4)
    else:
        with pytest.raises(RuntimeError, match="because the base layer has no bias"):
            layer.merge()


def test_dropout_acts_on_the_input() -> None:
    layer = make(nn.Conv1d(4, 6, 3), lora_dropout=0.9).train()
    x = torch.ones(2, 4, 50)
    assert not torch.allclose(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))


class CausalConv(nn.Conv1d):
    """A subclass whose own forward pads: the adapter's convolution must be one too."""

    def forward(self, x):
        return super().forward(nn.functional.pad(x, (self.kernel_size[0] - 1, 0)))


def test_subclass() -> None:
    layer = make(CausalConv(4, 6, 3))
    assert type(layer.lora_A["default"]) is CausalConv
    x = torch.randn(2, 4, 9)
    torch.testing.assert_close(layer(x).double(), expected(layer, x), rtol=1e-4, atol=1e-4)


def test_wrong_dimension_and_rank() -> None:
    with pytest.raises(ValueError, match="Conv2d layer kernel must have 4 dimensions, not 3"):
        Conv2d(nn.Conv1d(2, 2, 1), "default", LoraConfig(), r=2)
    with pytest.raises(ValueError, match="`r` should be a positive integer"):
        Conv2d(nn.Conv2d(2, 2, 1), "default", LoraConfig(), r=0)


def test_factors_are_whole_modules() -> None:
    for dim, lora_bias in itertools.product((1, 2, 3), (False, True)):
        base = CONVS[dim][0](4, 6, 3, padding="same", padding_mode="circular", dilation=2)
        layer = make(base, lora_bias=lora_bias)
        a = type(base)(4, 4, 3, padding="same", padding_mode="circular", dilation=2, bias=False)
        b = type(base)(4, 6, 1, bias=lora_bias)
        assert repr(layer.lora_A["default"]) == repr(a)
        assert repr(layer.lora_B["default"]) == repr(b)


def test_low_cpu_mem_usage_makes_no_data() -> None:
    with torch.device("meta"):
        layer = make(nn.Conv2d(4, 6, 3))
    assert layer.lora_A["default"].weight.is_meta
    assert layer.lora_B["default"].weight.is_meta
