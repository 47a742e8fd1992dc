"""Cached folders are complete or made again."""

from __future__ import annotations

from pathlib import Path

import cache
import pytest


@pytest.fixture
def finished(tmp_path):
    folder = tmp_path / "model"
    with cache.building(folder, "recipe") as scratch:
        (scratch / "weights").write_bytes(b"0123456789")
        (scratch / "sub").mkdir()
        (scratch / "sub" / "config").write_text("{}")
    return folder


def test_a_finished_folder_has_no_flaw_and_nothing_lies_beside_it(finished):
    assert cache.flaw(finished, "recipe") is None
    assert [path.name for path in finished.parent.iterdir()] == ["model"]


def test_a_folder_that_is_not_there_is_said_to_be_so(tmp_path):
    assert cache.flaw(tmp_path / "model", "recipe") == "not there yet"


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda folder: (folder / "weights").write_bytes(b"01234"), "weights has 5 bytes instead of 10"),
        (lambda folder: (folder / "weights").write_bytes(b"0123456780"), "weights has changed"),
        (lambda folder: (folder / "sub" / "config").unlink(), "sub/config is missing"),
        (lambda folder: (folder / cache.SEAL).unlink(), "never finished"),
        (lambda folder: (folder / cache.SEAL).write_text('{"recipe": "recipe", "files": {"we'), "is damaged"),
        (lambda folder: (folder / cache.SEAL).write_text('{"recipe": "recipe"}'), "is damaged"),
        (lambda folder: (folder / cache.SEAL).write_text("[]"), "is damaged"),
        (lambda folder: (folder / cache.SEAL).write_bytes(b"\xff\xfe"), "is damaged"),
    ],
)
def test_a_broken_folder_is_noticed_and_replaced(finished, break_it, words):
    break_it(finished)
    assert words in cache.flaw(finished, "recipe")
    with cache.building(finished, "recipe") as scratch:
        (scratch / "weights").write_bytes(b"fresh")
    assert cache.flaw(finished, "recipe") is None
    assert {path.name for path in finished.iterdir()} == {"weights", cache.SEAL}


def test_another_recipe_is_noticed(finished):
    assert "another version" in cache.flaw(finished, "recipe 2")


def test_a_failed_build_leaves_the_old_folder_and_no_other(finished):
    def build():
        with cache.building(finished, "recipe") as scratch:
            (scratch / "weights").write_bytes(b"half")
            raise RuntimeError("half-way")

    with pytest.raises(RuntimeError, match="half-way"):
        build()
    assert (finished / "weights").read_bytes() == b"0123456789"
    assert cache.flaw(finished, "recipe") is None
    assert [path.name for path in finished.parent.iterdir()] == ["model"]


def test_what_a_killed_run_left_is_cleared_away(finished):
    leftover = finished.parent / ".partial-model-abc"
    leftover.mkdir()
    (leftover / "weights").write_bytes(b"half")
    with cache.building(finished, "recipe"):
        assert not leftover.exists()


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({"XDG_CACHE_HOME": "/xdg", "HOME": "/home/x"}, "/xdg/pylora/demo"),
        ({"XDG_CACHE_HOME": "relative", "HOME": "/home/x"}, "/home/x/.cache/pylora/demo"),
        ({"HOME": "/home/x"}, "/home/x/.cache/pylora/demo"),
    ],
)
def test_cache_folder_follows_the_xdg_specification(monkeypatch, environment, expected):
    for name in ("XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert cache.cache_folder() == Path(expected)


@pytest.mark.parametrize("home", [None, ""])
def test_cache_folder_without_a_home_variable_is_in_the_users_home(monkeypatch, home):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    expected = Path.home() / ".cache" / "pylora" / "demo"
    if home is not None:
        monkeypatch.setenv("HOME", home)
    assert cache.cache_folder() == expected
