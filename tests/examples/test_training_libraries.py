"""The examples of Trainer, TRL and patch_peft."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest


def load(name: str) -> Any:
    path = Path(__file__).parents[2] / "examples" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
def test_trainer(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr("sys.argv", ["trainer.py", "--steps", "20"])
    load("trainer").main()
    lines = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    before, after = lines[0].split(": ")[1].split(" -> ")
    assert float(after) < float(before)
    assert "adapter_model.safetensors" in lines[1]
    assert "model.safetensors" not in lines[1].replace("adapter_model.safetensors", "")
    assert float(lines[2].split(": ")[1]) == pytest.approx(float(after), abs=2e-3)
    assert lines[3].startswith("loaded: repeats [")


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("options", [[], ["--let-trl-wrap"]])
def test_trl_sft(monkeypatch, capsys, options):
    pytest.importorskip("trl")
    pytest.importorskip("peft")
    import pylora

    monkeypatch.setattr("sys.argv", ["trl_sft.py", "--steps", "12", *options])
    try:
        load("trl_sft").main()
    finally:
        pylora.unpatch_peft()
    loss, saved, written = capsys.readouterr().out.splitlines()[-3:]
    before, after = loss.removeprefix("loss ").split(" -> ")
    assert float(after) < float(before)
    assert "adapter_model.safetensors" in saved
    assert written.startswith("written: the base")


def test_patch_peft(monkeypatch, capsys):
    pytest.importorskip("peft")
    monkeypatch.setattr("sys.argv", ["patch_peft.py", "--tokens", "4", "--layers", "1"])
    load("patch_peft").main()
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert lines[-1].endswith("patched 0.0%")
    assert not lines[-1].split("PEFT ")[1].startswith("0.0%")
