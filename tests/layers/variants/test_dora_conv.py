"""DoRA on convolutions where PEFT has none: padding modes with dropout, inputs without a batch, 16-bit base weights."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import pylora
from pylora.layers import Conv2d


def make(base, **config):
    torch.manual_seed(1)
    fields = {"use_dora": True, "init_lora_weights": False, **config}
    layer = Conv2d(base, "default", config=pylora.LoraConfig(**fields), r=2, lora_alpha=3)
    with torch.no_grad():
        layer.lora_magnitude_vector["default"].weight.mul_(1.5)
    return layer


def expected(layer, x):
    """From the whole kernel: magnitude / norm · (W + delta), and the bias as it is."""
    base = layer.base_layer
    kernel = base.weight.double() + layer.get_delta_weight("default").double()
    factor = layer.lora_magnitude_vector["default"].weight.double().flatten() / kernel.flatten(1).norm(dim=1)
    x = x.double()
    padding = base.padding
    if base.padding_mode != "zeros":
        x, padding = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode), 0
    return F.conv2d(
        x, kernel * factor.view(-1, 1, 1, 1), base.bias.double(), base.stride, padding, base.dilation, base.groups
    )


@pytest.mark.parametrize("padding_mode", ["zeros", "circular", "reflect"])
@pytest.mark.parametrize("training", [True, False])
def test_padding_modes_and_dropout(padding_mode, training):
    base = nn.Conv2d(3, 4, 3, padding=(2, 1), dilation=(1, 2), stride=2, padding_mode=padding_mode)
    layer = make(base, lora_dropout=0.5).train(training)
    # With this probability nothing is dropped and the code is that for dropout.
    layer.lora_dropout["default"].p = 0.0
    x = torch.randn(2, 3, 9, 8)
    value = expected(layer, x).float()
    assert_close(layer(x), value, atol=1e-5, rtol=1e-5)
    layer.merge()
    assert_close(layer(x), value, atol=1e-5, rtol=1e-5)


def test_without_a_batch():
    layer = make(nn.Conv2d(3, 4, 3))
    x = torch.randn(3, 6, 5)
    assert layer(x).shape == (4, 4, 3)
    assert_close(layer(x), layer(x.unsqueeze(0))[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_base_weight_with_dropout(dtype):
    layer = make(nn.Conv2d(3, 4, 3).to(dtype), lora_dropout=0.5).train()
    for container in (layer.lora_A, layer.lora_B, layer.lora_magnitude_vector):
        container.float()
    layer.lora_dropout["default"].p = 0.0
    x = torch.randn(2, 3, 6, 5).to(dtype)
    assert layer(x).dtype == dtype
    assert_close(layer(x), expected(layer, x).to(dtype), atol=3e-2, rtol=3e-2)
