"""`adapter_names`: rows of one batch with different adapters, through a whole model."""

from __future__ import annotations

import pytest
import torch

from pylora.config import LoraConfig
from pylora.model.lora_model import LoraModel


@pytest.fixture
def model(make_transformer) -> LoraModel:
    """A tiny Llama with adapters "default" (all linear layers, trained head) and "other" (q_proj)."""

    def config(**settings) -> LoraConfig:
        return LoraConfig(init_lora_weights=False, **settings)

    wrapped = LoraModel(
        make_transformer("llama"), config(target_modules="all-linear", modules_to_save=["lm_head"]), "default"
    )
    wrapped.peft_config["other"] = config(target_modules=["q_proj"])
    wrapped.inject_adapter(wrapped.model, "other")
    torch.nn.init.normal_(wrapped.model.lm_head.modules_to_save["default"].weight)
    return wrapped.eval()


def run(model: LoraModel, ids: torch.Tensor, **kwargs) -> torch.Tensor:
    with model._enable_peft_forward_hooks(**kwargs):
        return model(input_ids=ids).logits


def test_each_row_is_what_its_adapter_gives(model) -> None:
    ids = torch.arange(12).view(3, 4)
    y = run(model, ids, adapter_names=["default", "__base__", "default"])
    expected = model(input_ids=ids).logits
    torch.testing.assert_close(y[[0, 2]], expected[[0, 2]], rtol=1e-4, atol=1e-4)
    model.disable_adapter_layers()
    torch.testing.assert_close(y[1], model(input_ids=ids).logits[1], rtol=1e-4, atol=1e-4)


def test_hooks_are_gone_afterwards(model) -> None:
    ids = torch.arange(4)[None]
    before = model(input_ids=ids).logits
    hooks = [list(module._forward_pre_hooks) for module in model.modules()]
    run(model, ids, adapter_names=["__base__"])
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        run(model, ids, adapter_names=["__base__"] * 2)
    assert [list(module._forward_pre_hooks) for module in model.modules()] == hooks
    assert torch.equal(model(input_ids=ids).logits, before)


def test_no_names_is_no_change(model) -> None:
    ids = torch.arange(4)[None]
    assert torch.equal(run(model, ids), model(input_ids=ids).logits)


def test_refusals(model) -> None:
    ids = torch.arange(4)[None]
    with pytest.raises(ValueError, match=r"Trying to infer with non-existing adapter\(s\): bar, foo"):
        run(model, ids, adapter_names=["foo", "bar", "default", "__base__"])
    model.train()
    with pytest.raises(ValueError, match="Cannot pass `adapter_names` when the model is in training mode"):
        run(model, ids, adapter_names=["default"])
    model.eval()
    model.merge_adapter()
    with pytest.raises(ValueError, match="when there are merged adapters"):
        run(model, ids, adapter_names=["default"])


def test_beam_search_repeats_names(make_transformer) -> None:
    """In an encoder-decoder model the encoder sees each row once, the decoder once per beam."""
    model = LoraModel(
        make_transformer("t5"), LoraConfig(target_modules=["q", "v"], init_lora_weights=False), "default"
    ).eval()
    ids = torch.arange(3, 13).view(2, 5)
    options = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    expected = model.generate(input_ids=ids, **options)
    with model._enable_peft_forward_hooks(adapter_names=["default", "default"], **options):
        actual = model.generate(input_ids=ids, **options)
    assert torch.equal(actual, expected)
