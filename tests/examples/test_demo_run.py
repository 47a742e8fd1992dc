"""The demo as a reader starts it, on a tiny random model: every stage, the files, the last line, and the failures."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys

import pytest
import torch
import typer
from errors import DemoError
from rich.console import Console
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

LAST_LINE = r"demo: perplexity (\d+\.\d\d) -> (\d+\.\d\d), merged max \|dlogit\| (\d\.\de[-+]\d\d), \d+ s"


def start(demo_folder, *arguments, **environment):
    return subprocess.run(
        [sys.executable, str(demo_folder / "run.py"), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "COLUMNS": "120", **environment},
        check=False,
    )


@pytest.fixture(scope="module")
def finished(demo_folder, tiny_llama, tmp_path_factory):
    out = tmp_path_factory.mktemp("finished") / "not" / "there"
    empty_home = tmp_path_factory.mktemp("home")
    done = start(demo_folder, "--quick", "--model", tiny_llama, "--out", out, "--threads", 1, HOME=str(empty_home))
    assert done.returncode == 0, done.stderr
    return out, done


def test_help_names_every_option(demo_folder):
    done = start(demo_folder, "--help")
    assert done.returncode == 0
    for option in ("--steps", "--rank", "--learning-rate", "--out", "--threads", "--model", "--quick"):
        assert option in done.stdout


@pytest.mark.slow
def test_the_last_line_has_the_promised_form(finished):
    match = re.fullmatch(LAST_LINE, finished[1].stdout.splitlines()[-1])
    assert match
    before, after, difference = map(float, match.groups())
    assert 200 < before < 400  # a random model over 300 tokens knows nothing
    assert 0 < after < 400
    assert difference <= 1e-3


@pytest.mark.slow
def test_nothing_is_written_to_stderr(finished):
    assert finished[1].stderr == ""


@pytest.mark.slow
def test_every_stage_is_reported(finished):
    text = finished[1].stdout
    for words in ("reference of Python", "parameters are trained", "loss", "without the adapter", "max |dlogit|"):
        assert words in text


@pytest.mark.slow
def test_the_loss_curve_is_a_png(finished):
    assert (finished[0] / "loss_curve.png").read_bytes().startswith(b"\x89PNG\r\n")


@pytest.mark.slow
def test_the_saved_adapter_is_one_that_peft_loads(finished, tiny_llama):
    from peft import PeftModel

    adapter = finished[0] / "adapter"
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["task_type"]) == (8, 16, "CAUSAL_LM")
    tensors = load_file(adapter / "adapter_model.safetensors")
    assert len(tensors) == 2 * 7 * 2  # two factors of the seven linear layers of two blocks
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(adapter))
    assert sum(name.endswith("lora_B.default.weight") for name, _ in model.named_parameters()) == 14


@pytest.fixture
def settings(tiny_llama, tmp_path):
    from training import TrainingPlan
    from walkthrough import Settings

    return Settings(
        plan=TrainingPlan(steps=3, rows_per_step=1, learning_rate=1e-2, warmup_steps=1),
        rank=2,
        alpha=4,
        dropout=0.05,
        row_tokens=16,
        held_out_rows=2,
        new_tokens=2,
        threads=1,
        out=tmp_path,
        model=tiny_llama,
        required_drop=None,
    )


@pytest.fixture
def quiet():
    return Console(file=io.StringIO())


@pytest.fixture
def no_fresh_process(monkeypatch):
    """Reloads in this process: as good for these tests, and seconds faster."""
    import walkthrough
    from evaluation import logits_of

    import pylora

    def reload_here(row, folder, adapter_folder, threads):
        model = pylora.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), str(adapter_folder))
        return logits_of(model, row)

    monkeypatch.setattr(walkthrough, "_logits_in_fresh_process", reload_here)


def test_two_runs_find_the_same(settings, quiet, no_fresh_process):
    from walkthrough import run

    first, second = run(settings, quiet), run(settings, quiet)
    assert (first.before, first.after) == (second.before, second.after)
    assert first.merged_difference == second.merged_difference
    assert set(first.seconds) == {
        "model on disk", "perplexity before", "training", "perplexity after", "samples", "checks"
    }  # fmt: skip


def test_a_reloaded_adapter_with_other_logits_fails_the_demo(settings, quiet, monkeypatch):
    import walkthrough

    monkeypatch.setattr(walkthrough, "_logits_in_fresh_process", lambda row, *_: torch.zeros(len(row), 300))
    with pytest.raises(DemoError, match="reloaded logits: expected max"):
        walkthrough.run(settings, quiet)


def test_a_merge_that_changes_the_logits_fails_the_demo(settings, quiet, no_fresh_process, monkeypatch):
    import walkthrough

    import pylora

    monkeypatch.setattr(pylora.PeftModel, "merge_and_unload", lambda model: model.unload(), raising=False)
    monkeypatch.setattr(walkthrough, "MERGED_TOLERANCE", 0.0)
    with pytest.raises(DemoError, match="merged logits: expected max"):
        walkthrough.run(settings, quiet)


def test_an_adapter_that_does_nothing_fails_the_demo(settings, quiet, monkeypatch):
    import walkthrough

    monkeypatch.setattr(walkthrough, "fine_tune", lambda model, rows, plan, on_step: [1.0] * plan.steps)
    with pytest.raises(DemoError, match="expected the adapter to change them"):
        walkthrough.run(settings, quiet)


def test_too_small_a_fall_of_perplexity_fails_the_demo(settings, quiet, no_fresh_process):
    from dataclasses import replace

    from walkthrough import run

    with pytest.raises(DemoError, match="expected held-out perplexity to fall by at least 99%"):
        run(replace(settings, required_drop=0.99), quiet)


def test_a_fresh_process_that_fails_fails_the_demo(tmp_path, monkeypatch):
    from walkthrough import _logits_in_fresh_process

    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(DemoError, match="fresh process: exit status 1"):
        _logits_in_fresh_process(torch.zeros(2, dtype=torch.int64), tmp_path, tmp_path, 1)


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (DemoError("download: no network"), "demo: error: download: no network"),
        (OSError(28, "No space left on device"), "No space left on device"),
        (ModuleNotFoundError("No module named 'gguf'"), "No module named 'gguf'"),
    ],
)
def test_an_error_is_one_message_and_exit_status_1(monkeypatch, capsys, tmp_path, error, words):
    import run
    import walkthrough

    def fail(settings, console):
        raise error

    monkeypatch.setattr(walkthrough, "run", fail)
    for name in run._ENVIRONMENT:
        monkeypatch.setenv(name, os.environ.get(name, "1"))
    with pytest.raises(typer.Exit) as raised:
        run.main(out=tmp_path)
    assert raised.value.exit_code == 1
    assert words in capsys.readouterr().err
