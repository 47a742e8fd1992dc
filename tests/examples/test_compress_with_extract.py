"""The example that extracts adapters from a fine-tuned model."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest


@pytest.fixture(scope="module")
def example():
    path = Path(__file__).parents[2] / "examples" / "compress_with_extract.py"
    spec = importlib.util.spec_from_file_location("compress_with_extract", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_more_rank_is_nearer_to_the_fine_tuned_model(example, tmp_path) -> None:
    base, small, large, whole, tuned = example.compare(tmp_path, (1, 8, 64), steps=40)
    assert tuned.loss < 0.7 * base.loss
    assert abs(whole.loss - tuned.loss) < 1e-3
    assert abs(large.loss - tuned.loss) < abs(small.loss - tuned.loss) < abs(base.loss - tuned.loss)
    assert small.size < large.size < tuned.size


def test_script_prints_a_line_for_each_model(example, monkeypatch, capsys) -> None:
    monkeypatch.setattr("sys.argv", ["compress_with_extract.py", "--steps", "2"])
    example.main()
    assert len(capsys.readouterr().out.splitlines()) == len(example.RANKS) + 2
