"""The demo's training and measuring: the schedule, the use of the rows, perplexity, and the check of logits."""

from __future__ import annotations

import math

import pytest
import torch
from errors import DemoError
from evaluation import logits_of, perplexity, require_agreement
from machine import default_threads, peak_memory_gib, usable_cpus
from packing import pack
from report import smoothed
from training import TrainingPlan, fine_tune
from transformers import AutoModelForCausalLM, AutoTokenizer

PLAN = TrainingPlan(steps=20, rows_per_step=1, learning_rate=1e-2, warmup_steps=4)


@pytest.fixture
def model(tiny_llama):
    return AutoModelForCausalLM.from_pretrained(tiny_llama)


@pytest.fixture
def rows():
    return torch.randint(1, 300, (6, 16), generator=torch.Generator().manual_seed(1))


def test_the_rate_rises_to_its_peak_and_falls_towards_zero():
    factors = [PLAN.rate_factor(step) for step in range(PLAN.steps)]
    assert factors[:4] == pytest.approx([0.2, 0.4, 0.6, 0.8])
    assert factors[4] == 1.0
    assert factors[4:] == sorted(factors[4:], reverse=True)
    assert 0 < factors[-1] < 0.02
    assert TrainingPlan(1, 1, 1e-3, 0).rate_factor(0) == 1.0


def test_training_lowers_the_loss_and_repeats_exactly(tiny_llama, rows):
    runs = []
    for _ in range(2):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
        told = []
        losses = fine_tune(model, rows, PLAN, lambda step, loss, told=told: told.append((step, loss)))
        assert told == list(enumerate(losses))
        assert not model.training
        runs.append(losses)
    assert runs[0] == runs[1]
    assert runs[0][-1] < runs[0][0]


def test_frozen_parameters_stay_and_each_row_is_used_once_before_any_is_used_again(model, rows):
    model.requires_grad_(False)
    model.model.norm.weight.requires_grad_(True)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    seen = []
    model.register_forward_pre_hook(lambda module, args, kwargs: seen.append(kwargs["input_ids"]), with_kwargs=True)
    fine_tune(model, rows, TrainingPlan(6, 2, 1e-2, 0), lambda step, loss: None)
    for epoch in (torch.cat(seen[:3]), torch.cat(seen[3:])):
        assert sorted(epoch.tolist()) == sorted(rows.tolist())
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"model.norm.weight"}


def test_perplexity_is_exp_of_the_mean_loss_of_all_predicted_tokens(model, rows):
    counted = []
    value = perplexity(model, rows, lambda: counted.append(1))
    scores = torch.stack([logits_of(model, row) for row in rows])[:, :-1]
    expected = torch.nn.functional.cross_entropy(scores.reshape(-1, 300), rows[:, 1:].reshape(-1))
    assert value == pytest.approx(math.exp(expected.item()), rel=1e-5)
    assert len(counted) == len(rows)


def test_equal_logits_agree_and_the_difference_is_returned():
    logits = torch.tensor([[1.0, 2.0]])
    assert require_agreement("merged", logits, logits, 1e-3) == 0.0
    assert require_agreement("merged", logits + 0.5, logits, 0.5) == 0.5


@pytest.mark.parametrize("wrong", [0.01, -0.01, math.nan, math.inf])
def test_logits_that_differ_fail_loudly(wrong):
    logits = torch.zeros(3, 4)
    different = logits.clone()
    different[1, 2] = wrong
    with pytest.raises(DemoError, match="merged logits: expected max"):
        require_agreement("merged", different, logits, 1e-3)


def test_packing_keeps_the_order_and_drops_the_rest(tiny_llama):
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    rows = pack(tokenizer, ["the statement", "is executed"], 4)
    stream = tokenizer("the statement\n\n\nis executed\n\n\n")["input_ids"]
    assert rows.dtype == torch.int64
    assert rows.flatten().tolist() == stream[: len(stream) // 4 * 4]
    with pytest.raises(DemoError, match="expected at least 1000 tokens"):
        pack(tokenizer, ["the statement"], 1000)


def test_smoothing_is_the_mean_of_the_last_values():
    assert smoothed([4.0, 2.0, 0.0, 4.0], width=2) == [4.0, 3.0, 1.0, 2.0]


def test_threads_follow_omp_num_threads_and_the_container(monkeypatch, tmp_path):
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert default_threads() == 3
    for useless in ("", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", useless)
        assert default_threads() == usable_cpus()
    all_cpus = usable_cpus(tmp_path / "missing")
    assert all_cpus >= 1
    quota = tmp_path / "cpu.max"
    for text, expected in (
        ("max 100000", all_cpus),
        ("50000 100000", 1),
        ("100000 100000", 1),
        ("9900000 100000", all_cpus),
    ):
        quota.write_text(text)
        assert usable_cpus(quota) == expected


def test_peak_memory_is_in_gib():
    assert 0.05 < peak_memory_gib() < 64
