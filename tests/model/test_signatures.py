"""Signatures of wrappers, and telling adapters from models."""

import inspect

import pytest
import torch
from torch import nn

import pylora
from pylora.helpers import check_if_peft_model, update_forward_signature, update_generate_signature, update_signature


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.lin = nn.Linear(3, 3)

    def forward(self, x: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
        """The base's forward."""
        return self.lin(x) * scale

    def generate(self, x: torch.Tensor, length: int = 2) -> list[int]:
        """The base's generate."""
        return [length]


@pytest.fixture
def model():
    return pylora.get_peft_model(Base(), pylora.LoraConfig(target_modules=["lin"]))


def test_forward_is_described_as_the_base_s_and_still_works(model):
    x = torch.randn(2, 3)
    before = model(x, scale=2.0)
    update_forward_signature(model)
    assert list(inspect.signature(model.forward).parameters) == ["x", "scale"]
    assert model.forward.__doc__ == "The base's forward."
    torch.testing.assert_close(model(x, scale=2.0), before)
    assert list(inspect.signature(type(model).forward).parameters) == ["self", "args", "kwargs"]


def test_generate_is_described_as_the_base_s(model):
    update_generate_signature(model)
    assert list(inspect.signature(model.generate).parameters) == ["x", "length"]
    assert model.generate(torch.zeros(1), length=5) == [5]


@pytest.mark.parametrize(("method", "changed"), [("forward", {"forward"}), ("generate", {"generate"})])
def test_update_signature_of_one(model, method, changed):
    update_signature(model, method)
    own = {name for name in ("forward", "generate") if "args" not in inspect.signature(getattr(model, name)).parameters}
    assert own == changed


def test_update_signature_of_all(model):
    update_signature(model)
    assert model.forward.__doc__ == "The base's forward."
    assert model.generate.__doc__ == "The base's generate."
    with pytest.raises(ValueError, match="method train is not supported"):
        update_signature(model, "train")


def test_explicit_signatures_stay(make_transformer):
    model = pylora.get_peft_model(make_transformer("llama"), pylora.LoraConfig(task_type="CAUSAL_LM"))
    before = inspect.signature(model.forward)
    update_signature(model)
    assert inspect.signature(model.forward) == before
    assert "input_ids" in before.parameters


def test_adapters_are_told_from_models(model, tmp_path):
    model.save_pretrained(tmp_path / "adapter")
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    assert check_if_peft_model(tmp_path / "adapter")
    assert not check_if_peft_model(tmp_path / "model")
    assert not check_if_peft_model(str(tmp_path / "nothing"))
