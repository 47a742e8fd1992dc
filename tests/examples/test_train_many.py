"""The example that trains several adapters in one loop."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "train_many.py"
    spec = importlib.util.spec_from_file_location("train_many", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_losses_are_those_of_separate_runs(example) -> None:
    together = example.train(list(example.RANKS), steps=20)
    for task in example.RANKS:
        alone = example.train([task], steps=20)[task]
        assert together[task] == pytest.approx(alone, rel=1e-3)
        assert alone[-1] < alone[0]


def test_script_prints_a_line_for_each_adapter(example, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["train_many.py", "--steps", "3"])
    example.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(example.RANKS)
