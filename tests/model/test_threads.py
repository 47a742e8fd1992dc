"""Models with adapters in several Python threads: one switches adapters, another runs a model of its own."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn

from pylora import LoraConfig, PeftModel, get_peft_model

ROUNDS = 40


def make_model(seed: int, use_dora: bool = False) -> tuple[PeftModel, dict[str, torch.Tensor], torch.Tensor]:
    """A model with adapters default and other, x, and what the model answers to x with each of them."""
    torch.manual_seed(seed)
    base = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 12))
    config = LoraConfig(r=4, target_modules=["0", "2"], init_lora_weights=False, use_dora=use_dora)
    model = get_peft_model(base, config)
    model.add_adapter("other", config)
    model.eval()
    x = torch.randn(7, 24)
    answers = {}
    for name in ("default", "other"):
        model.set_adapter(name)
        answers[name] = model(x).detach()
    with model.disable_adapter():
        answers["base"] = model(x).detach()
    return model, answers, x


def test_switching_adapters_beside_another_model():
    """Each call sees the adapter that its own thread has set, whatever the other model goes through."""
    switched, answers, x = make_model(0)
    steady, steady_answers, steady_x = make_model(1)
    assert not torch.equal(answers["default"], answers["other"])
    ready = threading.Barrier(2)

    def switch() -> int:
        ready.wait(60)
        for i in range(ROUNDS):
            name = ("default", "other")[i % 2]
            switched.set_adapter(name)
            assert torch.equal(switched(x), answers[name])
            with switched.disable_adapter():
                assert torch.equal(switched(x), answers["base"])
        return ROUNDS

    def run() -> int:
        ready.wait(60)
        for i in range(ROUNDS):
            if i % 2:
                with torch.inference_mode():
                    y = steady(steady_x)
            else:
                y = steady(steady_x)
                y.sum().backward()
            assert torch.equal(y, steady_answers["other"])
        return ROUNDS

    steady.set_adapter("other")
    with ThreadPoolExecutor(2) as pool:
        rounds = [pool.submit(switch), pool.submit(run)]
        assert [r.result(120) for r in rounds] == [ROUNDS, ROUNDS]


@pytest.mark.parametrize("use_dora", [False, True])
def test_one_model_in_several_threads(use_dora):
    """Forwards of one model at once give what each gives alone; DoRA's norms, kept or fresh, differ by rounding."""
    model, _, x = make_model(2, use_dora)
    model.set_adapter("default")
    inputs = [x + i for i in range(8)]
    expected = [model(row).detach() for row in inputs]
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if use_dora else {"rtol": 0.0, "atol": 0.0}
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for y, alone in zip(pool.map(model, inputs), expected, strict=True):
                torch.testing.assert_close(y, alone, **tolerance)
