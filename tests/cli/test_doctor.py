"""`pylora doctor`: its facts, its problems with their fixes, its exit status."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
import types

import pytest
import torch
from typer.testing import CliRunner

from pylora import _native
from pylora._version import __version__
from pylora.cli import diagnosis
from pylora.cli.app import build_app
from pylora.errors import PyloraBuildError


def doctor(*arguments: str):
    return CliRunner().invoke(build_app(), ["doctor", *arguments])


def findings() -> dict:
    return json.loads(doctor("--json").stdout)


@pytest.fixture
def broken(monkeypatch):
    """The extension cannot be loaded."""

    def load():
        raise PyloraBuildError("pylora: the native extension is not built. Build it with: make it so")

    monkeypatch.setattr(_native, "load", load)
    monkeypatch.delitem(sys.modules, "pylora._C", raising=False)


def test_sound_installation():
    result = doctor()
    assert result.exit_code == 0, result.output
    for text in (__version__, torch.__version__, _native.load().cpu_isa(), "All is well"):
        assert text in result.output


def test_json_has_the_same_facts():
    found = findings()
    info = _native.load().build_info()
    assert found["pylora"]["version"] == __version__
    assert found["torch"] == {"version": torch.__version__, "cuda": torch.version.cuda}
    assert found["extension"]["usable"] is True
    assert found["extension"]["torch"] == info["torch"]
    assert ",".join(found["extension"]["isas_built"]) == info["isas_built"]
    assert found["cpu"]["in_use"] in found["cpu"]["supported"]
    assert found["packages"]["transformers"] == importlib.metadata.version("transformers")
    assert found["problems"] == []


@pytest.mark.usefixtures("broken")
def test_broken_build_is_a_problem_not_a_traceback():
    result = doctor()
    assert result.exit_code == 1
    assert "make it so" in result.output
    assert "All is well" not in result.output
    assert "Traceback" not in result.output
    assert findings()["extension"] == {"usable": False}


def test_extension_that_loads_but_does_not_fit_still_shows_its_facts(monkeypatch):
    module = _native.load()

    def load():
        raise PyloraBuildError("pylora: built against another torch")

    monkeypatch.setattr(_native, "load", load)
    found = findings()
    assert found["extension"]["usable"] is False
    assert found["extension"]["torch"] == module.build_info()["torch"]
    assert found["problems"] == ["pylora: built against another torch"]


def test_missing_packages(monkeypatch):
    real = importlib.metadata.version

    def version(name):
        if name in ("safetensors", "peft"):
            raise importlib.metadata.PackageNotFoundError(name)
        return real(name)

    monkeypatch.setattr(importlib.metadata, "version", version)
    result = doctor()
    assert result.exit_code == 1
    assert "pip install safetensors" in result.output
    assert "pip install peft" not in result.output  # optional: its absence is a fact, not a problem


def fake_gpu(monkeypatch, capability):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "Testcard")


def build_for_cuda(monkeypatch, archs):
    """Let the loaded extension say that it has CUDA kernels for `archs`."""
    module = _native.load()
    stand_in = types.SimpleNamespace(
        build_info=lambda: {**module.build_info(), "cuda_archs": archs},
        cpu_isas_supported=module.cpu_isas_supported,
        cpu_isa=module.cpu_isa,
        __file__=module.__file__,
    )
    monkeypatch.setattr(_native, "load", lambda: stand_in)


def test_gpu_without_kernels_is_a_note(monkeypatch):
    build_for_cuda(monkeypatch, "")
    fake_gpu(monkeypatch, (9, 0))
    found = findings()
    assert found["gpus"] == [{"name": "Testcard", "arch": "90"}]
    assert found["problems"] == []
    assert any("without CUDA kernels" in note and "PYLORA_CUDA=1 pip install" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("built", "capability", "reached"),
    [
        (["80", "90"], (8, 0), True),
        (["80", "90"], (8, 9), True),  # binary code of an older minor version
        (["80", "90"], (9, 0), True),
        (["80", "90"], (12, 0), True),  # PTX of the last
        (["80", "90"], (7, 5), False),
        (["90a"], (9, 0), True),
        (["90a"], (10, 0), True),  # PTX of plain 90
        (["86"], (8, 0), False),
        (["100a"], (10, 3), True),
    ],
)
def test_architectures_that_a_build_reaches(built, capability, reached):
    assert diagnosis._reaches(built, *capability) is reached


def test_gpu_too_old_for_the_kernels(monkeypatch):
    build_for_cuda(monkeypatch, "80;90")
    fake_gpu(monkeypatch, (7, 5))
    result = doctor()
    assert result.exit_code == 1
    assert "PYLORA_CUDA_ARCHS=75 pip install" in result.output


def run_doctor(**environment):
    command = [sys.executable, "-m", "pylora", "doctor", "--json"]
    result = subprocess.run(command, env={**os.environ, **environment}, capture_output=True, text=True, check=False)
    return result.returncode, json.loads(result.stdout)


def test_cap_is_a_note():
    status, found = run_doctor(PYLORA_CPU_ISA="scalar")
    assert status == 0
    assert found["cpu"]["in_use"] == "scalar"
    assert found["cpu"]["cap"] == "scalar"
    assert len(found["notes"]) == (0 if found["cpu"]["supported"][-1] == "scalar" else 1)


def test_unknown_cap_is_a_problem():
    status, found = run_doctor(PYLORA_CPU_ISA="mmx")
    assert status == 1
    (problem,) = found["problems"]
    assert "PYLORA_CPU_ISA" in problem
    assert "scalar" in problem
