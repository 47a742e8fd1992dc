"""What each command that writes files leaves behind when the disk is full, when it is killed, and after bad input."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

import pylora
from tests.offline.conftest import llama

COMMANDS = ("merge", "combine", "extract", "to a folder", "to a file", "to a pickle")


@pytest.fixture
def inputs(make, tmp_path) -> Path:
    """A base, a tuned model, an adapter in PEFT's layout and one in loralib's, each larger than 64 KB."""
    settings = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 3}
    made = make(llama(**settings), pylora.LoraConfig(r=16, target_modules="all-linear"), shard="300KB")
    tuned = llama(**settings)
    tuned.load_state_dict(made.merged)
    tuned.save_pretrained(tmp_path / "tuned")
    names = load_file(made.adapter / "adapter_model.safetensors")
    loralib = {key.removeprefix("base_model.model.").removesuffix(".weight"): tensor for key, tensor in names.items()}
    save_file(loralib, tmp_path / "loralib.safetensors")
    return tmp_path


def command(name: str, inputs: Path, out: Path) -> list[str]:
    base, tuned, adapter, loralib = (inputs / each for each in ("base", "tuned", "adapter", "loralib.safetensors"))
    arguments: dict[str, list[Any]] = {
        "merge": ["merge", base, adapter, out],
        "combine": ["combine", adapter, f"{adapter}=0.5", "--out", out],
        "extract": ["extract", tuned, base, out],
        "to a folder": ["convert", loralib, out, "--alpha", 16],
        "to a file": ["convert", adapter, out.with_suffix(".safetensors"), "--to", "loralib"],
        "to a pickle": ["convert", adapter, out.with_suffix(".pt"), "--to", "loralib"],
    }
    return [str(each) for each in arguments[name]]


def written(name: str, out: Path) -> Path:
    return out.with_suffix({"to a file": ".safetensors", "to a pickle": ".pt"}.get(name, ""))


def digest(path: Path) -> dict[str, str]:
    files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
    return {str(each.relative_to(path)): hashlib.sha256(each.read_bytes()).hexdigest() for each in files}


def contents(inputs: Path) -> dict[str, dict[str, str]]:
    return {each: digest(inputs / each) for each in ("base", "tuned", "adapter", "loralib.safetensors")}


@pytest.mark.parametrize("name", COMMANDS)
def test_full_disk(inputs, tmp_path, name):
    """The system refuses to let a file grow beyond 16 KiB, as a full disk would."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))

    before, there = contents(inputs), sorted(tmp_path.iterdir())
    result = subprocess.run(
        [sys.executable, "-m", "pylora", *command(name, inputs, tmp_path / "new" / "out")],
        capture_output=True,
        text=True,
        preexec_fn=limit,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        check=False,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith(f"pylora {command(name, inputs, tmp_path)[0]}: ")
    assert "File too large" in result.stderr
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.iterdir()) == there
    assert contents(inputs) == before


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.parametrize("broken", ["missing", "empty", "truncated", "a folder"])
def test_unreadable_inputs(inputs, cli, tmp_path, name, broken):
    source = {"merge": "base", "extract": "tuned", "to a folder": "loralib.safetensors"}.get(name, "adapter")
    path = inputs / source
    if path.is_dir():
        path = next(path.glob("*.safetensors"))
    content = path.read_bytes()
    path.unlink()
    if broken == "a folder":
        path.mkdir()
    elif broken != "missing":
        path.write_bytes(b"" if broken == "empty" else content[:-7])
    result = cli(*command(name, inputs, tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert str(inputs / source) in result.output
    assert not written(name, tmp_path / "out").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_output_that_cannot_be_made(inputs, cli, name):
    """A file stands where a folder would have to be."""
    before = contents(inputs)
    result = cli(*command(name, inputs, inputs / "loralib.safetensors" / "out"))
    assert result.exit_code == 2, result.output
    assert "loralib.safetensors" in result.output
    assert contents(inputs) == before


# Forks of a process that has imported everything: the moments are those of the work. A line of its input has the
# seconds until the signal, its number (0 is none) and the arguments. Prints how each child ended.
_KILLER = """
import json, os, signal, sys, time
from typer.testing import CliRunner
from pylora.cli.app import build_app
import torch, transformers, pylora.combine, pylora.init, pylora.model, safetensors.torch, tqdm, rich.table
from pylora.offline import adapter, base, check, combine, convert, extract, merge
transformers.LlamaForCausalLM, transformers.AutoConfig
app = build_app()
for line in sys.stdin:
    delay, number, arguments = json.loads(line)
    child = os.fork()
    if child == 0:
        app(arguments)
    time.sleep(delay)
    os.kill(child, number)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_killed_at_random_moments(inputs, tmp_path, name):
    """SIGKILL, SIGTERM or SIGINT at any time: the output is whole or absent."""
    before = contents(inputs)
    rng, numbers = random.Random(5), [signal.SIGKILL, signal.SIGTERM, signal.SIGINT]
    moments = [0.0, 0.0, 0.0, *(rng.uniform(0.0, 0.35) for _ in range(12))]
    plan = [(0.0, 0, tmp_path / "probe")]
    plan += [(delay, int(numbers[i % 3]), tmp_path / f"out{i}") for i, delay in enumerate(moments)]
    lines = [json.dumps([delay, number, command(name, inputs, out)]) for delay, number, out in plan]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # a fork has none of the threads of the process that it was
    result = subprocess.run(
        [sys.executable, "-c", _KILLER], input="\n".join(lines), capture_output=True, text=True, env=environment
    )
    assert result.returncode == 0, result.stderr
    found = [(number, written(name, out)) for _, number, out in plan]
    whole = digest(found[0][1])
    assert whole
    absent = [(number, out) for number, out in found if not out.exists()]
    for _, out in found:
        assert not out.exists() or digest(out) == whole
    for number, out in absent:
        assert number != signal.SIGINT or list(tmp_path.glob(f".{out.name}*")) == []
    assert len(absent) >= 3
    assert contents(inputs) == before
