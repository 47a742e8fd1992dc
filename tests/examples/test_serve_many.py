"""The example that serves many adapters."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "serve_many.py"
    spec = importlib.util.spec_from_file_location("serve_many", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_script_serves_and_reports(example, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["serve_many.py", "--adapters", "20", "--slots", "16", "--requests", "32"])
    example.main()
    out = capsys.readouterr().out
    streamed = re.findall(r"^  (adapter-0|base): (\w+)$", out, re.MULTILINE)
    assert len(streamed) == 10
    assert [name for name, token in streamed if token == "end"] == ["adapter-0", "base"]
    assert "  unknown adapter 'adapter-x': 20 are registered\n  [" in out
    hits, misses = map(int, re.search(r"(\d+) hits, (\d+) misses", out).groups())
    assert hits + misses == 28 + 2  # of 32 requests 4 are for the base; two adapters were asked for before
    assert re.search(r"\d+ tokens/s, \d\.\d\d of the base model's \d+", out)
