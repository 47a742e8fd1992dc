"""A call of a wrapped model comes to a call of the base model, unless someone has a say in what happens around it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import pylora
from pylora.model.peft_model import PeftModel
from tests.model.test_cost import calls
from tests.model.tiny_models import llama


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(4, 4)
        self.seen: dict[str, Any] = {}

    def forward(self, x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.seen = kwargs
        return self.q(x)


def config(**kwargs: Any) -> pylora.LoraConfig:
    return pylora.LoraConfig(**{"target_modules": ["q"], "r": 2, "init_lora_weights": False, **kwargs})


def wrapped(cls: type[PeftModel] = PeftModel) -> Any:
    return cls(Net(), config()).eval()


@pytest.mark.parametrize("kwargs", [{}, {"scale": 2}])
def test_few_functions_are_entered(kwargs: dict[str, Any]) -> None:
    model, x = wrapped(), torch.ones(1, 4)
    tuner, base = model.base_model, model.get_base_model()
    of_base = calls(lambda: base(x, **kwargs))
    assert calls(lambda: model(x, **kwargs)) - of_base <= 4  # torch's two, forward, and whether it can be so short
    assert calls(lambda: tuner(x, **kwargs)) - of_base <= 3


def test_few_functions_are_entered_by_a_task() -> None:
    tokens = torch.tensor([[1, 2, 3]])
    model: Any = pylora.get_peft_model(llama(), config(target_modules=["q_proj"], task_type="CAUSAL_LM")).eval()
    base = model.get_base_model()
    given = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    model(**given)
    # Beside the two modules' calls: whether an adapter is an aLoRA, which is looked up in the configurations.
    assert calls(lambda: model(**given)) - calls(lambda: base(**given)) <= 30


@contextmanager
def noting(log: list[str], name: str) -> Iterator[None]:
    log.append(f"enter {name}")
    yield
    log.append(f"leave {name}")


def test_a_subclass_has_its_say() -> None:
    log: list[str] = []

    class Own(PeftModel):
        @contextmanager
        def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
            with noting(log, "hooks"), super()._enable_peft_forward_hooks(*args, **kwargs):
                yield

        def get_base_model(self) -> nn.Module:
            log.append("base")
            return super().get_base_model()

        def _without_adapter_arguments(self, kwargs: Any) -> dict[str, Any]:
            return {key: value for key, value in kwargs.items() if key != "mine"}

    model = wrapped(Own)
    log.clear()
    model(torch.ones(1, 4), mine=1, other=2)
    assert log == ["enter hooks", "base", "leave hooks"]
    assert model.get_base_model().seen == {"other": 2}


@pytest.mark.parametrize("where", ["PeftModel", "its object", "LoraModel", "its object of LoraModel"])
def test_a_replaced_method_has_its_say(where: str, monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []
    model = wrapped()
    owner = {
        "PeftModel": PeftModel,
        "its object": model,
        "LoraModel": pylora.LoraModel,
        "its object of LoraModel": model.base_model,
    }[where]
    monkeypatch.setattr(owner, "_enable_peft_forward_hooks", lambda *args, **kwargs: noting(log, "hooks"))
    model(torch.ones(1, 4))
    assert log == ["enter hooks", "leave hooks"]


def test_another_module_in_the_tuners_place() -> None:
    model, log = wrapped(), []

    class Around(nn.Module):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner = inner

        def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Any:
            return noting(log, "hooks")

        def __getattr__(self, name: str) -> Any:
            try:
                return super().__getattr__(name)
            except AttributeError:
                return getattr(self.inner, name)

    x = torch.ones(1, 4)
    expected = model(x)
    model.base_model = Around(model.base_model)
    assert torch.equal(model(x), expected)
    assert log == ["enter hooks", "leave hooks"]


def test_arguments_for_adapters_stay_out_of_the_base_model() -> None:
    model, x = wrapped(), torch.ones(2, 4)
    model.add_adapter("other", config())
    model(x, adapter_names=["other", "__base__"], alora_offsets=None, kept=1)
    assert model.get_base_model().seen == {"kept": 1}
    model.special_peft_forward_args.add("mine")
    model(x, mine=3, kept=1)
    assert model.get_base_model().seen == {"kept": 1}
    model.special_peft_forward_args.discard("alora_offsets")  # whoever wants them gets them
    model(x, alora_offsets=None)
    assert model.get_base_model().seen == {"alora_offsets": None}


def test_hooks_on_every_module_run() -> None:
    model, log, x = wrapped(), [], torch.ones(1, 4)
    for module in (model, model.get_base_model()):
        module.register_forward_pre_hook(lambda module, args: log.append(type(module).__name__))
    model(x)
    assert log == ["PeftModel", "Net"]
    log.clear()
    model.base_model.register_forward_pre_hook(lambda module, args: log.append(type(module).__name__))
    model.base_model(x)
    assert log == ["LoraModel", "Net"]


def test_it_compiles_as_one_graph() -> None:
    model, x = wrapped(), torch.randn(3, 4)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
