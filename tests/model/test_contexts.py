"""rescale_adapter_scale and disable_input_dtype_casting."""

from __future__ import annotations

from typing import Any

import peft.helpers
import pytest
import torch
from torch import nn

import pylora
from pylora.model.contexts import disable_input_dtype_casting, rescale_adapter_scale
from pylora.model.hotswap import prepare_model_for_compiled_hotswap


def wrapped(dtype: torch.dtype = torch.float32) -> Any:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)).to(dtype)
    config = pylora.LoraConfig(target_modules=["0", "2"], init_lora_weights=False, lora_alpha=4)
    return pylora.get_peft_model(net, config, autocast_adapter_dtype=False)


@pytest.mark.parametrize("as_tensor", [False, True])
@pytest.mark.parametrize("multiplier", [0, 0.5, 3])
def test_rescale(multiplier: float, as_tensor: bool) -> None:
    model, x = wrapped(), torch.randn(3, 6)
    if as_tensor:
        prepare_model_for_compiled_hotswap(model)
    before = model(x)
    with rescale_adapter_scale(model, multiplier):
        inside = model(x)
        assert float(model.base_model.model[0].scaling["default"]) == 0.5 * multiplier
    assert torch.equal(model(x), before)
    if multiplier == 0:
        with model.disable_adapter():
            torch.testing.assert_close(inside, model(x))
    else:
        assert not torch.allclose(inside, before)


def test_rescale_ends_with_the_context_and_refuses() -> None:
    model = wrapped()
    for helper in (rescale_adapter_scale, peft.helpers.rescale_adapter_scale):
        with pytest.raises(TypeError, match="multiplier should be of type float"), helper(model, "a"):  # type: ignore[arg-type]
            pass
        with pytest.raises(ValueError, match="scaling is only supported for models with"), helper(nn.Linear(2, 2), 2):
            pass
    with pytest.raises(RuntimeError), rescale_adapter_scale(model, 2):
        raise RuntimeError
    assert model.base_model.model[0].scaling == {"default": 0.5}


def test_input_dtype_casting() -> None:
    model = wrapped(torch.float32)
    layer = model.base_model.model[0]
    layer.lora_A["default"].to(torch.bfloat16)
    layer.lora_B["default"].to(torch.bfloat16)
    x = torch.randn(3, 6)
    expected = model(x)
    layer.cast_input_dtype_enabled = False
    other = model.base_model.model[2]
    with disable_input_dtype_casting(model, active=False):
        assert other.cast_input_dtype_enabled
    with disable_input_dtype_casting(model):
        assert not other.cast_input_dtype_enabled
        with pytest.raises(RuntimeError):
            model(x)
    assert other.cast_input_dtype_enabled
    assert not layer.cast_input_dtype_enabled
    layer.cast_input_dtype_enabled = True
    assert torch.equal(model(x), expected)
