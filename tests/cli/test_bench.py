"""`pylora bench`: choosing, exit status, output."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from pylora.cli.app import build_app

CASES = '''
import torch
from pylora.bench import Work, benchmark

@benchmark(base="a sum")
def right(rows: int = 2) -> Work:
    """A right op."""
    x = torch.ones(rows)
    return Work({"base": lambda: x.sum(), "pylora": lambda: x.sum()}, lambda: None)

@benchmark(base="a sum")
def wrong(rows: int = 2) -> Work:
    """A wrong op."""
    def check() -> None:
        assert False, "off by one"
    return Work({"base": lambda: None, "pylora": lambda: None}, check)
'''


@pytest.fixture
def cases(tmp_path: Path) -> str:
    path = tmp_path / "bench_cases.py"
    path.write_text(CASES)
    return str(path)


def bench(*arguments: str):
    return CliRunner().invoke(build_app(), ["bench", *arguments])


def test_help_teaches():
    text = bench("--help").output
    assert "pylora bench lora" in text
    assert "--plot" in text


def test_list_measures_nothing(cases: str):
    result = bench("wrong", "--file", cases, "--list")
    assert result.exit_code == 0
    assert "A wrong op." in result.output


def test_table(cases: str):
    result = bench("right", "--file", cases, "--repeat", "1")
    assert result.exit_code == 0
    assert "pylora / base" in result.output


def test_a_wrong_op_fails_and_the_others_go_on(cases: str):
    result = bench("wrong", "right", "--file", cases, "--repeat", "1", "--json")
    assert result.exit_code == 1
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    assert [line["benchmark"] for line in lines] == ["right"]
    assert "off by one" in result.output


def test_records_and_shows_them_again(cases: str, tmp_path: Path):
    results = tmp_path / "results"
    assert bench("right", "--file", cases, "--repeat", "1", "--record", "--results", str(results)).exit_code == 0
    path = results / "right.jsonl"
    assert json.loads(path.read_text())["benchmark"] == "right"
    again = bench("right", "--file", cases, "--from", str(path))
    assert again.exit_code == 0
    assert "pylora / base" in again.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonsense"], "expected one of"),
        (["lora", "--rows", "many"], "--rows: expected positive integers"),
        (["lora", "--dtype", "int4"], "--dtype: expected names among"),
        (["lora", "--rows", "12345"], "no case fits"),
        (["lora", "--grid"], "--grid: expected shapes"),
        (["lora", "--file", "/nowhere.py"], "expected a file of cases"),
        (["lora", "--from", "/nowhere.jsonl"], "nowhere"),
    ],
)
def test_a_choice_that_fits_nothing(arguments: list[str], message: str):
    result = bench(*arguments)
    assert result.exit_code == 2
    assert message in result.output
