"""Merging and unloading whole models."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn

from pylora.config import LoraConfig
from pylora.layers import LoraLayer
from pylora.model.aux_wrapper import AuxiliaryTrainingWrapper
from pylora.model.lora_model import LoraModel


def config(**settings: Any) -> LoraConfig:
    return LoraConfig(**{"target_modules": ["lin0", "lin1"], "init_lora_weights": False, **settings})


def wrap(model: nn.Module, adapters: int = 1, **settings: Any) -> LoraModel:
    wrapped = LoraModel(model, config(**settings), "default")
    for i in range(1, adapters):
        wrapped.peft_config[f"a{i}"] = config(**settings)
        wrapped.inject_adapter(wrapped.model, f"a{i}")
    wrapped.set_adapter(list(wrapped.peft_config))
    return wrapped.eval()


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone().view(torch.uint8) for name, value in model.state_dict().items()}


def assert_same_bits(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    assert [name for name in expected if not torch.equal(actual[name], expected[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_failed_safe_merge_changes_no_layer(make_mlp, dtype) -> None:
    """The broken adapter is on the last layer: the ones before it must not have been merged."""
    model = wrap(make_mlp(dtype), adapters=2, target_modules=["lin0", "lin1", "head"])
    model.model.head.lora_B["a1"].weight.data[0, 0] = float("nan")
    before = bits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(
            ValueError, match=r"NaNs detected in the merged weights\. The adapter a1 seems to be broken"
        ):
            call(safe_merge=True)
        assert_same_bits(bits(model), before)
        assert not any(m.merged for m in model.modules() if isinstance(m, LoraLayer))


def test_a_merge_that_one_layer_cannot_do_changes_none(make_mlp) -> None:
    with pytest.warns(UserWarning, match="has no bias"):
        model = wrap(make_mlp(), lora_bias=True)
    before = bits(model)
    for call in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(RuntimeError, match="Impossible to merge LoRA with `lora_bias=True`"):
            call()
        assert_same_bits(bits(model), before)
        assert not model.model.lin0.merged


def test_names_must_be_a_list(make_mlp) -> None:
    model = wrap(make_mlp())
    before = bits(model)
    with pytest.raises(TypeError, match="adapter_names should be a list of strings"):
        model.merge_adapter("default")
    with pytest.raises(TypeError):
        model.merge_and_unload(adapter_names="default")
    assert_same_bits(bits(model), before)


def test_chosen_adapters_are_merged_and_the_rest_dropped(make_mlp, logits) -> None:
    model = wrap(make_mlp(), adapters=3)
    model.set_adapter(["a1", "a2"])
    expected = logits(model, "mlp")
    model.set_adapter("default")
    merged = model.merge_and_unload(adapter_names=["a1", "a2"])
    torch.testing.assert_close(logits(merged, "mlp"), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, LoraLayer) for module in merged.modules())


def test_merge_and_unload_of_a_merged_model(make_mlp, logits) -> None:
    model = wrap(make_mlp())
    expected = logits(model, "mlp")
    model.merge_adapter()
    with pytest.warns(UserWarning, match="All adapters are already merged, nothing to do"):
        merged = model.merge_and_unload()
    torch.testing.assert_close(logits(merged, "mlp"), expected, rtol=1e-4, atol=1e-5)


def test_unload_gives_the_base_back(make_mlp, logits) -> None:
    base = make_mlp()
    expected, before = logits(base, "mlp"), bits(base)
    unloaded = wrap(base).unload()
    assert unloaded is base
    assert_same_bits(bits(unloaded), before)
    assert torch.equal(logits(unloaded, "mlp"), expected)
    assert not hasattr(base, "peft_config")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        LoraModel(base, config(), "again")


def test_modules_to_save_replace_the_original(make_mlp, logits) -> None:
    model = wrap(make_mlp(), modules_to_save=["head"])
    nn.init.normal_(model.model.head.modules_to_save["default"].weight)
    expected, trained = logits(model, "mlp"), model.model.head.modules_to_save["default"]
    merged = model.merge_and_unload()
    assert merged.head is trained
    torch.testing.assert_close(logits(merged, "mlp"), expected, rtol=1e-4, atol=1e-5)
    assert not any(isinstance(module, AuxiliaryTrainingWrapper) for module in merged.modules())


def test_an_inactive_copy_is_dropped(make_mlp) -> None:
    base = make_mlp()
    head = base.head
    model = wrap(base, modules_to_save=["head"])
    model.peft_config["plain"] = config()
    model.inject_adapter(model.model, "plain")
    model.set_adapter("plain")
    assert model.unload().head is head


def test_progress_bar(make_mlp, capsys) -> None:
    wrap(make_mlp()).merge_and_unload(progressbar=True)
    assert "Unloading and merging model" in capsys.readouterr().err
    wrap(make_mlp()).merge_and_unload()
    assert capsys.readouterr().err == ""


def test_cycles_in_narrow_types_stay_near(make_mlp, logits) -> None:
    model = wrap(make_mlp(torch.bfloat16), adapters=2)
    expected = logits(model, "mlp")
    for _ in range(5):
        model.merge_adapter()
        model.unmerge_adapter()
    torch.testing.assert_close(logits(model, "mlp"), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("call", ["merge_adapter", "merge_and_unload"])
def test_tied_embeddings_are_warned_about(make_transformer, call) -> None:
    base = make_transformer("gpt2")
    with pytest.warns(UserWarning, match="tied"):
        model = LoraModel(base, LoraConfig(target_modules=["lm_head"], init_lora_weights=False), "default")
    message = r"Model with `tie_word_embeddings=True` and the tied_target_modules=\['lm_head'\] are part of the adapter"
    with pytest.warns(UserWarning, match=message):
        getattr(model, call)()


def test_a_tie_that_a_trained_head_breaks_is_recorded(make_transformer) -> None:
    base = make_transformer("gpt2")
    settings = LoraConfig(target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["lm_head"])
    with pytest.warns(UserWarning, match="tied layer is part of the adapter"):
        model = LoraModel(base, settings, "default")
    with pytest.warns(UserWarning, match="Input and output embeddings are no longer tied after merging"):
        merged = model.merge_and_unload()
    assert merged.config.tie_word_embeddings is False


def test_gptq_is_refused(make_mlp) -> None:
    model = wrap(make_mlp())
    model.model.quantization_method = "gptq"
    with pytest.raises(ValueError, match="Cannot merge LORA layers when the model is gptq quantized"):
        model.merge_adapter()
    assert isinstance(model.unload(), nn.Module)


def test_disabling_a_merged_model_gives_the_base(make_mlp, logits) -> None:
    base = make_mlp()
    expected = logits(copy.deepcopy(base), "mlp")
    model = wrap(base)
    model.merge_adapter()
    model.disable_adapter_layers()
    torch.testing.assert_close(logits(model, "mlp"), expected, rtol=1e-5, atol=1e-6)
    assert not model.model.lin0.merged


def test_a_merged_adapter_cannot_be_deleted(make_mlp) -> None:
    model = wrap(make_mlp(), adapters=2)
    model.merge_adapter(["a1"])
    before = bits(model)
    with pytest.raises(ValueError, match=r"Cannot delete adapter\(s\) \['a1'\] while they are merged"):
        model.delete_adapter("a1")
    assert_same_bits(bits(model), before)
    assert "a1" in model.peft_config
    with pytest.raises(ValueError, match="Adapter ghost does not exist"):
        model.delete_adapter("ghost")
